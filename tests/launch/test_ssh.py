"""Launchers held by ssh, with a stand-in that runs the command here."""

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cairn.errors import UserError
from launch import ssh
from launch.ssh import Host, read_hosts
from tests.launch.launchers import train_two

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stand_in(tmp_path):
    """An ssh that notes its words, cannot reach the host `down`, and gives the command to a shell elsewhere."""
    path = tmp_path / "ssh stand-in"
    path.write_text(
        f"""#!{sys.executable}
import json, os, sys
at = sys.argv.index("--")
host = sys.argv[at - 1]
with open({str(tmp_path)!r} + "/" + host + ".json", "w") as f:
    json.dump(sys.argv[1:], f)
if host == "down":
    sys.exit(print("ssh: connect to host down port 22: Connection refused", file=sys.stderr) or 255)
os.chdir("/")
os.execv("/bin/sh", ["sh", "-c", " ".join(sys.argv[at + 1:])])
"""
    )
    path.chmod(0o755)
    return path


def test_a_hosts_file(tmp_path):
    (tmp_path / "hosts").write_text("# ours\nnode1\n\n  me@node2.lan gpus=4  # big\n10.0.0.3 procs=2\n")
    hosts = read_hosts(tmp_path / "hosts", ("--gpus", "8"))
    assert [(host.name, host.address, host.ranks) for host in hosts] == [
        ("node1", "node1", 8),
        ("me@node2.lan", "node2.lan", 4),
        ("10.0.0.3", "10.0.0.3", 2),
    ]
    assert hosts[2].count == ("--procs", "2")
    (tmp_path / "hosts").write_text("a")
    assert read_hosts(tmp_path / "hosts")[0].ranks is None


def test_every_mistake_in_it_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("-oProxyCommand=x\na;b\na gpu=4\na gpus=0\na gpus=1 procs=1\nok\nok\n")
    with pytest.raises(UserError) as error:
        read_hosts(Path("hosts"))
    assert [re.split(": ", line)[0] for line in str(error.value).splitlines()] == [
        f"hosts:{n}" for n in (1, 2, 3, 4, 5, 7)
    ]
    Path("hosts").write_text("# none\n")
    with pytest.raises(UserError, match="hosts: no host in it"):
        read_hosts(Path("hosts"))
    with pytest.raises(UserError, match="No such file"):
        read_hosts(Path("nothing"))


def test_every_word_arrives_as_it_was(tmp_path, monkeypatch):
    python = tmp_path / "py $(touch pwned)"
    python.write_text(f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([os.getcwd(), *sys.argv[1:]]))\n")
    python.chmod(0o755)
    cwd = tmp_path / "it's; touch pwned"
    cwd.mkdir()
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("NCCL_X", "$(touch pwned)\n'\"")
    words = ["vision", "$(touch pwned)", "a b", "'", '"; touch pwned', "`x`\n", "\\", ""]
    text = ssh.command(Host("h", ("--procs", "2")), ["--until-eof"], words, cwd)
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, cwd=tmp_path, timeout=30)
    assert done.returncode == 0, done.stderr
    launch = ["-m", "launch.cli", "launch", "--until-eof", "--procs", "2", *words]
    assert json.loads(done.stdout) == [str(cwd), *launch]
    assert not list(tmp_path.rglob("pwned"))


