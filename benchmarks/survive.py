"""What surviving costs: saves in the background, coming back from kill -9, the watchdog and the guard.

    python -m benchmarks.survive [--saves 24] [--rounds 2] [--kills 5]

Medians with ranges. Runs that are compared take turns, each in a process of its own.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.chaos import rank_pids
from cairn.train.folder import RunFolder, parse_rows
from launch.job import ALLOCATOR

CONFIG = "configs/pretrain/gpt-tiny.yaml"
EVERY = 4
"""Steps between two saves."""


def overrides(folder: str, *more: str) -> list[str]:
    """Arguments of a measured run, whose metrics come every step."""
    quiet = ["track.progress=false", "train.log_every=1", "train.eval_every=0", "train.eval_samples=8"]
    return [CONFIG, f"run.dir={folder}", *quiet, *more]


def work_save(argv: list[str]) -> None:
    """Train, and print how long the loop stood still for each save (s) and how long each step took."""
    from cairn.train.checkpoint import CheckpointStore
    from cairn.train.engine import Engine

    stalls: list[float] = []
    save, copied = CheckpointStore.save, Engine.copied

    def timed(*args: Any) -> None:
        begin = time.perf_counter()
        save(*args)
        stalls.append(time.perf_counter() - begin)

    def waited(engine: Engine) -> None:
        """The next step's wait for copies belongs to the save before it; the writing thread's does not."""
        begin = time.perf_counter()
        copied(engine)
        if stalls and threading.current_thread() is threading.main_thread():
            stalls[-1] += time.perf_counter() - begin

    CheckpointStore.save, Engine.copied = timed, waited  # type: ignore[method-assign]
    pretrain(argv)
    (folder,) = (Path(word.removeprefix("run.dir=")) for word in argv if word.startswith("run.dir="))
    rows = [row for row in parse_rows(next(folder.glob("*/metrics.jsonl"))) if "step_seconds" in row]
    sizes = [sum(f.stat().st_size for f in path.iterdir()) for path in folder.glob("*/checkpoints/step-*")]
    steps = {row["step"]: row["step_seconds"] for row in rows}
    print(json.dumps({"stalls": stalls, "steps": steps, "bytes": sizes[-1]}))


def work_restart(argv: list[str]) -> None:
    """Train until the first row, and print how long each part of the way took (s)."""
    began = float(os.environ["BENCH_BEGAN"])
    parts: dict[str, float] = {}

    def during(name: str, owner: Any, method: str) -> None:
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.time()
            result = inner(*args, **kwargs)
            parts[name] = parts.get(name, 0.0) + time.time() - begin
            return result

        setattr(owner, method, timed)

    def first_row(*args: Any) -> None:
        parts["in all, to the first new row"] = time.time() - began
        print(json.dumps(parts), flush=True)
        os._exit(0)

    from cairn.cluster import Cluster
    from cairn.train.checkpoint import CheckpointStore
    from cairn.train.engine import Engine
    from cairn.train.language_model import LanguageModel
    from cairn.train.track import Tracker

    parts["Python, torch, DeepSpeed imported"] = time.time() - began
    during("process group", Cluster, "init")
    during("model and engine", Engine, "__init__")
    during("checkpoint checked and opened", CheckpointStore, "latest")
    during("weights and moments put back", Engine, "load")
    during("first step", LanguageModel, "step")
    Tracker.rows = first_row  # type: ignore[method-assign,assignment]
    pretrain_main(argv)


def pretrain_main(argv: list[str]) -> None:
    """`python -m pretrain` in this process."""
    import runpy

    sys.argv[1:] = argv
    runpy.run_module("pretrain", run_name="__main__", alter_sys=True)


def pretrain(argv: list[str]) -> None:
    """The same, coming back at its end, and quiet."""
    output, sys.stdout = sys.stdout, sys.stderr
    try:
        pretrain_main(argv)
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.stdout = output


WORKERS: dict[str, Callable[[list[str]], None]] = {"save": work_save, "restart": work_restart}


def worker(name: str, argv: list[str]) -> Any:
    """What a worker in a process of its own prints last."""
    env = os.environ | ALLOCATOR | {"BENCH_BEGAN": repr(time.time())}
    command = [sys.executable, "-m", "benchmarks.survive", "--worker", name, *argv]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_saves(saves: int, rounds: int) -> float:
    """Background against synchronous saves; the seconds of a step."""
    stalls: dict[bool, list[float]] = {True: [], False: []}
    plain: list[float] = []
    beside: list[float] = []
    for _ in range(rounds):
        for background in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                steps = f"train.steps={EVERY * (saves // rounds + 1)}"
                more = (steps, f"checkpoint.every={EVERY}", f"checkpoint.background={str(background).lower()}")
                said = worker("save", overrides(folder, *more))
            stalls[background] += said["stalls"][1:]  # the first one finds no memory that it could use again
            for step, seconds in said["steps"].items():
                after = (int(step) - 1) % EVERY
                if int(step) > EVERY:
                    (beside if background and after == 0 else plain if not background and after else []).append(seconds)
    step, synchronous = statistics.median(plain), statistics.median(stalls[False])
    row("checkpoint", f"{said['bytes'] / 1e6:.0f} MB")
    row("step", spread(plain))
    row("synchronous save", f"{spread(stalls[False])}, {synchronous / step:.0%} of a step")
    own = statistics.median(stalls[True])
    row("stall of a background save", f"{spread(stalls[True])}, {own / synchronous:.1%} of a synchronous one")
    row("the same, of a step", f"{own / step:.1%}")
    row("the step during which it is written", f"{spread(beside)}")
    return step


def last(run: RunFolder) -> int:
    """Step of the newest row; 0 before the first."""
    return max((row["step"] for row in parse_rows(run.metrics)), default=0)


def until(met: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    """Wait. Raises RuntimeError when the process has ended instead."""
    while not met():
        if process.poll() is not None:
            raise RuntimeError(f"ended with status {process.returncode}: {process.args}")
        time.sleep(0.005)


def struck(run: RunFolder, process: "subprocess.Popen[bytes]", kill: Callable[[], "subprocess.Popen[bytes]"]) -> float:
    """Kill two steps after a checkpoint that is not the first; seconds until a row comes after the file was cut back.

    `kill` gives the process that goes on."""
    begin = last(run)
    until(lambda: last(run) > begin + EVERY and last(run) % EVERY == 2, process)
    killed, began = last(run), time.monotonic()
    process = kill()
    until(lambda: last(run) < killed, process)
    cut = last(run)
    until(lambda: last(run) > cut, process)
    return time.monotonic() - began


def measure_restart(kills: int) -> None:
    """From kill -9 to training again, without and with the launcher, and the parts of that way."""
    endless = ("train.steps=100000", f"checkpoint.every={EVERY}")
    with tempfile.TemporaryDirectory() as folder:
        arguments = overrides(folder, *endless)
        command = [sys.executable, "-m", "pretrain", *arguments]
        running = [subprocess.Popen(command, stdout=subprocess.DEVNULL)]

        def kill() -> "subprocess.Popen[bytes]":
            running[-1].kill()
            running[-1].wait()
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
            return running[-1]

        seconds = [struck(RunFolder(folder, "gpt-tiny"), running[-1], kill) for _ in range(kills)]
        running[-1].kill()
        running[-1].wait()
        row("kill -9 of a run of one process, started again at once, to its next row", spread(seconds))
        parts = [worker("restart", arguments) for _ in range(kills)]
        for name in parts[0]:
            row(f"- of a start: {name}", spread([part[name] for part in parts]))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "launch.cli", "launch", "--procs", "2", "--restarts", f"{kills}", "pretrain"]
        command += overrides(folder, *endless, "train.micro_batch_size=4")
        launcher = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

        def kill_rank() -> "subprocess.Popen[bytes]":
            os.kill(rank_pids(launcher.pid)[1], signal.SIGKILL)
            return launcher

        try:
            seconds = [struck(RunFolder(folder, "gpt-tiny"), launcher, kill_rank) for _ in range(kills)]
        finally:
            ranks = rank_pids(launcher.pid)
            launcher.kill()
            launcher.wait()
            for pid in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        row("kill -9 of one of two ranks, launched with `--restarts`, to the next row", spread(seconds))


def measure_watchdog(step: float) -> None:
    """The calls that a step makes, and the CPU time of the thread; as a share of a step of `step` seconds."""
    from cairn.cluster import Cluster
    from cairn.config.train import GuardSection
    from cairn.train.watchdog import INTERVAL_S, Watchdog

    calls = 100_000
    with tempfile.TemporaryDirectory() as folder, Watchdog(Cluster(), RunFolder(folder), GuardSection()) as watchdog:
        phases = [_loop(lambda: watchdog.phase("step", 1), calls) for _ in range(9)]
    # many beats in little time: what one costs is what the process uses while its main thread sleeps
    section = GuardSection.model_construct(lost_seconds=0.03, hang_minutes=10.0)
    with tempfile.TemporaryDirectory() as folder, Watchdog(Cluster(), RunFolder(folder), section) as watchdog:
        beats = []
        for _ in range(9):
            count, begin = watchdog._answers, time.process_time()
            time.sleep(0.5)
            beats.append((time.process_time() - begin) / (watchdog._answers - count))
    share = (4 * statistics.median(phases) + statistics.median(beats) * step / INTERVAL_S) / step
    row("watchdog: a call of `phase`", spread(phases))
    row("watchdog: a beat, of which there is one in 2 s", spread(beats))
    row("watchdog: four calls and its beats, of a step", f"{share:.3%}")


def measure_guard(step: float) -> None:
    """What the guard does for a step and its row, with spikes watched for."""
    from cairn.config.train import GuardSection
    from cairn.train.guard import Guard

    guard = Guard(GuardSection(spike_factor=6.0))
    engines: Any = {"model": SimpleNamespace(skipped=False, overflowed=False)}

    def check() -> None:
        guard.stepped(1, engines)
        guard.judge([{"step": 1, "loss": 3.0}], first_only=True)

    calls = [_loop(check, 2000) for _ in range(9)]
    row("guard: a step and its row, spikes watched for", spread(calls))
    row("the same, of a step", f"{statistics.median(calls) / step:.3%}")


def _loop(call: Callable[[], object], times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begin) / times


def row(name: str, value: str) -> None:
    """A line of the table."""
    print(f"| {name} | {value} |", flush=True)


def spread(seconds: Sequence[float]) -> str:
    """Median and range."""
    unit, scale = next(
        (u, s) for u, s in (("s", 1.0), ("ms", 1e3), ("us", 1e6)) if statistics.median(seconds) * s > 0.2
    )
    middle, low, high = (f"{scale * x:.3g}" for x in (statistics.median(seconds), min(seconds), max(seconds)))
    return f"{middle} {unit} ({low} to {high})"


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=24, help="of each kind (24); 0: only the kills")
    parser.add_argument("--rounds", type=int, default=2, help="in which they are made (2)")
    parser.add_argument("--kills", type=int, default=5, help="without and with the launcher (5); 0: only the rest")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.worker:
        WORKERS[args.worker](rest)
        return
    print("| what | median (range) |\n| --- | --- |")
    if args.saves:
        step = measure_saves(args.saves, args.rounds)
        measure_watchdog(step)
        measure_guard(step)
    if args.kills:
        measure_restart(args.kills)


if __name__ == "__main__":
    main()
