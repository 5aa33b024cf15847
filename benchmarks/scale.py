"""The step-time model of `cairn plan` against published speeds, and what it predicts of the shipped configs, from 1 to
16,384 H100s in nodes of eight.

    python -m benchmarks.scale [--plot FILE] [KEY=VALUE ...]

Predictions: nothing here was run on a GPU. `weak`: every GPU takes one micro-batch of the config's size a step, so the
global batch grows with the GPUs. `strong`: the config's own global batch, in the largest micro-batches up to the
config's size that divide it, as far as it divides. KEY=VALUE: overrides of all configs. Seconds to run.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from benchmarks.published import ROWS, Row
from cairn.config.load import load
from cairn.config.schema import PretrainConfig
from cairn.plan.hardware import GPUS, settled_for
from cairn.plan.memory import Facts, Setting, count
from cairn.plan.speed import Speed, speed

CONFIGS = ("gpt2-124m", "gpt-1.3b", "llama-1b", "bert-base", "bert-large")
SIZES = [2**k for k in range(15)]
SHOWN = (1, 8, 64, 256, 512, 1024, 4096, 16384)
PER_NODE = 8


@dataclass(frozen=True)
class Run:
    """A shipped config."""

    name: str
    config: PretrainConfig
    facts: Facts

    def step(self, gpus: int, micro_batch: int, global_batch: int) -> Speed:
        """On so many H100s."""
        config, engine = self.config, self.config.engine
        train = config.train.model_copy(update={"global_batch_size": global_batch})
        setting = Setting(engine.zero_stage, micro_batch, engine.activation_checkpointing)
        nodes, per_node = max(1, gpus // PER_NODE), min(PER_NODE, gpus)
        changed = config.model_copy(update={"train": train})
        return speed(changed, self.facts, setting, GPUS["h100"], nodes, per_node)

    def weak(self, gpus: int) -> Speed:
        """One micro-batch of the config's size a GPU."""
        size = self.config.train.micro_batch_size
        return self.step(gpus, size, size * gpus)

    def strong(self, gpus: int) -> tuple[int, Speed] | None:
        """The micro-batch that the config's global batch is divided into, and its step; None where it does not."""
        size = self.config.train.fitting_micro_batch_size(gpus)
        return None if size is None else (size, self.step(gpus, size, self.config.train.global_batch_size))


def read(name: str, overrides: list[str]) -> Run:
    """A shipped config in the precision that it takes on an H100."""
    config = settled_for("h100", load(PretrainConfig, Path(f"configs/pretrain/{name}.yaml"), overrides))
    assert config.model.vocab_size is not None
    return Run(name, config, count(config, config.model.vocab_size))


def compared(rows: list[Row]) -> Iterator[str]:
    """Every published row beside its prediction, then the errors of those that were not fitted."""
    yield "| source | model | GPUs | micro-batch | published | predicted | error | |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |"
    for row in rows:
        size = f"{row.micro_batch}" if row.accumulate == 1 else f"{row.accumulate} x {row.micro_batch}"
        cells = (row.source.name, row.model, f"{row.gpus}", size, f"{row.tokens_per_s:,.0f}")
        yield f"| {' | '.join(cells)} | {row.predicted():,.0f} | {row.error:+.1%} | {'fitted' if row.fitted else ''} |"


def summary(rows: list[Row]) -> Iterator[str]:
    """Errors by source; those of fitted rows apart."""
    yield "| rows | number | mean error | worst | within 10 % |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    held = [row for row in rows if not row.fitted]
    groups = [(name, list(group)) for name, group in groupby(held, key=lambda row: row.source.name)]
    for name, group in [("fitted", [row for row in rows if row.fitted]), ("held out", held), *groups]:
        errors = [row.error for row in group]
        mean, worst = sum(map(abs, errors)) / len(errors), max(errors, key=abs)
        yield f"| {name} | {len(group)} | {mean:.1%} | {worst:+.1%} | {sum(abs(error) <= 0.1 for error in errors)} |"


def predicted(run: Run) -> Iterator[str]:
    """Weak and strong scaling of a config, with where the time goes."""
    train, engine = run.config.train, run.config.engine
    again = ", recomputing" if engine.activation_checkpointing else ""
    batch = f"micro-batches of {train.micro_batch_size}, a global batch of {train.global_batch_size:,}"
    yield f"{run.name}: {batch}, sequences of {run.config.seq_len:,}, ZeRO {engine.zero_stage}{again}\n"
    yield (
        "| GPUs | weak: tokens/s a GPU | MFU | compute | comm. | update "
        "| strong: micro-batch | tokens/s a GPU | MFU | compute | comm. | update |"
    )
    yield "| ---: |" + " ---: |" * 11
    for gpus in SHOWN:
        found = run.strong(gpus)
        strong = " | ".join(["", "", "", "", "", ""]) if found is None else f"{found[0]} | {_cells(found[1], gpus)}"
        yield f"| {gpus:,} | {_cells(run.weak(gpus), gpus)} | {strong} |"


def _cells(step: Speed, gpus: int) -> str:
    shares = (f"{part / step.seconds:.0%}" for part in (step.compute, step.communication, step.update))
    return f"{step.tokens_per_s / gpus:,.0f} | {step.mfu:.1%} | {' | '.join(shares)}"


def plot(path: Path, runs: list[Run]) -> None:
    """Tokens/s a GPU, as a share of one GPU's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "scale", "svg.fonttype": "none"}  # the same file from the same figures
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    for run in runs:
        alone = run.weak(1).tokens_per_s
        weak = [run.weak(n).tokens_per_s / n / alone for n in SIZES]
        left.plot(SIZES, weak, marker=".", label=run.name)
        strong = [(n, found[1].tokens_per_s / n) for n in SIZES if (found := run.strong(n)) is not None]
        right.plot([n for n, _ in strong], [pace / strong[0][1] for _, pace in strong], marker=".", label=run.name)
    left.set(ylabel="tokens/s a GPU, of one GPU's", title="predicted weak scaling: a micro-batch a GPU", ylim=(0, 1.05))
    right.set(title="predicted strong scaling: the config's global batch")
    for axis in (left, right):
        axis.set(xscale="log", xlabel="H100s")
        axis.set_xticks([1, 8, 64, 512, 4096, 16384], ["1", "8", "64", "512", "4,096", "16,384"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """The tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a figure")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of every config")
    args = parser.parse_args()
    runs = [read(name, args.overrides) for name in CONFIGS]
    print("\n".join([*compared(ROWS), "", *summary(ROWS)]))
    for run in runs:
        print("\n" + "\n".join(predicted(run)))
    if args.plot:
        plot(args.plot, runs)


if __name__ == "__main__":
    main()
