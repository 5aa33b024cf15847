"""Texts that follow prompts, or targets of sources, many at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

from cairn.decode.batch import Batches, write_all
from cairn.decode.beam import Beams, search_all
from cairn.decode.generate import allowed_tokens, check_room, decoder_of, encode_prompt, prompt_readers
from cairn.decode.sample import Rules, Sampling
from cairn.decode.stop import cut_off
from cairn.decode.translate import encode_source, source_readers
from cairn.models.build import padded_vocab
from cairn.models.seq2seq import Seq2Seq
from cairn.objectives.span import start_of
from cairn.train.run import LoadedRun


@dataclass(frozen=True)
class Task:
    """What is asked for each prompt."""

    how: Sampling | Beams
    max_new_tokens: int = 200
    min_new_tokens: int = 0
    samples: int = 1
    """Texts drawn for each prompt; beam search returns how.n_best."""
    seed: int = 0
    stops: Sequence[str] = ()
    """A text ends before the first of these strings in it."""
    batch_size: int | None = None
    """Prompts that go through the model together; None: all."""


def write_texts(run: LoadedRun, prompts: Sequence[str], task: Task) -> list[list[str]]:
    """For each prompt the texts that follow it; for each source, of an encoder-decoder, its targets.

    Raises UserError for a model that cannot generate and for a prompt that it cannot take.
    """
    model, tokenizer, how = run.model, run.tokenizer, task.how
    n = task.samples if isinstance(how, Sampling) else 1
    longest = task.max_new_tokens
    readers: Batches
    if isinstance(model, Seq2Seq):
        longest = min(longest, model.section.max_seq_len)
        sources = [ids for text in prompts for ids in [encode_source(tokenizer, text)] * n]
        before: list[list[int]] = [[]] * len(sources)
        readers = source_readers(model, sources, start_of(tokenizer), longest, task.batch_size)
    else:
        model = decoder_of(run)
        before = [ids for text in prompts for ids in [encode_prompt(tokenizer, text)] * n]
        if isinstance(how, Beams):
            check_room(model, before, longest)
        readers = prompt_readers(model, before, longest, task.batch_size)
    begin = [len(tokenizer.decode(ids)) for ids in before]

    def text(i: int, tokens: Sequence[int]) -> tuple[str, bool]:
        # Decoded with the prompt, since some tokenizers join words by what stands left of them.
        return cut_off(tokenizer.decode([*before[i], *tokens])[begin[i] :], task.stops)

    def ends(i: int, tokens: Sequence[int]) -> bool:
        return text(i, tokens)[1]

    until = ends if task.stops else None
    allowed = allowed_tokens(tokenizer, padded_vocab(run.section, tokenizer.vocab_size))
    rules = Rules(
        how.repetition_penalty, task.min_new_tokens, tokenizer.eos_id, allowed.to(next(model.parameters()).device)
    )
    if isinstance(how, Beams):
        found = search_all(readers, len(before), longest, how, rules, until)
        return [[text(i, best.tokens)[0] for best in group] for i, group in enumerate(found)]
    written = write_all(readers, len(before), longest, how, rules, task.seed, until)
    texts = [text(i, tokens)[0] for i, tokens in enumerate(written)]
    return [texts[i : i + n] for i in range(0, len(texts), n)]
