"""The engine on one process, and on two at stage 1. The whole matrix is in test_engine_matrix.py."""

import copy
from threading import Event

import pytest
import torch
from torch import nn

from cairn.config.model import GPTSection
from cairn.config.train import AdamWSection, EngineSection, MuonSection
from cairn.errors import UserError
from cairn.models.build import build_model
from cairn.train.engine import Engine
from tests.train.dist import run_distributed
from tests.train.engine_cases import Net, bits, build, differing, everything, here, noise, reader, train

STAGES = (0, 1, 2, 3)


@pytest.mark.parametrize("stage", STAGES)
def test_trains_like_plain_pytorch(stage: int) -> None:
    here()
    model = Net()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in plain.parameters() if p.requires_grad and p.ndim >= 2]},
            {"params": [p for p in plain.parameters() if p.requires_grad and p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        weight_decay=0.1,
    )
    engine = Engine(model, EngineSection(zero_stage=stage, precision="fp32"), AdamWSection(lr=1e-2), 8, here())
    for step in range(3):
        ids = torch.arange(8) + step
        loss = plain(ids).sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_([p for p in plain.parameters() if p.requires_grad], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1) / 4
        optimizer.step()
        optimizer.zero_grad()
        engine.backward(engine(ids).sum())
        engine.step((step + 1) / 4)
        assert float(engine.grad_norm) == pytest.approx(norm.item(), rel=1e-5)
    tensors = everything(engine)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(tensors[f"weight/{name}"], p.detach(), rtol=1e-5, atol=1e-6)


def test_deterministic_kernels_are_asked_for_when_wanted() -> None:
    here()
    try:
        Engine(Net(), EngineSection(), AdamWSection(), 8, here())
        assert not torch.are_deterministic_algorithms_enabled()
        engine = Engine(Net(), EngineSection(deterministic=True), AdamWSection(), 8, here())
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled(), "attention would only warn"
        engine.backward(engine(torch.arange(8)).sum())
        engine.step(1.0)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_masters_start_as_the_unrounded_weights_at_every_stage(precision: str) -> None:
    here()
    wanted = {f"weight/{n}": p.detach() for n, p in Net().named_parameters() if p.requires_grad}
    for stage in STAGES:
        tensors = everything(build(stage, precision))
        assert not differing(wanted, {name: tensors[name] for name in wanted})
        assert tensors["buffer/head.count"].dtype == torch.int64
        assert "buffer/head.table" not in tensors
        moments = [t for name, t in tensors.items() if name.startswith(("exp_avg/", "exp_avg_sq/"))]
        assert len(moments) == 2 * len(wanted)
        assert not any(t.any() for t in moments)


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_update_of_adam_is_the_learning_rate(stage: int) -> None:
    engine = build(stage, "bf16", AdamWSection(lr=1e-3, weight_decay=0.0, grad_clip=0.0))
    before = everything(engine)
    assert engine.scalars()["optimizer_step"] == 0
    train(engine, range(1))
    assert engine.scalars()["optimizer_step"] == 1
    moved = everything(engine)["weight/norm.bias"] - before["weight/norm.bias"]
    torch.testing.assert_close(moved.abs(), torch.full((7,), 1e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_changes_nothing(stage: int, precision: str) -> None:
    engine = build(stage, precision)
    train(engine, range(1))
    assert not engine.skipped
    before = everything(engine)
    engine.backward(engine(torch.arange(8)).sum() * float("nan"))
    engine.step(1.0)
    assert engine.skipped
    assert not differing(before, everything(engine))
    train(engine, range(1, 2))
    assert not engine.skipped
    assert differing(before, everything(engine))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_overflow_halves_the_scale_and_skips(stage: int) -> None:
    engine = build(stage, "fp16")
    before, scales = everything(engine), []
    for _ in range(2):  # DeepSpeed forgives the first
        scales.append(engine.scalars()["loss_scale"]["cur_scale"])
        engine.backward(engine(torch.arange(8)).sum() * 1e4)
        engine.step(1.0)
        assert engine.skipped
    assert not differing(before, everything(engine))
    assert engine.scalars()["loss_scale"]["cur_scale"] == scales[0] / 2
    assert engine.scalars()["optimizer_step"] == 0
    again = build(stage, "fp16")
    again.load_scalars(engine.scalars())
    assert again.scalars() == engine.scalars()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_growing_fp16_scale_does_not_change_the_gradient(stage: int) -> None:
    optim = AdamWSection(lr=1e-5, betas=(0.0, 0.9), grad_clip=0.0)
    engine = build(stage, "fp16", optim, deepspeed={"fp16": {"loss_scale_window": 2, "initial_scale_power": 8}})
    norms, gradients = [], []
    for _ in range(4):
        engine.backward(engine(torch.arange(8)).sum())
        engine.step(1.0)
        norms.append(float(engine.grad_norm))
        gradients.append(everything(engine)["exp_avg/norm.bias"].norm().item())
    assert engine.scalars()["loss_scale"]["cur_scale"] == 512
    assert max(norms) < 1.05 * min(norms)
    assert max(gradients) < 1.05 * min(gradients)


@pytest.mark.parametrize(("stage", "offload"), [(s, o) for s in STAGES for o in ("none", "all") if s or o == "none"])
def test_a_parameter_without_gradient_does_not_get_the_last_one_again(stage: int, offload: str) -> None:
    engine = build(stage, offload=offload, optim=AdamWSection(lr=1e-2, weight_decay=0.0))
    train(engine, range(1))
    seen = everything(engine)["exp_avg/embed.weight"]
    hidden = torch.randn(4, 7).requires_grad_()
    engine.backward(engine.module.norm(hidden).sum())  # type: ignore[operator]
    engine.step(1.0)
    torch.testing.assert_close(everything(engine)["exp_avg/embed.weight"], seen * 0.9)


@pytest.mark.parametrize("stage", STAGES)
def test_two_forwards_before_two_backwards_add_up(stage: int) -> None:
    together, apart = build(stage), build(stage)
    together.backward(together(torch.arange(6)).sum())
    first, second = apart(torch.arange(3)).sum(), apart(torch.arange(3, 6)).sum()
    apart.backward(first, last=False)
    apart.backward(second)
    for engine in (together, apart):
        engine.step(1.0)
    assert float(apart.grad_norm) == pytest.approx(float(together.grad_norm), rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_tensors_are_those_of_their_moment(stage: int) -> None:
    engine = build(stage)
    train(engine, range(1))
    kept = dict(engine.tensors())
    before = {name: tensor.clone() for name, tensor in kept.items()}
    train(engine, range(1, 3))  # a save in the background may write them only now
    assert not differing(kept, before)
    assert differing(kept, dict(engine.tensors()))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("change", ["step", "load"])
def test_what_is_copied_later_is_of_its_moment(stage: int, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(stage)
    start = everything(engine)
    train(engine, range(1))
    expected = everything(engine)
    gate, copied = Event(), engine.copied
    engine._copier.submit(gate.wait)  # a copier that takes its time: until somebody waits for it
    kept = dict(engine.tensors(later=True))
    monkeypatch.setattr(engine, "copied", lambda: (gate.set(), copied()))
    try:
        train(engine, range(1, 2)) if change == "step" else engine.load(start.get)
    finally:
        gate.set()
    assert differing(everything(engine), expected)
    assert not differing(kept, expected)


def test_load_names_what_is_missing_or_misshaped() -> None:
    engine = build(1)
    tensors = everything(engine)
    for bad, message in (
        ({k: v for k, v in tensors.items() if k != "exp_avg/norm.bias"}, "exp_avg/norm.bias is missing"),
        ({**tensors, "weight/norm.bias": torch.zeros(8)}, r"weight/norm.bias has shape \(8,\)"),
    ):
        with pytest.raises(UserError, match=message):
            engine.load(reader(bad))


def test_a_layout_that_does_not_hold_is_noticed() -> None:
    engine = build(2)
    initial = {n: p.detach() + 1 for n, p in Net().named_parameters()}
    with pytest.raises(UserError, match="does not hold"):
        engine._state.check(initial, torch.float32, "9.9")
    engine._state.slots[0].layout.pieces.pop()
    with pytest.raises(UserError, match="does not hold"):
        engine._state.check({n: p.detach() for n, p in Net().named_parameters()}, torch.float32, "9.9")


def test_activation_checkpointing_needs_blocks() -> None:
    with pytest.raises(UserError, match="no blocks"):
        build(1, activation_checkpointing=True)


def test_json_that_deepspeed_refuses_is_named() -> None:
    with pytest.raises(UserError, match=r"engine\.deepspeed: DeepSpeedZeroConfig has stge: Extra"):
        build(1, deepspeed={"zero_optimization": {"stge": 1}})


def test_a_precision_the_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(UserError, match=r"engine\.precision=fp16 is not supported"):
        Engine(Net(), EngineSection(precision="fp16"), AdamWSection(), 1, here())


def test_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    for stage in STAGES:
        train(build(stage, "bf16"), range(1))
    out, err = capfd.readouterr()
    assert out + err == ""


@pytest.mark.parametrize("pair", [(0, 0), (1, 1), (2, 2), (3, 3), (1, 3), (2, 1)])
def test_two_engines_train_against_each_other(pair: tuple[int, int]) -> None:
    here()
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, n)) for n in (4, 1)]
    nets[1][0] = nn.Linear(4, 5)
    plain = copy.deepcopy(nets)
    sections = [EngineSection(zero_stage=s, precision="fp32") for s in pair]
    optim = AdamWSection(lr=1e-2, weight_decay=0.0, grad_clip=0.0)
    g, d = (Engine(net, s, optim, 4, here()) for net, s in zip(nets, sections, strict=True))
    g2, d2 = plain
    optims = [torch.optim.AdamW(m.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0) for m in plain]
    for _ in range(3):
        noise_, real = torch.randn(4, 3), torch.randn(4, 4)
        d.backward(d(g(noise_).detach()).sum() - d(real).sum())
        d.step(1.0)
        d.module.requires_grad_(False)
        g.backward(-d.module(g(noise_)).sum())
        g.step(1.0)
        d.module.requires_grad_(True)
        optims[1].zero_grad()
        (d2(g2(noise_).detach()).sum() - d2(real).sum()).backward()
        optims[1].step()
        optims[0].zero_grad()
        (-d2(g2(noise_)).sum()).backward()
        optims[0].step()
    for engine, model in ((g, g2), (d, d2)):
        tensors = everything(engine)
        for name, p in model.named_parameters():
            torch.testing.assert_close(tensors[f"weight/{name}"], p.detach(), rtol=1e-4, atol=1e-5)


def _two_ranks(rank: int) -> dict[str, object]:
    engine = build(1, "bf16")
    given = noise(everything(engine))
    engine.load(reader(given))
    changed = differing(given, everything(engine))
    gradient = build(1, "fp32", AdamWSection(grad_clip=0.0))
    train(gradient, range(1), accumulation=2)
    straight, stopped = build(1, "bf16"), build(1, "bf16")
    train(straight, range(4))
    train(stopped, range(2))
    resumed = build(1, "bf16")
    resumed.load(reader(everything(stopped)))
    resumed.load_scalars(stopped.scalars())
    train(resumed, range(2, 4))
    return {
        "changed": changed,
        "norm": float(gradient.grad_norm),
        "gradient": {k: v / 0.1 for k, v in everything(gradient).items() if k.startswith("exp_avg/")},
        "resumed": differing(everything(straight), everything(resumed)),
    }


def test_two_ranks_sum_gradients_and_resume_to_the_bit() -> None:
    one = build(1, "fp32", AdamWSection(grad_clip=0.0))
    train(one, range(1))
    for result in run_distributed(_two_ranks, 2):
        assert result["changed"] == []
        assert result["resumed"] == []
        assert result["norm"] == pytest.approx(float(one.grad_norm), rel=1e-5)
        for name, value in everything(one).items():
            if name.startswith("exp_avg/"):
                torch.testing.assert_close(result["gradient"][name], value / 0.1, rtol=1e-5, atol=1e-6)


def test_muon_state_is_named() -> None:
    tensors = everything(build(3, optim=MuonSection()))
    assert tensors["momentum/layers.0.weight"].shape == (7, 6)
    assert "exp_avg/layers.0.weight" not in tensors
    assert "exp_avg/embed.weight" in tensors


def test_bits_tell_minus_zero_from_zero() -> None:
    assert not torch.equal(bits(torch.tensor([-0.0])), bits(torch.tensor([0.0])))


@pytest.mark.parametrize("stage", STAGES)
def test_recomputing_blocks_changes_no_bit_and_evaluation_disturbs_nothing(stage: int) -> None:
    shape = GPTSection(
        n_layer=2, n_head=2, d_model=16, max_seq_len=16, vocab_size=64, dropout=0.1, attention_dropout=0.1
    )
    ids = torch.arange(32).view(2, 16)
    losses: list[list[float]] = []
    for recompute in (False, True):
        torch.manual_seed(0)
        section = EngineSection(zero_stage=stage, activation_checkpointing=recompute)
        engine = Engine(build_model(shape, 64), section, AdamWSection(lr=1e-2), 2, here())
        losses.append([])
        for step in range(3):
            if recompute:
                engine.module.eval()
                with torch.no_grad():
                    engine(ids, labels=ids)
                engine.module.train()
            torch.manual_seed(step)
            loss = engine(ids, labels=ids)
            engine.backward(loss / ids.numel())
            engine.step(1.0)
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


@pytest.mark.slow
def test_compiled_it_computes_the_same() -> None:
    losses = [train(build(1, compile=compiled), range(3)) for compiled in (False, True)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
