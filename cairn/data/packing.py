"""Texts of different lengths side by side in rows, so that no work goes into padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cairn.data.batches import Batch, Item

ROW = 64
"""Tokens a row has at least, where the texts are shorter: enough to fill well, and not much attention across texts."""
MULTIPLE = 8


@dataclass(frozen=True)
class Stream:
    """Arrays of items that have an entry a token, all of one length, and what tells their texts apart in a row."""

    fill: dict[str, int]
    """Key of each array, and what stands where a row has no token."""
    prefix: str = ""
    """Begins the keys of what is added."""


def pack(items: Sequence[Item], streams: Sequence[Stream]) -> Batch:
    """Items as rows (R, C) that each hold whole texts, the longest first into the first row with room.

    Of each stream: its arrays as (R, C); PREFIXdocument_ids (R, C), the text a token is of, numbered within the row, or
    -1; PREFIXpositions (R, C), its place in the text; PREFIXfirst and PREFIXlast (B,), where in the flattened rows the
    tokens of item b begin and end. An item is in the same row of every stream. What is in no stream is stacked.
    """
    sizes = [[len(item[next(iter(stream.fill))]) for stream in streams] for item in items]
    widths = [-(-max(ROW, *(size[i] for size in sizes)) // MULTIPLE) * MULTIPLE for i in range(len(streams))]
    rows = first_fit(sizes, widths)
    batch: Batch = {}
    for i, stream in enumerate(streams):
        batch |= _lay(items, rows, [size[i] for size in sizes], widths[i], stream)
    taken = {key for stream in streams for key in stream.fill}
    batch |= {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0].keys() - taken}
    return batch


def first_fit(sizes: Sequence[Sequence[int]], room: Sequence[int]) -> list[list[int]]:
    """The items of each row: from the largest to the smallest, each into the first row that has room for all of it."""
    rows: list[list[int]] = []
    left: list[list[int]] = []
    for number in sorted(range(len(sizes)), key=lambda n: (-sum(sizes[n]), n)):
        size = sizes[number]
        fits = (r for r, free in enumerate(left) if all(f >= s for f, s in zip(free, size, strict=True)))
        row = next(fits, len(rows))
        if row == len(rows):
            rows.append([])
            left.append(list(room))
        rows[row].append(number)
        left[row] = [free - used for free, used in zip(left[row], size, strict=True)]
    return rows


def spans(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Places (B, L) of the tokens of texts that begin and end there, L the longest, and True where there is one."""
    steps = torch.arange(int((last - first).max()) + 1, device=first.device)
    places = first[:, None] + steps
    return places.minimum(last[:, None]), places <= last[:, None]


def _lay(items: Sequence[Item], rows: list[list[int]], sizes: list[int], width: int, stream: Stream) -> Batch:
    added = {"document_ids": -1, "positions": 0}
    out = {key: np.full((len(rows), width), fill, dtype=np.int64) for key, fill in (stream.fill | added).items()}
    first = np.empty(len(items), dtype=np.int64)
    for r, row in enumerate(rows):
        at = 0
        for document, number in enumerate(row):
            stop = at + sizes[number]
            for key in stream.fill:
                out[key][r, at:stop] = items[number][key]
            out["document_ids"][r, at:stop] = document
            out["positions"][r, at:stop] = np.arange(stop - at)
            first[number], at = r * width + at, stop
    last = first + np.array(sizes) - 1
    named = {key if key in stream.fill else f"{stream.prefix}{key}": torch.from_numpy(out[key]) for key in out}
    return named | {
        f"{stream.prefix}first": torch.from_numpy(first),
        f"{stream.prefix}last": torch.from_numpy(last),
    }
