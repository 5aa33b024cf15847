"""Runs whose disk fills up, turns read-only or loses a folder, and two runs that want one folder."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cairn.train.checkpoint import folder_of, newest, steps_in
from cairn.train.folder import RunFolder
from pretrain.compare import Result, first_differences
from tests.pretrain import runs
from tests.pretrain.conftest import STEPS, Place
from tests.pretrain.runs import Mishap
from tests.train.disks import fill, make_read_only, small_disk

BF16 = "engine.precision=bf16"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 6) as path:
        yield path


class FillUp:
    """Leave a disk so many bytes when step `at` begins, once a checkpoint is there."""

    def __init__(self, disk: Path, at: int, leave: int, checkpoint: Path) -> None:
        self.disk, self.at, self.leave, self.checkpoint = disk, at, leave, checkpoint

    def __call__(self, rank: int) -> None:
        if rank != 0:
            return
        from cairn.train.language_model import LanguageModel

        step, calls = LanguageModel.step, []

        def struck(*args: object, **kwargs: object) -> object:
            calls.append(None)
            if len(calls) == self.at:
                while not self.checkpoint.exists():
                    time.sleep(0.005)
                fill(self.disk, self.leave)
            return step(*args, **kwargs)

        LanguageModel.step = struck


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("background", ["true", "false"])
def test_a_disk_that_fills_up_ends_the_run_with_one_line_and_room_mends_it(
    place: Place, straight: RunFolder, disk: Path, tmp_path: Path, ranks: int, background: str
) -> None:
    argv = (place.gpt, BF16, f"run.dir={disk}", "run.name=full", "train.micro_batch_size=4")
    folder = RunFolder(disk, "full")
    first = folder_of(folder.checkpoints, 4)
    options = (f"checkpoint.background={background}",)
    full = FillUp(disk, 6, 100_000, first)
    said = runs.run(*argv, *options, folder=tmp_path, ranks=ranks, before=full, code=2).text
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, said
    assert "checkpoint of step 8" in errors[0]
    assert "free space" in errors[0]
    assert os.listdir(folder.checkpoints) == ["step-00000004"]
    assert newest(folder.checkpoints)[0].step == 4
    if background == "true":
        assert len(runs.rows(folder)) < STEPS  # it does not go on to the end
    (disk / "ballast").unlink()
    assert "going on from the checkpoint of step 4" in runs.run(*argv, folder=tmp_path, ranks=ranks).text
    if ranks == 1:
        place.run(place.gpt, "halves", BF16, "train.micro_batch_size=4")
        assert first_differences(Result.of(place.folder("halves")), Result.of(folder)) == []
    assert steps_in(folder.checkpoints)[-1] == STEPS


def test_no_room_for_metrics(place: Place, disk: Path, tmp_path: Path) -> None:
    folder = RunFolder(disk, "rows")
    argv = (place.gpt, f"run.dir={disk}", "run.name=rows", "train.log_every=1")
    full = FillUp(disk, 6, 0, folder_of(folder.checkpoints, 4))
    said = runs.run(*argv, "train.steps=60", "checkpoint.every=4", folder=tmp_path, before=full, code=2).text
    assert said.count("error:") == 1, said
    assert "No space left on device" in said or "are free" in said
    (disk / "ballast").unlink()
    assert "going on from the checkpoint of step" in runs.run(*argv, "train.steps=60", folder=tmp_path).text


def test_a_read_only_run_folder_is_refused_at_the_start(place: Place, disk: Path, tmp_path: Path) -> None:
    argv = (place.gpt, f"run.dir={disk}", "run.name=readonly", "train.steps=4")
    runs.run(*argv, folder=tmp_path)
    make_read_only(disk)
    said = runs.run(*argv, folder=tmp_path, code=2).text
    assert said.count("\n") == 1
    assert "Read-only file system: make it writable, or set run.dir" in said


def test_a_run_folder_that_vanishes(place: Place, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "gone")
    job = runs.start(
        place.gpt, f"run.dir={tmp_path}", "run.name=gone", "train.steps=100000", "checkpoint.every=20", folder=tmp_path
    )
    wait_for(folder_of(folder.checkpoints, 20))
    folder.path.rename(tmp_path / "moved")
    done = job.wait()
    assert done.codes == [2], done.text
    assert done.text.count("error:") == 1
    assert "vanished" in done.text
    assert "Traceback" not in done.text
    assert newest(tmp_path / "moved" / "checkpoints")[0] is not None
    assert not folder.path.exists()


def test_the_second_launch_is_refused_and_the_first_goes_on(place: Place, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "two")
    argv = (place.gpt, f"run.dir={tmp_path}", "run.name=two", "train.steps=100000")
    first = runs.start(*argv, folder=tmp_path)
    wait_for(folder_of(folder.checkpoints, 4))
    config = folder.config.stat().st_mtime_ns
    said = runs.run(*argv, folder=tmp_path, code=2).text
    assert f"{folder.path} is in use by pid {first.processes[0].pid} on host {os.uname().nodename}" in said
    assert folder.config.stat().st_mtime_ns == config
    assert first.processes[0].is_alive()
    os.kill(first.processes[0].pid, signal.SIGKILL)
    first.wait()
    again = Mishap(signal.SIGTERM, 2)
    assert "going on from the checkpoint" in runs.run(*argv, folder=tmp_path, before=again).text  # at once
    assert (folder.path / ".lock").read_text() == ""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
