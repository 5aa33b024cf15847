import threading

import numpy as np
import pytest
import torch

from cairn.data.batches import IGNORE, Batch, Item, Loader
from cairn.errors import UserError


class Numbers:
    """Sample k is the number k."""

    def __init__(self, n: int = 100, broken: int | None = None) -> None:
        self.n, self.broken, self.built = n, broken, 0

    def __len__(self) -> int:
        return self.n

    def item(self, k: int) -> Item:
        self.built += 1
        if k == self.broken:
            raise UserError(f"sample {k} is torn")
        return {"input_ids": np.array([k, k]), "labels": np.array([k, k]), "next_sentence_label": np.array(k)}


def numbers(batches: list[Batch]) -> list[int]:
    return [int(k) for batch in batches for k in batch["input_ids"][:, 0]]


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 2), (2, 4), (4, 1)])
def test_a_step_has_the_same_samples_on_every_topology(world: int, micro: int) -> None:
    loaders = [Loader(Numbers(), 8, micro, rank, world) for rank in range(world)]
    for s in range(3):
        parts = [loader.step(s) for loader in loaders]
        assert sorted(k for part in parts for k in numbers(part)) == list(range(8 * s, 8 * s + 8))
        for part in parts:
            assert [len(batch["labels"]) for batch in part] == [micro] * (8 // world // micro)


def test_steps_may_be_asked_in_any_order() -> None:
    loader = Loader(Numbers(), 4, 2)
    for s in (7, 8, 2, 2, 3, 100):
        assert sorted(numbers(loader.step(s))) == list(range(4 * s, 4 * s + 4))
    loader.close()


def test_building_ahead_is_bounded_and_in_one_other_thread() -> None:
    samples, threads = Numbers(), set[int]()
    item = samples.item

    def spy(k: int) -> Item:
        threads.add(threading.get_ident())
        return item(k)

    samples.item = spy  # type: ignore[method-assign]
    loader = Loader(samples, 4, 4, ahead=2)
    loader.step(0)
    loader.close()
    loader._thread.shutdown(wait=True)
    assert samples.built <= 3 * 4
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


def test_an_error_reaches_the_caller_at_its_step() -> None:
    loader = Loader(Numbers(broken=9), 4, 4)
    loader.step(0)
    loader.step(1)
    with pytest.raises(UserError, match="sample 9 is torn"):
        loader.step(2)
    assert numbers(loader.step(3)) == [12, 13, 14, 15]


@pytest.mark.parametrize(
    ("n", "limit", "world", "expected"),
    [
        (10, None, 1, [*range(10)]),
        (10, None, 4, [*range(10)]),
        (9, None, 2, [*range(9)]),
        (3, None, 4, [*range(3)]),
        (3, 8, 1, [*range(3)]),
        (10, 5, 2, [0, 2, 4, 6, 8]),
        (10, 4, 1, [0, 2, 5, 7]),
    ],
)
def test_evaluation_takes_each_sample_once_and_keeps_ranks_aligned(
    n: int, limit: int | None, world: int, expected: list[int]
) -> None:
    seen: list[int] = []
    counts = set()
    for rank in range(world):
        batches = list(Loader(Numbers(n), world, 1, rank, world).evaluation(2, limit))
        counts.add(len(batches))
        for batch in batches:
            assert {len(value) for value in batch.values()} == {2}, "a compiled model sees one shape"
            real = batch["labels"][:, 0] != IGNORE
            assert torch.equal(real, batch["next_sentence_label"] != IGNORE)
            seen += batch["input_ids"][real, 0].tolist()
    assert sorted(seen) == expected
    assert len(counts) == 1


def test_evaluation_leaves_training_where_it_was() -> None:
    loader = Loader(Numbers(), 4, 4)
    loader.step(0)
    assert len(list(loader.evaluation(32))) == 4
    assert numbers(loader.step(1)) == [4, 5, 6, 7]
    assert loader.wait_seconds > 0


def test_sizes_that_do_not_divide_are_named() -> None:
    with pytest.raises(UserError, match=r"12.*micro_batch_size 4.*world size 2"):
        Loader(Numbers(), 12, 4, 0, 2)


def test_no_samples_is_an_error() -> None:
    with pytest.raises(UserError, match="shorter than one sequence"):
        Loader(Numbers(0), 1, 1)
