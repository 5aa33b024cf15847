"""Encoding units in several processes, with progress."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Protocol

from cairn.data.encode import Job, encode_unit
from cairn.data.manifest import UnitInfo
from cairn.errors import UserError

WORTH_A_POOL = 32 << 20  # bytes; processes take a second to start, which encodes several megabytes
SECONDS_A_LINE = 5.0


def say(line: str) -> None:
    """A line for the person who waits."""
    print(line, file=sys.stderr, flush=True)


def encode_all(jobs: Sequence[Job], workers: int | None) -> list[UnitInfo]:
    """Encode the units in `workers` processes (empty: one a core, one in all when there is little to do).

    Raises UserError as encode_unit does, or when a worker dies.
    """
    total = sum(job.size for job in jobs)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if total >= WORTH_A_POOL else 1
    workers = min(workers, len(jobs))
    with _progress(total) as advance:
        if workers <= 1:
            return [_encode_here(job, advance) for job in jobs]
        # spawn: a fork of a process that has torch's threads may hang
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
        try:
            # A worker inherits this mask, and is deaf to Ctrl-C until it can go without a traceback.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            futures: dict[Future[UnitInfo], Job] = {pool.submit(encode_unit, job): job for job in jobs}
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for future in as_completed(futures):
                future.result()
                advance(futures[future].size)
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise UserError(
                "data.workers: a process that prepares the corpus died, of too little memory perhaps; set data.workers "
                "lower and go on with the same command"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


class Advance(Protocol):
    """Tells progress of bytes done."""

    def __call__(self, size: int, /) -> None: ...


def _encode_here(job: Job, advance: Advance) -> UnitInfo:
    info = encode_unit(job)
    advance(job.size)
    return info


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: go at once, without a traceback
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """Go when the parent was killed; a worker would wait for its next unit for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _progress(total: int) -> Iterator[Advance]:
    """A bar on a terminal, else a line every few seconds."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (TextColumn("preparing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda size: bar.advance(task, size)
        return
    started = told = time.perf_counter()
    done = 0

    def advance(size: int) -> None:
        nonlocal told, done
        done += size
        now = time.perf_counter()
        if now - told > SECONDS_A_LINE:
            told = now
            say(f"prepared {done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {done / (now - started) / 1e6:.1f} MB/s")

    yield advance
