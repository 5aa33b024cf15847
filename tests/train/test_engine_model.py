"""What the engine asks of a model: 8-bit products, blocks that are recomputed."""

import pytest
import torch
from torch import nn

from cairn.config.model import GPTSection
from cairn.config.train import AdamWSection, EngineSection
from cairn.errors import UserError
from cairn.models.build import build_model
from cairn.train.engine import Engine
from cairn.train.engine_model import prepare_model
from tests.train.engine_cases import Net, here


def losses(**engine: object) -> list[float]:
    """Of 15 steps of a small GPT on one batch."""
    cluster = here()
    torch.manual_seed(0)
    model = build_model(GPTSection(n_layer=2, n_head=2, d_model=32, max_seq_len=32, vocab_size=64), 64)
    section = EngineSection(precision="bf16", **engine)  # type: ignore[arg-type]
    trained = Engine(model, section, AdamWSection(lr=1e-2), 4, cluster)
    tokens = torch.arange(128).reshape(4, 32) * 5 % 61
    found = []
    for _ in range(15):
        loss = trained(tokens, labels=tokens) / tokens.numel()
        trained.backward(loss)
        trained.step(1.0)
        found.append(float(loss.detach()))
    return found


def test_eight_bits_train_like_bf16_at_every_stage() -> None:
    exact, eight = losses(), losses(fp8=True)
    assert eight != exact
    assert eight[-1] < 0.2 * eight[0]
    assert eight == pytest.approx(exact, rel=0.01), "the rounding is seen, and little of it"
    assert losses(fp8=True, zero_stage=3) == pytest.approx(eight, rel=0.005)
    assert losses(fp8=True, activation_checkpointing=True) == eight, "what is recomputed is the same"


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        ({"fp8": True, "precision": "bf16"}, "engine.fp8: Net has no linear layers"),
        ({"activation_checkpointing": True}, "engine.activation_checkpointing: Net has no blocks to recompute"),
    ],
)
def test_what_a_model_cannot_do_is_told(engine: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        prepare_model(Net(), EngineSection(**engine), torch.device("cpu"))  # type: ignore[arg-type]


def test_eight_bits_beside_fp32_are_told() -> None:
    with pytest.raises(UserError, match=r"engine.fp8 needs engine.precision=bf16, and here it is fp32"):
        Engine(Net(), EngineSection(fp8=True, precision="fp32"), AdamWSection(), 4, here())


def test_a_gpu_without_eight_bits_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    with pytest.raises(UserError, match=r"engine.fp8 cannot run here: NVIDIA A100-SXM4-80GB has no 8-bit floats"):
        prepare_model(nn.Identity(), EngineSection(fp8=True, precision="bf16"), torch.device("cuda"))
