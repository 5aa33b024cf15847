"""Labelled texts of a table, as the command line names their columns."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from cairn.config.table import TableFormat
from cairn.data.tables import Row, read_table, text_of, value_of
from cairn.errors import UserError


@dataclass(frozen=True)
class Columns:
    """Where a row has what."""

    text: str
    label: str
    text_pair: str | None = None


@dataclass(frozen=True)
class Examples:
    """Rows of a table, one after another."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[str]
    places: list[str]
    """File and line of each."""

    def __add__(self, other: "Examples") -> "Examples":
        pairs = None if self.pairs is None or other.pairs is None else self.pairs + other.pairs
        return Examples(self.texts + other.texts, pairs, self.labels + other.labels, self.places + other.places)


def table_format(separator: str | None, quoting: str | None, columns: str | None) -> TableFormat:
    """What the options say; `columns`: names with commas between. Raises UserError for values that cannot be."""
    quotes = None if quoting is None else quoting == "true"
    try:
        return TableFormat(separator=separator, quoting=quotes, columns=columns.split(",") if columns else [])
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--{first['loc'][0]}: {first['ctx']['error']}") from error


def read_examples(source: str, format: TableFormat, columns: Columns, limit: int | None) -> Examples:
    """The rows, or `limit` of them spread evenly. Raises UserError naming the row that has no text or label."""
    try:
        rows = list(read_table(source, format))
        if limit is not None and limit < len(rows):
            rows = [rows[i * len(rows) // limit] for i in range(limit)]
        if not rows:
            raise UserError(f"{source}: has no rows")
        pairs = None if columns.text_pair is None else [text_of(r, columns.text_pair, "--text-pair") for r in rows]
        texts, labels = [text_of(r, columns.text, "--text") for r in rows], [_label(r, columns.label) for r in rows]
    except UserError as error:  # told in the keys of a config, which here are options
        raise UserError(re.sub(r"\bdata\.(separator|quoting|columns)\b", r"--\1", str(error))) from error
    return Examples(texts, pairs, labels, [row.place for row in rows])


def _label(row: Row, column: str) -> str:
    value = value_of(row, column, "--label")
    return str(value) if isinstance(value, bool) else text_of(row, column, "--label").strip()


def check_classes(labels: Sequence[str], column: str, folds: int) -> None:
    """Raises UserError where there are too few classes, or too few rows of one for so many folds."""
    count = {label: labels.count(label) for label in dict.fromkeys(labels)}
    if len(count) < 2:
        raise UserError(f"--label {column}: all rows are of the one class {labels[0]!r}; expected two or more")
    rarest = min(count, key=lambda label: count[label])
    if count[rarest] < folds:
        raise UserError(
            f"--label {column}: class {rarest!r} has {count[rarest]} rows for {folds} folds: "
            "give fewer --folds, more rows, a --test file, or a column of classes"
        )
