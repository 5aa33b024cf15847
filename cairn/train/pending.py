"""Rows of steps whose metrics are still on the device."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cairn.train.task import Metrics


class Pending:
    """Collects steps, so that one reduction over ranks and one wait for the device do for many."""

    def __init__(self) -> None:
        self._steps: list[tuple[dict[str, Any], Metrics]] = []

    def __len__(self) -> int:
        """Steps collected."""
        return len(self._steps)

    def add(self, row: dict[str, Any], metrics: Metrics) -> None:
        """Note what is known of a step, scalar tensors among it, and its metrics, to be summed over ranks."""
        self._steps.append((row, metrics))

    def collect(self, word: int) -> tuple[list[dict[str, Any]], int]:
        """COLLECTIVE: all rows, with numbers for tensors, and the sum of all ranks' words, which travels along.

        Call it when there are some. The word is below 2^24 in size: it goes as a float.
        """
        names = list(self._steps[0][1])
        table = [torch.stack([metrics[name].float() for name in names]) for _, metrics in self._steps]
        sums = torch.stack([*table, torch.full_like(table[0], float(word))])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        *values, words = sums.tolist()
        rows = []
        for (row, _), numbers in zip(self._steps, values, strict=True):
            row |= dict(zip(names, numbers, strict=True))
            rows.append({key: value.item() if isinstance(value, Tensor) else value for key, value in row.items()})
        self._steps = []
        return rows, round(words[0])
