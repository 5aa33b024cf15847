"""Normalisation whose statistics are fp32 whatever the dtype of the input."""

import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm (arXiv 1607.06450) over the last dimension; PyTorch's kernels accumulate in fp32."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467) over the last dimension; PyTorch computes it in fp32."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)
