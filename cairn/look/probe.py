"""`python -m cairn.look.probe RUN FILE --text COLUMN --label COLUMN`: what a model's layers know of a text's class."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cairn.config.main import Parser, run_main
from cairn.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from cairn.look.examples import Examples
    from cairn.look.features import Pool
    from cairn.look.judge import Labels, Score, Scores, Split
    from cairn.look.text import Body
    from cairn.train.run import LoadedRun

HEADINGS = {"linear": "linear", "neighbours": "k-NN", "clusters": "k-means", "rand": "ARI", "information": "AMI"}
MEANINGS = (
    "In %, ± deviation over folds. linear, k-NN, k-means: accuracy of logistic regression, of the 5 to 15\n"
    "nearest by cosine, of a cluster a class, found without labels, then matched to them; ARI, AMI: Rand\n"
    "index and mutual information of clusters and classes. untrained: the same model, random weights."
)


@dataclass(frozen=True)
class Judged:
    """How well one kind of features does."""

    features: str
    """majority, words, untrained or trained."""
    layer: int | None
    """From 1; None for features that are no model's."""
    scores: "Scores"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(prog="cairn probe", description="Tell classes of texts apart by what a trained model makes of them.")
    p.add_argument("run", type=Path, metavar="RUN", help="run folder, such as runs/bert-tiny")
    p.add_argument("file", metavar="FILE", help=".csv, .tsv, .jsonl, .json or .parquet, or datasets:NAME")
    p.add_argument("--text", required=True, metavar="COLUMN", help="column of the text")
    p.add_argument("--text-pair", metavar="COLUMN", help="column of a second text")
    p.add_argument("--label", required=True, metavar="COLUMN", help="column of the class")
    p.add_argument("--layer", type=layer, default="all", metavar="N", help="a layer from 1, all (default) or last")
    p.add_argument("--pool", choices=("cls", "mean", "last"), help="first token, mean or last token")
    p.add_argument("--folds", type=at_least_two, default=5, metavar="K", help="cross-validation (default 5)")
    p.add_argument("--test", metavar="FILE", help="rows to judge, instead of folds")
    p.add_argument("--limit", type=at_least_two, metavar="N", help="N rows of a file, spread evenly")
    p.add_argument("--separator", metavar="C", help=r"between cells; default: , in .csv, \t in .tsv")
    p.add_argument("--quoting", choices=("true", "false"), help="whether cells may be in double quotes")
    p.add_argument("--columns", metavar="A,B", help="names of the columns of a file without a header")
    return p


def layer(text: str) -> str | int:
    """A layer's number, all or last. Raises ArgumentTypeError for another word."""
    if text not in ("all", "last") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number, and neither all nor last")
    return int(text) if text.isdecimal() else text


