"""A run that is killed at random moments ends like one that was left alone."""

from pathlib import Path

import pytest

from benchmarks.chaos import arena_in, differences, run_chaos

KILLS = 8
"""Each kind once, and one more: a minute and a half on two free cores; the long form is
`python -m benchmarks.chaos --kills 100`."""


@pytest.mark.slow
def test_mishaps_change_nothing(tmp_path: Path) -> None:
    with arena_in(tmp_path, ranks=2, steps=20 * KILLS) as arena:
        report = run_chaos(arena, KILLS, seed=20)
        assert differences(arena) == []
    assert sum(report.strikes.values()) == KILLS
    assert len(report.strikes) >= 6, "too few kinds and moments"
