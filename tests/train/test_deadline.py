"""train.max_hours: the run ends in time, decayed, and a cooldown goes on after a kill."""

import json
import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from cairn.cluster import Cluster
from cairn.config.schema import RunConfig
from cairn.config.train import CheckpointSection, ScheduleSection, TrainSection
from cairn.optim.schedule import schedule
from cairn.train import deadline as module
from cairn.train.checkpoint import folder_of, newest, steps_in
from cairn.train.deadline import UNDECIDED, Deadline
from cairn.train.folder import RunFolder
from cairn.train.trainer import Trainer, train
from pretrain.compare import Result, first_differences
from tests.train.dist import run_distributed
from tests.train.toy import BATCH, Toy, config

HOUR = 3600.0


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def of(shape: ScheduleSection, max_hours: float | None = 1.0, steps: int = 100_000) -> RunConfig:
    section = TrainSection(steps=steps, max_hours=max_hours, log_every=10, global_batch_size=BATCH, micro_batch_size=2)
    return RunConfig(train=section, schedule=shape, checkpoint=CheckpointSection(every=0))


def deadline(made: RunConfig) -> Deadline:
    return Deadline(made, schedule(made.schedule, made.train.steps), evaluated=2 * BATCH)


def drive(guide: Deadline, clock: Clock, step: int, each: float) -> tuple[int, list[float]]:
    """Steps of so many seconds to the end; the last one, and the factors."""
    factors = []
    while step < guide.end:
        factors.append(guide.factor(step))
        step += 1
        clock.now += each
        if step % 10 == 0:
            guide.adopt(step, guide.propose(step, 10, each))
    return step, factors


