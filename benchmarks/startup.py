"""How long the front door takes to answer, and training to its first step: `python -m benchmarks.startup`.

Medians of processes run in turn. What is kept between runs, as on a user's machine, is there already: the prepared
corpus, the compiled kernels, and for `engine.compile` the code that torch compiled.
"""

import subprocess
import sys
import tempfile
import time

from benchmarks.rounds import median_range
from benchmarks.survive import CONFIG, overrides, worker

ROUNDS = 9
STARTS = 3
"""Rounds of what takes longer."""
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
    "pretrain CONFIG, to its first step": [],
    "pretrain CONFIG engine.compile=true, to its first step": ["engine.compile=true"],
}


def answered(arguments: list[str]) -> float:
    """Seconds that a process takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    return time.perf_counter() - start


def first_step(*more: str) -> float:
    """Seconds from the start of a process that trains to the row of its first step, after which it ends."""
    with tempfile.TemporaryDirectory() as folder:
        parts = worker("restart", overrides(folder, *more))
    return float(parts["in all, to the first new row"])


def main() -> None:
    """The table."""
    for more in TRAINING.values():
        first_step(*more)  # fills what is kept
    times: dict[str, list[float]] = {name: [] for name in (*COMMANDS, *TRAINING)}
    for turn in range(ROUNDS):
        for name, arguments in COMMANDS.items():
            times[name].append(answered(arguments))
        for name, more in TRAINING.items() if turn < STARTS else ():
            times[name].append(first_step(*more))
    print("| command | seconds, median (range) |\n| --- | --- |")
    for name, seconds in times.items():
        print(f"| `{name}` | {median_range(seconds, '.3f')} |")


if __name__ == "__main__":
    main()
