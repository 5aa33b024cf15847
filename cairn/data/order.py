"""The order of samples: a keyed permutation computed on the fly, so that data state is one integer.

A shuffled index array costs memory, start-up time and a file that ranks race for. Here the place of sample k is
computed instead: a Feistel network (Luby and Rackoff 1988) permutes the smallest power of two that holds n, and
cycle walking (Black and Rogaway 2002) narrows that to [0, n): images outside are permuted again until one falls inside.
"""

from functools import lru_cache
from typing import overload

import numpy as np
from numpy.typing import NDArray

MASK = (1 << 64) - 1
ROUNDS = 8
# SplitMix64 (Steele, Lea and Flood 2014): its increment and its two finaliser constants.
GOLDEN, MIX_A, MIX_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(*key: int) -> int:
    """A 64-bit hash of a tuple of integers; the seed of everything that is a pure function of (seed, sample)."""
    state = 0
    for part in key:
        state = (state ^ part) + GOLDEN & MASK
        state = (state ^ state >> 30) * MIX_A & MASK
        state = (state ^ state >> 27) * MIX_B & MASK
        state ^= state >> 31
    return state


@lru_cache(maxsize=64)
def _round_keys(*key: int) -> tuple[int, ...]:
    return tuple(mix(*key, number) for number in range(ROUNDS))


@overload
def permute(index: int, n: int, *key: int) -> int: ...
@overload
def permute(index: NDArray[np.integer], n: int, *key: int) -> NDArray[np.int64]: ...
def permute(index: int | NDArray[np.integer], n: int, *key: int) -> int | NDArray[np.int64]:
    """Where a bijection of [0, n), chosen by `key`, sends `index`, an integer or an array (...) of integers.

    Constant memory; under two passes through the network on average. 1 <= n <= 2**62.
    """
    if not 1 <= n <= 1 << 62:
        raise ValueError(f"permute works for 1 <= n <= 2**62, not {n}")
    bits = (n - 1).bit_length()
    if isinstance(index, np.ndarray):
        return _permute_array(index, n, bits, _round_keys(*key))
    if not 0 <= index < n:
        raise IndexError(f"index {index} is outside [0, {n})")
    return _permute_int(index, n, bits, _round_keys(*key))


def _permute_int(index: int, n: int, bits: int, keys: tuple[int, ...]) -> int:
    # Halves of bits // 2 and the rest, so odd widths need no doubling of the domain. A round takes its value from the
    # top bits of a product, the well-mixed ones.
    low = bits // 2
    high = bits - low
    low_mask, low_shift, high_shift = (1 << low) - 1, 64 - low, 64 - high
    while True:
        a, b = index >> low, index & low_mask
        for i in range(0, ROUNDS, 2):
            x = (b ^ keys[i]) * MIX_A & MASK
            a ^= ((x ^ x >> 32) * MIX_B & MASK) >> high_shift
            x = (a ^ keys[i + 1]) * MIX_A & MASK
            b ^= ((x ^ x >> 32) * MIX_B & MASK) >> low_shift
        index = a << low | b
        if index < n:
            return index


def _permute_array(index: NDArray[np.integer], n: int, bits: int, keys: tuple[int, ...]) -> NDArray[np.int64]:
    if index.size and not (index.min() >= 0 and index.max() < n):
        raise IndexError(f"an index is outside [0, {n})")
    low = bits // 2
    high = bits - low
    u = np.uint64

    def top(x: NDArray[np.uint64], key: int, width: int) -> NDArray[np.uint64]:
        x = (x ^ u(key)) * u(MIX_A)
        x = (x ^ x >> u(32)) * u(MIX_B)
        # numpy leaves a shift by 64 undefined; in Python's integers it gives 0.
        return x >> u(64 - width) if width else np.zeros_like(x)

    def network(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        a, b = x >> u(low), x & u((1 << low) - 1)
        for i in range(0, ROUNDS, 2):
            a = a ^ top(b, keys[i], high)
            b = b ^ top(a, keys[i + 1], low)
        return a << u(low) | b

    out = network(index.reshape(-1).astype(np.uint64))
    while (outside := np.flatnonzero(out >= u(n))).size:
        out[outside] = network(out[outside])
    return out.astype(np.int64).reshape(index.shape)


class Order:
    """The endless order of n samples: epoch e visits each once, in the permutation of (seed, e)."""

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise ValueError(f"an order needs at least one sample, not {n}")
        self.n = n
        self.seed = seed

    def __getitem__(self, k: int) -> int:
        """The sample, in [0, n), at place k >= 0 of the run."""
        if k < 0:
            raise IndexError(f"place {k} of an order is negative")
        epoch, index = divmod(k, self.n)
        return permute(index, self.n, self.seed, epoch)
