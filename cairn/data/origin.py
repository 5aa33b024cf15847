"""Where each document of a unit came from: written beside its shards, so that a token can be followed to its line.

`UNIT.origin.npz` holds `train` and `valid`, the place of each document as its reader counts (readers.py), 8 bytes
each, and `parts`, the JSON of what was read in order: [path, kind, first byte, lines, documents of train, of valid].
A file cut into several parts counts its lines on from one to the next. Training does without this file.
"""

import json
import zipfile
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cairn.data.corpus import Part
from cairn.data.manifest import SplitName
from cairn.data.shards import sync, temporary

UNREADABLE = (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile)


@dataclass(frozen=True)
class PartRead:
    """A part of a unit as it was read."""

    path: str
    kind: str
    start: int
    """First byte, row group or row."""
    lines: int
    """Lines that begin in it; 0 where places are numbers of rows or elements."""
    train: int
    """Training documents."""
    valid: int
    """Held-out documents."""


class Origins:
    """Collects the places of a unit's documents while it is encoded; 8 bytes a document."""

    def __init__(self) -> None:
        self._places = {"train": array("q"), "valid": array("q")}
        self._parts: list[PartRead] = []
        self._before = {"train": 0, "valid": 0}

    def add(self, split: str, place: int) -> None:
        """The next document of a split, in the part that is being read."""
        self._places[split].append(place)

    def end_part(self, part: Part, lines: int) -> None:
        """All documents of a part have been added."""
        now = {split: len(places) for split, places in self._places.items()}
        counts = {split: now[split] - self._before[split] for split in now}
        self._parts.append(PartRead(part.path, part.kind, part.start, lines, **counts))
        self._before = now

    def write(self, prefix: Path) -> None:
        """Put the file of a unit under its name, whole."""
        path = origin_path(prefix)
        parts = np.frombuffer(json.dumps([astuple(part) for part in self._parts]).encode(), dtype=np.uint8)
        columns = {name: np.frombuffer(places, dtype=np.int64) for name, places in self._places.items()}
        with temporary(path).open("wb") as file:
            np.savez(file, parts=parts, train=columns["train"], valid=columns["valid"])
            sync(file)
        temporary(path).replace(path)


def origin_path(prefix: Path) -> Path:
    """Where the places of a unit's documents are."""
    return prefix.with_name(prefix.name + ".origin.npz")


def origin(units: Sequence[Path], number: int, split: SplitName, document: int) -> str:
    """Where a document of unit `number` of a source came from: `file:line`, `file row N` or `file element N`.

    `units`: prefixes of all units of the source, in order. Where it was not kept, the number of the document.
    """
    try:
        parts = _parts(origin_path(units[number]))
        ends = list(accumulate(getattr(part, split) for part in parts))
        at = bisect_right(ends, document)
        part, place = parts[at], int(_places(origin_path(units[number]), split)[document])
        if part.kind in ("parquet", "datasets"):
            return f"{'datasets:' if part.kind == 'datasets' else ''}{part.path} row {place}"
        if part.kind == "json" and not part.lines:
            return f"{part.path} element {place}"
        return f"{part.path}:{place + _lines_before(units, number, at)}"
    except (*UNREADABLE, IndexError):
        folder = units[number].parent
        return f"document {document} of {units[number]}.{split} (its line was not kept: prepare anew without {folder})"


def _lines_before(units: Sequence[Path], number: int, at: int) -> int:
    """Lines of a file before part `at` of unit `number`: those of its earlier parts, back to its beginning."""
    part = _parts(origin_path(units[number]))[at]
    lines = 0
    while part.start:
        at -= 1
        while at < 0:
            number -= 1
            at += len(_parts(origin_path(units[number])))
        part = _parts(origin_path(units[number]))[at]
        lines += part.lines
    return lines


@lru_cache(maxsize=4096)
def _parts(path: Path) -> list[PartRead]:
    with np.load(path, allow_pickle=False) as file:
        return [PartRead(*fields) for fields in json.loads(file["parts"].tobytes())]


@lru_cache(maxsize=16)
def _places(path: Path, split: str) -> NDArray[np.int64]:
    with np.load(path, allow_pickle=False) as file:
        places: NDArray[np.int64] = file[split]
    return places
