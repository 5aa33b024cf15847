"""A grid of runs: which points it has, what each changes, what its run is called. Pure functions of the options."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cairn.errors import UserError

LONGEST = 150
"""Characters of a run's name, beyond which a point is told by its number: it names a folder."""


@dataclass(frozen=True)
class Axis:
    """One `--sweep KEY=V1,V2`."""

    key: str
    values: tuple[str, ...]


def parse(options: Sequence[str]) -> list[Axis]:
    """The axes that the options name. Raises UserError for one that names none, a key given twice, a value given
    twice."""
    axes: list[Axis] = []
    for text in options:
        key, equals, rest = text.partition("=")
        values = _values(rest)
        if not equals or not key or len(values) < 1 or "" in values:
            raise UserError(f"--sweep {text!r}: expected KEY=V1,V2 such as optim.lr=0.001,0.002")
        if key == "run.name":
            raise UserError("--sweep run.name: each run is named by its values; sweep another key")
        if any(axis.key == key for axis in axes):
            raise UserError(f"--sweep {key}: given twice; write all its values in one, with commas")
        if twice := [value for value in values if values.count(value) > 1]:
            raise UserError(f"--sweep {key}: {twice[0]} is given twice")
        axes.append(Axis(key, tuple(values)))
    return axes


def points(axes: Sequence[Axis]) -> list[tuple[str, ...]]:
    """The overrides of each point; the last axis turns fastest."""
    grid = itertools.product(*(axis.values for axis in axes))
    return [tuple(f"{axis.key}={value}" for axis, value in zip(axes, at, strict=True)) for at in grid]


def names(base: str, axes: Sequence[Axis]) -> list[str]:
    """A run.name for each point, in the order of `points`: base-lr_0.001-seed_1. No two are the same."""
    last = [axis.key.rpartition(".")[2] for axis in axes]
    short = last if len(set(last)) == len(last) else [axis.key for axis in axes]
    found = [
        "-".join([base, *(f"{_word(key)}_{_word(value)}" for key, value in zip(short, at, strict=True))])
        for at in itertools.product(*(axis.values for axis in axes))
    ]
    if len(set(found)) == len(found) and max(map(len, found)) <= LONGEST:
        return found
    return [f"{base}-point_{k}" for k in range(len(found))]


def _values(text: str) -> list[str]:
    """Cut at the commas that are in no bracket and no quotes."""
    values, depth, quote, start = [], 0, "", 0
    for at, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            values.append(text[start:at])
            start = at + 1
    return [value.strip() for value in [*values, text[start:]]]


def _word(text: str) -> str:
    """As a part of a run's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("_")
