"""How long NCCL's collectives take: bytes over the slowest link, and a latency that grows with the ranks.

A ring passes through all GPUs of a node before it leaves it, and each of a node's rings leaves through another of its
network adapters; so between nodes bytes travel at the rate of all adapters of a node together, or at NVLink's where
that is less. Steps, protocols and their choice are as in NCCL 2.30's own cost model (src/graph/tuning.cc).
"""

from dataclasses import dataclass
from math import ceil, log2
from typing import NamedTuple

from cairn.plan.hardware import Hardware

LINK = 0.8
"""Share of a link's rate that collectives reach. Assumed."""


class Protocol(NamedTuple):
    """Seconds of a step between GPUs of a node and between nodes, and the share of the rate that is left."""

    within: float
    between: float
    share: float


RING = (Protocol(3.4e-6, 14e-6, 1.0), Protocol(1.9e-6, 4e-6, 0.92))
"""NCCL's Simple and LL128; LL is for small messages."""
TREE = (Protocol(4e-6, 14e-6, 0.92), Protocol(1.25e-6, 8.5e-6, 0.86))
"""The same of its trees, which all-reduce in steps that grow with the logarithm of the nodes."""


class Cost(NamedTuple):
    """Seconds that bytes travel, and that steps wait for each other."""

    travel: float
    latency: float

    @property
    def seconds(self) -> float:
        """Both."""
        return self.travel + self.latency


@dataclass(frozen=True)
class Network:
    """The links of nodes x per_node GPUs; or of processes on this CPU, which have no latency."""

    gpu: Hardware
    nodes: int
    per_node: int

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.nodes * self.per_node

    @property
    def rate(self) -> float:
        """Bytes/s that pass through a GPU."""
        return LINK * (self.gpu.intra if self.nodes == 1 else min(self.gpu.intra, self.per_node * self.gpu.inter))

    def gather(self, size: float, calls: int = 1) -> Cost:
        """Until every rank has all `size` bytes that the ranks hold parts of, in so many all-gathers.

        A reduce-scatter, which adds `size` bytes up and leaves a part with each rank, takes as long.
        """
        within, between = self.world_size - self.nodes, self.nodes - 1
        return self._least(size, [(protocol, within, between) for protocol in RING], calls)

    def all_reduce(self, size: float, calls: int = 1) -> Cost:
        """Until every rank has the sum of all ranks' `size` bytes, by rings or by trees, in so many calls."""
        within, between = 2 * (self.world_size - self.nodes), 2 * (self.nodes - 1)
        ways = [(protocol, within, between) for protocol in RING]
        within, between = 2 * (self.per_node - 1), 2 * ceil(log2(self.nodes))
        return self._least(2 * size, [*ways, *((protocol, within, between) for protocol in TREE)], calls)

    def _least(self, size: float, ways: list[tuple[Protocol, int, int]], calls: int) -> Cost:
        """The fastest of protocols with so many steps within nodes and between them."""
        travel = size * (self.world_size - 1) / self.world_size / self.rate
        if self.gpu.device == "cpu":
            return Cost(travel, 0.0)
        costs = [
            Cost(travel / p.share, calls * (within * p.within + between * p.between)) for p, within, between in ways
        ]
        return min(costs, key=lambda cost: cost.seconds)