def at_least_two(text: str) -> int:
    """An integer from 2. Raises ArgumentTypeError for another."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 2")
    return int(text)


def main() -> None:
    """Print the table, and write RUN/probe.json."""
    args = parser().parse_args()

    from rich.console import Console

    from cairn.cluster import Cluster
    from cairn.look.examples import Columns, check_classes, read_examples, table_format
    from cairn.look.text import body_of
    from cairn.train.run import load_model

    format = table_format(args.separator, args.quoting, args.columns)
    columns = Columns(args.text, args.label, args.text_pair)
    examples = read_examples(args.file, format, columns, args.limit)
    check_classes(examples.labels, args.label, 1 if args.test else args.folds)
    test = read_examples(args.test, format, columns, args.limit) if args.test else None
    run = load_model(args.run, Cluster.from_env().device)
    model = body_of(run)
    layers = chosen(args.layer, model.section.n_layer)
    pool = pool_of(args.pool, model)
    labels, splits, classes = split(examples, test, args.folds)
    how = f"{len(test.texts):,} of {args.test} judged" if test else f"{args.folds} folds"
    console = Console(width=100 if not sys.stdout.isatty() else None, highlight=False)
    console.print(
        f"{args.run.resolve().name}, step {run.step:,}: {pool} of {layers_in_words(layers)}\n"
        f"{args.file}: {len(examples.texts):,} rows of {len(classes)} classes, {how}",
        markup=False,
        soft_wrap=True,
    )
    judged, left_out = judge(run, examples + test if test else examples, labels, splits, layers, pool)
    if left_out:
        console.print(f"{left_out:,} texts were cut to model.max_seq_len {model.section.max_seq_len}")
    show(console, judged)
    facts = {"run": str(args.run), "step": run.step, "file": args.file, "test": args.test, "columns": asdict(columns)}
    facts |= {"rows": len(labels), "classes": classes, "folds": None if test else args.folds, "pool": pool}
    facts |= {"cut_texts": left_out, "scores": [asdict(row) for row in judged]}
    out = args.run / "probe.json"
    try:
        out.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; make the run folder writable") from error
    console.print(f"numbers: {out}", markup=False, soft_wrap=True)


def chosen(layer: str | int, n_layer: int) -> list[int]:
    """Places of the layers asked for. Raises UserError for one that there is not."""
    if layer == "all":
        return list(range(n_layer))
    number = n_layer if layer == "last" else int(layer)
    if not 1 <= number <= n_layer:
        raise UserError(f"--layer {number}: the model has {n_layer}, counted from 1")
    return [number - 1]


def layers_in_words(layers: Sequence[int]) -> str:
    """Which layers."""
    return f"layer {layers[0] + 1}" if len(layers) == 1 else f"layers 1 to {len(layers)}"


def pool_of(given: "Pool | None", model: "Body") -> "Pool":
    """[CLS] of a BERT, the last token of a GPT, the mean of an encoder-decoder's source, unless given. Raises UserError
    for [CLS] where there is none."""
    from cairn.look.text import has_cls
    from cairn.models.seq2seq import Seq2Seq

    if given == "cls" and not has_cls(model):
        raise UserError("--pool cls: the model reads no [CLS], which gathers a whole text; give mean or last")
    return given or ("cls" if has_cls(model) else "mean" if isinstance(model, Seq2Seq) else "last")


def split(examples: "Examples", test: "Examples | None", count: int) -> tuple["Labels", list["Split"], dict[str, int]]:
    """Numbers of the classes of all rows, those of `test` after the others; which rows learn and which are judged; how
    many rows each class has. Raises UserError for a class that only `test` has."""
    import numpy as np

    from cairn.look.judge import folds

    classes = sorted(set(examples.labels))
    if test is not None:
        for place, label in zip(test.places, test.labels, strict=True):
            if label not in classes:
                raise UserError(f"{place}: class {label!r} is none of those to learn from, {', '.join(classes)[:60]}")
    everything = examples.labels + (test.labels if test else [])
    labels = np.array([classes.index(label) for label in everything])
    n, whole = len(examples.labels), np.arange(len(everything))
    return (
        labels,
        folds(labels, count) if test is None else [(whole[:n], whole[n:])],
        {name: everything.count(name) for name in classes},
    )


def judge(
    run: "LoadedRun",
    examples: "Examples",
    labels: "Labels",
    splits: Sequence["Split"],
    layers: Sequence[int],
    pool: "Pool",
) -> tuple[list[Judged], int]:
    """Every kind of features, and how many texts were cut. The run's model has random weights afterwards."""
    import torch

    from cairn.look.features import features
    from cairn.look.judge import judge_features, judge_majority, judge_words
    from cairn.look.text import body_of, tokenize

    model = body_of(run)
    tokens = tokenize(model, run.tokenizer, examples.texts, examples.pairs, model.section.max_seq_len)
    empty = next((place for place, t in zip(examples.places, tokens, strict=True) if not t.ids), None)
    if empty is not None:
        raise UserError(f"{empty}: the tokenizer makes nothing of its text: remove the row")
    words = [f"{a} {b}" for a, b in zip(examples.texts, examples.pairs or [""] * len(labels), strict=True)]
    judged = [
        Judged("majority", None, judge_majority(labels, splits)),
        Judged("words", None, judge_words(words, labels, splits)),
    ]
    made = {"trained": features(model, tokens, layers, pool)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.initialize()
    made["untrained"] = features(model, tokens, layers, pool)
    for kind in ("untrained", "trained"):
        for place, vectors in zip(layers, made[kind], strict=True):
            judged.append(Judged(kind, place + 1, judge_features(vectors, labels, splits)))
    return judged, sum(t.left_out > 0 for t in tokens)


def show(console: "Console", judged: Sequence[Judged]) -> None:
    """The table, the best of each column in bold."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("features")
    for heading in HEADINGS.values():
        table.add_column(heading, justify="right")
    best = {key: max(row.scores[key].mean for row in judged if key in row.scores) for key in HEADINGS}
    for row in judged:
        name = {"majority": "most frequent class", "words": "bag of words"}.get(row.features, row.features)
        scores = row.scores | ({"linear": row.scores["accuracy"]} if "accuracy" in row.scores else {})
        cells = []
        for key in HEADINGS:
            cell = in_words(scores[key]) if key in scores else ""
            cells.append(f"[bold]{cell}[/]" if cell and scores[key].mean >= best[key] else cell)
        table.add_row(name if row.layer is None else f"{name}, layer {row.layer}", *cells)
    console.print()
    console.print(table)
    console.print(f"\n{MEANINGS}", style="dim", markup=False)


def in_words(score: "Score") -> str:
    """Per cent, with the deviation over folds if there are folds."""
    return f"{100 * score.mean:.1f}" + ("" if score.deviation is None else f" ±{100 * score.deviation:4.1f}")


if __name__ == "__main__":
    run_main(main)
