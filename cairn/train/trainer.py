"""The one training loop. Everything a step depends on is a pure function of (seed, step, rank) or is in the checkpoint.

    batch(step) -> task.step -> metrics row          every step
    rows to metrics.jsonl, throughput                every log_every steps
    evaluation, checkpoint                           at their own rhythm, at a stop signal, and at the end

Metrics stay on the device until the rows are written, so that the loop never waits for it.
"""

import resource
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cairn.cluster import Cluster
from cairn.config.schema import RunConfig
from cairn.data.batches import Loader
from cairn.data.order import mix
from cairn.errors import UserError
from cairn.optim.schedule import schedule
from cairn.train.checkpoint import Checkpoint, CheckpointStore, steps_in
from cairn.train.engine import Engine
from cairn.train.folder import RunFolder
from cairn.train.peak import matmul_peak
from cairn.train.signals import StopSignal
from cairn.train.task import Task
from cairn.train.track import Tracker


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    folder: RunFolder
    first: int
    """Steps that were done when the call began."""
    step: int
    stopped_by: str | None
    """Name of the signal that ended it early."""
    metrics: dict[str, float]
    """The last evaluation."""
    seconds: float

    def summary(self) -> str:
        """What a user wants to know at the end, and how to go on."""
        lines = [f"run folder: {self.folder.path}"]
        if self.stopped_by:
            where = f"after step {self.step}, checkpoint saved" if self.step else "before the first step"
            lines.append(f"stopped by {self.stopped_by} {where}: the same command goes on")
        elif self.first == self.step:
            lines.append(f"was finished already, after {self.step} steps: another run.name starts a new run")
        else:
            lines.append(f"finished {self.step} steps ({self.seconds:.0f} s in this call)")
        lines += [f"{name}: {value:.4f}" for name, value in self.metrics.items()]
        return "\n".join([*lines, f"report: cairn report {self.folder.path}"])


def train(task: Task, config: RunConfig, cluster: Cluster) -> Outcome:
    """Train a task to `train.steps` steps, from the newest good checkpoint of its run folder if there is one.

    Raises:
        UserError: for a batch that does not divide, a run folder of another config, a checkpoint of another corpus.
    """
    return Trainer(task, config, cluster).run()


