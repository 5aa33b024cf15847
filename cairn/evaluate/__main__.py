"""`python -m cairn.evaluate RUN --tasks FILE,...`: a trained GPT's scores on tasks of lm-evaluation-harness."""

import argparse
import json
import logging
import math
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cairn.config.main import Parser, run_main
from cairn.decode.__main__ import positive
from cairn.errors import UserError

if TYPE_CHECKING:
    from cairn.evaluate.harness import Harness

BOOTSTRAP = 1000
"""Resamples behind the standard error of a metric that is no mean."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(prog="cairn eval", description="Score a trained GPT on tasks of lm-evaluation-harness.")
    p.add_argument("run", type=Path, metavar="RUN", help="run folder, such as runs/gpt-tiny")
    p.add_argument(
        "--tasks",
        required=True,
        metavar="TASK,...",
        help="task files in the harness's YAML, folders with such files, or names that the harness knows",
    )
    p.add_argument("--limit", type=positive, metavar="N", help="only the first N documents of each task")
    p.add_argument("--num-fewshot", type=count, metavar="K", help="K solved examples before each (default: the task's)")
    p.add_argument("--batch-size", type=positive, default=8, metavar="B", help="texts in one forward pass (default 8)")
    p.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write (default RUN/eval/TASKS.json)")
    return p


def count(text: str) -> int:
    """An integer that is not negative. Raises ArgumentTypeError for another."""
    return 0 if text == "0" else positive(text)


def main() -> None:
    """Score, print the table, write it as JSON."""
    args = parser().parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before `datasets` is imported, which reads it then; so the others
    if not sys.stderr.isatty():
        os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("cairn eval needs lm-evaluation-harness: pip install 'cairn[eval]'") from error

    from cairn.cluster import Cluster
    from cairn.evaluate.harness import Harness
    from cairn.evaluate.tasks import load_tasks
    from cairn.train.folder import disk_errors, write_atomically
    from cairn.train.run import load_model

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    items = [item for item in args.tasks.split(",") if item]
    if not items:
        raise UserError("--tasks is empty: give a task file or the name of a task")
    harness = Harness(load_model(args.run, Cluster.from_env().device), args.batch_size)
    scores = evaluate(harness, load_tasks(items, args.num_fewshot), args.limit)
    out = args.out or args.run / "eval" / f"{'+'.join(Path(item).stem for item in items)}.json"
    report = {"run": str(args.run), "step": harness.run.step, "limit": args.limit, "tasks": scores}
    with disk_errors(str(out)):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, (json.dumps(report, indent=1) + "\n").encode())
    show(report)
    if harness.cut:
        print(f"{harness.cut} texts were longer than model.max_seq_len {harness.limit}: their beginning was left out")
    print(out)


def evaluate(harness: "Harness", tasks: dict[str, dict[str, Any]], limit: int | None) -> dict[str, dict[str, Any]]:
    """By task or group: documents "n", "num_fewshot", and "metrics" as {name: {"value", "stderr"}}; null is no number.

    Raises UserError for data that does not fit its task.
    """
    from lm_eval.evaluator import evaluate as run

    from cairn.evaluate.tasks import WRONG_TASK, first_line

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # the harness would fork this process to resample
    try:
        with redirect_stdout(sys.stderr):
            done: Any = run(harness, tasks, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False)
    except WRONG_TASK as error:
        raise UserError(
            f"tasks {', '.join(tasks['tasks'])}: {type(error).__name__}: {first_line(error)}; see docs/evaluating.md"
        ) from error
    scores: dict[str, dict[str, Any]] = {}
    for task, values in done["results"].items():
        metrics = {}
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr"):
                name = metric if kind == "none" else f"{metric} ({kind})"
                metrics[name] = {"value": number(value), "stderr": number(values.get(f"{metric}_stderr,{kind}"))}
        n = done["n-samples"].get(task, {}).get("effective")
        scores[task] = {"n": n, "num_fewshot": done["n-shot"].get(task), "metrics": metrics}
    return scores


def number(value: object) -> float | None:
    """A finite number, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def cell(value: float | None) -> str:
    """A number as the table has it."""
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3e}"


def show(report: dict[str, Any]) -> None:
    """The scores as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['run']}, step {report['step']}", title_justify="left", box=None, pad_edge=False)
    for name in ("task", "n", "shots", "metric", "value", "stderr"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, scores in report["tasks"].items():
        for metric, found in scores["metrics"].items():
            table.add_row(
                task,
                str(scores["n"] or ""),
                str(scores["num_fewshot"] or 0),
                metric,
                *(cell(found[key]) for key in ("value", "stderr")),
            )
    Console(width=None if sys.stdout.isatty() else 100).print(table)


if __name__ == "__main__":
    run_main(main)
