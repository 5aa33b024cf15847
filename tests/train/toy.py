"""A task that goes bad at chosen samples, in one of several ways."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cairn.config.schema import RunConfig
from cairn.config.train import CheckpointSection, EngineSection, GuardSection, RunSection, TrackSection, TrainSection
from cairn.data.batches import IGNORE, Batch, Item
from cairn.train.engine import Engine
from cairn.train.task import LossTask

BATCH = 4
KINDS = ("input", "output", "gradient", "loss")


class BadGradient(torch.autograd.Function):
    """The identity, with a gradient that is nan where `bad`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bad: Tensor) -> Tensor:
        ctx.save_for_backward(bad)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (bad,) = ctx.saved_tensors
        return gradient.masked_fill(bad, torch.nan), None


class Middle(nn.Module):
    """A layer that breaks where `bad`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(8, 8), kind

    def forward(self, x: Tensor, bad: Tensor) -> Tensor:
        y = torch.tanh(self.linear(x))
        if self.kind == "gradient":
            return BadGradient.apply(y, bad)
        return y.masked_fill(bad, torch.inf) if self.kind == "output" else y


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 8), Middle(kind), nn.Linear(8, 1)

    def forward(self, x: Tensor, bad: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x.to(self.first.weight.dtype)), bad)).float()


@dataclass
class Points:
    """Points about a plane."""

    bad: frozenset[int]
    kind: str
    count: int = 64

    def __len__(self) -> int:
        return self.count

    def item(self, k: int) -> Item:
        x = np.random.default_rng(k).standard_normal(4, dtype=np.float32)
        bad = k in self.bad
        if bad and self.kind == "input":
            x[1] = np.nan
        labels = np.array([1000.0 if bad and self.kind == "spike" else 1.0 + x.sum()], dtype=np.float32)
        return {"x": x, "bad": np.array([bad]), "labels": labels}


@dataclass
class Toy(LossTask):
    """Least squares; step s (from 1) has samples 4 (s - 1) to 4 s - 1."""

    kind: str = "output"
    bad: frozenset[int] = frozenset()
    tokens_per_sample: int = 1
    flops_per_sample: float = 0.0

    def models(self) -> dict[str, nn.Module]:
        return {"net": Net(self.kind)}

    def samples(self, split: str) -> Points:
        return Points(self.bad, self.kind) if split == "train" else Points(frozenset(), self.kind, 6)

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"loss": float((batch["labels"] != IGNORE).sum())}

    def loss_sums(self, model: nn.Module | Engine, batch: Batch) -> dict[str, Tensor]:
        squares = (model(batch["x"], batch["bad"]) - batch["labels"]).pow(2)
        if self.kind == "loss":
            squares = squares + torch.zeros_like(squares).masked_fill(batch["bad"], torch.inf)
        return {"loss": (squares * (batch["labels"] != IGNORE)).sum()}

    def origin(self, index: int) -> list[str]:
        return [f"points.txt:{index}"]


def in_steps(*steps: int) -> frozenset[int]:
    """The last sample of each step, which the last rank has."""
    return frozenset(BATCH * step - 1 for step in steps)


def config(path: Path, name: str = "toy", micro: int = 2, steps: int = 12, every: int = 4, **more: Any) -> RunConfig:
    sections: dict[str, Any] = {
        "run": RunSection(dir=str(path), name=name),
        "engine": EngineSection(precision="fp32"),
        "train": TrainSection(steps=steps, global_batch_size=BATCH, micro_batch_size=micro, log_every=5, eval_every=6),
        "checkpoint": CheckpointSection(every=every, keep_last=9),
        "guard": GuardSection(max_skipped=3),
        "track": TrackSection(progress=False),
    }
    return RunConfig(**(sections | more))
