"""The processes of one attempt on this node: started, signalled, ended, none left behind."""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from cairn.cluster import Cluster, environment, share_of_cores
from launch.failure import Failure, last_words
from launch.job import ALLOCATOR, Job
from launch.logs import Output

PR_SET_PDEATHSIG = 1
DRAIN_S = 2.0  # that what ranks have printed may take to be written, once all have ended
ALLOCATORS_OF_GPUS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class Rank:
    """One process."""

    def __init__(self, process: subprocess.Popen[bytes], place: Cluster) -> None:
        self.place = place
        self.pid = process.pid
        self.status: int | None = None
        """As of Popen: minus the signal that killed it; None while it runs."""
        self.seconds = 0.0
        """When it ended, since the attempt began."""
        self._process = process

    def poll(self) -> bool:
        """Whether it has just ended. It stays a zombie until `close`, so that its number is nobody else's."""
        if self.status is not None:
            return False
        found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return False
        self.status = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        return True

    def signal(self, number: int, group: bool = False) -> None:
        """To the process, or to all of its process group."""
        with suppress(ProcessLookupError, PermissionError):
            (os.killpg if group else os.kill)(self.pid, number)

    def close(self) -> None:
        """End what it has left behind, and let its number go."""
        self.signal(signal.SIGKILL, group=True)
        if self.status is not None:  # else it is stuck in the kernel, and waiting would not end
            self._process.wait()


class Ranks:
    """This node's ranks in one attempt. Use from the thread that lives as long as the launcher: they die with it."""

    def __init__(self, job: Job, first: Cluster, attempt: int, host: str) -> None:
        """first: the place of the first of them, with their number and the address of rank 0."""
        self._begin = time.monotonic()
        self._host = host
        self._output = Output(job.folder / "logs", host)
        self._killed = False
        self._asked: set[int] = set()
        """Signals that were passed on."""
        self._ranks: list[Rank] = []
        self._failed: list[Rank] = []
        command = [sys.executable, "-m", job.module, *job.args]
        now = datetime.now().astimezone()
        header = f"{now:%Y-%m-%d %H:%M:%S%z} attempt {attempt}: {shlex.join(command)}".replace("\n", "\\n")
        try:
            for local in range(first.local_world_size):
                place = Cluster(
                    rank=first.rank + local,
                    world_size=first.world_size,
                    local_rank=local,
                    local_world_size=first.local_world_size,
                    master_addr=first.master_addr,
                    master_port=first.master_port,
                )
                self._ranks.append(self._start(command, place, header))
        except OSError:
            self.kill()
            raise
        finally:
            self._output.start()

    def _start(self, command: list[str], place: Cluster, header: str) -> Rank:
        output = self._output.open(place.rank, header)
        try:
            process = subprocess.Popen(
                command,
                env=variables(place),
                stdin=subprocess.DEVNULL,
                stdout=output.stdout.target,
                stderr=output.stderr.target,
                process_group=0,  # not a session: SLURM without cgroups would not find it
                preexec_fn=_die_with(os.getpid()) if sys.platform == "linux" else None,
            )
        finally:
            output.release()
        return Rank(process, place)

    def poll(self) -> bool:
        """Whether one has failed since the last call, those excepted that we have killed."""
        ended = [rank for rank in self._ranks if rank.poll()]
        for rank in ended:
            rank.seconds = time.monotonic() - self._begin
        failed = [rank for rank in ended if rank.status and not self._killed]
        self._failed += failed
        return bool(failed)

    @property
    def running(self) -> bool:
        """Whether one still runs."""
        return any(rank.status is None for rank in self._ranks)

    def resize(self) -> None:
        """Our terminal has another size."""
        self._output.resize()

    def forward(self, number: int) -> None:
        """Pass a signal on to every rank that runs."""
        self._asked.add(number)
        for rank in self._ranks:
            if rank.status is None:
                rank.signal(number)

    def kill(self) -> None:
        """SIGKILL to every rank that runs and what it has started: one waiting in a collective hears nothing else."""
        self.poll()
        self._killed = True
        for rank in self._ranks:
            if rank.status is None:
                rank.signal(signal.SIGKILL, group=True)

    def close(self) -> list[Failure]:
        """After the last has ended: end what they left behind, write out what they said; the failures."""
        for rank in self._ranks:
            rank.close()
        self._output.finish(DRAIN_S)
        return [
            Failure(
                host=self._host,
                status=rank.status or 0,
                seconds=rank.seconds,
                rank=rank.place.rank,
                pid=rank.pid,
                lines=last_words(self._output.tail(rank.place.rank)),
                asked=-(rank.status or 0) in self._asked,
            )
            for rank in self._failed
        ]


def variables(place: Cluster) -> dict[str, str]:
    """The environment of a rank: ours with its place, its share of the cores, and caches of its own for compilers, as
    several that write one cache wait for each other or read half a file. What the user has set stays."""
    own = {"OMP_NUM_THREADS": str(share_of_cores(place.local_world_size)), **ALLOCATOR}
    if not any(name in os.environ for name in ALLOCATORS_OF_GPUS):
        own["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cairn"
    for name, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        path = cache / folder / str(place.local_rank)
        with suppress(OSError):  # no home to write to: they find a place themselves
            path.mkdir(parents=True, exist_ok=True)
            own[name] = str(path)
    return own | environment(place)


def _die_with(launcher: int) -> Callable[[], None]:
    """What a child does before it becomes a rank: ask the kernel to end it with the launcher, kill -9 included."""
    prctl = ctypes.CDLL(None).prctl  # looked up here: between fork and exec little is safe

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:  # it has gone already
            os.kill(os.getpid(), signal.SIGKILL)

    return ask
