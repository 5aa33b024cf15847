"""Every document can be followed to the line it came from, however its file was cut into units."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cairn.config.data import BytesSection, DataSection, SourceSection, TokenizerFileSection
from cairn.data import corpus
from cairn.data.origin import origin_path
from cairn.data.prepare import Prepared, find_prepared, open_prepared, prepare
from cairn.data.shards import ShardWriter
from cairn.data.tokenizer import BytesTokenizer

BYTES = BytesSection()


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut corpora of a test's size as large ones are."""
    monkeypatch.setattr(corpus, "SMALLEST_UNIT", 3000)
    monkeypatch.setattr(corpus, "LARGEST_UNIT", 3000)
    monkeypatch.setattr(corpus, "LONGEST_TEXT", 2000)


def texts(count: int = 200) -> list[str]:
    return [f"document {i}: " + f"word{i}\n" * (i % 9) for i in range(count)]


def found(prepared: Prepared, number: int = 0) -> dict[str, str]:
    """Origin -> text of every document of a source, both splits."""
    out = {}
    for split in ("train", "valid"):
        stream, _ = prepared.streams(split)[number]  # type: ignore[arg-type]
        for document in range(stream.n_documents):
            *ids, _ = stream.read(*stream.document_bounds(document)).tolist()
            where = prepared.origin(number, stream, document)
            assert where not in out
            out[where] = prepared.tokenizer.decode(ids)
    return out


def prepared_from(source: Path, **section: object) -> Prepared:
    data = DataSection(source=str(source), dir=str(source.parent / "data"), workers=1, held_out=0.2, **section)
    return open_prepared(prepare(data, BYTES))


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json"])
def test_json_lines(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    # blank lines and empty documents count as lines
    written = [
        line for i, t in enumerate(texts()) for line in [json.dumps({"text": t}), *["", '{"text": ""}'][: i % 3]]
    ]
    data = "\n".join(written).encode()
    path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    prepared = prepared_from(path)
    assert (len(prepared.manifest.sources[0].units) > 3) == (ending == ".jsonl")
    there = found(prepared)
    assert len(there) == 200
    for where, text in there.items():
        file, _, line = where.rpartition(":")
        assert (file, json.loads(written[int(line) - 1])["text"]) == (str(path), text)


@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
def test_a_long_text(tmp_path: Path, ending: str) -> None:
    """A document is a range of lines; it begins on the one that is named."""
    path = tmp_path / f"a{ending}"
    lines = "".join(texts()).splitlines(keepends=True)
    data = "".join(lines).encode()
    path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    there = found(prepared_from(path))
    assert len(there) == -(-len(data) // 2000) or ending == ".txt.gz"
    assert len(there) > 3
    for where, text in there.items():
        file, _, line = where.rpartition(":")
        assert file == str(path)
        assert "".join(lines[int(line) - 1 :]).startswith(text)


def test_many_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i, text in enumerate(texts()):
        (tmp_path / "in" / f"{i:03}.md").write_text(text)
    there = found(prepared_from(tmp_path / "in"))
    assert there == {f"{tmp_path}/in/{i:03}.md:1": text for i, text in enumerate(texts())}


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_rows_of_several_lines(tmp_path: Path, ending: str) -> None:
    path, lines = tmp_path / f"a{ending}", []
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="," if ending == ".csv" else "\t", lineterminator="\n")
        writer.writerow(["id", "te\nxt"])
        for i, text in enumerate(texts()):
            file.flush()
            lines.append(path.read_text().count("\n") + 1)
            writer.writerow([i, text])
    there = found(prepared_from(path, text_field="te\nxt"))
    assert there == {f"{path}:{line}": text for line, text in zip(lines, texts(), strict=True)}


def test_rows_and_elements_are_named_by_number(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts()}), path, row_group_size=20)
    prepared = prepared_from(path)
    assert len(prepared.manifest.sources[0].units) > 1
    assert found(prepared) == {f"{path} row {i}": text for i, text in enumerate(texts())}
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": text} for text in texts()]))
    assert found(prepared_from(path)) == {f"{path} element {i}": text for i, text in enumerate(texts(), 1)}


def test_a_blend_with_documents_of_megatron(tmp_path: Path) -> None:
    prefix = tmp_path / "theirs"
    with ShardWriter(prefix, 263) as writer:
        for i in range(40):
            writer.add([*f"{i}".encode(), BytesTokenizer().eos_id])
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    BytesTokenizer().save(tmp_path / "tokenizer")
    sources = [SourceSection(source=str(prefix), weight=2.0), SourceSection(source=str(tmp_path / "b.jsonl"))]
    data = DataSection(source=sources, dir=str(tmp_path / "data"), workers=1)
    tokenizer = TokenizerFileSection(path=str(tmp_path / "tokenizer"))
    assert find_prepared(data, tokenizer) is None
    folder = prepare(data, tokenizer)
    assert find_prepared(data, tokenizer) == folder
    prepared = open_prepared(folder)
    assert list(found(prepared, 0)) == [f"{prefix} document {i}" for i in range(40)]
    assert found(prepared, 1) == {f"{tmp_path}/b.jsonl:{i}": text for i, text in enumerate(texts(), 1)}
    other = data.model_copy(update={"source": [sources[0], sources[1].model_copy(update={"weight": 3.0})]})
    assert find_prepared(other, tokenizer) is None
    assert find_prepared(other, tokenizer) != prepare(other, tokenizer) == find_prepared(other, tokenizer)


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_shards_without_it_still_train(tmp_path: Path, damage: str) -> None:
    """Those of an earlier version, which kept no lines."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    folder = prepared_from(tmp_path / "a.jsonl").folder
    for path in folder.glob("*.origin.npz"):
        content = path.read_bytes()
        path.unlink() if damage == "missing" else path.write_bytes(content[:300] if damage == "cut" else b"")
    prepared = prepared_from(tmp_path / "a.jsonl")
    assert prepared.folder == folder
    stream, _ = prepared.streams("train")[0]
    where = prepared.origin(0, stream, 0)
    assert where.startswith(f"document 0 of {folder}/0-00000.train (its line was not kept")


def test_the_file_is_the_same_each_time(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    contents = []
    for name in ("one", "two"):
        data = DataSection(source=str(tmp_path / "a.jsonl"), dir=str(tmp_path / name), workers=1)
        contents.append(origin_path(prepare(data, BYTES) / "0-00000").read_bytes())
    assert contents[0] == contents[1]
