"""Beam search: the likeliest texts rather than the likeliest tokens, as `transformers` does it by default."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cairn.decode.batch import Batches, Ends, of
from cairn.decode.reader import Reader
from cairn.decode.sample import Rules, check_penalty
from cairn.errors import UserError


@dataclass(frozen=True)
class Beams:
    """How a text is searched for. Raises UserError for a value out of range."""

    n: int = 4
    """Unfinished texts that are kept at each step."""
    length_penalty: float = 1.0
    """A text's score is the sum of its tokens' log probabilities over their number to this power."""
    n_best: int = 1
    """Texts returned for each prompt, best first."""
    repetition_penalty: float = 1.0
    """Multiplies log probabilities of tokens seen (arXiv 1909.05858); 1 does nothing."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"beams {self.n} must be at least 1")
        if not 1 <= self.n_best <= self.n:
            raise UserError(f"n-best {self.n_best} must lie in [1, {self.n}], the number of beams")
        if not abs(self.length_penalty) < float("inf"):
            raise UserError(f"length-penalty {self.length_penalty} must be a number; 0 does nothing")
        check_penalty(self.repetition_penalty)


@dataclass(frozen=True)
class Hypothesis:
    """A finished text: its new tokens, the end-of-text token left out, and its score."""

    score: float
    tokens: list[int]


@torch.inference_mode()
def search(
    reader: Reader, max_new_tokens: int, beams: Beams, rules: Rules, ends: Ends | None = None
) -> list[list[Hypothesis]]:
    """The `beams.n_best` best texts that follow each of the reader's rows, best first.

    Texts end with rules.eos_id, where `ends` says so, or after `max_new_tokens`. A prompt is done once its best
    unfinished text, were it to end now, would not be among its `beams.n` finished ones. Fewer than n_best come back
    where the vocabulary is too small for as many.
    """
    n, n_text = beams.n, len(reader.seen)
    found: list[list[Hypothesis]] = [[] for _ in range(n_text)]
    unfinished = list(range(n_text))
    logits = reader.first()
    device = logits.device
    reader.select(torch.arange(n_text, device=device).repeat_interleave(n))
    logits = logits.repeat_interleave(n, 0)
    # All beams are the same at first: only one of them goes on.
    running = torch.full((n_text, n), -torch.inf, device=device).index_fill(1, torch.tensor([0], device=device), 0.0)
    written = torch.zeros(n_text, n, 0, dtype=torch.int64, device=device)
    for length in range(1, max_new_tokens + 1):
        likely = rules.apply(logits.log_softmax(-1), reader.seen, length - 1)
        scores = likely.view(-1, n, likely.shape[-1]) + running[:, :, None]
        # As many again as there are beams: each has one way to end, and n must be left that go on.
        top, place = scores.flatten(1).topk(min(2 * n, scores.shape[1] * scores.shape[2]))
        parent, token = place // scores.shape[2], place % scores.shape[2]
        texts = torch.cat([_rows(written, parent), token[:, :, None]], 2)
        ended = _ended(texts, unfinished, rules.eos_id, ends)
        last = length == max_new_tokens
        _collect(found, unfinished, top, texts, ended | last, beams, rules.eos_id)
        if last:
            break
        running, kept = top.masked_fill(ended, -torch.inf).topk(n)
        bound = (running[:, 0] / length**beams.length_penalty).tolist()
        open_ = [
            i
            for i, (text, best) in enumerate(zip(unfinished, bound, strict=True))
            if best > (found[text][-1].score if len(found[text]) == n else -torch.inf)
        ]
        if not open_:
            break
        index = torch.tensor(open_, device=device)
        rows = (index[:, None] * n + parent.gather(1, kept)[index]).flatten()
        unfinished, running = [unfinished[i] for i in open_], running[index]
        written = _rows(texts, kept)[index]
        reader.select(rows)
        logits = reader.next(written[:, :, -1].flatten())
    return [hypotheses[: beams.n_best] for hypotheses in found]


def search_all(
    batches: Batches, n: int, max_new_tokens: int, beams: Beams, rules: Rules, ends: Ends | None = None
) -> list[list[Hypothesis]]:
    """`search` for each of `n` texts."""
    results: list[list[Hypothesis]] = [[] for _ in range(n)]
    for members, reader in batches:
        for i, best in zip(members, search(reader, max_new_tokens, beams, rules, of(members, ends)), strict=True):
            results[i] = best
    return results


def _rows(texts: Tensor, chosen: Tensor) -> Tensor:
    """(B, N, T) at (B, M): (B, M, T)."""
    return texts.gather(1, chosen[:, :, None].expand(-1, -1, texts.shape[2]))


def _ended(texts: Tensor, prompts: Sequence[int], eos_id: int | None, ends: Ends | None) -> Tensor:
    """Which texts (B, M, T) have come to an end, bool (B, M)."""
    ended = torch.zeros_like(texts[:, :, -1], dtype=torch.bool) if eos_id is None else texts[:, :, -1] == eos_id
    if ends is None:
        return ended
    said = [[ends(i, text) for text in group] for i, group in zip(prompts, texts.tolist(), strict=True)]
    return ended | torch.tensor(said, device=texts.device)


def _collect(
    found: list[list[Hypothesis]],
    prompts: Sequence[int],
    top: Tensor,
    texts: Tensor,
    ended: Tensor,
    beams: Beams,
    eos_id: int | None,
) -> None:
    """Put finished texts among those found, of which the best `beams.n` stay; only the n likeliest may finish."""
    length = texts.shape[2]
    for row, place in (ended[:, : beams.n] & top[:, : beams.n].isfinite()).nonzero().tolist():
        tokens = texts[row, place].tolist()
        if tokens[-1] == eos_id:
            tokens.pop()
        score = top[row, place].item() / length**beams.length_penalty
        best = sorted([*found[prompts[row]], Hypothesis(score, tokens)], key=lambda one: -one.score)
        found[prompts[row]] = best[: beams.n]
