"""What decoding needs of a model: the scores of the next token of each text, given the tokens so far."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cairn.models.base import Cache, LanguageModel
from cairn.models.cache import KVCache


class Reader(Protocol):
    """Texts that are being written, one a row."""

    @property
    def seen(self) -> Tensor:
        """(B, T) int64: what a repetition penalty looks at; a token may stand there several times."""
        ...

    def first(self) -> Tensor:
        """fp32 logits (B, V) of the first token."""
        ...

    def next(self, tokens: Tensor) -> Tensor:
        """Put tokens (B,) behind the rows; logits (B, V) of those that follow."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep these rows, (B',) int64, in this order; one that comes twice is copied."""
        ...


class PromptReader:
    """A decoder that goes on from prompts (each at least one token); shorter ones are padded on the left.

    It sees at most `capacity` columns (default and most: the model's max_seq_len): once they are full, it reads the
    last half of them again and goes on from there. Only a model that `takes_padding` reads several lengths.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]] | Tensor,
        capacity: int | None = None,
        cached: bool = True,
    ) -> None:
        limit = model.section.max_seq_len
        self.model, self.cached = model, cached
        self.capacity = limit if capacity is None else min(limit, capacity)
        lines = [
            list(prompt)[-self.capacity :] for prompt in (prompts.tolist() if isinstance(prompts, Tensor) else prompts)
        ]
        self.width = max(map(len, lines))
        device = next(model.parameters()).device
        pads = torch.tensor([self.width - len(line) for line in lines], device=device)
        self.pads: Tensor | None = pads if bool(pads.any()) else None
        # Filled up with their own first token, which is in the text anyway: a penalty for what was seen needs no mask.
        padded = [line[:1] * (self.width - len(line)) + line for line in lines]
        self.ids = torch.zeros(len(lines), self.capacity, dtype=torch.int64, device=device)
        self.ids[:, : self.width] = torch.tensor(padded, device=device)
        self.cache: Cache | None = None

    @property
    def seen(self) -> Tensor:
        """What the model sees of each row."""
        return self.ids[:, : self.width]

    def first(self) -> Tensor:
        """Read the prompts."""
        return self._read()

    def next(self, tokens: Tensor) -> Tensor:
        """Read a token a row."""
        if self.width == self.capacity:
            kept = max(1, self.capacity // 2) - 1
            self.ids[:, :kept] = self.ids[:, self.width - kept : self.width].clone()
            if self.pads is not None:
                self.pads = (self.pads - (self.width - kept)).clamp(min=0)
            self.width, self.cache = kept, None
        self.ids[:, self.width] = tokens
        self.width += 1
        return self._read()

    def select(self, rows: Tensor) -> None:
        """Rows of the cache too; one that cannot be told apart is made anew by reading all again."""
        self.ids = self.ids[rows]
        if self.pads is not None:
            self.pads = self.pads[rows]
        if isinstance(self.cache, KVCache):
            self.cache.select(rows)
        else:
            self.cache = None

    def _read(self) -> Tensor:
        if self.cached and self.cache is None:
            self.cache = self.model.new_cache(len(self.ids), self.capacity)
        read = 0 if self.cache is None else self.cache.length
        padding: dict[str, Any] = {"last_only": True} if self.model.takes_padding else {}
        if self.pads is not None:
            column = torch.arange(self.width, device=self.ids.device) - self.pads[:, None]
            padding |= {"positions": column[:, read:].clamp(min=0), "key_padding": column >= 0}
        logits: Tensor = self.model(self.ids[:, read : self.width], cache=self.cache, **padding)
        return logits[:, -1].float()
