"""Many prompts in one batch are what each is alone."""

import pytest
import torch

from cairn.decode.beam import Beams
from cairn.decode.generate import beam_search, generate, prompt_readers
from cairn.decode.reader import PromptReader
from cairn.decode.sample import Sampling
from cairn.decode.translate import source_readers, translate
from cairn.errors import UserError
from tests.decode.models import LLAMA, tiny_gpt, tiny_seq2seq

GREEDY = Sampling(temperature=0)
PROMPTS = [[5], list(range(10, 24)), [7, 8, 9], [1, 2], list(range(30, 37))]
KINDS = {
    "gpt2": {},
    "llama": LLAMA,
    "alibi": {"position": "alibi"},
    "t5": {"position": "t5"},
    "sinusoidal": {"position": "sinusoidal"},
    "window": {"sliding_window": 5},
}


@pytest.mark.parametrize("keys", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, 20, 0.9, 1.3)], ids=["greedy", "sampled"])
def test_prompts_of_several_lengths(keys: dict[str, object], sampling: Sampling) -> None:
    model = tiny_gpt(**keys).double()
    readers = list(prompt_readers(model, PROMPTS, 12))
    assert [len(members) for members, _ in readers] == [5]
    together = generate(model, PROMPTS, 12, sampling, seed=3)
    assert together == generate(model, PROMPTS, 12, sampling, seed=3, cached=False)
    assert together == generate(model, PROMPTS, 12, sampling, seed=3, batch_size=1)
    eos = together[1][6]
    ended = generate(model, PROMPTS, 12, sampling, seed=3, eos_id=eos)
    assert ended == [row[: row.index(eos)] if eos in row else row for row in together]


def test_those_that_do_not_fit_go_on_from_their_last_half() -> None:
    model, prompts = tiny_gpt(max_seq_len=16).double(), [[1, 2], list(range(14)), list(range(20, 33)), [3, 4, 5]]
    sizes = sorted(len(members) for members, _ in prompt_readers(model, prompts, 12))
    assert sizes == [1, 1, 2]
    together = generate(model, prompts, 12, GREEDY)
    assert together == [generate(model, [prompt], 12, GREEDY)[0] for prompt in prompts]


def test_logits_of_padded_rows_are_those_without_padding() -> None:
    model = tiny_gpt().double()
    reader = PromptReader(model, PROMPTS)
    first, tokens = reader.first(), torch.tensor([1, 2, 3, 4, 5])
    rows = torch.tensor([4, 0, 0])
    reader.select(rows)
    second = reader.next(tokens[rows])
    with torch.no_grad():
        for i, prompt in enumerate(PROMPTS):
            torch.testing.assert_close(first[i], model(torch.tensor([prompt]))[0, -1].float())
        for i, row in enumerate(rows.tolist()):
            torch.testing.assert_close(
                second[i], model(torch.tensor([[*PROMPTS[row], int(tokens[row])]]))[0, -1].float()
            )


def test_a_model_without_padding_or_cache_goes_by_lengths() -> None:
    model = tiny_gpt().double()
    expected = generate(model, PROMPTS, 9, GREEDY), beam_search(model, PROMPTS, 9, Beams(3))
    model.takes_padding = False  # type: ignore[misc]
    model.new_cache = lambda *_: None  # type: ignore[method-assign,assignment]
    assert generate(model, PROMPTS, 9, GREEDY) == expected[0]
    found = beam_search(model, PROMPTS, 9, Beams(3))
    assert [[one.tokens for one in group] for group in found] == [
        [one.tokens for one in group] for group in expected[1]
    ]


@pytest.mark.parametrize("beams", [1, 3])
def test_sources_of_several_lengths_with_ends_at_several_places(beams: int) -> None:
    model = tiny_seq2seq().double()
    sources = [torch.randint(4, 96, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 2, 5, 9, 1)]
    free = translate(model, sources, 0, None, 12, beams)
    eos = max({t for row in free for t in row}, key=lambda t: sum(t in row for row in free))
    together = translate(model, sources, 0, eos, 12, beams)
    assert together == [translate(model, [source], 0, eos, 12, beams)[0] for source in sources]
    assert together == translate(model, sources, 0, eos, 12, beams, batch_size=2)
    if beams == 1:
        assert together == [row[: row.index(eos)] if eos in row else row for row in free]
        with torch.no_grad():
            for source, row in zip(sources, free, strict=True):
                logits = model(torch.tensor([source]), torch.tensor([[0, *row[:-1]]]))
                assert logits[0].argmax(-1).tolist() == row


def test_sources_that_cannot_be_read_are_named() -> None:
    model = tiny_seq2seq()
    for bad in ([], list(range(65))):
        with pytest.raises(UserError, match=f"source 2 has {len(bad)} tokens: the model takes 1 to 64"):
            list(source_readers(model, [[1], bad], 0, 5))
    assert len(translate(model, [[1, 2]], 0, None, 999)[0]) == 64


def test_beams_do_not_pass_the_longest_sequence() -> None:
    with pytest.raises(UserError, match="prompt 2: 60 tokens and 5 new ones are more than model"):
        beam_search(tiny_gpt(), [[1], [1] * 60], 5, Beams(2))
