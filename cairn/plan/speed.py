"""How long a step takes: matrix products, memory traffic, collectives less what of them hides, the update.

On GPUs none of this was measured by us: docs/scale.md has the published runs that constants were fitted to, and those
that were not used for it and are predicted.
"""

from dataclasses import dataclass, replace
from math import ceil

from cairn.config.model import Seq2SeqSection
from cairn.config.schema import PretrainConfig
from cairn.config.train import MuonSection
from cairn.plan.collectives import Cost, Network
from cairn.plan.hardware import Hardware
from cairn.plan.memory import PREFETCH, WHOLE_REDUCTION, Facts, Setting
from cairn.train.engine_config import effective_stage

TOKENS = 1150.0
"""Tokens of a micro-batch at which products reach half of what they do with many. Fitted."""
ATTENTION = 0.5
"""Rate of attention's products beside that of others. Assumed: a fused causal kernel reaches 300 to 400 TFLOP/s on an
H100 where a plain product reaches 700."""
EIGHT = 2.0
"""Rate of products in 8 bits beside those in bf16: data sheets."""
PASSES = {False: 240.0, True: 100.0}
"""How often a block moves an element of each token's width, forward and backward, in all that is no product, without
and with torch.compile. Fitted; gaps between kernels are in it."""
ROUNDING = {False: 220.0, True: 44.0}
"""Passes more, of the same kind, that scaling and rounding to 8 bits take, without and with torch.compile: counted in
cairn/ops/fp8.py, and fitted."""
LOGITS = {False: 46.0, True: 12.0}
"""Bytes that a score over the vocabulary moves, without and with torch.compile: counted in cairn/ops/losses.py."""
LAUNCH = {False: 6e-4, True: 2e-4}
"""Seconds that the host takes to launch a block's kernels, forward and backward. Assumed: 80 and 25 of 7 us."""
CONTENTION = 0.25
"""Seconds that computation loses for each that communication runs beside it and takes its SMs. Fitted."""
TRAFFIC = 0.7
"""Share of a memory's bandwidth that elementwise kernels reach. Assumed."""
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
    """That does not hide behind computation."""
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


@dataclass(frozen=True)
class Work:
    """A micro-batch of `tokens` through a model of so many blocks."""

    tokens: int
    layers: int
    width: int
    flops: float
    """Of a token, forward and backward."""
    attention: float
    """Of these, attention's."""
    loss: float
    """Bytes that a token's loss moves."""
    compiled: bool
    eight: float = 0.0
    """Of the FLOPs, those that are done in 8 bits."""
    recompute: float = 0.0
    """Share of the forward pass that is done again in the backward pass."""
    element: float = 2.0
    """Bytes of an activation."""

    def seconds(self, gpu: Hardware) -> tuple[float, float]:
        """Of the forward and the backward pass; twice as much is computed in the latter."""
        rate = gpu.peak * gpu.held
        if gpu.device == "cpu":
            whole = self.tokens * self.flops / rate
        else:
            rate *= self.tokens / (self.tokens + TOKENS)
            plain = self.flops - self.attention - self.eight
            products = (plain + self.eight / EIGHT + self.attention / ATTENTION) / rate
            passes = PASSES[self.compiled] + (ROUNDING[self.compiled] if self.eight else 0.0)
            moved = self.layers * self.width * self.element * passes
            whole = self.tokens * (products + (moved + self.loss) / (TRAFFIC * gpu.bandwidth))
            whole = max(whole, self.layers * LAUNCH[self.compiled])
        return whole / 3, whole * (2 + self.recompute) / 3


def exposed(costs: list[Cost], calls: int, computation: float) -> float:
    """Seconds that collectives add to the computation that they run beside, in so many parts.

    Bytes travel while it goes on, but those of the first part, which nothing is there to hide; and while they do, it
    is slower by CONTENTION. Latency does not hide.
    """
    travel = sum(cost.travel for cost in costs)
    hidden = min(travel * (1 - 1 / calls), computation)
    return travel - (1 - CONTENTION) * hidden + sum(cost.latency for cost in costs)


