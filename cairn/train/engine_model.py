"""What a model is told about how it is trained, before DeepSpeed takes it."""

import torch
from torch import nn

from cairn.config.train import EngineSection
from cairn.errors import UserError
from cairn.ops import fp8
from cairn.ops.linear import Linear


def prepare_model(model: nn.Module, engine: EngineSection, device: torch.device) -> None:
    """Recompute blocks, train linear layers in 8 bits. Raises UserError where the model or the device cannot.

    Args:
        engine: its precision is settled.
        device: that the model will be trained on.
    """
    kind = type(model).__name__
    if engine.activation_checkpointing:
        stacks = [module for module in model.modules() if hasattr(module, "activation_checkpointing")]
        if not stacks:
            raise UserError(f"engine.activation_checkpointing: {kind} has no blocks to recompute")
        for module in stacks:
            module.activation_checkpointing = True  # type: ignore[assignment]
    if engine.fp8:
        if why := fp8.obstacle(device):
            raise UserError(f"engine.fp8 cannot run here: {why}; leave it out")
        layers = [module for module in model.modules() if isinstance(module, Linear)]
        if not layers:
            raise UserError(f"engine.fp8: {kind} has no linear layers")
        for layer in layers:
            layer.fp8 = True
