"""How long the front door takes to answer, and training to its first step: `python -m benchmarks.startup`.

Medians of processes run in turn. What is kept between runs, as on a user's machine, is there already: the prepared
corpus, the compiled kernels, and for `engine.compile` the code that torch compiled.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.rounds import median_range

ROUNDS = 9
STARTS = 3
"""Rounds of what takes longer."""
CONFIG = "configs/pretrain/gpt-tiny.yaml"
COMMANDS = {
    "cairn --help": ["-m", "launch.cli", "--help"],
    "cairn pretrain --help": ["-m", "launch.cli", "pretrain", "--help"],
    "cairn config CONFIG": ["-m", "launch.cli", "config", CONFIG],
    "a config error": ["-m", "launch.cli", "pretrain", CONFIG, "train.stps=3"],
    "python -c pass": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import deepspeed": ["-c", "import deepspeed"],
}
TRAINING = {
    "cairn pretrain, to its first step": [],
    "cairn pretrain engine.compile=true, to its first step": ["engine.compile=true"],
}


def answered(arguments: list[str]) -> float:
    """Seconds that a process takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    return time.perf_counter() - start


def first_step(overrides: list[str]) -> float:
    """Seconds from the command to the row of its first step, after which it is killed."""
    quiet = ["train.log_every=1", "train.eval_every=0", "track.progress=false"]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
        command = [sys.executable, "-m", "launch.cli", "pretrain", CONFIG, f"run.dir={folder}", *quiet, *overrides]
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process:
            try:
                while not any(b'"loss"' in path.read_bytes() for path in Path(folder).glob("*/metrics.jsonl")):
                    if process.poll() is not None:
                        raise SystemExit(f"{' '.join(command)} ended:\n{(Path(folder) / 'log').read_text()[-2000:]}")
                    time.sleep(0.01)
                return time.perf_counter() - start
            finally:
                process.kill()


def main() -> None:
    """The table."""
    for overrides in TRAINING.values():
        first_step(overrides)  # fills what is kept
    times: dict[str, list[float]] = {name: [] for name in (*COMMANDS, *TRAINING)}
    for turn in range(ROUNDS):
        for name, arguments in COMMANDS.items():
            times[name].append(answered(arguments))
        for name, overrides in TRAINING.items() if turn < STARTS else ():
            times[name].append(first_step(overrides))
    print("| command | seconds, median (range) |\n| --- | --- |")
    for name, seconds in times.items():
        print(f"| `{name}` | {median_range(seconds, '.3f')} |")


if __name__ == "__main__":
    main()
