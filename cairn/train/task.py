"""The seam that keeps one training loop: a Task says what is trained, the trainer (trainer.py) says when.

GPT, BERT, every fine-tuning task and every vision or GAN recipe is a Task. Most are a LossTask: one model and a loss
that is a sum over targets. A GAN overrides `step` and drives two engines.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cairn.data.batches import Batch, Samples
from cairn.train.engine import Engine

Engines = Mapping[str, Engine]
Metrics = dict[str, Tensor]


class Task(Protocol):
    """What a run trains."""

    def models(self) -> dict[str, nn.Module]:
        """Fresh models by name, on the CPU in fp32; called once, after the seed is set."""
        ...

    def samples(self, split: str) -> Samples:
        """The samples of "train" (endless, shuffled) or "valid" (each once)."""
        ...

    def step(self, engines: Engines, batches: list[Batch], lr_factor: float) -> Metrics:
        """One optimizer step over this rank's micro-batches.

        Returns scalars, "loss" among them, whose sum over ranks is the metric of the whole step. Nothing here may wait
        for the device.
        """
        ...

    def evaluate(self, engines: Engines, batches: Iterable[Batch]) -> dict[str, float]:
        """Metrics over all ranks' held-out batches; collective, and the same on every rank."""
        ...

    def origin(self, index: int) -> list[str]:
        """Where training sample `index` comes from, a line each: `file:line` of every document in it, as a rule."""
        ...

    def identity(self) -> dict[str, str]:
        """What a checkpoint must agree on to be resumed, by name: fingerprints of the corpus and such."""
        ...

    @property
    def tokens_per_sample(self) -> int:
        """Tokens (or pixels, patches) in one sample, the unit of throughput."""
        ...

    @property
    def flops_per_sample(self) -> float:
        """Floating-point operations of one sample, forward and backward; 0 when unknown."""
        ...


class LossTask:
    """One model and a loss that is a sum of terms, each divided by the number of its targets over the whole step.

    Dividing by the global count, not micro-batch by micro-batch, makes the gradient the same for every split of the
    global batch into ranks and micro-batches, however uneven the counts.
    """

    def origin(self, index: int) -> list[str]:
        """Where training sample `index` comes from; a task that knows files and lines says more."""
        return [f"sample {index}"]

    def weights(self, batch: Batch) -> dict[str, float]:
        """Number of targets of each loss term in a batch on the host."""
        raise NotImplementedError

    def loss_sums(self, model: nn.Module | Engine, batch: Batch) -> dict[str, Tensor]:
        """Sum over targets of each loss term; the batch is on the model's device."""
        raise NotImplementedError

    def step(self, engines: Engines, batches: list[Batch], lr_factor: float) -> Metrics:
        """Forward and backward over the micro-batches, then one update."""
        (engine,) = engines.values()
        totals = sum_over_ranks(_add([self.weights(batch) for batch in batches]))
        metrics: Metrics = {}
        for i, batch in enumerate(batches):
            sums = self.loss_sums(engine, to_device(batch, engine.device))
            terms = {name: value / max(totals[name], 1.0) for name, value in sums.items()}
            loss = torch.stack(list(terms.values())).sum()
            engine.backward(loss, last=i == len(batches) - 1)
            for name, value in {"loss": loss, **(terms if len(terms) > 1 else {})}.items():
                metrics[name] = metrics.get(name, 0.0) + value.detach().float()
        engine.step(lr_factor)
        return metrics

    def evaluate(self, engines: Engines, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean of each loss term over the held-out targets, and their sum as "loss"."""
        (engine,) = engines.values()
        weights: list[dict[str, float]] = []
        sums: dict[str, Tensor] = {}
        with evaluating(engine):
            for batch in batches:
                weights.append(self.weights(batch))
                for name, value in self.loss_sums(engine, to_device(batch, engine.device)).items():
                    sums[name] = sums.get(name, 0.0) + value.double()
        totals = sum_over_ranks(_add(weights))
        means = {
            name: total / max(totals[name], 1.0)
            for name, total in sum_over_ranks({k: v.item() for k, v in sums.items()}).items()
        }
        return {"loss": sum(means.values()), **(means if len(means) > 1 else {})}

    def identity(self) -> dict[str, str]:
        """Nothing to agree on."""
        return {}


@contextmanager
def evaluating(engine: Engine) -> Iterator[None]:
    """An engine's module in evaluation mode, without gradients."""
    engine.module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.module.train()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; copies from pinned memory do not wait."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Sum host numbers over ranks, in fp64; collective when there are several ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    names = sorted(values)
    total = torch.tensor([values[name] for name in names], dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def _add(items: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(item[name] for item in items) for name in items[0]} if items else {}
