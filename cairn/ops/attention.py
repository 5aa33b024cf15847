"""Attention behind one function that picks its kernel."""

from typing import Literal

from torch import Tensor

from cairn.ops.backends import reference, sdpa
from cairn.ops.masks import Mask

Backend = Literal["auto", "reference", "sdpa", "flex", "blocked"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """Scaled dot-product attention, q (B, H, T, D), k and v (B, Hkv, S, D) -> (B, H, T, D)."""
    if backend == "reference":
        return reference(q, k, v, mask, bias, dropout)
    return sdpa(q, k, v, mask, bias, dropout)
