"""The one training loop. Everything a step depends on is a pure function of (seed, step, rank) or is in the checkpoint.

    batch(step) -> task.step -> metrics row          every step
    rows to metrics.jsonl, throughput                every log_every steps
    evaluation, checkpoint                           at their own rhythm, at a stop signal, and at the end

Metrics stay on the device until the rows are written, so that the loop never waits for it. The guard (guard.py) and the
deadline (deadline.py) judge by the rows, which all ranks have alike, and so decide alike.
"""

import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor

from cairn.cluster import Cluster
from cairn.config.schema import RunConfig
from cairn.data.batches import Batch
from cairn.data.order import mix
from cairn.errors import QuietError, UserError
from cairn.optim.schedule import schedule
from cairn.train.deadline import Deadline
from cairn.train.diagnosis import first_bad, first_documents
from cairn.train.folder import RunFolder
from cairn.train.guard import Guard, Spike
from cairn.train.opening import build_engines, newest_checkpoint, open_folder, open_loader, restore, settled_config
from cairn.train.outcome import Outcome, introduction
from cairn.train.peak import matmul_peak
from cairn.train.pending import Pending
from cairn.train.select import Selection
from cairn.train.signals import Stopped, StopSignal
from cairn.train.snapshot import Snapshot
from cairn.train.speed import Speed
from cairn.train.task import Task
from cairn.train.track import Tracker
from cairn.train.watchdog import Watchdog


def train(task: Task, config: RunConfig, cluster: Cluster) -> Outcome:
    """Train a task to `train.steps` steps, from the newest good checkpoint of its run folder if there is one.

    Raises:
        UserError: for a batch that does not divide, a run folder of another config or in use, a checkpoint of another
            corpus, a disk that is full, numbers that stay bad; TryAgain when a rank was lost.
    """
    return Trainer(task, config, cluster).run()


