"""The step-time model against published speeds that it was not fitted to; the page has what the command prints."""

from dataclasses import replace
from pathlib import Path

import pytest

import cairn.plan.speed as model
from benchmarks.published import MODELS, ROWS, TITAN_COMPILED, TITAN_FP8, megatron
from benchmarks.scale import CONFIGS, compared, predicted, read, summary

ROOT = Path(__file__).parents[2]


def test_models_have_the_published_parameters() -> None:
    published = {"MPT 125m": 125e6, "MPT 7b": 6658859008, "MPT 70b": 64862437376, "Llama 3.1 8B": 8.03e9}
    published |= {"Llama 2 13b": 13.0e9, "Llama 2 70b": 69.0e9, "GPT-2 1558M": 1558e6}
    for name, parameters in published.items():
        assert MODELS[name].parameters == pytest.approx(parameters, rel=0.02)


def test_published_rows_are_in_keeping_with_their_own_mfu() -> None:
    # llm-foundry's formula, and the MFU in its table beside these speeds: 46.44 % and 41.25 %.
    for name, gpus, mfu in (("MPT 7b", 8, 0.4644), ("MPT 70b", 512, 0.4125)):
        (row,) = [row for row in ROWS if (row.source.name, row.model, row.gpus) == ("llm-foundry, H100", name, gpus)]
        model = MODELS[name]
        flops = 6 * model.parameters + 12 * model.layers * model.width * 2048
        assert row.tokens_per_s * flops / 989e12 == pytest.approx(mfu, rel=0.01)
    assert megatron(408.8) == pytest.approx(36_259, rel=1e-3)


def test_rows_that_were_not_fitted_are_predicted() -> None:
    held = sorted(abs(row.error) for row in ROWS if not row.fitted)
    assert len(held) >= 3 * sum(row.fitted for row in ROWS)
    assert sum(held) / len(held) < 0.06
    assert held[len(held) // 2] < 0.04
    foundry = [abs(row.error) for row in ROWS if row.source.name == "llm-foundry, H100" and row.gpus >= 128]
    assert max(foundry) < 0.06  # to 512 GPUs
    assert max(held) < 0.31


def test_what_8_bits_gain_is_that_of_published_runs() -> None:
    slow, fast = ([row for row in ROWS if row.source.name == name] for name in (TITAN_COMPILED.name, TITAN_FP8.name))
    for plain, eight in zip(slow, fast, strict=True):
        published = eight.tokens_per_s / plain.tokens_per_s
        assert eight.predicted() / plain.predicted() == pytest.approx(published, abs=0.01)


@pytest.mark.parametrize("constant", ["H100", "A100", "TOKENS", "CONTENTION", "eager", "compiled"])
def test_the_fit_is_one(constant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another value of any constant that was fitted makes the fitted rows no better."""

    def miss(factor: float) -> float:
        with monkeypatch.context() as patch:
            gpus = {"H100": "h100", "A100": "a100"}
            if constant in ("TOKENS", "CONTENTION"):
                patch.setattr(model, constant, getattr(model, constant) * factor)
            elif constant not in gpus:
                patch.setitem(model.PASSES, constant == "compiled", model.PASSES[constant == "compiled"] * factor)
            wanted = gpus.get(constant, "none")
            rows = [row for row in ROWS if row.fitted]
            rows = [
                replace(row, gpu=replace(row.gpu, held=row.gpu.held * (factor if wanted in row.gpu.name else 1)))
                for row in rows
            ]
            return sum(row.error**2 for row in rows)

    assert miss(1.0) < min(miss(0.9), miss(1.1))


def test_the_page_has_what_the_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/scale.md").read_text("utf-8")
    for part in (compared(ROWS), summary(ROWS), *(predicted(read(name, [])) for name in CONFIGS)):
        assert "\n".join(part) in page
