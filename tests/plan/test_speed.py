"""Time of a step: what must hold of any machine, and what a CPU's plan was before GPUs had latency."""

from pathlib import Path

import pytest

from cairn.config.load import load
from cairn.config.schema import PretrainConfig
from cairn.plan.collectives import Cost, Network
from cairn.plan.hardware import GPUS, Hardware, settled_for
from cairn.plan.memory import Facts, Setting, count
from cairn.plan.speed import Speed, Work, exposed, sharded, speed

ROOT = Path(__file__).parents[2]
H100 = GPUS["h100"]
CPU = Hardware("cpu", 1e11, 8e9, 1e10, 1e9, 1e9, 0.8)


def read(name: str, *more: str, gpu: str = "h100") -> PretrainConfig:
    return settled_for(gpu, load(PretrainConfig, ROOT / f"configs/pretrain/{name}.yaml", more))


@pytest.fixture(scope="module")
def gpt() -> tuple[PretrainConfig, Facts]:
    config = read("gpt-1.3b")
    return config, count(config, 50304)


def step(gpt: tuple[PretrainConfig, Facts], setting: Setting, nodes: int = 1, gpu: Hardware = H100) -> Speed:
    return speed(*gpt, setting, gpu, nodes, 8)


def test_attention_and_scores_are_a_part_of_what_a_token_takes(gpt: tuple[PretrainConfig, Facts]) -> None:
    _, facts = gpt
    assert facts.attention == pytest.approx(12 * 24 * 2048 * 1024, rel=1e-3)  # causal: half of 2,048 keys
    assert facts.logits == 50304
    masked = count(read("bert-base"), 30522)
    assert masked.attention == pytest.approx(12 * 12 * 768 * 512)
    assert masked.logits == pytest.approx(0.15 * 30522)


def test_recomputation_is_another_forward_pass_and_stage_2_reduces_more_often(
    gpt: tuple[PretrainConfig, Facts],
) -> None:
    plain = step(gpt, Setting(1, 8, False))
    assert step(gpt, Setting(1, 8, True)).compute == pytest.approx(4 / 3 * plain.compute)
    assert step(gpt, Setting(2, 8, False)).communication > 5 * plain.communication
    assert step(gpt, Setting(1, 8, False), nodes=4).communication > plain.communication


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", GPUS)
def test_no_gpu_computes_faster_than_its_peak(gpt: tuple[PretrainConfig, Facts], name: str, stage: int) -> None:
    for size in (1, 8):
        found = step(gpt, Setting(stage, size, False), gpu=GPUS[name])
        assert 0 < found.mfu < GPUS[name].held
        assert min(found.compute, found.communication, found.update) > 0


def test_larger_micro_batches_and_models_compute_better_and_launches_have_a_price() -> None:
    def share(tokens: int, width: int) -> float:
        work = Work(tokens, 24, width, 72.0 * 24 * width**2, 0.0, 0.0, compiled=True)
        return tokens * work.flops / sum(work.seconds(H100)) / H100.peak

    assert share(2048, 2048) < share(8192, 2048) < share(32768, 2048) < H100.held
    assert share(8192, 768) < share(8192, 2048) < share(8192, 8192)
    tiny = Work(16, 24, 256, 1e6, 0.0, 0.0, compiled=False)
    assert sum(tiny.seconds(H100)) == sum(Work(32, 24, 256, 1e6, 0.0, 0.0, compiled=False).seconds(H100))


@pytest.mark.parametrize("travel", [0.0, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("calls", [1, 2, 40])
def test_what_hides_is_neither_negative_nor_more_than_there_is(travel: float, calls: int) -> None:
    cost, computation = Cost(travel, 0.01), 2.0
    found = exposed([cost], calls, computation)
    assert max(0.01, cost.seconds - computation) <= found <= cost.seconds
    assert found >= travel / calls  # the first part
    assert exposed([cost], calls, 2 * computation) <= found
    assert exposed([cost], calls, 0.0) == pytest.approx(cost.seconds)


def test_gathering_again_and_slow_networks_cost_more() -> None:
    def lost(nodes: int, again: bool) -> float:
        return sharded(Network(H100, nodes, 8), 2e10, 4e10, 32, (0.3, 0.6), again)

    assert 0 < lost(1, False) < lost(1, True)
    assert lost(1, True) < lost(2, True) < lost(64, True) < lost(2048, True)


@pytest.mark.parametrize("name", ["gpt2-124m", "gpt-1.3b", "bert-base"])
@pytest.mark.parametrize("stage", [1, 2])
def test_weak_scaling_never_gains(name: str, stage: int) -> None:
    config = read(name)
    facts, paces = count(config, config.model.vocab_size or 0), []
    for nodes in (1, 2, 8, 64, 512, 2048):
        train = config.train.model_copy(update={"global_batch_size": 4 * nodes * 8})
        found = step((config.model_copy(update={"train": train}), facts), Setting(stage, 4, False), nodes)
        paces.append(found.tokens_per_s / nodes)
    assert paces == sorted(paces, reverse=True)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 1), (2, 2)])
def test_a_cpus_step_is_its_measured_product_and_its_bytes(ranks: int, stage: int) -> None:
    config = read("bench-8x512", "train.global_batch_size=16", "engine.precision=bf16", gpu="cpu")
    facts = count(config, 8192)
    n, tokens = facts.parameters, 16 * config.seq_len
    found = speed(config, facts, Setting(stage, 4, False), CPU, 1, ranks)
    assert found.compute == pytest.approx(tokens * facts.flops / (0.8 * 1e11))  # however many share the cores
    reductions = 4 // ranks if stage == 2 else 1
    sent = (2 * 4 * n * reductions + 2 * n) * (ranks - 1) / ranks
    assert found.communication == pytest.approx(sent / (0.8 * 1e9))
    assert found.peak == pytest.approx(1e11)
