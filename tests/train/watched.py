"""`python -m tests.train.watched FOLDER LOST_SECONDS HANG_SECONDS STEPS MISHAP RANK`: ranks that take steps under a
watchdog, and a mishap that befalls one of them in step 3."""

import ctypes
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from cairn.cluster import Cluster
from cairn.config.main import run_main
from cairn.config.train import GuardSection
from cairn.errors import UserError
from cairn.train.folder import RunFolder
from cairn.train.watchdog import Watchdog


def read_sample_of_doom(seconds: float) -> None:
    """What a data function of a user does that hangs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.05)


def befall(mishap: str) -> None:
    """The mishaps."""
    if mishap == "sleep":
        read_sample_of_doom(100)
    elif mishap == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif mishap == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif mishap == "gil":
        sum(range(10**12))
    elif mishap == "gil-short":
        ctypes.PyDLL(None).sleep(3)
    elif mishap == "user-error":
        raise UserError("a mistake of the user")
    elif mishap == "crash":
        raise RuntimeError("a bug")


def main() -> None:
    """Steps."""
    folder, lost, hang, steps, mishap, rank = Path(sys.argv[1]), *map(float, sys.argv[2:5]), sys.argv[5], sys.argv[6]
    cluster = Cluster.from_env()
    section = GuardSection.model_construct(lost_seconds=lost, hang_minutes=hang / 60)
    total = torch.zeros(1)
    with ExitStack() as stack:
        stack.enter_context(cluster.init())
        with Watchdog(cluster, RunFolder(folder), section) as watchdog:
            for step in range(int(steps)):
                watchdog.phase("data", step)
                if step == 3 and cluster.rank == int(rank):
                    befall(mishap)
                watchdog.phase("step", step)
                try:
                    if cluster.world_size > 1:
                        dist.all_reduce(total)
                except RuntimeError as error:
                    if (told := watchdog.explain(error)) is None:
                        raise
                    raise told from error
                time.sleep(0.02)
                if step == 20:
                    (folder / "step-20").touch()
            if mishap == "late":
                time.sleep(1.0 if cluster.rank == int(rank) else 0.0)


if __name__ == "__main__":
    run_main(main)
