"""What a user is told when a call of `train` begins and when it has ended."""

from dataclasses import dataclass

import torch

from cairn.cluster import Cluster
from cairn.config.schema import RunConfig
from cairn.ops.precision import fast_bf16
from cairn.train.folder import RunFolder
from cairn.train.select import Standing


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
    out_of_time: bool = False
    """Whether train.max_hours made `step` the last one."""
    best: Standing | None = None
    """The best evaluation, where the run selects one."""

    def summary(self) -> str:
        """What a user wants to know at the end, and how to go on."""
        lines = [f"run folder: {self.folder.path}"]
        steps = f"{self.step} steps" + (" (train.max_hours)" if self.out_of_time else "")
        if self.stopped_by:
            where = f"after step {self.step}, checkpoint saved" if self.step else "before the first step"
            lines.append(f"stopped by {self.stopped_by} {where}: the same command goes on")
        elif self.first == self.step:
            lines.append(f"was finished already, after {steps}: another run.name starts a new run")
        else:
            lines.append(f"finished {steps} ({self.seconds:.0f} s in this call)")
        lines += [f"{name}: {value:.4f}" for name, value in self.metrics.items()]
        if self.best is not None:
            lines.append(f"best: {self.best.value:.4f} at step {self.best.step}, whose checkpoint is kept")
        return "\n".join([*lines, f"report: cairn report {self.folder.path}"])


def introduction(
    config: RunConfig, sizes: dict[str, int], tokens: int, cluster: Cluster, step: int, threads: int | None
) -> list[str]:
    """What is about to run, and on what, in lines.

    Args:
        config: of the run.
        sizes: parameters by model.
        tokens: in a sample.
        cluster: what it runs on.
        step: steps done before.
        threads: of a rank in the call that wrote the checkpoint the run goes on from, None without.
    """
    section, engine, device = config.train, config.engine, cluster.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    where = f"{cluster.world_size} x {name}, {engine.precision}, ZeRO stage {engine.zero_stage}"
    accumulation = section.global_batch_size // (section.micro_batch_size * cluster.world_size)
    lines = [f"{model}: {size:,} parameters on {where}" for model, size in sizes.items()]
    lines.append(
        f"{section.steps:,} steps of {section.global_batch_size:,} samples ({section.global_batch_size * tokens:,} "
        f"tokens): ranks x accumulation x micro-batch = {cluster.world_size} x {accumulation} x "
        f"{section.micro_batch_size}"
    )
    if engine.precision == "bf16" and not fast_bf16(device.type):
        lines.append(
            "warning: bf16 is emulated here, up to a hundred times as slow as fp32: a run under another run.name with "
            "engine.precision=auto or fp32 is not"
        )
    if step:
        lines.append(f"going on from the checkpoint of step {step}")
    now = torch.get_num_threads()
    if device.type == "cpu" and threads not in (None, now):
        lines.append(
            f"warning: {now} threads a rank now, {threads} before: the last bits of losses will differ; "
            f"OMP_NUM_THREADS={threads} keeps them"
        )
    return lines
