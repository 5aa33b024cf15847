"""Which evaluation is the best, and when a run stops hoping."""

import pytest

from cairn.config.train import SelectSection
from cairn.errors import UserError
from cairn.train.select import Standing, standing


def rows(name: str, *values: float) -> list[dict[str, float]]:
    training = [{"step": step, "loss": 1.0} for step in range(10 * len(values))]
    return training + [{"step": 10 * i, f"valid/{name}": value} for i, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("accuracy", (0.5, 0.7, 0.6, 0.7), Standing(20, 0.7, 2)),
        ("loss", (0.5, 0.4, 0.45), Standing(20, 0.4, 1)),
        ("bits_per_byte", (2.0, float("nan"), 1.5), Standing(30, 1.5, 0)),
        ("f1", (float("nan"),), None),
        ("f1", (), None),
    ],
)
def test_the_best_is_the_earliest_of_the_best(name, values, expected):
    assert standing(rows(name, *values), SelectSection(metric=name)) == expected


def test_nothing_is_selected_without_a_metric():
    assert standing(rows("loss", 1.0), SelectSection()) is None


def test_a_metric_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"select\.metric f2: evaluations have f1"):
        standing(rows("f1", 1.0), SelectSection(metric="f2"))