def sharded(
    network: Network, weights: float, gradients: float, calls: int, passes: tuple[float, float], regather: bool
) -> float:
    """Seconds that a micro-batch loses to communication where weights are gathered as blocks need them.

    `weights` and `gradients` in bytes; `passes`: seconds of forward and backward pass; `regather`: the backward pass
    gathers again, as the weights of a block were dropped after its forward pass.
    """
    forward, backward = passes
    gather, scatter = network.gather(weights, calls), network.gather(gradients, calls)
    return exposed([gather], calls, forward) + exposed([gather] * regather + [scatter], calls, backward)


def speed(config: PretrainConfig, facts: Facts, setting: Setting, gpu: Hardware, nodes: int, per_node: int) -> Speed:
    """A step of `config` changed to `setting` on nodes x per_node GPUs (or processes that share this CPU)."""
    network = Network(gpu, nodes, per_node)
    tokens = float(config.train.global_batch_size * config.seq_len)
    micro_batches = config.train.global_batch_size // (setting.micro_batch_size * network.world_size)
    ranks = network.world_size
    if gpu.device == "cpu":  # processes share the cores that were measured
        gpu, ranks = replace(gpu, peak=gpu.peak / ranks), 1
    passes = work(config, facts, setting).seconds(gpu)
    return Speed(
        sum(passes) * micro_batches,
        _communication(config, facts, setting, network, passes, micro_batches),
        _update(config, facts, setting, network, micro_batches),
        tokens,
        tokens * facts.flops,
        network.gpu.peak * ranks,
    )


def work(config: PretrainConfig, facts: Facts, setting: Setting) -> Work:
    """A rank's micro-batch."""
    model = config.model
    return Work(
        setting.micro_batch_size * config.seq_len,
        model.n_layer + (model.decoder_layers if isinstance(model, Seq2SeqSection) else 0),
        model.d_model,
        facts.flops,
        facts.attention,
        facts.logits * LOGITS[config.engine.compile],
        config.engine.compile,
        facts.flops - facts.attention - 6 * facts.logits * model.d_model if config.engine.fp8 else 0.0,
        float(setting.recompute),
        _element(config),
    )


def _element(config: PretrainConfig) -> float:
    return 4.0 if config.engine.precision == "fp32" else 2.0


def _communication(
    config: PretrainConfig,
    facts: Facts,
    setting: Setting,
    network: Network,
    passes: tuple[float, float],
    micro_batches: int,
) -> float:
    """Seconds that collectives add. Gradients travel in fp32, weights in the compute precision; but at stage 3
    DeepSpeed, as it is configured here, does not communicate while it computes."""
    stage = effective_stage(config.engine.model_copy(update={"zero_stage": setting.stage}))
    n = float(facts.parameters)
    weights, gradients = _element(config) * n, 4.0 * n
    buckets = ceil(n / (WHOLE_REDUCTION if stage < 2 else PREFETCH))
    if stage == 3:  # weights that are more than stage 3 keeps are gathered for the backward pass again
        return micro_batches * sharded(network, weights, gradients, buckets, passes, n > 1e9)
    reductions = micro_batches if stage == 2 else 1  # stage 2 all-reduces after each micro-batch
    seconds = reductions * network.all_reduce(gradients, buckets).seconds
    return seconds + (network.gather(weights, len(facts.groups)).seconds if stage else 0.0)  # the new weights


def _update(config: PretrainConfig, facts: Facts, setting: Setting, network: Network, micro_batches: int) -> float:
    """The optimizer's memory traffic, and Muon's products."""
    gpu, world = network.gpu, network.world_size
    stage = effective_stage(config.engine.model_copy(update={"zero_stage": setting.stage}))
    own = facts.parameters / (world if stage else 1)
    kept = facts.parameters / (world if stage >= 2 else 1)
    # Gradient norm, clipping and clearing; adding up; reading and writing weight, moments and gradient.
    accumulate, rest = 10.0 * kept * micro_batches + 16.0 * kept, 30.0 * own
    seconds = accumulate / (TRAFFIC * gpu.bandwidth)
    if config.engine.offload != "none" and gpu.device != "cpu":
        seconds += rest * network.per_node / (TRAFFIC * HOST) + 6.0 * own / PCIE
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
