"""Stopping in good order: SIGINT, SIGTERM (schedulers, torchrun) and SIGUSR1 (SLURM's early warning)."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Self

from cairn.cluster import Cluster
from cairn.errors import QuietError, UserError

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """Ends an evaluation early once all ranks have agreed to stop."""


class StopSignal:
    """A context manager that turns these signals into a request that all ranks see at the same step.

    A second Ctrl-C raises KeyboardInterrupt at once. Enter it on the main thread, and on every rank or none.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.name: str | None = None
        """The signal that stops the run; on other ranks than those it reached, "a signal on another rank"."""
        self._cluster = cluster
        self._group: dist.ProcessGroup | None = None
        self._flags: Tensor
        """Being reduced: whether there was a signal, and world size - rank of the lowest rank in trouble."""
        self._pending: dist.Work | None = None
        self._trouble: UserError | None = None

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pending is not None and kind is None:  # every rank launched it, so it ends
            self._pending.wait()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if self._cluster.is_main:  # not print, which may be what was interrupted
            with suppress(OSError):  # nobody reads it: the same Ctrl-C has ended `2>&1 | tee`
                os.write(2, f"\n{self.name}: stopping after this step or batch (a second Ctrl-C: at once)\n".encode())

    def agreed(self, trouble: UserError | None = None) -> bool:
        """Whether to stop now; call once a step on every rank. True on all ranks at the same call.

        The all-reduce launched at one call is read at the next, so no step waits for it: a signal stops the run one
        or two steps later. So does `trouble`, what has gone wrong on this rank alone (a disk is full): where any rank
        has some, every rank raises at the same call, the lowest such rank its UserError and the others QuietError.
        A trouble that comes after the last call of a run is for `Cluster.on_all`.
        """
        rank, world_size = self._cluster.rank, self._cluster.world_size
        if world_size == 1:
            if trouble is not None:
                raise trouble
            return self.name is not None
        import torch
        import torch.distributed as dist

        if self._group is None:
            self._group = dist.new_group(backend="gloo")  # the flags live on the CPU, whatever the device
        stop = False
        if self._pending is not None:
            self._pending.wait()
            stopped, teller = self._flags.tolist()
            if teller:
                self._pending = None
                if self._trouble is not None and teller == world_size - rank:
                    raise self._trouble
                raise QuietError(f"rank {world_size - teller} cannot go on")
            stop = bool(stopped)
            if stop and self.name is None:
                self.name = "a signal on another rank"
        self._trouble = trouble = None if isinstance(trouble, QuietError) else trouble  # another rank tells that one
        mine = [int(self.name is not None), 0 if trouble is None else world_size - rank]
        self._flags = torch.tensor(mine, dtype=torch.int32)
        self._pending = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return stop


def leave_at_signal(cluster: Cluster) -> None:
    """From here on SIGTERM and SIGUSR1 end this process at once, with exit status 0 and a line from the main rank.

    For the time before the loop, when there is nothing to save, or after it: preparing the corpus and loading what has
    been saved go on where they were after any kill. A StopSignal takes over within. Ctrl-C stays as it is.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        with suppress(RuntimeError, OSError):  # it may be what was interrupted
            sys.stdout.flush()
        if cluster.is_main:
            with suppress(OSError):
                os.write(2, f"stopped by {signal.Signals(number).name}: the same command goes on\n".encode())
        os._exit(0)  # an exception might be raised, and lost, in some library's import

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, leave)
