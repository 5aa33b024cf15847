"""Stopping in good order: SIGINT, SIGTERM (schedulers, torchrun) and SIGUSR1 (SLURM's early warning)."""

import os
import signal
from types import FrameType, TracebackType
from typing import Self

import torch
import torch.distributed as dist

from cairn.cluster import Cluster

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """A context manager that turns these signals into a request that all ranks see at the same step.

    A second Ctrl-C raises KeyboardInterrupt at once. Enter it on the main thread, and on every rank or none.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.name: str | None = None
        """The signal that stops the run; on other ranks than those it reached, "a signal on another rank"."""
        self._cluster = cluster
        self._group: dist.ProcessGroup | None = None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None

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
            os.write(2, f"\n{self.name}: stopping after this step or evaluation (a second Ctrl-C: at once)\n".encode())

    def agreed(self) -> bool:
        """Whether to stop now; call once a step on every rank. True on all ranks at the same call.

        The all-reduce launched at one call is read at the next, so no step waits for it: a signal stops the run one
        or two steps later.
        """
        if self._cluster.world_size == 1:
            return self.name is not None
        if self._group is None:
            self._group = dist.new_group(backend="gloo")  # the flag lives on the CPU, whatever the device
        stop = False
        if self._pending is not None:
            self._pending.wait()
            stop = bool(self._flag.item())
            if stop and self.name is None:
                self.name = "a signal on another rank"
        self._flag = torch.tensor([self.name is not None], dtype=torch.int32)
        self._pending = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return stop
