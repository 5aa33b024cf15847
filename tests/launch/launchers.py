"""Start real launchers whose ranks do what a test says; `python -m tests.launch.launchers` is one of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cairn.config.main import run_main
from launch import link, node, rendezvous
from launch.job import Job

ROOT = Path(__file__).parents[2]
LIMIT_S = 60.0
PRELUDE = "import os, sys, time, signal, pathlib; folder = pathlib.Path(folder)\n"


class Launcher:
    """One launcher: `code` is run by each of its ranks, which find `rank`, `local`, `world` and `folder`."""

    def __init__(
        self,
        folder: Path,
        code: str,
        *,
        module: str = "tests.launch.rank",
        args: list[str] | None = None,
        ranks: int = 1,
        restarts: int = 0,
        constants: dict[str, float] | None = None,
        env: dict[str, str] | None = None,
        stdin: Any = subprocess.DEVNULL,
        stdout: Any = subprocess.PIPE,
        **options: Any,
    ) -> None:
        args = [PRELUDE + code, str(folder)] if args is None else args
        job = {"module": module, "args": args, "folder": str(folder), "ranks": ranks, "restarts": restarts}
        own = {"job": job, "options": options, "constants": constants or {}}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.launch.launchers", json.dumps(own)],
            env=clean() | {"PYTHONFAULTHANDLER": "1"} | (env or {}),
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.STDOUT if stdout != subprocess.PIPE else subprocess.PIPE,
        )
        self.folder = folder

    def end(self, status: int, limit_s: float = LIMIT_S) -> str:
        """What it said, once it has ended with this status; stdout, then stderr."""
        try:
            out, err = self.process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            out, err = self.process.communicate()
            raise AssertionError(f"did not end:\n{(out or b'').decode()}\n{(err or b'').decode()}") from None
        text = (out or b"").decode(errors="replace") + (err or b"").decode(errors="replace")
        assert self.process.returncode == status, f"{self.process.returncode}, not {status}:\n{text}"
        return text

    def log(self, rank: int) -> list[str]:
        """The lines of a rank's log without its prefix and its header lines."""
        text = (self.folder / "logs" / f"rank-{rank:05}.log").read_text()
        lines = [re.fullmatch(rf"\[rank {rank} [^\] ]+\] (.*)", line) for line in text.splitlines()]
        assert all(lines), text
        return [line[1] for line in lines if line and not re.match(r"\d{4}-\d\d-\d\d .* attempt \d+: ", line[1])]


def until(found: Callable[[], Any], limit_s: float = LIMIT_S) -> Any:
    """What `found` gives, once it gives anything."""
    deadline = time.monotonic() + limit_s
    while not (value := found()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return value


def clean() -> dict[str, str]:
    """The environment without what other tests, and torch within them, have left there: it is not the user's word."""
    foreign = ("SLURM_", "RANK", "WORLD", "LOCAL_", "MASTER_", "TORCH", "TRITON_", "PYTORCH_", "MALLOC_")
    return {k: v for k, v in os.environ.items() if not k.startswith(foreign)} | {"OMP_NUM_THREADS": "1"}


def train_two(folder: Path, *where: str) -> None:
    """`cairn launch WHERE vision ...`, two steps on two processes, as the run `two` in a folder."""
    config = [str(ROOT / "configs/vision/vit-digits.yaml"), f"run.dir={folder}", "run.name=two", "train.steps=2"]
    config += ["train.micro_batch_size=8", "train.eval_samples=8", "track.progress=false", "model.n_layer=1"]
    command = [sys.executable, "-m", "launch.cli", "launch", *where, "vision", *config]
    done = subprocess.run(command, cwd=ROOT, env=clean(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "parameters on 2 x CPU" in done.stdout
    assert "finished 2 steps" in done.stdout


def runs(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def main() -> int:
    """What the test asks for."""
    asked = json.loads(sys.argv[1])
    for name, value in asked["constants"].items():
        owner = next(module for module in (node, rendezvous, link) if hasattr(module, name))
        setattr(owner, name, value)
    job = asked["job"]
    return node.run(
        Job(job["module"], tuple(job["args"]), Path(job["folder"]), job["ranks"], job["restarts"]), **asked["options"]
    )


if __name__ == "__main__":
    run_main(main)
