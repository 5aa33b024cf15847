"""Which low precision this machine computes in fast."""

import torch


def fast_bf16(device_type: str) -> bool:
    """Whether matrix products in bf16 are worth it: on any GPU that has them, and on CPUs with instructions for them.

    Others emulate bf16: an x86 without AVX-512 takes a hundred times as long as in fp32.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
