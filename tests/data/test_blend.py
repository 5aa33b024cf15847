from collections import Counter

import pytest

from cairn.data.blend import Blend


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [0.7, 0.2, 0.1], [3, 1, 1, 1, 1], [1000, 1], [1e-9, 1.0]])
def test_each_block_has_the_exact_shares(weights: list[float]) -> None:
    blend = Blend(weights)
    assert sum(blend.counts) == blend.block
    for weight, count in zip(weights, blend.counts, strict=True):
        assert abs(count - blend.block * weight / sum(weights)) < 1
    if blend.block <= 1 << 14:
        for block in (0, 5):
            places = range(block * blend.block, (block + 1) * blend.block)
            assert Counter(blend[k][0] for k in places) == Counter(dict(enumerate(blend.counts)))


def test_each_source_is_walked_through_in_order() -> None:
    blend = Blend([0.5, 0.3, 0.2])
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for k in range(3 * blend.block):
        source, place = blend[k]
        seen[source].append(place)
    for source, places in seen.items():
        assert places == list(range(3 * blend.counts[source]))


def test_sources_are_spread_evenly() -> None:
    blend = Blend([0.75, 0.25])
    for start in range(0, 2 * blend.block, 4):
        assert sum(blend[k][0] for k in range(start, start + 4)) == 1


def test_one_source_is_itself() -> None:
    assert [Blend([2.0])[k] for k in (0, 1, 10**12)] == [(0, 0), (0, 1), (0, 10**12)]


def test_a_weight_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        Blend([1.0, 0.0])
