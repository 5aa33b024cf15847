"""Which runs of which parameters each optimizer tensor of a rank holds, as DeepSpeed lays them out per ZeRO stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cairn.optim.layout import FlatLayout, Piece

Groups = Sequence[Sequence[tuple[str, nn.Parameter]]]
"""(name, parameter) of each optimizer group, as they were before DeepSpeed replaced them."""


@dataclass(frozen=True)
class Slot:
    """An optimizer tensor, the parameters in it, and the index of its optimizer group."""

    tensor: Tensor
    layout: FlatLayout
    group: int


def replicated_slots(groups: Groups) -> list[Slot]:
    """Stage 0: each parameter is its own optimizer tensor."""
    return [
        Slot(p, FlatLayout([Piece(name, tuple(p.shape), 0, 0, p.numel())], None), index)
        for index, group in enumerate(groups)
        for name, p in group
    ]


def flat_slots(groups: Groups, optimizer: torch.optim.Optimizer, rank: int) -> list[Slot]:
    """Stages 1 and 2: a group's parameters lie in one flat buffer, of which each rank has an equal run in fp32.

    A parameter's place in that buffer is read off its address, so alignment and reordering do not matter.
    """
    slots = []
    for index, (params, group) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        (flat,) = group["params"]
        first = min(p.data_ptr() for _, p in params)
        low, high = rank * flat.numel(), (rank + 1) * flat.numel()
        pieces = []
        for name, p in params:
            at = (p.data_ptr() - first) // p.element_size()
            start, stop = max(at, low), min(at + p.numel(), high)
            if start < stop:
                pieces.append(Piece(name, tuple(p.shape), start - at, start - low, stop - start))
        pieces.sort(key=lambda piece: piece.local_offset)
        slots.append(Slot(flat, FlatLayout(pieces, dist.group.WORLD), index))
    return slots


def sharded_slots(groups: Groups, zero: Any, rank: int) -> list[Slot]:
    """Stage 3: every parameter is cut into equal runs, one a rank, the last ones padded. `zero`: the ZeRO optimizer."""
    place = {id(p): (name, index) for index, group in enumerate(groups) for name, p in group}
    slots = []
    for params, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        pieces, at = [], 0
        for p in params:
            start, length = shard(p, rank)
            if length > 0:
                pieces.append(Piece(place[id(p)][0], tuple(p.ds_shape), start, at, length))
            at += p.ds_tensor.ds_numel
        slots.append(Slot(flat, FlatLayout(pieces, dist.group.WORLD), place[id(params[0])][1]))
    return slots


def shard(p: Any, rank: int) -> tuple[int, int]:
    """First element and length of this rank's run of a ZeRO-3 parameter; the length is 0 where only padding is left."""
    start = rank * p.ds_tensor.ds_numel
    return start, max(0, min(p.ds_tensor.ds_numel, p.ds_numel - start))
