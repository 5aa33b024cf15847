"""Masked language modelling with next-sentence prediction (BERT, arXiv 1810.04805), or packed (RoBERTa, 1907.11692)."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cairn.config.data import MaskedSection
from cairn.data.batches import IGNORE, Batch, Item
from cairn.data.order import mix
from cairn.data.tokenizer import Tokenizer
from cairn.errors import UserError
from cairn.objectives.base import Model, Span, Split, Windows, targets

if TYPE_CHECKING:
    from cairn.data.prepare import Prepared
    from cairn.data.shards import TokenStream

VALID_SEED = 0x5EED


class Masked:
    """The objective of BERT-like models.

    Raises UserError when the tokenizer lacks [MASK], [CLS] or [SEP].
    """

    def __init__(self, section: MaskedSection, tokenizer: Tokenizer) -> None:
        ids = {"[MASK]": tokenizer.mask_id, "[CLS]": tokenizer.cls_id, "[SEP]": tokenizer.sep_id}
        if missing := [name for name, number in ids.items() if number is None]:
            raise UserError(
                f"objective.name masked needs {', '.join(missing)}, which the tokenizer ({type(tokenizer).__name__}, "
                f"{tokenizer.vocab_size} tokens) lacks; choose another tokenizer.path or tokenizer.name"
            )
        self.section, self.tokenizer = section, tokenizer
        self.masker = Masker(section, tokenizer)

    def samples(
        self, prepared: "Prepared", split: Split, seq_len: int, seed: int, document_mask: bool = False
    ) -> "MaskedSamples":
        """Pairs of spans with `next_sentence`, else packed stretches; `document_mask` is for causal models."""
        special = 3 if self.section.next_sentence else 2
        if seq_len < special + 2:
            raise UserError(f"data.seq_len {seq_len} leaves no room beside the special tokens: raise it")
        windows = Windows(prepared.streams(split), split, seq_len - special, 0, seed)
        # Held-out masks are the same for every run, so that evaluations compare.
        return MaskedSamples(self, windows, seq_len, mix(VALID_SEED if split == "valid" else seed))

    def weights(self, batch: Batch) -> dict[str, float]:
        """Masked tokens, and pairs when there are pairs."""
        out = {"masked": targets(batch["labels"])}
        if "next_sentence_label" in batch:
            out["next_sentence"] = targets(batch["next_sentence_label"])
        return out

    def loss_sums(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Their negative log likelihoods."""
        sums: dict[str, Tensor] = model(
            batch["input_ids"],
            segment_ids=batch["segment_ids"],
            attention_mask=batch["attention_mask"],
            # Not in the model: torch 2.13, compiling it for a CPU, gets the labels of the loss wrong.
            labels=batch["labels"].gather(1, batch["target_positions"]),
            next_sentence_label=batch.get("next_sentence_label"),
            target_positions=batch["target_positions"],
        )
        return sums


