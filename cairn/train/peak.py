"""The machine's own ceiling: what MFU is measured against."""

import time

import torch

PROBE = 256


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product, the best of a few: 8192 wide on a GPU, 2048 on a CPU, there less where one
    would take longer than 4 * seconds, as in a precision that the CPU emulates."""
    n = 8192 if device.type == "cuda" else 2048
    if device.type == "cpu":
        probed = _product_seconds(PROBE, device, dtype, seconds / 10)
        while n > PROBE and probed * (n / PROBE) ** 3 > 4 * seconds:
            n //= 2
    return 2 * n**3 / _product_seconds(n, device, dtype, seconds)


def _product_seconds(n: int, device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """The least that a product of two n x n matrices takes, of those that are begun within `seconds`."""
    a, b = (torch.empty(n, n, device=device, dtype=dtype).uniform_(-1, 1) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
