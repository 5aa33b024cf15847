"""AdamW (arXiv 1711.05101) and its parameter groups: matrices and embeddings decay, norms and biases do not."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cairn.optim.fused import Fused


class AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW, or our own."""

    fused: Fused | None = None
    """What a step takes instead of PyTorch's gradients."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        if self.fused is None:
            return super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                self.fused.adamw(param, self.state[param], group)
        return None


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
