"""AdamW (arXiv 1711.05101) and its parameter groups: matrices and embeddings decay, norms and biases do not."""

import re
from collections.abc import Iterable, Mapping, Sequence
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
    shares: Mapping[str, float],
) -> list[dict[str, Any]]:
    """The groups that decay and that do not, for each share of the rate that parameters have by name (else all)."""
    groups = []
    for share, members in by_share(named, shares):
        shared = {"kind": "adamw", "lr": lr * share, "base_lr": lr * share, "betas": tuple(betas), "eps": eps}
        groups += [
            {"params": [param for param in members if param.ndim >= 2], "weight_decay": weight_decay, **shared},
            {"params": [param for param in members if param.ndim < 2], "weight_decay": 0.0, **shared},
        ]
    return [group for group in groups if group["params"]]


def by_share(
    named: Iterable[tuple[str, nn.Parameter]], shares: Mapping[str, float]
) -> list[tuple[float, list[nn.Parameter]]]:
    """Parameters of equal share, the largest first."""
    found: dict[float, list[nn.Parameter]] = {}
    for name, param in named:
        found.setdefault(shares.get(name, 1.0), []).append(param)
    return sorted(found.items(), key=lambda item: -item[0])


def layer_shares(names: Sequence[str], decay: float) -> dict[str, float]:
    """Each parameter's share of the learning rate: those above the blocks have all of it, each layer below `decay`
    times that of the one above it."""
    depths = layers(names)
    top = max(depths.values(), default=0)
    return {name: decay ** (top - depth) for name, depth in depths.items()}


def layers(names: Sequence[str]) -> dict[str, int]:
    """How high in the model each parameter lies: embeddings 0, block i at i + 1, what follows the blocks above them."""
    blocks = {name: int(found[1]) + 1 for name in names if (found := re.search(r"\bblocks\.(\d+)\.", name))}
    top = max(blocks.values(), default=0) + 1
    below = ("embed.", "relative.")
    return {name: blocks.get(name, 0 if name.startswith(below) else top) for name in names}
