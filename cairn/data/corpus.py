"""Sources of text: which files a source means, and the documents in them, in one order on every machine.

`list_source` finds the files; `divide` cuts them into units of work whose borders depend on the files alone, never
on the number of workers; `documents` reads one. A document is a string; empty ones are yielded too.

    text (.txt .md .rst .py, any other)    a file is a document; one over 64 MiB is cut at line ends into several
    .jsonl, .json (lines, or one array)    the text field of each object; null is empty
    .csv .tsv (with a header), .parquet    the text column of each row
    .gz and .zst of all but Parquet        the same, decompressed on the way
    datasets:NAME[:CONFIG][:SPLIT]         rows of a Hugging Face dataset, or of a folder of its `save_to_disk`
    stdlib                                 *.py of this interpreter's standard library, without site-packages,
                                           dist-packages and folders named test, tests or idle_test
"""

import glob
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from cairn.data import readers
from cairn.errors import UserError

MIB = 1 << 20
LONGEST_TEXT = 64 * MIB  # longer text files are several documents, so that memory stays flat
UNIT_SHARE, SMALLEST_UNIT, LARGEST_UNIT = 256, 2 * MIB, 256 * MIB
COMPRESSION = 4  # text bytes that a compressed byte is taken for
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
TEXT = (".txt", ".text", ".md", ".rst", ".py")
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Part:
    """A file, or a range of one."""

    path: str
    """The file; for kind "datasets" what follows `datasets:`."""
    kind: str
    """text, jsonl, json, csv, tsv, parquet or datasets."""
    size: int
    """Bytes of text in it, more or less."""
    start: int = 0
    stop: int | None = None
    """The range: bytes of text and jsonl (lines that begin in it), row groups of parquet, rows of datasets."""


@dataclass(frozen=True)
class Listing:
    """The files of a source, in order, and what tells another state of them from this one."""

    name: str
    files: tuple[Part, ...]
    state: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of text, more or less."""
        return sum(part.size for part in self.files)


def megatron_prefix(source: str) -> Path | None:
    """The prefix of a Megatron .bin/.idx pair, if that is what the source names."""
    prefix = Path(source.removesuffix(".bin").removesuffix(".idx")).expanduser()
    both = all(prefix.with_name(prefix.name + end).is_file() for end in (".bin", ".idx")) if prefix.name else False
    return prefix.resolve() if both else None


def list_source(source: str) -> Listing:
    """The files of a source (see above). Raises UserError when it means none."""
    if source == "stdlib":
        return _list_stdlib()
    if source.startswith("datasets:"):
        spec = source.removeprefix("datasets:")
        rows, size, state = readers.dataset_facts(spec)
        return Listing(PurePath(spec.partition(":")[0]).name, (Part(spec, "datasets", size, 0, rows),), (state,))
    path = Path(source).expanduser()
    if path.is_dir():
        inside = (file.relative_to(path) for file in path.rglob("*"))
        names = [name for name in inside if not any(p.startswith(".") for p in name.parts) and _known(name)]
        files = [path / name for name in sorted(names, key=PurePath.as_posix) if (path / name).is_file()]
        if not files:
            endings = " ".join((*TEXT, *KINDS))
            raise UserError(
                f"data.source {source}: no file in this folder ends in one of {endings} (or these .gz, .zst)"
            )
        return _list_files(path.resolve().name, files)
    if path.is_file():
        return _list_files(_stem(path), [path])
    if glob.has_magic(source):
        files = [file for file in map(Path, sorted(glob.glob(str(path), recursive=True))) if file.is_file()]
        if not files:
            raise UserError(f"data.source {source}: no file matches")
        return _list_files(_stem(path).strip("*?[]") or path.parent.name.strip("*?[]") or "glob", files)
    raise UserError(
        f"data.source {source}: there is no such file or folder; give a path, a glob, stdlib or datasets:NAME"
    )


def _list_stdlib() -> Listing:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in NOT_STDLIB]  # not entered: site-packages may be vast
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise UserError(f"data.source stdlib: no .py files in {root}; give data.source=PATH")
    return _list_files("stdlib", sorted(files, key=lambda file: file.relative_to(root).as_posix()))


def _list_files(name: str, files: Iterable[Path]) -> Listing:
    parts, state = [], []
    for file in files:
        found = file.stat()
        size = found.st_size
        if kind_of(file) == "parquet" or file.suffix in (".gz", ".zst"):
            size *= COMPRESSION
        parts.append(Part(str(file.resolve()), kind_of(file), size))
        state.append(f"{file.resolve()} {found.st_size} {found.st_mtime_ns}")
    return Listing(name, tuple(parts), tuple(state))


def _plain(path: PurePath) -> PurePath:
    return path.with_suffix("") if path.suffix in (".gz", ".zst") else path


def kind_of(path: PurePath) -> str:
    """The format that a file's ending means, without .gz or .zst: one of KINDS, else "text"."""
    return KINDS.get(_plain(path).suffix.lower(), "text")


def _known(path: PurePath) -> bool:
    return _plain(path).suffix.lower() in {*TEXT, *KINDS}


def _stem(path: PurePath) -> str:
    return _plain(path).stem


def divide(listing: Listing) -> list[list[Part]]:
    """Units of work of 2 to 256 MiB, a 256th of the source where that lies between."""
    wanted = min(max(listing.size // UNIT_SHARE, SMALLEST_UNIT), LARGEST_UNIT)
    units: list[list[Part]] = [[]]
    filled = 0
    for file in listing.files:
        for part in _ranges(file, wanted):
            if filled >= wanted:
                units.append([])
                filled = 0
            units[-1].append(part)
            filled += part.size
    return units


def _ranges(file: Part, wanted: int) -> Iterator[Part]:
    compressed = file.path.endswith((".gz", ".zst"))
    if file.kind in ("text", "jsonl") and not compressed:
        step = LONGEST_TEXT if file.kind == "text" else wanted
        for start in range(0, file.size or 1, step):
            stop = min(start + step, file.size)
            yield replace(file, size=stop - start, start=start, stop=stop)
    elif file.kind in ("parquet", "datasets"):
        # Row groups and rows are taken to be alike.
        count = readers.row_groups(file.path) if file.kind == "parquet" else file.stop or 0
        pieces = min(max(1, -(-file.size // wanted)), max(count, 1))
        for i in range(pieces):
            start, stop = count * i // pieces, count * (i + 1) // pieces
            yield replace(file, size=file.size // pieces, start=start, stop=stop)
    else:
        yield file


def documents(part: Part, field: str) -> Iterator[str]:
    """The documents of a part, empty ones included. Raises UserError as `located` does."""
    return (text for _, text in located(part, field))


def located(part: Part, field: str) -> readers.Documents:
    """The documents of a part, empty ones included, with their places.

    Raises UserError naming file and line or row where one cannot be read.
    """
    if part.kind == "text":
        return readers.read_text(part.path, part.start, part.stop, LONGEST_TEXT)
    if part.kind == "jsonl":
        return readers.read_lines(part.path, part.start, part.stop, field)
    if part.kind == "json":
        return readers.read_json(part.path, field)
    if part.kind in ("csv", "tsv"):
        return readers.read_csv(part.path, field, "," if part.kind == "csv" else "\t")
    if part.kind == "parquet":
        return readers.read_parquet(part.path, part.start, part.stop or 0, field)
    return readers.read_dataset(part.path, part.start, part.stop or 0, field)
