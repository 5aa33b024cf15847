"""Parameter groups of AdamW: matrices and embeddings decay, norms and biases do not."""

from collections.abc import Sequence
from typing import Any

from torch import nn


def adamw_groups(
    named: Sequence[tuple[str, nn.Parameter]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """The groups that decay and that do not, an empty one left out."""
    shared = {"kind": "adamw", "lr": lr, "base_lr": lr, "betas": tuple(betas), "eps": eps}
    groups = [
        {"params": [param for _, param in named if param.ndim >= 2], "weight_decay": weight_decay, **shared},
        {"params": [param for _, param in named if param.ndim < 2], "weight_decay": 0.0, **shared},
    ]
    return [group for group in groups if group["params"]]
