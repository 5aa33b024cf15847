"""The sbatch script, run by a real bash with stand-ins for SLURM's commands: each notes the words it was given."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cairn.config.cluster import ClusterProfile
from cairn.errors import UserError
from launch import slurm
from launch.slurm import Batch

STAND_IN = f"""#!{sys.executable}
import json, os, signal, sys, time
name, here = os.path.basename(sys.argv[0]), os.path.dirname(sys.argv[0])
if sys.argv[1:2] == ["show"]:
    sys.exit(print("JobState=RUNNING\\n   PreemptTime=" + os.environ.get("PREEMPTED", "None")))
got = []
signal.signal(signal.SIGUSR1, lambda *_: got.append("USR1"))
note = dict(argv=sys.argv[1:], env=dict(os.environ), cwd=os.getcwd(), pid=os.getpid())
with open(os.path.join(here, name + ".tmp"), "w") as f:
    json.dump(note, f)
os.rename(f.name, os.path.join(here, name + ".json"))
if name == "srun":
    until = dict(USR1=lambda: got, TERM=lambda: os.path.exists(os.path.join(here, "scancel.json")))
    while "UNTIL" in os.environ and not until[os.environ["UNTIL"]]():
        time.sleep(0.01)
    sys.exit(int(os.environ.get("STATUS", "0")))
if name == "sbatch":
    print("sbatch: error: invalid partition" if "REFUSE" in os.environ else "77;east",
          file=sys.stderr if "REFUSE" in os.environ else sys.stdout)
    sys.exit("REFUSE" in os.environ)
"""
CPU = ClusterProfile(nodes=2)


class Bench:
    """A folder of stand-ins, and what they have noted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        for name in ("srun", "scontrol", "scancel", "sbatch"):
            (path / name).write_text(STAND_IN)
            (path / name).chmod(0o755)

    def start(self, text: str, **env: str) -> "subprocess.Popen[str]":
        for file in self.path.glob("*.json"):
            file.unlink()
        (self.path / "script.sh").write_text(text)
        env = {"PATH": f"{self.path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", **env}
        words = ["bash", str(self.path / "script.sh")]
        return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, text: str, **env: str) -> "subprocess.Popen[str]":
        """Run it to its end; on the way, send the signal that srun waits for."""
        process = self.start(text, **env)
        if "UNTIL" in env:
            deadline = time.monotonic() + 20
            while not (self.path / "srun.json").exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.Signals[f"SIG{env['UNTIL']}"])
        process.wait(timeout=30)
        return process

    def noted(self, name: str) -> dict:
        file = self.path / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else {"argv": None}


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "bin")


def batch(folder: Path, *run: str, **more: object) -> Batch:
    whole = {"options": ("--procs", "2"), "run": run, "ends": (folder / "end",), **more}
    (folder / "launch").mkdir(parents=True, exist_ok=True)
    return Batch(name="x", folder=folder, **whole)


NASTY = [
    "a b",
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "'; touch pwned; '",
    '"; touch pwned; "',
    "line\nbreak; touch pwned\n#SBATCH --uid=0",
    "\\",
    "!!",
    "*",
    "",
    "é\t\r",
    ") touch pwned (",
    "${PATH}",
    "-x",
]


def shuffled(seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("ab$`\\'\"(){}[]<>|&;!#*?~ \n\t=,%", k=rng.randint(1, 30))) for _ in range(30)]


@pytest.mark.parametrize("words", [NASTY, shuffled(1), shuffled(2)], ids=["nasty", "seed 1", "seed 2"])
def test_every_word_arrives_as_it_was(bench, tmp_path, words):
    cwd = tmp_path / "a $(touch pwned)'\" ;b%j"
    cwd.mkdir()
    shown = {f"V{i}": word for i, word in enumerate(words) if not slurm_refuses(word)}
    profile = ClusterProfile(env=shown, python="/usr/bin/py thon")
    text = slurm.script(profile, batch(Path("runs/$(x) y"), "pretrain", *words, options=("--sweep", words[0])), cwd)
    assert bench.run(text).returncode == 0
    noted = bench.noted("srun")
    at = noted["argv"].index("/usr/bin/py thon")
    assert noted["argv"][at + 1 :] == ["-m", "launch.cli", "launch", "--sweep", words[0], "pretrain", *words]
    assert {key: noted["env"][key] for key in shown} == shown
    assert noted["cwd"] == str(cwd)
    assert not list(tmp_path.rglob("pwned"))
    lines = text.splitlines()
    comments = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]  # what sbatch reads
    assert not any("uid" in line for line in comments)


