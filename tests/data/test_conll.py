"""Tagged tokens in columns."""

from pathlib import Path

import pytest

from cairn.data.conll import read_conll
from cairn.errors import UserError


def test_sentences(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(
        "\ufeff-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects  VBZ B-VP   O \n \n\n"
        "-DOCSTART- -X- -X- O\nPeter NNP B-NP B-PER\n-DOCSTART-\nBlackburn NNP I-NP I-PER",
        newline="\r\n",
    )
    rows = list(read_conll(str(path)))
    assert [(row.place, row.values) for row in rows] == [
        (f"{path}: line 3", {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}),
        (f"{path}: line 8", {"tokens": ["Peter"], "tags": ["B-PER"]}),
        (f"{path}: line 10", {"tokens": ["Blackburn"], "tags": ["I-PER"]}),
    ]


def test_tokens_between_tabs_may_hold_spaces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("New York\tB-LOC\n\u3000\tO\n")
    (row,) = read_conll(str(tmp_path / "a.txt"))
    assert row.values == {"tokens": ["New York", "\u3000"], "tags": ["B-LOC", "O"]}
    (tmp_path / "b.txt").write_text("\u3000 O\n")  # blank to str.split, yet a token
    assert [row.values["tokens"] for row in read_conll(str(tmp_path / "b.txt"))] == [["\u3000"]]


def test_tokens_may_stand_alone_where_no_tags_are_needed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\nb\n\nc\n")
    rows = list(read_conll(str(tmp_path / "a.txt"), tagged=False))
    assert [row.values for row in rows] == [{"tokens": ["a", "b"]}, {"tokens": ["c"]}]
    (tmp_path / "b.txt").write_text("a O\nb\n")
    with pytest.raises(UserError, match="line 2 has one column"):
        list(read_conll(str(tmp_path / "b.txt"), tagged=False))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a O\n\nb x O\n", r"a\.txt: line 3 has 3 columns, line 1 has 2"),
        (b"a x O\nb O\n", r"a\.txt: line 2 has 2 columns, line 1 has 3"),
        (b"a O\nb\n", r"a\.txt: line 2 has one column"),
        (b"a\tO\n\tO\n", r"a\.txt: line 2 has an empty token"),
        (b"a\tO\nb\t \n", r"a\.txt: line 2 has an empty tag"),
        (b"a O\n\xff O\n", r"a\.txt: line 2 is not UTF-8 .*iconv"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=message):
        list(read_conll(str(tmp_path / "a.txt")))
