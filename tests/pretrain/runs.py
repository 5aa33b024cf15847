"""Start `python -m pretrain` many times at little cost: each is a fork of a server that has imported torch already."""

import importlib
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cairn.train.folder import RunFolder, parse_rows
from launch.job import ALLOCATOR

MUON = "deepspeed.runtime.zero.muon.original_muon"  # which compiles when first imported
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "tests.pretrain.runs",
        "cairn.train.language_model",
        "cairn.train.trainer",
        "torch._dynamo",
        "deepspeed.runtime.zero.muon.original_muon",
    ]
)
LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_")
LIMIT_S = 240.0
Before = Callable[[int], None]


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    codes: list[int]
    """Exit status of each rank; minus the signal that killed it."""
    output: list[str]
    """What each rank printed, on both streams."""

    @property
    def text(self) -> str:
        return "\n".join(self.output)


class Job:
    """The processes of one command."""

    def __init__(self, processes: list[Any], logs: list[Path]) -> None:
        self.processes, self.logs = processes, logs

    def wait(self) -> Done:
        deadline = time.monotonic() + LIMIT_S
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        done = Done([process.exitcode for process in self.processes], [log.read_text() for log in self.logs])
        assert not late, f"did not end:\n{done.text}"
        return done


def start(
    *argv: str | Path,
    folder: Path,
    ranks: int = 1,
    launcher: str = "torchrun",
    module: str = "pretrain",
    before: Before | None = None,
) -> Job:
    """Start `python -m MODULE ARGV` on several ranks, with the variables that the launcher would set.

    before: called with the rank in each process first, to plan a mishap.
    """
    logs = [folder / f"log-{time.monotonic_ns()}-{rank}" for rank in range(ranks)]
    port = free_port()
    processes = []
    for rank in range(ranks):
        env = (torchrun_env if launcher == "torchrun" else srun_env)(rank, ranks, port) if ranks > 1 else {}
        args = (module, [str(arg) for arg in argv], env, logs[rank], rank, before)
        processes.append(FORKS.Process(target=_child, args=args))  # type: ignore[attr-defined]
        processes[-1].start()
    return Job(processes, logs)


def run(*argv: str | Path, code: int = 0, **options: Any) -> Done:
    """`start`, and wait until every rank has ended with `code`."""
    done = start(*argv, **options).wait()
    assert done.codes == [code] * len(done.codes), f"{done.codes}\n{done.text}"
    assert "Traceback" not in done.text, done.text
    return done


def torchrun_env(rank: int, ranks: int, port: int) -> dict[str, str]:
    env = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {key: str(value) for key, value in env.items()} | {"MASTER_ADDR": "127.0.0.1"}


def srun_env(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What srun sets for two tasks on one node; the port follows from the job's number."""
    env = {"PROCID": rank, "LOCALID": rank, "NTASKS": ranks, "STEP_NUM_TASKS": ranks, "JOB_ID": port - 15000}
    more = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": str(ranks), "SLURM_STEP_ID": "0"}
    return {f"SLURM_{key}": str(value) for key, value in env.items()} | more


def free_port() -> int:
    """A free port among those that a SLURM job's number can give."""
    for port in range(15000 + 37 * os.getpid() % 9000, 25000):  # not near that of a test worker started just before
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no free port")


def _child(module: str, argv: list[str], env: dict[str, str], log: Path, rank: int, before: Before | None) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for key in [key for key in os.environ if key.startswith(LAUNCHERS)]:
        del os.environ[key]
    os.environ.update(ALLOCATOR | env | {"OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)  # OMP_NUM_THREADS comes too late: the server has loaded torch
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if before is not None:
        before(rank)
    sys.argv[:] = [module, *argv]
    runpy.run_module(module, run_name="__main__")


@dataclass(frozen=True)
class Mishap:
    """Send this process a signal when it begins its `at`-th call of a method, of the task as a rule, from 1 on."""

    number: signal.Signals
    at: int
    method: str = "step"
    owner: str = "cairn.train.language_model:LanguageModel"
    rank: int | None = None
    """The rank it befalls; None: every one."""
    checkpoint: Path | None = None
    """Wait for this first: a checkpoint that is being written in the background."""
    times: int = 1

    def __call__(self, rank: int) -> None:
        if self.rank not in (None, rank):
            return
        module, _, name = self.owner.partition(":")
        owner = getattr(importlib.import_module(module), name)
        method, calls = getattr(owner, self.method), []

        def struck(*args: Any, **kwargs: Any) -> Any:
            calls.append(None)
            if len(calls) == self.at:
                while self.checkpoint is not None and not self.checkpoint.exists():
                    time.sleep(0.005)
                for _ in range(self.times):
                    os.kill(os.getpid(), self.number)
            return method(*args, **kwargs)

        setattr(owner, self.method, struck)


def rows(folder: RunFolder) -> list[dict[str, Any]]:
    """Rows of training steps."""
    return [row for row in parse_rows(folder.metrics) if "loss" in row]


def steps(folder: RunFolder) -> list[int]:
    """The steps that have a row, in the order of the file."""
    return [row["step"] for row in rows(folder)]


def losses(folder: RunFolder) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def copied(folder: RunFolder, name: str) -> RunFolder:
    """A copy of a run folder under another name."""
    path = folder.path.with_name(name)
    shutil.copytree(folder.path, path)
    return RunFolder(path)