class Masker:
    """Chooses the tokens to predict and hides them."""

    def __init__(self, section: MaskedSection, tokenizer: Tokenizer) -> None:
        assert tokenizer.mask_id is not None
        self.prob, self.mask_id = section.mask_prob, tokenizer.mask_id
        self.special = np.zeros(tokenizer.vocab_size, dtype=bool)
        self.special[sorted(tokenizer.special_ids())] = True
        self.ordinary = np.flatnonzero(~self.special)
        self.word_starts = tokenizer.word_starts() if section.whole_word else None

    def count(self, n: int) -> int:
        """How many of n tokens to choose."""
        return max(1, round(self.prob * n))

    def __call__(
        self, tokens: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens (T,) with the chosen ones hidden, and labels (T,): the token where chosen, else ignored.

        Chosen: round(prob x n) of the n tokens that are not special, at least one; with whole words as many words as
        fit into that number. Of the chosen 80 % become [MASK], 10 % a random token that is not special, 10 % stay.
        """
        candidates = np.flatnonzero(~self.special[tokens])
        labels = np.full(len(tokens), IGNORE, dtype=np.int64)
        if not len(candidates):
            return tokens, labels
        count = self.count(len(candidates))
        if self.word_starts is None:
            chosen = rng.permutation(candidates)[:count]
        else:
            chosen = self._whole_words(tokens, candidates, count, rng)
        labels[chosen] = tokens[chosen]
        fate = rng.random(len(chosen))
        random = rng.choice(self.ordinary, len(chosen))
        hidden = tokens.copy()
        hidden[chosen] = np.where(fate < 0.8, self.mask_id, np.where(fate < 0.9, random, tokens[chosen]))
        return hidden, labels

    def _whole_words(
        self, tokens: NDArray[np.int64], candidates: NDArray[np.intp], count: int, rng: np.random.Generator
    ) -> NDArray[np.intp]:
        assert self.word_starts is not None
        # A special token between two pieces ends a word as well.
        starts = self.word_starts[tokens[candidates]] | (np.diff(candidates, prepend=-2) > 1)
        words = np.split(candidates, np.flatnonzero(starts)[1:])
        chosen: list[NDArray[np.intp]] = []
        left = count
        for number in rng.permutation(len(words)):
            if len(words[number]) <= left:
                chosen.append(words[number])
                left -= len(words[number])
        return np.concatenate(chosen or [min(words, key=len)])


class MaskedSamples:
    """Sample k: input_ids, segment_ids, attention_mask (1 = real), labels (T,), target_positions (K,), with pairs
    next_sentence_label ().

    K is the most targets that a sample has, so that the head's work has one shape, known without asking the device;
    where there are fewer, position 0 fills up: [CLS], never a target.

    Pairs: [CLS] A [SEP] B [SEP]. The window of k falls into a document, and is moved to lie within it; A and B are
    cut from there one after the other (label 0), or B, half of the time, from a random place in another document of
    the same source (label 1), chosen like A in proportion to length, so that B itself does not tell. Windows are drawn
    by token, so a document is seen in proportion to its length; one of a single token gives way to the next.
    Packed: [CLS] A [SEP], A going over document ends, each of which is a [SEP].
    """

    def __init__(self, objective: Masked, windows: Windows, seq_len: int, seed: int) -> None:
        tokenizer = objective.tokenizer
        assert tokenizer.cls_id is not None
        assert tokenizer.sep_id is not None
        self.windows, self.seq_len, self.seed = windows, seq_len, seed
        self.masker = objective.masker
        self.pairs, self.short_prob = objective.section.next_sentence, objective.section.short_prob
        self.cls_id, self.sep_id, self.eos_id = tokenizer.cls_id, tokenizer.sep_id, tokenizer.eos_id
        self.pad_id = tokenizer.pad_id or 0
        self.most = self.masker.count(windows.stride)

    def __len__(self) -> int:
        return len(self.windows)

    def spans(self, k: int) -> list[Span]:
        """A, and B where there are pairs."""
        return self._draw(k)[0]

    def _draw(self, k: int) -> tuple[list[Span], int, np.random.Generator]:
        """The spans of sample k, the label of a pair, and the generator that masks it."""
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, k], dtype=np.uint64)))
        number, start = self.windows.locate(k)
        size = self.windows.stride
        if rng.random() < self.short_prob:
            size = int(rng.integers(2, size + 1))
        if not self.pairs:
            return [self.windows.span(number, start, size, at=1)], 0, rng
        a, b, label = self._pair(self.windows.streams[number], start, size, rng)
        return [Span(number, *a, at=1), Span(number, *b, at=2 + a[1] - a[0])], label, rng

    def item(self, k: int) -> Item:
        """Sample k."""
        spans, label, rng = self._draw(k)
        extra: Item = {"next_sentence_label": np.array(label, dtype=np.int64)} if self.pairs else {}
        texts = [self.windows.read(span) for span in spans]
        tokens = np.concatenate([[self.cls_id], *(part for text in texts for part in (text, [self.sep_id]))])
        tokens = tokens.astype(np.int64)
        if not self.pairs:
            tokens[tokens == self.eos_id] = self.sep_id
        hidden, labels = self.masker(tokens, rng)
        real = len(tokens)
        places = np.flatnonzero(labels != IGNORE)
        labels[places[self.most :]] = IGNORE  # of a word that is longer than all a sequence may have
        places = places[: self.most]
        out = {
            "input_ids": np.full(self.seq_len, self.pad_id, dtype=np.int64),
            "segment_ids": np.zeros(self.seq_len, dtype=np.int64),
            "attention_mask": np.zeros(self.seq_len, dtype=np.int64),
            "labels": np.full(self.seq_len, IGNORE, dtype=np.int64),
            "target_positions": np.zeros(self.most, dtype=np.int64),
        }
        out["target_positions"][: len(places)] = places
        out["input_ids"][:real], out["labels"][:real], out["attention_mask"][:real] = hidden, labels, 1
        if self.pairs:
            out["segment_ids"][len(texts[0]) + 2 : real] = 1
        return out | extra

    def _pair(
        self, stream: "TokenStream", start: int, size: int, rng: np.random.Generator
    ) -> tuple[tuple[int, int], tuple[int, int], int]:
        """Bounds of A and B, of `size` tokens together, fewer where the document has fewer, and the label."""
        document, first, last = self._body(stream, stream.document_at(start), 2, avoid=None)
        size = min(size, last - first)
        start = max(first, min(start, last - size))
        middle = start + int(rng.integers(1, size))
        a, b, label = (start, middle), (middle, start + size), 0
        if rng.random() < 0.5:
            # A token outside the document of A; of a corpus that is one document, any.
            alone = stream.n_documents == 1
            low, high = (0, 0) if alone else stream.document_bounds(document)
            token = int(rng.integers(stream.n_tokens - (high - low)))
            token += (token >= low) * (high - low)
            _, first, last = self._body(stream, stream.document_at(token), 1, avoid=None if alone else document)
            length = start + size - middle
            begin = max(first, min(token, last - length))
            b, label = (begin, min(begin + length, last)), int(begin != middle)
        return a, b, label

    def _body(self, stream: "TokenStream", document: int, least: int, avoid: int | None) -> tuple[int, int, int]:
        """The first document from `document` on with `least` tokens beside its end token; its bounds without that."""
        for number in range(document, document + stream.n_documents):
            number %= stream.n_documents
            first, last = stream.document_bounds(number)
            if last > first and self.eos_id is not None and int(stream.read(last - 1, last)[0]) == self.eos_id:
                last -= 1
            if last - first >= least and number != avoid:
                return number, first, last
        raise UserError(
            f"objective.next_sentence needs documents of at least {least} tokens, and data.source has none; "
            "give it longer documents or set objective.next_sentence=false"
        )
