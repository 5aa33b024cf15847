"""Systems measured in turn, each measurement in a process of its own, so that a machine that changes its speed changes
it for all."""

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.job import ALLOCATOR

Measured = dict[str, float]


def run_rounds(
    module: str,
    systems: Iterable[str],
    rounds: int,
    arguments: Sequence[str],
    environment: Mapping[str, str] = ALLOCATOR,
) -> dict[str, list[Any]]:
    """`python -m module --worker SYSTEM *arguments`, whose last line is JSON; every system once a round.

    `environment` is added to this process's: for those that train, the allocator settings that `cairn` sets. Raises
    CalledProcessError when a worker fails.
    """
    results: dict[str, list[Any]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, rows in results.items():
            command = [sys.executable, "-m", module, "--worker", name, *arguments]
            env = os.environ | dict(environment)
            done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    return results


def median_range(values: Sequence[float], form: str = ",.0f") -> str:
    """`median (least to most)`."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def peak_kib() -> int:
    """The most memory that this process has held. Not of getrusage: there a child begins with its parent's peak."""
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak)
