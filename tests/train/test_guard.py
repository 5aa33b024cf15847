"""Bad numbers: what is left out, what stops a run, and what sends it back."""

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cairn.cluster import Cluster
from cairn.config.train import CheckpointSection, EngineSection, GuardSection
from cairn.errors import QuietError, UserError
from cairn.train.checkpoint import folder_of, steps_in
from cairn.train.engine import Engine
from cairn.train.folder import RunFolder
from cairn.train.guard import Guard
from cairn.train.trainer import Trainer, train
from pretrain.compare import Result, first_differences
from tests.train.dist import run_distributed
from tests.train.engine_cases import OPTIM, build, differing, everything, here
from tests.train.toy import KINDS, Net, Toy, config, in_steps

FIRST = {
    "input": "the input of first (Linear), then the gradient of last.weight",
    "output": "the output of middle (Middle), then the gradient of last.weight",
    "gradient": "the gradient of middle.linear.weight",
    "loss": "the loss, though no module's output, then the gradient of last.weight",
}


@pytest.fixture(autouse=True)
def _no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring it takes a while, on a CPU in fp16 a minute."""
    monkeypatch.setattr("cairn.train.trainer.matmul_peak", lambda device, dtype: 1e9)


class Fake:
    """As much of an engine as the guard looks at."""

    def __init__(self, skipped: bool = False, overflowed: bool = False) -> None:
        self.skipped, self.overflowed = skipped, overflowed


def row(step: int, loss: float = 1.0, skipped: bool = False) -> dict[str, Any]:
    return {"step": step, "loss": loss} | ({"skipped": True} if skipped else {})


def test_steps_in_a_row_are_counted_over_flushes_and_checkpoints() -> None:
    guard = Guard(GuardSection(max_skipped=3))
    urgent = [guard.stepped(step, {"a": Fake(), "b": Fake(skipped=True)}) for step in (1, 2)]
    assert guard.judge([row(1, skipped=True), row(2, skipped=True)], True) == []
    other = Guard(GuardSection(max_skipped=3))
    other.load(json.loads(json.dumps(guard.state())))
    for each in (guard, other):
        assert not each.exhausted
        assert each.stepped(3, {"a": Fake(skipped=True)})
        each.judge([row(3, skipped=True)], True)
        assert each.exhausted
        assert (each.first_bad, each.bad) == (1, 3)
        each.stepped(4, {"a": Fake()})
        each.judge([row(4)], True)
        assert not each.exhausted
    assert urgent == [False, False]


def test_a_loss_scale_that_can_fall_is_no_bad_number_unless_the_loss_is_one() -> None:
    guard = Guard(GuardSection(max_skipped=2))
    for step in range(1, 9):
        guard.stepped(step, {"a": Fake(True, True)})
    guard.judge([row(step, skipped=True) for step in range(1, 9)], True)
    assert guard.bad == 0
    for step in (9, 10):
        guard.stepped(step, {"a": Fake(True, True)})
    guard.judge([row(step, math.nan, True) for step in (9, 10)], True)
    assert guard.exhausted
    assert guard.first_bad == 9


def test_no_number_of_skipped_steps_stops_a_run_that_wants_none() -> None:
    guard = Guard(GuardSection(max_skipped=0))
    for step in range(1, 50):
        assert not guard.stepped(step, {"a": Fake(True)})
    guard.judge([row(step, skipped=True) for step in range(1, 50)], True)
    assert not guard.exhausted


def test_a_spike_is_far_above_the_finite_losses_before_it() -> None:
    guard = Guard(GuardSection(spike_factor=3.0, spike_window=10))
    assert guard.judge([row(1, 100.0), *(row(s, 2.0 + 0.1 * (s % 2)) for s in range(2, 13))], True) == []
    assert guard.judge([row(13, math.nan), row(14, 2.15), row(15, 1.0)], True) == []
    (spike,) = guard.judge([row(16, 9.0), row(17, 99.0)], True)
    assert (spike.step, spike.loss, spike.count) == (16, 9.0, 10)
    assert guard.judge([row(18, 2.0)], True) == []  # the spike did not widen what is normal
    assert [spike.step for spike in guard.judge([row(19, 9.0), row(20, 99.0)], False)] == [19, 20]


def test_half_a_window_is_needed_to_call_a_spike() -> None:
    guard = Guard(GuardSection(spike_factor=3.0, spike_window=10))
    assert guard.judge([*(row(s, 1.0 + 0.01 * s) for s in range(1, 5)), row(5, 50.0)], True) == []


def test_samples_are_passed_over_after_each_roll_back() -> None:
    guard = Guard(GuardSection(spike_factor=3.0, spike_window=10))
    saved = guard.state()  # at step 4
    (spike,) = guard.judge([*(row(s, 1.0 + s % 2) for s in range(5, 11)), row(11, 50.0)], True)
    guard.roll_back(spike, 4, saved)
    assert [guard.data_step(step) for step in (0, 3, 4, 5)] == [0, 3, 11, 12]
    # a second one before the next checkpoint: step 9 was of samples 16
    (spike,) = guard.judge([*(row(s, 1.0 + s % 2) for s in range(5, 10)), row(10, 50.0)], True)
    guard.roll_back(spike, 4, saved)
    assert [guard.data_step(step) for step in (3, 4)] == [3, 17]
    other = Guard(GuardSection())
    other.load(json.loads(json.dumps(guard.state())))
    (spike,) = guard.judge([*(row(s, 1.0 + s % 2) for s in range(21, 27)), row(27, 50.0)], True)
    guard.roll_back(spike, 20, other.state())
    assert [guard.data_step(step) for step in (3, 4, 19, 20)] == [3, 17, 32, 40]
    assert (other.rollbacks, guard.rollbacks) == (2, 3)


def bad_steps(rank: int) -> list[str]:
    """Steps on engines of which only the last rank's numbers are bad; what went wrong with each."""
    found = []
    ids = torch.arange(4)
    cases = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16", "fp16")]
    for stage, precision in cases:
        engine = build(stage, precision, deepspeed={"fp16": {"initial_scale_power": 8}} if precision == "fp16" else {})
        for kind in ("nan", "inf", "flat"):
            before = everything(engine)
            loss = engine(ids).sum()
            if rank == 1:
                # of the last one every gradient is finite
                loss = {"nan": loss * math.nan, "inf": loss * math.inf, "flat": loss + math.inf}[kind]
            engine.backward(loss)
            engine.step(1.0)
            if not engine.skipped or differing(before, everything(engine)):
                found.append(f"{stage} {precision} {kind}: {engine.skipped}, {differing(before, everything(engine))}")
            engine.backward(engine(ids).sum())
            engine.step(1.0)
            if engine.skipped or not differing(before, everything(engine)) or not engine.finite():
                found.append(f"{stage} {precision} {kind}: no update afterwards")
    return found


