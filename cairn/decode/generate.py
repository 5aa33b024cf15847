"""Writing on from prompts with a decoder: token by token as they come, in batches, or by beam search."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cairn.data.tokenizer import Tokenizer
from cairn.decode.batch import Ends, by_length, write_all
from cairn.decode.beam import Beams, Hypothesis, search_all
from cairn.decode.reader import PromptReader
from cairn.decode.sample import Rules, Sampling, choose, generators
from cairn.decode.stop import cut_off, settled
from cairn.errors import UserError
from cairn.models.base import LanguageModel
from cairn.models.build import padded_vocab
from cairn.models.headed import Headed
from cairn.models.seq2seq import Seq2Seq
from cairn.train.run import LoadedRun


@torch.inference_mode()
def stream(
    model: LanguageModel,
    prompt: Tensor,
    sampling: Sampling,
    rows: Sequence[torch.Generator],
    allowed: Tensor | None = None,
    cached: bool = True,
    min_new_tokens: int = 0,
    eos_id: int | None = None,
) -> Iterator[Tensor]:
    """The tokens that follow a prompt (B, T >= 1): yields (B,) int64, one for each row, without end.

    `rows`: a CPU generator a row. `allowed`: bool (V,), False for tokens that are never drawn. The model sees at most
    its max_seq_len tokens: when they are full, it reads the last half of them again and goes on from there. That costs
    one pass every max_seq_len / 2 tokens and keeps every position one that was trained. A penalty for repetition looks
    at what the model sees. `cached` does not change what is drawn, only how long it takes. `eos_id` is not drawn before
    `min_new_tokens`.
    """
    rules = Rules(sampling.repetition_penalty, min_new_tokens, eos_id, allowed)
    reader, written = PromptReader(model, prompt, cached=cached), 0
    logits = reader.first()
    while True:
        token = choose(rules.apply(logits, reader.seen, written), sampling, rows)
        yield token
        logits, written = reader.next(token), written + 1


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    eos_id: int | None = None,
    allowed: Tensor | None = None,
    cached: bool = True,
    min_new_tokens: int = 0,
    batch_size: int | None = None,
    ends: Ends | None = None,
) -> list[list[int]]:
    """What follows each prompt (at least one token): up to `max_new_tokens` tokens, ended before `eos_id`.

    Up to `batch_size` prompts (None: all) go through the model together: those that fit its max_seq_len with what is
    written, whatever their lengths, and of the others, whose last half is read again as in `stream`, those of one
    length. What prompt i gets depends on (seed, i) and not on the others, up to the rounding of batched matrix
    products. `ends(i, tokens)` ends text i after these new tokens.
    """
    rules = Rules(sampling.repetition_penalty, min_new_tokens, eos_id, allowed)
    readers = prompt_readers(model, prompts, max_new_tokens, batch_size, cached)
    return write_all(readers, len(prompts), max_new_tokens, sampling, rules, seed, ends)


def beam_search(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    beams: Beams,
    eos_id: int | None = None,
    allowed: Tensor | None = None,
    min_new_tokens: int = 0,
    batch_size: int | None = None,
    ends: Ends | None = None,
) -> list[list[Hypothesis]]:
    """The `beams.n_best` best texts of up to `max_new_tokens` that follow each prompt, best first.

    Raises UserError where a prompt and what is written are more than the model's max_seq_len.
    """
    check_room(model, prompts, max_new_tokens)
    rules = Rules(beams.repetition_penalty, min_new_tokens, eos_id, allowed)
    readers = prompt_readers(model, prompts, max_new_tokens, batch_size)
    return search_all(readers, len(prompts), max_new_tokens, beams, rules, ends)


def check_room(model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises UserError where a prompt and what is written are more than the model's max_seq_len."""
    limit = model.section.max_seq_len
    for i, prompt in enumerate(prompts):
        if len(prompt) + max_new_tokens > limit:
            raise UserError(
                f"prompt {i + 1}: {len(prompt)} tokens and {max_new_tokens} new ones are more than model.max_seq_len "
                f"{limit}, which beam search does not pass: lower --max-new-tokens, or leave out --beams"
            )


def prompt_readers(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int | None = None,
    cached: bool = True,
) -> Iterator[tuple[list[int], PromptReader]]:
    """Which prompts go through the model together, and a reader of them, as `generate` says."""
    model.eval()
    limit = model.section.max_seq_len
    together: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        fits = model.takes_padding and len(prompt) + max_new_tokens - 1 <= limit
        together[0 if fits else len(prompt)].append(i)
    for group in together.values():
        for places in by_length([len(prompts[i]) for i in group], batch_size):
            members = [group[place] for place in places]
            longest = max(len(prompts[i]) for i in members)
            yield members, PromptReader(model, [prompts[i] for i in members], longest + max_new_tokens - 1, cached)


def decoder_of(run: LoadedRun) -> LanguageModel:
    """The run's model, ready to go on from a prompt. Raises UserError for one that cannot."""
    if isinstance(run.model, Headed):
        raise UserError(f"a {run.section.name} model with a task's outputs writes no text: use `cairn predict`")
    if isinstance(run.model, Seq2Seq):
        raise UserError("a seq2seq model writes what a source becomes and does not go on from a prompt")
    if run.section.objective != "causal":
        raise UserError(
            f"a {run.section.name} model predicts masked tokens and cannot generate: give a run of a causal one"
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
    run: LoadedRun,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    row: torch.Generator,
    stops: Sequence[str] = (),
    min_new_tokens: int = 0,
) -> Iterator[str]:
    """The text that follows a prompt, in pieces as they come; a character is held back until it is whole.

    It ends before the first of the `stops`; what may become one is held back too. Raises UserError for a model that
    cannot generate.
    """
    model, tokenizer = decoder_of(run), run.tokenizer
    start = encode_prompt(tokenizer, prompt)
    device = next(model.parameters()).device
    allowed = allowed_tokens(tokenizer, padded_vocab(run.section, tokenizer.vocab_size)).to(device)
    eos_id = tokenizer.eos_id
    tokens = stream(model, torch.tensor([start], device=device), sampling, [row], allowed, True, min_new_tokens, eos_id)
    ids, begin, shown = list(start), len(tokenizer.decode(start)), 0
    for _ in range(max_new_tokens):
        token = int(next(tokens))
        if token == eos_id:
            break
        ids.append(token)
        # Decoded with the prompt, since some tokenizers join words by what stands left of them.
        whole, ended = cut_off(tokenizer.decode(ids)[begin:].rstrip("\N{REPLACEMENT CHARACTER}"), stops)
        safe = len(whole) if ended else settled(whole, stops)
        if safe > shown:
            yield whole[shown:safe]
            shown = safe
        if ended:
            return
    yield tokenizer.decode(ids)[begin + shown :]


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
