"""AdamW (arXiv 1711.05101) and its parameter groups: matrices and embeddings decay, norms and biases do not."""

import ctypes
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cairn.ops import native

Pieces = Callable[[int], Sequence[Tensor]]
"""The gradient of a parameter, by its id: bf16 or fp32 tensors whose elements follow upon each other."""


class AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW; with `fuse`, one pass of our own that clips, steps and rounds to bf16."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, fused=True)
        self._copies: dict[int, Tensor] = {}

    def fuse(self, copies: Mapping[int, Tensor], gradients: Pieces, scale: Callable[[], float]) -> None:
        """From now on a step takes `gradients` times `scale()`, and sets the bf16 copy of each fp32 parameter, by id.

        The caller asks `native.available` first.
        """
        self._copies, self._gradients, self._scale = dict(copies), gradients, scale

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        if not self._copies:
            return super().step(closure)
        scale, threads = self._scale(), torch.get_num_threads()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] += 1
                t, (beta1, beta2) = state["step"].item(), group["betas"]
                rates = scale, group["lr"], beta1, beta2, group["eps"], group["weight_decay"]
                flat = [x.view(-1) for x in (p, state["exp_avg"], state["exp_avg_sq"], self._copies[id(p)])]
                begin = 0
                for gradient in self._gradients(id(p)):
                    sizes = _Step(gradient.numel(), *rates, 1 - beta1**t, 1 - beta2**t, threads)
                    weight, mean, square, copy = (x[begin:] for x in flat)
                    half = gradient.dtype == torch.bfloat16
                    native.call("cairn_adamw", sizes, half, weight, gradient, mean, square, copy)
                    begin += gradient.numel()
        return None


def norms(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of each, bf16 or fp32 and dense, in our kernel."""
    found = torch.empty(len(gradients))
    for norm, x in zip(found, gradients, strict=True):
        native.call("cairn_norm_of", x.numel(), x.dtype == torch.bfloat16, x, norm, torch.get_num_threads())
    return found


class _Step(ctypes.Structure):
    _fields_ = (
        ("n", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("clip", "lr", "beta1", "beta2", "eps", "weight_decay")),
        *((name, ctypes.c_float) for name in ("correction1", "correction2")),
        ("threads", ctypes.c_int64),
    )


def adamw_groups(
    named: Sequence[tuple[str, nn.Parameter]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """The groups that decay and that do not, of every layer where layers differ; an empty one is left out."""
    depths = layers(named) if layer_decay < 1 else dict.fromkeys((name for name, _ in named), 0)
    top = max(depths.values(), default=0)
    groups = []
    for depth in sorted(set(depths.values()), reverse=True):
        rate = lr * layer_decay ** (top - depth)
        shared = {"kind": "adamw", "lr": rate, "base_lr": rate, "betas": tuple(betas), "eps": eps}
        here = [param for name, param in named if depths[name] == depth]
        groups += [
            {"params": [param for param in here if param.ndim >= 2], "weight_decay": weight_decay, **shared},
            {"params": [param for param in here if param.ndim < 2], "weight_decay": 0.0, **shared},
        ]
    return [group for group in groups if group["params"]]


def layers(named: Sequence[tuple[str, nn.Parameter]]) -> dict[str, int]:
    """How high in the model each parameter lies: embeddings 0, block i at i + 1, what follows the blocks above them."""
    blocks = {name: int(found[1]) + 1 for name, _ in named if (found := re.search(r"\bblocks\.(\d+)\.", name))}
    top = max(blocks.values(), default=0) + 1
    below = ("embed.", "relative.")
    return {name: blocks.get(name, 0 if name.startswith(below) else top) for name, _ in named}
