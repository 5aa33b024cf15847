"""Tables of labelled examples: one source, one row after another, whatever the format.

    .csv .tsv                         cells; the first line names the columns, or `columns` of the format does
    .jsonl .ndjson .json              objects: one a line, or one array of them
    .parquet                          rows
    .gz and .zst of all but Parquet   the same, decompressed on the way
    any other ending                  cells, if the format has a separator
    datasets:NAME[:CONFIG][:SPLIT]    rows of a Hugging Face dataset, or of a folder of its `save_to_disk`

conll.py, squad.py and parallel.py read what is no table of columns.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cairn.config.table import TableFormat
from cairn.data.corpus import KINDS, kind_of
from cairn.data.readers import csv_rows, dataset, is_text, json_array, parquet_rows, text_lines
from cairn.errors import UserError


@dataclass(frozen=True)
class Row:
    """One example."""

    place: str
    """Where it is: `FILE: line 7`, `FILE: row 3`, `FILE: element 2`, `datasets:NAME: row 5`. Lines and elements are
    counted from 1, rows of Parquet and `datasets` from 0, as their own tools do."""
    values: dict[str, Any]
    """Its cells by column; strings in .csv and .tsv."""


def read_table(source: str, format: TableFormat) -> Iterator[Row]:
    """The rows of one file, or of `datasets:NAME`. Blank lines are passed over.

    Raises UserError, once rows are asked for, naming the file and line of what cannot be read.
    """
    path = Path(source).expanduser()
    if source.startswith("datasets:"):
        return _dataset(source.removeprefix("datasets:"))
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _dataset(str(path))
        raise UserError(f"{source}: is a folder; give one file of it, or datasets:{source} if datasets can load it")
    kind = kind_of(path)
    if kind == "parquet":
        return (Row(f"{path}: row {i}", values) for i, values in parquet_rows(str(path)))
    if kind in ("json", "jsonl"):
        return _json(str(path), kind)
    separator = format.separator or {"csv": ",", "tsv": "\t"}.get(kind)
    if separator is None:
        raise UserError(
            f"{source}: its ending is none of {' '.join(KINDS)} (or these .gz, .zst); "
            r"rename it, or set data.separator (\t for a tab) if its lines have cells"
        )
    return _cells(str(path), separator, format)


def value_of(row: Row, column: str, what: str) -> Any:
    """What a row has in a column. `what` is the key that names the column. Raises UserError when it is not there."""
    if column not in row.values:
        names = ", ".join(map(repr, row.values)) or "none"
        raise UserError(f"{row.place}: no column {column!r}, only {names}; set {what}")
    return row.values[column]


def text_of(row: Row, column: str, what: str = "data.text") -> str:
    """The text in a column, as it stands; a number as it is written. `what` is the key that names the column.

    Raises UserError naming the place where there is no such column, no text in it, or nothing at all.
    """
    value = value_of(row, column, what)
    if value is None or value != value or (isinstance(value, str) and not value.strip()):  # NaN: missing in Parquet
        raise UserError(f"{row.place}: column {column!r} is empty: remove the row or fill it in")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{row.place}: column {column!r} has a {type(value).__name__}, not text; set {what}")
    if not is_text(value):
        raise UserError(f"{row.place}: column {column!r} has half a surrogate pair, which is no text: mend the row")
    return value


def _dataset(spec: str) -> Iterator[Row]:
    for number, values in enumerate(dataset(spec)):
        yield Row(f"datasets:{spec}: row {number}", values)


def _json(path: str, kind: str) -> Iterator[Row]:
    elements = json_array(path) if kind == "json" else None
    unit = "line" if elements is None else "element"
    for number, value in _json_lines(path) if elements is None else enumerate(elements, 1):
        if not isinstance(value, dict):
            raise UserError(f"{path}: {unit} {number} is no object with fields but a {type(value).__name__}")
        yield Row(f"{path}: {unit} {number}", value)


def _json_lines(path: str) -> Iterator[tuple[int, Any]]:
    for number, line in text_lines(path):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                problem = f"line {number} is not JSON ({error.msg} at character {error.pos + 1})"
                raise UserError(f"{path}: {problem}; expected one object a line, or one array in a .json") from error
            yield number, value


def _cells(path: str, separator: str, format: TableFormat) -> Iterator[Row]:
    quoting = separator != "\t" if format.quoting is None else format.quoting
    rows = csv_rows(path, separator, quoting, strict=True)
    lines = ((line, cells) for line, cells in rows if cells and not (len(cells) == 1 and cells[0].isspace()))
    names, named_by = format.columns, "data.columns"
    if not names:
        (line, names), named_by = next(lines, (1, [])), "the header"
        if not names:
            raise UserError(f"{path}: is empty; expected a header and rows")
        _check_header(f"{path}: line {line}", names)
    open_ended = bool(format.columns) and names[-1] == "*"
    names = names[:-1] if open_ended else names
    for line, cells in lines:
        place = f"{path}: line {line}"
        if len(cells) < len(names) or (len(cells) > len(names) and not open_ended):
            remedy = (
                "put cells that hold a separator into quotes, or set data.quoting=false if quotes are text"
                if quoting
                else "set data.quoting=true if cells are in quotes, else mend the line"
            )
            if format.columns and len(cells) > len(names):
                remedy += "; a last * in data.columns takes any further ones"
            raise UserError(
                f"{place} has {len(cells)} columns (data.separator {separator!r}), {named_by} {len(names)}: {remedy}"
            )
        if format.columns and cells[: len(names)] == names:
            raise UserError(f"{place} is a header: leave data.columns out, or remove the line")
        yield Row(place, dict(zip(names, cells, strict=False)))


def _check_header(place: str, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{place}, the header, has the column {twice!r} twice: rename one")
