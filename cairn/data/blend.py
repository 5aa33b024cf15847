"""Blends of sources: place k of a run comes from a fixed source, in exact proportions and without state."""

from collections.abc import Sequence

import numpy as np

BLOCK = 1024
LARGEST_BLOCK = 1 << 20


class Blend:
    """Place k -> (source, place within that source).

    Every block of `block` places holds the same share of each source, the weights rounded by largest remainder, spread
    evenly through the block. The block grows where a weight is too small for it, so that each source has a place.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or min(weights) <= 0:
            raise ValueError(f"a blend needs positive weights, not {list(weights)}")
        shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        self.block = 1 if len(weights) == 1 else BLOCK
        while self.block < LARGEST_BLOCK and shares.min() * self.block < len(weights):
            self.block *= 2
        exact = shares * self.block
        counts = np.floor(exact).astype(np.int64)
        largest = np.argsort(counts - exact, kind="stable")
        counts[largest[: self.block - counts.sum()]] += 1
        self.counts: list[int] = counts.tolist()
        """Places of each source in a block."""

        # Source i wants its j-th place at (j + 1/2) / counts[i] of the block; taking all wishes in order spreads them.
        source = np.repeat(np.arange(len(weights)), counts)
        place = np.concatenate([np.arange(count) for count in counts])
        slots = np.argsort((place + 0.5) / counts[source], kind="stable")
        self._slots: list[tuple[int, int]] = list(zip(source[slots].tolist(), place[slots].tolist(), strict=True))

    def __getitem__(self, k: int) -> tuple[int, int]:
        """The source of place k >= 0, and its place in the order of that source."""
        block, slot = divmod(k, self.block)
        source, place = self._slots[slot]
        return source, block * self.counts[source] + place
