"""From samples to the micro-batches of a step: the same samples in step s on every topology."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cairn.errors import UserError

Item = dict[str, NDArray[Any]]
Batch = dict[str, Tensor]
T = TypeVar("T")

IGNORE = -100
"""The label of what is not a target. Every key that ends in `label` or `labels` holds labels."""


class Samples(Protocol):
    """Samples by number, each a pure function of (seed, k)."""

    def __len__(self) -> int:
        """Samples in one epoch."""
        ...

    def item(self, k: int) -> Item:
        """Sample k as arrays of one shape for every k. Training samples are endless: epochs roll on by themselves."""
        ...


@runtime_checkable
class Ragged(Samples, Protocol):
    """Samples of different lengths, which say themselves how some of them become a batch."""

    def collate(self, items: Sequence[Item]) -> Batch:
        """Items as one batch of tensors."""
        ...


def collate(items: Sequence[Item]) -> Batch:
    """Items with arrays of (...) as one batch of tensors (B, ...)."""
    return {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0]}


def blank(item: Item) -> Item:
    """The item without its targets: it fills a batch up and weighs nothing."""
    labels = {key: np.full_like(item[key], IGNORE) for key in item if key.endswith(("label", "labels"))}
    return item | labels


class Loader:
    """The batches of one rank, built ahead by one thread.

    Step s is made of samples [s G, (s + 1) G), G the global batch size, whatever the world size and accumulation:
    micro-batch m of rank r holds the `micro_batch_size` samples from s G + (m world_size + r) micro_batch_size on.
    There is no state: `step` may be asked for any step, so a resumed run just asks for the next one.

    Raises UserError when there are no samples, or the global batch does not divide.
    """

    def __init__(
        self,
        samples: Samples,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        ahead: int = 2,
    ) -> None:
        if global_batch_size % (micro_batch_size * world_size):
            raise UserError(
                f"train.global_batch_size {global_batch_size} is not a multiple of train.micro_batch_size "
                f"{micro_batch_size} x world size {world_size}; change one of the three"
            )
        if not len(samples):
            raise UserError("the corpus is shorter than one sequence; give data.source more text or lower data.seq_len")
        self.samples = samples
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.grad_accum = global_batch_size // (micro_batch_size * world_size)
        self.wait_seconds = 0.0
        """Time the caller has waited for batches so far."""
        self._ahead = ahead
        self._pin = torch.cuda.is_available()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._queue: deque[tuple[int, Future[list[Batch]]]] = deque()

    def step(self, s: int) -> list[Batch]:
        """The `grad_accum` micro-batches of optimizer step s; an error met while building them is raised here."""
        if not self._queue or self._queue[0][0] != s:
            for _, future in self._queue:
                future.cancel()
            self._queue.clear()
        while len(self._queue) <= self._ahead:
            number = s + len(self._queue)
            self._queue.append((number, self._thread.submit(self._build_step, number)))
        return self._wait(self._queue.popleft()[1])

    def evaluation(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """This rank's share of the samples, each of them on one rank once, in batches of one size.

        `limit` takes that many, spread evenly: the first ones would be of the first few documents. Every rank gets the
        same number of batches, since a forward pass may be collective, and all have one shape, as a compiled model
        would be compiled again for another: what is lacking at the end is filled with `blank` samples.
        """
        total = len(self.samples)
        count = total if limit is None else min(limit, total)
        stride = batch_size * self.world_size
        shares = (
            [i * total // count for i in range(start + self.rank, min(start + stride, count), self.world_size)]
            for start in range(0, count, stride)
        )
        return self._evaluate(partial(self._build, share, batch_size) for share in shares)

    def close(self) -> None:
        """Stop building ahead."""
        self._queue.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _evaluate(self, jobs: Iterable[Callable[[], Batch]]) -> Iterator[Batch]:
        queue: deque[Future[Batch]] = deque()
        for job in jobs:
            queue.append(self._thread.submit(job))
            if len(queue) > self._ahead:
                yield self._wait(queue.popleft())
        while queue:
            yield self._wait(queue.popleft())

    def _wait(self, future: Future[T]) -> T:
        started = time.perf_counter()
        try:
            return future.result()
        finally:
            self.wait_seconds += time.perf_counter() - started

    def _build_step(self, s: int) -> list[Batch]:
        size = self.micro_batch_size
        starts = (s * self.global_batch_size + (m * self.world_size + self.rank) * size for m in range(self.grad_accum))
        return [self._build(range(start, start + size), size) for start in starts]

    def _build(self, numbers: Sequence[int], size: int) -> Batch:
        items = [self.samples.item(k) for k in numbers or [0]]
        items = items[: len(numbers)] + [blank(items[0])] * (size - len(numbers))
        batch = self.samples.collate(items) if isinstance(self.samples, Ragged) else collate(items)
        return {key: value.pin_memory() for key, value in batch.items()} if self._pin else batch