@pytest.mark.parametrize(
    "shape",
    [
        ScheduleSection(name="wsd", warmup_steps=10, decay_steps=300),
        ScheduleSection(name="wsd", warmup_steps=10),
        ScheduleSection(name="cosine", warmup_steps=10, min_ratio=0.0),
        ScheduleSection(name="linear", warmup_steps=10),
    ],
    ids=lambda shape: f"{shape.name}-{shape.decay_steps}",
)
def test_it_lands_just_before_the_deadline(clock: Clock, shape: ScheduleSection) -> None:
    guide = deadline(of(shape))
    guide.eval_seconds, guide.save_seconds = 20.0, 40.0
    step, factors = drive(guide, clock, 0, 1.0)
    assert HOUR * 0.95 < clock.now + 60 < HOUR
    cooldown = guide.cooldown
    assert cooldown is not None
    length = cooldown.end - cooldown.begin
    assert length == (shape.decay_steps or cooldown.begin // 4)
    assert shape.decay_steps or abs(length - step / 5) < 1
    assert factors[-1] == shape.min_ratio
    falls = [a - b for a, b in pairwise(factors[cooldown.begin - 1 :])]
    assert max(falls[1:]) - min(falls[1:]) < 1e-9  # a straight line
    assert factors[: cooldown.begin] == [guide._schedule(s) for s in range(cooldown.begin)]


def assert_whole_cooldown_in_time(guide: Deadline, clock: Clock, step: int) -> None:
    """That a guide of an hour and a cooldown of 300 steps, which has none yet, has it whole and ends with it."""
    assert guide.cooldown is None
    last, _ = drive(guide, clock, step, 1.0)
    assert HOUR * 0.95 < clock.now < HOUR
    assert guide.cooldown is not None
    assert guide.cooldown.end - guide.cooldown.begin == 300
    assert last == guide.cooldown.end


def test_a_first_step_that_compiles_begins_no_cooldown(clock: Clock) -> None:
    guide = deadline(of(ScheduleSection(name="wsd", warmup_steps=10, decay_steps=300)))
    clock.now += 160.0  # ten steps: one of 151 seconds, nine of one
    guide.adopt(10, guide.propose(10, 10, 16.0))
    assert_whole_cooldown_in_time(guide, clock, 10)


def test_a_first_step_that_compiles_shortens_no_cooldown(clock: Clock) -> None:
    made = of(ScheduleSection(name="wsd", warmup_steps=10, decay_steps=300))
    first = deadline(made)
    step = 0
    while first.cooldown is None:
        step += 10
        clock.now += 10.0
        first.adopt(step, first.propose(step, 10, 1.0))
    planned, second = first.end, deadline(made)
    second.load(step + 10, first.state())
    second.adopt(step + 20, second.propose(step + 20, 10, 5.0))  # 41 s of the ten steps to compile
    assert second.end == planned


def test_a_machine_that_stands_still_once_begins_no_cooldown(clock: Clock) -> None:
    guide = deadline(of(ScheduleSection(name="wsd", warmup_steps=10, decay_steps=300)))
    for step in (10, 20, 30):
        clock.now += 10.0
        guide.adopt(step, guide.propose(step, 10, 1.0))
    clock.now += 310.0  # five minutes of sleep among ten steps
    guide.adopt(40, guide.propose(40, 10, 31.0))
    assert_whole_cooldown_in_time(guide, clock, 40)


def test_a_call_without_time_ends_after_its_first_stretch(clock: Clock) -> None:
    guide = deadline(of(ScheduleSection(name="wsd", warmup_steps=10, decay_steps=300)))
    clock.now += HOUR - 30.0
    guide.adopt(10, guide.propose(10, 10, 1.0))
    assert guide.cooldown is not None
    assert guide.end <= 40


def test_a_constant_rate_stays_and_the_run_ends_in_time(clock: Clock) -> None:
    guide = deadline(of(ScheduleSection(name="constant", warmup_steps=0)))
    _, factors = drive(guide, clock, 0, 1.0)
    assert set(factors) == {1.0}
    assert HOUR * 0.95 < clock.now < HOUR


@pytest.mark.parametrize("hours", [None, 1.0])
def test_a_run_whose_steps_are_done_in_time_is_left_alone(clock: Clock, hours: float | None) -> None:
    made = of(ScheduleSection(warmup_steps=10), hours, 3000)
    step, factors = drive(deadline(made), clock, 0, 1.0)
    assert step == 3000
    assert factors == [schedule(made.schedule, 3000)(s) for s in range(3000)]


def test_slower_steps_bring_the_end_forward(clock: Clock) -> None:
    guide = deadline(of(ScheduleSection(name="wsd", warmup_steps=10, decay_steps=600)))
    step = 0
    while guide.cooldown is None or step < guide.cooldown.begin + 100:
        step += 1
        clock.now += 1.0
        if step % 10 == 0:
            guide.adopt(step, guide.propose(step, 10, 1.0))
    planned, half = guide.end, guide.factor(step)
    end, factors = drive(guide, clock, step, 2.0)
    assert end < planned - 100
    assert HOUR * 0.9 < clock.now < HOUR
    assert factors[0] == half
    assert factors[-1] == 0.1
    assert all(a > b for a, b in pairwise(factors))


def test_time_of_earlier_calls_counts_and_a_cooldown_is_resumed(clock: Clock) -> None:
    made = of(ScheduleSection(name="wsd", warmup_steps=10, decay_steps=300))
    first = deadline(made)
    step = 0
    states = {}
    while first.cooldown is None:
        step += 1
        clock.now += 1.0
        if step % 10 == 0:
            first.adopt(step, first.propose(step, 10, 1.0))
        states[step] = json.loads(json.dumps(first.state()))
    clock.now += 5 * HOUR  # between the calls
    second = deadline(made)
    second.load(step, states[step])
    assert second.seconds() == states[step]["seconds"]
    assert [second.factor(s) for s in range(step, second.end)] == [first.factor(s) for s in range(step, first.end)]
    early = deadline(made)
    early.load(1000, states[1000])
    drive(early, clock, 1000, 1.0)
    assert early.cooldown == first.cooldown


@pytest.mark.parametrize("more", [2.0, None])
def test_a_larger_max_hours_takes_effect_where_nothing_has_decayed(clock: Clock, more: float | None) -> None:
    shape = ScheduleSection(name="wsd", warmup_steps=10, decay_steps=300)
    first = deadline(of(shape))
    drive(first, clock, 0, 1.0)
    assert first.cooldown is not None
    for step, holds in ((first.cooldown.begin, False), (first.cooldown.begin + 1, True), (first.end, True)):
        again = deadline(of(shape, more))
        again.load(step, first.state())
        assert (again.cooldown is not None) == holds
    again = deadline(of(shape))
    again.load(first.cooldown.begin, first.state())
    assert again.cooldown == first.cooldown


def timed(path: Path, name: str, minutes: float = 1.0, micro: int = 2) -> RunConfig:
    section = TrainSection(
        steps=9999, max_hours=minutes / 60, global_batch_size=BATCH, micro_batch_size=micro, log_every=5, eval_every=30
    )
    shape = ScheduleSection(name="wsd", warmup_steps=2, decay_steps=40)
    # in the foreground, where a write takes no time by the clock, be the disk as slow as it likes
    checkpoints = CheckpointSection(every=20, keep_last=99, background=False)
    return config(path, name, micro, train=section, schedule=shape, checkpoint=checkpoints)


class Timed(Toy):
    """Steps of half a second each, by the clock."""

    def __init__(self, clock: Clock, each: float = 0.5) -> None:
        super().__init__()
        self.clock, self.each = clock, each

    def step(self, engines: Any, batches: Any, factor: float) -> dict[str, Tensor]:
        self.clock.now += self.each
        return super().step(engines, batches, factor)

    def evaluate(self, engines: Any, batches: Any) -> dict[str, float]:
        self.clock.now += 2.0
        return super().evaluate(engines, batches)


def use(clock: Clock, patch: pytest.MonkeyPatch) -> None:
    for name in ("deadline", "trainer", "speed", "checkpoint"):
        patch.setattr(f"cairn.train.{name}.time", clock)
    patch.setattr("cairn.train.trainer.matmul_peak", lambda device, dtype: 1e9)


@pytest.fixture
def cluster(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """One process, whose time is the clock's, and the environment as it was."""
    use(clock, monkeypatch)
    before, one = dict(os.environ), Cluster()
    with one.init():
        yield one
    os.environ.clear()
    os.environ.update(before)


def test_a_run_ends_before_its_deadline(
    tmp_path: Path, cluster: Cluster, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = train(Timed(clock), timed(tmp_path, "run"), cluster)
    assert 45 < clock.now < 60
    end = outcome.step
    said = capsys.readouterr().out
    assert f"train.max_hours: cooling down from step {end - 40}, to end after step {end}\n" in said
    assert f"finished {end} steps (train.max_hours)" in outcome.summary()
    rows = [row for row in outcome.folder.rows() if "loss" in row]
    assert rows[-1]["lr"] == 0.1 * rows[end - 41]["lr"]
    last = outcome.folder.rows()[-1]
    assert (last["step"], "valid/loss" in last) == (end, True)
    assert {end - 40, end} <= set(steps_in(outcome.folder.checkpoints))
    before = outcome.folder.metrics.read_bytes()
    for minutes in (1.0, 60.0):
        again = train(Timed(clock), timed(tmp_path, "run", minutes), cluster)
        assert f"was finished already, after {end} steps (train.max_hours)" in again.summary()
    assert outcome.folder.metrics.read_bytes() == before


def test_a_write_that_is_slow_in_the_background_is_heeded(tmp_path: Path, cluster: Cluster, clock: Clock) -> None:
    """The first one is that of the cooldown's beginning, and ends some steps later."""
    section = CheckpointSection(every=0, background=False)
    trainer = Trainer(Timed(clock), timed(tmp_path, "run").model_copy(update={"checkpoint": section}), cluster)
    step = trainer.task.step

    def write_ends(*args: Any) -> dict[str, Tensor]:
        if trainer.saved is not None:
            trainer.store.write_seconds = 10.0
        return step(*args)

    trainer.task.step = write_ends  # type: ignore[method-assign]
    trainer.run()
    assert 45 < clock.now + 10 < 60


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_kill_in_the_cooldown_changes_nothing(tmp_path: Path, cluster: Cluster, clock: Clock, kept: int) -> None:
    straight = train(Timed(clock), timed(tmp_path, "straight"), cluster)
    folder = RunFolder(tmp_path, "killed")
    shutil.copytree(straight.folder.path, folder.path)
    inside = [step for step in steps_in(folder.checkpoints) if step >= straight.step - 40]
    for step in inside[kept + 1 :]:
        shutil.rmtree(folder_of(folder.checkpoints, step))
    clock.now += HOUR
    killed = train(Timed(clock), timed(tmp_path, "killed"), cluster)
    assert killed.first == inside[kept]
    assert killed.step == straight.step
    assert first_differences(Result.of(straight.folder), Result.of(folder)) == []


def on_two(rank: int, path: str) -> list[float]:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        use(clock, patch)
        each = (0.5, 3.0)[rank]  # by its own clock rank 1 would end much earlier
        outcome = train(Timed(clock, each), timed(Path(path), "two", micro=1), Cluster(rank, 2, rank, 2))
    return [float(outcome.step), [row["lr"] for row in outcome.folder.rows() if "loss" in row][-1], clock.now]


def test_rank_0_decides_for_all(tmp_path: Path) -> None:
    (*first, seconds), (*second, _) = run_distributed(on_two, 2, str(tmp_path))
    assert first == second
    assert 45 < seconds < 60
    checkpoint, _ = newest(RunFolder(tmp_path, "two").checkpoints)
    assert checkpoint is not None
    assert checkpoint.step == checkpoint.state["cooldown"]["end"] == first[0]
    assert checkpoint.state["seconds"] <= seconds


def test_undecided_is_no_news(clock: Clock) -> None:
    guide = deadline(of(ScheduleSection()))
    assert not guide.adopt(0, UNDECIDED)
    assert guide.cooldown is None
