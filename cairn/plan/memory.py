"""What one GPU (or one process on a CPU) holds at the moment when it holds most.

DeepSpeed 0.19.8, as cairn/train/engine_config.py configures it, was read and its tensors were counted for this: see
docs/plan.md. N are the parameters, c the bytes of the compute precision, W the ranks, B a reduce bucket.
"""

from dataclasses import dataclass

import torch

from cairn.config.schema import PretrainConfig
from cairn.config.train import AdamWSection
from cairn.models.build import build_model
from cairn.optim.adamw import adamw_groups
from cairn.optim.muon import hidden_matrices
from cairn.plan.trace import Activations
from cairn.train.engine_config import deepspeed_config, effective_stage

GIB = 2.0**30
PARTS = ("weights", "masters", "gradients", "optimizer", "activations", "head", "buffers")
WHOLE_REDUCTION = 500_000_000
"""Elements of gradients that DeepSpeed's bf16 stage 1, and its stage 0, copy into one tensor to reduce them."""
LIVE = 1_000_000_000
"""Elements of gathered weights that stage 3 keeps (stage3_max_live_parameters, and as much reuse distance)."""
PREFETCH = 50_000_000
"""Elements that stage 3 gathers ahead, in one buffer."""
SAVE_BUCKET = 2.0**26
"""Bytes that a checkpoint gathers at once (cairn/train/engine_state.py)."""
PROCESS = {"cpu": 0.42 * GIB, "cuda": 0.8 * GIB}
"""Python with torch and DeepSpeed (measured); CUDA's context and cuBLAS's workspace (not measured)."""
NCCL = 0.6 * GIB
"""Its buffers where there are several GPUs (not measured)."""
SLACK = {"cpu": 0.1, "cuda": 0.05}
"""Share of the tensors that the allocator holds beyond them: glibc's holes (measured), CUDA's (not measured)."""
HOLES = 0.35 * GIB
"""What it holds besides on a CPU, of small models at most half their tensors (measured)."""
USABLE = {"cpu": 0.9, "cuda": 0.97}
"""Share of the memory that a run may take."""


@dataclass(frozen=True)
class Facts:
    """What the model and its optimizer are made of, in elements."""

    groups: tuple[int, ...]
    """Of each optimizer group."""
    muon: int
    """Hidden matrices that Muon trains."""
    largest: int
    """Of the largest parameter."""
    matrices: tuple[tuple[int, int], ...]
    """Shapes of Muon's."""
    flops: float
    """Floating-point operations of a trained token, forward and backward."""
    attention: float = 0.0
    """Of these, attention's: the part that grows with the sequence."""
    logits: float = 0.0
    """Scores over the vocabulary that a token's loss takes."""

    @property
    def parameters(self) -> int:
        """N."""
        return sum(self.groups)

    @property
    def optimizer_bytes(self) -> float:
        """Moments in fp32: one for Muon, two for AdamW."""
        return 4.0 * self.muon + 8.0 * (self.parameters - self.muon)


