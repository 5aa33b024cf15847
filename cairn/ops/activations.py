"""The non-linearities of feed-forward layers."""

import torch.nn.functional as F
from torch import Tensor

from cairn.config.model import Activation


def activate(x: Tensor, name: Activation) -> Tensor:
    """The non-linearity; of a gate where it is gated: swiglu's is silu, geglu's gelu_tanh."""
    match name:
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh" | "geglu":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()
        case "swiglu":
            return F.silu(x)
