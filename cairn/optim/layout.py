"""Where the pieces of matrices lie in the flat tensors that ZeRO gives an optimizer."""

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Piece:
    """A stretch of one parameter inside this rank's flat tensor, in elements."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    full_offset: int
    """Where the stretch begins in the whole parameter, flattened."""
    local_offset: int
    """Where it begins in the flat tensor."""
    length: int


@dataclass(frozen=True)
class FlatLayout:
    """What one flat tensor of this rank holds."""

    pieces: list[Piece]
    group: dist.ProcessGroup | None
    """The ranks that hold the other pieces; None: this rank holds all."""
