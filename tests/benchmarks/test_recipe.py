"""The table of a recipe's ingredients, from results in a file."""

from pathlib import Path

import pytest

from benchmarks.recipe import Results, table

OF = {"size": "tiny", "source": None}


def test_the_rate_with_the_most_seeds_counts_and_a_file_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    first = Results(path, OF)
    first.add("modern", 1.0, 1, [(60, 5.0), (600, 4.0)])
    first.add("modern without RoPE (learned positions)", 1.0, 1, [(60, 5.0), (600, 4.5)])
    first.add("modern without RoPE (learned positions)", 2.0, 1, [(60, 5.0), (600, 4.3)])
    again = Results(path, OF)
    assert again.curve("modern", 1.0, 1) == [(60, 5.0), (600, 4.0)]
    assert again.curve("modern", 1.0, 2) is None
    again.add("modern without RoPE (learned positions)", 2.0, 2, [(60, 5.0), (600, 4.5)])
    _, _, whole, without = table(again).splitlines()
    assert whole == "| modern | 4.000 (4.000 to 4.000) | x 1 | 1 |  |"
    assert without.endswith("| 4.400 (4.300 to 4.500) | x 2 | 2 | +0.400 |")


def test_results_of_another_corpus_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    Results(path, OF).add("modern", 1.0, 1, [(600, 4.0)])
    with pytest.raises(SystemExit, match="another"):
        Results(path, {"size": "tiny", "source": "books.jsonl"})
