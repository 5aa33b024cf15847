"""Shards: the byte layout, reading across shards, and damage that is named."""

import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cairn.data.shards import Shard, ShardWriter, TokenStream, Window
from cairn.errors import UserError


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 1000) -> Path:
    with ShardWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add(document)
    return prefix


def test_bytes_are_megatrons(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2, 3], [4], [5, 6]])
    assert (tmp_path / "a.bin").read_bytes() == np.array([1, 2, 3, 4, 5, 6], "<u2").tobytes()
    assert (tmp_path / "a.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", 8)
        + struct.pack("<QQ", 3, 4)
        + struct.pack("<3i", 3, 1, 2)
        + struct.pack("<3q", 0, 6, 8)
        + struct.pack("<4q", 0, 1, 2, 3)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_535, "<u2"), (65_536, "<i4"), (250_000, "<i4")])
def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    ids = [0, vocab_size - 1, 7]
    write(tmp_path / "a", [ids], vocab_size)
    assert (tmp_path / "a.bin").read_bytes() == np.array(ids, dtype).tobytes()
    assert TokenStream.open([tmp_path / "a"]).read(0, 3).tolist() == ids


def test_an_id_outside_the_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OverflowError), ShardWriter(tmp_path / "a", 1000) as writer:
        writer.add([70_000])
    assert list(tmp_path.iterdir()) == []


def test_several_shards_read_as_one_stream(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 999, size=rng.integers(1, 20)).tolist() for _ in range(50)]
    cuts = [0, 7, 7, 30, 50]  # the second shard is empty
    prefixes = [write(tmp_path / str(i), documents[a:b]) for i, (a, b) in enumerate(pairwise(cuts))]
    stream = TokenStream.open(prefixes, n_bytes=5)
    flat = np.concatenate([np.array(document) for document in documents])
    assert (stream.n_tokens, stream.n_documents, stream.n_bytes) == (len(flat), 50, 5)
    for start, stop in [(0, len(flat)), (3, 3), (len(flat), len(flat)), *np.sort(rng.integers(0, len(flat), (50, 2)))]:
        assert np.array_equal(stream.read(int(start), int(stop)), flat[start:stop])
    owner = np.repeat(np.arange(50), [len(document) for document in documents])
    assert [stream.document_at(token) for token in range(len(flat))] == owner.tolist()
    for number, document in enumerate(documents):
        assert stream.read(*stream.document_bounds(number)).tolist() == document
    assert stream.read(0, 1).dtype == np.int32
    for bad in (
        lambda: stream.read(0, len(flat) + 1),
        lambda: stream.read(-1, 2),
        lambda: stream.document_at(len(flat)),
    ):
        with pytest.raises(IndexError):
            bad()


def test_windows_take_part_of_a_shard(tmp_path: Path) -> None:
    shard = Shard(write(tmp_path / "a", [[1, 2, 3], [4], [5, 6], [7]]))
    stream = TokenStream([Window(shard, 1, 3), Window(shard, 0, 1)])
    assert stream.read(0, stream.n_tokens).tolist() == [4, 5, 6, 1, 2, 3]
    assert [stream.document_at(token) for token in range(6)] == [0, 1, 1, 2, 2, 2]
    assert [stream.document_bounds(document) for document in range(3)] == [(0, 1), (1, 3), (3, 6)]


def test_documents_of_several_sequences_and_modes_are_read(tmp_path: Path) -> None:
    """As Megatron writes with --split-sentences, and for multimodal data."""
    (tmp_path / "a.bin").write_bytes(np.arange(6, dtype="<i4").tobytes())
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 3) + struct.pack("<3i", 3, 1, 2)
    (tmp_path / "a.idx").write_bytes(index + struct.pack("<3q", 0, 12, 16) + struct.pack("<3q", 0, 2, 3) + b"\0\0\0")
    stream = TokenStream.open([tmp_path / "a"])
    assert [stream.document_bounds(document) for document in range(2)] == [(0, 4), (4, 6)]
    assert stream.document_at(3) == 0


@pytest.mark.parametrize("damage", ["short bin", "short idx", "magic", "no bin", "no idx", "empty idx"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "a", [[1, 2, 3], [4]])
    file = tmp_path / ("a.bin" if "bin" in damage else "a.idx")
    if damage.startswith("no"):
        file.unlink()
    elif damage.startswith("short"):
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "magic":
        file.write_bytes(b"x" + file.read_bytes()[1:])
    else:
        file.write_bytes(b"")
    with pytest.raises(UserError, match=rf"{file.name}.*cairn prepare"):
        TokenStream.open([tmp_path / "a"])


def test_nothing_appears_when_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(OverflowError):
        write(tmp_path / "a", [[1], [-1]])
    assert list(tmp_path.iterdir()) == []