class Trainer:
    """Holds what the loop needs; see `train`."""

    def __init__(self, task: Task, config: RunConfig, cluster: Cluster) -> None:
        config = settled_config(config, cluster)
        self.task, self.config, self.cluster = task, config, cluster
        # First what may be wrong with them: a run that cannot start leaves no folder, and one that cannot be judged
        # does not fail at its end.
        self.loader, self.valid_loader = cluster.on_all(
            lambda: (open_loader(task, "train", config, cluster), open_loader(task, "valid", config, cluster))
        )
        self.folder = RunFolder(config.run.dir, config.run.name)
        self.lock, self.store = open_folder(self.folder, config, cluster)
        held_out = len(self.valid_loader.samples)
        evaluated = min(config.train.eval_samples or held_out, held_out)
        self.deadline = Deadline(config, schedule(config.schedule, config.train.steps), evaluated)
        self.guard = Guard(config.guard)
        self.selection = Selection(config.select, self.folder, self.store, cluster)
        self.step = 0
        self.saved: int | None = None
        """Step of the newest checkpoint."""
        self.stall_seconds = 0.0
        """What the loop waited for the last save."""
        self.stopped = False
        """Whether all ranks agreed to stop before the end."""
        self.pending, self.metrics = Pending(), dict[str, float]()

    def run(self) -> Outcome:
        """All of it, with the run folder locked, signals heard and ranks watched over."""
        with (
            self.lock if self.cluster.is_main else nullcontext(),
            closing(self.loader),
            closing(self.valid_loader),
            StopSignal(self.cluster) as self.stop,
            Watchdog(self.cluster, self.folder, self.config.guard) as self.watchdog,
        ):
            try:
                return self._run()
            except RuntimeError as error:  # a collective's, maybe: is another rank gone?
                told = self.watchdog.explain(error)
                if told is None:
                    raise
                raise told from error

    def _run(self) -> Outcome:
        """Restore, loop, and how it ended."""
        config, start = self.config, time.perf_counter()
        checkpoint = newest_checkpoint(self.store, self.task, self.cluster)
        if checkpoint is not None:
            self.step = self.saved = checkpoint.step
            self.deadline.load(self.step, checkpoint.state)
            self.guard.load(checkpoint.state.get("guard", {}))
        self.selection.look(self.step)
        first, owed = self.step, self.cluster.on_main(self._owes_evaluation)
        if (self.step >= self.deadline.end or self.selection.exhausted) and not owed:
            return self._outcome(first, start)
        self.engines, sizes = build_engines(self.task, config, self.cluster)
        if checkpoint is not None:
            restore(self.engines, checkpoint)
        self.engine = next(iter(self.engines.values()))
        peak = matmul_peak(self.engine.device, self.engine.dtype) * self.cluster.world_size
        self.speed = Speed(self.loader, self.task, config.train.global_batch_size, peak)
        main, steps = self.cluster.is_main, self.deadline.end
        with (
            Tracker(self.folder, config.track, config.model_dump(mode="json"), main, steps) as self.tracker,
            self.store,
        ):
            threads = None if checkpoint is None else checkpoint.state.get("threads")
            for line in introduction(config, sizes, self.task.tokens_per_sample, self.cluster, self.step, threads):
                self.tracker.message(line)
            self.tracker.truncate(self.step)
            self.speed.mark()
            if owed:
                self._evaluate()
            self._loop()
            if self.stopped and self.step and self.saved != self.step and self._flush():
                self._save()
            self.watchdog.phase("save", self.step)
            self.cluster.on_all(self.store.wait)
        return self._outcome(first, start)

    def _loop(self) -> None:
        """Step by step, to the end or until all ranks agree to stop."""
        train, save_every = self.config.train, self.config.checkpoint.every
        while self.step < self.deadline.end and not self.selection.exhausted and not self._stops():
            urgent, cooldown = self._train_step(), self.deadline.cooldown
            due = any(_due(self.step, every) for every in (train.log_every, train.eval_every, save_every))
            if (due or urgent or self.step == self.deadline.end) and not self._flush():
                continue
            last = self.step == self.deadline.end  # which the flush may have brought forward
            self.tracker.progress(self.step, {})
            if last or _due(self.step, train.eval_every):
                self._evaluate()
            last = last or self.selection.decides(self.step)
            if last or _due(self.step, save_every) or self.deadline.cooldown != cooldown:
                self._save()

    def _stops(self) -> bool:
        """Whether all ranks agree to stop; raises on all what has gone wrong on one."""
        self.stopped = self.stop.agreed(self.store.trouble() or self.tracker.trouble())
        return self.stopped

    def _outcome(self, first: int, start: float) -> Outcome:
        stopped_by = self.stop.name if self.stopped else None
        early = not stopped_by and self.step < self.config.train.steps and not self.selection.exhausted
        metrics = self.metrics or self.folder.last_evaluation()
        seconds, best = time.perf_counter() - start, self.selection.best
        return Outcome(self.folder, first, self.step, stopped_by, metrics, seconds, early, best)

    def _train_step(self) -> bool:
        """One step. Whether its row must be looked at now."""
        self.watchdog.phase("data", self.step + 1)
        index, factor = self.guard.data_step(self.step), self.deadline.factor(self.step)
        batches = self.loader.step(index)
        self.watchdog.phase("step", self.step + 1)
        metrics = self._task_step(self.step, batches)
        row: dict[str, Any] = {"step": self.step + 1, "lr": factor * self.engine.base_lr}
        self.pending.add(row, metrics)
        if index != self.step:
            row["data_step"] = index
        if any(engine.skipped for engine in self.engines.values()):
            row["skipped"] = True
        for name, engine in self.engines.items():
            row["grad_norm" if len(self.engines) == 1 else f"grad_norm/{name}"] = engine.grad_norm
        self.step += 1
        return self.guard.stepped(self.step, self.engines)

    def _task_step(self, step: int, batches: list[Batch]) -> dict[str, Tensor]:
        torch.manual_seed(step_seed(self.config.seed, step, self.cluster.rank))
        return self.task.step(self.engines, batches, self.deadline.factor(step))

    def _flush(self) -> bool:
        """Turn pending metrics into rows: one reduction over ranks and one wait for the device for all of them.

        False if by these rows the run has gone back to an earlier step.
        """
        if not self.pending:
            return True
        self.watchdog.phase("log", self.step)
        speed = self.speed.row(len(self.pending))
        # only known now, if the write went on in the background
        self.deadline.save_seconds = self.stall_seconds + self.store.write_seconds
        proposed = self.deadline.propose(self.step, len(self.pending), speed["step_seconds"])
        rows, proposed = self.pending.collect(proposed if self.cluster.is_main else 0)
        for row in rows:
            row["tokens"] = row["step"] * self.task.tokens_per_sample * self.config.train.global_batch_size
        rows[-1] |= speed
        self.tracker.rows(rows)
        if skipped := [str(row["step"]) for row in rows if "skipped" in row]:
            self.tracker.message(f"warning: no update in step {', '.join(skipped)}: the gradient was not finite")
        went_on = self._judge(rows)
        if went_on and self.deadline.adopt(self.step, proposed):
            end = self.deadline.end
            self.tracker.message(f"train.max_hours: cooling down from step {self.step}, to end after step {end}")
        self.speed.mark()
        return went_on

    def _judge(self, rows: list[dict[str, Any]]) -> bool:
        """Go by the guard. False if the run has gone back to an earlier step."""
        spikes = self.guard.judge(rows, first_only=self.saved is not None)
        if self.guard.exhausted:
            step, count = self.guard.first_bad, self.guard.bad
            self._give_up(step, f"no update in {count} steps in a row, {step} to {self.step} (guard.max_skipped)")
        if spikes and self.saved is not None:
            self._roll_back(spikes[0])
            return False
        for spike in spikes:
            self.tracker.message(f"warning: {spike}; there is no checkpoint to go back to")
        return True

    def _roll_back(self, spike: Spike) -> None:
        """Go back to the last checkpoint and pass over the samples from there to the spike."""
        self.cluster.on_all(self.store.wait)
        checkpoint = newest_checkpoint(self.store, self.task, self.cluster)
        if checkpoint is None or self.guard.rollbacks >= self.config.guard.max_rollbacks:
            raise self._told(
                f"{spike}, after {self.guard.rollbacks} roll-backs (guard.max_rollbacks): lower optim.lr, or look at "
                f"what the steps before it read; the checkpoint of step {self.saved} is as it was"
            )
        restore(self.engines, checkpoint)
        self.step = self.saved = checkpoint.step  # of an older one, where the newest was damaged
        self.guard.roll_back(spike, self.step, checkpoint.state.get("guard", {}))
        self.deadline.load(self.step, checkpoint.state, same_call=True)
        self.tracker.truncate(self.step)
        self.selection.look(self.step)
        passed = f"passing over the samples of steps {self.step + 1} to {spike.step}"
        self.tracker.message(f"{spike}: back to the checkpoint of step {self.step}, {passed}")

    def _give_up(self, step: int, reason: str) -> NoReturn:
        """Stop for bad numbers, telling what went bad first in a step, which is run once more to find out."""
        index, size = self.guard.data_step(step - 1), self.config.train.global_batch_size
        batches, samples = self.loader.step(index), range(index * size, (index + 1) * size)
        found = first_bad(self.engines, lambda: self._task_step(step - 1, batches))
        documents = self.cluster.on_main(lambda: first_documents(self.task, samples))
        self.cluster.on_all(self.store.wait)
        batch = f"{documents} (`cairn batch {self.folder.path} {step}` lists them all)"
        kept = "there is no checkpoint" if self.saved is None else f"the checkpoint of step {self.saved} is as it was"
        raise self._told(
            f"{reason}; step {step}: {found}; its documents: {batch}; {kept}, and the same command goes on from there"
        )

    def _told(self, text: str) -> UserError:
        """An error that every rank raises, told by one."""
        return UserError(text) if self.cluster.is_main else QuietError(text)

    def _evaluate(self) -> None:
        start = time.perf_counter()
        self.watchdog.phase("evaluate", self.step)
        for engine in self.engines.values():
            engine.sync_buffers()
        try:
            metrics = self.task.evaluate(self.engines, self._held_out())
        except Stopped:
            self.tracker.message(f"step {self.step}: evaluation cut short; the same command does it first")
            return
        self.metrics = {f"valid/{k}": v for k, v in metrics.items()}
        self.tracker.rows([{"step": self.step, **self.metrics}])
        values = "  ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        self.tracker.message(f"step {self.step}: {values}")
        self.selection.look(self.step)
        self.deadline.eval_seconds = time.perf_counter() - start
        self.speed.mark()

    def _held_out(self) -> Iterator[Batch]:
        """Held-out batches, until all ranks agree to stop."""
        section = self.config.train
        for batch in self.valid_loader.evaluation(section.micro_batch_size, section.eval_samples):
            self.watchdog.phase("evaluate", self.step)
            if self._stops():
                raise Stopped
            yield batch

    def _owes_evaluation(self) -> bool:
        """Whether an evaluation is due that the call which came to this step had no time for."""
        due = self.step == self.deadline.end or _due(self.step, self.config.train.eval_every)
        return self.step > 0 and due and not self.folder.was_evaluated(self.step)

    def _save(self) -> None:
        start = time.perf_counter()
        self.watchdog.phase("save", self.step)
        if not all(engine.finite() for engine in self.engines.values()):
            self._give_up(self.step, f"weights are not finite after step {self.step}, so they are not saved")
        self.tracker.sync()
        for engine in self.engines.values():
            engine.sync_buffers()
        state = {
            "step": self.step,
            "samples": self.step * self.config.train.global_batch_size,
            "seed": self.config.seed,
            "identity": self.task.identity(),
            "threads": torch.get_num_threads(),
            "guard": self.guard.state(),
            **self.deadline.state(),
            "engines": {name: engine.scalars() for name, engine in self.engines.items()},
        }
        snapshot = Snapshot(self.engines, later=self.store.background)
        self.store.save(self.step, snapshot, state, snapshot.filled)
        self.saved = self.step
        self.stall_seconds = time.perf_counter() - start
        self.speed.mark()


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of dropout and other noise in a step: a pure function, so that no generator state is ever saved."""
    return mix(seed, step, rank)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
