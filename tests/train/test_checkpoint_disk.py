"""Disks that fill up, turn read-only or lose a folder while a checkpoint is written, one rank's or all."""

import errno
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cairn.cluster import Cluster
from cairn.errors import QuietError, UserError
from cairn.train import parts, tensorfile
from cairn.train.checkpoint import CheckpointStore, steps_in
from cairn.train.signals import StopSignal
from tests.train.disks import fill, make_read_only, small_disk
from tests.train.dist import run_distributed

MEGABYTE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 4) as path:
        yield path


def of_size(size: int, name: str = "weight/a") -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.ones(size, dtype=torch.uint8))]


def until_trouble(store: CheckpointStore) -> UserError:
    deadline = time.monotonic() + 20
    while (error := store.trouble()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return error


def fail_in_disk(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let no tensor file be written."""

    def write_tensors(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(parts, "write_tensors", write_tensors)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_told_before_anything_is_written(disk: Path, background: bool) -> None:
    store = CheckpointStore(disk / "checkpoints", keep_last=1, background=background)
    store.save(1, of_size(MEGABYTE), {})
    store.wait()
    ballast = fill(disk, MEGABYTE // 2)
    store.save(2, of_size(MEGABYTE), {})
    error = until_trouble(store)
    said = (
        r"checkpoint of step 2 in .*checkpoints \(rank 0\): .* needs 1,04\d,\d+ bytes, 5\d\d,\d+ are free: free space"
    )
    assert "keep_last" in str(error)
    with pytest.raises(UserError, match=said):
        store.wait()
    assert os.listdir(store.root) == ["step-00000001"]
    assert CheckpointStore(store.root).latest().step == 1
    ballast.unlink()
    store.save(3, of_size(MEGABYTE), {})  # whoever makes room goes on
    store.wait()
    assert steps_in(store.root) == [3]


def test_a_disk_that_fills_up_while_writing_is_left_as_it_was(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cairn.train.checkpoint.check_space", lambda *_: None)
    monkeypatch.setattr(tensorfile, "check_space", lambda *_: None)
    store = CheckpointStore(disk / "checkpoints")
    store.save(1, of_size(MEGABYTE), {})
    free = shutil.disk_usage(disk).free
    store.save(2, of_size(4 * MEGABYTE), {})
    with pytest.raises(UserError, match=r"No space left on device: free space.*earlier checkpoints are intact"):
        store.wait()
    assert shutil.disk_usage(disk).free == free
    assert CheckpointStore(store.root).latest().step == 1


def test_a_read_only_disk(disk: Path) -> None:
    store = CheckpointStore(disk / "checkpoints", background=True)
    store.save(1, of_size(100), {})
    store.wait()
    make_read_only(disk)
    store.save(2, of_size(100), {})
    with pytest.raises(UserError, match=r"step 2 .*Read-only file system: make it writable.* intact"):
        store.wait()
    assert store.latest().step == 1
    with pytest.raises(UserError, match=r"new: Read-only file system.*run\.dir"):
        CheckpointStore(disk / "new")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EIO, "disk or file server"),
        (errno.EDQUOT, "free space"),
        (errno.EACCES, "make it writable"),
        (errno.EFBIG, "File too large"),
    ],
)
def test_other_errors_of_disks_are_lines_too(
    tmp_path: Path, number: int, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, background=True)
    store.save(1, of_size(100), {})
    store.wait()
    fail_in_disk(monkeypatch, number)
    store.save(2, of_size(100), {})
    error = until_trouble(store)
    assert str(error).startswith(f"checkpoint of step 2 in {tmp_path} (rank 0): {os.strerror(number)}")
    assert remedy in str(error)
    assert "\n" not in str(error)
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_checkpoints_folder_removed_between_saves_is_made_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(1, of_size(100), {})
    shutil.rmtree(store.root)
    store.save(2, of_size(100), {})
    store.wait()
    assert steps_in(store.root) == [2]


def test_a_run_folder_that_vanished_is_not_made_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    store.save(1, of_size(100), {})
    shutil.rmtree(tmp_path / "run")
    store.save(2, of_size(100), {})
    with pytest.raises(UserError, match=r"^\S*/run vanished while the checkpoint of step 2 was written \(rank 0\)"):
        store.wait()
    assert not (tmp_path / "run").exists()


def test_a_folder_that_vanishes_while_rank_0_waits_is_noticed_at_once(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints", 0, 2, background=True)
    store.save(1, of_size(100), {})
    report = tmp_path / "run" / "checkpoints" / ".tmp-step-00000001" / "rank-00000.json"
    deadline = time.monotonic() + 20
    while not report.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert "run vanished while the checkpoint of step 1" in str(until_trouble(store))


def test_a_rank_whose_files_rank_0_removed_leaves_it_to_rank_0_to_say_why(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1, 2, background=False)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        shutil.rmtree(tmp_path / ".tmp-step-00000001")
        yield from of_size(100)

    store.save(1, tensors(), {})
    assert isinstance(until_trouble(store), QuietError)


@pytest.mark.parametrize("background", [False, True])
def test_a_rank_that_cannot_write_tells_rank_0(
    tmp_path: Path, background: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, other, third = (CheckpointStore(tmp_path, rank, 3, background=background) for rank in range(3))
    third.save(1, of_size(100, "weight/c"), {})
    third.wait()
    with monkeypatch.context() as patched:
        fail_in_disk(patched, errno.ENOSPC)
        other.save(1, of_size(100, "weight/b"), {})
        told = until_trouble(other)
    # the others' files stay, and its own are gone
    folder = tmp_path / ".tmp-step-00000001"
    names = ["rank-00001.failed", "rank-00002-000.safetensors", "rank-00002.json"]
    assert sorted(os.listdir(folder)) == names
    main.save(1, of_size(100), {})
    assert str(until_trouble(main)) == str(told)
    assert "(rank 1): No space left on device" in str(told)
    assert os.listdir(folder) == ["rank-00000.failed"]  # all space is free again
    third.save(1, of_size(100, "weight/c"), {})  # a rank that comes late
    assert str(until_trouble(third)) == str(told)
    with main:
        main._pending = None
    assert os.listdir(tmp_path) == []


def test_no_rank_leaves_a_save_that_others_are_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are gathered by all ranks: who cannot write them still takes part, in this save and the next."""
    monkeypatch.setattr(tensorfile, "PIECE_BYTES", 10)
    fail_in_disk(monkeypatch, errno.ENOSPC)
    store, taken = CheckpointStore(tmp_path, 1, 2), []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for index in range(5):
            taken.append(index)
            yield f"weight/{index}", torch.zeros(10, dtype=torch.uint8)

    store.save(1, tensors(), {})
    assert taken == [0, 1, 2, 3, 4]
    monkeypatch.undo()
    store.save(2, tensors(), {})
    assert len(taken) == 10
    assert (tmp_path / ".tmp-step-00000002" / "rank-00001.failed").exists()
    assert "step 1" in str(store.trouble())
    with pytest.raises(UserError, match="step 1"):
        store.wait()


def test_a_word_that_finds_no_room_is_still_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(parts, "write_atomically", full)
    parts.withdraw(tmp_path, 1, "why")
    (tmp_path / "rank-00000.json").write_text("{}")
    with pytest.raises(UserError, match="rank-00001 could not write into"):
        parts.gather(tmp_path, 1, 2, 60.0, threading.Event())


def test_the_one_before_goes_only_once_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(1, of_size(100), {})
    seen = []
    rename = Path.rename

    def watched(path: Path, target: Path) -> Path:
        seen.append((path.name, steps_in(tmp_path)))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    store.save(2, of_size(100), {})
    assert seen == [(".tmp-step-00000002", [1]), ("step-00000001", [1, 2])]
    assert steps_in(tmp_path) == [2]


def train_until_told(rank: int, root: str) -> list[str]:
    """A loop like the trainer's on two ranks, the second of which has a disk that fills up."""
    store = CheckpointStore(Path(root), rank, 2, background=True)
    cluster = Cluster(rank=rank, world_size=2)
    step = 0
    if rank == 1:
        fail_in_disk(pytest.MonkeyPatch(), errno.ENOSPC)
    try:
        with StopSignal(cluster) as stop, store:
            while not stop.agreed(store.trouble()):
                step += 1
                if step == 3:
                    store.save(step, of_size(100, f"weight/{rank}"), {})
                time.sleep(0.01)
                assert step < 500
    except UserError as error:
        return [type(error).__name__, str(error), str(step)]
    return ["none"]


@pytest.mark.slow
def test_all_ranks_stop_at_the_same_step_and_one_tells_why(tmp_path: Path) -> None:
    results = run_distributed(train_until_told, 2, str(tmp_path / "checkpoints"))
    kinds, texts, steps = zip(*results, strict=True)
    assert sorted(kinds) == [QuietError.__name__, UserError.__name__]
    told = texts[kinds.index("UserError")]
    assert "checkpoint of step 3" in told
    assert "(rank 1): No space left" in told
    assert len(set(steps)) == 1
    assert not list((tmp_path / "checkpoints").glob("step-*"))
