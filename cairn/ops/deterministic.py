"""The same bits each time."""

import os

import torch


def use_deterministic_kernels() -> None:
    """For the whole process, before its first matrix product on a GPU; an operation that has none raises RuntimeError.

    Not with `warn_only`: flash and memory-efficient attention would then stay as they are, and only warn.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    torch.backends.cudnn.benchmark = False
