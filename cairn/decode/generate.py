"""Writing on from a prompt, one token at a time, with a key-value cache."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cairn.data.tokenizer import Tokenizer
from cairn.decode.sample import Sampling, draw, generators, probabilities
from cairn.errors import UserError
from cairn.models.base import Cache, LanguageModel
from cairn.models.build import padded_vocab
from cairn.train.run import LoadedRun


def stream(
    model: LanguageModel,
    prompt: Tensor,
    sampling: Sampling,
    rows: Sequence[torch.Generator],
    allowed: Tensor | None = None,
    cached: bool = True,
) -> Iterator[Tensor]:
    """The tokens that follow a prompt (B, T >= 1): yields (B,) int64, one for each row, without end.

    `rows`: a CPU generator a row. `allowed`: bool (V,), False for tokens that are never drawn. The model sees at most
    its max_seq_len tokens: when they are full, it reads the last half of them again and goes on from there. That costs
    one pass every max_seq_len / 2 tokens and keeps every position one that was trained. `cached` does not change what
    is drawn, only how long it takes.
    """
    limit = model.section.max_seq_len
    context = prompt[:, -limit:]
    cache: Cache | None = None
    while True:
        if context.shape[1] > limit:
            context, cache = context[:, -max(1, limit // 2) :], None
        if cached and cache is None:
            cache = model.new_cache(len(context), limit)
        logits = _next_logits(model, context, cache)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        token = draw(probabilities(logits, sampling), rows)
        context = torch.cat([context, token[:, None]], dim=1)
        yield token


@torch.inference_mode()
def _next_logits(model: LanguageModel, context: Tensor, cache: Cache | None) -> Tensor:
    read = 0 if cache is None else cache.length
    return model(context[:, read:], cache=cache)[:, -1].float()  # type: ignore[no-any-return]


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    eos_id: int | None = None,
    allowed: Tensor | None = None,
    cached: bool = True,
) -> list[list[int]]:
    """What follows each prompt (at least one token): up to `max_new_tokens` tokens, ended before `eos_id`.

    Prompts of one length go through the model together. What prompt i gets depends on (seed, i) and not on the others,
    up to the rounding of batched matrix products.
    """
    rows = generators(seed, len(prompts))
    device = next(model.parameters()).device
    same_length: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        same_length[len(prompt)].append(i)
    results: list[list[int]] = [[] for _ in prompts]
    model.eval()
    for members in same_length.values():
        batch = torch.tensor([prompts[i] for i in members], device=device)
        tokens = stream(model, batch, sampling, [rows[i] for i in members], allowed, cached)
        open_rows = dict(enumerate(members))
        for _ in range(max_new_tokens):
            for place, token in enumerate(next(tokens).tolist()):
                if place in open_rows and token == eos_id:
                    del open_rows[place]
                elif place in open_rows:
                    results[open_rows[place]].append(token)
            if not open_rows:
                break
    return results


def decoder_of(run: LoadedRun) -> LanguageModel:
    """The run's model, ready to generate. Raises UserError for one that cannot."""
    if run.config.model.objective != "causal":
        raise UserError(
            f"a {run.config.model.name} model predicts masked tokens and cannot generate: give a run of a causal one"
        )
    return run.model.eval()


def allowed_tokens(tokenizer: Tokenizer, n_rows: int) -> Tensor:
    """Bool (n_rows,): text and end of document; no other special token, and no row that only pads the vocabulary."""
    allowed = torch.arange(n_rows) < tokenizer.vocab_size
    special = [i for i in tokenizer.special_ids() if i != tokenizer.eos_id]
    allowed[torch.tensor(special, dtype=torch.int64)] = False
    return allowed


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Tokens of a prompt; an empty one is the end of the document before, so that a new document begins.

    Raises UserError when it is empty and the tokenizer has no such token.
    """
    ids = tokenizer.encode(prompt)
    if ids:
        return ids
    start = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.bos_id
    if start is None:
        raise UserError("the prompt is empty and the tokenizer has no token that begins a document: give --prompt TEXT")
    return [start]


def stream_text(
    run: LoadedRun, prompt: str, max_new_tokens: int, sampling: Sampling, row: torch.Generator
) -> Iterator[str]:
    """The text that follows a prompt, in pieces as they come; a character is held back until it is whole.

    Raises UserError for a model that cannot generate.
    """
    model, tokenizer = decoder_of(run), run.tokenizer
    start = encode_prompt(tokenizer, prompt)
    device = next(model.parameters()).device
    allowed = allowed_tokens(tokenizer, padded_vocab(run.config.model, tokenizer.vocab_size)).to(device)
    tokens = stream(model, torch.tensor([start], device=device), sampling, [row], allowed)
    ids = list(start)
    shown = len(tokenizer.decode(ids))
    for _ in range(max_new_tokens):
        token = int(next(tokens))
        if token == tokenizer.eos_id:
            break
        ids.append(token)
        # Decoded with the prompt, since some tokenizers join words by what stands left of them.
        text = tokenizer.decode(ids)
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
        if len(whole) > shown:
            yield whole[shown:]
            shown = len(whole)
    yield tokenizer.decode(ids)[shown:]


def generate_text(
    run: LoadedRun,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """The text that follows a prompt. Raises UserError for a model that cannot generate, or a bad sampling value."""
    (row,) = generators(seed, 1)
    return "".join(stream_text(run, prompt, max_new_tokens, Sampling(temperature, top_k, top_p), row))
