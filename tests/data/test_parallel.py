"""Line-aligned text."""

import gzip
from pathlib import Path

import pytest

from cairn.data.parallel import read_parallel
from cairn.errors import UserError


def read(folder: Path, source: bytes, target: bytes) -> list[tuple[str, str, str]]:
    (folder / "a.en").write_bytes(source)
    (folder / "a.de.gz").write_bytes(gzip.compress(target))
    rows = read_parallel(str(folder / "a.en"), str(folder / "a.de.gz"))
    return [(row.place, row.values["source"], row.values["target"]) for row in rows]


def test_pairs(tmp_path: Path) -> None:
    # A line separator of Unicode ends no line.
    rows = read(tmp_path, b"\xef\xbb\xbfone\xe2\x80\xa8more\r\n\n three", b"eins\n \ndrei\n")
    assert rows == [
        (f"{tmp_path}/a.en: line 1", "one\u2028more", "eins"),
        (f"{tmp_path}/a.en: line 3", " three", "drei"),
    ]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (b"a\nb\nc\n", b"a\n", r"a\.en has 3 lines, .*a\.de\.gz 1: line n"),
        (b"a\n", b"a\nb\nc", r"a\.en has 1 lines, .*a\.de\.gz 3: line n"),
        (b"", b"a\n", r"a\.en has 0 lines, .*a\.de\.gz 1: line n"),
        (b"a\n\nc\n", b"a\nb\nc\n", r"^\S+a\.en: line 2 is empty, but not that of .*a\.de\.gz"),
        (b"a\nb\n", b"a\n \n", r"^\S+a\.de\.gz: line 2 is empty, but not that of .*a\.en"),
        (b"a\nb\n", b"a\n\xff\n", r"a\.de\.gz: line 2 is not UTF-8"),
    ],
)
def test_what_does_not_match_is_named(tmp_path: Path, source: bytes, target: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, source, target)
