"""Normalisation whose statistics are fp32 whatever the dtype of the input."""

import ctypes
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cairn.ops import native


class Scale(NamedTuple):
    """What a norm is made of."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centred: bool
    """LayerNorm (arXiv 1607.06450), else RMSNorm (arXiv 1910.07467)."""


def norm(x: Tensor, scale: Scale) -> Tensor:
    """x (..., D), normed over the last dimension."""
    if native.usable(x, scale.weight, scale.bias):
        y: Tensor = _Norm.apply(x, None, scale.weight, scale.bias, scale)[1]  # type: ignore[no-untyped-call]
        return y
    if scale.centred:
        return F.layer_norm(x, x.shape[-1:], scale.weight, scale.bias, scale.eps)
    return F.rms_norm(x, x.shape[-1:], scale.weight, scale.eps)


def add_norm(x: Tensor, branch: Tensor | None, scale: Scale) -> tuple[Tensor, Tensor]:
    """x + branch, or x, and that normed: the residual stream and what the next layer reads; (..., D) each.

    In one pass, forward and backward, where our kernels run.
    """
    if native.usable(x, branch, scale.weight, scale.bias):
        both: tuple[Tensor, Tensor] = _Norm.apply(x, branch, scale.weight, scale.bias, scale)  # type: ignore[no-untyped-call]
        return both
    x = x if branch is None else x + branch
    return x, norm(x, scale)


class _Norm(torch.autograd.Function):
    """Gives x + branch too; without a branch x itself, so that its gradients from both uses come in together."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, scale: Scale
    ) -> tuple[Tensor, Tensor]:
        x, branch = _readable(x), None if branch is None else _readable(branch)
        total = x if branch is None else torch.empty_like(x)
        y, statistics = torch.empty_like(x), torch.empty(2, x.numel() // x.shape[-1])
        shape, rows = _rows(scale, x, branch, total if branch is not None else None, y)
        native.call("cairn_norm_forward", shape, *rows[:3], weight, bias, rows[3], *statistics)
        ctx.save_for_backward(total, weight, bias, statistics)
        ctx.scale, ctx.has_branch = scale._replace(weight=None, bias=None), branch is not None
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    def backward(ctx: Any, beside: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        if grad is None:
            return beside, beside if ctx.has_branch else None, None, None, None
        grad, beside = _readable(grad), None if beside is None else _readable(beside)
        dx = torch.empty_like(x)
        dweight, dbias = (None if p is None else torch.empty_like(p) for p in (weight, bias))
        shape, rows = _rows(ctx.scale, x, grad, beside, dx)
        native.call("cairn_norm_backward", shape, *rows[:3], weight, *statistics, rows[3], dweight, dbias)
        return dx, dx if ctx.has_branch else None, dweight, dbias, None


class _Shape(ctypes.Structure):
    _fields_ = (
        ("n", ctypes.c_int64 * 3),
        ("D", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("centred", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


def _readable(x: Tensor) -> Tensor:
    """x, or a copy, whose rows are dense and lie at no more than three strides."""
    return native.dense(x) if x.dim() <= 4 else x.contiguous()


def _rows(scale: Scale, *tensors: Tensor | None) -> tuple[_Shape, list[native.Rows]]:
    """The sizes of readable tensors (..., D) of one shape, and where the rows of each are."""
    shape = next(t.shape for t in tensors if t is not None)
    n = (1, 1, shape[:-1].numel()) if len(shape) > 4 else (1,) * (4 - len(shape)) + tuple(shape[:-1])
    sizes = _Shape((ctypes.c_int64 * 3)(*n), shape[-1], scale.eps, scale.centred, torch.get_num_threads())
    return sizes, [native.Rows.of(None if t is None else t.view(*n, shape[-1])) for t in tensors]
