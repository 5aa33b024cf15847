"""What each ingredient of the `modern` recipe gains: the recipe whole, without each one, and beside `classic`.

    python -m benchmarks.recipe RESULTS.json [--size tiny|10m|30m] [--source FILES] [--rates 0.5,1,2] [--seeds 1,2,3]
                                             [--lines 'classic;modern'] [--plot FILE.svg]
    python -m benchmarks.recipe --speed ROUNDS [--size tiny|10m|30m] [--source FILES]

Every line sees the same samples in the same order, and has its learning rates, times each of `rates`, tried with the
first seed; the best is used for all seeds. `modern, 0.7 of the tokens` is a whole run of its own, whose rate has
decayed: where it is ahead of `classic`, the recipe needs at most 0.7 times the tokens. What is measured is kept in
RESULTS.json and not measured again, so that a call that was cut short goes on. The table is of all that it holds.

`--speed` times a step of `classic` and of `modern` in turn, which says what equal tokens are in time.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ours import Shape, logged
from benchmarks.rounds import median_range
from cairn.config.load import load
from cairn.config.schema import PretrainConfig

SIZES = {
    "tiny": (Shape(4, 4, 256, 256, 4096, 8), 600),
    "10m": (Shape(8, 5, 320, 512, 4096, 16), 1200),
    "30m": (Shape(8, 8, 512, 512, 8192, 16), 1200),
}
"""A GPT and its batches, and the steps it is trained for: of the larger two once over 40 MB of books."""

CLASSIC, MODERN = "configs/pretrain/gpt-tiny-classic.yaml", "configs/pretrain/gpt-tiny.yaml"

WITHOUT = {
    "Muon (AdamW for all)": ["optim={name: adamw, lr: 0.003, betas: [0.9, 0.95], weight_decay: 0.1}"],
    "RMS norm (layer norm, weights)": ["model.norm=layernorm", "model.norm_affine=true"],
    "RoPE (learned positions)": ["model.position=learned"],
    "normalised embeddings": ["model.embed_norm=false"],
    "normalised queries and keys": ["model.qk_norm=false"],
    "ReLU squared (GELU)": ["model.activation=gelu_tanh"],
    "projections that start at zero": ["model.residual_init=scaled"],
    "a head of its own": ["model.tie_embeddings=true"],
    "a rate that falls to nothing": ["schedule.name=cosine", "schedule.min_ratio=0.1"],
}


@dataclass(frozen=True)
class Line:
    """A config with overrides, trained on a share of the tokens."""

    config: str
    overrides: Sequence[str] = ()
    share: float = 1.0


def lines() -> dict[str, Line]:
    """All lines of the table, in its order."""
    shorter = {f"modern, {share} of the tokens": Line(MODERN, share=share) for share in (0.7, 0.5)}
    without = {f"modern without {name}": Line(MODERN, overrides) for name, overrides in WITHOUT.items()}
    return {"classic": Line(CLASSIC), "modern": Line(MODERN), **shorter, **without}


Curve = list[tuple[int, float]]
"""Steps done, and the held-out loss (nats a token) after them."""


def keys_of(size: str, source: str | None) -> list[str]:
    """Overrides that every run of a size has."""
    shape = SIZES[size][0]
    vocabulary = f"tokenizer.vocab_size={shape.vocab_size}"
    corpus = [f"data.source={source}"] if source else []
    return [*shape.overrides(), vocabulary, *corpus, "track.progress=false", "checkpoint.every=0"]


def speed(size: str, source: str | None, rounds: int) -> str:
    """Seconds of a step, medians over rounds of the medians of 20 steps."""
    keys = [*keys_of(size, source), "train.steps=24", "train.log_every=1", "train.eval_every=0", "train.eval_samples=8"]
    times: dict[str, list[float]] = {CLASSIC: [], MODERN: []}
    for _ in range(rounds):
        for config, found in times.items():
            steps = [row["step_seconds"] for row in logged(config, keys) if "step_seconds" in row]
            found.append(statistics.median(steps[4:]))
    classic, modern = times.values()
    ratio = statistics.median(modern) / statistics.median(classic)
    spans = f"classic {median_range(classic, '.3f')} s, modern {median_range(modern, '.3f')} s"
    return f"a step of {size}: {spans}, {ratio:.2f} times as long"


def trained(line: Line, size: str, rate: float, seed: int, source: str | None) -> Curve:
    """A run whose learning rates are `rate` times those of its config, evaluated each tenth of its steps."""
    steps = round(SIZES[size][1] * line.share)
    optim = load(PretrainConfig, Path(line.config), list(line.overrides)).optim
    keys = [*keys_of(size, source), *line.overrides, f"seed={seed}"]
    keys += [f"optim.{key}={getattr(optim, key) * rate}" for key in ("lr", "adam_lr") if hasattr(optim, key)]
    keys += [f"train.steps={steps}", f"train.eval_every={steps // 10}", f"schedule.warmup_steps={steps // 20}"]
    keys += ["train.eval_samples=512"]
    return [(row["step"], row["valid/loss"]) for row in logged(line.config, keys) if "valid/loss" in row]


class Results:
    """The curves of a size and a corpus by line, rate and seed, in a file that is written after each."""

    def __init__(self, path: Path, identity: Mapping[str, str | None]) -> None:
        """Raises SystemExit when the file is of another size or corpus."""
        self._path = path
        held = json.loads(path.read_text()) if path.exists() else {"of": dict(identity), "curves": {}}
        if held["of"] != dict(identity):
            raise SystemExit(f"{path} holds results of {held['of']}, this call asks for {dict(identity)}: name another")
        self._held = held

    def curve(self, name: str, rate: float, seed: int) -> Curve | None:
        """What was measured, if it was."""
        found = self._held["curves"].get(f"{name} | {rate:g} | {seed}")
        return None if found is None else [(step, loss) for step, loss in found]

    def add(self, name: str, rate: float, seed: int, curve: Curve) -> None:
        """Keep a curve."""
        self._held["curves"][f"{name} | {rate:g} | {seed}"] = curve
        self._path.write_text(json.dumps(self._held, indent=1))

    def of(self, name: str) -> tuple[float, list[Curve]] | None:
        """The rate that was best with the most seeds, and its curves; None where nothing was measured."""
        by_rate: dict[float, list[Curve]] = {}
        for key, curve in self._held["curves"].items():
            line, rate, _ = key.rsplit(" | ", 2)
            if line == name:
                by_rate.setdefault(float(rate), []).append(curve)
        if not by_rate:
            return None
        return min(by_rate.items(), key=lambda item: (-len(item[1]), final(item[1])))


def final(curves: Iterable[Curve]) -> float:
    """Mean loss at the end."""
    return statistics.mean(curve[-1][1] for curve in curves)


def measure(args: argparse.Namespace, results: Results) -> None:
    """Each line's rates with the first seed, then the best rate with the others; what is known already is left out."""
    wanted = {name: line for name, line in lines().items() if args.lines is None or name in args.lines.split(";")}

    def loss(name: str, rate: float, seed: int) -> float:
        curve = results.curve(name, rate, seed)
        if curve is None:
            curve = trained(wanted[name], args.size, rate, seed, args.source)
            results.add(name, rate, seed, curve)
            print(f"{name}, rate x {rate:g}, seed {seed}: {curve[-1][1]:.4f}", flush=True)
        return curve[-1][1]

    seeds, rates = [int(s) for s in args.seeds.split(",")], [float(r) for r in args.rates.split(",")]
    best = {name: min(rates, key=lambda rate: loss(name, rate, seeds[0])) for name in wanted}
    for seed in seeds[1:]:
        for name in wanted:
            loss(name, best[name], seed)


