"""What a GPU can do, from its vendor's data sheet; and what this machine's CPU can, measured."""

import os
from dataclasses import dataclass, replace

from cairn.config.schema import PretrainConfig
from cairn.errors import UserError

GB = 1e9


@dataclass(frozen=True)
class Hardware:
    """One GPU, or one process on this machine's CPU. Rates in FLOP/s and bytes/s, one direction."""

    name: str
    peak: float
    """Dense matrix products in bf16 (v100: fp16) with fp32 sums."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Of its memory."""
    intra: float
    """To the other GPUs of its node."""
    inter: float
    """To other nodes: the network adapter that goes with it in the vendor's reference node."""
    held: float
    """Share of the peak that large products reach. H100 and A100, which needs less power for its peak: fitted
    (docs/scale.md); b200 and h200 as h100, the others between: assumed. CPU: of the product that is measured."""

    @property
    def device(self) -> str:
        """ "cpu" or "cuda": which kernels run there."""
        return "cpu" if self.name == "cpu" else "cuda"


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA DGX B200 data sheet: 36 PFLOP/s dense fp8 and half of it in bf16 on 8 GPUs, 1,440 GB, 64 TB/s;
        # NVLink 5 of 1.8 TB/s both ways; one 400 Gb/s ConnectX-7 a GPU.
        Hardware("b200", 2250e12, 180 * GB, 8000 * GB, 900 * GB, 50 * GB, 0.78),
        # NVIDIA H200 data sheet (SXM): 1,979 TFLOP/s bf16 with sparsity, 141 GB, 4.8 TB/s; NVLink 900 GB/s both ways.
        Hardware("h200", 989e12, 141 * GB, 4800 * GB, 450 * GB, 50 * GB, 0.78),
        # NVIDIA H100 data sheet (SXM): 1,979 TFLOP/s bf16 with sparsity, 80 GB, 3.35 TB/s; NVLink 900 GB/s both ways;
        # DGX H100 has one 400 Gb/s ConnectX-7 a GPU.
        Hardware("h100", 989e12, 80 * GB, 3350 * GB, 450 * GB, 50 * GB, 0.78),
        # NVIDIA A100 data sheet (SXM): 312 TFLOP/s bf16, 80 GB at 2,039 GB/s or 40 GB at 1,555 GB/s; NVLink 600 GB/s
        # both ways; DGX A100 has one 200 Gb/s ConnectX-6 a GPU.
        Hardware("a100-80", 312e12, 80 * GB, 2039 * GB, 300 * GB, 25 * GB, 0.98),
        Hardware("a100-40", 312e12, 40 * GB, 1555 * GB, 300 * GB, 25 * GB, 0.98),
        # NVIDIA L40S data sheet: 362 TFLOP/s bf16 dense, 48 GB, 864 GB/s; no NVLink: PCIe 4.0 x16, 64 GB/s both ways;
        # the network is shared: 200 Gb/s for two GPUs.
        Hardware("l40s", 362e12, 48 * GB, 864 * GB, 32 * GB, 12.5 * GB, 0.88),
        # NVIDIA Ada architecture paper: RTX 4090, 165 TFLOP/s bf16 dense with fp32 sums, 24 GB, 1,008 GB/s; PCIe 4.0
        # x16 without peer-to-peer, which about halves it; a node of four on 100 Gb/s.
        Hardware("rtx4090", 165e12, 24 * GB, 1008 * GB, 16 * GB, 3 * GB, 0.88),
        # NVIDIA V100 data sheet (SXM2 32 GB): 125 TFLOP/s fp16, 900 GB/s; NVLink 300 GB/s both ways; DGX-1 has four
        # 100 Gb/s adapters for eight GPUs. It has no bf16.
        Hardware("v100", 125e12, 32 * GB, 900 * GB, 150 * GB, 6.25 * GB, 0.88),
    )
}
FP32 = {"b200": 75e12, "h200": 67e12, "h100": 67e12, "a100-80": 19.5e12, "a100-40": 19.5e12}
FP32 |= {"l40s": 91.6e12, "rtx4090": 82.6e12, "v100": 15.7e12}
"""FLOP/s of engine.precision=fp32 (TF32 is not used), from the same data sheets."""

FP8 = ("b200", "h200", "h100", "l40s", "rtx4090")
"""Those with 8-bit floats."""


def settled_for(name: str, config: PretrainConfig) -> PretrainConfig:
    """The config with what `engine.precision: auto` stands for on that GPU, or on this machine's CPU."""
    from cairn.ops.precision import settled

    engine = config.engine
    if name in GPUS and engine.precision == "auto":
        engine = engine.model_copy(update={"precision": "fp16" if name == "v100" else "bf16"})
    return config.model_copy(update={"engine": settled(engine, "cpu")})


def hardware(name: str, precision: str, fp8: bool = False) -> Hardware:
    """The GPU of that name, or "cpu": this machine, measured for a third of a second by a process that has it alone.

    Raises UserError for a name that is not in the table, or a precision that the GPU lacks.
    """
    if name == "cpu":
        return _cpu(precision)
    if name not in GPUS:
        raise UserError(f"--gpu {name}: not in the table; choose from {', '.join([*GPUS, 'cpu'])}")
    gpu = GPUS[name]
    if name == "v100" and precision == "bf16":
        raise UserError("engine.precision=bf16 is not supported on v100: set engine.precision=fp16")
    if fp8 and name not in FP8:
        raise UserError(f"engine.fp8: {name} has no 8-bit floats; leave it out, or choose from {', '.join(FP8)}")
    if precision == "fp32":
        return replace(gpu, peak=FP32[name])
    return gpu


def here() -> str:
    """The name in the table of this machine's GPU, "cpu" where it has none. Raises UserError for one it lacks."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    told, size = torch.cuda.get_device_name().lower().replace(" ", ""), torch.cuda.get_device_properties(0).total_memory
    found = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in told]
    if not found:
        raise UserError(f"this machine's {told} is not in the table: give --gpu, one of {', '.join([*GPUS, 'cpu'])}")
    return min(found, key=lambda gpu: abs(gpu.memory - size)).name


def _cpu(precision: str) -> Hardware:
    import torch

    from cairn.cluster import Cluster
    from cairn.train.peak import matmul_peak

    if (threads := Cluster().threads()) is not None:  # those that one process here would train with
        torch.set_num_threads(threads)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    # A core's share of memory bandwidth and what gloo carries over loopback: 10 and 1 GB/s are of the right order. Of
    # the product, 0.8: with the update, 8 layers of 512 then take 2.5 s a step, as they did for docs/benchmarks.md.
    return Hardware("cpu", matmul_peak(torch.device("cpu"), dtype), memory, 10 * GB, GB, GB, 0.8)
