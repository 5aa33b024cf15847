import math

import pytest

from cairn.config.train import ScheduleSection
from cairn.optim.schedule import schedule


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_warmup_rises_to_the_peak_and_the_rest_falls(name: str, warmup: int) -> None:
    factor = schedule(ScheduleSection(name=name, warmup_steps=warmup, min_ratio=0.1), 100)
    values = [factor(s) for s in range(100)]
    peak = max(warmup - 1, 0)
    assert values[:warmup] == [(s + 1) / warmup for s in range(warmup)]
    assert values[peak] == 1.0
    assert all(a >= b for a, b in zip(values[peak:], values[peak + 1 :], strict=False))
    assert values[-1] == pytest.approx(1.0 if name == "constant" else 0.1)
    assert factor(1000) == pytest.approx(values[-1])


def test_the_middle_of_each_shape() -> None:
    def at(name: str, step: int) -> float:
        return schedule(ScheduleSection(name=name, warmup_steps=1, min_ratio=0.0, decay_steps=20), 101)(step)

    assert at("cosine", 50) == pytest.approx(0.5)
    assert at("cosine", 25) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert at("linear", 25) == pytest.approx(0.75)
    assert at("wsd", 80) == 1.0
    assert at("wsd", 90) == pytest.approx(0.5)


def test_wsd_decays_over_a_fifth_by_default() -> None:
    factor = schedule(ScheduleSection(name="wsd", warmup_steps=10, min_ratio=0.0), 100)
    assert factor(79) == 1.0
    assert factor(80) < 1.0


def test_runs_shorter_than_their_warmup_or_of_one_step() -> None:
    assert [schedule(ScheduleSection(warmup_steps=100), 3)(s) for s in range(3)] == [0.01, 0.02, 0.03]
    assert schedule(ScheduleSection(warmup_steps=0), 1)(0) == 1.0
