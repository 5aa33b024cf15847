"""Positional encodings. Tables are computed in fp32 where they are used, so no cast of the model can spoil them."""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from cairn.ops import native


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """Sines then cosines of (...) positions at geometric wavelengths (arXiv 1706.03762): (..., dim) fp32."""
    half = -(-dim // 2)
    rates = torch.exp(torch.arange(half, device=positions.device) * (-math.log(10000.0) / max(half - 1, 1)))
    angles = positions.float()[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)[..., :dim]


def rope_table(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (T, dim / 2) fp32, that rotate a head of width `dim` (arXiv 2104.09864)."""
    rates = theta ** (-torch.arange(0, dim, 2, device=positions.device).float() / dim)
    angles = positions.float()[:, None] * rates
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of x (B, H, T, D) by its position's angle, as Llama does."""
    cos, sin = table
    if native.usable(x) and cos.shape == (x.shape[2], x.shape[3] // 2):
        y: Tensor = _Rotate.apply(x, cos, sin, False)  # type: ignore[no-untyped-call]
        return y
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.back = back
        x = native.dense(x)
        y = torch.empty_like(x)
        shape = _Turn(*x.shape, back, torch.get_num_threads())
        native.call("cairn_rotate", shape, native.Rows.of(x), cos.contiguous(), sin.contiguous(), native.Rows.of(y))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Rotate.apply(grad, *ctx.saved_tensors, not ctx.back), None, None, None  # type: ignore[no-untyped-call]


class _Turn(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("B", "H", "T", "D", "back", "threads"))


def t5_buckets(distance: Tensor, causal: bool, n_buckets: int = 32, max_distance: int = 128) -> Tensor:
    """Bucket of each key-minus-query distance: exact when near, logarithmic when far (arXiv 1910.10683)."""
    bucket = torch.zeros_like(distance)
    if causal:
        gap = (-distance).clamp(min=0)
    else:
        n_buckets //= 2
        bucket = bucket + (distance > 0) * n_buckets
        gap = distance.abs()
    exact = n_buckets // 2
    log_share = torch.log(gap.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (log_share * (n_buckets - exact)).long()).clamp(max=n_buckets - 1)
    return bucket + torch.where(gap < exact, gap, far)


def alibi_slopes(n_head: int, device: torch.device | None = None) -> Tensor:
    """Slope of each head (arXiv 2108.12409): powers of 2^(-8/n); other counts interleave the next power's: (H,)."""
    power = 2 ** math.floor(math.log2(n_head))
    # Counted on the device: a copy from the host would wait for it in every forward pass.
    slopes = torch.exp2(torch.arange(1, power + 1, device=device) * (-8.0 / power))
    between = torch.exp2(torch.arange(1, 2 * power, 2, device=device) * (-4.0 / power))
    return torch.cat([slopes, between[: n_head - power]])


def alibi_bias(distance: Tensor, n_head: int) -> Tensor:
    """ALiBi's penalty for key-minus-query distances (T, S): (1, H, T, S) fp32.

    To the right the heads' slopes come in reverse order: a symmetric penalty could not tell left from right.
    """
    left = alibi_slopes(n_head, distance.device)[:, None, None]
    return -(torch.where(distance > 0, left.flip(0), left) * distance.abs())[None]
