"""Which precision this machine computes in fast."""

import torch

from cairn.config.train import EngineSection
from cairn.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def settled(engine: EngineSection, device_type: str) -> EngineSection:
    """The section with what `precision: auto` stands for here: bf16 where it is fast, else fp16 on a GPU and fp32 on a
    CPU. Raises UserError where 8-bit floats are asked for beside another than bf16."""
    if engine.precision == "auto":
        otherwise = "fp16" if device_type == "cuda" else "fp32"
        engine = engine.model_copy(update={"precision": "bf16" if fast_bf16(device_type) else otherwise})
    if engine.fp8 and engine.precision != "bf16":
        raise UserError(f"engine.fp8 needs engine.precision=bf16, and here it is {engine.precision}")
    return engine


def fast_bf16(device_type: str) -> bool:
    """Whether matrix products in bf16 are worth it: on any GPU that has them, and on CPUs with instructions for them.

    Others emulate bf16: an x86 without AVX-512 takes a hundred times as long as in fp32.
    """
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
