"""FlexAttention: masks and biases written as functions and compiled into one kernel that skips hidden blocks."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from cairn.ops.masks import Mask


@cache
def _kernel(device_type: str) -> Any:
    # Uncompiled it is a slow dense product, which is enough on a CPU, where it only serves tests and reading.
    return torch.compile(flex_attention, dynamic=False) if device_type == "cuda" else flex_attention


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None, dropout: float) -> Tensor:
    """As `reference`, without dropout; on a CPU without gradient."""
    score = None
    if bias is not None:
        per_sample, table = bias.shape[0] > 1, bias

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + table[b if per_sample else 0, h, i, j]

    out: Tensor = _kernel(q.device.type)(
        q, k, v, score_mod=score, block_mask=_blocks(mask, q, k), enable_gqa=q.shape[1] != k.shape[1]
    )
    return out


def _blocks(mask: Mask, q: Tensor, k: Tensor) -> BlockMask | None:
    """The mask as FlexAttention wants it, made once for all layers of a forward pass."""
    if mask.is_plain and not mask.causal:
        return None
    if "flex" not in mask.prepared:
        theirs = mask.document_ids if mask.key_document_ids is None else mask.key_document_ids

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            distance = i + mask.offset - j
            ok = distance >= 0 if mask.causal else distance == distance
            if mask.window is not None:
                ok = ok & (distance.abs() < mask.window)
            if mask.document_ids is not None and theirs is not None:
                ok = ok & (mask.document_ids[b, i] == theirs[b, j])
            if mask.key_padding is not None:
                ok = ok & mask.key_padding[b, j]
            return ok

        batch = q.shape[0] if mask.document_ids is not None or mask.key_padding is not None else None
        mask.prepared["flex"] = create_block_mask(seen, batch, None, q.shape[2], k.shape[2], device=q.device.type)
    blocks: BlockMask = mask.prepared["flex"]
    return blocks