def test_one_ranks_bad_numbers_change_nothing_on_any() -> None:
    assert run_distributed(bad_steps, 2) == [[], []]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weights_that_are_not_finite_are_noticed(stage: int) -> None:
    engine = build(stage)
    assert engine.finite()
    state = everything(engine)
    for key in ("weight/layers.1.weight", "exp_avg/norm.bias"):
        spoiled = {name: tensor.clone() for name, tensor in state.items()}
        spoiled[key].view(-1)[-1] = -math.inf
        engine.load(spoiled.get)
        assert not engine.finite()
    engine.load(state.get)
    assert engine.finite()


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_stay_bad_stop_the_run(tmp_path: Path, cluster: Cluster, kind: str) -> None:
    task = Toy(kind, in_steps(3, *range(6, 13)))
    with pytest.raises(UserError) as caught:
        train(task, config(tmp_path), cluster)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("no update in 3 steps in a row, 6 to 8 (guard.max_skipped); step 6: the first")
    assert f": the first that was not finite: {FIRST[kind]}; its documents:" in said
    assert "points.txt:20, points.txt:21, points.txt:22, ... (`cairn batch" in said
    assert "/toy 6` lists them all)" in said
    assert said.endswith("the checkpoint of step 4 is as it was, and the same command goes on from there")
    folder = RunFolder(tmp_path, "toy")
    assert steps_in(folder.checkpoints) == [4]
    rows = [row for row in folder.rows() if "loss" in row]
    assert [row["step"] for row in rows if "skipped" in row] == [3, 6, 7, 8]
    with pytest.raises(UserError, match="6 to 8"):
        train(task, config(tmp_path), cluster)
    assert train(Toy(kind), config(tmp_path), cluster).first == 4


