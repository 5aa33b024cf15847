"""Our trainer as a user runs it, and what peers need of it to train on the same data."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rounds import Measured

if TYPE_CHECKING:
    from cairn.config.schema import PretrainConfig
    from cairn.data.prepare import Prepared


def trained(config: str, overrides: Sequence[str], steps: int, launch: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The row of each step of `python -m [launch ...] pretrain config overrides`, in a folder that is gone again."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", *launch, "pretrain", config, *overrides]
        command += [f"train.steps={steps}", f"run.dir={folder}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (metrics,) = Path(folder).glob("*/metrics.jsonl")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [row for row in rows if "step_seconds" in row]


def summary(rows: Sequence[dict[str, Any]], warmup: int) -> Measured:
    """Seconds of a step after the warmup, the share of them spent waiting for data, the best matrix product beside
    them, the first and the last loss."""
    return {
        "seconds": statistics.median(row["step_seconds"] for row in rows[warmup:]),
        "wait": max(row["data_wait"] for row in rows[warmup:]),
        "peak": rows[-1]["flops_per_s"] / rows[-1]["mfu"],
        "first": rows[0]["loss"],
        "loss": rows[-1]["loss"],
    }


def opened(path: str, overrides: Sequence[str]) -> "tuple[PretrainConfig, Prepared]":
    """The config as it would train here, and its corpus, prepared if it is not."""
    from cairn.config.load import load
    from cairn.config.schema import PretrainConfig
    from cairn.data.prepare import open_prepared, prepare
    from cairn.plan.hardware import here, settled_for

    config = settled_for(here(), load(PretrainConfig, Path(path), list(overrides)))
    return config, open_prepared(prepare(config.data, config.tokenizer))
