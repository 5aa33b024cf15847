"""Keys and values of what a decoder has read, kept so that the next token costs one position."""

import torch
from torch import Tensor

from cairn.config.model import TransformerSection


class KVCache:
    """Preallocated keys and values of every layer, (B, Hkv, S, D) each; `length` positions of them are filled."""

    def __init__(
        self, section: TransformerSection, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (section.n_layer, 2, batch, section.kv_heads, capacity, section.head_dim)
        self.store = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0
        self.cross: dict[int, tuple[Tensor, Tensor]] = {}
        """Keys and values (B, Hkv, S, D) of the source, by layer, where the decoder looks at one."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, Hkv, T, D) behind what is there; all keys and values of the layer, the new ones included.

        The model raises `length` once, after its last layer. Raises ValueError where the capacity is exceeded.
        """
        end = self.length + k.shape[2]
        if end > self.store.shape[4]:
            raise ValueError(f"{end} tokens do not fit a cache of {self.store.shape[4]}")
        keys, values = self.store[layer, 0], self.store[layer, 1]
        keys[:, :, self.length : end] = k.detach()  # generation needs no gradient
        values[:, :, self.length : end] = v.detach()
        return keys[:, :, :end], values[:, :, :end]

    def select(self, rows: Tensor, cross: bool = True) -> None:
        """Keep these rows, (B',) int64; one that comes twice is copied. Not `cross`: each row's source is the same."""
        old = self.store
        if len(rows) != old.shape[2]:
            self.store = old.new_empty(*old.shape[:2], len(rows), *old.shape[3:])
        # Tensor by tensor: less memory at once, and on a CPU four times as fast as all in one.
        for before, after in zip(old.flatten(0, 1), self.store.flatten(0, 1), strict=True):
            after[:, :, : self.length] = before[:, :, : self.length].index_select(0, rows)
        if cross:
            self.cross = {layer: (k[rows], v[rows]) for layer, (k, v) in self.cross.items()}
