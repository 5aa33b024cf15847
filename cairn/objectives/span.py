"""Span denoising (T5, arXiv 1910.10683): a decoder writes down the spans that are hidden from an encoder."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cairn.config.data import SpanSection
from cairn.data.batches import IGNORE, Batch, Item
from cairn.data.order import mix
from cairn.data.tokenizer import Tokenizer
from cairn.errors import UserError
from cairn.objectives.base import Model, Split, Windows, targets
from cairn.objectives.base import Span as Stretch
from cairn.objectives.masked import VALID_SEED

if TYPE_CHECKING:
    from cairn.data.prepare import Prepared


class Span:
    """The objective of T5-like models.

    Raises UserError when the tokenizer lacks an end token, or both sentinels and [MASK].
    """

    def __init__(self, section: SpanSection, tokenizer: Tokenizer) -> None:
        end = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.sep_id
        marked = bool(tokenizer.sentinel_ids) or tokenizer.mask_id is not None
        if end is None or not marked:
            lacking = "<extra_id_0> ... or [MASK]" if end is not None else "</s> or [SEP]"
            raise UserError(
                f"objective.name span needs {lacking}, which the tokenizer ({type(tokenizer).__name__}, "
                f"{tokenizer.vocab_size} tokens) lacks; choose another tokenizer.path or tokenizer.name"
            )
        self.section, self.tokenizer, self.end_id = section, tokenizer, end

    def samples(
        self, prepared: "Prepared", split: Split, seq_len: int, seed: int, document_mask: bool = False
    ) -> "SpanSamples":
        """Stretches of the corpus with spans hidden; `document_mask` is for causal models."""
        n = window_of(self.section, seq_len)
        _, spans = hidden(self.section, n)
        sentinels = self.tokenizer.sentinel_ids
        if sentinels and spans > len(sentinels):
            raise UserError(
                f"data.seq_len {seq_len} has {spans} hidden spans, and the tokenizer {len(sentinels)} sentinels "
                "(<extra_id_0> and so on): lower data.seq_len or raise objective.mean_span"
            )
        windows = Windows(prepared.streams(split), split, n, 0, seed)
        # Held-out spans are the same for every run, so that evaluations compare.
        return SpanSamples(self, windows, mix(VALID_SEED if split == "valid" else seed))

    def weights(self, batch: Batch) -> dict[str, float]:
        """Tokens to write."""
        return {"loss": targets(batch["labels"])}

    def loss_sums(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Their negative log likelihood."""
        padding = batch.get("source_padding")
        loss: Tensor = model(batch["source_ids"], batch["input_ids"], labels=batch["labels"], source_padding=padding)
        return {"loss": loss}


class SpanSamples:
    """Sample k: source_ids (S,), input_ids (T,), labels (T,); of "valid" also source_padding (S,), True where text is,
    since a last window may be short there.

    Source: the window, each span as one sentinel, then the end token. Labels: each sentinel and its span, then the end
    token. input_ids are the labels one further on, after `start_of`. Where a tokenizer has no sentinels, [MASK] stands
    for each of them: spans are told apart by their order. Spans never touch one another. Documents follow each other in
    a window, and an end token between them is a token as others.
    """

    def __init__(self, objective: Span, windows: Windows, seed: int) -> None:
        tokenizer = objective.tokenizer
        self.windows, self.seed, self.section = windows, seed, objective.section
        self.end_id, self.start_id = objective.end_id, start_of(tokenizer)
        self.n_source, self.n_target, spans = lengths(self.section, windows.stride)
        self.marks = np.array(tokenizer.sentinel_ids[:spans] or [tokenizer.mask_id] * spans, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.windows)

    def spans(self, k: int) -> list[Stretch]:
        """The window of sample k, nothing of it hidden."""
        return [self.windows.span(*self.windows.locate(k), self.windows.stride)]

    def item(self, k: int) -> Item:
        """Sample k."""
        tokens = self.windows.read(self.spans(k)[0]).astype(np.int64)
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, k], dtype=np.uint64)))
        source, target = self._hide(tokens, rng)
        out: Item = {
            "source_ids": np.full(self.n_source, self.start_id, dtype=np.int64),
            "input_ids": np.full(self.n_target, self.start_id, dtype=np.int64),
            "labels": np.full(self.n_target, IGNORE, dtype=np.int64),
        }
        out["source_ids"][: len(source)] = source
        out["input_ids"][1 : len(target)] = target[:-1]
        out["labels"][: len(target)] = target
        if self.windows.split == "valid":
            out["source_padding"] = np.arange(self.n_source) < len(source)
        return out

    def _hide(self, tokens: NDArray[np.int64], rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and target of a window."""
        count, n = hidden(self.section, len(tokens))
        sizes = parts(count, n, rng)
        gaps = parts(len(tokens) - count + 2, n + 1, rng) - (np.arange(n + 1) % n == 0)  # the outer ones may be empty
        starts = np.cumsum(gaps[:n] + np.append(0, sizes[:-1]))
        inside = np.zeros(len(tokens), dtype=bool)
        inside[np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(count)] = True
        marked, kept = tokens.copy(), ~inside
        marked[starts], kept[starts] = self.marks[:n], True
        target = np.insert(tokens[inside], np.cumsum(sizes) - sizes, self.marks[:n])
        return np.append(marked[kept], self.end_id), np.append(target, self.end_id)


def start_of(tokenizer: Tokenizer) -> int:
    """What a decoder reads before its first token: T5's padding token, else the end of what was before."""
    found = (tokenizer.pad_id, tokenizer.eos_id, tokenizer.sep_id)
    return next((number for number in found if number is not None), 0)


def hidden(section: SpanSection, n: int) -> tuple[int, int]:
    """Of n tokens: how many to hide, and in how many spans."""
    count = max(1, round(section.mask_prob * n))
    return count, min(max(1, round(count / section.mean_span)), n - count + 1)


def lengths(section: SpanSection, n: int) -> tuple[int, int, int]:
    """Tokens of the source and of the target that n tokens make, and their spans."""
    count, spans = hidden(section, n)
    return n - count + spans + 1, count + spans + 1, spans


def window_of(section: SpanSection, seq_len: int) -> int:
    """The most tokens whose source and target both fit. Raises UserError where not even two do."""
    n = 1
    while max(lengths(section, n + 1)[:2]) <= seq_len:
        n += 1
    if n == 1:
        raise UserError(f"data.seq_len {seq_len} leaves no room beside the special tokens: raise it")
    return n


def parts(n: int, k: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """n as a sum of k positive numbers (k,), any such sum as likely as another."""
    cuts = np.sort(rng.permutation(n - 1)[: k - 1]) + 1
    return np.diff(cuts, prepend=0, append=n)
