"""Attention in plain matrix products (the reference) and through PyTorch's fused kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cairn.ops.masks import Mask


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, written out; supports everything and fixes what every backend means."""
    groups = q.shape[1] // v.shape[1]
    if groups > 1:
        v = v.repeat_interleave(groups, 1)
    return F.dropout(attention_map(q, k, mask, bias).to(v.dtype), dropout) @ v


def attention_map(q: Tensor, k: Tensor, mask: Mask, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias): how much each query takes of each key, (B, H, T, S) fp32; a row sums to 1, or to
    0 where the query sees nothing."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k = k.repeat_interleave(groups, 1)
    scores: Tensor = (q @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5  # (B, H, T, S)
    if bias is not None:
        scores = scores + bias
    seen = mask.dense(slice(0, q.shape[2]), slice(0, k.shape[2]), q.device)
    if seen is None:
        return scores.softmax(-1)
    # The smallest finite number instead of -inf, then zeros: rows that see nothing give 0, not NaN.
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~seen, 0.0)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None, dropout: float) -> Tensor:
    """PyTorch's scaled_dot_product_attention, which picks cuDNN, flash or memory-efficient kernels itself."""
    t, s = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    if mask.is_plain and bias is None and t == s and mask.offset == 0:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=mask.causal, enable_gqa=gqa)
    seen = mask.dense(slice(0, t), slice(0, s), q.device)
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, enable_gqa=gqa)
    bias = bias.to(q.dtype)
    if seen is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, enable_gqa=gqa)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias.masked_fill(~seen, torch.finfo(q.dtype).min), dropout_p=dropout, enable_gqa=gqa
    )
    return out.masked_fill(~seen.any(-1, keepdim=True), 0.0)
