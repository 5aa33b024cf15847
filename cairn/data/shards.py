"""Token shards in Megatron-LM's `.bin` / `.idx` layout, version 1: written in a stream, read by memory map.

`PREFIX.bin` is the token ids of all documents, one after the other. `PREFIX.idx` is, little-endian:

    9 bytes  b"MMIDIDX\\0\\0"          8 bytes  version (1)           1 byte  dtype code of the ids
    8 bytes  number of sequences S   8 bytes  number of document indices D + 1
    S x int32  tokens of each sequence     S x int64  byte offset of each sequence in the .bin
    (D + 1) x int64  first sequence of each document, and S at the end

We write one sequence a document; files of others may hold several, and a column of modes at the end, which is ignored.
"""

import contextlib
import hashlib
import os
import resource
import socket
import struct
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from cairn.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
LONGEST_SEQUENCE = 2**31 - 1  # lengths are int32: a longer document becomes several sequences


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """The narrowest type of the layout that holds every id of a vocabulary of this size."""
    return np.uint16 if vocab_size < 65_536 else np.int32


def bin_path(prefix: Path) -> Path:
    """Where the ids of a shard are."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Where the index of a shard is."""
    return prefix.with_name(prefix.name + ".idx")


def temporary(path: Path) -> Path:
    """A name beside `path` that no other process on any host of a shared file system uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


class ShardWriter:
    """Writes one shard in a stream; both files appear under their names, synced, when the `with` block ends well.

    Memory: 12 bytes a document. `sha256` is that of the .bin once closed.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self.n_tokens = 0
        self.sha256 = ""
        self._lengths = array("i")
        self._documents = array("q", [0])
        self._hash = hashlib.sha256()
        self._bin: IO[bytes] = temporary(bin_path(prefix)).open("wb")

    @property
    def n_documents(self) -> int:
        """Documents added so far."""
        return len(self._documents) - 1

    def add(self, ids: Sequence[int] | NDArray[Any]) -> None:
        """Append one document (its end-of-text token included)."""
        tokens = np.asarray(ids, dtype=self.dtype)
        data = tokens.tobytes()
        self._bin.write(data)
        self._hash.update(data)
        self.n_tokens += len(tokens)
        self._lengths.extend(
            min(LONGEST_SEQUENCE, len(tokens) - start) for start in range(0, len(tokens), LONGEST_SEQUENCE)
        )
        self._documents.append(len(self._lengths))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        partial_bin, partial_idx = temporary(bin_path(self.prefix)), temporary(idx_path(self.prefix))
        try:
            with self._bin:
                if kind is None:
                    sync(self._bin)
            if kind is None:
                with partial_idx.open("wb") as file:
                    self._write_index(file)
                    sync(file)
                partial_bin.replace(bin_path(self.prefix))
                partial_idx.replace(idx_path(self.prefix))
                self.sha256 = self._hash.hexdigest()
        finally:
            for partial in (partial_bin, partial_idx):
                partial.unlink(missing_ok=True)

    def _write_index(self, file: IO[bytes]) -> None:
        code = next(code for code, dtype in DTYPES.items() if self.dtype == np.dtype(dtype))
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self.dtype.itemsize
        file.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(self._documents)))
        for column in (lengths.astype("<i4"), pointers, np.frombuffer(self._documents, dtype=np.int64).astype("<i8")):
            file.write(column.tobytes())


def sync(file: IO[bytes]) -> None:
    """Flush to the disk, where the file system can."""
    file.flush()
    with contextlib.suppress(OSError):
        os.fsync(file.fileno())


def index_size(n_sequences: int, n_documents: int) -> int:
    """Bytes of an .idx without modes."""
    return HEADER.size + 12 * n_sequences + 8 * (n_documents + 1)


