"""SentencePiece: training a model that keeps any text exactly, and encoding with any model, fast."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import sentencepiece as spm
from numpy.typing import NDArray

from cairn.config.data import SentencePieceSection
from cairn.data.shards import temporary
from cairn.data.splitters import spaces_splitter
from cairn.data.tokenizer import SPECIALS, begins_word, cut, find_sentinels, save_template
from cairn.data.words import Words
from cairn.errors import UserError

SPACE = "\u2581"  # SentencePiece's own stand-in for a space, so a real U+2581 needs care
BLOCK = 4096  # characters of text that the trainer takes as one sentence
PART = 65_536  # characters encoded at once
# Ways to part a text into words, each with the run of spaces before it: letters and the rest apart, or by spaces alone.
# Every character is in a word. If every piece of a model is a whole word of one of these, no piece crosses the
# border of two, so words encode one by one as they would together, and their ids can be remembered. With each way, what
# it takes for a letter.
WORDS = (
    (re.compile(r" *(?:[^\W\d_]+|(?:[^\w ]|[\d_])+)| +"), re.compile(r"[^\W\d_]")),
    (re.compile(r" *[^ ]+| +"), re.compile(r"[^ ]")),
)


def train_sentencepiece(texts: Iterable[str], section: SentencePieceSection, folder: Path) -> None:
    """Train on the texts and write `folder/tokenizer.model` (arXiv 1808.06226). The same texts give the same file.

    No normalisation, bytes as fallback, spaces and line ends kept and free to form pieces of their own (indentation).
    Raises UserError when the texts are too few for the vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "tokenizer.model"
    partial = temporary(target)
    try:
        with partial.open("wb") as file:
            spm.SentencePieceTrainer.train(
                sentence_iterator=_sentences(texts),
                model_writer=file,
                model_type=section.model_type,
                vocab_size=section.vocab_size,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=8 * BLOCK,
                pad_id=0,
                unk_id=1,
                bos_id=2,
                eos_id=3,
                pad_piece="<pad>",
                control_symbols=list(SPECIALS[4:]),
                num_threads=4,  # is written into the model: the same everywhere, or fingerprints would differ
                minloglevel=2,
            )
        partial.replace(target)
    except RuntimeError as error:
        most = re.search(r"value <= (\d+)", str(error))
        if most is None and "sentences_.empty()" not in str(error):
            raise
        if most is None or int(most[1]) < 300:
            raise UserError(
                "tokenizer: the training text is too small for a SentencePiece vocabulary; "
                "add text, or set tokenizer.name=bytes"
            ) from error
        raise UserError(
            f"tokenizer.vocab_size {section.vocab_size}: the training text has pieces for at most {most[1]}; "
            f"set tokenizer.vocab_size={most[1]} or less, or add text"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Blocks of whole lines. Characters the trainer reserves would make it skip their block: cut there."""
    for text in texts:
        for block in cut(text, BLOCK):
            yield from filter(None, re.split("[\0\u2581\u2585]", block))


class SentencePieceTokenizer:
    """A SentencePiece model. One trained here decodes exactly what it encoded, whatever the text.

    Raises UserError when the file is not a SentencePiece model.
    """

    def __init__(self, path: Path) -> None:
        self._model = path.read_bytes()
        self.fingerprint = hashlib.sha256(self._model).hexdigest()
        self._spm = spm.SentencePieceProcessor()
        try:
            self._spm.LoadFromSerializedProto(self._model)
        except RuntimeError as error:
            raise UserError(f"{path}: not a SentencePiece model, or a damaged one") from error
        self.vocab_size: int = self._spm.get_piece_size()
        self.pad_id = self._id("<pad>", "[PAD]")
        self.unk_id = self._id("<unk>", "[UNK]")
        self.bos_id = self._id("<s>", "<bos>", "[BOS]")
        self.eos_id = self._id("</s>", "<eos>", "[EOS]")
        self.mask_id = self._id("<mask>", "[MASK]")
        self.cls_id = self._id("<cls>", "[CLS]")
        self.sep_id = self._id("<sep>", "[SEP]")
        self.sentinel_ids = find_sentinels(self._id)
        self.chat_template: str | None = None
        probe = "  a \ufb01  e\u0301\n\t x\r\n "
        self._exact = self._spm.decode(self._spm.encode(probe)) == probe
        letters = (letter for words, letter in WORDS if self._exact and self._keeps_apart(words))
        splitters = (spaces_splitter(letter, alone=SPACE) for letter in letters)
        self._words = next((Words(splitter, self._encode_words) for splitter in splitters), None)
        self._escaped = [self._spm.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    def _id(self, *names: str) -> int | None:
        for name in names:
            found: int = self._spm.piece_to_id(name)
            if self._spm.id_to_piece(found) == name:
                return found
        return None

    def _keeps_apart(self, words: re.Pattern[str]) -> bool:
        """Whether every piece made of text is one whole word."""
        special = self.special_ids()
        return all(
            i in special or self._spm.is_byte(i) or words.fullmatch(self._text(i)) for i in range(self.vocab_size)
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""
        if self._words is not None:
            return [ids.tolist() for ids in self.encode_arrays(texts)]
        return [list(chain.from_iterable(map(self._encode_part, cut(text, PART)))) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Ids of several texts as arrays; faster where words encode one by one as they would together."""
        if self._words is None:
            return [np.array(ids, np.int32) for ids in self.encode_batch(texts)]
        return self._words.encode([cut(text, PART) for text in texts])

    def _encode_words(self, words: list[str]) -> Iterator[list[int]]:
        return map(self._encode_part, words)

    def _encode_part(self, text: str) -> list[int]:
        if self._exact and SPACE in text:  # as bytes, else it would come back as a space
            first, *rest = (self._encode_part(part) for part in text.split(SPACE))
            return first + [i for ids in rest for i in (*self._escaped, *ids)]
        ids: list[int] = self._spm.encode(text)
        return ids

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and the characters of each."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for whole in cut(text, PART):
            for part in re.split(f"({SPACE})", whole) if self._exact else [whole]:
                if part == SPACE and self._exact:
                    found, places = self._escaped, [(0, 1)] * len(self._escaped)
                else:
                    mapping = self._spm.encode(part, return_type="offset_mapping")
                    found, places = mapping["ids"], mapping["offsets"]
                ids += found
                offsets += [(at + begin, at + end) for begin, end in places]
                at += len(part)
        return ids, offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 (a model may write such) become U+FFFD."""
        text: str = self._spm.decode([int(i) for i in ids])
        return text

    def word_starts(self) -> NDArray[np.bool_]:
        """By the first character of each piece; a byte of fallback as that byte alone would be."""
        special = self.special_ids()
        return np.array([i in special or begins_word(self._text(i)) for i in range(self.vocab_size)])

    def _text(self, piece_id: int) -> str:
        piece: str = self._spm.id_to_piece(piece_id)
        if not self._spm.is_byte(piece_id):
            return piece.replace(SPACE, " ")
        byte = int(piece[3:5], 16)
        return chr(byte) if byte < 128 else "x"

    def special_ids(self) -> frozenset[int]:
        """Control symbols, the unknown piece and unused ones."""
        is_special = (self._spm.is_control, self._spm.is_unknown, self._spm.is_unused)
        return frozenset(i for i in range(self.vocab_size) if any(test(i) for test in is_special))

    def special_tokens(self) -> dict[str, int]:
        """Control symbols."""
        return {self._spm.id_to_piece(i): i for i in range(self.vocab_size) if self._spm.is_control(i)}

    def save(self, folder: Path) -> None:
        """Write `folder/tokenizer.model`."""
        folder.mkdir(parents=True, exist_ok=True)
        partial = temporary(folder / "tokenizer.model")
        partial.write_bytes(self._model)
        os.replace(partial, folder / "tokenizer.model")
        save_template(self.chat_template, folder)
