"""One reader a format. Each yields documents with their places, and names the line or row of what it cannot read."""

import csv
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from cairn.errors import UserError

Documents = Generator[tuple[int, str], None, int]
"""Documents, each with its place: the line it begins on, counted from 1 at the start of the range; the number of its
row from 0 (Parquet, datasets), or of its element from 1 (a JSON array). Returns the lines that begin in the range; 0
where places are not counted in the range's lines."""


@contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed by its ending. Raises UserError when it cannot be read."""
    import zstandard

    try:
        with open(path, "rb") as file:
            if path.endswith(".gz"):
                with gzip.GzipFile(fileobj=file) as unzipped:
                    yield io.BufferedReader(unzipped)
            elif path.endswith(".zst"):
                reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
                yield io.BufferedReader(reader)
            else:
                yield file
    except FileNotFoundError as error:
        here = "" if os.path.isabs(path) else f" in {os.getcwd()}"
        raise UserError(f"{path}: no such file{here}: mend the path") from error
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def decode(data: bytes, path: str, place: str) -> str:
    """UTF-8 to text. Raises UserError naming the place."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {place} is not UTF-8 ({error.reason}); convert the file, e.g. with iconv") from error


def text_lines(path: str) -> Iterator[tuple[int, str]]:
    """The lines of a file with their ends, counted from 1, without a byte order mark. Raises UserError naming the line
    that is not UTF-8."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            text = decode(line, path, f"line {number}")
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def lines_before(path: str, offset: int) -> int:
    """Line ends in the first `offset` bytes; to name a line in an error."""
    count = 0
    with opened(path) as file:
        while offset > 0 and (block := file.read(min(offset, 1 << 20))):
            count += block.count(b"\n")
            offset -= len(block)
    return count


def skip_to_line(file: IO[bytes], start: int) -> int:
    """Go to the first line that begins at or after byte `start`; its offset."""
    if start == 0:
        return 0
    file.seek(start - 1)
    return start - 1 + len(file.readline())


def read_text(path: str, start: int, stop: int | None, longest: int) -> Documents:
    """The lines that begin in bytes [start, stop) as one document; without a range, the file, cut past `longest`."""
    with opened(path) as file:
        at = skip_to_line(file, start)
        if stop is not None and at >= stop and stop > 0:
            return 0  # a single line covers this range
        end, lines = stop, 0
        while True:
            data = file.read(longest if end is None else end - at)
            if data and not data.endswith(b"\n"):
                data += file.readline()
            if data or at == 0:
                try:
                    yield lines + 1, data.decode()
                except UnicodeDecodeError as error:
                    line = lines_before(path, at + error.start) + 1
                    place = f"line {line} (byte {at + error.start})"
                    raise UserError(
                        f"{path}: {place} is not UTF-8 ({error.reason}); convert the file, e.g. with iconv"
                    ) from error
            at += len(data)
            lines += data.count(b"\n")
            if end is not None or not data:
                return lines


def read_lines(path: str, start: int, stop: int | None, field: str) -> Documents:
    """The text field of each JSON line that begins in bytes [start, stop). Blank lines are passed over."""
    with opened(path) as file:
        at = skip_to_line(file, start)
        count = 0
        for line in file:
            if stop is not None and at >= stop:
                break
            begun, at = at, at + len(line)
            count += 1
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if begun == 0 else "utf-8"))
                problem = _problem(row, field)
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                problem = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"is not JSON ({error})"
            if problem:
                number = lines_before(path, begun) + 1 if start else count
                raise UserError(f"{path}: line {number} {problem}")
            yield count, row[field] or ""
    return count


def parse_json(data: bytes, path: str) -> Any:
    """What the bytes of a JSON file mean. Raises UserError when they are none."""
    try:
        return json.loads(decode(data, path, "the file").removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def json_array(path: str) -> list[Any] | None:
    """The elements of a file that holds one JSON array, None if it begins otherwise."""
    with opened(path) as file:
        head = file.read(64)
        if not head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            return None
        elements: list[Any] = parse_json(head + file.read(), path)
    return elements


def read_json(path: str, field: str) -> Documents:
    """The text field of each object of one JSON array; a .json file that begins otherwise is read as JSON lines."""
    elements = json_array(path)
    if elements is None:
        return (yield from read_lines(path, 0, None, field))
    return (yield from _texts(enumerate(elements, 1), path, "element", field))


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: JSON may hold half a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _problem(row: Any, field: str) -> str:
    """What is wrong with a row, "" if nothing is."""
    if not isinstance(row, dict):
        return f"is no object with fields but a {type(row).__name__}"
    if field not in row:
        return f"has no field {field!r}, only {', '.join(map(repr, row)) or 'none'}; set data.text_field"
    value = row[field]
    if value is not None and not isinstance(value, str):
        return f"has a {type(value).__name__} in field {field!r}, not text"
    if not is_text(value or ""):
        return f"has half a surrogate pair in field {field!r}, which is no text"
    return ""


def _texts(rows: Iterable[tuple[int, Any]], path: str, unit: str, field: str) -> Documents:
    for number, row in rows:
        if problem := _problem(row, field):
            raise UserError(f"{path}: {unit} {number} {problem}")
        yield number, row[field] or ""
    return 0


def csv_rows(path: str, separator: str, quoting: bool = True, strict: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Rows, each with the line it begins on, counted from 1; that of a blank line is empty.

    quoting: whether cells may be in double quotes. strict: a quote that is not closed, or closed early, is an error.
    """
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is short for documents
    with opened(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.reader(
            text, delimiter=separator, strict=strict, quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
        )
        begun = 1  # a row may have several lines
        try:
            for row in reader:
                yield begun, row
                begun = reader.line_num + 1
        except UnicodeDecodeError:
            for _ in text_lines(path):  # it knows the line, where decoding whole blocks does not
                pass
            raise
        except csv.Error as error:
            remedy = "; double the quotes inside it, or set data.quoting=false if quotes are text" if strict else ""
            raise UserError(f"{path}: line {begun} is malformed ({error}){remedy}") from error


def read_csv(path: str, field: str, separator: str) -> Documents:
    """The text column of a file with a header."""
    rows = csv_rows(path, separator)
    _, header = next(rows, (1, []))
    if field not in header:
        names = ", ".join(map(repr, header)) or "none"
        raise UserError(f"{path}: no column {field!r} in the header, only {names}; set data.text_field")
    column = header.index(field)
    for line, row in rows:
        if row and len(row) <= column:
            raise UserError(f"{path}: line {line} has {len(row)} columns, the header {len(header)}")
        if row:
            yield line, row[column]
    return 0


def parquet(path: str) -> Any:
    """A Parquet file, opened. Raises UserError when it is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file, or a damaged one ({error})") from error


def row_groups(path: str) -> int:
    """Row groups of a Parquet file."""
    count: int = parquet(path).num_row_groups
    return count


def parquet_rows(
    path: str, start: int = 0, stop: int | None = None, columns: list[str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of row groups [start, stop) with their numbers in the file, from 0; of some columns, or of all."""
    import pyarrow

    file = parquet(path)
    groups = range(file.num_row_groups)[start:stop]
    number = sum(file.metadata.row_group(i).num_rows for i in range(start))
    try:
        for batch in file.iter_batches(batch_size=256, row_groups=list(groups), columns=columns):
            yield from enumerate(batch.to_pylist(), number)
            number += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged near row {number} ({error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: near row {number}: not UTF-8 ({error.reason})") from error


def read_parquet(path: str, start: int, stop: int, field: str) -> Documents:
    """The text column of row groups [start, stop)."""
    names = parquet(path).schema_arrow.names
    if field not in names:
        raise UserError(f"{path}: no column {field!r}, only {', '.join(map(repr, names))}; set data.text_field")
    return (yield from _texts(parquet_rows(path, start, stop, [field]), path, "row", field))


@lru_cache(maxsize=2)  # a worker reads many ranges of one dataset, and opening takes a second
def dataset(spec: str) -> Any:
    """The `datasets.Dataset` that NAME[:CONFIG][:SPLIT] means. Raises UserError when there is none."""
    try:
        import datasets
    except ImportError as error:
        raise UserError("datasets:...: the package is missing; pip install datasets") from error

    name, *rest = spec.split(":")
    split = rest[-1] if rest else None
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, rest[0] if len(rest) > 1 else None)
    except (OSError, ValueError, ImportError, datasets.exceptions.DatasetsError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"datasets:{spec}: cannot be loaded ({first_line}); check the name "
            "(datasets:NAME[:CONFIG][:SPLIT]) and the network, or give the path of a downloaded folder"
        ) from error
    if not isinstance(found, datasets.DatasetDict):
        return found
    if split is None:
        split = "train" if "train" in found else next(iter(found))
    if split not in found:
        raise UserError(f"datasets:{spec}: no split {split!r}, only {', '.join(map(repr, found))}")
    return found[split]


def dataset_facts(spec: str) -> tuple[int, int, str]:
    """Rows, bytes more or less, and a fingerprint of a `datasets` source."""
    found = dataset(spec)
    return len(found), int(found.data.nbytes), f"datasets:{spec} {found._fingerprint} {len(found)}"


def read_dataset(spec: str, start: int, stop: int, field: str) -> Documents:
    """The text column of rows [start, stop)."""
    found = dataset(spec)
    if field not in found.column_names:
        names = ", ".join(map(repr, found.column_names))
        raise UserError(f"data.source datasets:{spec}: no column {field!r}, only {names}; set data.text_field")
    for first in range(start, stop, 256):
        rows = ({field: text} for text in found[first : min(first + 256, stop)][field])
        yield from _texts(enumerate(rows, first), f"datasets:{spec}", "row", field)
    return 0
