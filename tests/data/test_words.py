"""Remembered words: the ids do not depend on what is remembered, and what is remembered has an end."""

import random
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cairn.data import words
from cairn.data.splitters import spaces_splitter
from cairn.data.words import Words, cut_at_space

LETTER = re.compile(r"[^\W\d_]")
WORD = re.compile(r"_| *(?:[^\W\d_]+|(?:[^\w ]|\d)+)| +")


def by_regex(text: str) -> list[int]:
    """A tokenizer that tells every word from every other: 0 to 3 numbers that depend on all of it."""
    return [zlib.crc32(f"{word}{i}".encode()) >> 1 for word in WORD.findall(text) for i in range(len(word) % 4)]


def checksums(given: list[str]) -> Iterator[list[int]]:
    return map(by_regex, given)


def recording() -> tuple[list[str], Callable[[list[str]], Iterator[list[int]]]]:
    """What the tokenizer has been asked for, and the tokenizer."""
    asked: list[str] = []

    def encode(given: list[str]) -> Iterator[list[int]]:
        asked.extend(given)
        return checksums(given)

    return asked, encode


def texts(count: int, longest: int = 80) -> list[str]:
    rng = random.Random(0)
    alphabets = ["ab  ", "abcdefgh\n  .", "\0\1a ", "\xff\u0100\u0161a !", "日a 😀", "_ _a", "x"]
    return ["".join(rng.choices(rng.choice(alphabets), k=rng.randrange(longest))) for _ in range(count)]


@pytest.mark.parametrize("slot_bits", [1, 6, 19])
@pytest.mark.parametrize("remembered", [0, 100, 1 << 18])
@pytest.mark.parametrize("chunk", [1, 1000])
def test_ids_do_not_depend_on_what_is_remembered(
    slot_bits: int, remembered: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "SLOT_BITS", slot_bits)
    monkeypatch.setattr(words, "REMEMBERED", remembered)
    monkeypatch.setattr(words, "CHUNK", chunk)
    remembering = Words(spaces_splitter(LETTER, alone="_"), checksums, apart=True)
    given = ["", *texts(300), "", ""]
    for _ in range(2):
        found = remembering.encode([[text] for text in given])
        assert [ids.tolist() for ids in found] == [by_regex(text) for text in given]
    assert remembering.encode([]) == []
    assert [ids.tolist() for ids in remembering.encode([[], ["a b", " c"]])] == [[], by_regex("a b c")]


def test_words_are_encoded_once_and_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, encode = recording()
    remembering = Words(spaces_splitter(LETTER, alone="_"), encode)
    remembering.encode([["a b a b " * 50], ["a b"]])
    assert asked == ["a", " b", " a", " "]
    monkeypatch.setattr(words, "REMEMBERED", 1000)
    monkeypatch.setattr(words, "CHUNK", 2000)
    for i in range(5):
        remembering.encode(
            [
                [" ".join(f"{number:x}".translate({48 + d: 103 + d for d in range(10)}))]
                for number in range(i * 1000, i * 1000 + 1000)
            ]
        )
        assert len(remembering._numbers) < 2000


def test_texts_of_new_words_are_encoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, encode = recording()
    monkeypatch.setattr(words, "CHUNK", 1000)
    monkeypatch.setattr(words, "WHOLE", 2)
    rng = random.Random(0)
    clauses = [" ".join("".join(rng.choices("日月山水人", k=20)) for _ in range(50)) for _ in range(4)]
    remembering = Words(spaces_splitter(LETTER, alone="_"), encode, apart=True)
    for text, expected in zip(clauses, ([50, False], [1, True], [1, True], [50, False]), strict=True):
        asked.clear()
        assert remembering.encode([[text]])[0].tolist() == by_regex(text)
        assert [len(asked), text in asked] == expected


def test_cut_at_space() -> None:
    assert cut_at_space("one two  three\n four", 10) == ["one two", "  three", "\n four"]
    assert cut_at_space("x" * 25 + " y", 10) == ["x" * 10, "x" * 10, "x" * 5 + " y"]
    assert cut_at_space(" " * 25, 10) == [" " * 10, " " * 10, " " * 5]
    assert cut_at_space("", 10) == [""]
    for text in texts(300):
        parts = cut_at_space(text, 10)
        assert "".join(parts) == text
        assert max(map(len, parts)) <= 10
    long = "a\t " * 200_000  # quick on what it has to look at closely
    assert len(cut_at_space(long, 1 << 18)) == 3


def test_half_a_surrogate_pair(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        Words(spaces_splitter(LETTER, alone="_"), checksums).encode([["a \ud800"]])
