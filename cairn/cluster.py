"""Who am I among how many: rank, world size and device, read from torchrun's or SLURM's variables."""

import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar, cast

from cairn.errors import QuietError, UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Env = Mapping[str, str]
LAUNCHER = ("SLURM_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_")
"""How the variables of a launcher begin."""
OF_THE_JOB = ("SLURM_JOB_ID", "SLURM_JOB_END_TIME")


@dataclass(frozen=True)
class Cluster:
    """This process's place in the job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank among the processes of this node."""
    local_world_size: int = 1
    """Processes on this node."""
    master_addr: str = "127.0.0.1"
    master_port: int = 29500

    @classmethod
    def from_env(cls, env: Env = os.environ) -> "Cluster":
        """Torchrun's variables, else those of an srun step, else one process.

        Raises UserError naming the variable that is missing, malformed or contradicts another.
        """
        if "RANK" in env or "WORLD_SIZE" in env:
            return _checked(_from_torchrun(env), "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if _slurm_tasks(env) > 1:
            return _checked(_from_slurm(env), "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_TASKS_PER_NODE")
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that prints and writes."""
        return self.rank == 0

    @cached_property
    def device(self) -> "torch.device":
        """This rank's GPU, or the CPU where there is none. Raises UserError when ranks outnumber GPUs."""
        import torch

        if not torch.cuda.is_available():
            return torch.device("cpu")
        gpus = torch.cuda.device_count()
        # `srun --gpus-per-task=1` shows each task its own GPU as the only one, so one GPU fits any local rank.
        if 1 < gpus < self.local_world_size:
            raise UserError(f"rank {self.rank}: {self.local_world_size} processes on a node that has {gpus} GPUs")
        return torch.device("cuda", 0 if gpus == 1 else self.local_rank)

    def init(self, timeout: timedelta = timedelta(minutes=30)) -> ExitStack:
        """Join the process group and set the threads. Use as a function, or as a context that leaves the group.

        Collectives run on GPU tensors with nccl and on CPU tensors with gloo. One process alone needs no port.
        """
        import torch
        import torch.distributed as dist

        cuda = self.device.type == "cuda"
        # DeepSpeed reads these whoever started us, and takes LOCAL_RANK for the number of the GPU.
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.device.index if cuda else self.local_rank),
            LOCAL_WORLD_SIZE=str(self.local_world_size),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )
        if (threads := self.threads()) is not None:
            torch.set_num_threads(threads)
        stack = ExitStack()
        if dist.is_initialized():
            return stack  # whoever started it also ends it
        if cuda:
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "cuda:nccl,cpu:gloo" if cuda else "gloo",
            rank=self.rank,
            world_size=self.world_size,
            store=dist.HashStore() if self.world_size == 1 else None,  # type: ignore[attr-defined]
            timeout=timeout,
        )

        def leave(kind: object, *_: object) -> None:
            # After an error other ranks may wait in a collective, and leaving would wait for them.
            if kind is None or self.world_size == 1:
                dist.destroy_process_group()

        stack.push(leave)
        return stack

    def threads(self, env: Env = os.environ) -> int | None:
        """CPU threads for this rank: its share of the cores, or None where OMP_NUM_THREADS is the user's."""
        # torchrun sets OMP_NUM_THREADS=1 when it is unset and a node has several ranks: not the user's word.
        by_torchrun = self.local_world_size > 1 and "TORCHELASTIC_RUN_ID" in env and env.get("OMP_NUM_THREADS") == "1"
        if "OMP_NUM_THREADS" in env and not by_torchrun:
            return None
        if self.world_size > 1 and "SLURM_CPUS_PER_TASK" in env and "TORCHELASTIC_RUN_ID" not in env:
            return _integer(env, "SLURM_CPUS_PER_TASK", minimum=1)
        return max(1, len(os.sched_getaffinity(0)) // self.local_world_size)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.barrier()

    def on_main(self, fn: Callable[[], T]) -> T:
        """COLLECTIVE: run `fn` on rank 0 alone and give its result to every rank; its UserError is raised on all."""
        if self.world_size == 1:
            return fn()
        import torch.distributed as dist

        # A group of its own: preparing a corpus may outlast the timeout of the others.
        group = dist.new_group(backend="gloo", timeout=timedelta(days=2))
        error: UserError | None = None
        said: list[object] = [None, None]
        if self.is_main:
            try:
                said = [fn(), None]
            except UserError as caught:
                error, said = caught, [None, str(caught)]
        dist.broadcast_object_list(said, src=0, group=group)
        dist.destroy_process_group(group)
        if error is not None:
            raise error
        if said[1] is not None:
            raise QuietError(str(said[1]))
        return cast(T, said[0])

    def on_all(self, fn: Callable[[], T]) -> T:
        """COLLECTIVE: run `fn`, itself not collective, on every rank. A UserError of one is raised on all of them, so
        that none waits for it, and to be told once: by the first rank it befell."""
        if self.world_size == 1:
            return fn()
        import torch.distributed as dist

        error: UserError | None = None
        try:
            result = fn()
        except UserError as caught:
            error = caught
        said: list[str | None] = [None] * self.world_size
        dist.all_gather_object(said, None if error is None else str(error))
        failed = [rank for rank, text in enumerate(said) if text is not None]
        if not failed:
            return result
        if error is not None and failed[0] == self.rank:
            raise error
        raise QuietError(str(said[failed[0]]))


def job_id(env: Env = os.environ) -> str | None:
    """The scheduler's id of the job this process is in; a job that is requeued keeps it."""
    return env.get("SLURM_JOB_ID") or None


def job_ends(env: Env = os.environ) -> float | None:
    """When the scheduler ends the job this process is in, in seconds since the epoch; None where it does not say."""
    text = env.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdecimal() else None


def launchers(env: Env = os.environ) -> Cluster:
    """The launchers of an srun step, one a node, as a cluster of their own; one alone outside of such a step.

    Raises UserError where a node has several: a launcher starts all ranks of its node.
    """
    if _slurm_tasks(env) == 1:
        return Cluster()
    place = Cluster.from_env({key: value for key, value in env.items() if key.startswith(("SLURM_", "MASTER_"))})
    if place.local_world_size > 1:
        raise UserError(
            f"this srun step has {place.local_world_size} launchers on one node, and one is enough: "
            "give srun --ntasks-per-node=1"
        )
    return place


def environment(place: Cluster, env: Env = os.environ) -> dict[str, str]:
    """What to start a rank with: `env` with the variables that torchrun would set for it, without those of any launcher
    that started us, except what says of the whole job."""
    own = {key: value for key, value in env.items() if not key.startswith(LAUNCHER) or key in OF_THE_JOB}
    if place.world_size == 1:
        return own
    numbers = {
        "RANK": place.rank,
        "LOCAL_RANK": place.local_rank,
        "WORLD_SIZE": place.world_size,
        "LOCAL_WORLD_SIZE": place.local_world_size,
        "MASTER_PORT": place.master_port,
    }
    return own | {key: str(value) for key, value in numbers.items()} | {"MASTER_ADDR": place.master_addr}


def share_of_cores(ranks: int, env: Env = os.environ) -> int:
    """CPU threads for each of `ranks` that a launcher starts here: its share of the cores we may run on, and of those
    that srun gave us by --cpus-per-task, as not every SLURM binds a task to its cores."""
    cores = len(os.sched_getaffinity(0))
    if _slurm_tasks(env) > 1 and "SLURM_CPUS_PER_TASK" in env:
        cores = min(cores, _integer(env, "SLURM_CPUS_PER_TASK", minimum=1))
    return max(1, cores // ranks)


def _from_torchrun(env: Env) -> Cluster:
    rank, world = _integer(env, "RANK"), _integer(env, "WORLD_SIZE", minimum=1)
    tasks = _slurm_tasks(env)
    if world < tasks and "TORCHELASTIC_RUN_ID" not in env:
        raise UserError(f"WORLD_SIZE is {world}, but this srun step has {tasks} tasks: unset RANK and WORLD_SIZE")
    if world == 1:
        return Cluster(rank=rank)
    addr, port = _text(env, "MASTER_ADDR"), _integer(env, "MASTER_PORT", minimum=1)
    local_world = world
    if "LOCAL_WORLD_SIZE" in env or addr not in ("localhost", "127.0.0.1"):
        local_world = _integer(env, "LOCAL_WORLD_SIZE", minimum=1)
    return Cluster(rank, world, _integer(env, "LOCAL_RANK"), local_world, addr, port)


def _slurm_tasks(env: Env) -> int:
    """Tasks of the srun step this process is one of; 1 in an sbatch script or an salloc shell, whose SLURM_NTASKS
    only says what the allocation has room for."""
    if "SLURM_PROCID" not in env:
        return 1
    if "SLURM_STEP_NUM_TASKS" in env:
        return _integer(env, "SLURM_STEP_NUM_TASKS", minimum=1)
    if env.get("ENVIRONMENT") == "BATCH" or "SLURM_NTASKS" not in env:
        return 1
    return _integer(env, "SLURM_NTASKS", minimum=1)


def _from_slurm(env: Env) -> Cluster:
    world = _slurm_tasks(env)
    addr = env.get("MASTER_ADDR", "127.0.0.1")
    nodes = next((k for k in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") if k in env), None)
    if "MASTER_ADDR" not in env and nodes:
        addr = first_host(env[nodes], nodes)
    if "MASTER_PORT" in env:
        port = _integer(env, "MASTER_PORT", minimum=1)
    else:
        # The same on all ranks, and different for two jobs or steps that share a node.
        job, step = _integer(env, "SLURM_JOB_ID", default=0), _integer(env, "SLURM_STEP_ID", default=0)
        port = 15000 + (job + step) % 10000
    return Cluster(_integer(env, "SLURM_PROCID"), world, _integer(env, "SLURM_LOCALID"), _per_node(env), addr, port)


def _per_node(env: Env) -> int:
    """Tasks on this node: SLURM writes `4(x2),3` for nodes of 4, 4 and 3."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    if name not in env:
        return _integer(env, "SLURM_NTASKS_PER_NODE", minimum=1, default=_slurm_tasks(env))
    counts: list[int] = []
    for part in env[name].split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise UserError(f"{name} is {env[name]!r}: expected counts such as 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _integer(env, "SLURM_NODEID", default=0)
    if node >= len(counts):
        raise UserError(f"SLURM_NODEID is {node}, but {name} {env[name]!r} has {len(counts)} nodes")
    return counts[node]


def first_host(nodes: str, name: str = "SLURM_STEP_NODELIST") -> str:
    """First host of a SLURM node list: `gpu[003-010,12],login1` gives `gpu003`. `name`: the variable, for the error."""
    match = re.match(r"(?:[^\[\],]|\[[^\[\]]*\])+(?=,|$)", nodes)
    host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0]) if match else ""
    if not re.fullmatch(r"[\w.-]+", host):
        raise UserError(f"{name} is {nodes!r}: expected hosts such as gpu[003-010,12]")
    return host


def _checked(c: Cluster, rank: str, world: str, local_rank: str, local_world: str) -> Cluster:
    """Raise UserError where two numbers contradict each other; the strings are the names of their variables."""
    for inner, size, inner_name, size_name in (
        (c.rank, c.world_size, rank, world),
        (c.local_rank, c.local_world_size, local_rank, local_world),
    ):
        if inner >= size:
            raise UserError(f"{inner_name} is {inner}, but {size_name} is {size}: it must be below")
    if c.local_world_size > c.world_size:
        raise UserError(f"{local_world} is {c.local_world_size}, but {world} is {c.world_size}")
    if c.master_port > 65535:
        raise UserError(f"MASTER_PORT is {c.master_port}: expected at most 65535")
    return c


def _text(env: Env, name: str) -> str:
    if not env.get(name):
        raise UserError(f"{name} is not set, and WORLD_SIZE is {env['WORLD_SIZE']}: start with torchrun or srun")
    return env[name]


def _integer(env: Env, name: str, minimum: int = 0, default: int | None = None) -> int:
    if name not in env:
        if default is None:
            raise UserError(f"{name} is not set beside the launcher's other variables: start with torchrun or srun")
        return default
    if not re.fullmatch(r"\d+", env[name]) or int(env[name]) < minimum:
        raise UserError(f"{name} is {env[name]!r}: expected an integer of at least {minimum}")
    return int(env[name])
