"""What objectives share: which stretch of which corpus sample k is cut from, and the form of an objective."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cairn.data.batches import Batch, Samples
from cairn.data.blend import Blend
from cairn.data.order import Order, mix
from cairn.errors import UserError

if TYPE_CHECKING:
    from cairn.data.prepare import Prepared
    from cairn.data.shards import TokenStream

Split = Literal["train", "valid"]
Model = Callable[..., Any]
"""A network, or the engine that runs it."""


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of a stream, `at` so many tokens into a sample; a `stop` past the end goes round."""

    stream: int
    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class Piece:
    """What a sample holds of one document: tokens [start, stop) of the sample, from token `first` of the document."""

    document: int
    start: int
    stop: int
    first: int
    length: int
    """Tokens of the whole document, its end token included."""


class TextSamples(Samples, Protocol):
    """Samples cut from streams of tokens."""

    windows: "Windows"

    def spans(self, k: int) -> list[Span]:
        """The stretches of text in sample k, in order."""
        ...


class Objective(Protocol):
    """What is predicted: samples from a corpus, and the loss of a batch as sums over targets."""

    def samples(
        self, prepared: "Prepared", split: Split, seq_len: int, seed: int, document_mask: bool = False
    ) -> TextSamples:
        """Samples of `seq_len` tokens: endless and shuffled from "train", each stretch once from "valid"."""
        ...

    def weights(self, batch: Batch) -> dict[str, float]:
        """Number of targets of each loss term; the batch is on the host."""
        ...

    def loss_sums(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Negative log likelihood of each loss term in nats, summed over its targets; the batch is on the device."""
        ...


class Windows:
    """Sample k -> (stream, first token): windows of `length` tokens, `stride` apart.

    Of "train", a stream is taken as a circle that each epoch cuts at another place, so that no token is always first
    or always left over; the streams are blended by weight. Of "valid", the streams follow one another from their first
    tokens, and the last window of each may be short; `overlap` = length - stride tokens are context only.

    Raises UserError when a stream of "train" is shorter than one window.
    """

    def __init__(
        self, streams: Sequence[tuple["TokenStream", float]], split: Split, stride: int, overlap: int, seed: int
    ) -> None:
        self.streams = [stream for stream, _ in streams]
        self.stride, self.split, self.seed = stride, split, seed
        sizes = [stream.n_tokens for stream in self.streams]
        if split == "train":
            for number, size in enumerate(sizes):
                if size < stride + overlap:
                    raise UserError(
                        f"data.source: source {number} has {size} training tokens, fewer than one sequence of "
                        f"{stride + overlap}; give it more text or lower data.seq_len"
                    )
            self.counts = [size // stride for size in sizes]
            self._blend = Blend([weight for _, weight in streams])
            self._orders = [Order(n, mix(seed, number)) for number, n in enumerate(self.counts)]
        else:
            self.counts = [-(-max(size - overlap, 0) // stride) for size in sizes]
        self._ends = list(accumulate(self.counts))

    def __len__(self) -> int:
        """Windows in one pass over all streams."""
        return self._ends[-1] if self._ends else 0

    def locate(self, k: int) -> tuple[int, int]:
        """The stream of sample k and its first token there."""
        if self.split == "valid":
            if not 0 <= k < len(self):
                raise IndexError(f"sample {k} is outside the {len(self)} of the held-out text")
            number = bisect_right(self._ends, k)
            return number, (k - self._ends[number] + self.counts[number]) * self.stride
        number, place = self._blend[k]
        cut = mix(self.seed, number, place // self.counts[number])
        return number, (self._orders[number][place] * self.stride + cut) % self.streams[number].n_tokens

    def span(self, number: int, start: int, length: int, at: int = 0) -> Span:
        """`length` tokens from `start` on; of "train" round the circle, of "valid" what is left of the stream."""
        stop = start + length
        return Span(number, start, stop if self.split == "train" else min(stop, self.streams[number].n_tokens), at)

    def read(self, span: Span) -> NDArray[np.int32]:
        """The tokens (T,) of a span."""
        stream = self.streams[span.stream]
        if span.stop <= stream.n_tokens:
            return stream.read(span.start, span.stop)
        first, rest = stream.read(span.start, stream.n_tokens), stream.read(0, span.stop - stream.n_tokens)
        return np.concatenate([first, rest])

    def pieces(self, span: Span) -> Iterator[Piece]:
        """The documents of a span, in order."""
        stream, done = self.streams[span.stream], span.start
        while done < span.stop:
            token = done % stream.n_tokens
            document = stream.document_at(token)
            first, last = stream.document_bounds(document)
            stop = min(done + last - token, span.stop)
            start = span.at + done - span.start
            yield Piece(document, start, start + stop - done, token - first, last - first)
            done = stop


def targets(labels: Tensor) -> float:
    """Number of labels that are targets."""
    return float((labels >= 0).sum())
