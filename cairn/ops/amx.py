"""Attention for CPUs with AMX: FlashAttention-2's scheme (arXiv 2307.08691) in our own kernels.

Each query sees one range of keys, which is what a causal mask, a window, packed documents and padding come to.
Nothing of size T x S is kept: the backward pass makes the probabilities again.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from cairn.ops import native
from cairn.ops.masks import Mask


def amx(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None, dropout: float) -> Tensor:
    """As `reference`, where `obstacle` finds nothing against it."""
    ranges = mask.ranges(q.shape[2], k.shape[2], q.device)
    assert ranges is not None
    seed = torch.randint(2**63 - 1, (1,)) if dropout else None
    out: Tensor = _forward(q, k, v, *ranges, seed, dropout)[0]
    return out


def obstacle(q: Tensor, k: Tensor, mask: Mask, bias: Tensor | None) -> str | None:
    """Why these kernels cannot run on such attention, or None."""
    if not native.fits(q, k):
        return f"it is made for bf16 on CPUs, and this is {str(q.dtype).removeprefix('torch.')} on {q.device.type}"
    if bias is not None:
        return "it adds no bias to the scores"
    if not native.available():
        return native.obstacle() or "engine.kernels is pytorch"
    if mask.ranges(q.shape[2], k.shape[2], q.device) is None:
        return "what a query sees is not one range of keys"
    return None


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("B", "H", "Hkv", "T", "S", "D", "range_stride")),
        ("scale", ctypes.c_float),
        ("dropout", ctypes.c_float),
        ("threads", ctypes.c_int64),
    )


@torch.library.custom_op("cairn::amx_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, seed: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """Also gives the log-sum-exp, in base 2, of each query's scaled scores, (B, H, T) fp32. The seed (1,) is there
    where dropout is above 0.
    """
    q, k, v = map(native.dense, (q, k, v))
    out, lse = _heads_like(q), torch.empty(q.shape[:3])
    sizes = _shape(q, k, low, dropout)
    native.call("cairn_attention_forward", sizes, *_heads(q, k, v), low, high, seed, *_heads(out), lse)
    return out, lse


@torch.library.custom_op("cairn::amx_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    low: Tensor,
    high: Tensor,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad = map(native.dense, (q, k, v, grad))
    dq, dk, dv = _heads_like(q), _heads_like(k), _heads_like(v)
    args: list[Any] = [*_heads(q, k, v), low, high, seed, *_heads(out), lse, *_heads(grad, dq, dk, dv)]
    native.call("cairn_attention_backward", _shape(q, k, low, dropout), *args)
    return dq, dk, dv


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, seed: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    return _heads_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    low: Tensor,
    high: Tensor,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _heads_like(q), _heads_like(k), _heads_like(v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dropout = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.dropout), None, None, None, None


_forward.register_autograd(_gradient, setup_context=_setup)


def _heads_like(x: Tensor) -> Tensor:
    """(B, H, T, D), laid out as (B, T, H, D), which is what the layers around attention work on."""
    b, h, t, d = x.shape
    return x.new_empty(b, t, h, d).transpose(1, 2)


def _shape(q: Tensor, k: Tensor, low: Tensor, dropout: float) -> _Shape:
    (b, h, t, d), (hkv, s) = q.shape, k.shape[1:3]
    return _Shape(b, h, hkv, t, s, d, t if low.shape[0] > 1 else 0, d**-0.5, dropout, torch.get_num_threads())


def _heads(*tensors: Tensor) -> list[native.Rows]:
    return [native.Rows.of(x) for x in tensors]
