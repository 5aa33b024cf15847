"""The parts of the plan against the tensors that real engines hold."""

import gc
from pathlib import Path

import pytest
import torch

from cairn.cluster import Cluster
from cairn.config.load import load
from cairn.config.schema import PretrainConfig
from cairn.models.build import build_model, count_parameters
from cairn.optim.build import build_optimizer
from cairn.plan.memory import Facts, Setting, _Peak, count, memory
from cairn.plan.trace import Activations, Trace, trace_activations
from tests.train.dist import run_distributed
from tests.train.engine_cases import here

ROOT = Path(__file__).parents[2]
MIB = 2**20
SMALL = ["model.n_layer=2", "model.n_head=2", "model.d_model=256", "model.vocab_size=2048", "data.seq_len=16"]
NOTHING = Activations((Trace(),))


def config(*more, name="bench-8x512"):
    return load(PretrainConfig, ROOT / f"configs/pretrain/{name}.yaml", ["engine.precision=bf16", *SMALL, *more])


@pytest.mark.parametrize("name", ["bench-8x512", "gpt-tiny", "bert-tiny"])
def test_what_the_optimizer_keeps_is_counted_from_its_groups(name):
    wanted = config(name=name)
    facts = count(wanted, 2048)
    assert facts.parameters == count_parameters(wanted.model, 2048)
    model = build_model(wanted.model, 2048)
    optimizer = build_optimizer(model.named_parameters(), model, wanted.optim)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert facts.optimizer_bytes == sum(value.numel() * 4 for value in held)
    assert facts.groups == tuple(sum(p.numel() for p in group["params"]) for group in optimizer.param_groups)


ENGINES = [
    ("engine.zero_stage=1",),
    ("engine.zero_stage=2",),
    ("engine.zero_stage=3",),
    ("engine.zero_stage=0", "engine.precision=fp32"),
]


def _alive():
    gc.collect()
    tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    tensors += [found.grad for found in tensors if found.is_leaf and found.grad is not None]
    return sum(
        {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}.values()
    )


def _held(rank, world):
    """Bytes of tensors that each of ENGINES holds after two steps."""
    from cairn.train.engine import Engine

    engines, sizes = [], []
    for overrides in ENGINES:
        wanted, before = config(*overrides), _alive()
        torch.manual_seed(0)
        model = build_model(wanted.model, 2048)
        engines.append(Engine(model, wanted.engine, wanted.optim, 1, Cluster(rank, world, rank, world)))
        ids = torch.zeros(1, 16, dtype=torch.int64)
        for _ in range(2):
            engines[-1].backward(engines[-1](ids, labels=ids))
            engines[-1].step(1.0)
        sizes.append(float(_alive() - before))
    return sizes


@pytest.mark.parametrize("world", [1, 2])
def test_what_lies_there_all_the_time_is_what_an_engine_holds(world):
    facts = count(config(), 2048)
    if world == 1:
        here()
    for held in [_held(0, 1)] if world == 1 else run_distributed(_held, world, world):
        for overrides, size in zip(ENGINES, held, strict=True):
            wanted = config(*overrides)
            setting = Setting(wanted.engine.zero_stage, 1, False)
            planned = sum(_Peak(wanted, facts, NOTHING, setting, world, "cpu")._still()["device"].values())
            if setting.stage == 3:  # of its bucket, 50 million elements, a CPU has only what is written to
                planned += 4.0 * (50_000_000 - facts.parameters)
            assert planned == pytest.approx(size, rel=0.03), overrides


def test_splitting_over_ranks_leaves_its_share_to_each():
    wanted, facts = config("train.global_batch_size=8"), Facts((1000_000_000,), 0, 1000, (), 1.0)
    one, eight = (
        {stage: memory(wanted, facts, NOTHING, Setting(stage, 1, False), world, "cuda").parts for stage in (1, 2, 3)}
        for world in (1, 8)
    )
    for stage in (1, 2, 3):
        assert eight[stage]["optimizer"] == one[stage]["optimizer"] / 8
        assert eight[stage]["masters"] == one[stage]["masters"] / 8
    assert eight[1]["gradients"] >= 4e9  # DeepSpeed's bf16 stage 1 adds up all of them on every rank
    assert eight[2]["gradients"] == 4e9 / 8
    assert one[1]["weights"] == eight[2]["weights"] == 2e9


def test_offload_moves_masters_and_moments_to_the_host():
    facts = Facts((1000_000_000,), 0, 1000, (), 1.0)
    for offload, weights in (("optimizer", 0.25e9), ("all", 0.0)):
        wanted = config("engine.zero_stage=3", f"engine.offload={offload}", "train.global_batch_size=8")
        found = memory(wanted, facts, NOTHING, Setting(3, 1, False), 8, "cuda")
        assert found.parts["optimizer"] == found.parts["masters"] == 0
        assert found.parts["weights"] - 2e9 == weights  # what is gathered is there besides
        assert found.host >= 12e9 / 8


def test_muon_needs_room_for_its_products():
    facts = count(config(name="gpt-tiny"), 2048)
    found = _Peak(config(name="gpt-tiny"), facts, NOTHING, Setting(1, 8, False), 1, "cpu")
    assert found._newton_schulz() > 14 * 256 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_a_real_training_peaks_where_the_plan_says(stage, tmp_path):
    from benchmarks.plan import NOTHING as NO_MODEL
    from benchmarks.plan import TENSORS, Case, measured, predicted

    data = (f"data.dir={tmp_path}", "tokenizer.vocab_size=1024", "data.source=" + str(ROOT / "docs"))
    case, small = Case(stage, 1, 4, data), Case(1, 1, 1, data)
    process = measured(small, TENSORS, NO_MODEL) - predicted(small, NO_MODEL)[0]
    assert predicted(case)[0] == pytest.approx(measured(case, TENSORS) - process, rel=0.12)


def test_the_peak_of_a_config_without_depth_is_that_of_its_only_trace():
    wanted = config()
    activations = trace_activations(wanted, 2048, 1, False, "cpu")
    found = memory(wanted, count(wanted, 2048), activations, Setting(1, 1, False), 1, "cpu")
    assert found.total > found.tensors > 16 * count(wanted, 2048).parameters
