"""Every ZeRO stage, precision and world size: the same gradients, the same weights, state that any other reads.

One process group per world size runs all its cases; what must agree across world sizes is compared here.
"""

from itertools import product
from typing import Any

import pytest
import torch

from cairn.config.train import AdamWSection, MuonSection
from tests.train.dist import run_distributed
from tests.train.engine_cases import OPTIM, build, differing, everything, noise, reader, train

STAGES, PRECISIONS, WORLDS = (0, 1, 2, 3), ("fp32", "bf16", "fp16"), (1, 2, 4)
PLAIN = AdamWSection(lr=1e-2, grad_clip=0.0)
MUON = MuonSection(lr=1e-2, adam_lr=1e-2, grad_clip=0.5)

Results = dict[int, dict[str, Any]]


def _work(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": {}, "gradient": {}, "muon": {}, "wrong": []}
    for stage, precision in product(STAGES, PRECISIONS):
        case = f"world {world_size}, stage {stage}, {precision}"
        straight, stopped = build(stage, precision), build(stage, precision)
        found["losses"][f"{stage} {precision}"] = train(straight, range(4), 2)
        train(stopped, range(2), 2)
        resumed = build(stage, precision)
        resumed.load(reader(everything(stopped)))
        resumed.load_scalars(stopped.scalars())
        train(resumed, range(2, 4), 2)
        state = everything(straight)
        found["wrong"] += [f"{case}: {n} after resuming" for n in differing(state, everything(resumed))]
        if straight.scalars() != resumed.scalars():
            found["wrong"].append(f"{case}: {straight.scalars()} but {resumed.scalars()} after resuming")
        given = noise(state)
        resumed.load(reader(given))
        found["wrong"] += [f"{case}: {n} after loading noise" for n in differing(given, everything(resumed))]
    for stage in STAGES:
        for accumulation in [a for a in (1, 2, 8) if a * world_size <= 8]:
            engine = build(stage, optim=PLAIN)
            train(engine, range(1), accumulation)
            gradient = {k: v / 0.1 for k, v in everything(engine).items() if k.startswith("exp_avg/")}
            found["gradient"][f"{stage} x {accumulation}"] = (float(engine.grad_norm), gradient)
        engine = build(stage, optim=MUON)
        train(engine, range(3), 2)
        found["muon"][str(stage)] = everything(engine)
        if stage:
            kept, away = build(stage, "bf16"), build(stage, "bf16", offload="all")
            train(kept, range(3), 2)
            train(away, range(3), 2)
            apart = differing(everything(kept), everything(away))
            close = all(torch.allclose(everything(kept)[n], everything(away)[n], rtol=1e-4, atol=1e-5) for n in apart)
            found["wrong"] += [] if close else [f"world {world_size}, stage {stage}: offload changes {apart}"]
    return found


@pytest.fixture(scope="module")
def results() -> Results:
    return {world_size: run_distributed(_work, world_size, world_size)[0] for world_size in WORLDS}


@pytest.mark.slow
def test_state_is_read_back_and_resumed_to_the_bit_everywhere(results: Results) -> None:
    assert [line for world_size in WORLDS for line in results[world_size]["wrong"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_losses_agree_at_every_stage_and_world_size(results: Results, precision: str) -> None:
    wanted = torch.tensor(results[1]["losses"][f"0 {precision}"])
    tolerance = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 3e-3}[precision]
    for world_size, stage in product(WORLDS, STAGES):
        losses = torch.tensor(results[world_size]["losses"][f"{stage} {precision}"])
        torch.testing.assert_close(losses, wanted, rtol=tolerance, atol=0, msg=f"world {world_size}, stage {stage}")


@pytest.mark.slow
def test_gradients_are_sums_over_ranks_and_micro_batches(results: Results) -> None:
    norm, gradient = results[1]["gradient"]["0 x 1"]
    assert norm > 1
    for world_size in WORLDS:
        for case, (other_norm, other) in results[world_size]["gradient"].items():
            assert other_norm == pytest.approx(norm, rel=1e-5), f"world {world_size}, stage {case}"
            for name, value in gradient.items():
                torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_muon_updates_whole_matrices_at_every_stage_and_world_size(results: Results) -> None:
    wanted = results[1]["muon"]["0"]
    for world_size, stage in product(WORLDS, STAGES):
        state = results[world_size]["muon"][str(stage)]
        assert state.keys() == wanted.keys()
        for name in wanted:
            close = torch.allclose(state[name].float(), wanted[name].float(), rtol=1e-2, atol=1e-3)
            assert close, f"world {world_size}, stage {stage}: {name}"


def _one_rank_uses_it(rank: int) -> list[Any]:
    norms = []
    for stage in (0, 1):
        engine = build(stage, "bf16" if stage else "fp32", OPTIM)
        hidden = torch.ones(2, 7).requires_grad_()
        loss = engine.module.norm(hidden.to(engine.dtype)).sum() if rank else engine(torch.arange(4)).sum()  # type: ignore
        engine.backward(loss)
        engine.step(1.0)
        norms.append((float(engine.grad_norm), everything(engine)["exp_avg/embed.weight"].norm().item()))
    return norms


@pytest.mark.slow
def test_a_parameter_that_one_rank_alone_uses_is_clipped_on_all() -> None:
    first, second = run_distributed(_one_rank_uses_it, 2)
    assert first == second
    (norm, moment), (bf16_norm, bf16_moment) = first
    assert bf16_norm == pytest.approx(norm, rel=2e-2)
    assert bf16_moment == pytest.approx(moment, rel=2e-2)
