"""Sampling: supports, frequencies, reproducibility."""

import pytest
import torch

from cairn.decode.sample import Sampling, draw, generators, probabilities
from cairn.errors import UserError

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
    "values", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_bad_values_are_named(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(values)).replace("_", "-")):
        Sampling(**values)
