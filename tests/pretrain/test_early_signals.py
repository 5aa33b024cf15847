"""A signal before the first step: every rank ends in good order, at once where nobody could say how long it takes."""

import importlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.pretrain import runs
from tests.pretrain.conftest import Place

STAGES = {
    "prepare": ("cairn.data.manifest:Manifest", "write"),
    "models": ("cairn.train.language_model:LanguageModel", "models"),
    "engine": ("cairn.train.engine:Engine", "__init__"),
}


class Pause:
    """Say that a rank has come to a stage, and stay there until told to go on."""

    def __init__(self, stage: str, here: Path) -> None:
        self.stage, self.here = stage, here

    def __call__(self, rank: int) -> None:
        where, name = STAGES[self.stage]
        owner = getattr(importlib.import_module(where.partition(":")[0]), where.partition(":")[2])
        method = getattr(owner, name)

        def paused(*args: Any, **kwargs: Any) -> Any:
            (self.here / f"reached-{rank}").touch()
            wait_for(self.here / "go")
            return method(*args, **kwargs)

        setattr(owner, name, paused)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stopped(place: Place, here: Path, stage: str, number: signal.Signals, ranks: int, name: str, go: bool) -> runs.Done:
    """A run whose ranks are signalled in a stage, and go on from there then or not."""
    argv = (place.gpt, "train.micro_batch_size=4", f"run.name={name}", f"data.dir={here / 'data'}")
    job = runs.start(*argv, folder=here, ranks=ranks, before=Pause(stage, here))
    for rank in range(1 if stage == "prepare" else ranks):  # rank 0 alone prepares: the others wait for it
        wait_for(here / f"reached-{rank}")
    for process in job.processes:
        os.kill(process.pid, number)
    if go:
        (here / "go").touch()
    done = job.wait()
    assert done.codes == [0] * ranks, done.text
    assert "Traceback" not in done.text
    return done


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_while_the_corpus_is_prepared(place: Place, tmp_path: Path, number: signal.Signals, ranks: int) -> None:
    name = f"prepare-{number.name}-{ranks}"
    done = stopped(place, tmp_path, "prepare", number, ranks, name, go=False)
    assert done.text.count(f"stopped by {number.name}: the same command goes on") == 1
    assert not place.folder(name).path.exists()


@pytest.mark.parametrize(
    ("stage", "ranks"), [("engine", 1), pytest.param("models", 2, marks=pytest.mark.slow)], ids=["engine", "models"]
)
def test_while_models_and_engines_are_built(place: Place, tmp_path: Path, stage: str, ranks: int) -> None:
    name = f"start-{stage}"
    done = stopped(place, tmp_path, stage, signal.SIGUSR1, ranks, name, go=True)
    where = "before the first step" if ranks == 1 else "after step 1"
    assert f"stopped by SIGUSR1 {where}" in done.text
    place.run(place.gpt, name, "train.micro_batch_size=4", f"data.dir={tmp_path / 'data'}", "train.steps=14")
