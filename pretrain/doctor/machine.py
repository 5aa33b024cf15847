"""Checks of the machine: packages, GPUs, compilers, network, limits. Each looks at one thing and changes nothing."""

import fcntl
import importlib
import importlib.util
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from cairn.cluster import Cluster
from cairn.config.schema import PretrainConfig
from cairn.config.train import EngineSection, OptimSection
from cairn.ops.precision import fast_bf16, settled
from pretrain.doctor.finding import Check, Finding, error, gib, ok, warning

INSTALL = "pip install -e . -c constraints.txt in cairn's folder"
TESTED_DEEPSPEED = "0.19.8"
"""What the engine was tested with: it relies on how DeepSpeed lays out its state."""
NO_GPU = "no GPU: not checked"
LOADED = ("transformers", "sentencepiece", "datasets", "tokenizers", "safetensors.torch", "pyarrow.parquet")
FEWEST_FILES, SMALLEST_SHM = 4096, 2**30
RENDEZVOUS_PORT = Cluster().master_port
DRIVER = Path("/proc/driver/nvidia/version")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def checks(config: PretrainConfig) -> list[Check]:
    """All of them, the quick ones first; some ask what a config would have them do."""
    return [
        ("Python", python),
        ("packages", lambda: packages("cairn")),
        ("torch", torch_build),
        ("GPUs", gpus),
        ("NCCL", nccl),
        ("compiler", lambda: compiler(config.engine.compile)),
        ("cores", cores),
        ("open files", open_files),
        ("/dev/shm", lambda: shared_memory(Path("/dev/shm"))),
        ("ports", lambda: ports(RENDEZVOUS_PORT)),
        ("host name", lambda: host_name(socket.gethostname())),
        ("file system", lambda: file_system(Path(config.run.dir))),
        ("kernels", kernels),
        ("attention", lambda: attention(config)),
        ("precision", lambda: precision(config.engine)),
        ("imports", lambda: imports(LOADED)),
        ("wandb", wandb),
        ("DeepSpeed", lambda: deepspeed(config.engine, config.optim)),
    ]


def python() -> Finding:
    """The interpreter."""
    found = f"{platform.python_version()} ({sys.executable})"
    return ok(found) if sys.version_info >= (3, 11) else error(found, "cairn needs Python 3.11 or newer")


