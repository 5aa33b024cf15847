"""Kernels for CPUs with AMX in C++, compiled with g++ where they are first used and called through ctypes.

Without AMX, or without a compiler, `obstacle` says so and everything runs on PyTorch's own operators.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

SOURCES = ("kernels.cpp", "adamw.h", "attention.h", "few.h", "gemm.h", "elementwise.h", "muon.h", "rows.h", "amx.h")
FLAGS = [  # -w: g++ 12 warns of its own headers
    *("-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-w", "-mavx2", "-mfma", "-mavx512f", "-mavx512bw"),
    *("-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
]
_wanted = True
NEEDS = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "amx_tile", "amx_bf16"}


class Rows(ctypes.Structure):
    """A tensor of four dimensions, the last of which is dense; null where there is none."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 3))

    @classmethod
    def of(cls, x: Tensor | None) -> "Rows":
        """Where x is, if anywhere."""
        real = None if isinstance(x, FakeTensor) else x
        return cls() if real is None else cls(real.data_ptr(), (ctypes.c_int64 * 3)(*real.stride()[:3]))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> bool:
    """Whether the kernels run here; where they were not yet compiled, they are now (seconds)."""
    return _wanted and obstacle() is None


def allow(wanted: bool) -> None:
    """Whether this process uses the kernels where it can: `engine.kernels`."""
    global _wanted
    _wanted = wanted


@cache
def obstacle() -> str | None:
    """Why the kernels cannot run here, or None; told once, at level INFO."""
    try:
        library()
    except (Unfit, OSError) as error:
        logging.getLogger("cairn").info("kernels for AMX are not used: %s", error)
        return str(error)
    return None


def fits(*tensors: Tensor | None) -> bool:
    """Whether these tensors are the kernels': bf16 on a CPU."""
    return all(x is None or (x.device.type == "cpu" and x.dtype == torch.bfloat16) for x in tensors)


def runs(*tensors: Tensor | None) -> bool:
    """Whether the kernels do, on tensors that are theirs."""
    return fits(*tensors) and available()


def usable(*tensors: Tensor | None) -> bool:
    """As `runs`, for a kernel that is no operator of PyTorch's: not where a model is compiled."""
    return not torch.compiler.is_compiling() and runs(*tensors)


def dense(x: Tensor) -> Tensor:
    """x, or a copy, whose last dimension is dense: all that kernels ask of a layout."""
    return x if x.stride(-1) == 1 else x.contiguous()


def call(name: str, *args: Tensor | ctypes.Structure | ctypes.Array[Any] | int | None) -> None:
    """Run a kernel, where they are `available`; nothing where memory is only planned, among tensors without any.

    Tensors are given by address, structures by reference, numbers as 64 bits, None as the null pointer.
    """
    if active_fake_mode() is None:
        getattr(library(), name)(*map(_argument, args))  # which keeps it; [name] would look it up again


def _argument(x: Tensor | ctypes.Structure | ctypes.Array[Any] | int | None) -> Any:
    match x:
        case None:
            return None
        case Tensor():
            return ctypes.c_void_p(x.data_ptr())
        case int():
            return ctypes.c_int64(x)
    return ctypes.byref(x)


class Unfit(Exception):
    """This machine cannot run the kernels."""


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels. Raises Unfit or OSError where they cannot be had."""
    lib = ctypes.CDLL(str(_compiled()))
    if not lib.cairn_request_tiles():
        raise Unfit("the operating system gives no tiles")
    return lib


def _compiled() -> Path:
    """The shared library of these sources, made unless an earlier process left it in the cache."""
    missing = NEEDS - cpu_flags()
    if missing:
        raise Unfit(f"this CPU has no {sorted(missing)[0]}")
    folder = Path(__file__).parent
    digest = hashlib.sha256("\0".join(FLAGS).encode())
    for name in SOURCES:
        digest.update((folder / name).read_bytes())
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cairn"
    target = cache_home / f"kernels-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    compiler = shutil.which("g++")
    if compiler is None:
        raise Unfit("there is no g++ to compile them with")
    cache_home.mkdir(parents=True, exist_ok=True)
    # Ranks may come here at once: each compiles, and the last rename wins over equal files.
    handle, made = tempfile.mkstemp(".so", dir=cache_home)
    os.close(handle)
    try:
        done = subprocess.run([compiler, *FLAGS, str(folder / SOURCES[0]), "-o", made], capture_output=True, text=True)
        if done.returncode:
            raise Unfit(f"g++ failed: {done.stderr.strip().splitlines()[0]}")
        os.replace(made, target)
    finally:
        Path(made).unlink(missing_ok=True)
    return target


def cpu_flags() -> set[str]:
    """What this CPU can do, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())
