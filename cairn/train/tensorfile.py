"""Files of a checkpoint: safetensors, hashed as they are written and verified before they are read."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cairn.train.folder import write_whole

PIECE_BYTES = 4 << 30  # a file of a checkpoint holds at most this much (or one tensor)

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Damaged(Exception):
    """A checkpoint that is not what was written; the message names the file and what differs."""


def pieces(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Group tensors so that no file passes PIECE_BYTES (unless one tensor does)."""
    piece: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if piece and size + tensor.nbytes > PIECE_BYTES:
            yield piece
            piece, size = {}, 0
        piece[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    if piece:
        yield piece


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write one safetensors file, hashing on the way; returns its entry in state.json.

    Written here rather than by `safetensors` because that would take a second pass to hash, and hides the errno.
    """
    # Wide types first keeps every tensor aligned in the mapping.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in ordered:
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    check_space(path.parent, offset)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for view in (memoryview(len(head).to_bytes(8, "little") + head), *(_raw(tensor) for _, tensor in ordered)):
            digest.update(view)
            write_whole(file, view)
        os.fsync(file.fileno())
    return {"bytes": 8 + len(head) + offset, "sha256": digest.hexdigest(), "tensors": list(header)}


def check_space(folder: Path, needed: int) -> None:
    """Raise the OSError of a full disk, with the numbers, before `needed` bytes are written into a folder."""
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < needed:  # a total of 0: a file system that does not say
        raise OSError(errno.ENOSPC, f"{folder} needs {needed:,} bytes, {usage.free:,} are free")


def _raw(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def verify(path: Path, entry: dict[str, Any]) -> None:
    """Check a file against its entry in state.json; raises Damaged saying what differs."""
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise Damaged(f"{path}: {size:,} bytes instead of {entry['bytes']:,}")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror}") from error
    if found != entry["sha256"]:
        raise Damaged(f"{path}: sha256 {found[:12]}... instead of {entry['sha256'][:12]}...")
