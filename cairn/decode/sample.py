"""From logits to the next token: repetition penalty, temperature, top-k and top-p, each a pure function."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cairn.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Applied in this order: repetition penalty, temperature, top-k, top-p.

    Raises UserError for a value out of range.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token always (greedy)."""
    top_k: int | None = None
    """Keep this many of the most likely tokens."""
    top_p: float | None = None
    """Keep the smallest set of most likely tokens that holds this probability (nucleus, arXiv 1904.09751)."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens seen and multiplies negative ones (arXiv 1909.05858); 1 does nothing."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature} must be 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k {self.top_k} must be at least 1; leave it out to keep all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p} must lie in (0, 1]; leave it out to keep all tokens")
        check_penalty(self.repetition_penalty)


def check_penalty(value: float) -> None:
    """Raises UserError for a repetition penalty out of range."""
    if not 0 < value < float("inf"):
        raise UserError(f"repetition-penalty {value} must be a positive number; 1 does nothing")


@dataclass(frozen=True)
class Rules:
    """What is done to scores before a token is chosen, whichever way; in this order."""

    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    """The text does not end before it has this many."""
    eos_id: int | None = None
    allowed: Tensor | None = None
    """Bool (V,): False for tokens that are never chosen."""

    def apply(self, scores: Tensor, seen: Tensor, written: int) -> Tensor:
        """Scores (B, V) after `seen` (B, T), of which the last `written` are new."""
        if self.repetition_penalty != 1:
            old = scores.gather(1, seen)
            penalized = torch.where(old < 0, old * self.repetition_penalty, old / self.repetition_penalty)
            scores = scores.scatter(1, seen, penalized)
        if self.eos_id is not None and written < self.min_new_tokens:
            scores = scores.index_fill(1, torch.tensor([self.eos_id], device=scores.device), -torch.inf)
        return scores if self.allowed is None else scores.masked_fill(~self.allowed, -torch.inf)


def choose(scores: Tensor, sampling: Sampling, rows: Sequence[torch.Generator]) -> Tensor:
    """One token a row, int64 (B,), from scores (B, V): the best or a drawn one."""
    if sampling.temperature == 0:
        return scores.argmax(-1)
    return draw(probabilities(scores, sampling), rows)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities of the next token, fp64 (B, V), from logits (B, V); a logit of -inf is never drawn.

    The penalty for repetition, which needs the tokens seen, is that of `Rules`.
    """
    scores = logits.double()
    if sampling.temperature == 0:
        return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
    # Relative to the largest, so that a tiny temperature cannot overflow.
    scores = (scores - scores.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.size(-1):
        values, kept = scores.topk(sampling.top_k, dim=-1)
        scores = torch.full_like(scores, -torch.inf).scatter_(-1, kept, values)
    probs = scores.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True, stable=True)
        # A token stays when those before it do not reach top_p yet; the first stays always.
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        probs = torch.zeros_like(probs).scatter_(-1, index, ordered.masked_fill(outside, 0.0))
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def generators(seed: int, n: int) -> list[torch.Generator]:
    """One generator a row, so that what row i draws depends on (seed, i) and never on the rows beside it."""
    seeds = torch.randint(2**62, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [torch.Generator().manual_seed(s) for s in seeds]


def draw(probs: Tensor, rows: Sequence[torch.Generator]) -> Tensor:
    """One token a row, int64 (B,), from probabilities fp64 (B, V) with one CPU generator a row.

    Inverts the cumulative sum at a uniform number, so every device draws the same tokens.
    """
    uniform = torch.cat([torch.rand(1, generator=row, dtype=torch.float64) for row in rows]).to(probs.device)
    cumulative = probs.cumsum(-1)
    point = uniform[:, None] * cumulative[:, -1:]
    # The first token whose cumulative sum exceeds the point: never one of probability zero.
    return torch.searchsorted(cumulative, point, right=True).clamp_(max=probs.size(-1) - 1)[:, 0]
