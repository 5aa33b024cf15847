"""Which keys a query may see."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@dataclass(frozen=True)
class Mask:
    """Rules that together decide which keys each query sees; a query that sees none yields zero."""

    causal: bool = False
    """Only keys at or left of the query."""
    window: int | None = None
    """Only keys fewer than this many positions away."""
    document_ids: Tensor | None = None
    """(B, T) integers: only keys with the same one. Where the keys are the queries T == S, offset 0."""
    key_padding: Tensor | None = None
    """(B, S) bool: only keys where it is True."""
    offset: int = 0
    """Position of the first query among the keys (the length of what a cache already held)."""
    key_document_ids: Tensor | None = None
    """(B, S) integers: what document_ids are compared with where the keys are others than the queries."""
    prepared: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What a backend makes of the mask, kept for the other layers of the same forward pass."""

    @property
    def is_plain(self) -> bool:
        """Whether `causal` is the only rule."""
        return self.window is None and self.document_ids is None and self.key_padding is None

    def ranges(self, n_query: int, n_key: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """The keys low <= s < high that each query sees, (1 or B, T) int32 each, or None where they are not one range.

        Made once for all layers of a forward pass. Where a model is compiled or planned, it is taken for granted that
        padding is at the ends, and that documents stand in the order of their ids, negative ones last.
        """
        key = f"ranges {n_query} {n_key}"
        if key not in self.prepared:
            self.prepared[key] = self._ranges(n_query, n_key, device)
        found: tuple[Tensor, Tensor] | None = self.prepared[key]
        return found

    def _ranges(self, n_query: int, n_key: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        query = torch.arange(n_query, device=device)[None] + self.offset
        low, high = torch.zeros_like(query), torch.full_like(query, n_key)
        if self.window is not None:
            low, high = query - self.window + 1, query + self.window
        if self.causal:
            high = high.minimum(query + 1)
        in_one: list[Tensor] = []
        if self.document_ids is not None:
            ours = _padding_last(self.document_ids)
            theirs = ours if self.key_document_ids is None else _padding_last(self.key_document_ids)
            in_one.append((theirs.diff() >= 0).all())
            low = low.maximum(torch.searchsorted(theirs, ours))
            high = high.minimum(torch.searchsorted(theirs, ours, right=True))
        if self.key_padding is not None:
            real = self.key_padding.long()  # (B, S)
            count = real.sum(1, keepdim=True)
            start = real.argmax(1, keepdim=True)
            last = n_key - real.flip(1).argmax(1, keepdim=True)
            in_one.append(((last - start == count) | (count == 0)).all())
            low, high = low.maximum(start), high.minimum(start + count)
        known = not torch.compiler.is_compiling() and not isinstance(low, FakeTensor)
        if known and not all(in_one):
            return None
        return low.clamp(0, n_key).int().contiguous(), high.clamp(0, n_key).int().contiguous()

    def dense(self, rows: slice, keys: slice, device: torch.device) -> Tensor | None:
        """True where seen, for a range of queries and keys: (1 or B, 1, rows, keys), or None where all is seen."""
        parts: list[Tensor] = []
        hides_right = self.causal and self.offset + rows.start < keys.stop - 1
        if hides_right or self.window is not None:
            query = torch.arange(rows.start, rows.stop, device=device)[:, None] + self.offset
            distance = query - torch.arange(keys.start, keys.stop, device=device)
            if hides_right:
                parts.append((distance >= 0)[None, None])
            if self.window is not None:
                parts.append(((distance if self.causal else distance.abs()) < self.window)[None, None])
        if self.document_ids is not None:
            theirs = self.document_ids if self.key_document_ids is None else self.key_document_ids
            parts.append((self.document_ids[:, rows, None] == theirs[:, None, keys])[:, None])
        if self.key_padding is not None:
            parts.append(self.key_padding[:, None, None, keys].bool())
        if not parts:
            return None
        seen = parts[0]
        for part in parts[1:]:
            seen = seen & part
        return seen


def _padding_last(ids: Tensor) -> Tensor:
    """Document ids with those of padding, which are negative, above all others; contiguous."""
    return ids.where(ids >= 0, torch.iinfo(ids.dtype).max).contiguous()
