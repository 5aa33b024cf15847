"""A Megatron-LM .bin/.idx prefix as a source: used where it lies, its last documents held out."""

import hashlib
from pathlib import Path

import numpy as np

from cairn.config.data import SourceSection
from cairn.data.manifest import MegatronInfo, SourceInfo, SplitName
from cairn.data.shards import Shard, TokenStream, Window, bin_path, idx_path
from cairn.errors import UserError

BLOCK = 1 << 24  # tokens looked at, at once


def state(prefix: Path) -> list[str]:
    """What tells this pair from another state of it."""
    found = [(file, file.stat()) for file in (bin_path(prefix), idx_path(prefix))]
    return [f"{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in found]


def describe(section: SourceSection, prefix: Path, held_out: float, vocab_size: int) -> SourceInfo:
    """Counts and split of a prefix; reads all its tokens once.

    Raises UserError for damage, fewer than two documents, or an id outside the vocabulary.
    """
    shard = Shard(prefix)
    if shard.n_documents < 2:
        raise UserError(
            f"{bin_path(prefix)}: {shard.n_documents} documents, and two are needed: to train on, and to hold out"
        )
    for start in range(0, shard.n_tokens, BLOCK):
        block = shard.tokens[start : start + BLOCK]
        if int(block.max()) >= vocab_size or int(block.min()) < 0:
            wrong = int(np.argmax((block >= vocab_size) | (block < 0)))
            raise UserError(
                f"{bin_path(prefix)}: token {start + wrong} is {int(block[wrong])}, and the tokenizer has {vocab_size} "
                "ids: give the tokenizer that made it as tokenizer.path"
            )
    first_valid = min(max(1, round(shard.n_documents * (1 - held_out))), shard.n_documents - 1)
    index_sha256 = hashlib.sha256(idx_path(prefix).read_bytes()).hexdigest()
    size = bin_path(prefix).stat().st_size
    info = MegatronInfo(
        prefix=str(prefix),
        size=size,
        index_sha256=index_sha256,
        documents=shard.n_documents,
        first_valid=first_valid,
        train_tokens=shard.start(first_valid),
        valid_tokens=shard.n_tokens - shard.start(first_valid),
    )
    sha256 = hashlib.sha256(f"{index_sha256} {size}".encode()).hexdigest()
    return SourceInfo(
        source=section.source, weight=section.weight, files=2, split="position", sha256=sha256, megatron=info
    )


def stream(info: MegatronInfo, split: SplitName) -> TokenStream:
    """One split of a prefix. Raises UserError when it is no longer as long as it was."""
    shard = Shard(Path(info.prefix))
    if (shard.n_documents, bin_path(shard.prefix).stat().st_size) != (info.documents, info.size):
        raise UserError(f"{bin_path(shard.prefix)}: changed since it was prepared; run cairn prepare CONFIG again")
    bounds = (0, info.first_valid) if split == "train" else (info.first_valid, info.documents)
    return TokenStream([Window(shard, *bounds)])
