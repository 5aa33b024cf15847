"""Systems measured in turn, each measurement in a process of its own, so that a machine that changes its speed changes
it for all."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence

from launch.job import ALLOCATOR

Measured = dict[str, float]


def run_rounds(module: str, systems: Iterable[str], rounds: int, arguments: Sequence[str]) -> dict[str, list[Measured]]:
    """`python -m module --worker SYSTEM *arguments`, whose last line is a JSON object; every system once a round.

    All get the allocator settings that `cairn` sets. Raises CalledProcessError when a worker fails.
    """
    results: dict[str, list[Measured]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, rows in results.items():
            command = [sys.executable, "-m", module, "--worker", name, *arguments]
            done = subprocess.run(command, env=os.environ | ALLOCATOR, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    return results


def median_range(values: Sequence[float], form: str = ",.0f") -> str:
    """`median (least to most)`."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
