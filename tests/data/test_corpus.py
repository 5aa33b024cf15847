"""Sources: every format gives the same documents, ranges give each once, what cannot be read is named with its line."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from cairn.data import corpus
from cairn.data.corpus import Part, divide, documents, list_source, megatron_prefix
from cairn.data.shards import ShardWriter
from cairn.errors import UserError

TEXTS = ["one\ntwo\n", "", 'com,ma "quoted"\ttab', "naïve é日😀", "last\r\nline"]


def read(source: str | Path, field: str = "text") -> list[str]:
    return [text for unit in divide(list_source(str(source))) for part in unit for text in documents(part, field)]


def write(path: Path, texts: list[str]) -> Path:
    """In the format of the path's ending."""
    plain = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    if plain.suffix == ".parquet":
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=2)
        return path
    if plain.suffix in (".csv", ".tsv"):
        with plain.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="," if plain.suffix == ".csv" else "\t")
            writer.writerows([["id", "text"], *enumerate(texts)])
        data = plain.read_bytes()
        plain.unlink()
    elif plain.suffix == ".json":
        data = json.dumps([{"text": text} for text in texts]).encode()
    else:
        data = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(compress(data))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.jsonl.gz",
        "a.jsonl.zst",
        "a.json",
        "a.json.gz",
        "a.csv",
        "a.csv.zst",
        "a.tsv",
        "a.tsv.gz",
        "a.parquet",
    ],
)
def test_formats(tmp_path: Path, name: str) -> None:
    assert read(write(tmp_path / name, TEXTS)) == TEXTS


def test_text_files_are_documents_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "z.txt").write_bytes(b"1\r\n")
    (tmp_path / "a.md.gz").write_bytes(gzip.compress(b"2"))
    (tmp_path / "c.py.zst").write_bytes(zstandard.compress(b"3") + zstandard.compress(b"4"))  # two frames
    (tmp_path / "d.txt").write_bytes(b"")
    (tmp_path / ".hidden" / "e.txt").write_bytes(b"no")
    (tmp_path / "f.bin").write_bytes(b"\xff")
    write(tmp_path / "g.jsonl", ["5", "6"])
    assert read(tmp_path) == ["2", "1\r\n", "34", "", "5", "6"]
    assert read(tmp_path / "*.txt") == [""]
    assert read(tmp_path / "**" / "*.txt") == ["1\r\n", ""]
    (tmp_path / "odd.ending").write_bytes(b"7")
    assert read(tmp_path / "odd.ending") == ["7"]


def test_stdlib_is_this_interpreters() -> None:
    listing = list_source("stdlib")
    names = [Path(part.path).name for part in listing.files]
    assert {"argparse.py", "abc.py", "ast.py"} <= set(names)
    assert not any({"test", "tests", "site-packages"} & set(Path(part.path).parts) for part in listing.files)
    assert 8e6 < listing.size < 30e6
    assert listing == list_source("stdlib")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_ranges_give_each_line_once(tmp_path: Path, name: str) -> None:
    lines = [json.dumps({"text": "x" * (i * 37 % 50)}) + "\n" for i in range(100)]
    path = tmp_path / name
    path.write_text("".join(lines))
    size = path.stat().st_size
    kind = "jsonl" if name.endswith("jsonl") else "text"
    for step in (1, 7, 64, 1000, size):
        parts = [Part(str(path), kind, 0, start, min(start + step, size)) for start in range(0, size, step)]
        found = [text for part in parts for text in documents(part, "text")]
        if kind == "text":
            assert "".join(found) == "".join(lines)
        else:
            assert found == [json.loads(line)["text"] for line in lines]


def test_a_long_text_file_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "LONGEST_TEXT", 1000)
    text = "".join(f"line {i} {'é' * (i % 40)}\n" for i in range(300))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("a.txt", "a.txt.gz"):
        found = read(tmp_path / name)
        assert "".join(found) == text
        assert all(part.endswith("\n") and len(part.encode()) < 1100 for part in found)
        assert len(found) > 5


def test_units_depend_on_the_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SMALLEST_UNIT", 500)
    write(tmp_path / "a.jsonl", [f"{i}" * 20 for i in range(100)])
    write(tmp_path / "b.parquet", [f"{i}" * 20 for i in range(300)])
    for i in range(20):
        (tmp_path / f"c{i:02}.txt").write_text("y" * 100)
    units = divide(list_source(str(tmp_path)))
    assert len(units) > 10
    assert read(tmp_path) == [f"{i}" * 20 for i in range(100)] + [f"{i}" * 20 for i in range(300)] + ["y" * 100] * 20