@dataclass(frozen=True)
class Setting:
    """What may be chosen so that a run fits and is fast."""

    stage: int
    micro_batch_size: int
    recompute: bool


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU or process at its peak."""

    parts: dict[str, float]
    """By PARTS."""
    when: str
    """The moment: start, forward, backward, reduce, step, save."""
    process: float
    slack: float
    host: float = 0.0
    """On a GPU's host: what is offloaded and, while it is written, this rank's part of a checkpoint."""

    @property
    def tensors(self) -> float:
        """Of the tensors alone."""
        return sum(self.parts.values())

    @property
    def total(self) -> float:
        """All of it."""
        return self.tensors + self.process + self.slack


def count(config: PretrainConfig, vocab_size: int) -> Facts:
    """Build the model on no memory, and group its parameters as the optimizer will."""
    with torch.device("meta"):
        model = build_model(config.model, vocab_size)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = set() if isinstance(config.optim, AdamWSection) else hidden_matrices(model)
    rest = adamw_groups([(n, p) for n, p in named if id(p) not in hidden], 0.0, (0.0, 0.0), 0.0, 0.0, {})
    matrices = tuple((p.shape[0], p.shape[1]) for _, p in named if id(p) in hidden)
    muon = sum(rows * columns for rows, columns in matrices)
    sizes = [muon] if muon else []
    sizes += [sum(p.numel() for p in group["params"]) for group in rest]
    largest = max(p.numel() for _, p in named)
    flops, twice = (model.flops_per_token(length) for length in (config.seq_len, 2 * config.seq_len))
    logits = vocab_size * (1.0 if config.model.name == "gpt" else 0.15)  # as flops_per_token counts the head
    return Facts(tuple(sizes), muon, largest, matrices, flops, twice - flops, logits)


def memory(
    config: PretrainConfig, facts: Facts, activations: Activations, setting: Setting, world_size: int, device: str
) -> Memory:
    """The peak of a run of `config` changed to `setting`, on `world_size` ranks of "cpu" or "cuda".

    `activations` are those of the setting's micro-batch size and recomputation.
    """
    return _Peak(config, facts, activations, setting, world_size, device).found()


class _Peak:
    def __init__(
        self, config: PretrainConfig, facts: Facts, activations: Activations, setting: Setting, world: int, device: str
    ) -> None:
        self.config, self.facts, self.acts, self.world, self.device = config, facts, activations, world, device
        section = config.engine.model_copy(update={"zero_stage": setting.stage})
        zero = deepspeed_config(section, setting.micro_batch_size, config.optim.grad_clip)["zero_optimization"]
        self.stage, self.offload = effective_stage(section), section.offload
        self.width = 4.0 if section.precision == "fp32" else 2.0
        self.n = float(facts.parameters)
        self.shard = self.n / world
        bucket = float(zero.get("reduce_bucket_size", 0))
        self.bucket = min(bucket, self.n) if device == "cpu" else bucket  # pages that are not touched take no memory
        self.accumulates = config.train.global_batch_size > setting.micro_batch_size * world
        self.bf16_optimizer = self.stage == 1 and section.precision == "bf16" and self.offload == "none"
        self.moments: list[tuple[str, dict[str, float]]] = []

    def found(self) -> Memory:
        still = self._still()
        self._start(still)
        self._pass(still)
        self._step(still)
        snapshot = self._save(still)
        when, parts = max(self.moments, key=lambda moment: sum(moment[1].values()))
        host = 0.0
        if self.device != "cpu":
            host = snapshot + sum(still["host"].values())
        tensors = sum(parts.values())
        process = PROCESS[self.device] + (NCCL if self.device != "cpu" and self.world > 1 else 0.0)
        slack = SLACK[self.device] * tensors + (min(HOLES, tensors / 2) if self.device == "cpu" else 0.0)
        return Memory(parts, when, process, slack, host)

    def _still(self) -> dict[str, dict[str, float]]:
        """What lies there all the time, on the device and, offloaded, on the host."""
        c, n, shard, stage = self.width, self.n, self.shard, self.stage
        ours, host = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)
        ours["weights"] = c * (shard if stage == 3 else n)
        if c < 4 or stage in (1, 2):
            ours["masters"] = 4 * shard if stage else 0.0
        ours["optimizer"] = self.facts.optimizer_bytes / (self.world if stage else 1)
        if self.bf16_optimizer:
            ours["gradients"] = 4 * n  # not split: every rank adds up all of them
        elif stage == 3:
            ours["gradients"] = 4 * shard
            ours["buffers"] = 4 * self.bucket
        if self.offload != "none":
            moved = ["masters", "optimizer"] + (["gradients"] if stage == 3 else [])
            moved += ["weights"] if self.offload == "all" and stage == 3 else []
            place = ours if self.device == "cpu" else host
            for part in moved:
                size, ours[part] = ours[part], 0.0
                place[part] += size
            if stage < 3:
                place["gradients"] += 4 * shard
                place["buffers"] += c * shard + c * self.facts.largest
                ours["buffers"] += c * self.facts.largest
        return {"device": ours, "host": host}

    def _at(self, when: str, still: dict[str, dict[str, float]], **more: float) -> None:
        self.moments.append((when, {part: size + more.get(part, 0.0) for part, size in still["device"].items()}))

    def _start(self, still: dict[str, dict[str, float]]) -> None:
        """The optimizer makes its state in a step with a gradient of zeros, while the model's fp32 weights are still
        there; Muon's part first."""
        ranks = self.world if self.stage else 1
        zeros = 4.0 * max(self.facts.groups) / ranks
        initial = 4 * self.n if self.device == "cpu" else 0.0
        bucket = self.bucket if self.device == "cpu" and self.stage == 3 else 0.0  # not written to yet
        buffers, later = initial - 4 * bucket, 0.0
        if self.facts.muon:
            buffers, later = buffers + self._newton_schulz(), (self.facts.optimizer_bytes - 4 * self.facts.muon) / ranks
        moved = self.offload != "none" and self.device != "cpu"
        self._at("start", still, gradients=zeros, optimizer=0.0 if moved else -later, buffers=buffers)

    def _pass(self, still: dict[str, dict[str, float]]) -> None:
        """Forward and backward of the first or, with accumulation, of a later micro-batch, and the reduction."""
        c, n, shard, stage, b, read = self.width, self.n, self.shard, self.stage, self.bucket, self.acts.at
        gathered = c * min(n, LIVE) if stage == 3 and self.world > 1 else 0.0
        ahead = c * min(n, PREFETCH) if gathered else 0.0
        keeps = (
            c if stage == 0 or self.bf16_optimizer else 4.0 if stage == 1 else 0.0
        )  # bytes a gradient, till the step
        parts = (
            4 * shard if stage == 2 and self.offload == "none" else 0.0
        )  # this rank's share, from the first reduction on
        kept = (keeps * n + parts) if self.accumulates else 0.0
        blocks, forward = read(lambda t: t.blocks), read(lambda t: t.forward)
        self._at(
            "forward", still, weights=gathered, activations=blocks, head=forward - blocks, gradients=kept, buffers=ahead
        )
        begin, end = self.acts.backward(0.0 if self.accumulates else keeps)
        bucket = c * b if stage == 2 else 0.0
        top = max(begin, blocks)
        self._at(
            "backward", still, weights=gathered, activations=blocks, head=top - blocks, gradients=kept, buffers=bucket
        )
        # A bucket is reduced in fp32; the whole gradient where it is not reduced in buckets.
        flush = (4 * b if c < 4 else 0.0) if stage >= 2 else 0.0
        self._at(
            "backward",
            still,
            weights=gathered,
            head=end,
            gradients=max(kept, parts),
            buffers=bucket + flush,
        )
        if stage == 0 or self.bf16_optimizer:
            self._at("reduce", still, gradients=keeps * n, buffers=4.0 * self._copied())
        elif stage == 1:
            share = 4 * shard if self.offload == "none" else 0.0  # with offload it goes to the host
            self._at("reduce", still, gradients=keeps * n + share, buffers=4 * b)

    def _copied(self) -> float:
        """Elements of gradients copied into one tensor to reduce them; a group that fills one alone is not copied."""
        most, bucket = 0.0, []
        for size in self.facts.groups:
            bucket.append(size)
            if sum(bucket) > WHOLE_REDUCTION:
                most, bucket = max(most, sum(bucket) if len(bucket) > 1 else 0), []
        return max(most, sum(bucket) if len(bucket) > 1 else 0)

    def _step(self, still: dict[str, dict[str, float]]) -> None:
        c, n, shard, stage = self.width, self.n, self.shard, self.stage
        gradients = c * n if stage == 0 or self.bf16_optimizer else 0.0
        if stage in (1, 2) and not self.bf16_optimizer and self.offload == "none":
            gradients = 4 * shard * (2 if c == 4 else 1)
        elif stage == 3 and (self.offload == "none" or self.device == "cpu"):
            gradients = 4 * shard
        self._at("step", still, gradients=gradients, buffers=self._newton_schulz())

    def _newton_schulz(self) -> float:
        """Muon's temporaries: the matrix at work and, of ZeRO's flat tensors, the update, gathered from all ranks."""
        if not self.facts.matrices:
            return 0.0
        at_work = 14.0 * max(rows * columns for rows, columns in self.facts.matrices)
        if self.stage == 0:
            return at_work
        return at_work + 4.0 * self.facts.muon + 12.0 * self.facts.muon / self.world

    def _save(self, still: dict[str, dict[str, float]]) -> float:
        """A checkpoint gathers tensors a bucket at a time; in the background, they are kept until they are written.
        Returns the bytes kept."""
        section, bucket = self.config.checkpoint, max(min(SAVE_BUCKET, 4 * self.n), 4.0 * self.facts.largest)
        kept = (4 * self.n + self.facts.optimizer_bytes) / self.world if section.background else 0.0
        if self.device == "cpu":
            when, most = max(self.moments[1:], key=lambda moment: sum(moment[1].values()))
            self._at("save", still, buffers=kept + bucket)
            if section.background and 0 < section.every < self.config.train.steps:  # training goes on meanwhile
                self.moments.append((f"{when} + save", most | {"buffers": most["buffers"] + kept}))
        else:
            self._at("save", still, buffers=bucket)
        return kept
