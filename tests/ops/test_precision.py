"""Which precision `auto` stands for."""

import time

import pytest
import torch

from cairn.config.train import EngineSection
from cairn.ops import precision
from cairn.ops.precision import fast_bf16, settled


def test_auto_is_bf16_where_that_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    def auto(fast: bool, device_type: str) -> str:
        monkeypatch.setattr(precision, "fast_bf16", lambda _: fast)
        return settled(EngineSection(zero_stage=2), device_type).precision

    assert [auto(True, "cpu"), auto(True, "cuda")] == ["bf16", "bf16"]
    assert [auto(False, "cpu"), auto(False, "cuda")] == ["fp32", "fp16"]


def test_a_given_precision_stays() -> None:
    for name in ("bf16", "fp16", "fp32"):
        section = EngineSection(precision=name, zero_stage=3)
        assert settled(section, "cpu") == section
    assert settled(EngineSection(zero_stage=3), "cpu").zero_stage == 3


def test_fast_is_what_takes_no_longer() -> None:
    """Emulated, it takes a hundred times as long as in fp32; with instructions for it, less."""

    def seconds(dtype: torch.dtype) -> float:
        a, best = torch.ones(256, 256, dtype=dtype), float("inf")
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(a, a)
            best = min(best, time.perf_counter() - start)
        return best

    assert fast_bf16("cpu") == (seconds(torch.bfloat16) < 10 * seconds(torch.float32))
