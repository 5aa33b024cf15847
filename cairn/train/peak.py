"""The machine's own ceiling: what MFU is measured against."""

import time

import torch


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product, the best of a few: 2048 wide on a CPU, 8192 on a GPU."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.empty(n, n, device=device, dtype=dtype).uniform_(-1, 1) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