def test_a_weight_that_is_not_finite_is_named_and_never_saved(tmp_path: Path, cluster: Cluster) -> None:
    section = CheckpointSection(every=2, keep_last=1)
    engine = EngineSection(precision="fp32", zero_stage=0)  # whose weights are those that are trained
    trainer = Trainer(Toy(), config(tmp_path, checkpoint=section, engine=engine), cluster)
    step = trainer.task.step

    def spoil(engines: Any, batches: Any, factor: float) -> dict[str, Tensor]:
        metrics = step(engines, batches, factor)
        if trainer.step == 3:
            with torch.no_grad():
                engines["net"].module.middle.linear.weight[0, 0] = math.inf
        return metrics

    trainer.task.step = spoil
    with pytest.raises(UserError, match=r"weights are not finite after step 4") as caught:
        trainer.run()
    assert "the first that was not finite: the weight middle.linear.weight itself" in str(caught.value)
    assert steps_in(RunFolder(tmp_path, "toy").checkpoints) == [2]


def test_another_try_that_is_finite_is_told(tmp_path: Path, cluster: Cluster) -> None:
    trainer = Trainer(Toy(), config(tmp_path), cluster)
    step, calls = trainer.task.step, []

    def flaky(engines: Any, batches: Any, factor: float) -> dict[str, Tensor]:
        calls.append(trainer.step)
        bad = 4 <= trainer.step < 7 and len(calls) <= 7
        return step(engines, [{**batch, "bad": batch["bad"] | bad} for batch in batches], factor)

    trainer.task.step = flaky
    with pytest.raises(UserError, match=r"step 5: all was finite when it ran once more \(is the hardware sound\?\)"):
        trainer.run()
    assert calls[-2:] == [6, 7]


