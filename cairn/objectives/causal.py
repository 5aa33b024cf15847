"""Causal language modelling: predict each token from those left of it."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cairn.data.batches import IGNORE, Batch, Item
from cairn.objectives.base import Model, Span, Split, Windows, targets

if TYPE_CHECKING:
    from cairn.data.prepare import Prepared
    from cairn.data.shards import TokenStream


class Causal:
    """The objective of GPT-like models."""

    def samples(
        self, prepared: "Prepared", split: Split, seq_len: int, seed: int, document_mask: bool = False
    ) -> "CausalSamples":
        """Packed stretches of the corpus; see CausalSamples."""
        return CausalSamples(Windows(prepared.streams(split), split, seq_len, 1, seed), document_mask)

    def weights(self, batch: Batch) -> dict[str, float]:
        """Tokens to predict."""
        return {"loss": targets(batch["labels"])}

    def loss_sums(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Their negative log likelihood."""
        loss: Tensor = model(batch["input_ids"], labels=batch["labels"], document_ids=batch.get("document_ids"))
        return {"loss": loss}


class CausalSamples:
    """Sample k: input_ids (T,), labels (T,) the tokens one further on, with a document mask also document_ids (T,).

    Windows of T + 1 tokens, T apart, so every token but the first is a target once. A short last window is padded, its
    labels ignored. With a document mask, tokens number their document within the window from 0, and the first token of
    a document is no target, as nothing of that document is left of it.
    """

    def __init__(self, windows: Windows, document_mask: bool) -> None:
        self.windows = windows
        self.seq_len = windows.stride
        self.document_mask = document_mask

    def __len__(self) -> int:
        return len(self.windows)

    def spans(self, k: int) -> list[Span]:
        """The window of sample k: its input tokens, and the one after them, a target only."""
        return [self.windows.span(*self.windows.locate(k), self.seq_len + 1)]

    def item(self, k: int) -> Item:
        """Sample k."""
        (span,) = self.spans(k)
        tokens = self.windows.read(span)
        size = len(tokens) - 1
        input_ids = np.zeros(self.seq_len, dtype=np.int64)
        labels = np.full(self.seq_len, IGNORE, dtype=np.int64)
        input_ids[:size], labels[:size] = tokens[:-1], tokens[1:]
        if not self.document_mask:
            return {"input_ids": input_ids, "labels": labels}
        documents = document_ids(self.windows.streams[span.stream], span.start, self.seq_len + 1)
        labels[documents[1:] != documents[:-1]] = IGNORE
        return {"input_ids": input_ids, "labels": labels, "document_ids": documents[:-1]}


def document_ids(stream: "TokenStream", start: int, length: int) -> NDArray[np.int64]:
    """Number of the document, from 0 at `start`, of each of `length` tokens (T,), going round the end of the stream."""
    out = np.empty(length, dtype=np.int64)
    done = number = 0
    document = stream.document_at(start)
    while done < length:
        first, last = stream.document_bounds(document)
        stop = min(done + last - max(start, first), length)
        out[done:stop] = number
        number += stop > done
        done, start, document = stop, 0, (document + 1) % stream.n_documents
    return out