def slurm_refuses(word: str) -> bool:
    """Whether a profile refuses such a value."""
    try:
        ClusterProfile(env={"A": word})
    except ValueError:
        return True
    return False


def test_an_array_passes_its_number_on(bench, tmp_path):
    many = batch(tmp_path, "vision", "c.yaml", array=True, ends=(Path("a"), Path("b")), options=("--sweep", "seed=1,2"))
    text = slurm.script(CPU, many, tmp_path)
    assert "#SBATCH --array=0-1\n" in text
    assert "slurm-%A_%a.log" in text
    bench.run(text, SLURM_ARRAY_TASK_ID="1")
    assert bench.noted("srun")["argv"][-6:] == ["--sweep", "seed=1,2", "--point", "1", "vision", "c.yaml"]


def test_what_sbatch_is_asked(tmp_path):
    profile = ClusterProfile(
        partition="gpu,big",
        constraint="[a&b]",
        time="1-00:00:00",
        nodes=2,
        gpus_per_node=8,
        gpu_request="gres",
        gpu_type="h100",
        cpus_per_task=64,
        mem="0",
        exclusive=True,
        signal_seconds=60,
        modules=["cuda/12.4"],
        sbatch={"mail-type": "END", "hold": True, "comment": "it's # me"},
    )
    lines = slurm.script(profile, batch(Path("runs/my run"), "pretrain"), tmp_path / "100%").splitlines()
    asked = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert asked == [
        "job-name=x",
        f"output='{tmp_path}/100%%/runs/my run/logs/slurm-%j.log'",
        "open-mode=append",
        "partition=gpu,big",
        "constraint='[a&b]'",
        "time=1-00:00:00",
        "nodes=2",
        "ntasks-per-node=1",
        "gres=gpu:h100:8",
        "cpus-per-task=64",
        "mem=0",
        "exclusive",
        "signal=B:USR1@60",
        "requeue",
        "mail-type=END",
        "hold",
        """comment='it'"'"'s # me'""",
    ]
    assert "module load cuda/12.4 || exit" in lines
    assert "--cpus-per-task=64" in next(line for line in lines if line.startswith("  srun "))
    plain = slurm.script(ClusterProfile(requeue=False, gpus_per_node=4), batch(Path("r"), "vision"), tmp_path)
    assert "#SBATCH --no-requeue\n" in plain
    assert "#SBATCH --gpus-per-node=4\n" in plain
    assert "scontrol" not in plain


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_containers(bench, tmp_path, runtime):
    container = {"runtime": runtime, "image": "docker://a/b:c", "mounts": ["/data:/data:ro"]}
    profile = ClusterProfile.model_validate({"container": container, "gpus_per_node": 1})
    (bench.path / "apptainer").write_text(STAND_IN)
    bench.run(slurm.script(profile, batch(tmp_path, "vision"), tmp_path))
    argv = bench.noted("srun")["argv"]
    at = argv.index("python")  # the container's own
    assert argv[at + 1 : at + 4] == ["-m", "launch.cli", "launch"]
    if runtime == "pyxis":
        assert argv[at - 3 : at] == [
            "--container-image=docker://a/b:c",
            f"--container-mounts=/data:/data:ro,{tmp_path}:{tmp_path}",
            f"--container-workdir={tmp_path}",
        ]
    else:
        binds = ["--bind", "/data:/data:ro", "--bind", f"{tmp_path}:{tmp_path}"]
        assert argv[at - 10 : at] == ["apptainer", "exec", "--nv", "--pwd", str(tmp_path), *binds, "docker://a/b:c"]


@pytest.mark.parametrize("status", [0, 138])
def test_usr1_reaches_srun_and_the_job_goes_back_into_the_queue(bench, tmp_path, status):
    done = bench.run(slurm.script(CPU, batch(tmp_path, "vision"), tmp_path), UNTIL="USR1", STATUS=str(status))
    assert done.returncode == 0
    assert bench.noted("scontrol")["argv"] == ["requeue", "77"]


def test_a_run_that_is_whole_does_not_go_back(bench, tmp_path):
    (tmp_path / "end").mkdir()
    done = bench.run(slurm.script(CPU, batch(tmp_path, "vision"), tmp_path), UNTIL="USR1")
    assert done.returncode == 0
    assert bench.noted("scontrol")["argv"] is None


