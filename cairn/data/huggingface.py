"""Tokenizers kept as Hugging Face files: tokenizer.json, a WordPiece vocab.txt, a `transformers` folder."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import BertWordPieceTokenizer
from tokenizers import Tokenizer as Backend

from cairn.config.data import WordPieceSection
from cairn.data.splitters import splitter_of
from cairn.data.tokenizer import begins_word, cut, find_sentinels, save_template
from cairn.data.words import Words, cut_at_space
from cairn.errors import UserError

PART = 1 << 20  # characters encoded at once
NAMES = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>"),
    "unk": ("<unk>", "[UNK]"),
    "bos": ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "eos": ("</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<|endoftext|>"),
    "mask": ("<mask>", "[MASK]"),
    "cls": ("<cls>", "[CLS]"),
    "sep": ("<sep>", "[SEP]"),
}


class HuggingFaceTokenizer:
    """A `tokenizers` tokenizer. Special tokens are those its folder names, else the usual names."""

    def __init__(self, backend: Backend, named: dict[str, str]) -> None:
        """`named`: kind ("pad", "eos", ...) to token, for those that are known."""
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # "</s>" in a document is text, not the end of it
        self._named = named
        self.chat_template: str | None = None
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.pad_id = self._id("pad")
        self.unk_id = self._id("unk")
        self.bos_id = self._id("bos")
        self.eos_id = self._id("eos")
        self.mask_id = self._id("mask")
        self.cls_id = self._id("cls")
        self.sep_id = self._id("sep")
        self.sentinel_ids = find_sentinels(backend.token_to_id)
        self.fingerprint = hashlib.sha256(json.dumps([backend.to_str(), named], sort_keys=True).encode()).hexdigest()

    @cached_property
    def _words(self) -> Words | None:
        # Only for a corpus: to read a large vocabulary's JSON takes a third of the time of loading it.
        splitter = splitter_of(self._backend, json.loads(self._backend.to_str()))
        return None if splitter is None else Words(splitter, self._encode_whole, apart=True)

    def _cut(self, text: str) -> list[str]:
        if len(text) <= PART:
            return [text]
        return cut(text, PART) if self._words is None else cut_at_space(text, PART)

    def _id(self, kind: str) -> int | None:
        names = (self._named[kind],) if kind in self._named else NAMES[kind]
        found = (self._backend.token_to_id(name) for name in names)
        return next((i for i in found if i is not None), None)

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""
        parts = [self._cut(text) for text in texts]
        found = self._encode_whole([part for text in parts for part in text])
        return [[i for _ in text for i in next(found)] for text in parts]

    def _encode_whole(self, texts: list[str]) -> Iterator[list[int]]:
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return (one.ids for one in encoded)

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Ids of several texts as arrays; many times faster where the tokenizer is one that `splitter_of` knows."""
        if self._words is None:
            return [np.array(ids, np.int32) for ids in self.encode_batch(texts)]
        return self._words.encode([self._cut(text) for text in texts])

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and the characters of each; accents that a piece drops may be left out."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for part in self._cut(text):
            found = self._backend.encode(part, add_special_tokens=False)
            ids += found.ids
            offsets += [(at + begin, at + end) for begin, end in found.offsets]
            at += len(part)
        return ids, offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, as near to the original as the tokenizer keeps it."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def word_starts(self) -> NDArray[np.bool_]:
        """WordPiece: what does not begin with ##. Others: by the first character (byte-level: Ġ is a space)."""
        special = self.special_ids()
        wordpiece = json.loads(self._backend.to_str())["model"]["type"] == "WordPiece"
        starts = np.ones(self.vocab_size, dtype=np.bool_)
        for piece, i in self._backend.get_vocab(with_added_tokens=True).items():
            if i not in special:
                starts[i] = not piece.startswith("##") if wordpiece else piece[:1] in "ĠĊĉ" or begins_word(piece)
        return starts

    def special_ids(self) -> frozenset[int]:
        """The ids named above and all added tokens marked special."""
        named = (self.pad_id, self.unk_id, self.bos_id, self.eos_id, self.mask_id, self.cls_id, self.sep_id)
        added = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        return frozenset(i for i in named if i is not None) | added

    def special_tokens(self) -> dict[str, int]:
        """All added tokens marked special."""
        return {token.content: i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and the names of the special tokens."""
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"))
        names = {f"{kind}_token": token for kind, token in self._named.items()}
        (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=1, sort_keys=True))
        save_template(self.chat_template, folder)


def train_wordpiece(texts: Iterable[str], section: WordPieceSection, folder: Path) -> int:
    """Train on the texts and write `folder/tokenizer.json`; how many pieces there are, at most those asked for."""
    tokenizer = BertWordPieceTokenizer(lowercase=section.lowercase)
    special = [NAMES[kind][1] for kind in ("pad", "unk", "cls", "sep", "mask")] + ["[EOS]"]
    tokenizer.train_from_iterator(texts, vocab_size=section.vocab_size, special_tokens=special, show_progress=False)
    HuggingFaceTokenizer(Backend.from_str(tokenizer.to_str()), {}).save(folder)
    return int(tokenizer.get_vocab_size())


def load_huggingface(path: Path) -> HuggingFaceTokenizer:
    """A tokenizer.json, a vocab.txt, or a folder with one of them or with any other tokenizer of `transformers`.

    Raises UserError when the path holds none of these.
    """
    folder, file = (path, path / "tokenizer.json") if path.is_dir() else (path.parent, path)
    if path.is_dir() and not file.is_file():
        file = path / "vocab.txt"
    settings = _settings(folder)
    named = _named(settings)
    if file.name.endswith(".json") and file.is_file():
        try:
            return HuggingFaceTokenizer(Backend.from_buffer(file.read_bytes()), named)
        except ValueError as error:
            raise UserError(f"{file}: not a tokenizer of the `tokenizers` library ({error})") from error
    if file.name.endswith(".txt") and file.is_file():
        return HuggingFaceTokenizer(_wordpiece(file, settings), named)
    if not path.is_dir():
        raise UserError(f"tokenizer.path {path}: neither .model, tokenizer.json, vocab.txt nor a folder")
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(f"tokenizer.path {path}: no tokenizer that `transformers` can load ({first_line})") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise UserError(
            f"tokenizer.path {path}: this tokenizer has no tokenizer.json form; save one with `transformers`"
        )
    return HuggingFaceTokenizer(Backend.from_str(backend.to_str()), named)


def _wordpiece(file: Path, settings: dict[str, Any]) -> Backend:
    """BERT's tokenizer over a vocabulary of one piece a line."""
    pieces = file.read_text(encoding="utf-8").split("\n")
    vocabulary = {piece: i for i, piece in enumerate(pieces) if piece}
    if "[UNK]" not in vocabulary:
        raise UserError(f"{file}: no WordPiece vocabulary ([UNK] is not in it)")
    # Where no setting says so, a vocabulary without capitals is an uncased one.
    uncased = not any(piece != piece.lower() for piece in vocabulary if not piece.startswith("["))
    return Backend.from_str(
        BertWordPieceTokenizer(vocabulary, lowercase=settings.get("do_lower_case", uncased)).to_str()
    )


def _settings(folder: Path) -> dict[str, Any]:
    """What a `transformers` folder says beside the vocabulary."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                settings.update(json.loads((folder / name).read_text(encoding="utf-8")))
            except ValueError as error:
                raise UserError(f"{folder / name}: not JSON ({error})") from error
    return settings


def _named(settings: dict[str, Any]) -> dict[str, str]:
    """Kind to token, from keys such as eos_token, whose value is a string or {"content": string}."""
    named = {}
    for kind in NAMES:
        token = settings.get(f"{kind}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            named[kind] = token
    return named
