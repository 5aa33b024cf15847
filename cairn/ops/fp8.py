"""x weight^T with both rounded to 8 bits, which tensor cores of Ada, Hopper and later multiply at twice bf16's rate.

Inputs and weights are e4m3, gradients e5m2, each tensor scaled by its largest magnitude when it is met (arXiv
2209.05433). Results, weights and what the optimizer gets stay bf16 and fp32. Without torch.compile, scaling and
rounding are passes of their own, which cost more than the products gain.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""Of every size of a product: what the hardware takes."""
CAPABILITY = (8, 9)
"""CUDA's, from which on there are such tensor cores."""


def obstacle(device: torch.device) -> str | None:
    """Why `device` cannot do this, or None. CPUs emulate it, slowly: to try it, and for the tests."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has no 8-bit floats (Ada, Hopper and later do)"
    return None


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the sizes of x (..., K) and weight (N, K), and of their gradients' products, are multiples of 16."""
    return all(size % MULTIPLE == 0 for size in (x.shape[:-1].numel(), *weight.shape))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,), all bf16 -> (..., N); in bf16 where the sizes do not fit."""
    if not fits(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = _Product.apply(x.flatten(0, -2), weight)  # type: ignore[no-untyped-call]
    y = y.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = quantised(x, E4M3)
        weight8, weight_scale = quantised(weight, E4M3)
        # The weight itself: ZeRO-3 drops its data and gathers it again, where an 8-bit copy would stay.
        ctx.save_for_backward(x8, x_scale, weight)
        return _product(x8, x_scale, weight8.t(), weight_scale, exact=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x8, x_scale, weight = ctx.saved_tensors
        grad8, grad_scale = quantised(grad, E5M2)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            weight8, weight_scale = quantised(weight, E4M3)
            dx = _product(grad8, grad_scale, _by_column(weight8), weight_scale)
        if ctx.needs_input_grad[1]:
            dweight = _product(grad8.t().contiguous(), grad_scale, _by_column(x8), x_scale)
        return dx, dweight


def quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / scale in 8 bits, by row, its largest magnitude as the largest there is, and the scale in fp32.

    Infinities and NaN give NaN.
    """
    scale = x.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype).contiguous(), scale


def _product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, exact: bool = True) -> Tensor:
    """a (M, K) by row times b (K, N) by column -> (M, N) bf16. `exact`: sums are kept in fp32 throughout."""
    whole = ScalingType.TensorWise
    return F.scaled_mm(a, b, a_scale, whole, b_scale, whole, output_dtype=torch.bfloat16, use_fast_accum=not exact)


def _by_column(x: Tensor) -> Tensor:
    """The same matrix, its columns dense: 8-bit products take no other layout on the right."""
    return x.t().contiguous().t()