@pytest.mark.parametrize("stage", [1, 3])
def test_fp16_finds_its_loss_scale_and_its_bad_numbers_still_stop_it(
    tmp_path: Path, cluster: Cluster, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(1)  # imports deepspeed, quietly
    monkeypatch.setattr(sys.modules["deepspeed"].accelerator.get_accelerator(), "is_fp16_supported", lambda: True)
    power = {"fp16": {"initial_scale_power": 24, "hysteresis": 1}}
    section = EngineSection(precision="fp16", zero_stage=stage, deepspeed=power)
    outcome = train(Toy(), config(tmp_path, steps=24, engine=section), cluster)
    skipped = [row["step"] for row in outcome.folder.rows() if "skipped" in row]
    assert len(skipped) > 3
    assert skipped[:4] == [1, 2, 3, 4]
    section = EngineSection(precision="fp16", zero_stage=stage)
    with pytest.raises(UserError, match="6 to 8"):
        train(Toy("output", in_steps(*range(6, 13))), config(tmp_path, "bad", engine=section), cluster)


CASES = [(0, "fp32", "gradient"), (1, "bf16", "loss"), (2, "fp32", "input"), (3, "bf16", "output")]


def stopped(rank: int, path: str) -> list[tuple[str, int, str]]:
    ended = []
    for stage, precision, kind in CASES:
        section = EngineSection(precision=precision, zero_stage=stage)  # type: ignore[arg-type]
        made = config(Path(path), kind, micro=1, engine=section)
        trainer = Trainer(Toy(kind, in_steps(*range(6, 13))), made, Cluster(rank, 2, rank, 2))
        try:
            trainer.run()
        except UserError as error:
            ended.append((type(error).__name__, trainer.step, str(error)))
    return ended


def test_all_ranks_stop_at_one_step_and_one_tells_whose_numbers_were_bad(tmp_path: Path) -> None:
    ranks = run_distributed(stopped, 2, str(tmp_path))
    for (_, _, kind), (main, step, said), (other, *also) in zip(CASES, *ranks, strict=True):
        assert (main, other) == (UserError.__name__, QuietError.__name__)
        assert also == [step, said]
        assert step == 8
        found = FIRST[kind].removesuffix("weight")  # or its bias
        assert f"step 6: the first that was not finite: on rank 1 {found}" in said
        assert "; its documents: points.txt:20" in said


def test_each_of_several_engines_is_watched(tmp_path: Path, cluster: Cluster) -> None:
    class Two(Toy):
        def models(self) -> dict[str, Any]:
            return {"left": Net("output"), "right": Net("gradient")}

        def step(self, engines: Any, batches: Any, factor: float) -> dict[str, Tensor]:
            left, right = engines.values()
            first = super().step({"left": left}, [{**b, "bad": torch.zeros_like(b["bad"])} for b in batches], factor)
            second = super().step({"right": right}, batches, factor)
            return {"loss": first["loss"] + second["loss"]}

        def evaluate(self, engines: Any, batches: Any) -> dict[str, float]:
            return super().evaluate({"left": engines["left"]}, batches)

    with pytest.raises(UserError, match=r"not finite: the gradient of right\.middle\.linear\.weight"):
        train(Two("gradient", in_steps(*range(6, 13))), config(tmp_path), cluster)


GUARDED = {"guard": GuardSection(spike_factor=6.0, spike_window=10), "steps": 24}


def losses(folder: RunFolder) -> list[float]:
    return [row["loss"] for row in folder.rows() if "loss" in row]


def test_a_spike_sends_the_run_back_and_its_samples_are_passed_over(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    task = Toy("spike", in_steps(11))
    outcome = train(task, config(tmp_path, **GUARDED), cluster)
    said = capsys.readouterr().out
    assert "step 11: loss " in said
    assert "back to the checkpoint of step 8, passing over the samples of steps 9 to 11" in said
    rows = [row for row in outcome.folder.rows() if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert [row.get("data_step") for row in rows] == [None] * 8 + list(range(11, 27))
    assert max(row["loss"] for row in rows[8:]) < 100
    assert [row["step"] for row in outcome.folder.rows() if "loss" not in row] == [6, 12, 18, 24]
    # the samples make all the difference
    other = train(Toy(), config(tmp_path, "other", **GUARDED), cluster).folder
    assert losses(other)[:8] == losses(outcome.folder)[:8]
    assert losses(other)[8:] != losses(outcome.folder)[8:]


@pytest.mark.parametrize("fail_at", [10, 11, 14, 20])
def test_a_run_that_went_back_is_resumed_to_the_bit(tmp_path: Path, cluster: Cluster, fail_at: int) -> None:
    """Killed before the spike, after the roll-back and before the next checkpoint, and after that."""
    task = Toy("spike", in_steps(11, 13))
    straight = train(task, config(tmp_path, "straight", **GUARDED), cluster).folder
    trainer = Trainer(task, config(tmp_path, "killed", **GUARDED), cluster)
    calls, step = [], task.step

    def fail(*args: Any) -> dict[str, Tensor]:
        calls.append(None)
        if len(calls) == fail_at:
            raise RuntimeError("killed")
        return step(*args)

    task.step = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="killed"):
        trainer.run()
    del task.step
    killed = train(task, config(tmp_path, "killed", **GUARDED), cluster).folder
    assert first_differences(Result.of(straight), Result.of(killed)) == []
    assert losses(straight) == losses(killed)


def test_a_run_that_went_back_past_a_damaged_checkpoint_saves_its_step_anew(tmp_path: Path, cluster: Cluster) -> None:
    task, folder = Toy("spike", in_steps(11)), RunFolder(tmp_path, "toy")
    calls, step = [], task.step

    def strike(*args: Any) -> dict[str, Tensor]:
        calls.append(None)
        if len(calls) in (7, 13):  # both are step 7
            os.kill(os.getpid(), signal.SIGTERM)
        if len(calls) == 11:
            (folder_of(folder.checkpoints, 7) / "state.json").write_text("{}")
        return step(*args)

    task.step = strike  # type: ignore[method-assign]
    for _ in range(2):
        outcome = train(task, config(tmp_path, every=6, **GUARDED), cluster)
        assert outcome.stopped_by == "SIGTERM"
        assert outcome.step == steps_in(folder.checkpoints)[-1] == 7


def test_before_the_first_checkpoint_a_spike_is_only_told(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = train(Toy("spike", in_steps(11)), config(tmp_path, every=0, **GUARDED), cluster)
    assert outcome.step == 24
    assert "warning: step 11: loss" in capsys.readouterr().out
    assert not any("data_step" in row for row in outcome.folder.rows())


def test_too_many_spikes_stop_the_run(tmp_path: Path, cluster: Cluster) -> None:
    section = GuardSection(spike_factor=30.0, spike_window=10, max_rollbacks=2)
    task = Toy("spike", in_steps(11, 15, 19, 23))
    with pytest.raises(UserError, match=r"is a spike .*, after 2 roll-backs \(guard.max_rollbacks\)") as caught:
        train(task, config(tmp_path, steps=24, guard=section), cluster)
    assert "the checkpoint of step 8 is as it was" in str(caught.value)
    assert max(steps_in(RunFolder(tmp_path, "toy").checkpoints)) == 8


def spiking(rank: int, path: str) -> list[float]:
    task = Toy("spike", in_steps(11))
    outcome = train(task, config(Path(path), micro=1, **GUARDED), Cluster(rank, 2, rank, 2))
    return [float(row.get("data_step", row["step"] - 1)) for row in outcome.folder.rows() if "loss" in row]


def test_all_ranks_go_back_together(tmp_path: Path) -> None:
    first, second = run_distributed(spiking, 2, str(tmp_path))
    assert first == second == [*range(8), *range(11, 27)]


def test_a_spike_of_weight_zero_is_off(tmp_path: Path, cluster: Cluster) -> None:
    assert train(Toy("spike", in_steps(11)), config(tmp_path, steps=24), cluster).step == 24


def test_the_gradient_of_a_finite_loss_is_left_as_it_is() -> None:
    """The factor that makes a bad loss's gradient bad changes no bit of a good one."""
    x, bad = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(3, 1, dtype=torch.bool)
    for size in (1.0, 2.0**-20):
        torch.manual_seed(0)
        plain = Net("")
        torch.manual_seed(0)
        engine = Engine(Net(""), EngineSection(precision="fp32", zero_stage=0), OPTIM, 1, here())
        (plain(x, bad).sum() * size).backward()
        engine.backward(engine(x, bad).sum() * size)
        assert all(
            torch.equal(p.grad, q.grad) for p, q in zip(engine.module.parameters(), plain.parameters(), strict=True)
        )


def spoiled_padding(rank: int) -> tuple[int, bool]:
    """How many numbers ZeRO-3 pads with on this rank, and whether the engine is finite where they are not."""
    engine, padding = build(3), 0
    for slot in engine._state.slots:
        padded = torch.ones(slot.tensor.numel(), dtype=torch.bool)
        for piece in slot.layout.pieces:
            padded[piece.local_offset : piece.local_offset + piece.length] = False
        slot.tensor.detach().view(-1)[padded] = math.nan
        padding += int(padded.sum())
    return padding, engine.finite()


def test_padding_is_no_weight() -> None:
    results = run_distributed(spoiled_padding, 2)
    assert sum(padding for padding, _ in results) > 0
    assert all(finite for _, finite in results)
