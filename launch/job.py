"""What is to be started: one command, on so many ranks of each node."""

from dataclasses import dataclass
from pathlib import Path

# glibc gives large tensors back to the kernel and faults them in again each step, in pages of 4 KiB where it could have
# 2 MiB; read before a process starts.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@dataclass(frozen=True)
class Job:
    """`python -m module args` on `ranks` processes of every node."""

    module: str
    args: tuple[str, ...]
    folder: Path
    """The run folder; what ranks print goes to its `logs/`."""
    ranks: int = 1
    """Processes on this node."""
    restarts: int = 0
    """How often the ranks are started again after one has failed."""
