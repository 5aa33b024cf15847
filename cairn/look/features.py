"""Frozen features: what each layer of a trained model makes of each text, one vector a text."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cairn.look.text import Body, Tokens, has_cls
from cairn.models.seq2seq import Seq2Seq

Pool = Literal["cls", "mean", "last"]
BATCH_TOKENS = 4096  # of one forward pass, padding included


@torch.no_grad()
def features(model: Body, tokens: Sequence[Tokens], layers: Sequence[int], pool: Pool) -> NDArray[np.float32]:
    """(layers, texts, D): what comes out of each block in `layers`, from 0, at the first or last token or in the mean
    of all. The model is in evaluation mode; no text is empty."""
    device = model.embed.token.weight.device
    made = np.empty((len(layers), len(tokens), model.section.d_model), np.float32)
    for members in batches([len(t.ids) for t in tokens]):
        ids, segments, real = (tensor.to(device) for tensor in padded([tokens[i] for i in members]))
        found: list[Tensor] = []
        if isinstance(model, Seq2Seq):
            model.encode(ids, padding=real, layers=found)
        elif has_cls(model):
            model.hidden(ids, segments, key_padding=real, layers=found)
        else:  # its tokens never see the padding, which is to their right
            model.hidden(ids, layers=found)
        for row, layer in enumerate(layers):
            made[row, members] = pooled(found[layer].float(), real, pool).cpu().numpy()
    return made


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Places of texts of about one length, at most BATCH_TOKENS together; each place once."""
    out: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not out or (len(out[-1]) + 1) * lengths[out[-1][0]] > BATCH_TOKENS:
            out.append([])
        out[-1].append(place)
    return out


def padded(tokens: Sequence[Tokens]) -> tuple[Tensor, Tensor, Tensor]:
    """ids, segments, and True where a token is real, each (B, T)."""
    longest = max(len(t.ids) for t in tokens)
    ids, segments = torch.zeros(2, len(tokens), longest, dtype=torch.long)
    for row, t in enumerate(tokens):
        ids[row, : len(t.ids)], segments[row, : len(t.ids)] = torch.tensor(t.ids), torch.tensor(t.segments)
    length = torch.tensor([len(t.ids) for t in tokens])
    return ids, segments, torch.arange(longest) < length[:, None]


def pooled(hidden: Tensor, real: Tensor, pool: Pool) -> Tensor:
    """(B, T, D) -> (B, D); `real` (B, T) is False at padding, which is to the right."""
    if pool == "cls":
        return hidden[:, 0]
    length = real.sum(1)
    if pool == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), length - 1]
    return (hidden * real[..., None]).sum(1) / length[:, None]
