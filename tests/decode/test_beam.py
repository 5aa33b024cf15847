"""Beam search: token by token that of `transformers`, and the best of all texts where beams are enough."""

import itertools
from typing import Any

import pytest
import torch

from cairn.decode.beam import Beams, Hypothesis, search_all
from cairn.decode.generate import beam_search
from cairn.decode.sample import Rules
from cairn.decode.translate import source_readers, translate
from tests.decode.models import LLAMA, their_gpt, their_t5, tiny_gpt, tiny_seq2seq

PAD, EOS = 95, 7
ALLOWED = torch.arange(96) != PAD
SMALL: dict[str, Any] = {"init_std": 0.15, "d_model": 16, "n_layer": 1}


def of_theirs(
    theirs: Any, texts: list[list[int]], start: int, beams: Beams, new: int, **keys: Any
) -> list[list[list[int]]]:
    """What `transformers` finds, without prompt, end-of-text and padding; texts padded on the left."""
    width = max(map(len, texts))
    ids = torch.tensor([[PAD] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    found = theirs.generate(
        ids,
        attention_mask=mask,
        num_beams=beams.n,
        num_return_sequences=beams.n_best,
        length_penalty=beams.length_penalty,
        repetition_penalty=beams.repetition_penalty,
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=PAD,
        suppress_tokens=[PAD],  # else it could not be told from what fills up a row
        **keys,
    )
    rows = [row[start or width :] for row in found.tolist()]
    eos = keys["eos_token_id"]
    ended = [row[: next((i for i, token in enumerate(row) if token in (eos, PAD)), len(row))] for row in rows]
    return [ended[i : i + beams.n_best] for i in range(0, len(ended), beams.n_best)]


def tokens(found: list[list[Hypothesis]]) -> list[list[list[int]]]:
    return [[best.tokens for best in group] for group in found]


SEARCHES = [
    Beams(1),
    Beams(2),
    Beams(4, n_best=4),
    Beams(4, length_penalty=0.0, n_best=2),
    Beams(3, length_penalty=2.5, n_best=3),
    Beams(4, length_penalty=-1.0, n_best=2),
    Beams(4, n_best=4, repetition_penalty=1.4),
]


@pytest.mark.parametrize("beams", SEARCHES, ids=str)
@pytest.mark.parametrize("keys", [{}, LLAMA], ids=["gpt2", "llama"])
def test_equals_transformers(keys: dict[str, object], beams: Beams) -> None:
    ended = 0
    for seed in range(2):
        model = tiny_gpt(seed, **SMALL, **keys)
        theirs = their_gpt(model)
        torch.manual_seed(seed)
        prompts = torch.randint(8, PAD, (3, 5)).tolist()
        ((text, *_), *_) = tokens(beam_search(model, prompts, 18, beams, None, ALLOWED))
        for eos in (text[1], text[5], text[12]):  # ends come early, late and not at all
            expected = of_theirs(theirs, prompts, 0, beams, 18, eos_token_id=eos)
            ours = tokens(beam_search(model, prompts, 18, beams, eos, ALLOWED))
            assert ours == expected
            ended += sum(len(text) < 18 for group in ours for text in group)
    assert ended > 0 or beams.length_penalty > 2


def test_prompts_of_several_lengths_equal_transformers_and_each_alone() -> None:
    model, beams = tiny_gpt(5, **SMALL), Beams(3, n_best=3)
    prompts = [list(range(8, 8 + n)) for n in (9, 2, 5, 1)]
    ours = tokens(beam_search(model, prompts, 12, beams, EOS, ALLOWED))
    assert ours == of_theirs(their_gpt(model), prompts, 0, beams, 12, eos_token_id=EOS)
    assert ours == [tokens(beam_search(model, [prompt], 12, beams, EOS, ALLOWED))[0] for prompt in prompts]
    assert ours == tokens(beam_search(model, prompts, 12, beams, EOS, ALLOWED, batch_size=3))


def test_shortest_length_equals_transformers() -> None:
    model, beams = tiny_gpt(2, **SMALL), Beams(4, length_penalty=0.0, n_best=4)
    prompts = [[9, 10, 11], [20, 21, 22]]
    (first, *_), _ = tokens(beam_search(model, prompts, 15, beams, None, ALLOWED))
    eos = first[1]  # so that many would end at once
    ours = tokens(beam_search(model, prompts, 15, beams, eos, ALLOWED, min_new_tokens=6))
    assert ours == of_theirs(their_gpt(model), prompts, 0, beams, 15, eos_token_id=eos, min_new_tokens=6)
    assert min(len(text) for group in ours for text in group) >= 6
    assert (
        min(len(text) for group in tokens(beam_search(model, prompts, 15, beams, eos, ALLOWED)) for text in group) < 6
    )


@pytest.mark.parametrize(
    "beams", [Beams(1), Beams(4), Beams(4, length_penalty=0.5), Beams(3, repetition_penalty=1.5)], ids=str
)
def test_t5_equals_transformers(beams: Beams) -> None:
    ended = 0
    for seed in range(2):
        model = tiny_seq2seq(seed, **SMALL)
        theirs = their_t5(model)
        torch.manual_seed(seed)
        sources = [torch.randint(8, PAD, (n,)).tolist() for n in (6, 6, 3, 11)]
        text, *_ = translate(model, sources, 0, None, 14, beams.n, beams.length_penalty, 64, ALLOWED)
        for eos in (text[1], text[8]):
            start = {"decoder_start_token_id": 0, "eos_token_id": eos}
            expected = of_theirs(theirs, sources, 1, beams, 14, **start)
            readers = source_readers(model, sources, 0, 14, batch_size=3)
            ours = tokens(search_all(readers, 4, 14, beams, Rules(beams.repetition_penalty, 0, eos, ALLOWED)))
            assert ours == expected
            ended += sum(len(text) < 14 for (text,) in ours)
            if beams.repetition_penalty == 1:
                assert translate(model, sources, 0, eos, 14, beams.n, beams.length_penalty, 3, ALLOWED) == [
                    b for (b,) in ours
                ]
    assert ended > 0


def best_of_all(model: Any, prompt: list[int], new: int, eos: int, rows: int) -> list[int]:
    """By trying every text."""
    scores: dict[tuple[int, ...], float] = {}
    for text in itertools.product(range(rows), repeat=new):
        text = text[: text.index(eos) + 1] if eos in text else text
        if text not in scores:
            with torch.no_grad():
                logp = model(torch.tensor([[*prompt, *text]]))[0].log_softmax(-1)
            scores[text] = sum(logp[len(prompt) + i - 1, t].item() for i, t in enumerate(text)) / len(text)
    best = max(scores, key=lambda text: scores[text])
    return [token for token in best if token != eos]


def test_with_enough_beams_it_is_the_best_text_there_is() -> None:
    for seed in range(3):
        model = tiny_gpt(seed, vocab_size=5)
        ((found,),) = beam_search(model, [[1, 2]], 3, Beams(25), eos_id=3)
        assert found.tokens == best_of_all(model, [1, 2], 3, 3, 5)
