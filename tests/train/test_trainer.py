"""The loop itself, on a task small enough to run here many times."""

import math
import signal
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cairn.cluster import Cluster
from cairn.config.schema import RunConfig
from cairn.config.train import CheckpointSection, EngineSection, RunSection, TrackSection, TrainSection
from cairn.data.batches import IGNORE, Batch, Item, Loader
from cairn.errors import UserError
from cairn.train.checkpoint import Checkpoint, steps_in
from cairn.train.engine import Engine
from cairn.train.folder import RunFolder
from cairn.train.outcome import Outcome
from cairn.train.task import LossTask
from cairn.train.trainer import step_seed, train

SYNCS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy"}


@dataclass
class Noise:
    """Points about a plane."""

    count: int

    def __len__(self) -> int:
        return self.count

    def item(self, k: int) -> Item:
        x = np.random.default_rng(k).standard_normal(4, dtype=np.float32)
        return {"x": x, "labels": x.sum(keepdims=True)}


class Waits(Tensor):
    """Notes when the host asks it, or what is computed from it, for a value."""

    events: list[tuple[str, int]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in SYNCS:
            cls.events.append((func.__name__, 0))
        return super().__torch_function__(func, types, args, kwargs or {})


@dataclass
class Plane(LossTask):
    """Least squares."""

    held_out: int = 6
    fail_at: int | None = None
    infinite_at: int | None = None
    corpus: str = "corpus"
    seen: list[int] = field(default_factory=list)
    """Seeds of noise, by step."""
    tokens_per_sample: int = 1
    flops_per_sample: float = 0.0

    def models(self) -> dict[str, nn.Module]:
        return {"plane": nn.Linear(4, 1)}

    def samples(self, split: str) -> Noise:
        return Noise(64 if split == "train" else self.held_out)

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"loss": float((batch["labels"] != IGNORE).sum())}

    def loss_sums(self, model: nn.Module | Engine, batch: Batch) -> dict[str, Tensor]:
        scale = torch.inf if len(self.seen) == self.infinite_at else 1.0
        squares = scale * (model(batch["x"]).float() - batch["labels"]).pow(2)
        return {"loss": (squares * (batch["labels"] != IGNORE)).sum().as_subclass(Waits)}

    def identity(self) -> dict[str, str]:
        return {"corpus": self.corpus}

    def step(self, engines: Any, batches: list[Batch], lr_factor: float) -> dict[str, Tensor]:
        self.seen.append(torch.initial_seed())
        Waits.events.append(("step", len(self.seen)))
        if len(self.seen) == self.fail_at:
            raise RuntimeError("out of memory")
        return super().step(engines, batches, lr_factor)


def config(path: Path, every: int = 4, **more: Any) -> RunConfig:
    sections: dict[str, Any] = {
        "run": RunSection(dir=str(path), name="plane"),
        "engine": EngineSection(precision="fp32"),
        "train": TrainSection(steps=10, global_batch_size=4, micro_batch_size=2, log_every=3, eval_every=5),
        "checkpoint": CheckpointSection(every=every),
        "track": TrackSection(progress=False),
    }
    return RunConfig(**(sections | more))


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("loader", "checkpoint"))]


def ended(limit_s: float = 10.0) -> bool:
    """Whether all threads of a run end."""
    deadline = time.monotonic() + limit_s
    while own_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not own_threads()


def test_a_run(tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    outcome = train(Plane(), config(tmp_path), cluster)
    rows = outcome.folder.rows()
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, 11))
    assert [row["step"] for row in rows if "valid/loss" in row] == [5, 10]
    assert training[-1]["loss"] < training[0]["loss"]
    assert outcome.metrics == {"valid/loss": rows[-1]["valid/loss"]}
    assert (outcome.first, outcome.step, outcome.stopped_by) == (0, 10, None)
    assert steps_in(outcome.folder.checkpoints) == [8, 10]
    assert ended()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    said = capsys.readouterr().out
    assert "plane: 5 parameters on 1 x " in said
    assert "10 steps of 4 samples (4 tokens): ranks x accumulation x micro-batch = 1 x 2 x 2" in said
    assert f"step 10: valid/loss {outcome.metrics['valid/loss']:.4f}" in said


