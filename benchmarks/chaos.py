"""Kill a small run at random moments until it ends, and compare it with an undisturbed one.

    python -m benchmarks.chaos --kills 100 [--seed N] [--ranks N]

Every start is `cairn launch --procs N pretrain CONFIG` through the front door. A mishap strikes at a random step: kill
-9 of a rank, of the launcher or of all, SIGTERM, SIGUSR1 or SIGINT to the launcher, half of them while it saves or
evaluates; and a full disk, where a small tmpfs can be mounted (as root). The run is started again after each, until it
ends. Its rows and the tensors of its last checkpoint must be those of the undisturbed run, to the bit.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cairn.train.checkpoint import newest
from cairn.train.folder import RunFolder, parse_rows

CONFIG = """
tokenizer: {{name: bytes}}
data: {{source: {here}/corpus, dir: {here}/data, workers: 1, held_out: 0.2}}
model: {{name: gpt, n_layer: 2, n_head: 2, d_model: 32, max_seq_len: 32, dropout: 0.1}}
optim: {{name: adamw, lr: 0.003}}
schedule: {{warmup_steps: 5}}
engine: {{precision: fp32}}
train: {{steps: {steps}, global_batch_size: 8, micro_batch_size: 4, log_every: 1, eval_every: 7, eval_samples: 64}}
checkpoint: {{every: 5}}
track: {{progress: false}}
"""
RANK_KINDS = ("kill a rank", "kill the launcher", "kill all", "SIGTERM", "SIGUSR1", "SIGINT")
MOMENTS = ("step", "step", "save", "evaluation")
LIMIT_S = 120.0
"""Longest that a start may take to its first step, and a struck run to end."""
FAR = 12
"""Steps, at most, between a start's first one and its mishap."""


@dataclass
class Report:
    """What happened."""

    strikes: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    seconds: float = 0.0
    recovery: list[float] = field(default_factory=list)
    """Seconds from a start to its first new row."""
    lost_steps: list[int] = field(default_factory=list)
    """Steps that a strike had made and that had to be made again."""


class Arena:
    """A folder with a corpus, a config, and the runs `undisturbed` and `struck`; the latter on a tmpfs, as root."""

    def __init__(self, here: Path, ranks: int, steps: int, tmpfs_mb: int = 24) -> None:
        self.here, self.ranks, self.steps = here, ranks, steps
        self.undisturbed = RunFolder(here, "calm", "undisturbed")
        self.struck = RunFolder(here, "chaos", "struck")
        (here / "corpus").mkdir()
        for name in ("argparse", "ast", "calendar", "configparser", "csv", "datetime", "decimal", "difflib", "enum"):
            module = __import__(name)
            text = Path(str(module.__file__)).read_text(encoding="utf-8")
            (here / "corpus" / f"{name}.txt").write_text(text[:20_000], encoding="utf-8")
        self.config = here / "chaos.yaml"
        self.config.write_text(CONFIG.format(here=here, steps=steps))
        (here / "chaos").mkdir()
        self.started: list[subprocess.Popen[bytes]] = []
        self.mounted = False
        if os.geteuid() == 0:
            options = f"size={tmpfs_mb}m"
            mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(here / "chaos")]
            self.mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def close(self) -> None:
        """End what still runs, after Ctrl-C or a failure, and unmount."""
        for process in self.started:
            process.kill()  # its ranks die with it
            process.wait()
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.here / "chaos")], check=True)

    def start(self, folder: RunFolder) -> "subprocess.Popen[bytes]":
        """`cairn launch`, in a process group of its own."""
        command = [sys.executable, "-m", "launch.cli", "launch", "--procs", str(self.ranks), "pretrain"]
        command += [str(self.config), f"run.dir={folder.path.parent}", f"run.name={folder.path.name}"]
        env = dict(os.environ, OMP_NUM_THREADS="1")
        with (self.here / f"{folder.path.name}.log").open("ab") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self.started.append(process)
        return process

    def log(self, folder: RunFolder) -> str:
        """The end of what the starts of a run printed."""
        return (self.here / f"{folder.path.name}.log").read_text(encoding="utf-8", errors="replace")[-4000:]


