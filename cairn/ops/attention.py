"""Attention behind one function that picks its kernel."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from cairn.errors import UserError
from cairn.ops import amx
from cairn.ops.backends import reference, sdpa
from cairn.ops.blocked import blocked
from cairn.ops.flex import flex
from cairn.ops.masks import Mask

Backend = Literal["auto", "reference", "sdpa", "flex", "blocked", "amx"]

BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Mask, Tensor | None, float], Tensor]] = {
    "reference": reference,
    "sdpa": sdpa,
    "flex": flex,
    "blocked": blocked,
    "amx": amx.amx,
}
FLEX_HEAD_DIM = 16  # the narrowest head its compiled kernel takes
PROBS_BYTES = 256 * 2**20  # probabilities of one layer that `auto` lets the blocked backend keep


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """Scaled dot-product attention, q (B, H, T, D), k and v (B, Hkv, S, D) -> (B, H, T, D).

    H is a multiple of Hkv. `bias` (1 or B, H, T, S) is added to the scores; `dropout` acts on the probabilities.
    What `auto` picks is logged once, at level INFO. Raises UserError when the backend asked for cannot do this.
    """
    name: str = backend
    if backend == "auto":
        name, reason = choose(q, k, mask, bias, dropout)
        _tell(name, reason)
    elif why := obstacle(backend, q, k, v, mask, bias, dropout):
        raise UserError(f"model.attention_backend {backend} cannot run here: {why}; auto picks one that can")
    return BACKENDS[name](q, k, v, mask, bias, dropout)


def obstacle(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None, dropout: float
) -> str | None:
    """Why a backend cannot run on these, or None. All but amx support every mask and a bias; all, grouped queries."""
    tensors = (q, k, v) if bias is None else (q, k, v, bias)
    on_cpu = q.device.type == "cpu"
    if backend == "flex" and dropout:
        return "FlexAttention has no dropout, and model.attention_dropout is above 0"
    if backend == "flex" and not on_cpu and q.shape[3] < FLEX_HEAD_DIM:
        return f"FlexAttention's kernel needs heads of {FLEX_HEAD_DIM} or wider, and these are {q.shape[3]}"
    if backend == "flex" and on_cpu and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "FlexAttention has no backward pass on a CPU"
    if backend == "amx":
        return amx.obstacle(q, k, mask, bias)
    if backend == "blocked" and not on_cpu:
        return f"it is made for CPUs, and this is {q.device.type}"
    return None


def choose(q: Tensor, k: Tensor, mask: Mask, bias: Tensor | None, dropout: float) -> tuple[str, str]:
    """The backend that `auto` takes, by device, mask and shape, and why."""
    b, h, t, s = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    if q.device.type == "cuda":
        if mask.window is None and mask.document_ids is None:
            return "sdpa", "PyTorch's fused kernels, the mask being plain"
        # Fused kernels know no window and no documents, and would read a dense mask; FlexAttention skips whole blocks.
        if t != s:
            return "sdpa", "queries are fewer than keys"
        if dropout:
            return "sdpa", "FlexAttention has no dropout"
        if q.shape[3] < FLEX_HEAD_DIM:
            return "sdpa", f"FlexAttention's kernel needs heads of {FLEX_HEAD_DIM} or wider"
        return "flex", "it skips what a window or documents hide"
    if q.device.type == "cpu" and t > 1:
        if amx.obstacle(q, k, mask, bias) is None:
            return "amx", "our kernels for this CPU"
        if b * h * t * s * q.element_size() <= PROBS_BYTES:
            return "blocked", "made for CPUs, and the probabilities of a layer fit"
        return "sdpa", "the probabilities of a layer would take much memory"
    return "sdpa", "one query or another device"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _tell(backend: str, reason: str) -> None:
    """Log the choice, also where the model is compiled: the compiler calls this itself."""
    _log(backend, reason)


@cache
def _log(backend: str, reason: str) -> None:
    """Once for each pair."""
    logging.getLogger("cairn").info("attention: %s (%s); model.attention_backend pins one", backend, reason)
