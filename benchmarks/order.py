"""Nanoseconds to place one sample in the order of a run, at a million and a trillion samples.

    python -m benchmarks.order

Medians of interleaved rounds; the cost may not grow with the corpus, and nothing is built beforehand.
"""

import statistics
import time
import tracemalloc
from collections.abc import Callable

import numpy as np

from cairn.data.order import Order, permute

SIZES = (10**6, 10**12)
ROUNDS = 15
SCALARS, VECTOR = 5_000, 100_000


def scalar(n: int) -> Callable[[], int]:
    """Places one by one, as the loader asks for them; returns how many."""
    order = Order(n, seed=1)

    def run() -> int:
        for k in range(SCALARS):
            order[k]
        return SCALARS

    return run


def vectorised(n: int) -> Callable[[], int]:
    """Places by array; returns how many."""
    index = np.arange(VECTOR)

    def run() -> int:
        permute(index, n, 1)
        return VECTOR

    return run


def main() -> None:
    """Measure and print the table."""
    runs = {(kind.__name__, n): kind(n) for kind in (scalar, vectorised) for n in SIZES}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    for _ in range(ROUNDS):
        for key, run in runs.items():
            started = time.thread_time_ns()
            count = run()
            times[key].append((time.thread_time_ns() - started) / count)
    tracemalloc.start()
    Order(SIZES[-1], seed=2)[SIZES[-1] - 1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    print("| ns an index | " + " | ".join(f"n = 10^{len(str(n)) - 1}" for n in SIZES) + " |")
    print("| --- |" + " ---: |" * len(SIZES))
    for kind in ("scalar", "vectorised"):
        print(f"| {kind} | " + " | ".join(f"{statistics.median(times[kind, n]):.0f}" for n in SIZES) + " |")
    print(f"\nmemory of an order of 10^{len(str(SIZES[-1])) - 1}: {peak / 1024:.1f} KiB")


if __name__ == "__main__":
    main()
