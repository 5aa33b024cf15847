"""Goodput against the number of GPUs, by simulation: how much of the time a run makes progress that is kept.

    python -m benchmarks.goodput [--stall S] [--write S] [--detect S] [--restart S] [--plot FILE]

Failures are a Poisson process with the rate that Llama 3 405B met (arXiv 2407.21783, section 3.3.4): 419 unexpected
interruptions in 54 days on 16,384 GPUs. A run trains `interval` seconds, stands still for `stall`, and trains on while
the checkpoint is written for `write` seconds more; only then it counts, and only then the next one can begin. A failure
is noticed after `detect` seconds, the run trains again `restart` seconds later, from the last checkpoint that counts;
it may fail again before it does. Seeded; seconds to run.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FAILURES, DAYS, GPUS = 419, 54, 16384
GPU_HOURS = GPUS * DAYS * 24 / FAILURES
"""GPU hours between two failures: 50,700."""
SIZES = [2**k for k in range(3, 15)]
INTERVALS = [float(x) for x in np.geomspace(15, 48 * 3600, 80)]
FIXED = {"10 min": 600.0, "1 h": 3600.0, "4 h": 4 * 3600.0}


@dataclass(frozen=True)
class Costs:
    """Seconds. The defaults are assumed for a large cluster: 16 GB of state a GPU, copied to the host at 8 GB/s and
    written at 0.27 GB/s a GPU; guard.lost_seconds; ten minutes until thousands of ranks have started and read."""

    stall: float = 2.0
    """Training stands still for a save."""
    write: float = 60.0
    """From then until the checkpoint counts."""
    detect: float = 60.0
    """From a failure until the job has stopped."""
    restart: float = 600.0
    """From then until it trains again."""

    def cycle(self, interval: float) -> float:
        """Seconds from one save to the next; a save waits for the write of the last one."""
        return self.stall + max(interval, self.write)

    @property
    def synchronous(self) -> "Costs":
        """The same with training standing still while the checkpoint is written."""
        return Costs(self.stall + self.write, 0.0, self.detect, self.restart)


def mtbf(gpus: int) -> float:
    """Seconds between two failures of a job."""
    return GPU_HOURS * 3600 / gpus


def simulate(costs: Costs, interval: float, gaps: Sequence[float]) -> float:
    """Goodput of a run with these seconds between failures, event by event."""
    down = costs.detect + costs.restart
    useful, resumes = 0.0, 0.0
    for gap in gaps:
        # `resumes`: seconds after the last failure at which training went on
        trained = gap - resumes
        if trained > costs.write:
            useful += math.floor((trained - costs.write) / costs.cycle(interval)) * interval
        resumes = down
    return useful / sum(gaps)


def analytic(costs: Costs, interval: float, between: float) -> float:
    """The limit of many failures, exact for exponential times (Daly 2006, equation 20, with a write in the background).

    `between`: mean seconds between failures.
    """
    dead = costs.detect + costs.restart + costs.write
    return interval * math.exp(-dead / between) / (between * math.expm1(costs.cycle(interval) / between))


def young(costs: Costs, between: float) -> float:
    """Young's interval (1974): the first-order optimum."""
    return math.sqrt(2 * costs.stall * between)


def best(costs: Costs, gaps: Sequence[float]) -> tuple[float, float]:
    """The best of INTERVALS by simulation, and its goodput."""
    scores = {interval: simulate(costs, interval, gaps) for interval in INTERVALS}
    interval = max(scores, key=lambda key: scores[key])
    return interval, scores[interval]


def best_analytic(costs: Costs, gpus: int) -> float:
    """The best interval of the closed form, searched on a fine grid."""
    return max(np.geomspace(5, 60 * 3600, 4000).tolist(), key=lambda x: analytic(costs, x, mtbf(gpus)))


def draw(gpus: int, failures: int, seed: int) -> list[float]:
    """Seconds between failures."""
    return [float(x) for x in np.random.default_rng(seed).exponential(mtbf(gpus), failures)]


def span(seconds: float) -> str:
    """Seconds for a reader."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def plot(path: Path, costs: Costs, failures: int, seed: int) -> None:
    """Goodput and the best interval against the number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "goodput", "svg.fonttype": "none"}  # the same file from the same figures
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    draws = {gpus: draw(gpus, failures, seed) for gpus in SIZES}
    for name, interval in FIXED.items():
        left.plot(SIZES, [simulate(costs, interval, draws[n]) for n in SIZES], marker=".", label=f"every {name}")
    found = [best(costs, draws[n]) for n in SIZES]
    left.plot(SIZES, [score for _, score in found], "k", marker="o", ms=4, label="best interval")
    left.plot(
        SIZES,
        [best(costs.synchronous, draws[n])[1] for n in SIZES],
        "k--",
        label="best, saves synchronous",
    )
    left.set(xscale="log", xlabel="GPUs", ylabel="goodput", ylim=(0, 1.02), title="share of time that is kept")
    right.plot(SIZES, [interval / 60 for interval, _ in found], "ko", ms=4, label="simulated")
    right.plot(SIZES, [best_analytic(costs, n) / 60 for n in SIZES], "k", lw=1, label="closed form")
    right.plot(SIZES, [young(costs, mtbf(n)) / 60 for n in SIZES], "C3--", lw=1, label="Young")
    right.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="minutes", title="best time between checkpoints")
    for axis in (left, right):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in vars(Costs()).items():
        parser.add_argument(f"--{name}", type=float, default=value, metavar="S", help=f"seconds ({value:g})")
    parser.add_argument("--failures", type=int, default=3000, help="simulated at each size (3000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a figure")
    args = parser.parse_args()
    costs = Costs(args.stall, args.write, args.detect, args.restart)
    print(
        f"stall {costs.stall:g} s, write {costs.write:g} s, detection {costs.detect:g} s, restart {costs.restart:g} s; "
        f"a failure every {GPU_HOURS:,.0f} GPU hours\n"
    )
    print(
        "| GPUs | between failures | best interval | closed form | Young | goodput | saved hourly | saves synchronous |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for gpus in SIZES:
        gaps = draw(gpus, args.failures, args.seed)
        interval, goodput = best(costs, gaps)
        optima = f"{span(interval)} | {span(best_analytic(costs, gpus))} | {span(young(costs, mtbf(gpus)))}"
        hourly, blocking = simulate(costs, 3600.0, gaps), best(costs.synchronous, gaps)[1]
        print(f"| {gpus:,} | {span(mtbf(gpus))} | {optima} | {goodput:.2%} | {hourly:.2%} | {blocking:.2%} |")
    if args.plot:
        plot(args.plot, costs, args.failures, args.seed)


if __name__ == "__main__":
    main()
