"""What a tokenizer is, the bytes tokenizer, and loading one from files."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from cairn.errors import UserError

SPECIALS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>", "<cls>", "<sep>")
"""Special tokens of the tokenizers made here, with ids 0 to 6."""

BYTES_FILE = "bytes.txt"
TEMPLATE_FILE = "chat_template.jinja"


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. Ids that a tokenizer lacks are None; who needs one says so."""

    vocab_size: int
    pad_id: int | None
    unk_id: int | None
    bos_id: int | None
    eos_id: int | None
    mask_id: int | None
    cls_id: int | None
    sep_id: int | None
    sentinel_ids: tuple[int, ...]
    """T5's <extra_id_0>, <extra_id_1>, ..., each of which stands for a hidden span; none, where there are none."""
    fingerprint: str
    """sha256 of what defines it: two tokenizers with the same fingerprint are the same."""
    chat_template: str | None
    """How conversations are written, in Jinja, as `transformers` keeps it; most have none."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens; text that looks like a special token is plain text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, faster than one by one."""
        ...

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """What `encode_batch` gives as arrays (ids,): the way to encode a corpus, slow to begin and then fast."""
        ...

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """What `encode` gives, and the characters of the text [begin, end) that each id stands for.

        Ids that share a character each have it, or all but the last of them have nothing of it.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens have none."""
        ...

    def word_starts(self) -> NDArray[np.bool_]:
        """(vocab_size,): whether a piece begins a word. Punctuation, white space and special tokens do."""
        ...

    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text."""
        ...

    def special_tokens(self) -> dict[str, int]:
        """Those of them that have a name, as chat templates write it."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer(folder)` reads."""
        ...


class BytesTokenizer:
    """The seven special tokens, then the 256 byte values: id = byte + 7. Exact on any text."""

    vocab_size: int = len(SPECIALS) + 256
    pad_id: int | None = 0
    unk_id: int | None = 1
    bos_id: int | None = 2
    eos_id: int | None = 3
    mask_id: int | None = 4
    cls_id: int | None = 5
    sep_id: int | None = 6
    sentinel_ids: tuple[int, ...] = ()
    fingerprint = hashlib.sha256(b"cairn bytes 1").hexdigest()
    chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        """Byte values of the UTF-8 text, shifted past the special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """`encode` of each, as arrays."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) + len(SPECIALS) for text in texts]

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Each byte with its character."""
        offsets = [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]
        return self.encode(text), offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 (a model may write such) become U+FFFD."""
        values = np.asarray(ids, dtype=np.int64) - len(SPECIALS)
        return values[(values >= 0) & (values < 256)].astype(np.uint8).tobytes().decode(errors="replace")

    def word_starts(self) -> NDArray[np.bool_]:
        """True for special tokens and for ASCII that is no letter, digit or underscore."""
        texts = [chr(byte) if byte < 128 else "x" for byte in range(256)]
        return np.array([True] * len(SPECIALS) + [begins_word(text) for text in texts])

    def special_ids(self) -> frozenset[int]:
        """0 to 6."""
        return frozenset(range(len(SPECIALS)))

    def special_tokens(self) -> dict[str, int]:
        """All seven."""
        return {name: i for i, name in enumerate(SPECIALS)}

    def save(self, folder: Path) -> None:
        """Write a file that marks the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BYTES_FILE).write_text("The 256 byte values; id = byte + 7, after the special tokens.\n")
        save_template(self.chat_template, folder)


def find_sentinels(find: Callable[[str], int | None]) -> tuple[int, ...]:
    """Ids of <extra_id_0>, <extra_id_1>, ..., as many as `find` knows."""
    found: list[int] = []
    while (number := find(f"<extra_id_{len(found)}>")) is not None:
        found.append(number)
    return tuple(found)


def begins_word(text: str) -> bool:
    """Whether a piece with this text begins a word, rather than going on with one."""
    return not (text[:1].isalnum() or text[:1] == "_")


def cut(text: str, limit: int) -> list[str]:
    """`text` in parts of at most `limit` characters, each cut after the last line end there is, if any.

    What encoders take at once: their memory is many times the text they are given.
    """
    if len(text) <= limit:
        return [text]
    parts, start = [], 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or start + limit
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer from a folder written by `save`, a SentencePiece .model, a `tokenizers` tokenizer.json, a WordPiece
    vocab.txt or a `transformers` folder.

    Raises UserError when there is none, or when it is damaged.
    """
    tokenizer = _load(path)
    if path.is_dir():
        tokenizer.chat_template = read_template(path)
    return tokenizer


def _load(path: Path) -> Tokenizer:
    from cairn.data.huggingface import load_huggingface
    from cairn.data.sentencepiece import SentencePieceTokenizer

    if path.is_dir():
        if (path / BYTES_FILE).is_file():
            return BytesTokenizer()
        if (path / "tokenizer.json").is_file() or not (path / "tokenizer.model").is_file():
            return load_huggingface(path)
        return SentencePieceTokenizer(path / "tokenizer.model")
    if not path.is_file():
        raise UserError(f"tokenizer.path {path}: there is no such file or folder")
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    return load_huggingface(path)


def save_template(template: str | None, folder: Path) -> None:
    """Write a chat template where `transformers` has it, if there is one."""
    if template is not None:
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")


def read_template(folder: Path) -> str | None:
    """The chat template of a folder; of several, the one named "default". Raises UserError for JSON that is none."""
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    file = folder / "tokenizer_config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("chat_template") if file.is_file() else None
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    if isinstance(found, list):
        found = next((one["template"] for one in found if one["name"] == "default"), None)
    return found if isinstance(found, str) else None