@pytest.mark.parametrize(("status", "usr1"), [(0, False), (1, False), (2, True), (130, False), (75, False)])
def test_other_ends_are_the_jobs_end(bench, tmp_path, status, usr1):
    env = {"UNTIL": "USR1"} if usr1 else {}
    done = bench.run(slurm.script(CPU, batch(tmp_path, "vision"), tmp_path), STATUS=str(status), **env)
    assert done.returncode == status
    assert bench.noted("scontrol")["argv"] is None


def test_a_lost_rank_is_tried_again_so_often(bench, tmp_path):
    text = slurm.script(CPU, batch(tmp_path, "vision", restarts=2), tmp_path)
    ends = []
    for _ in range(3):
        done = bench.run(text, STATUS="75")
        ends.append((done.returncode, bench.noted("scontrol")["argv"]))
    assert ends == [(0, ["requeue", "77"]), (0, ["requeue", "77"]), (75, None)]
    assert bench.run(text, STATUS="75", SLURM_JOB_ID="78").returncode == 0  # another job counts for itself
    assert bench.run(text, STATUS="137", SLURM_JOB_ID="79").returncode == 0  # killed, as for want of memory
    for status in (1, 2, 130, 143):  # Ctrl-C and scancel among them
        assert bench.run(text, STATUS=str(status), SLURM_JOB_ID="80").returncode == status
        assert bench.noted("scontrol")["argv"] is None


def test_a_retry_that_cannot_be_counted_is_none(bench, tmp_path):
    text = slurm.script(CPU, batch(tmp_path, "vision", restarts=2), tmp_path)
    (tmp_path / "launch").rmdir()
    assert bench.run(text, STATUS="75").returncode == 75
    assert bench.noted("scontrol")["argv"] is None


def test_term_goes_to_the_ranks_by_slurm_as_srun_would_kill_them(bench, tmp_path):
    text = slurm.script(CPU, batch(tmp_path, "vision"), tmp_path)
    done = bench.run(text, UNTIL="TERM", STATUS="0")
    assert done.returncode == 0
    assert bench.noted("scancel")["argv"] == ["--quiet", "--signal=TERM", "77"]
    assert bench.noted("scontrol")["argv"] is None


def test_ending_in_the_grace_time_of_a_preemption_is_not_the_end(bench, tmp_path):
    text = slurm.script(CPU, batch(tmp_path, "vision"), tmp_path)
    for status, asked in (("0", ["requeue", "77"]), ("143", ["requeue", "77"]), ("2", None)):
        bench.run(text, PREEMPTED="2026-01-01T00:00:00", STATUS=status)
        assert bench.noted("scontrol")["argv"] == asked
    (tmp_path / "end").mkdir()
    bench.run(text, PREEMPTED="2026-01-01T00:00:00")
    assert bench.noted("scontrol")["argv"] is None


def test_a_lost_rank_after_scancel_is_not_tried_again(bench, tmp_path):
    text = slurm.script(CPU, batch(tmp_path, "vision", restarts=2), tmp_path)
    assert bench.run(text, UNTIL="TERM", STATUS="75").returncode == 75
    assert bench.noted("scontrol")["argv"] is None


def test_submitting(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{bench.path}:{os.environ['PATH']}")
    job = Batch("x", tmp_path / "runs" / "x", (), ("vision",), (tmp_path,))
    assert slurm.submit("text", job) == "77"
    path = tmp_path / "runs/x/launch/sbatch.sh"
    assert bench.noted("sbatch")["argv"] == ["--parsable", str(path)]
    assert path.read_text() == "text"
    assert (tmp_path / "runs/x/logs").is_dir()  # or the job would have no log
    told = slurm.told(CPU, job, "77")
    assert f"tail -F {tmp_path}/runs/x/logs/slurm-77.log" in told


def test_sbatch_refuses_or_is_absent(bench, tmp_path, monkeypatch):
    job = batch(tmp_path / "x", "vision")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not on this machine"):
        slurm.submit("text", job)
    monkeypatch.setenv("PATH", str(bench.path))
    monkeypatch.setenv("REFUSE", "1")
    with pytest.raises(UserError, match=r"sbatch refused .*: sbatch: error: invalid partition"):
        slurm.submit("text", job)


@pytest.mark.parametrize("cwd", ["/a\nb", "/a\\b"])
def test_folders_that_a_directive_cannot_name(tmp_path, cwd):
    with pytest.raises(UserError, match="no line break, control character or backslash"):
        slurm.script(CPU, batch(tmp_path, "vision"), Path(cwd))


def test_secrets_stay_out(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hush-hush")
    assert "hush-hush" not in slurm.script(CPU, batch(tmp_path, "vision"), tmp_path)
