"""Tokenizers: any text comes back as it was, ids are found by name, damage is named."""

import hashlib
import json
import random
import sysconfig
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from cairn.config.data import SentencePieceSection
from cairn.data.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from cairn.data.tokenizer import BytesTokenizer, Tokenizer, cut, load_tokenizer
from cairn.errors import UserError

STDLIB = Path(sysconfig.get_paths()["stdlib"])
TEXTS = [(STDLIB / f"{name}.py").read_text(encoding="utf-8") for name in ("argparse", "ast", "inspect", "textwrap")]
ODD = [
    "",
    " ",
    "  leading, trailing  ",
    "\r\n\r\n\t\tx\n   \n",
    "a\0b\0",
    "▁ U+2581 ▁▁x▁",
    "▅ ⁇ \ufeff \ufffd",
    "<s></s><mask><pad><0x41>",
    "e\u0301 é ﬁ ½ İ",
    "\u2028\u2029\x85\x0b\x0c\x1c",
    "日本語 עברית 😀👩‍👩‍👧 \U0010ffff",
    "x" * 70_000 + "\n" + " " * 70_000,
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(TEXTS, SentencePieceSection(vocab_size=1000), folder)
    return folder


def random_texts(count: int) -> list[str]:
    """Any characters but half surrogate pairs, which no UTF-8 text holds."""
    rng = random.Random(0)
    kinds = ["  \n\t_(a0", "".join(map(chr, range(128))), "▁ ▅é日", None]
    texts = []
    for _ in range(count):
        kind = rng.choice(kinds)
        codes = (
            rng.choice(kind) if kind else chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
            for _ in range(rng.randrange(60))
        )
        texts.append("".join(codes))
    return texts


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram"])
def test_any_text_comes_back(kind: str, trained: Path, tmp_path: Path) -> None:
    tokenizer: Tokenizer = BytesTokenizer()
    if kind == "unigram":
        train_sentencepiece(TEXTS[:1], SentencePieceSection(vocab_size=600, model_type="unigram"), tmp_path)
        tokenizer = load_tokenizer(tmp_path)
    elif kind == "bpe":
        tokenizer = load_tokenizer(trained)
    texts = [*ODD, *random_texts(500), *TEXTS]
    ids = tokenizer.encode_batch(texts)
    for text, found in zip(texts, ids, strict=True):
        assert tokenizer.decode(found) == text
        assert not tokenizer.special_ids() & set(found), text
        assert not found or max(found) < tokenizer.vocab_size
    assert [tokenizer.encode(text) for text in texts[:50]] == ids[:50]
    assert [found.tolist() for found in tokenizer.encode_arrays(texts)] == ids


def test_remembered_words_are_encoded_as_sentencepiece_would(trained: Path) -> None:
    tokenizer = SentencePieceTokenizer(trained / "tokenizer.model")
    assert tokenizer._words is not None
    for text in [*TEXTS, *random_texts(300)]:
        text = text.replace("▁", "")[:60_000]
        assert tokenizer.encode_arrays([text])[0].tolist() == tokenizer._spm.encode(text)


def test_special_tokens_and_compression(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    assert tokenizer.vocab_size == 1000
    ids = [tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id]
    ids += [tokenizer.mask_id, tokenizer.cls_id, tokenizer.sep_id]
    assert ids == list(range(7))
    assert tokenizer.special_ids() == frozenset(range(7))
    text = TEXTS[1]
    assert len(text.encode()) / len(tokenizer.encode(text)) > 2.4
    assert len(tokenizer.encode("\n" + " " * 8)) <= 2, "line ends and indentation are pieces"


def test_training_is_deterministic_and_saved_whole(trained: Path, tmp_path: Path) -> None:
    train_sentencepiece(iter(TEXTS), SentencePieceSection(vocab_size=1000), tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.fingerprint == load_tokenizer(trained).fingerprint
    again.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").fingerprint == again.fingerprint
    assert [file.name for file in (tmp_path / "copy").iterdir()] == ["tokenizer.model"]


def test_a_vocabulary_too_large_for_the_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size=\d+ or less") as error:
        train_sentencepiece(TEXTS[3:], SentencePieceSection(vocab_size=30_000), tmp_path)
    most = int(str(error.value).split("tokenizer.vocab_size=")[1].split()[0])
    train_sentencepiece(TEXTS[3:], SentencePieceSection(vocab_size=most), tmp_path)
    assert load_tokenizer(tmp_path).vocab_size == most
    with pytest.raises(UserError, match=r"tokenizer\.name=bytes"):
        train_sentencepiece([], SentencePieceSection(vocab_size=300), tmp_path)


def test_word_starts(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    starts = tokenizer.word_starts()
    assert starts.shape == (1000,)
    assert starts[:7].all()
    ids = tokenizer.encode(" return(self")
    words, word = [], ""
    for i in ids:
        if starts[i] and word:
            words.append(word)
            word = ""
        word += tokenizer.decode([i])
    assert [*words, word] == [" return", "(self"]
    by_byte = BytesTokenizer().word_starts()
    assert by_byte[7 + ord(" ")]
    assert by_byte[7 + ord("(")]
    assert not by_byte[7 + ord("a")]
    assert not by_byte[7 + 0xE9]


def test_bytes(tmp_path: Path) -> None:
    tokenizer = BytesTokenizer()
    assert tokenizer.encode("A\0é") == [7 + 65, 7, 7 + 0xC3, 7 + 0xA9]
    assert tokenizer.decode([3, 7 + 65, 7 + 0xC3, 0]) == "A\ufffd"
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def gpt2_like(path: Path) -> Tokenizer:
    byte_level(path / "tokenizer.json")
    return load_tokenizer(path)


def exact_spans(kind: str, trained: Path, folder: Path) -> Tokenizer:
    return {"bytes": BytesTokenizer, "bpe": lambda: load_tokenizer(trained), "gpt2": lambda: gpt2_like(folder)}[kind]()


@pytest.mark.parametrize("kind", ["bytes", "bpe", "gpt2"])
def test_offsets_are_those_of_the_characters(kind: str, trained: Path, tmp_path: Path) -> None:
    tokenizer = exact_spans(kind, trained, tmp_path)
    for text in [*ODD[:-1], *random_texts(200), TEXTS[1][:9000]]:
        ids, offsets = tokenizer.encode_offsets(text)
        assert ids == tokenizer.encode(text)
        assert len(offsets) == len(ids)
        ends = [end for _, end in offsets]
        assert ends == sorted(ends)
        assert {place for begin, end in offsets for place in range(begin, end)} == set(range(len(text)))
        for i, (begin, end) in zip(ids, offsets, strict=True):
            piece = tokenizer.decode([i])
            assert piece == text[begin:end] or "\ufffd" in piece or not piece, (text, begin, end)


def test_offsets_of_wordpiece_point_into_the_text_as_it_is(tmp_path: Path) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cafe", "oslo", "##s", "日", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    text = "  CAFÉS  日 Oslo."
    ids, offsets = load_tokenizer(tmp_path).encode_offsets(text)
    assert ids == [5, 7, 8, 6, 9]
    assert [text[begin:end] for begin, end in offsets] == ["CAFÉ", "S", "日", "Oslo", "."]


def byte_level(path: Path) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS[:1], trainer)
    backend.save(str(path))
    return backend


def test_tokenizers_json(tmp_path: Path) -> None:
    byte_level(tmp_path / "tokenizer.json")
    for path in (tmp_path / "tokenizer.json", tmp_path):
        tokenizer = load_tokenizer(path)
        assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.mask_id) == (0, 0, None)
        for text in [*random_texts(50), "<|endoftext|> as text"]:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert 0 not in ids
        starts = tokenizer.word_starts()
        assert next(bool(starts[i]) for i in tokenizer.encode(" return"))
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


def test_names_in_a_transformers_folder_win(tmp_path: Path) -> None:
    byte_level(tmp_path / "tokenizer.json")
    other = {"eos_token": {"content": "return"}, "pad_token": "self", "mask_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(other))
    tokenizer = load_tokenizer(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    assert (tokenizer.eos_id, tokenizer.pad_id) == (backend.token_to_id("return"), backend.token_to_id("self"))
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").eos_id == tokenizer.eos_id


@pytest.mark.parametrize("cased", [False, True])
def test_wordpiece_vocabulary(tmp_path: Path, cased: bool) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat", *(["The"] if cased else [])]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    assert (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (0, 2, 3, 4)
    assert tokenizer.eos_id is None
    assert tokenizer.vocab_size == len(pieces)
    assert tokenizer.encode("The cats sat [MASK]")[:4] == [9 if cased else 5, 6, 7, 8]
    assert 4 not in tokenizer.encode("[MASK]")
    assert tokenizer.word_starts()[5:9].tolist() == [True, True, False, True]
    assert tokenizer.decode([5, 6, 7]) == "the cats"
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("broken.model", "tokenizer.json", "vocab.txt", "notes.doc"):
        (tmp_path / name).write_text("{ not a tokenizer")
    for name in ("broken.model", "tokenizer.json", "vocab.txt", "notes.doc", "absent.model", "empty"):
        with pytest.raises(UserError, match=name):
            load_tokenizer(tmp_path / name)


def test_cut_keeps_every_character() -> None:
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(rng.choice("ab\n") for _ in range(rng.randrange(100)))
        parts = cut(text, 10)
        assert "".join(parts) == text
        assert max(map(len, parts)) <= 10
    assert cut("aaaa\nbb\ncccccccccccc", 8) == ["aaaa\nbb\n", "cccccccc", "cccc"]


def test_fingerprint_is_that_of_the_file(trained: Path) -> None:
    digest = hashlib.sha256((trained / "tokenizer.model").read_bytes()).hexdigest()
    assert load_tokenizer(trained / "tokenizer.model").fingerprint == digest