def last_step(folder: RunFolder) -> int:
    """The newest training row's step; 0 before the first."""
    return max((row["step"] for row in parse_rows(folder.metrics) if "loss" in row), default=0)


def descendants(pid: int) -> list[int]:
    """Processes below one, the nearest first."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def rank_pids(pid: int) -> list[int]:
    """The launcher's ranks, in order."""
    pids = []
    for child in descendants(pid):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            rank = next((int(word[5:]) for word in words if word.startswith(b"RANK=")), None)
            if rank is not None:
                pids.append((rank, child))
    return [child for _, child in sorted(pids)]


def until(process: "subprocess.Popen[bytes]", arena: Arena, met: Callable[[], bool]) -> bool:
    """Wait until `met()`; False when the process has ended before. Raises TimeoutError."""
    deadline = time.monotonic() + LIMIT_S
    while process.poll() is None:
        if met():
            return True
        if time.monotonic() > deadline:
            process.kill()
            raise TimeoutError(f"nothing for {LIMIT_S:.0f} s; the end of the log:\n{arena.log(arena.struck)}")
        time.sleep(0.002)
    return False


def await_moment(process: "subprocess.Popen[bytes]", arena: Arena, moment: str, step: int) -> bool:
    """Wait for a step, and then for the next save or evaluation if that is the moment; False: the run has ended."""
    folder = arena.struck
    if not until(process, arena, lambda: last_step(folder) >= step):
        return False
    if moment == "save":
        return until(process, arena, lambda: any(folder.checkpoints.glob(".tmp-step-*")))
    if moment == "evaluation":  # its row comes after that of the step before it
        return until(process, arena, lambda: last_step(folder) % 7 == 0)
    return True


