"""How long a step takes: products at a share of the peak fitted to published runs, communication, memory traffic.

On GPUs none of this was measured by us: docs/plan.md has the points that it was fitted to, and what is assumed.
"""

from dataclasses import dataclass

from cairn.config.schema import PretrainConfig
from cairn.config.train import MuonSection
from cairn.plan.hardware import Hardware
from cairn.plan.memory import Facts, Setting
from cairn.train.engine_config import effective_stage

COMPILED = 0.66
"""Share of the peak that a wide, compiled model tends to. On H100 nanochat d24 (1,536 wide) and llm.c 1.56B (1,600)
have about 50 %, a 124M (768) at 463k tokens/s 37 %."""
EAGER = 0.8
"""What is left of it without torch.compile: llm-foundry 1.3B (2,048 wide), 41.8 % on H100."""
WIDTH = 450.0
"""Width at which half of it is reached."""
TOKENS = 1024.0
"""Tokens of a micro-batch at which half of it is reached. Assumed."""
CPU = 0.8
"""Share of a CPU's measured matrix product that forward and backward reach. With the update, 8 layers of 512 then take
2.5 s a step, as they did for docs/benchmarks.md."""
LINK = 0.8
"""Share of a link's rate that collectives reach. Assumed."""
TRAFFIC = 0.7
"""Share of a memory's bandwidth that elementwise kernels reach. Assumed."""
HIDDEN = 0.5
"""Share of its communication that stage 3 hides behind computation. Assumed; the other stages hide nothing here."""
HOST = 100e9
"""Bytes/s of the host's memory, for an optimizer that is offloaded; its node's GPUs share it. Assumed."""
PCIE = 25e9
"""Bytes/s between host and GPU. Assumed."""
WRITE = 1e9
"""Bytes/s at which a rank brings its part of a checkpoint to the host, while training waits. Assumed."""


@dataclass(frozen=True)
class Speed:
    """Seconds of one optimizer step, and what they come to."""

    compute: float
    communication: float
    update: float
    tokens: float
    """In a step."""
    flops: float
    """Of a step, recomputation left out."""
    peak: float
    """FLOP/s of all GPUs."""

    @property
    def seconds(self) -> float:
        """A whole step."""
        return self.compute + self.communication + self.update

    @property
    def tokens_per_s(self) -> float:
        """Over all GPUs."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """The model's FLOP/s over the peak."""
        return self.flops / self.seconds / self.peak


def efficiency(config: PretrainConfig, micro_batch_size: int, gpu: Hardware) -> float:
    """Share of the peak that forward and backward passes reach."""
    if gpu.device == "cpu":
        return CPU
    width = float(config.model.d_model)
    tokens = float(micro_batch_size * config.seq_len)
    return COMPILED * (1.0 if config.engine.compile else EAGER) * width / (width + WIDTH) * tokens / (tokens + TOKENS)


def speed(config: PretrainConfig, facts: Facts, setting: Setting, gpu: Hardware, nodes: int, per_node: int) -> Speed:
    """A step of `config` changed to `setting` on nodes x per_node GPUs (or processes that share this CPU)."""
    world = nodes * per_node
    tokens = float(config.train.global_batch_size * config.seq_len)
    flops = tokens * facts.flops
    ranks = 1 if gpu.device == "cpu" else world  # processes share the cores that were measured
    compute = (
        flops
        * (4 / 3 if setting.recompute else 1.0)
        / (ranks * gpu.peak * efficiency(config, setting.micro_batch_size, gpu))
    )
    micro_batches = config.train.global_batch_size // (setting.micro_batch_size * world)
    return Speed(
        compute,
        _communication(config, facts, setting, gpu, nodes, per_node, micro_batches),
        _update(config, facts, setting, gpu, world, per_node, micro_batches),
        tokens,
        flops,
        ranks * gpu.peak,
    )


def _communication(
    config: PretrainConfig,
    facts: Facts,
    setting: Setting,
    gpu: Hardware,
    nodes: int,
    per_node: int,
    micro_batches: int,
) -> float:
    """Bytes that a GPU sends, over its slowest link. Gradients travel in fp32, weights in the compute precision."""
    world = nodes * per_node
    stage = effective_stage(config.engine.model_copy(update={"zero_stage": setting.stage}))
    n, share = float(facts.parameters), (world - 1) / world
    weights = (4.0 if config.engine.precision == "fp32" else 2.0) * n * share
    gradients = 4.0 * n * share
    if stage == 0:
        sent = 2 * gradients
    elif stage == 1:  # an all-reduce at the end of the step, then the new weights
        sent = 2 * gradients + weights
    elif stage == 2:  # DeepSpeed all-reduces buckets that belong to several ranks, after each micro-batch
        sent = 2 * gradients * micro_batches + weights
    else:  # weights that are more than stage 3 keeps are gathered for the backward pass again
        sent = ((1 if n <= 1e9 else 2) * weights + gradients) * micro_batches * (1 - HIDDEN)
    return sent / (LINK * (gpu.inter if nodes > 1 else gpu.intra))


def _update(
    config: PretrainConfig, facts: Facts, setting: Setting, gpu: Hardware, world: int, per_node: int, micro_batches: int
) -> float:
    """The optimizer's memory traffic, and Muon's products."""
    stage = effective_stage(config.engine.model_copy(update={"zero_stage": setting.stage}))
    own = facts.parameters / (world if stage else 1)
    kept = facts.parameters / (world if stage >= 2 else 1)
    # Gradient norm, clipping and clearing; adding up; reading and writing weight, moments and gradient.
    accumulate, rest = 10.0 * kept * micro_batches + 16.0 * kept, 30.0 * own
    seconds = accumulate / (TRAFFIC * gpu.bandwidth)
    if config.engine.offload != "none" and gpu.device != "cpu":
        seconds += rest * per_node / (TRAFFIC * HOST) + 6.0 * own / PCIE
    else:
        seconds += rest / (TRAFFIC * gpu.bandwidth)
    if isinstance(config.optim, MuonSection):
        steps = config.optim.ns_steps
        flops = sum(steps * (4 * min(m) ** 2 * max(m) + 2 * min(m) ** 3) for m in facts.matrices)
        seconds += flops / (world if stage else 1) / (0.5 * gpu.peak)
    return seconds


def whole_run(
    config: PretrainConfig, facts: Facts, setting: Setting, step: Speed, world: int, valid_samples: int
) -> tuple[float, float, float]:
    """Seconds of all steps, all evaluations and all saves, `valid_samples` being held out.

    An evaluation is forward passes, a third of a step's products a sample; a save waits until it is on the host.
    """
    section, steps = config.train, config.train.steps
    samples = (
        valid_samples
        if section.eval_samples is None
        else min(section.eval_samples, valid_samples or section.eval_samples)
    )
    evaluations = len({*range(section.eval_every, steps, section.eval_every), steps} if section.eval_every else {steps})
    per_sample = step.compute / section.global_batch_size / (4 if setting.recompute else 3)
    every = config.checkpoint.every
    saves = len({*range(every, steps, every), steps} if every else {steps})
    size = (4.0 * facts.parameters + facts.optimizer_bytes) / world
    return steps * step.seconds, evaluations * samples * per_sample, saves * size / WRITE
