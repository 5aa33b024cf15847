"""Collectives against what bytes and steps must take at least, and a ring played step by step."""

from dataclasses import replace
from math import log2

import pytest

from cairn.plan.collectives import LINK, RING, TREE, Network
from cairn.plan.hardware import GPUS, Hardware

CPU = Hardware("cpu", 1e11, 8e9, 1e10, 1e9, 1e9, 0.8)
PLACES = [(1, 2), (1, 8), (2, 8), (64, 8), (2048, 8), (16, 1), (4, 4)]


def played(nodes: int, per_node: int) -> list[int]:
    """Bytes that each link of a ring carries, one a part, when parts go round until every rank has all of them."""
    world = nodes * per_node
    has = [{rank} for rank in range(world)]
    sent = [0] * world
    for step in range(world - 1):
        for rank in range(world):
            part = (rank - step) % world
            assert part in has[rank]
            has[(rank + 1) % world].add(part)
            sent[rank] += 1
    assert all(len(parts) == world for parts in has)
    return sent


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 8), (3, 4)])
def test_a_ring_sends_all_parts_but_one_over_every_link(nodes: int, per_node: int) -> None:
    world, size = nodes * per_node, 1e12  # so large that latency is nothing
    network = Network(GPUS["h100"], nodes, per_node)
    assert set(played(nodes, per_node)) == {world - 1}
    assert network.gather(size).seconds == pytest.approx((world - 1) * size / world / network.rate, rel=1e-3)


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize(("nodes", "per_node"), PLACES)
def test_nothing_is_faster_than_its_bytes_over_the_links(name: str, nodes: int, per_node: int) -> None:
    gpu, size = GPUS[name], 1e9
    network = Network(gpu, nodes, per_node)
    # What a node lacks comes in over its adapters, what a GPU lacks over its links.
    lacking = size * (nodes - 1) / nodes / (per_node * gpu.inter), size * (1 - 1 / network.world_size) / gpu.intra
    assert network.gather(size).seconds >= max(lacking) / LINK * (1 - 1e-9)
    assert network.all_reduce(size).seconds >= 2 * max(lacking) * (1 - 1e-9)
    assert network.all_reduce(size).seconds <= 2 * network.gather(size).seconds * (1 + 1e-9)


@pytest.mark.parametrize("size", [1e4, 1e7, 1e10])
def test_more_ranks_and_more_calls_take_longer(size: float) -> None:
    networks = [Network(GPUS["h100"], 2**k, 8) for k in range(12)]
    for collective in (Network.gather, Network.all_reduce):
        seconds = [collective(network, size).seconds for network in networks]
        assert seconds == sorted(seconds)
        assert collective(networks[3], size, 10).seconds > seconds[3]


def test_a_rings_latency_grows_with_the_ranks_and_a_trees_with_their_logarithm() -> None:
    small, large = (Network(GPUS["h100"], nodes, 8) for nodes in (64, 2048))
    assert large.gather(1.0).seconds > 30 * small.gather(1.0).seconds
    fastest = min(TREE, key=lambda protocol: protocol.between)
    assert large.all_reduce(1.0).latency == pytest.approx(2 * (7 * fastest.within + log2(2048) * fastest.between))


def test_the_protocol_with_less_latency_is_taken_for_small_messages_alone() -> None:
    network = Network(GPUS["h100"], 1, 8)
    assert network.gather(1.0).latency == pytest.approx(7 * min(protocol.within for protocol in RING))
    assert network.gather(1e10).latency == pytest.approx(7 * RING[0].within)


def test_a_nodes_adapters_carry_together_what_enters_it() -> None:
    alone, eight = Network(GPUS["h100"], 4, 1), Network(GPUS["h100"], 4, 8)
    assert eight.rate == pytest.approx(8 * alone.rate)
    slow = replace(GPUS["h100"], inter=GPUS["h100"].inter / 10)
    assert Network(slow, 4, 8).gather(1e9).travel == pytest.approx(10 * eight.gather(1e9).travel, rel=0.1)


def test_one_rank_sends_nothing_and_a_cpu_waits_for_nothing() -> None:
    assert Network(GPUS["h100"], 1, 1).gather(1e9).seconds == 0
    assert Network(GPUS["h100"], 1, 1).all_reduce(1e9).seconds == 0
    assert Network(CPU, 1, 2).all_reduce(1e9, 5).seconds == pytest.approx(2 * 1e9 / 2 / (0.8 * 1e9))