def test_settings_go_along_and_secrets_do_not(monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("NCCL_SECRET", "hush")
    monkeypatch.setenv("WANDB_API_KEY", "hush")
    text = ssh.command(Host("h"), [], ["vision"], Path("/x"))
    assert "NCCL_DEBUG=INFO" in text
    assert "hush" not in text


HELD = """
import sys
print("out", sys.argv[1], flush=True)
print("err", sys.argv[1], file=sys.stderr, flush=True)
said = [line.strip() for line in sys.stdin]
print("heard", sys.argv[1], said, file=sys.stderr, flush=True)
sys.exit(int(sys.argv[2]))
"""
RUN = """
import sys
from cairn.config.main import run_main
from launch import ssh
run_main(lambda: ssh.run([(ssh.Host(name), words) for name, *words in {commands!r}]))
"""


def started(*commands: list[str], nohup: bool = False) -> "subprocess.Popen[str]":
    """ssh.run in a process of its own. Each command: the host, then words."""
    program = RUN.format(commands=[list(command) for command in commands])
    if nohup:
        program = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + program
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def held(name: str, status: int = 0) -> list[str]:
    return [name, sys.executable, "-c", HELD, name, str(status)]


def until(process: "subprocess.Popen[str]", *texts: str) -> str:
    """Lines of stderr up to where each text has been in one."""
    said, left = "", set(texts)
    while left:
        line = process.stderr.readline()
        assert line, said
        said += line
        left -= {text for text in left if text in line}
    return said


@pytest.mark.parametrize(("number", "heard"), [(signal.SIGTERM, []), (signal.SIGINT, []), (signal.SIGUSR1, ["USR1"])])
def test_signals_reach_every_host(number, heard):
    process = started(held("a"), held("b", 3))
    try:
        said = until(process, "err a", "[b] err b")
        process.send_signal(number)
        if number == signal.SIGUSR1:
            process.send_signal(signal.SIGTERM)  # USR1 alone does not end them
        out, more = process.communicate(timeout=30)
    finally:
        process.kill()
    assert f"heard a {heard}" in more.splitlines()
    assert f"[b] heard b {heard}" in more.splitlines()
    assert process.returncode == 3
    assert out == "out a\n"  # of the first host alone
    assert "err a\n" in said


@pytest.mark.parametrize(("nohup", "heard"), [(True, ["USR1"]), (False, [])])
def test_under_nohup_the_end_of_the_terminal_ends_nothing(nohup, heard):
    process = started(held("a"), nohup=nohup)
    try:
        until(process, "err a")
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
            process.send_signal(number)
        assert f"heard a {heard}" in process.communicate(timeout=30)[1]
    finally:
        process.kill()


def test_nobody_reading_is_no_reason_to_hang():
    process = started(held("a"))
    try:
        until(process, "err a")
        process.stderr.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()


def test_one_that_fails_stops_the_others():
    fails = ["b", sys.executable, "-c", "import sys; sys.exit('no such GPU')"]
    process = started(held("a"), fails)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert "[b] no such GPU" in said
    assert "heard a []" in said


def test_a_host_that_cannot_be_reached_is_named(tmp_path, stand_in):
    words = ssh.start_line([str(stand_in)], Host("down"), "true")
    process = started(held("a"), ["down", *words])
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 2
    assert said.splitlines()[-1] == "error: down: ssh: connect to host down port 22: Connection refused"
    assert json.loads((tmp_path / "down.json").read_text()) == ["-o", "BatchMode=yes", "down", "--", "true"]


def test_no_ssh():
    with pytest.raises(UserError, match="no-such-ssh is not on this machine"):
        ssh.run([(Host("a"), ["no-such-ssh"])])
    with pytest.raises(UserError, match="/etc/passwd: Permission denied"):
        ssh.run([(Host("a"), ["/etc/passwd"])])


def test_a_second_interrupt_ends_ssh_itself():
    deaf = "import sys, time\nsay = lambda text: print(text, file=sys.stderr, flush=True)\n"
    deaf += "say('there')\nsys.stdin.read()\nsay('deaf')\nwhile True: time.sleep(1)"
    process = started(["a", sys.executable, "-c", deaf])
    try:
        until(process, "there")
        process.send_signal(signal.SIGINT)
        until(process, "deaf")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 128 + signal.SIGKILL
    finally:
        process.kill()


@pytest.mark.slow
def test_two_hosts_train_together(tmp_path, stand_in, free_port):
    (tmp_path / "hosts").write_text("127.0.0.1 procs=1\nlocalhost procs=1\n")
    where = ["--hosts", str(tmp_path / "hosts"), "--ssh", shlex.quote(str(stand_in))]
    train_two(tmp_path, *where, "--rdzv", f"127.0.0.1:{free_port}")
    assert (tmp_path / "two/logs/rank-00001.log").exists()