def strike(process: "subprocess.Popen[bytes]", arena: Arena, kind: str, rng: random.Random) -> None:
    """Do it, and wait until everything of this start has ended.

    Raises TimeoutError when it hangs, AssertionError when a signal does not end it well.
    """
    ranks = rank_pids(process.pid)
    if kind == "disk full":
        filler = arena.struck.path.parent / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 65536)
        until(process, arena, lambda: False)
        filler.unlink()
    elif kind.startswith("kill"):
        chosen = {"kill a rank": [rng.choice(ranks)] if ranks else [], "kill the launcher": [process.pid]}
        for pid in chosen.get(kind, [process.pid, *ranks]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    else:
        process.send_signal(signal.Signals[kind])
    until(process, arena, lambda: False)
    if kind.startswith("SIG"):
        assert process.returncode == 0, f"{kind} ended with {process.returncode}:\n{arena.log(arena.struck)}"
    deadline = time.monotonic() + LIMIT_S
    while any(Path(f"/proc/{pid}").exists() and not is_zombie(pid) for pid in ranks):
        if time.monotonic() > deadline:
            raise TimeoutError(f"after '{kind}' ranks {ranks} went on for {LIMIT_S:.0f} s")
        time.sleep(0.01)


def is_zombie(pid: int) -> bool:
    """Whether a process has ended and only waits to be reaped (where pid 1 does not do so)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def run_chaos(arena: Arena, kills: int, seed: int) -> Report:
    """Strike `kills` times, then let the run end. Raises AssertionError when a start ends otherwise than it should."""
    rng, report, began = random.Random(seed), Report(), time.monotonic()
    kinds = [*RANK_KINDS, "disk full"] if arena.mounted else [*RANK_KINDS]
    plan = [kinds[i % len(kinds)] for i in range(kills)]
    rng.shuffle(plan)
    while True:
        kind = plan[-1] if plan else ""
        before, start = last_step(arena.struck), time.monotonic()
        process = arena.start(arena.struck)
        report.starts += 1
        if not kind:
            code = process.wait(LIMIT_S * 10)
            assert code == 0, f"the last start ended with {code}:\n{arena.log(arena.struck)}"
            break
        moment = rng.choice(MOMENTS) if kind != "disk full" else "step"
        resumed = checkpoint_step(arena.struck)
        going = until(process, arena, lambda floor=resumed, since=start: fresh(arena.struck, floor, since))
        if going:
            report.recovery.append(time.monotonic() - start)
            report.lost_steps.append(max(0, before - resumed))
            going = await_moment(process, arena, moment, last_step(arena.struck) + rng.randrange(FAR))
        if not going:
            code = process.wait(LIMIT_S)
            assert code == 0, f"a start that nothing had struck ended with {code}:\n{arena.log(arena.struck)}"
            break  # the run is done before all were used up
        strike(process, arena, kind, rng)
        report.strikes[f"{kind} ({moment})" if kind != "disk full" else kind] += 1
        plan.pop()
    report.seconds = time.monotonic() - began
    return report


def checkpoint_step(folder: RunFolder) -> int:
    """Step of the newest checkpoint; 0 without one."""
    steps = [int(path.name[5:]) for path in folder.checkpoints.glob("step-*")]
    return max(steps, default=0)


def fresh(folder: RunFolder, floor: int, since: float) -> bool:
    """Whether this start has written a row: the file has been rewritten since, and goes beyond the checkpoint."""
    with contextlib.suppress(OSError):
        age = time.time() - folder.metrics.stat().st_mtime
        return age < time.monotonic() - since and last_step(folder) > floor
    return False


def differences(arena: Arena) -> list[str]:
    """Where the struck run is not the undisturbed one."""
    found = []
    timing = {"tokens_per_s", "step_seconds", "flops_per_s", "mfu", "data_wait", "memory_gb"}
    tables = [
        [{k: v for k, v in row.items() if k not in timing} for row in parse_rows(folder.metrics)]
        for folder in (arena.undisturbed, arena.struck)
    ]
    for calm, struck in zip(*tables, strict=False):
        if json.dumps(calm) != json.dumps(struck):
            found.append(f"row {calm} became {struck}")
            break
    if len(tables[0]) != len(tables[1]):
        found.append(f"{len(tables[0])} rows became {len(tables[1])}")
    (calm, _), (struck, _) = newest(arena.undisturbed.checkpoints), newest(arena.struck.checkpoints)
    assert calm is not None
    assert struck is not None
    if calm.step != struck.step or sorted(calm.names()) != sorted(struck.names()):
        return [*found, f"the last checkpoint is of step {struck.step}, not {calm.step}, or holds other tensors"]
    for name in calm.names():
        a, b = calm.read(name), struck.read(name)
        if a is None or b is None or not torch.equal(a, b):
            found.append(f"tensor {name}")
    return found


@contextlib.contextmanager
def arena_in(folder: Path, ranks: int, steps: int) -> Iterator[Arena]:
    """An arena with its undisturbed run done."""
    arena = Arena(folder, ranks, steps)
    try:
        process = arena.start(arena.undisturbed)
        code = process.wait(LIMIT_S * 10)
        assert code == 0, f"the undisturbed run ended with {code}:\n{arena.log(arena.undisturbed)}"
        yield arena
    finally:
        arena.close()


def main() -> int:
    """The command: 0 when both runs are the same."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="mishaps (30)")
    parser.add_argument("--seed", type=int, default=0, help="of the mishaps (0)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (2)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    with arena_in(folder, args.ranks, steps=30 * args.kills) as arena:
        report = run_chaos(arena, args.kills, args.seed)
        found = differences(arena)
    print(f"{sum(report.strikes.values())} mishaps in {report.starts} starts, {report.seconds:.0f} s")
    for kind, count in sorted(report.strikes.items()):
        print(f"  {count:3} {kind}")
    recovery, lost = sorted(report.recovery), sorted(report.lost_steps)
    print(
        f"from start to the first new step: median {recovery[len(recovery) // 2]:.1f} s, longest {recovery[-1]:.1f} s"
    )
    print(f"steps made again after a mishap: median {lost[len(lost) // 2]}, most {lost[-1]} (a checkpoint every 5)")
    print("\n".join(found) if found else "identical: every row and every tensor of the last checkpoint")
    if not found:
        shutil.rmtree(folder)
    else:
        print(f"both runs are in {folder}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