def packages(name: str) -> Finding:
    """What an installed package's metadata asks for, by version."""
    try:
        requirements = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return warning(f"{name} itself is not installed, so what it needs is not known", INSTALL)
    wanted = [r for r in map(Requirement, requirements) if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = []
    for requirement in wanted:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, {requirement.specifier} is needed")
    return error("; ".join(wrong), INSTALL) if wrong else ok(f"all {len(wanted)} that cairn needs are there")


def torch_build() -> Finding:
    """Version, and whether the build fits the machine."""
    cuda, hip = torch.version.cuda, torch.version.hip
    build = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU only"
    found = f"{torch.__version__}, {build}"
    if DRIVER.exists() and not cuda:
        return warning(f"{found}, and this machine has an NVIDIA driver", "install a CUDA build of torch (pytorch.org)")
    return ok(found)


def gpus() -> Finding:
    """Which are visible, their memory, and that a kernel runs on each."""
    if not torch.cuda.is_available():
        if DRIVER.exists() and torch.version.cuda:
            driver = DRIVER.read_text().partition("\n")[0]
            return error(f"torch sees none, with a driver ({driver})", "see nvidia-smi and CUDA_VISIBLE_DEVICES")
        return ok(NO_GPU)
    said, busy = [], []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        said.append(f"{torch.cuda.get_device_name(i)} {gib(total)}")
        torch.ones(2, device=f"cuda:{i}").sum().item()  # a build without kernels for this GPU fails here
        if free < 0.9 * total:
            busy.append(f"GPU {i} has {gib(free)} free")
    found = f"{len(said)} visible: {', '.join(dict.fromkeys(said))}"
    if busy:
        return warning(f"{found}; {', '.join(busy)}", "another process holds memory there (nvidia-smi)")
    return ok(found)


def nccl() -> Finding:
    """Whether libnccl loads, and its version."""
    if not torch.cuda.is_available():
        return ok(NO_GPU)
    if not dist.is_nccl_available():
        return error("this build of torch has none", "install a CUDA build of torch from pytorch.org")
    return ok(".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]


def compiler(wanted: bool) -> Finding:
    """What torch.compile needs: a C++ compiler, for the launchers of GPU kernels too."""
    names = [name for name in (os.environ.get("CXX", ""), "g++", "clang++") if name]
    cxx = next((path for name in names if (path := shutil.which(name))), None)
    nvcc = shutil.which("nvcc") or "no nvcc (none is needed)"
    if cxx:
        return ok(f"{cxx}, {nvcc}")
    found, remedy = f"no C++ compiler ({', '.join(names)})", "engine.compile needs one: install g++ or set CXX"
    return error(found, remedy) if wanted else warning(found, remedy)


def cores() -> Finding:
    """Cores this process may use, of those there are; a container's quota is not seen by threads."""
    mine, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    found = f"{mine} of {there} may be used"
    quota = CPU_QUOTA.read_text().split() if CPU_QUOTA.exists() else ["max"]
    if quota[0] != "max" and (share := int(quota[0]) / int(quota[1])) < mine:
        remedy = f"set OMP_NUM_THREADS={max(1, int(share))}"
        return warning(f"{found}, and the container has time for {share:.1f}", remedy)
    if mine == 1 and there > 1:
        return warning(found, "with srun give --cpus-per-task, else see taskset")
    return ok(found)


def open_files() -> Finding:
    """The hard limit: the soft one is raised to it when a corpus is opened."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < FEWEST_FILES:
        return warning(f"at most {hard}", f"a corpus of many shards needs more: ulimit -Hn {FEWEST_FILES} or above")
    return ok("no limit" if hard == resource.RLIM_INFINITY else f"up to {hard:,}")


def shared_memory(path: Path) -> Finding:
    """Where NCCL moves data between the GPUs of a node."""
    if not path.is_dir():
        return warning("missing", "NCCL needs it between the GPUs of a node: mount a tmpfs there")
    free = shutil.disk_usage(path).free
    if free < SMALLEST_SHM:
        return warning(f"{gib(free)} free", "NCCL may fail: docker run --shm-size=16g, or remount it larger")
    return ok(f"{gib(free)} free")


def ports(port: int) -> Finding:
    """That ranks on this machine can meet."""
    _reach("127.0.0.1")
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError as failure:
            remedy = "another run may hold it: give this one MASTER_PORT (torchrun --master-port)"
            return warning(f"{port}, the usual rendezvous, is taken ({failure.strerror})", remedy)
    return ok(f"loopback answers, {port} is free")


def host_name(name: str) -> Finding:
    """Whether this machine finds itself by its name, as gloo and the ranks on other nodes look for it."""
    try:
        address = str(socket.getaddrinfo(name, None, socket.AF_UNSPEC, socket.SOCK_STREAM)[0][4][0])
    except OSError as failure:
        remedy = "gloo looks it up: add it to /etc/hosts, or set GLOO_SOCKET_IFNAME to the network interface"
        return warning(f"{name} does not resolve ({failure.strerror})", remedy)
    try:
        _reach(address)
    except OSError as failure:
        remedy = "correct its address in /etc/hosts or the firewall, or set GLOO_SOCKET_IFNAME"
        return warning(f"{name} is {address}, which does not answer here ({failure})", remedy)
    alone = " (loopback: for several nodes set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME)"
    return ok(f"{name} is {address}{alone if address.startswith('127.') or address == '::1' else ''}")


def _reach(address: str) -> None:
    """Connect to a port of one's own at an address of this machine. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as server, socket.socket(family) as client:
        server.bind((address, 0))
        server.listen()
        client.settimeout(5)
        client.connect(server.getsockname())


def file_system(run_dir: Path) -> Finding:
    """That the folder of runs can be written, locked, and renames whole folders."""
    folder = nearest(run_dir)
    try:
        with tempfile.TemporaryDirectory(prefix=".cairn-doctor-", dir=folder) as name:
            (Path(name) / "a").mkdir()
            (Path(name) / "a").rename(Path(name) / "b")
            with (Path(name) / "lock").open("w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as failure:
                    remedy = "two runs in one folder are then told apart by a sign of life, half a minute late"
                    return warning(f"{folder}: no file locks ({failure.strerror})", remedy)
    except OSError as failure:
        return error(f"{folder}: {failure.strerror}", "set run.dir to a folder that can be written")
    return ok(f"{folder} can be written, locked and renamed in")


def nearest(path: Path) -> Path:
    """The path, or the first above it that exists."""
    path = path.absolute()
    return next(above for above in (path, *path.parents) if above.exists())


def kernels() -> Finding:
    """Our own, where a CPU trains in bf16."""
    from cairn.ops import native

    if torch.cuda.is_available():
        return ok("PyTorch's, on GPUs")
    why = native.obstacle()
    if why is None:
        return ok("our own, for AMX")
    if native.cpu_flags() >= native.NEEDS:
        return warning(f"PyTorch's: {why}", "install g++: this CPU has AMX and trains faster with our own")
    return ok(f"PyTorch's: {why}")


def attention(config: PretrainConfig) -> Finding:
    """The kernel that `auto` takes here for the model's shape."""
    from cairn.ops.attention import choose
    from cairn.ops.masks import Mask
    from cairn.ops.precision import DTYPES

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, batch, length = config.model, config.train.micro_batch_size, config.seq_len
    if model.attention_backend != "auto":
        return ok(f"model.attention_backend is {model.attention_backend}")
    q = torch.empty(1, device=device, dtype=DTYPES[settled(config.engine, device.type).precision])
    q = q.expand(batch, model.n_head, length, model.head_dim)
    documents = torch.zeros(batch, length, dtype=torch.int64) if config.data.document_mask else None
    mask = Mask(model.objective == "causal", model.sliding_window, documents)
    bias = torch.empty(1) if model.position in ("t5", "alibi") else None
    name, reason = choose(q, q, mask, bias, model.attention_dropout)
    return ok(f"{name} on {device.type} ({reason}); model.attention_backend pins one")


def precision(engine: EngineSection) -> Finding:
    """Whether this machine is fast in the compute precision."""
    device_type = Cluster().device.type
    name = settled(engine, device_type).precision
    if name == "bf16" and not fast_bf16(device_type):
        remedy = "a new run with engine.precision=auto or fp32 is not"
        return warning("bf16, which is emulated here, up to a hundred times as slow as fp32", remedy)
    return ok(f"{name} on {device_type}; engine.precision pins one")


def imports(names: Sequence[str]) -> Finding:
    """That packages whose compiled parts may not fit this machine do load."""
    wrong = []
    for name in names:
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as failure:
            wrong.append(f"{name}: {str(failure).partition(chr(10))[0]}")
    return error("; ".join(wrong), INSTALL) if wrong else ok(", ".join(name.partition(".")[0] for name in names))


def wandb() -> Finding:
    """Whether track.wandb could be used."""
    from cairn.train.track import has_wandb_key

    if importlib.util.find_spec("wandb") is None:
        return error("not installed", INSTALL)
    return ok(f"{metadata.version('wandb')}, {'with' if has_wandb_key() else 'without'} an API key")


def deepspeed(engine: EngineSection, optim: OptimSection) -> Finding:
    """A step of a small model on this machine, and that DeepSpeed compiled nothing for it."""
    from cairn.train.engine_trial import trial_step

    version, engine = metadata.version("deepspeed"), settled(engine, Cluster().device.type)
    loss, built = trial_step(engine, optim, Cluster())
    found = f"{version}, ZeRO stage {engine.zero_stage} in {engine.precision} took a step (loss {loss:.2f})"
    if built:
        return warning(f"{found} and compiled {', '.join(built)}", "every start on a new machine waits for that")
    if version != TESTED_DEEPSPEED:
        tested = f"cairn was tested with {TESTED_DEEPSPEED}; if a run fails to start, install that"
        return warning(f"{found}, no op to build", tested)
    return ok(f"{found}, no op to build")
