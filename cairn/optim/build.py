"""From the `optim` section to an optimizer with its parameter groups."""

from collections.abc import Iterable

from torch import nn

from cairn.config.train import AdamWSection, MuonSection
from cairn.optim.adamw import AdamW, adamw_groups, by_share, layer_shares
from cairn.optim.muon import MuonAdamW, hidden_matrices

Named = Iterable[tuple[str, nn.Parameter]]


def build_optimizer(named_params: Named, model: nn.Module, section: AdamWSection | MuonSection) -> AdamW | MuonAdamW:
    """The optimizer of `named_params`, the parameters of `model` that train.

    Each group has "lr" and "base_lr" (the peak), "weight_decay", and "kind": "adamw" or "muon".
    """
    named = [(name, param) for name, param in named_params if param.requires_grad]
    shares = layer_shares([name for name, _ in named], section.layer_decay)
    others = section.betas, section.eps, section.weight_decay, shares
    if isinstance(section, AdamWSection):
        return AdamW(adamw_groups(named, section.lr, *others))
    hidden = hidden_matrices(model)
    muon = [
        {
            "params": params,
            "kind": "muon",
            "lr": section.lr * share,
            "base_lr": section.lr * share,
            "weight_decay": section.weight_decay,
            "momentum": section.momentum,
            "ns_steps": section.ns_steps,
        }
        for share, params in by_share(((name, param) for name, param in named if id(param) in hidden), shares)
    ]
    rest = [(name, param) for name, param in named if id(param) not in hidden]
    return MuonAdamW([*muon, *adamw_groups(rest, section.adam_lr, *others)])
