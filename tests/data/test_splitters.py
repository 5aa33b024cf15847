"""Words encode one by one as the `tokenizers` library encodes them together, whatever the text."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers, pre_tokenizers

from cairn.config.data import WordPieceSection
from cairn.data.huggingface import HuggingFaceTokenizer, train_wordpiece
from cairn.data.splitters import splitter_of
from cairn.data.tokenizer import load_tokenizer
from cairn.data.words import BLANK, END_CODE, SPACE, Words, cut_at_space
from tests.data.test_tokenizer import ODD, TEXTS, byte_level, random_texts

KINDS = ("byte level", "uncased", "cased")
ALPHABETS = (
    "  \n\t a'sre",
    "' '' srevlldtmSX9.",
    "".join(map(chr, range(256))),
    "日本語a ,。\u3000\u0301e한",
    "é e\u0301\u0327\u302e\U0001d165\u0338=≠ﬁİıßΣς\u1fef`\u037e;",
    "😀👩\u200d\ufe0f \n\0\x1c\x85\xa0\u2028\ufeff\ufffd\u180e",
    "٣²½ⅷ一\u30071a '",
    "\r\n \nx",
)

ADDED = {
    "id": 0,
    "content": "[PAD]",
    **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False),
}


def nasty_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    made = ["".join(rng.choices(rng.choice(ALPHABETS), k=rng.randrange(60))) for _ in range(count)]
    words = ["it's", "'tis", " 've", "don't!", "<|endoftext|>", "[MASK]", "##s", "\ufeff", "naïve", "x" * 101, " " * 33]
    return [*made, *random_texts(count), *ODD, *("".join(rng.choices(words, k=9)) for _ in range(count // 10))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {kind: tmp_path_factory.mktemp("tokenizer") for kind in KINDS}
    byte_level(made["byte level"] / "tokenizer.json")
    for kind in KINDS[1:]:
        section = WordPieceSection(vocab_size=1500, lowercase=kind == "uncased")
        train_wordpiece([*TEXTS, *nasty_texts(300, seed=1)], section, made[kind])
    return made


def by_library(tokenizer: HuggingFaceTokenizer, texts: list[str]) -> list[list[int]]:
    return [one.ids for one in tokenizer._backend.encode_batch(texts, add_special_tokens=False)]


def loaded(folder: Path) -> HuggingFaceTokenizer:
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert tokenizer._words is not None
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_library(kind: str, folders: dict[str, Path]) -> None:
    tokenizer = loaded(folders[kind])
    texts = [*nasty_texts(1200, seed=0), *TEXTS[:1]]
    for text, found, wanted in zip(texts, tokenizer.encode_arrays(texts), by_library(tokenizer, texts), strict=True):
        assert found.tolist() == wanted, repr(text)


def test_byte_level_words_are_those_of_the_pattern(folders: dict[str, Path]) -> None:
    """Ids hardly tell, with so small a vocabulary."""
    backend = loaded(folders["byte level"])._backend
    splitter = splitter_of(backend, json.loads(backend.to_str()))
    assert splitter is not None
    words: list[str] = []

    def number(given: list[str]) -> Iterator[list[int]]:
        for word in given:
            words.append(word)
            yield [len(words) - 1]

    texts = [*nasty_texts(1000, seed=4), "we'll'll 'llama you'reading x'vex'd'm'tx'sx' s", TEXTS[2]]
    for text, found in zip(texts, Words(splitter, number).encode([[text] for text in texts]), strict=True):
        pieces = backend.pre_tokenizer.pre_tokenize_str(text)
        assert [words[i] for i in found] == [text[begin:end] for _, (begin, end) in pieces]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_cut_at_spaces_is_the_whole_text(kind: str, folders: dict[str, Path]) -> None:
    tokenizer = loaded(folders[kind])
    text = " x ".join(nasty_texts(400, seed=2)[:400]) + TEXTS[0]
    wanted = by_library(tokenizer, [text])[0]
    for limit in (77, 500, 9999):
        parts = cut_at_space(text, limit)
        assert "".join(parts) == text
        assert max(map(len, parts)) <= limit
        assert [i for ids in by_library(tokenizer, parts) for i in ids] == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_white_space_is_white_space_to_python(kind: str, folders: dict[str, Path]) -> None:
    """Else `cut_at_space` could cut within a run of it."""
    tokenizer = loaded(folders[kind])
    splitter = splitter_of(tokenizer._backend, json.loads(tokenizer._backend.to_str()))
    assert splitter is not None
    assert splitter.kind(" ") in (BLANK, SPACE)
    assert splitter.kind("\n") in (BLANK, SPACE)
    rng = random.Random(0)
    characters = {*map(chr, range(0x3010)), *(chr(rng.randrange(0xE000, END_CODE)) for _ in range(1000))}
    assert all(one.isspace() for one in characters if splitter.kind(one) in (BLANK, SPACE))


def changed(folder: Path, change: dict[str, Any]) -> HuggingFaceTokenizer:
    state = json.loads((folder / "tokenizer.json").read_text())
    for path, value in change.items():
        *above, last = path.split(".")
        place = state
        for name in above:
            place = place[name]
        place[last] = value
    return HuggingFaceTokenizer(Backend.from_str(json.dumps(state)), {})


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("byte level", {"pre_tokenizer.add_prefix_space": True}),
        ("byte level", {"pre_tokenizer.use_regex": False}),
        ("byte level", {"model.dropout": 0.5}),
        ("byte level", {"normalizer": {"type": "NFC"}}),
        ("byte level", {"pre_tokenizer": None}),
        ("byte level", {"pre_tokenizer": {"type": "Whitespace"}}),
        ("uncased", {"normalizer": {"type": "Lowercase"}}),
        ("uncased", {"pre_tokenizer": {"type": "WhitespaceSplit"}}),
        ("uncased", {"added_tokens": [ADDED]}),
    ],
)  # fmt: skip
def test_others_are_left_to_the_library(kind: str, change: dict[str, Any], folders: dict[str, Path]) -> None:
    tokenizer = changed(folders[kind], change)
    assert tokenizer._words is None
    assert loaded(folders[kind])._words is not None
    if "model.dropout" not in change:
        texts = [*TEXTS[:1], "a [PAD] b"]
        assert [ids.tolist() for ids in tokenizer.encode_arrays(texts)] == by_library(tokenizer, texts)


@pytest.mark.parametrize("accents", [False, True, None])
@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("chinese", [False, True])
def test_every_setting_of_berts_normalizer(
    accents: bool | None, lowercase: bool, chinese: bool, folders: dict[str, Path]
) -> None:
    backend = Backend.from_file(str(folders["cased"] / "tokenizer.json"))
    backend.normalizer = normalizers.BertNormalizer(chinese, chinese, accents, lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = HuggingFaceTokenizer(backend, {})
    assert tokenizer._words is not None
    texts = nasty_texts(200, seed=3)
    assert [ids.tolist() for ids in tokenizer.encode_arrays(texts)] == by_library(tokenizer, texts)