def test_evaluation_is_the_mean_over_all_held_out_samples(tmp_path: Path, cluster: Cluster) -> None:
    """7 samples in batches of 2: one of the last batch is a blank."""
    outcome = train(Plane(held_out=7), config(tmp_path), cluster)
    checkpoint = RunFolder(outcome.folder.path).checkpoints / "step-00000010"

    saved = Checkpoint(checkpoint)
    weight, bias = saved.read("plane/weight/weight"), saved.read("plane/weight/bias")
    assert weight is not None
    assert bias is not None
    items = [Noise(7).item(k) for k in range(7)]
    errors = [((torch.from_numpy(item["x"]) @ weight.T + bias).item() - item["labels"].item()) ** 2 for item in items]
    assert outcome.metrics["valid/loss"] == pytest.approx(sum(errors) / 7, rel=1e-5)


def test_the_loop_waits_for_values_only_to_write_rows(tmp_path: Path, cluster: Cluster) -> None:
    Waits.events.clear()
    section = TrainSection(steps=12, global_batch_size=4, micro_batch_size=2, log_every=4)
    train(Plane(), config(tmp_path, every=0, train=section), cluster)
    done, waited = 0, set()
    for name, number in Waits.events:
        if name == "step":
            done = number
        else:
            waited.add(done)
    assert waited == {4, 8, 12}


def test_noise_is_a_function_of_seed_step_and_rank(tmp_path: Path, cluster: Cluster) -> None:
    task = Plane()
    train(task, config(tmp_path), cluster)
    assert task.seen == [step_seed(1234, step, 0) for step in range(10)]
    seeds = {step_seed(seed, step, rank) for seed in range(5) for step in range(50) for rank in range(8)}
    assert len(seeds) == 5 * 50 * 8


@pytest.mark.parametrize("background", [False, True])
def test_an_error_leaves_no_thread_and_the_run_can_go_on(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str], background: bool
) -> None:
    section = CheckpointSection(every=4, background=background)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(Plane(fail_at=7), config(tmp_path, checkpoint=section), cluster)
    assert ended()
    assert signal.getsignal(signal.SIGINT) == handler
    outcome = train(Plane(), config(tmp_path, checkpoint=section), cluster)
    assert outcome.first == 4
    assert [row["step"] for row in outcome.folder.rows() if "loss" in row] == list(range(1, 11))
    assert "going on from the checkpoint of step 4" in capsys.readouterr().out


def test_a_step_without_an_update_is_told(tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    rows = train(Plane(infinite_at=5), config(tmp_path), cluster).folder.rows()
    assert [row["step"] for row in rows if "skipped" in row] == [5]
    assert [row["step"] for row in rows if not math.isfinite(row.get("loss", 0.0))] == [5]
    assert capsys.readouterr().out.count("warning: no update in step 5: the gradient was not finite") == 1


def test_another_number_of_threads_is_told(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    for fail_at in (7, 2):
        with pytest.raises(RuntimeError):
            train(Plane(fail_at=fail_at), config(tmp_path), cluster)
    assert "threads" not in capsys.readouterr().out
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    train(Plane(), config(tmp_path), cluster)
    said = capsys.readouterr().out
    assert f"{threads + 1} threads a rank now, {threads} before" in said
    assert f"OMP_NUM_THREADS={threads} keeps them" in said


def test_another_corpus_is_told_before_a_model_is_built(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError):
        train(Plane(fail_at=7), config(tmp_path), cluster)
    monkeypatch.delattr(Plane, "models")
    with pytest.raises(UserError, match="the corpus is not the one this run was trained with"):
        train(Plane(corpus="another"), config(tmp_path), cluster)


def test_nothing_held_out_is_told_before_the_first_step(tmp_path: Path, cluster: Cluster) -> None:
    task = Plane(held_out=0)
    with pytest.raises(UserError, match="shorter than one sequence"):
        train(task, config(tmp_path), cluster)
    assert not task.seen
    assert not list(tmp_path.iterdir())


def test_loaders_stop_building_ahead() -> None:
    with closing(Loader(Noise(8), 4, 2)) as loader:
        loader.step(0)
        assert own_threads()
    assert ended()


@pytest.mark.parametrize(
    ("first", "step", "stopped_by", "said"),
    [
        (0, 9, None, "finished 9 steps"),
        (9, 9, None, "was finished already, after 9 steps"),
        (0, 3, "SIGINT", "stopped by SIGINT after step 3, checkpoint saved: the same command goes on"),
        (0, 0, "SIGTERM", "stopped by SIGTERM before the first step: the same command goes on"),
    ],
)
def test_summary(first: int, step: int, stopped_by: str | None, said: str) -> None:
    text = Outcome(RunFolder("runs", "x"), first, step, stopped_by, {"valid/loss": 1.23456}, 7.0).summary()
    assert said in text
    assert text.startswith("run folder: runs/x\n")
    assert "valid/loss: 1.2346" in text
