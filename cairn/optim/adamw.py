"""Parameter groups of AdamW: matrices and embeddings decay, norms and biases do not."""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn


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
