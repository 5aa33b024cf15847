"""From the `optim` section to an optimizer with its parameter groups."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from cairn.config.train import AdamWSection, MuonSection
from cairn.optim.adamw import AdamW, adamw_groups
from cairn.optim.muon import MuonAdamW, hidden_matrices

Named = Iterable[tuple[str, nn.Parameter]]


def build_optimizer(named_params: Named, model: nn.Module, section: AdamWSection | MuonSection) -> AdamW | MuonAdamW:
    """The optimizer of `named_params`, the parameters of `model` that train.

    Each group has "lr" and "base_lr" (the peak), "weight_decay", and "kind": "adamw" or "muon".
    """
    named = [(name, param) for name, param in named_params if param.requires_grad]
    if isinstance(section, AdamWSection):
        groups = adamw_groups(named, section.lr, section.betas, section.eps, section.weight_decay, section.layer_decay)
        return AdamW(groups)
    hidden = hidden_matrices(model)
    muon: dict[str, Any] = {
        "params": [param for _, param in named if id(param) in hidden],
        "kind": "muon",
        "lr": section.lr,
        "base_lr": section.lr,
        "weight_decay": section.weight_decay,
        "momentum": section.momentum,
        "ns_steps": section.ns_steps,
    }
    rest = [(name, param) for name, param in named if id(param) not in hidden]
    groups = adamw_groups(rest, section.adam_lr, section.betas, section.eps, section.weight_decay)
    return MuonAdamW([muon, *groups] if muon["params"] else groups)
