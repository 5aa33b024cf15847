"""Which keys a query may see."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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
