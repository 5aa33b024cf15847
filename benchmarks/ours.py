"""Our trainer as a user runs it, and what peers need of it to train on the same data."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rounds import Measured
from cairn.cluster import Cluster

if TYPE_CHECKING:
    from cairn.config.schema import PretrainConfig
    from cairn.data.prepare import Prepared


@dataclass(frozen=True)
class Shape:
    """A GPT and its batches."""

    n_layer: int
    n_head: int
    d_model: int
    seq_len: int
    vocab_size: int
    micro_batch_size: int
    grad_accum: int = 1

    @property
    def batch(self) -> int:
        """Samples of a step."""
        return self.micro_batch_size * self.grad_accum

    def overrides(self) -> list[str]:
        """Of a config."""
        model = [f"model.{key}={getattr(self, key)}" for key in ("n_layer", "n_head", "d_model", "vocab_size")]
        sizes = [f"train.global_batch_size={self.batch}", f"train.micro_batch_size={self.micro_batch_size}"]
        compiled = ["engine.compile=true"] if Cluster().device.type == "cuda" else []
        return [*model, f"model.max_seq_len={self.seq_len}", *sizes, *compiled]


def logged(config: str, overrides: Sequence[str], launch: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The metrics of `python -m [launch ...] pretrain config overrides`, in a folder that is gone again."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", *launch, "pretrain", config, *overrides, f"run.dir={folder}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (metrics,) = Path(folder).glob("*/metrics.jsonl")
        return [json.loads(line) for line in metrics.read_text().splitlines()]


def trained(config: str, overrides: Sequence[str], steps: int, launch: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The row of each step of such a run."""
    rows = logged(config, [*overrides, f"train.steps={steps}"], launch)
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
