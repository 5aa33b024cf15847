"""What a prepared folder holds; `manifest.json` is written last, so a folder that has one is whole."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cairn.data.shards import temporary
from cairn.errors import UserError

FORMAT = 1
FILE = "manifest.json"

SplitName = Literal["train", "valid"]


class Record(BaseModel):
    """Frozen, and strict about what it reads back."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SplitInfo(Record):
    """One split of a unit: the shard UNIT.SPLIT.bin / .idx."""

    documents: int
    tokens: int
    bytes: int
    """UTF-8 bytes of the text."""
    sha256: str
    """Of the .bin."""


class UnitInfo(Record):
    """A unit of work: two shards, and the text of the held-out one."""

    name: str
    empty: int
    """Empty documents, passed over."""
    sha256: str
    """Of the documents."""
    train: SplitInfo
    valid: SplitInfo


class MegatronInfo(Record):
    """A Megatron prefix that is used where it lies: documents from `first_valid` on are held out."""

    prefix: str
    size: int
    """Bytes of the .bin."""
    index_sha256: str
    documents: int
    first_valid: int
    train_tokens: int
    valid_tokens: int


class SourceInfo(Record):
    """One source of a blend."""

    source: str
    weight: float
    files: int
    split: Literal["document", "position"]
    """Held out by hash of the document; or, of a single document or a Megatron prefix, the last share."""
    sha256: str
    """Of all documents."""
    units: list[UnitInfo] = []
    megatron: MegatronInfo | None = None

    @property
    def empty(self) -> int:
        """Empty documents, passed over."""
        return sum(unit.empty for unit in self.units)

    def documents(self, split: SplitName) -> int:
        """Documents of a split."""
        if self.megatron:
            held_out = self.megatron.documents - self.megatron.first_valid
            return held_out if split == "valid" else self.megatron.first_valid
        return sum(getattr(unit, split).documents for unit in self.units)

    def tokens(self, split: SplitName) -> int:
        """Tokens of a split."""
        if self.megatron:
            return self.megatron.valid_tokens if split == "valid" else self.megatron.train_tokens
        return sum(getattr(unit, split).tokens for unit in self.units)

    def bytes(self, split: SplitName) -> int:
        """UTF-8 bytes of a split's text; 0 where that is not known (Megatron)."""
        return sum(getattr(unit, split).bytes for unit in self.units)


class TokenizerInfo(Record):
    """The tokenizer in `tokenizer/`."""

    name: str
    vocab_size: int
    fingerprint: str


class Manifest(Record):
    """All of it."""

    format: int
    base: str = "."
    """Folder of the shards, relative to the manifest: another one where two blends differ in weights alone."""
    held_out: float
    tokenizer: TokenizerInfo
    sources: list[SourceInfo]
    baselines: dict[str, float]
    """Bits per byte of `gzip` -9 and `xz` -9 on the held-out text (its first 16 MiB); empty when there is no text."""
    seconds: float
    """What preparing took."""

    @property
    def fingerprint(self) -> str:
        """sha256 of what training sees: documents, split, weights and tokenizer; not of paths or times."""
        seen = [
            [source.sha256, source.weight, source.split, source.documents("train"), source.documents("valid")]
            for source in self.sources
        ]
        return hashlib.sha256(
            json.dumps([self.format, seen, self.held_out, self.tokenizer.fingerprint]).encode()
        ).hexdigest()

    def total(self, count: Callable[[SourceInfo], int]) -> int:
        """A count summed over sources."""
        return sum(map(count, self.sources))

    def write(self, folder: Path) -> None:
        """Put it in the folder, all at once."""
        write_json(folder / FILE, self)


def write_json(path: Path, record: Record) -> None:
    """Write a record under its name only when whole."""
    partial = temporary(path)
    partial.write_text(record.model_dump_json(indent=1) + "\n")
    partial.replace(path)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, None if it has none. Raises UserError when it cannot be read."""
    path = folder / FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise UserError(f"{path}: not a manifest of this version; remove the folder and prepare again") from error
