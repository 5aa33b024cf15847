"""Sampling: supports, frequencies, reproducibility."""

import pytest
import torch

from cairn.decode.generate import generate
from cairn.decode.sample import Rules, Sampling, draw, generators, probabilities
from cairn.errors import UserError
from tests.decode.models import tiny_gpt

LOGITS = torch.log(torch.tensor([[0.05, 0.4, 0.15, 0.3, 0.1]]))


def test_temperature_one_is_softmax() -> None:
    assert torch.allclose(probabilities(LOGITS, Sampling()), LOGITS.double().exp(), atol=1e-6)


def test_temperature_sharpens_and_zero_is_greedy() -> None:
    sharp = probabilities(LOGITS, Sampling(temperature=0.5))
    expected = LOGITS.double().exp() ** 2
    assert torch.allclose(sharp, expected / expected.sum(), atol=1e-6)
    assert probabilities(LOGITS, Sampling(temperature=0)).tolist() == [[0, 1, 0, 0, 0]]
    assert probabilities(LOGITS * 1e4, Sampling(temperature=1e-300))[0, 1] == 1


@pytest.mark.parametrize(
    ("k", "support"), [(1, {1}), (2, {1, 3}), (3, {1, 2, 3}), (5, {0, 1, 2, 3, 4}), (99, set(range(5)))]
)
def test_top_k_support(k: int, support: set[int]) -> None:
    probs = probabilities(LOGITS, Sampling(top_k=k))[0]
    assert set(probs.nonzero()[:, 0].tolist()) == support
    assert probs.sum().item() == pytest.approx(1)


def test_top_k_keeps_exactly_k_among_equals() -> None:
    assert int((probabilities(torch.zeros(1, 9), Sampling(top_k=4)) > 0).sum()) == 4


@pytest.mark.parametrize(
    ("p", "support"),
    [(0.01, {1}), (0.39, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.71, {1, 2, 3}), (1.0, set(range(5)))],
)
def test_top_p_is_the_smallest_sufficient_set(p: float, support: set[int]) -> None:
    probs = probabilities(LOGITS, Sampling(top_p=p))[0]
    assert set(probs.nonzero()[:, 0].tolist()) == support
    kept = LOGITS.double().exp()[0] * (probs > 0)
    assert torch.allclose(probs, kept / kept.sum(), atol=1e-6)


def test_top_p_follows_top_k_and_temperature() -> None:
    # Of the three kept by top-k (0.4, 0.3, 0.15 of 0.85), two hold 0.8; without top-k it takes three.
    assert int((probabilities(LOGITS, Sampling(top_k=3, top_p=0.8)) > 0).sum()) == 2
    assert int((probabilities(LOGITS, Sampling(top_p=0.8)) > 0).sum()) == 3
    assert int((probabilities(LOGITS, Sampling(temperature=0.1, top_p=0.8)) > 0).sum()) == 1


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.7), Sampling(top_k=3), Sampling(top_p=0.8)])
def test_frequencies_match_probabilities(sampling: Sampling) -> None:
    n = 20_000
    probs = probabilities(LOGITS, sampling)
    tokens = draw(probs.expand(n, -1), generators(5, 1) * n)
    counts, expected = torch.bincount(tokens, minlength=5).double(), probs[0] * n
    assert not counts[expected == 0].any()
    kept = expected > 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum().item()
    assert chi_square < 20.5  # 99.96 % of chi-square with 4 degrees of freedom


def test_seed_decides_and_rows_are_independent() -> None:
    probs = probabilities(torch.zeros(3, 1000), Sampling())

    def sequence(seed: int, n: int) -> list[list[int]]:
        rows = generators(seed, n)
        return torch.stack([draw(probs[:n], rows) for _ in range(8)], dim=1).tolist()

    assert sequence(1, 3) == sequence(1, 3)
    assert sequence(1, 3) != sequence(2, 3)
    assert sequence(1, 3)[:2] == sequence(1, 2)
    assert len({tuple(row) for row in sequence(1, 3)}) == 3


def test_minus_infinity_is_never_drawn() -> None:
    logits = torch.full((1, 50), -torch.inf)
    logits[0, 7] = 0
    for sampling in (Sampling(), Sampling(temperature=0), Sampling(top_k=5), Sampling(top_p=0.5)):
        rows = generators(0, 1)
        assert {int(draw(probabilities(logits, sampling), rows)) for _ in range(50)} == {7}


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
    ],
)
def test_bad_values_are_named(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(values)).replace("_", "-")):
        Sampling(**values)


SAMPLINGS = [
    Sampling(),
    Sampling(0.7),
    Sampling(1.3, top_k=7),
    Sampling(0.9, top_p=0.6),
    Sampling(1.6, 9, 0.8, 1.3),
    Sampling(repetition_penalty=0.7),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("least", [0, 3])
def test_probabilities_are_those_of_transformers(sampling: Sampling, least: int) -> None:
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    logits, seen, eos = 3 * torch.randn(5, 16), torch.randint(16, (5, 6)), 4
    config = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k or 0,
        top_p=sampling.top_p or 1.0,
        repetition_penalty=sampling.repetition_penalty,
        min_new_tokens=least,
        eos_token_id=eos,
        pad_token_id=0,
    )
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1))
    theirs._prepare_special_tokens(config, False, "cpu")
    processors = theirs._get_logits_processor(config, input_ids_seq_length=5, device="cpu")
    rules = Rules(sampling.repetition_penalty, least, eos)
    ours = probabilities(rules.apply(logits, seen, written=1), sampling)
    expected = processors(seen, logits.clone()).double().softmax(-1)
    assert torch.equal(ours > 0, expected > 0)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
    assert bool((ours[:, eos] == 0).all()) == (least == 3)


def test_generated_pairs_have_the_law_of_the_model() -> None:
    # Two tokens after a prompt, penalised, in one batch: their joint law, worked out with the model itself.
    model, sampling, n = tiny_gpt(vocab_size=6, init_std=0.2), Sampling(1.5, 5, 0.95, 1.5), 6000
    law = torch.zeros(6, 6, dtype=torch.float64)
    with torch.no_grad():
        rules, prompt = Rules(sampling.repetition_penalty), [1, 2]
        first = probabilities(rules.apply(model(torch.tensor([prompt]))[:, -1], torch.tensor([prompt]), 0), sampling)[0]
        for token in range(6):
            text = torch.tensor([[*prompt, token]])
            law[token] = first[token] * probabilities(rules.apply(model(text)[:, -1], text, 1), sampling)[0]
    drawn = torch.tensor(generate(model, [prompt] * n, 2, sampling, seed=8))
    counts = torch.bincount(drawn[:, 0] * 6 + drawn[:, 1], minlength=36).double()
    expected = law.flatten() * n
    assert not counts[expected == 0].any()
    kept = expected > 0
    assert int(kept.sum()) > 10
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5
