"""The sample of a corpus that a tokenizer is trained on."""

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cairn.config.data import SentencePieceSection, WordPieceSection
from cairn.data.corpus import Part, documents
from cairn.data.encode import Split, digest_of, place
from cairn.data.huggingface import train_wordpiece
from cairn.data.pool import say
from cairn.data.sentencepiece import BLOCK, train_sentencepiece
from cairn.data.tokenizer import cut

FEWEST_UNITS, READ_TIMES = 32, 8  # units read for a sample: at least so many, and so many times its size

Corpus = tuple[Sequence[Sequence[Part]], str, Split]
"""Units, text field and split of a source."""


def train_on_sample(corpora: Sequence[Corpus], section: SentencePieceSection | WordPieceSection, folder: Path) -> None:
    """Train on blocks of training text spread over the sources in proportion to their size."""
    wanted = section.sample_mb * 1e6
    total = sum(_size(units) for units, _, _ in corpora) or 1
    texts = (text for corpus in corpora for text in sample(corpus, wanted * _size(corpus[0]) / total))
    train_on_texts(texts, section, folder)


def train_on_texts(texts: Iterable[str], section: SentencePieceSection | WordPieceSection, folder: Path) -> None:
    """Train on the texts and write what `load_tokenizer(folder)` reads. Raises UserError when they are too few."""
    started, size = time.perf_counter(), section.vocab_size
    if isinstance(section, SentencePieceSection):
        train_sentencepiece(texts, section, folder)
    else:
        size = train_wordpiece(texts, section, folder)
    say(f"trained a tokenizer of {size:,} pieces in {time.perf_counter() - started:.1f} s")


def sample(corpus: Corpus, wanted: float) -> Iterator[str]:
    """About `wanted` bytes of training text: blocks of lines chosen by their hash, in units spread over the source."""
    units, field, split = corpus
    count = max(FEWEST_UNITS, -(-READ_TIMES * int(wanted) * len(units) // max(1, _size(units))))
    step = max(1.0, len(units) / count)
    chosen = [units[int(i * step)] for i in range(min(count, len(units)))]
    share = wanted / max(1, _size(chosen))
    taken = 0
    for part in (part for unit in chosen for part in unit):
        for document in documents(part, field):
            text, _ = split.parts(document, digest_of(document))
            for block in cut(text, BLOCK):
                data = block.encode()
                if block and (share >= 1 or place(hashlib.blake2b(data).digest()) < share):
                    yield block
                    taken += len(data)
            if taken > 2 * wanted:  # compressed files held more than was thought
                return


def _size(units: Sequence[Sequence[Part]]) -> int:
    return sum(part.size for unit in units for part in unit)
