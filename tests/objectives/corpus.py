"""A small corpus on disk and a small tokenizer, for tests of objectives."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cairn.data.shards import ShardWriter, TokenStream

PAD, UNK, BOS, EOS, MASK, CLS, SEP = range(7)
VOCAB = 1000


@dataclass
class Words:
    """Ids from 7 on are pieces; every third begins a word."""

    vocab_size: int = VOCAB
    pad_id: int | None = PAD
    unk_id: int | None = UNK
    bos_id: int | None = BOS
    eos_id: int | None = EOS
    mask_id: int | None = MASK
    cls_id: int | None = CLS
    sep_id: int | None = SEP
    sentinel_ids: tuple[int, ...] = ()
    fingerprint: str = "words"

    def special_ids(self) -> frozenset[int]:
        return frozenset(range(7))

    def word_starts(self) -> NDArray[np.bool_]:
        return np.arange(self.vocab_size) % 3 == 1


@dataclass
class Corpus:
    """What objectives use of a prepared corpus."""

    train: list[tuple[TokenStream, float]]
    valid: list[tuple[TokenStream, float]] = field(default_factory=list)

    def streams(self, split: str) -> list[tuple[TokenStream, float]]:
        return self.train if split == "train" else self.valid


def stream(folder: Path, documents: list[list[int]], shards: int = 1) -> TokenStream:
    """Documents, each to be ended by EOS here, in files."""
    folder.mkdir(parents=True, exist_ok=True)
    prefixes = [folder / f"shard-{number}" for number in range(shards)]
    share = -(-len(documents) // shards)
    for number, prefix in enumerate(prefixes):
        with ShardWriter(prefix, VOCAB) as writer:
            for document in documents[number * share : (number + 1) * share]:
                writer.add([*document, EOS])
    return TokenStream.open(prefixes)


def random_documents(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(7, VOCAB, n).tolist() for n in lengths]


def counting_documents(lengths: list[int]) -> list[list[int]]:
    """Tokens that count on through all documents, so that what follows what is plain."""
    starts = np.cumsum([0, *lengths])
    return [list(range(7 + int(a), 7 + int(b))) for a, b in pairwise(starts)]
