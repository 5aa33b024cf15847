"""Texts side by side in rows."""

import numpy as np
import pytest
import torch

from cairn.data.batches import Item
from cairn.data.packing import ROW, Stream, first_fit, pack, spans


def items(sizes: list[int], seed: int = 0) -> list[Item]:
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(1, 99, n), "labels": np.array(i)} for i, n in enumerate(sizes)]


def test_every_text_is_there_once_and_whole() -> None:
    made = items([5, 40, 3, 64, 30, 30, 1])
    batch = pack(made, [Stream({"input_ids": 0})])
    assert batch["input_ids"].shape == (3, 64)  # 173 tokens: in no fewer rows
    for item, first, last in zip(made, batch["first"], batch["last"], strict=True):
        assert batch["input_ids"].flatten()[first : last + 1].tolist() == item["input_ids"].tolist()
        assert batch["positions"].flatten()[first : last + 1].tolist() == list(range(len(item["input_ids"])))
        assert len(set(batch["document_ids"].flatten()[first : last + 1].tolist())) == 1
    assert int((batch["document_ids"] >= 0).sum()) == 173
    assert batch["labels"].tolist() == list(range(7))


@pytest.mark.parametrize("longest", [1, ROW, ROW + 1, 200])
def test_a_row_is_as_wide_as_the_longest_text(longest: int) -> None:
    width = pack(items([2, longest]), [Stream({"input_ids": 0})])["input_ids"].shape[1]
    assert max(ROW, longest) <= width < max(ROW, longest) + 8
    assert width % 8 == 0


def test_streams_share_their_rows() -> None:
    rng = np.random.default_rng(1)
    pairs = [
        {"source_ids": rng.integers(1, 9, a), "input_ids": rng.integers(1, 9, b)} for a, b in [(60, 2), (2, 60), (9, 9)]
    ]
    batch = pack(pairs, [Stream({"source_ids": 0}, "source_"), Stream({"input_ids": 0})])
    rows = batch["source_ids"].shape[0]
    assert batch["input_ids"].shape[0] == rows
    same = batch["source_first"] // batch["source_ids"].shape[1] == batch["first"] // batch["input_ids"].shape[1]
    assert same.all()
    at = zip(batch["source_first"].tolist(), batch["first"].tolist(), strict=True)
    ours = [(batch["source_document_ids"].flatten()[a], batch["document_ids"].flatten()[b]) for a, b in at]
    assert all(a == b for a, b in ours)


def test_first_fit_fills_no_row_too_far() -> None:
    sizes = [[n % 7 + 1, n % 5 + 1] for n in range(100)]
    rows = first_fit(sizes, [16, 12])
    assert sorted(n for row in rows for n in row) == list(range(100))
    assert all(sum(sizes[n][i] for n in row) <= room for row in rows for i, room in enumerate([16, 12]))


def test_spans_are_the_places_of_texts() -> None:
    places, real = spans(torch.tensor([3, 10]), torch.tensor([3, 12]))
    assert places.tolist() == [[3, 3, 3], [10, 11, 12]]
    assert real.tolist() == [[True, False, False], [True, True, True]]
