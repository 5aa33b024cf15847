"""The simulation of goodput: its failures are the published ones, and it ends where the closed form says."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.goodput import Costs, analytic, best, best_analytic, draw, mtbf, simulate, young


def test_failures_come_at_the_published_rate() -> None:
    between = mtbf(16384)
    assert 54 * 86400 / between == pytest.approx(419)
    assert sum(draw(16384, 20_000, 1)) / 20_000 == pytest.approx(between, rel=0.03)


@pytest.mark.parametrize("interval", [30.0, 300.0, 3600.0, 20_000.0])
@pytest.mark.parametrize("gpus", [1024, 16384])
def test_the_simulation_agrees_with_the_closed_form(gpus: int, interval: float) -> None:
    gaps = draw(gpus, 40_000, 7)
    between = sum(gaps) / len(gaps)
    assert simulate(Costs(), interval, gaps) == pytest.approx(analytic(Costs(), interval, between), abs=0.01)


def test_youngs_interval_is_the_limit_for_cheap_saves_and_rare_failures() -> None:
    costs, between = Costs(stall=1.0, write=0.0), mtbf(64)
    assert best_analytic(costs, 64) == pytest.approx(young(costs, between), rel=0.02)
    assert best(costs, draw(64, 2000, 3))[0] == pytest.approx(young(costs, between), rel=0.5)  # a flat top


def test_without_failures_only_the_stall_is_lost() -> None:
    costs = Costs(stall=10.0)
    assert simulate(costs, 90.0, [1e9]) == pytest.approx(0.9, rel=1e-4)


def test_failures_that_come_before_the_first_checkpoint_leave_nothing() -> None:
    costs = Costs()
    assert simulate(costs, 600.0, [600.0 + 660.0 + 61.0] * 5) == 1200 / (5 * 1321)  # of the first, without a restart
    assert math.isclose(simulate(costs, 600.0, [2000.0] * 1000), 1200.0 / 2000.0, rel_tol=0.01)


def test_the_table_and_the_plot(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.goodput", "--failures", "50", "--plot", str(tmp_path / "plot.svg")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "| 16,384 | 3.1 h |" in said
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")
