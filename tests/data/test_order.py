import numpy as np
import pytest

from cairn.data.order import Order, mix, permute


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 100, 257, 1000, 1009, 4096, 4097])
def test_a_permutation_visits_every_index_once(n: int) -> None:
    for key in range(5):
        assert sorted(permute(i, n, key) for i in range(n)) == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 1009, 10**6, 10**12, 2**61 + 1, 2**62])
def test_scalars_and_arrays_agree(n: int) -> None:
    index = np.unique(np.linspace(0, n - 1, 50).astype(np.int64).clip(0, n - 1))
    assert permute(index, n, 7, 3).tolist() == [permute(int(i), n, 7, 3) for i in index]


def test_arrays_keep_their_shape() -> None:
    out = permute(np.arange(12).reshape(3, 4), 12, 5)
    assert out.shape == (3, 4)
    assert sorted(out.ravel().tolist()) == list(range(12))


def test_positions_are_uniform_over_keys() -> None:
    n, keys = 13, 2600
    for index in (0, 6, 12):
        counts = np.bincount([permute(index, n, key) for key in range(keys)], minlength=n)
        chi2 = float(((counts - keys / n) ** 2 / (keys / n)).sum())
        assert chi2 < 39.0, "12 degrees of freedom: 39 is passed by chance once in 10,000"


def test_neighbours_are_scattered() -> None:
    n = 1 << 16
    out = permute(np.arange(n), n, 11)
    steps = np.diff(out)
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.02
    assert np.unique(steps).size > n / 3
    assert abs(np.corrcoef(np.arange(n), out)[0, 1]) < 0.02


def test_epochs_and_seeds_differ_and_each_epoch_is_complete() -> None:
    order = Order(50, seed=1)
    first, second = [order[k] for k in range(50)], [order[k] for k in range(50, 100)]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != [Order(50, seed=2)[k] for k in range(50)]
    # Seed 1 epoch 1 is not seed 2 epoch 0, nor (0, 1) the same as (1, 0).
    assert mix(0, 1) != mix(1, 0)


def test_a_huge_order_needs_no_memory() -> None:
    order = Order(10**12, seed=3)
    seen = {order[k] for k in range(10**12 - 500, 10**12 + 500)}
    assert len(seen) > 990
    assert max(seen) > 9 * 10**11 > 10**11 > min(seen)


def test_the_order_is_the_same_for_ever() -> None:
    """Resumed runs rely on these numbers: change them only with the checkpoint format."""
    assert [Order(1000, 1234)[k] for k in (0, 1, 999, 1000)] == [414, 968, 131, 949]


def test_an_index_outside_is_refused() -> None:
    with pytest.raises(IndexError):
        permute(5, 5, 0)
    with pytest.raises(IndexError):
        permute(np.array([0, 5]), 5, 0)
    with pytest.raises(ValueError, match="at least one"):
        Order(0, 0)
