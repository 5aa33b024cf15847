"""LoRA (arXiv 2106.09685): a low-rank update beside each frozen matrix."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cairn.config.finetune import LoRASection
from cairn.config.model import Activation
from cairn.ops.activations import activate
from cairn.ops.linear import Linear


class LoRALinear(Linear):
    """x W^T + b + (alpha / rank) x A^T B^T, where only A (rank, in) and B (out, rank) train; B begins as zero."""

    def __init__(self, plain: nn.Linear, section: LoRASection) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        self.lora_a = nn.Parameter(torch.empty(section.rank, plain.in_features, device=plain.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(plain.out_features, section.rank, device=plain.weight.device))
        self.scale, self.dropout = section.alpha / section.rank, section.dropout
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor, activation: Activation | None = None) -> Tensor:
        """(..., in) -> (..., out)."""
        update = F.linear(F.linear(F.dropout(x, self.dropout, self.training), self.lora_a), self.lora_b)
        y = super().forward(x) + self.scale * update
        return y if activation is None else activate(y, activation)


def add_lora(model: nn.Module, section: LoRASection) -> None:
    """Give the target matrices of a model's blocks an update each; names of the other parameters stay as they are."""
    for parent, name, plain in list(_targets(model, section)):
        setattr(parent, name, LoRALinear(plain, section))


def merge_lora(model: nn.Module) -> None:
    """Add each update to its matrix and drop it: the model computes the same, and is plain again."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                plain = Linear(child.in_features, child.out_features, device="meta")
                plain.weight, plain.bias = child.weight, child.bias
                with torch.no_grad():
                    plain.weight += child.scale * (child.lora_b @ child.lora_a)
                setattr(parent, name, plain)


def _targets(model: nn.Module, section: LoRASection) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for block in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
        for parent in block.modules():
            for name, child in parent.named_children():
                if name in section.targets and isinstance(child, nn.Linear):
                    yield parent, name, child
