"""ZeRO with two processes beside one, the global batch the same: `python -m benchmarks.zero [--rounds 3] [--steps 6]`.

Time: `cairn launch --procs N pretrain`, which shares this machine's threads out among its ranks; a round runs every
setting once, in turn. Memory: the tensors of rank 0 at their peak, as benchmarks/plan.py measures them. The ideal is
1/N of what one process holds at that stage: of its weights, gradients and moments, and, its micro-batch being 1/N, of
its activations.
"""

import argparse
import statistics

from benchmarks.ours import trained
from benchmarks.plan import CONFIG, MIB, TENSORS, Case, idle, measured
from benchmarks.rounds import median_range

GLOBAL_BATCH, WARMUP = 8, 2
CASES = [Case(stage, world, GLOBAL_BATCH // world) for stage in (1, 2, 3) for world in (1, 2)]


def seconds(case: Case, steps: int) -> float:
    """Median of a step, from the run's own metrics."""
    launch = ["launch.cli", "launch", "--procs", str(case.world)]
    rows = trained(CONFIG, case.overrides(), steps + WARMUP, launch)
    return statistics.median(row["step_seconds"] for row in rows[WARMUP:])


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    times: dict[Case, list[float]] = {case: [] for case in CASES}
    for _ in range(args.rounds):
        for case, found in times.items():
            found.append(seconds(case, args.steps))
    base = {world: idle(world, TENSORS) for world in (1, 2)}
    held = {case: measured(case, TENSORS) - base[case.world] for case in CASES}
    print("| ZeRO | processes | s/step, median (range) | time against one | MiB a process | of one's (ideal) |")
    print("| ---: | ---: | --- | ---: | ---: | ---: |")
    for case in CASES:
        one = Case(case.stage, 1, GLOBAL_BATCH)
        found, share = times[case], held[case] / held[one]
        ratio = statistics.median(found) / statistics.median(times[one])
        print(
            f"| {case.stage} | {case.world} | {median_range(found, '.3f')} | {ratio:.2f} "
            f"| {held[case] / MIB:,.0f} | {share:.0%} ({1 / case.world:.0%}) |"
        )


if __name__ == "__main__":
    main()
