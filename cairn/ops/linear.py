"""x weight^T + bias and an activation of it, in our own kernels where a CPU with AMX trains in bf16.

PyTorch's library is left the products that it is best at: those without a bias, and those with long sums. A bias it
copies over the whole result first, activations take a pass of one thread, and the gradient of a weight reaches half the
speed of other products, as both operands lie across the sum.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cairn.config.model import Activation
from cairn.ops import fp8, native
from cairn.ops.activations import activate

SHORT_SUM = 768
"""Inputs up to which our product is the faster one, if there is a bias or the result is wide."""
FEW = 32
"""Rows up to which it is where nothing is trained, as when a text is generated."""
FUSED = ("none", "gelu", "gelu_tanh", "relu", "relu2")
"""Activations that our kernels know, in their order."""


class Linear(nn.Linear):
    """nn.Linear, with an activation if one is asked for."""

    fp8 = False
    """Whether it is trained in 8-bit floats: `engine.fp8`. It is evaluated and used in the compute precision."""

    def forward(self, x: Tensor, activation: Activation | None = None) -> Tensor:
        """(..., K) -> (..., N)."""
        if self.fp8 and self.training:
            y = fp8.linear(x, self.weight, self.bias)
            return y if activation is None else activate(y, activation)
        return linear(x, self.weight, self.bias, activation)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) -> (..., N)."""
    y: Tensor
    fits = x.shape[-1] == weight.shape[1]  # else PyTorch says so
    if fits and torch.is_grad_enabled() and weight.requires_grad and native.runs(x, weight, bias):
        y = _Linear.apply(x, weight, bias, activation or "none")  # type: ignore[no-untyped-call]
        return y
    few = fits and not torch.is_grad_enabled() and x.shape[:-1].numel() <= FEW
    if few and native.usable(x, weight, bias):
        y = _out(x, weight)
        _linear(x, weight, bias, y, None, "none")
    else:
        y = F.linear(x, weight, bias)
    return y if activation is None else activate(y, activation)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        ctx.has_bias, ctx.activation = bias is not None, activation
        if activation != "none":
            before, y = activated_product(x, weight, bias, activation)
            ctx.save_for_backward(x, weight, before)
        else:
            ctx.save_for_backward(x, weight)
            short = bias is not None and weight.shape[1] <= SHORT_SUM
            y = product(x, weight, bias) if short else F.linear(x, weight, bias)
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *before = ctx.saved_tensors
        if before:
            grad = activation_gradient(grad, before[0], ctx.activation)
        dx = grad @ weight if ctx.needs_input_grad[0] else None
        dw, db = weight_gradient(grad, x, ctx.has_bias)
        return dx, dw, db if ctx.has_bias else None, None


def _rows(x: Tensor) -> Tensor:
    """(..., K) as (M, K) with dense rows."""
    return native.dense(x.flatten(0, -2))


def _out(x: Tensor, weight: Tensor) -> Tensor:
    """Room for the result, (..., N)."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, after: Tensor | None, activation: str) -> None:
    x, weight = _rows(x), native.dense(weight)
    operands = x, x.stride(0), weight, weight.stride(0), bias
    where = FUSED.index(activation)
    native.call("cairn_linear", x.shape[0], *weight.shape, *operands, out, after, where, torch.get_num_threads())


@torch.library.custom_op("cairn::amx_linear", mutates_args=())
def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,), all bf16 -> (..., N)."""
    out = _out(x, weight)
    _linear(x, weight, bias, out, None, "none")
    return out


@torch.library.custom_op("cairn::amx_linear_activated", mutates_args=())
def activated_product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """As `product`, and its activation."""
    out = _out(x, weight)
    after = torch.empty_like(out)
    _linear(x, weight, bias, out, after, activation)
    return out, after


@torch.library.custom_op("cairn::amx_activation_gradient", mutates_args=())
def activation_gradient(grad: Tensor, before: Tensor, activation: str) -> Tensor:
    """grad times the slope of the activation at `before`, which is dense; of any one shape."""
    grad, out = grad.contiguous(), torch.empty_like(before)
    where = FUSED.index(activation)
    native.call("cairn_activation_gradient", out.numel(), grad, before, out, where, torch.get_num_threads())
    return out


@torch.library.custom_op("cairn::amx_weight_gradient", mutates_args=())
def weight_gradient(grad: Tensor, x: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """grad (..., N), x (..., K), bf16 -> grad^T x (N, K) and, where a bias has a gradient, column sums of grad (N,)."""
    grad, x = _rows(grad), _rows(x)
    weight, sums = _gradients(grad, x, bias)
    operands = grad, grad.stride(0), x, x.stride(0)
    wanted = sums if bias else None
    native.call("cairn_weight_gradient", *grad.shape, x.shape[1], *operands, weight, wanted, torch.get_num_threads())
    return weight, sums


def _gradients(grad: Tensor, x: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape[-1], x.shape[-1]), grad.new_empty(grad.shape[-1] if bias else 0)


@product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _out(x, weight)


@activated_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    return _out(x, weight), _out(x, weight)


@activation_gradient.register_fake
def _(grad: Tensor, before: Tensor, activation: str) -> Tensor:
    return torch.empty_like(before)


@weight_gradient.register_fake
def _(grad: Tensor, x: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    return _gradients(grad, x, bias)