def test_datasets_from_disk(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"body": TEXTS})
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "other": rows.select([3])}).save_to_disk(str(tmp_path / "two"))
    assert read(f"datasets:{tmp_path}/one", "body") == TEXTS
    assert read(f"datasets:{tmp_path}/two", "body") == TEXTS
    assert read(f"datasets:{tmp_path}/two:other", "body") == TEXTS[3:4]
    with pytest.raises(UserError, match=r"no column 'text', only 'body'"):
        read(f"datasets:{tmp_path}/one")
    with pytest.raises(UserError, match=r"no split 'dev', only 'train', 'other'"):
        read(f"datasets:{tmp_path}/two:dev")
    with pytest.raises(UserError, match=r"datasets:.*absent.*cannot be loaded"):
        read(f"datasets:{tmp_path}/absent")


def test_a_loaded_builder_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", ["a", "b"])
    assert read(f"datasets:{tmp_path}/folder") == ["a", "b"]


JSONL = '{"text": "ok"}\n\n'


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"fine\nfine \xff", r"a\.txt: line 2 \(byte 10\) is not UTF-8"),
        ("a.jsonl", JSONL.encode() + b'{"text": "\xff"}\n', r"a\.jsonl: line 3 is not UTF-8"),
        ("a.jsonl", JSONL.encode() + b'{"text": "b"', r"a\.jsonl: line 3 is not JSON"),
        ("a.jsonl", JSONL.encode() + b"[1]\n", r"a\.jsonl: line 3 is no object"),
        (
            "a.jsonl",
            JSONL.encode() + b'{"body": "b", "id": 3}\n',
            r"line 3 has no field 'text', only 'body', 'id'; set data",
        ),
        ("a.jsonl", JSONL.encode() + b'{"text": 5}\n', r"line 3 has a int in field 'text'"),
        ("a.jsonl", JSONL.encode() + b'{"text": "\\ud800"}\n', r"line 3 has half a surrogate"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.gz", gzip.compress(JSONL.encode() * 99, mtime=0)[:-9], r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.zst", b"no zstandard", r"a\.jsonl\.zst: cannot be read"),
        ("a.json", b'[{"text": "x"}, {"body": 1}]', r"a\.json: element 2 has no field 'text', only 'body'"),
        ("a.json", b'[{"text": "x"}', r"a\.json: not JSON"),
        ("a.csv", b"id,body\n1,x\n", r"a\.csv: no column 'text' in the header, only 'id', 'body'"),
        ("a.csv", b"id,text\n1,x\n2\n", r"a\.csv: line 3 has 1 columns, the header 2"),
        ("a.csv", b"id,text\n1,\xff\n", r"a\.csv: line 2 is not UTF-8"),
        ("a.parquet", b"PAR1 no parquet", r"a\.parquet: not a Parquet file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_the_line_is_right_inside_a_range(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' * 100 + "oops\n" + '{"text": "x"}\n' * 100)
    with pytest.raises(UserError, match="line 101 is not JSON"):
        list(documents(Part(str(path), "jsonl", 0, 700, 2500), "text"))


def test_parquet_without_the_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", TEXTS)
    assert read(path) == TEXTS
    with pytest.raises(UserError, match=r"no column 'body', only 'id', 'text'"):
        read(path, "body")
    with pytest.raises(UserError, match=r"row 0 has a int in field 'id'"):
        read(path, "id")


def test_null_text_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "x"}\n')
    assert read(tmp_path / "a.jsonl") == ["", "x"]


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    for source, message in [
        (tmp_path / "absent", "no such file or folder"),
        (tmp_path / "*.txt", "no file matches"),
        (tmp_path, "no file in this folder ends in"),
    ]:
        with pytest.raises(UserError, match=message):
            list_source(str(source))


def test_megatron_prefixes(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "corpus_text_document", 100) as writer:
        writer.add([1])
    for end in ("", ".bin", ".idx"):
        assert megatron_prefix(str(tmp_path / f"corpus_text_document{end}")) == tmp_path / "corpus_text_document"
    assert megatron_prefix(str(tmp_path)) is None
    assert megatron_prefix(str(tmp_path / "corpus")) is None
