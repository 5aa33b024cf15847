"""`cairn launch --hosts` by a real sshd on this machine: two hosts that are one."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cairn.train.folder import RunFolder, parse_rows
from tests.conftest import find_port

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin")
PRIVILEGES = Path("/run/sshd")
"""An empty folder that sshd wants as root."""


@pytest.fixture
def ssh(tmp_path: Path, free_port: int) -> Iterator[list[str]]:
    """The words of an ssh that reaches this machine alone."""
    if SSHD is None or os.geteuid() != 0:
        pytest.skip("needs root and openssh-server")
    for name in ("host", "user"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
    config = tmp_path / "sshd_config"
    config.write_text(
        f"ListenAddress 127.0.0.1\nPort {free_port}\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\n"
        f"StrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\nPidFile none\nMaxStartups 50\n"
    )
    made = not PRIVILEGES.exists()
    PRIVILEGES.mkdir(exist_ok=True)
    log = (tmp_path / "sshd.log").open("w")
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stderr=log)
    try:
        deadline = time.monotonic() + 20
        while not listens(free_port):
            assert server.poll() is None, (tmp_path / "sshd.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        known = ["-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={tmp_path}/known"]
        yield ["ssh", "-F", "none", "-p", str(free_port), "-i", str(tmp_path / "user"), "-o", "LogLevel=ERROR", *known]
    finally:
        server.terminate()
        server.wait(timeout=20)
        log.close()
        if made:
            PRIVILEGES.rmdir()


def listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def launch(tmp_path: Path, ssh: list[str], port: int, hosts: str, *overrides: str) -> "subprocess.Popen[str]":
    (tmp_path / "hosts").write_text(hosts)
    options = ["--hosts", str(tmp_path / "hosts"), "--procs", "1", "--rdzv", f"127.0.0.1:{port}"]
    small = ["train.micro_batch_size=8", "train.log_every=1", "train.eval_samples=8", "track.progress=false"]
    config = [str(ROOT / "configs/vision/vit-digits.yaml"), f"run.dir={tmp_path}", "model.n_layer=1", *small]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "launch.cli",
            "launch",
            *options,
            "--ssh",
            shlex.join(ssh),
            "vision",
            *config,
            *overrides,
        ],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def rdzv() -> int:
    return find_port()  # beside free_port, which is sshd's


def await_row(process: "subprocess.Popen[str]", folder: RunFolder, deadline: float) -> None:
    while not list(parse_rows(folder.metrics)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


BOTH = "127.0.0.1\nlocalhost\n"


def test_two_hosts_stop_on_a_signal_and_go_on(tmp_path: Path, ssh: list[str], rdzv: int) -> None:
    process = launch(tmp_path, ssh, rdzv, BOTH, "run.name=a", "train.steps=100000", "schedule.name=constant")
    folder = RunFolder(tmp_path, "a")
    await_row(process, folder, time.monotonic() + 120)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert "2 x CPU" in said
    assert "checkpoint saved" in said
    steps = max(row["step"] for row in parse_rows(folder.metrics))
    process = launch(tmp_path, ssh, rdzv, BOTH, "run.name=a", "train.steps=100000", "schedule.name=constant")
    while f"going on from the checkpoint of step {steps}" not in (line := process.stdout.readline()):
        assert line, "it ended"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 0


def test_a_host_that_refuses_is_named(tmp_path: Path, ssh: list[str], rdzv: int) -> None:
    process = launch(tmp_path, ssh, rdzv, "127.0.0.1\n127.0.0.2\n", "run.name=b")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 2
    assert "error: 127.0.0.2: ssh: connect to host 127.0.0.2" in said


def test_a_cut_connection_stops_the_run(tmp_path: Path, ssh: list[str], rdzv: int) -> None:
    """kill -9 of the local end: the ranks save and stop, as nobody holds them any more."""
    process = launch(tmp_path, ssh, rdzv, BOTH, "run.name=c", "train.steps=100000", "schedule.name=constant")
    folder = RunFolder(tmp_path, "c")
    deadline = time.monotonic() + 120
    await_row(process, folder, deadline)
    process.kill()
    while not list(folder.checkpoints.glob("step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.communicate(timeout=120)  # its output's other end is held by ssh, which ends with the run
