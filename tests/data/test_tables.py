"""Tables: every format gives the same rows with their places; what cannot be read is named with its line and remedy."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import ValidationError

from cairn.config.table import TableFormat
from cairn.data.tables import Row, read_table, text_of
from cairn.errors import UserError

ROWS = [("one, two", "0"), ('he said "so"', "1"), ("naïve é日😀", "0"), ("two\nlines", "1")]


def read(path: Path | str, **options: Any) -> list[Row]:
    return list(read_table(str(path), TableFormat(**options)))


def write(path: Path) -> Path:
    """ROWS in the format of the path's ending."""
    plain = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    objects = [{"sentence": text, "label": label} for text, label in ROWS]
    if plain.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(objects), path, row_group_size=3)
        return path
    if plain.suffix in (".csv", ".tsv"):
        with plain.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="," if plain.suffix == ".csv" else "\t")
            writer.writerows([("sentence", "label"), *ROWS])
        data = plain.read_bytes()
        plain.unlink()
    elif plain.suffix == ".json":
        data = json.dumps(objects, indent=1).encode()
    else:
        data = "".join(json.dumps(row) + "\n" for row in objects).encode()
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(compress(data))
    return path


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("a.csv", "line 5"),
        ("a.csv.zst", "line 5"),
        ("a.tsv", "line 5"),
        ("a.jsonl", "line 4"),
        ("a.jsonl.gz", "line 4"),
        ("a.json", "element 4"),
        ("a.json.gz", "element 4"),
        ("a.parquet", "row 3"),
    ],
)
def test_all_formats_give_the_same_rows(tmp_path: Path, name: str, place: str) -> None:
    path = write(tmp_path / name)
    rows = read(path, quoting=True)
    assert [(text_of(row, "sentence"), row.values["label"]) for row in rows] == ROWS
    assert rows[3].place == f"{path}: {place}"


