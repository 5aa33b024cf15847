"""From sources to targets with an encoder-decoder."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cairn.data.tokenizer import Tokenizer
from cairn.decode.batch import by_length, write_all
from cairn.decode.beam import Beams, search_all
from cairn.decode.sample import Rules, Sampling
from cairn.errors import UserError
from cairn.models.seq2seq import Memory, Seq2Seq


class SourceReader:
    """An encoder-decoder that has read sources (each at least one token) and writes their targets from `start_id` on.

    Targets have room for `capacity` tokens, `start_id` among them. A penalty for repetition looks at targets alone.
    """

    def __init__(self, model: Seq2Seq, sources: Sequence[Sequence[int]], start_id: int, capacity: int) -> None:
        device = next(model.parameters()).device
        self.model, self.length = model, 1
        width = max(map(len, sources))
        ids = torch.tensor([[*source, *[0] * (width - len(source))] for source in sources], device=device)
        lengths = torch.tensor([len(source) for source in sources], device=device)
        ragged = bool((lengths < width).any())
        padding = torch.arange(width, device=device) < lengths[:, None] if ragged else None
        with torch.inference_mode():
            self.memory = model.encode(ids, padding=padding)
        self.cache = model.new_cache(len(sources), capacity)
        self.ids = torch.full((len(sources), capacity), start_id, dtype=torch.int64, device=device)
        self.source = torch.arange(len(sources), device=device)

    @property
    def seen(self) -> Tensor:
        """The targets so far."""
        return self.ids[:, : self.length]

    def first(self) -> Tensor:
        """Read the token that begins a target."""
        return self._read()

    def next(self, tokens: Tensor) -> Tensor:
        """Read a token a row."""
        self.ids[:, self.length] = tokens
        self.length += 1
        return self._read()

    def select(self, rows: Tensor) -> None:
        """Rows of the sources too, unless each row keeps its own, as beams do."""
        self.ids = self.ids[rows]
        before, self.source = self.source, self.source[rows]
        moved = not torch.equal(before, self.source)
        self.cache.select(rows, cross=moved)
        if moved:
            padding = self.memory.padding
            self.memory = Memory(self.memory.hidden[rows], None if padding is None else padding[rows])

    def _read(self) -> Tensor:
        return self.model.decode(self.ids[:, self.length - 1 : self.length], self.memory, self.cache)[:, -1].float()


def encode_source(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a source as T5 reads one: the text, then end of text. Raises UserError where there is no such token."""
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer has no token that ends a text, and a source needs one: add </s> to it")
    return [*tokenizer.encode(text), tokenizer.eos_id]


def source_readers(
    model: Seq2Seq, sources: Sequence[Sequence[int]], start_id: int, max_new_tokens: int, batch_size: int | None = None
) -> Iterator[tuple[list[int], SourceReader]]:
    """Which sources go through the model together, those of similar length, and a reader of them.

    Raises UserError for a source that has no token or does not fit model.max_seq_len.
    """
    model.eval()
    limit = model.section.max_seq_len
    for i, source in enumerate(sources):
        if not 1 <= len(source) <= limit:
            raise UserError(
                f"source {i + 1} has {len(source)} tokens: the model takes 1 to {limit} (model.max_seq_len); "
                "shorten it or leave it out"
            )
    for members in by_length([len(source) for source in sources], batch_size):
        yield members, SourceReader(model, [sources[i] for i in members], start_id, max_new_tokens)


def translate(
    model: Seq2Seq,
    sources: Sequence[Sequence[int]],
    start_id: int,
    eos_id: int | None,
    max_new_tokens: int = 128,
    beams: int = 1,
    length_penalty: float = 1.0,
    batch_size: int = 64,
    allowed: Tensor | None = None,
) -> list[list[int]]:
    """The likeliest target of each source, by greedy (beams 1) or beam search, ended before `eos_id`.

    `allowed`: bool (V,), False for tokens that are never written. A target has at most model.max_seq_len tokens.
    Raises UserError for a source that has no token or does not fit model.max_seq_len.
    """
    longest = min(max_new_tokens, model.section.max_seq_len)
    readers = source_readers(model, sources, start_id, longest, batch_size)
    rules = Rules(eos_id=eos_id, allowed=allowed)
    if beams == 1:
        return write_all(readers, len(sources), longest, Sampling(temperature=0), rules)
    found = search_all(readers, len(sources), longest, Beams(beams, length_penalty), rules)
    return [best.tokens for best, *_ in found]