def table(results: Results) -> str:
    """A row for each line: its loss, and how much more that is than `modern`'s."""
    rows = [
        "| recipe | held-out loss, mean (range) | rate | seeds | against modern |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    whole = results.of("modern")
    for name in lines():
        found = results.of(name)
        if found is None:
            continue
        rate, curves = found
        ends = [curve[-1][1] for curve in curves]
        against = "" if whole is None or name == "modern" else f"{final(curves) - final(whole[1]):+.3f}"
        span = f"{final(curves):.3f} ({min(ends):.3f} to {max(ends):.3f})"
        rows.append(f"| {name} | {span} | x {rate:g} | {len(ends)} | {against} |")
    return "\n".join(rows)


def plot(results: Results, shape: Shape, path: Path) -> None:
    """Held-out loss over tokens, the mean over seeds; what is neither whole nor `classic` in grey."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in lines():
        if (found := results.of(name)) is None:
            continue
        steps = [step for step, _ in found[1][0]]
        losses = [statistics.mean(curve[i][1] for curve in found[1]) for i in range(len(steps))]
        tokens = [step * shape.batch * shape.seq_len / 1e6 for step in steps]
        plain = name.startswith("modern without")
        style = {"color": "0.8", "linewidth": 1.0} if plain else {"linewidth": 2.0, "label": name}
        axes.plot(tokens[1:], losses[1:], **style)
    axes.set(xlabel="tokens (millions)", ylabel="held-out loss (nats a token)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Measure what is missing, then the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", metavar="RESULTS.json")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--source", help="the corpus; by default Python's standard library")
    parser.add_argument("--rates", default="0.5,1,2")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--lines", help="names of lines, ';' between them; by default all")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--speed", type=int, metavar="ROUNDS", help="measure this instead")
    args = parser.parse_args()
    if args.speed:
        print(speed(args.size, args.source, args.speed))
        return
    if args.results is None:
        parser.error("RESULTS.json is missing: where what is measured is kept")
    results = Results(args.results, {"size": args.size, "source": args.source})
    measure(args, results)
    print(table(results))
    if args.plot:
        plot(results, SIZES[args.size][0], args.plot)


if __name__ == "__main__":
    main()
