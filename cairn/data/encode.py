"""The work of one process: a unit of documents to two shards, and which documents are held out."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cairn.data.corpus import Part, located
from cairn.data.manifest import SplitInfo, UnitInfo, write_json
from cairn.data.origin import Origins
from cairn.data.shards import Shard, ShardWriter, bin_path, sync, temporary
from cairn.data.tokenizer import Tokenizer, load_tokenizer
from cairn.errors import UserError

if TYPE_CHECKING:
    import zstandard

BATCH = 1 << 20  # characters given to the tokenizer at once

# A worker encodes many units with one tokenizer, whose memory of words is worth keeping.
_tokenizer = lru_cache(maxsize=1)(load_tokenizer)


@dataclass(frozen=True)
class Split:
    """Which documents are held out: those whose hash, in [0, 1), is below `cutoff`; or, if `tail`, the end of each."""

    cutoff: float
    held_out: float
    tail: bool = False

    def parts(self, text: str, digest: bytes) -> tuple[str, str]:
        """(training, held-out) text of a document; one of them is empty unless `tail`."""
        if not self.tail:
            return ("", text) if place(digest) < self.cutoff else (text, "")
        at = min(max(1, round(len(text) * (1 - self.held_out))), len(text) - 1)
        at = text.rfind("\n", 0, at) + 1 or at
        return text[:at], text[at:]


def place(digest: bytes) -> float:
    """A hash as a number in [0, 1)."""
    return int.from_bytes(digest[:6], "big") / 2**48


def digest_of(text: str) -> bytes:
    """sha256 of a document."""
    return hashlib.sha256(text.encode()).digest()


def decide_split(texts: Iterable[str], held_out: float, source: str) -> Split:
    """A split of the documents with something on both sides.

    Reads on only until both sides have a document: twenty or so at 5 %. Where one side stays empty the smallest or
    largest hash moves over; a single document is cut in two. Raises UserError when there is no text.
    """
    low, high, count = 2.0, -1.0, 0
    longest = 0
    for text in texts:
        if not text:
            continue
        count += 1
        longest = max(longest, len(text))
        at = place(digest_of(text))
        low, high = min(low, at), max(high, at)
        if low < held_out <= high:
            return Split(held_out, held_out)
    if not count:
        raise UserError(f"data.source {source}: no documents, or empty ones only")
    if low < high:
        return Split(float(np.nextafter(low, 1)) if low >= held_out else high, held_out)
    if longest < 2:
        raise UserError(f"data.source {source}: a single document of one character cannot be split; add text")
    return Split(held_out, held_out, tail=True)


@dataclass(frozen=True)
class Job:
    """A unit of work, and where its results go: PREFIX.train, .valid, .valid.jsonl.zst, .origin.npz and .json."""

    parts: tuple[Part, ...]
    text_field: str
    split: Split
    tokenizer: Path
    prefix: Path

    @property
    def size(self) -> int:
        """Bytes of text, more or less."""
        return sum(part.size for part in self.parts)


def shard_prefix(prefix: Path, split: str) -> Path:
    """Where the shard of a split is."""
    return prefix.with_name(f"{prefix.name}.{split}")


def record_path(prefix: Path) -> Path:
    """Where a finished unit says what it holds."""
    return prefix.with_name(prefix.name + ".json")


def held_out_path(prefix: Path) -> Path:
    """Where the text of held-out documents is, one JSON string a line."""
    return prefix.with_name(prefix.name + ".valid.jsonl.zst")


def check_unit(prefix: Path, info: UnitInfo, thorough: bool = False) -> None:
    """Raises UserError naming a file of the unit that is missing, truncated or (if thorough) altered."""
    for name in ("train", "valid"):
        found, wanted = Shard(shard_prefix(prefix, name)), getattr(info, name)
        file = bin_path(found.prefix)
        if (found.n_tokens, found.n_documents) != (wanted.tokens, wanted.documents):
            raise UserError(f"{file}: not the shard of this manifest; prepare the corpus again (cairn prepare CONFIG)")
        if thorough:
            with file.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != wanted.sha256:
                    raise UserError(f"{file}: altered since it was written; remove it, and prepare the corpus again")
    if not held_out_path(prefix).is_file():
        raise UserError(f"{held_out_path(prefix)}: missing; prepare the corpus again (cairn prepare CONFIG)")


def finished(job: Job) -> UnitInfo | None:
    """What an earlier, interrupted preparation left of this unit, if it is whole to the byte."""
    path = record_path(job.prefix)
    try:
        info = UnitInfo.model_validate_json(path.read_bytes())
        check_unit(job.prefix, info, thorough=True)
    except (FileNotFoundError, ValueError, UserError):
        return None
    return info


def encode_unit(job: Job) -> UnitInfo:
    """Tokenise the unit into its two shards, unless that was done before; memory is one document or a batch of them.

    Each document ends with the tokenizer's end-of-text token (its separator, where it has none).
    """
    import zstandard

    if done := finished(job):
        return done
    record_path(job.prefix).unlink(missing_ok=True)
    text_path = held_out_path(job.prefix)
    with temporary(text_path).open("wb") as text_file:
        with zstandard.ZstdCompressor(level=3).stream_writer(text_file, closefd=False) as held_out:
            info = _encode(job, _tokenizer(job.tokenizer), held_out)
        sync(text_file)
    temporary(text_path).replace(text_path)
    write_json(record_path(job.prefix), info)
    return info


def _encode(job: Job, tokenizer: Tokenizer, held_out: "zstandard.ZstdCompressionWriter") -> UnitInfo:
    end = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.sep_id
    ending = np.array([] if end is None else [end], np.int32)
    size = {"train": 0, "valid": 0}
    empty = 0
    source_hash = hashlib.sha256()
    origins = Origins()
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(ShardWriter(shard_prefix(job.prefix, name), tokenizer.vocab_size))
            for name in size
        }

        def write(batch: list[tuple[str, str]]) -> None:
            for (name, text), ids in zip(batch, tokenizer.encode_arrays([text for _, text in batch]), strict=True):
                writers[name].add(np.concatenate([ids, ending]))
                size[name] += len(text.encode())
                if name == "valid":
                    held_out.write(json.dumps(text).encode() + b"\n")

        batch: list[tuple[str, str]] = []
        waiting = 0
        for line, text in _read(job, origins):
            if not text:
                empty += 1
                continue
            digest = digest_of(text)
            source_hash.update(digest)
            for name, share in zip(size, job.split.parts(text, digest), strict=True):
                if share:
                    origins.add(name, line)
                    batch.append((name, share))
            waiting += len(text)
            if waiting >= BATCH:
                write(batch)
                batch, waiting = [], 0
        write(batch)
    origins.write(job.prefix)
    train, valid = (
        SplitInfo(documents=w.n_documents, tokens=w.n_tokens, bytes=size[name], sha256=w.sha256)
        for name, w in writers.items()
    )
    return UnitInfo(name=job.prefix.name, empty=empty, sha256=source_hash.hexdigest(), train=train, valid=valid)


def _read(job: Job, origins: Origins) -> Iterator[tuple[int, str]]:
    """The documents of a unit with their places, telling `origins` where a part ends."""
    for part in job.parts:
        lines = yield from located(part, job.text_field)
        origins.end_part(part, lines)


def read_held_out(prefix: Path) -> Iterator[str]:
    """The held-out documents of a unit."""
    from cairn.data.readers import opened

    with opened(str(held_out_path(prefix))) as file:
        for line in file:
            yield json.loads(line)
