"""Attention for CPUs: plain matrix products over blocks of queries, skipping the keys that no query of a block sees.

At training lengths the products of a CPU's GEMM library beat its fused attention; what is left to save is the masked
half of a causal product, and autograd's copies. The probabilities are kept for the backward pass, so memory grows
with T x S: for long sequences the fused kernel is the better choice.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cairn.ops.masks import Mask

BLOCK = 128


def blocked(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None, dropout: float) -> Tensor:
    """As `reference`. Every mask, a bias with gradient, grouped queries and dropout are supported."""
    out: Tensor = _Blocked.apply(q, k, v, bias, mask, dropout)  # type: ignore[no-untyped-call]
    return out


def _spans(mask: Mask, n_query: int, n_key: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, and the range of keys that they can see."""
    for start in range(0, n_query, BLOCK):
        stop = min(start + BLOCK, n_query)
        low, high = 0, n_key
        if mask.causal:
            high = min(high, mask.offset + stop)
        if mask.window is not None:
            low = max(low, mask.offset + start - mask.window + 1)
            high = min(high, mask.offset + stop + mask.window - 1)
        yield slice(start, stop), slice(min(low, high), high)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Mask, dropout: float) -> Tensor:
        b, h, t, d = q.shape
        kv, s = k.shape[1], k.shape[2]
        groups, scale = h // kv, d**-0.5
        # Contiguous, as products of strided keys take ten times as long.
        q4 = q.reshape(b * kv, groups, t, d).contiguous()
        k3, v3 = k.reshape(b * kv, s, d).contiguous(), v.reshape(b * kv, s, d).contiguous()
        out = torch.empty_like(q4)
        probs: list[Tensor] = []
        kept: list[Tensor] = []
        for rows, keys in _spans(mask, t, s):
            qb = q4[:, :, rows].flatten(1, 2)  # (B Hkv, G t, D)
            scores = torch.baddbmm(qb.new_empty(()), qb, k3[:, keys].transpose(1, 2), beta=0, alpha=scale)
            view = scores.view(b, h, rows.stop - rows.start, keys.stop - keys.start)
            if bias is not None:
                view += bias[:, :, rows, keys]
            hidden = _hide(view, mask, rows, keys)
            p = scores.softmax(-1)
            if hidden is not None:  # a row may see nothing: its output is zero
                p.view_as(view).masked_fill_(hidden, 0.0)
            probs.append(p)
            if dropout:
                keep = torch.rand(p.shape, device=p.device) >= dropout
                kept.append(keep)
                p = p * keep * (1 / (1 - dropout))
            _product(p, v3[:, keys], out[:, :, rows])
        ctx.save_for_backward(q4, k3, v3, *probs, *kept)
        ctx.mask, ctx.dropout, ctx.shape = mask, dropout, (b, h, kv)
        ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)
        return out.view(b, h, t, d)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q4, k3, v3, *saved = ctx.saved_tensors
        b, h, kv = ctx.shape
        t, d, s = q4.shape[2], q4.shape[3], k3.shape[1]
        scale = d**-0.5
        g4 = grad.reshape(q4.shape).contiguous()
        spans = list(_spans(ctx.mask, t, s))
        probs, kept = saved[: len(spans)], saved[len(spans) :]
        dq = torch.empty_like(q4)
        dk, dv = torch.zeros_like(k3), torch.zeros_like(v3)
        dbias = None
        if ctx.needs_input_grad[3]:
            dbias = torch.zeros(ctx.bias_like[0], device=grad.device, dtype=torch.float32)
        for i, (rows, keys) in enumerate(spans):
            gb, qb, p = g4[:, :, rows].flatten(1, 2), q4[:, :, rows].flatten(1, 2), probs[i]
            dp = torch.bmm(gb, v3[:, keys].transpose(1, 2))
            used = p
            if kept:
                factor = kept[i] * (1 / (1 - ctx.dropout))
                dp *= factor
                used = (p * factor).to(p.dtype)
            dv[:, keys].baddbmm_(used.transpose(1, 2), gb)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            if dbias is not None:
                whole = ds.view(b, h, rows.stop - rows.start, -1).float()
                dbias[:, :, rows, keys] += whole.sum_to_size(dbias.shape[0], h, *whole.shape[2:])
            _product(ds, k3[:, keys], dq[:, :, rows], scale)
            dk[:, keys].baddbmm_(ds.transpose(1, 2), qb, alpha=scale)
        return (
            dq.view(b, h, t, d),
            dk.view(b, kv, s, d),
            dv.view(b, kv, s, d),
            None if dbias is None else dbias.to(ctx.bias_like[1]),
            None,
            None,
        )


def _product(a: Tensor, b: Tensor, out: Tensor, scale: float = 1.0) -> None:
    """out (N, G, t, D) = scale a (N, G t, S) b (N, S, D), written where it belongs if one group makes that a view."""
    if out.shape[1] == 1:
        out.squeeze(1).baddbmm_(a, b, beta=0, alpha=scale)
    else:
        out.copy_(torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale).view_as(out))


def _hide(scores: Tensor, mask: Mask, rows: slice, keys: slice) -> Tensor | None:
    """Fill what is not seen in scores (B, H, t, keys); returns True where hidden, unless a plain causal mask."""
    lowest = torch.finfo(scores.dtype).min
    if mask.is_plain:
        if mask.causal:  # only the last t columns hold a diagonal
            t = rows.stop - rows.start
            square = torch.ones(t, t, dtype=torch.bool, device=scores.device).triu(1)
            scores[..., -t:].masked_fill_(square, lowest)
        return None
    seen = mask.dense(rows, keys, scores.device)
    if seen is None:
        return None
    hidden = ~seen
    scores.masked_fill_(hidden, lowest)
    return hidden
