"""Optimizer steps in one pass of our own over a process's flat tensors: they clip, step, and round to bf16."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cairn.ops import native


@dataclass(frozen=True)
class Fused:
    """What an optimizer steps with where it is given this. The caller asks `native.available` first."""

    copies: Mapping[int, Tensor]
    """The bf16 copy of each fp32 parameter, by its id; a step sets it."""
    gradients: Callable[[int], Sequence[Tensor]]
    """The gradient of a parameter, by its id: bf16 or fp32 tensors whose elements follow upon each other."""
    scale: Callable[[], float]
    """What gradients are multiplied by, in this step."""

    def adamw(self, param: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> None:
        """One step of AdamW, whose `state` has "step", "exp_avg" and "exp_avg_sq"."""
        step = state["step"]
        step += 1
        t, (beta1, beta2) = step.item(), group["betas"]
        rates = self.scale(), group["lr"], beta1, beta2, group["eps"], group["weight_decay"]
        flat = [x.view(-1) for x in (param, state["exp_avg"], state["exp_avg_sq"], self.copies[id(param)])]
        begin = 0
        for gradient in self.gradients(id(param)):
            sizes = _AdamW(gradient.numel(), *rates, 1 - beta1**t, 1 - beta2**t, torch.get_num_threads())
            weight, mean, square, copy = (x[begin:] for x in flat)
            native.call("cairn_adamw", sizes, _half(gradient), weight, gradient, mean, square, copy)
            begin += gradient.numel()

    def muon(
        self, param: Tensor, momentum: Tensor, shapes: Sequence[tuple[int, ...]], group: Mapping[str, Any]
    ) -> None:
        """One step of Muon. Matrices of these shapes lie one after the other in the tensors, a gradient for each."""
        gradients = self.gradients(id(param))
        matrices = (_Matrix * len(shapes))()
        begin = 0
        for matrix, shape, gradient in zip(matrices, shapes, gradients, strict=True):
            at = [x.view(-1)[begin:].data_ptr() for x in (param, momentum, self.copies[id(param)])]
            matrix.rows, matrix.columns = shape
            matrix.half, matrix.gradient = _half(gradient), gradient.data_ptr()
            matrix.weight, matrix.momentum, matrix.copy = at
            begin += gradient.numel()
        rates = self.scale(), group["lr"], group["momentum"], group["weight_decay"]
        native.call("cairn_muon", _Muon(len(shapes), *rates, group["ns_steps"], torch.get_num_threads()), matrices)


def norms(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of each, bf16 or fp32 and dense, in our kernel."""
    found = torch.empty(len(gradients))
    for norm, x in zip(found, gradients, strict=True):
        native.call("cairn_norm_of", x.numel(), _half(x), x, norm, torch.get_num_threads())
    return found


def _half(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


class _AdamW(ctypes.Structure):
    _fields_ = (
        ("n", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("clip", "lr", "beta1", "beta2", "eps", "weight_decay")),
        *((name, ctypes.c_float) for name in ("correction1", "correction2")),
        ("threads", ctypes.c_int64),
    )


class _Muon(ctypes.Structure):
    _fields_ = (
        ("matrices", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("clip", "lr", "momentum", "weight_decay")),
        ("steps", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "half")),
        *((name, ctypes.c_void_p) for name in ("weight", "gradient", "momentum", "copy")),
    )
