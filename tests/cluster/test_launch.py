"""`cairn launch --slurm` on a real SLURM: whatever befalls the job, the run ends as if nothing had."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from cairn.train.folder import RunFolder, parse_rows
from tests.cluster.conftest import ROOT, STEPS, Lab

pytestmark = pytest.mark.cluster
PROFILE = """
partition: main
time: "30"
cpus_per_task: 1
env: {OMP_NUM_THREADS: "1"}
"""
MIDDLE = STEPS // 4


def cairn(lab: Lab, *words: str | Path, profile: str = PROFILE, code: int = 0) -> str:
    """What `cairn launch --slurm` says, on the cluster's login node."""
    path = lab.here / "profile.yaml"
    path.write_text(profile)
    argv = [sys.executable, "-m", "launch.cli", "launch", "--slurm", "--cluster", path, *words]
    done = lab.cluster.run(argv, check=False, cwd=ROOT)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def launch(lab: Lab, name: str, *overrides: str, options: Sequence[str] = ()) -> int:
    """The job that trains a run on two nodes."""
    said = cairn(lab, "--nodes", "2", "--procs", "1", *options, "pretrain", *lab.pretrain(name, *overrides))
    return int(re.findall(r"^job (\d+)", said, re.M)[0])


def test_warned_and_preempted(lab: Lab, undisturbed: RunFolder) -> None:
    job = launch(lab, "warned", "track.wandb=offline")
    lab.reaches("warned", MIDDLE, job)
    lab.cluster.run(["scancel", "--signal=USR1", "--batch", str(job)])  # what comes before the time is up
    lab.cluster.wait(job, "PENDING", 60)
    lab.cluster.wait(job, "RUNNING", 60)
    urgent = lab.cluster.submit("--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true")
    lab.cluster.wait(urgent, "COMPLETED", 120)
    assert lab.cluster.wait(job, "COMPLETED", 120)["Restarts"] == "2"
    lab.identical("warned", undisturbed)
    folder = lab.folder("warned")
    starts = [path.name for path in folder.path.glob("wandb/offline-run-*")]
    assert len(starts) >= 2
    assert len({name.rpartition("-")[2] for name in starts}) == 1, "one run of wandb's"
    assert [path.name for path in folder.path.parent.glob("warned*")] == ["warned"]


def test_lost_rank(lab: Lab, undisturbed: RunFolder) -> None:
    job = launch(lab, "lost", options=["--restarts", "1"])
    lab.reaches("lost", MIDDLE, job)
    lab.cluster.run(["pkill", "-KILL", "-f", "[-]m pretrain .*run.name=lost"], on="n2")
    state = lab.cluster.wait(job, "COMPLETED", 180)
    lab.identical("lost", undisturbed)
    assert "rank 1 " in Path(state["StdOut"]).read_text()


def test_lost_node(lab: Lab, undisturbed: RunFolder) -> None:
    """The one that ran the job's script and rank 0; a third takes its place."""
    job = launch(lab, "node")
    lab.reaches("node", MIDDLE, job)
    victim = lab.cluster.job(job)["BatchHost"]
    lab.cluster.crash(victim)
    state = lab.cluster.wait(job, "COMPLETED", 240)
    assert state["Restarts"] == "1"
    assert victim not in lab.cluster.hosts(state)
    lab.identical("node", undisturbed)
    lab.cluster.boot()
    lab.cluster.idle(victim)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("partitoin: main", "partition"),
        ("signal_seconds: 7200", "signal_seconds"),
        ("partition: nowhere", "nowhere"),  # only SLURM knows
    ],
)
def test_refused_before_submission(lab: Lab, key: str, told: str) -> None:
    before = lab.cluster.jobs()
    kept = [line for line in PROFILE.splitlines() if line.partition(":")[0] != key.partition(":")[0]]
    said = cairn(lab, "pretrain", *lab.pretrain("refused"), profile="\n".join([*kept, key]), code=2)
    assert told in said
    assert "Traceback" not in said
    assert lab.cluster.jobs() == before


def test_sweep(lab: Lab) -> None:
    few = ["train.steps=12", "train.eval_samples=2"]
    rates = ["0.001", "0.01", "0.02"]
    said = cairn(
        lab, "--sweep", f"optim.lr={','.join(rates)}", "--procs", "1", "pretrain", *lab.pretrain("sweep", *few)
    )
    array = re.findall(r"^job (\d+)", said, re.M)[0]
    for task in range(len(rates)):
        lab.cluster.wait(f"{array}_{task}", "COMPLETED", 120)
    losses = []
    for rate in rates:
        rows = parse_rows(lab.folder(f"sweep-lr_{rate}").metrics)
        losses.append([row["loss"] for row in rows if "loss" in row])
        assert len(losses[-1]) == 12
    assert len({tuple(run) for run in losses}) == len(rates), "points that are one run"
