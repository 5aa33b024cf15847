"""A signal before the loop begins: there is nothing to save, so every rank leaves at once and in good order."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.pretrain import runs
from tests.pretrain.conftest import Place

STAGES = {
    "preparing": ("cairn.data.manifest:Manifest", "write"),
    "models": ("pretrain.task:LanguageModel", "models"),
    "engine": ("cairn.train.engine:Engine", "__init__"),
}


class Stop:
    """Say that a rank is in a stage, and stay there."""

    def __init__(self, stage: str, here: Path) -> None:
        self.stage, self.here = stage, here

    def __call__(self, rank: int) -> None:
        def stay(*_: object, **__: object) -> None:
            (self.here / f"reached-{rank}").touch()
            time.sleep(60)

        module, _, name = STAGES[self.stage][0].partition(":")
        owner = getattr(__import__(module, fromlist=[name]), name)
        setattr(owner, STAGES[self.stage][1], stay)


@pytest.mark.parametrize(
    ("stage", "number", "ranks"),
    [
        ("preparing", signal.SIGUSR1, 1),
        pytest.param("preparing", signal.SIGTERM, 2, marks=pytest.mark.slow),
        ("engine", signal.SIGTERM, 1),
        pytest.param("models", signal.SIGUSR1, 2, marks=pytest.mark.slow),
    ],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_every_rank_leaves_at_once(
    place: Place, tmp_path: Path, stage: str, number: signal.Signals, ranks: int
) -> None:
    name = f"early-{stage}-{number.name}-{ranks}"
    overrides = ("train.micro_batch_size=4", f"run.name={name}")
    if stage == "preparing":
        overrides = (*overrides, f"data.dir={tmp_path / 'data'}")
    job = runs.start(place.gpt, *overrides, folder=tmp_path, ranks=ranks, before=Stop(stage, tmp_path))
    deadline = time.monotonic() + 60
    # rank 0 alone prepares: the other one waits for it in a collective
    while len(list(tmp_path.glob("reached-*"))) < (1 if stage == "preparing" else ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    begun = time.monotonic()
    for process in job.processes:
        os.kill(process.pid, number)
    done = job.wait()
    assert time.monotonic() - begun < 10
    assert done.codes == [0] * ranks, done.text
    assert done.text.count(f"stopped by {number.name}: the same command goes on") == 1
    assert "Traceback" not in done.text