class Trainer:
    """Holds what the loop needs; see `train`."""

    def __init__(self, task: Task, config: RunConfig, cluster: Cluster) -> None:
        self.task, self.config, self.cluster = task, config, cluster
        # First what may be wrong with them: a run that cannot start leaves no folder, and one that cannot be judged
        # does not fail at its end.
        self.loader, self.valid_loader = cluster.on_all(lambda: (self._loader("train"), self._loader("valid")))
        self.folder = RunFolder(config.run.dir, config.run.name)
        cluster.on_main(self._open_folder)
        section = config.checkpoint
        self.store = CheckpointStore(
            self.folder.checkpoints,
            cluster.rank,
            cluster.world_size,
            section.keep_last,
            section.keep_every,
            section.background,
        )
        self.lr_factor = schedule(config.schedule, config.train.steps)
        self.step = 0
        self.threads: int | None = None
        """CPU threads of a rank when the checkpoint was written that this run goes on from."""
        self.pending: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        self.metrics: dict[str, float] = {}

    def run(self) -> Outcome:
        """The loop."""
        config, start = self.config.train, time.perf_counter()
        checkpoint = self._newest()
        if checkpoint is not None and checkpoint.step >= config.steps:
            return self._outcome(checkpoint.step, checkpoint.step, None, start)
        torch.manual_seed(self.config.seed)
        models = self.task.models()
        sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
        self.engines = {
            name: Engine(model, self.config.engine, self.config.optim, config.micro_batch_size, self.cluster, name)
            for name, model in models.items()
        }
        if checkpoint is not None:
            self._restore(checkpoint)
        self.engine = next(iter(self.engines.values()))
        self.peak = matmul_peak(self.engine.device, self.engine.dtype) * self.cluster.world_size
        tracker = Tracker(
            self.folder, self.config.track, self.config.model_dump(mode="json"), self.cluster.is_main, config.steps
        )
        with (
            StopSignal(self.cluster) as stop,
            tracker as self.tracker,
            self.store,
            closing(self.loader),
            closing(self.valid_loader),
        ):
            self._introduce(sizes)
            self.tracker.truncate(self.step)
            self._mark()
            first = self.step
            while self.step < config.steps and not stop.agreed():
                self._train_step()
                last = self.step == config.steps
                if _due(self.step, config.log_every) or last:
                    self._flush()
                self.tracker.progress(self.step, {})
                if _due(self.step, config.eval_every) or last:
                    self._evaluate()
                if _due(self.step, self.config.checkpoint.every) or last:
                    self._save()
            if stop.name and self.step > first and self.store.last_step != self.step:
                self._save()
        return self._outcome(first, self.step, stop.name if self.step < config.steps else None, start)

    def _outcome(self, first: int, step: int, stopped_by: str | None, start: float) -> Outcome:
        metrics = self.metrics or self.folder.last_evaluation()
        return Outcome(self.folder, first, step, stopped_by, metrics, time.perf_counter() - start)

    def _loader(self, split: str) -> Loader:
        section, world_size = self.config.train, self.cluster.world_size
        # evaluation has no global batch: it takes micro-batches until the samples are used up
        size = section.global_batch_size if split == "train" else section.micro_batch_size * world_size
        return Loader(self.task.samples(split), size, section.micro_batch_size, self.cluster.rank, world_size)

    def _open_folder(self) -> None:
        if not self.config.checkpoint.resume and (steps := steps_in(self.folder.checkpoints)):
            raise UserError(
                f"checkpoint.resume is false, but {self.folder.path} holds a checkpoint of step {steps[-1]}: "
                "choose another run.name, or remove that folder"
            )
        self.folder.create(self.config)

    def _introduce(self, sizes: dict[str, int]) -> None:
        """Say what is about to run, and on what."""
        section, engine = self.config.train, self.config.engine
        device = self.engine.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        where = f"{self.cluster.world_size} x {name}, {engine.precision}, ZeRO stage {engine.zero_stage}"
        tokens = section.global_batch_size * self.task.tokens_per_sample
        for model, size in sizes.items():
            self.tracker.message(f"{model}: {size:,} parameters on {where}")
        split = f"{self.cluster.world_size} x {self.loader.grad_accum} x {section.micro_batch_size}"
        self.tracker.message(
            f"{section.steps:,} steps of {section.global_batch_size:,} samples ({tokens:,} tokens): "
            f"ranks x accumulation x micro-batch = {split}"
        )
        if self.step:
            self.tracker.message(f"going on from the checkpoint of step {self.step}")
        threads = torch.get_num_threads()
        if device.type == "cpu" and self.threads not in (None, threads):
            self.tracker.message(
                f"warning: {threads} threads a rank now, {self.threads} before: the last bits of losses will differ; "
                f"OMP_NUM_THREADS={self.threads} keeps them"
            )

    def _train_step(self) -> None:
        batches = self.loader.step(self.step)
        torch.manual_seed(step_seed(self.config.seed, self.step, self.cluster.rank))
        factor = self.lr_factor(self.step)
        metrics = self.task.step(self.engines, batches, factor)
        self.step += 1
        row: dict[str, Any] = {"step": self.step, "lr": factor * self.engine.base_lr}
        self.pending.append((row, metrics))
        if any(engine.skipped for engine in self.engines.values()):
            row["skipped"] = True
        for name, engine in self.engines.items():
            row["grad_norm" if len(self.engines) == 1 else f"grad_norm/{name}"] = engine.grad_norm

    def _flush(self) -> None:
        """Turn pending metrics into rows: one reduction over ranks and one wait for the device for all of them."""
        if not self.pending:
            return
        names = list(self.pending[0][1])
        table = torch.stack([torch.stack([metrics[name].float() for name in names]) for _, metrics in self.pending])
        if self.cluster.world_size > 1:
            dist.all_reduce(table)
        rows = []
        per_step = self.task.tokens_per_sample * self.config.train.global_batch_size
        for (row, _), values in zip(self.pending, table.tolist(), strict=True):
            row |= dict(zip(names, values, strict=True))
            row |= {k: v.item() for k, v in row.items() if isinstance(v, Tensor)}
            row["tokens"] = row["step"] * per_step
            rows.append(row)
        rows[-1] |= self._throughput(len(rows))
        self.pending = []
        self.tracker.rows(rows)
        if skipped := [str(row["step"]) for row in rows if "skipped" in row]:
            self.tracker.message(f"warning: no update in step {', '.join(skipped)}: the gradient was not finite")
        self._mark()

    def _mark(self) -> None:
        self.window_start, self.window_wait = time.perf_counter(), self.loader.wait_seconds

    def _throughput(self, steps: int) -> dict[str, float]:
        seconds = time.perf_counter() - self.window_start
        samples = steps * self.config.train.global_batch_size
        flops = samples * self.task.flops_per_sample / seconds
        # the peak of rank 0 since its start
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()
        else:
            # ru_maxrss counts kilobytes on Linux and bytes on macOS
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {
            "tokens_per_s": samples * self.task.tokens_per_sample / seconds,
            "step_seconds": seconds / steps,
            "flops_per_s": flops,
            "mfu": flops / self.peak,
            "data_wait": (self.loader.wait_seconds - self.window_wait) / seconds,
            "memory_gb": memory / 2**30,
        }

    def _evaluate(self) -> None:
        self._flush()
        for engine in self.engines.values():
            engine.sync_buffers()
        section = self.config.train
        batches = self.valid_loader.evaluation(section.micro_batch_size, section.eval_samples)
        self.metrics = {f"valid/{k}": v for k, v in self.task.evaluate(self.engines, batches).items()}
        self.tracker.rows([{"step": self.step, **self.metrics}])
        values = "  ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        self.tracker.message(f"step {self.step}: {values}")
        self._mark()

    def _save(self) -> None:
        self._flush()
        self.tracker.sync()
        for engine in self.engines.values():
            engine.sync_buffers()
        state = {
            "step": self.step,
            "samples": self.step * self.config.train.global_batch_size,
            "seed": self.config.seed,
            "identity": self.task.identity(),
            "threads": torch.get_num_threads(),
            "engines": {name: engine.scalars() for name, engine in self.engines.items()},
        }
        tensors = ((f"{name}/{key}", value) for name, engine in self.engines.items() for key, value in engine.tensors())
        self.store.save(self.step, tensors, state)
        self._mark()

    def _newest(self) -> Checkpoint | None:
        """The newest good checkpoint: rank 0 checks it and what it was trained on, every rank opens it."""

        def step_of_latest() -> int | None:
            checkpoint = self.store.latest()
            if checkpoint is None:
                return None
            for key, value in self.task.identity().items():
                saved = checkpoint.state["identity"].get(key)
                if saved is not None and saved != value:  # an imported run has met no corpus yet
                    raise UserError(
                        f"{self.folder.path}: the {key} is not the one this run was trained with "
                        f"({value[:12]} now, {str(saved)[:12]} then): restore it, or choose another run.name"
                    )
            return checkpoint.step

        step = self.cluster.on_main(step_of_latest)
        return None if step is None else self.cluster.on_all(lambda: self.store.open(step))

    def _restore(self, checkpoint: Checkpoint) -> None:
        for name, engine in self.engines.items():
            engine.load(_of(name, checkpoint))
            engine.load_scalars(checkpoint.state["engines"][name])
        self.step, self.threads = checkpoint.step, checkpoint.state.get("threads")


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of dropout and other noise in a step: a pure function, so that no generator state is ever saved."""
    return mix(seed, step, rank)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _of(name: str, checkpoint: Checkpoint) -> Callable[[str], Tensor | None]:
    return lambda key: checkpoint.read(f"{name}/{key}")
