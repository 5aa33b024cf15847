"""How long the front door takes to answer: `python -m benchmarks.startup`. Medians of processes run in turn."""

import subprocess
import sys
import time

from benchmarks.rounds import median_range

ROUNDS = 9
COMMANDS = {
    "cairn --help": ["-m", "launch.cli", "--help"],
    "cairn pretrain --help": ["-m", "launch.cli", "pretrain", "--help"],
    "cairn config CONFIG": ["-m", "launch.cli", "config", "configs/pretrain/gpt-tiny.yaml"],
    "a config error": ["-m", "launch.cli", "pretrain", "configs/pretrain/gpt-tiny.yaml", "train.stps=3"],
    "python -c pass": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
}


def main() -> None:
    """The table."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, arguments in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
            times[name].append(time.perf_counter() - start)
    print("| command | seconds, median (range) |\n| --- | --- |")
    for name, seconds in times.items():
        print(f"| `{name}` | {median_range(seconds, '.3f')} |")


if __name__ == "__main__":
    main()