def allow_many_files() -> None:
    """Let this process open as many files as it may: a memory map keeps its file open, a large corpus has thousands
    of shards, and the usual soft limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Shard:
    """One .bin / .idx pair, memory mapped.

    Raises UserError naming the file when it is missing, not of this layout, or shorter than its index says.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        remedy = "prepare the corpus again (cairn prepare CONFIG), or copy the file again"
        bin_file, idx_file = bin_path(prefix), idx_path(prefix)
        for file in (bin_file, idx_file):
            if not file.is_file():
                raise UserError(f"{file}: this shard is missing; {remedy}")
        with idx_file.open("rb") as stream:
            header = stream.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise UserError(f"{idx_file}: not a Megatron index (MMIDIDX); {remedy}")
        _, version, code, n_sequences, n_indices = HEADER.unpack(header)
        if version != 1 or code not in DTYPES or n_indices < 1:
            raise UserError(f"{idx_file}: version {version} with token type {code} cannot be read; {remedy}")
        self.dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        self.n_documents: int = n_indices - 1
        size, wanted = idx_file.stat().st_size, index_size(n_sequences, self.n_documents)
        if size < wanted:
            raise UserError(f"{idx_file}: truncated ({size} bytes of {wanted}); {remedy}")

        index = np.memmap(idx_file, mode="r", dtype=np.uint8)
        after_lengths = HEADER.size + 4 * n_sequences
        after_pointers = after_lengths + 8 * n_sequences
        self._pointers = index[after_lengths:after_pointers].view("<i8")
        self._documents = index[after_pointers:wanted].view("<i8")
        end = 0
        if n_sequences:
            last_length = int(index[after_lengths - 4 : after_lengths].view("<i4")[0])
            end = int(self._pointers[-1]) + last_length * self.dtype.itemsize
        self._n_sequences: int = n_sequences
        self.n_tokens = end // self.dtype.itemsize
        size = bin_file.stat().st_size
        if size < end:
            raise UserError(f"{bin_file}: truncated ({size} bytes, its index says {end}); {remedy}")
        self.tokens: NDArray[Any] = (  # an empty file cannot be mapped
            np.memmap(bin_file, mode="r", dtype=self.dtype, shape=(self.n_tokens,)) if end else np.empty(0, self.dtype)
        )

    def start(self, document: int) -> int:
        """Token at which a document begins; for `n_documents`, the number of tokens."""
        sequence = int(self._documents[document])
        return self.n_tokens if sequence >= self._n_sequences else int(self._pointers[sequence]) // self.dtype.itemsize


@dataclass(frozen=True)
class Window:
    """A run of whole documents [first, last) of a shard."""

    shard: Shard
    first: int
    last: int


class TokenStream:
    """All tokens of one split, end to end, over any number of shards; constant memory, however long.

    `n_bytes` is the UTF-8 length of the text, 0 when it is not known.
    """

    def __init__(self, windows: Sequence[Window], n_bytes: int = 0) -> None:
        self.n_bytes = n_bytes
        self._windows = [window for window in windows if window.last > window.first]
        self._offsets = [0]  # first token of each window in the stream
        self._documents = [0]  # first document of each window in the stream
        self._origins = [window.shard.start(window.first) for window in self._windows]
        for window, origin in zip(self._windows, self._origins, strict=True):
            self._offsets.append(self._offsets[-1] + window.shard.start(window.last) - origin)
            self._documents.append(self._documents[-1] + window.last - window.first)
        self.n_tokens = self._offsets[-1]
        self.n_documents = self._documents[-1]

    @classmethod
    def open(cls, prefixes: Sequence[Path], n_bytes: int = 0) -> Self:
        """The concatenation of whole shards. Raises UserError as Shard does."""
        shards = [Shard(prefix) for prefix in prefixes]
        return cls([Window(shard, 0, shard.n_documents) for shard in shards], n_bytes)

    def read(self, start: int, stop: int) -> NDArray[np.int32]:
        """Tokens [start, stop), a fresh array of shape (stop - start,). Raises IndexError outside [0, n_tokens]."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.n_tokens}")
        out = np.empty(stop - start, dtype=np.int32)
        at = bisect_right(self._offsets, start) - 1
        done = 0
        while done < len(out):
            window, offset, end = self._windows[at], self._offsets[at], self._offsets[at + 1]
            take = min(end, stop) - (start + done)
            source = start + done - offset + self._origins[at]
            out[done : done + take] = window.shard.tokens[source : source + take]
            done += take
            at += 1
        return out

    def document_at(self, token: int) -> int:
        """The document that holds a token, in O(log documents). Raises IndexError outside [0, n_tokens)."""
        if not 0 <= token < self.n_tokens:
            raise IndexError(f"token {token} of {self.n_tokens}")
        at = bisect_right(self._offsets, token) - 1
        window = self._windows[at]
        inside = token - self._offsets[at] + self._origins[at]
        found = bisect_right(range(window.first, window.last), inside, key=window.shard.start) - 1
        return self._documents[at] + found

    def shard_of(self, document: int) -> tuple[Shard, int]:
        """The shard of a document and its number there. Raises IndexError outside [0, n_documents)."""
        if not 0 <= document < self.n_documents:
            raise IndexError(f"document {document} of {self.n_documents}")
        at = bisect_right(self._documents, document) - 1
        window = self._windows[at]
        return window.shard, window.first + document - self._documents[at]

    def document_bounds(self, document: int) -> tuple[int, int]:
        """First token of a document and the one after its last. Raises IndexError outside [0, n_documents)."""
        if not 0 <= document < self.n_documents:
            raise IndexError(f"document {document} of {self.n_documents}")
        at = bisect_right(self._documents, document) - 1
        window, shift = self._windows[at], self._offsets[at] - self._origins[at]
        inside = window.first + document - self._documents[at]
        return window.shard.start(inside) + shift, window.shard.start(inside + 1) + shift