def test_datasets_from_disk(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list([{"sentence": text, "label": label} for text, label in ROWS])
    datasets.DatasetDict({"train": table, "test": table.select([2])}).save_to_disk(str(tmp_path / "d"))
    folder = tmp_path / "d"
    for source in (f"datasets:{folder}", str(folder)):
        rows = read(source)
        assert [tuple(row.values.values()) for row in rows] == ROWS
        assert rows[3].place == f"datasets:{folder}: row 3"
    assert [row.values["sentence"] for row in read(f"datasets:{folder}:test")] == [ROWS[2][0]]
    with pytest.raises(UserError, match=r"^datasets:.*no split 'dev', only 'train', 'test'"):
        read(f"datasets:{folder}:dev")
    with pytest.raises(UserError, match="is a folder; give one file"):
        read(tmp_path)


def test_quotes_are_text_between_tabs(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('sentence\tlabel\n"stray\t0\nan "odd" one"\t1\n')
    assert [row.values["sentence"] for row in read(path)] == ['"stray', 'an "odd" one"']
    with pytest.raises(UserError, match=r"line 2 is malformed .*data\.quoting=false"):
        read(path, quoting=True)
    other = path.rename(tmp_path / "a.txt")
    assert [row.values["label"] for row in read(other, separator=r"\t")] == ["0", "1"]


def test_bom_crlf_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfsentence,label\r\n\r\nx,1\r\n   \r\ny,\r\n\r\n")
    rows = read(path)
    assert [(row.place[-6:], row.values) for row in rows] == [
        ("line 3", {"sentence": "x", "label": "1"}),
        ("line 5", {"sentence": "y", "label": ""}),
    ]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    assert [(row.place[-6:], row.values) for row in read(tmp_path / "a.jsonl")] == [
        ("line 1", {"a": 1}),
        ("line 3", {"a": 2}),
    ]


def test_an_empty_cell_of_the_only_column_is_no_blank_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text\nx\n""\n\ny\n')
    assert [row.values["text"] for row in read(path)] == ["x", "", "y"]


def test_named_columns_and_a_star(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("news\t5.0\ta\tb\nnews\t1.0\tc\td\textra\tmore\n")
    rows = read(path, columns=["genre", "score", "one", "two", "*"])
    assert [row.values for row in rows] == [
        {"genre": "news", "score": "5.0", "one": "a", "two": "b"},
        {"genre": "news", "score": "1.0", "one": "c", "two": "d"},
    ]
    with pytest.raises(UserError, match=r"line 2 has 6 columns .*data\.columns 4: .*a last \*"):
        read(path, columns=["genre", "score", "one", "two"])
    with pytest.raises(UserError, match=r"line 1 has 4 columns .*data\.columns 5: "):
        read(path, columns=["genre", "score", "one", "two", "three", "*"])
    with pytest.raises(UserError, match=r"line 1 is a header: leave data\.columns out"):
        read(path, columns=["news", "5.0", "*"])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "a.csv",
            b"x,y\n1,2\n1,2,3\n",
            r"a\.csv: line 3 has 3 columns .*the header 2: put cells .*data\.quoting=false",
        ),
        ("a.csv", b'x,y\n"1\n\n",2\n1\n', r"a\.csv: line 5 has 1 columns"),
        ("a.csv", b'x,y\n1,2\n1,"open\n1,2\n', r"a\.csv: line 3 is malformed \(unexpected end of data\)"),
        ("a.tsv", b"x\ty\n1\t2\t3\n", r"a\.tsv: line 2 has 3 columns .*the header 2: set data\.quoting=true"),
        ("a.csv", b"x,y,x\n1,2,3\n", r"a\.csv: line 1, the header, has the column 'x' twice"),
        ("a.csv", b"", r"a\.csv: is empty"),
        ("a.csv", b"x,y\n" + b"1,2\n" * 9000 + b"1,\xe9\n", r"a\.csv: line 9002 is not UTF-8 .*iconv"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', r"a\.jsonl: line 3 is not JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl: line 2 is no object with fields but a list"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl: line 2 is not UTF-8 .*iconv"),
        ("a.json", b'[{"a": 1}, 2]', r"a\.json: element 2 is no object"),
        ("a.json", b'[{"a": 1}, ', r"a\.json: not JSON"),
        ("a.json", b'{\n "data": []\n}', r"a\.json: line 1 is not JSON .*one array"),
        ("a.parquet", b"PAR1", r"a\.parquet: not a Parquet file"),
        ("a.csv.gz", b"x,y\n", r"a\.csv\.gz: cannot be read"),
        ("a.txt", b"x\n", r"a\.txt: its ending is none of .*data\.separator"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.csv: no such file: mend the path"):
        read(tmp_path / "a.csv")


def test_text_of() -> None:
    values = {"text": " as it\nstands ", "int": 3, "float": 0.5, "none": None, "blank": " \n", "list": ["a"]}
    row = Row("f: line 7", values | {"bool": True, "half": "\ud800", "nan": float("nan")})
    assert [text_of(row, column) for column in ("text", "int", "float")] == [" as it\nstands ", "3", "0.5"]
    for column, message in [
        ("none", "f: line 7: column 'none' is empty: remove the row or fill it in"),
        ("blank", "f: line 7: column 'blank' is empty: remove the row or fill it in"),
        ("nan", "f: line 7: column 'nan' is empty: remove the row or fill it in"),
        ("list", "f: line 7: column 'list' has a list, not text; set data.pair"),
        ("bool", "f: line 7: column 'bool' has a bool, not text; set data.pair"),
        ("half", "f: line 7: column 'half' has half a surrogate pair, which is no text: mend the row"),
    ]:
        with pytest.raises(UserError) as caught:
            text_of(row, column, "data.pair")
        assert str(caught.value) == message
    with pytest.raises(UserError, match=r"^f: line 7: no column 'b', only 'a'; set data\.text$"):
        text_of(Row("f: line 7", {"a": "x"}), "b")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("separator", ""),
        ("separator", ",,"),
        ("separator", '"'),
        ("columns", ["a", "a"]),
        ("columns", ["a", ""]),
        ("columns", ["*", "a"]),
        ("columns", ["*"]),
    ],
)
def test_formats_that_make_no_sense(key: str, value: Any) -> None:
    with pytest.raises(ValidationError, match="expected"):
        TableFormat(**{key: value})
