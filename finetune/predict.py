"""`cairn predict RUN FILE`: a fine-tuned model's predictions beside the inputs."""

import argparse
import csv
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cairn.config.main import Parser, run_main
from cairn.errors import UserError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(prog="cairn predict", description="Write what a fine-tuned model predicts of each row of a file.")
    p.add_argument("run", type=Path, metavar="RUN", help="run folder of cairn finetune")
    p.add_argument("file", metavar="FILE", help="a file like data.valid, with or without labels")
    p.add_argument("--out", type=Path, metavar="FILE", help="default: FILE's name with .predicted, in the run folder")
    p.add_argument("--batch-size", type=int, default=64, metavar="B", help="rows at once (default 64)")
    p.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys of data and task that FILE needs")
    return p


def main() -> None:
    """Predict, write, and say how good it is where the file has labels."""
    args = parser().parse_intermixed_args()
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} must be at least 1")

    from cairn.cluster import Cluster
    from cairn.config.load import load
    from cairn.config.schema import FinetuneConfig
    from cairn.train.folder import RunFolder
    from cairn.train.run import load_model
    from finetune.build import build_task
    from finetune.run import outputs_of

    run = load_model(args.run, Cluster.from_env().device)
    if not isinstance(run.config, FinetuneConfig):
        raise UserError(f"{args.run} was pretrained and has no task: give a run of cairn finetune")
    config = load(FinetuneConfig, RunFolder(args.run).config, args.overrides)
    task = build_task(config, run.tokenizer)
    rows = list(task.rows(args.file))
    if not rows:
        raise UserError(f"{args.file}: no rows to predict")
    labelled = task.labelled(rows)
    examples = task.encode(rows, labelled)
    for note in task.told_of_cuts(args.file, len(rows)):
        print(note, file=sys.stderr)
    outputs = outputs_of(task, run.model, examples, args.batch_size)
    predicted = [row.values | found for row, found in zip(rows, task.predict(examples, outputs), strict=True)]
    out = args.out or args.run / f"{Path(args.file).name.partition('.')[0]}.predicted{ending(args.file)}"
    write(predicted, out)
    print(f"{len(predicted):,} predictions: {out}")
    if labelled:
        for name, value in task.measure(examples, outputs).items():
            print(f"{name}: {value:.4f}")


def ending(file: str) -> str:
    """Of the output: tables stay tables, all else becomes JSON lines."""
    suffix = Path(file.removesuffix(".gz").removesuffix(".zst")).suffix.lower()
    return suffix if suffix in (".csv", ".tsv") else ".jsonl"


def write(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Rows as JSON lines, or as a table where the name ends in .csv or .tsv. Raises UserError where it cannot."""
    from cairn.train.folder import disk_errors

    with disk_errors(str(out)), out.open("w", encoding="utf-8", newline="") as file:
        if out.suffix == ".csv":
            csv.writer(file, lineterminator="\n").writerows([list(rows[0]), *map(_cells, rows)])
        elif out.suffix == ".tsv":  # no quoting there, as it is read: what would break a line is a space
            file.writelines("\t".join(map(_plain, cells)) + "\n" for cells in [list(rows[0]), *map(_cells, rows)])
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _cells(row: dict[str, Any]) -> list[str]:
    return [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in row.values()]


def _plain(cell: str) -> str:
    return " ".join(re.split(r"[\t\r\n]", cell))


if __name__ == "__main__":
    run_main(main)
