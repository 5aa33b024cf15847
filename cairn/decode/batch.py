"""Batches of texts, written to their ends."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from cairn.decode.reader import Reader
from cairn.decode.sample import Rules, Sampling, choose, generators

Batches = Iterable[tuple[list[int], Reader]]
"""Which texts go through the model together, and a reader of them."""
Ends = Callable[[int, Sequence[int]], bool]
"""Whether text i ends after these new tokens, by what they say rather than by an end-of-text token."""


@torch.inference_mode()
def write(
    reader: Reader,
    max_new_tokens: int,
    sampling: Sampling,
    rows: Sequence[torch.Generator],
    rules: Rules,
    ends: Ends | None = None,
) -> list[list[int]]:
    """What follows each row: up to `max_new_tokens` tokens, ended before rules.eos_id, or where `ends` says so.

    `rows`: a CPU generator a row. Rows that have ended are read no further.
    """
    results: list[list[int]] = [[] for _ in rows]
    unfinished = list(range(len(rows)))
    logits = reader.first()
    for written in range(max_new_tokens):
        scores = rules.apply(logits, reader.seen, written)
        tokens = choose(scores, sampling, [rows[i] for i in unfinished])
        going_on: list[int] = []
        for place, (i, token) in enumerate(zip(unfinished, tokens.tolist(), strict=True)):
            if token == rules.eos_id:
                continue
            results[i].append(token)
            if ends is None or not ends(i, results[i]):
                going_on.append(place)
        if not going_on or written + 1 == max_new_tokens:
            break
        if len(going_on) < len(unfinished):
            kept = torch.tensor(going_on, device=tokens.device)
            reader.select(kept)
            tokens, unfinished = tokens[kept], [unfinished[place] for place in going_on]
        logits = reader.next(tokens)
    return results


def write_all(
    batches: Batches,
    n: int,
    max_new_tokens: int,
    sampling: Sampling,
    rules: Rules,
    seed: int = 0,
    ends: Ends | None = None,
) -> list[list[int]]:
    """`write` for each of `n` texts. What text i gets depends on (seed, i), not on the others."""
    rows = generators(seed, n)
    results: list[list[int]] = [[] for _ in range(n)]
    for members, reader in batches:
        texts = write(reader, max_new_tokens, sampling, [rows[i] for i in members], rules, of(members, ends))
        for i, tokens in zip(members, texts, strict=True):
            results[i] = tokens
    return results


def of(members: Sequence[int], ends: Ends | None) -> Ends | None:
    """`ends` for a batch that has these of all texts."""
    return None if ends is None else lambda i, tokens: ends(members[i], tokens)


def by_length(lengths: Sequence[int], size: int | None) -> Iterator[list[int]]:
    """Indices in batches of at most `size` (None: one batch), longest first, so that little is padded."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    step = size or max(1, len(order))
    for start in range(0, len(order), step):
        yield order[start : start + step]
