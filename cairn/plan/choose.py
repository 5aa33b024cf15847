"""Which settings a run may take, which of them fit, and which is the fastest."""

from collections.abc import Iterator
from dataclasses import dataclass

from cairn.config.schema import PretrainConfig
from cairn.errors import UserError
from cairn.plan.collectives import Network
from cairn.plan.memory import GIB, USABLE, Facts, Memory, Setting, memory
from cairn.plan.speed import Speed, speed
from cairn.plan.trace import trace_activations

MOST_NODES = 256
"""Searched for a place where a run fits."""
CLOSE = 0.03
"""Share by which expected times may differ without one being called faster."""


@dataclass(frozen=True)
class Option:
    """A setting, what it takes and how fast it is."""

    setting: Setting
    memory: Memory
    speed: Speed
    room: float
    """Bytes that a GPU or process may take."""

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.memory.total <= self.room


@dataclass(frozen=True)
class Place(Network):
    """The GPUs, or the processes of this CPU, that a run is planned for."""

    @property
    def room(self) -> float:
        """Bytes that a rank may take: processes on a CPU share its memory."""
        share = self.per_node if self.gpu.device == "cpu" else 1
        return self.gpu.memory * USABLE[self.gpu.device] / share


def sizes(config: PretrainConfig, world_size: int) -> list[int]:
    """Micro-batch sizes: 1, 2, 4, ... that divide a rank's share of the global batch, and the config's own.

    Raises UserError where the global batch does not divide over the ranks.
    """
    batch = config.train.global_batch_size
    if batch % world_size:
        near = max(1, round(batch / world_size)) * world_size
        raise UserError(
            f"train.global_batch_size {batch} does not divide over {world_size} ranks: set {near}, "
            "or plan for other nodes"
        )
    share = batch // world_size
    powers = {1 << i for i in range(share.bit_length()) if share % (1 << i) == 0}
    own = config.train.micro_batch_size
    return sorted(powers | ({own} if share % own == 0 else set()))


def options(config: PretrainConfig, vocab_size: int, facts: Facts, place: Place) -> list[Option]:
    """Every setting up to the micro-batch size at which nothing fits any more, that one included.

    Stage 0 is given as the stage that DeepSpeed would run: 1 in bf16 and fp16.
    """
    return list(_options(config, vocab_size, facts, place))


def _options(config: PretrainConfig, vocab_size: int, facts: Facts, place: Place) -> Iterator[Option]:
    for recompute in (False, True):
        for size in sizes(config, place.world_size):
            activations = trace_activations(config, vocab_size, size, recompute, place.gpu.device)
            found = []
            for stage in stages(config):
                setting = Setting(stage, size, recompute)
                used = memory(config, facts, activations, setting, place.world_size, place.gpu.device)
                pace = speed(config, facts, setting, place.gpu, place.nodes, place.per_node)
                found.append(Option(setting, used, pace, place.room))
            yield from found
            if not any(option.fits for option in found):
                break


def stages(config: PretrainConfig) -> list[int]:
    """ZeRO stages that differ: 0 is 1 but in fp32, and offload needs 1."""
    return [0, 1, 2, 3] if config.engine.precision == "fp32" and config.engine.offload == "none" else [1, 2, 3]


def fastest(config: PretrainConfig, found: list[Option]) -> Option | None:
    """The fastest option that fits, None where none does; of those within CLOSE, the one nearest to the config."""
    fitting = [option for option in found if option.fits]
    limit = min((option.speed.seconds for option in fitting), default=0.0) * (1 + CLOSE)
    own_stage = max(config.engine.zero_stage, stages(config)[0])

    def rank(option: Option) -> tuple[bool, int, bool, bool, float]:
        setting = option.setting
        other_size = setting.micro_batch_size != config.train.micro_batch_size
        return setting.stage != own_stage, setting.stage, setting.recompute, other_size, option.memory.total

    return min((option for option in fitting if option.speed.seconds <= limit), key=rank, default=None)


def smallest(config: PretrainConfig, vocab_size: int, facts: Facts, place: Place) -> str:
    """What would fit where nothing does, on the fewest nodes: their number and overrides."""
    activations = trace_activations(config, vocab_size, 1, True, place.gpu.device)
    for nodes in range(place.nodes, MOST_NODES + 1):
        there = Place(place.gpu, nodes, place.per_node)
        if config.train.global_batch_size % there.world_size:
            continue
        for offload in dict.fromkeys([config.engine.offload, "optimizer", "all"]):
            changed = config.model_copy(update={"engine": config.engine.model_copy(update={"offload": offload})})
            for stage in stages(changed):
                setting = Setting(stage, 1, True)
                used = memory(changed, facts, activations, setting, there.world_size, place.gpu.device)
                if used.total <= there.room:
                    more = (
                        ""
                        if offload == "none"
                        else f" engine.offload={offload} ({used.host / GIB:.0f} GiB of the host)"
                    )
                    return f"{nodes} x {place.per_node} {place.gpu.name} with {overrides(setting)}{more}"
    return f"not {MOST_NODES} nodes, one sample at a time: take larger GPUs, a shorter data.seq_len, a smaller model"


def overrides(setting: Setting) -> str:
    """As a user types it."""
    return (
        f"train.micro_batch_size={setting.micro_batch_size} engine.zero_stage={setting.stage} "
        f"engine.activation_checkpointing={str(setting.recompute).lower()}"
    )
