"""Ranks that hang or are lost: noticed by a thread on every rank, named in one line, and the job ended.

Ranks exchange beats (beats.py) through a store that rank 0 hosts for this alone: each sets one key and reads one a
beat, rank 0 reads all keys and writes its verdict. A hang ends with the stacks of all ranks in runs/NAME/stacks. The
main thread of a rank that hangs cannot be reached, so the thread ends the process, with exit code 75: try again.
"""

import os
import platform
import re
import resource
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from types import TracebackType
from typing import NoReturn, Self

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from cairn.cluster import Cluster
from cairn.config.train import GuardSection
from cairn.errors import QuietError, TryAgain, UserError, exit_status
from cairn.train.beats import Beat, Judge, Silent, Verdict, ended, hung
from cairn.train.folder import RunFolder
from cairn.train.stacks import SIGNAL, StackFile, main_thread, runs, show

INTERVAL_S = 2.0
"""Seconds between two beats; a thirtieth of guard.lost_seconds where that is less."""
VERDICT = "verdict"
COLLECTIVE = "gloo|nccl|connection|socket|broken pipe|timed out|timeout"
"""What errors of collectives speak of."""


@dataclass(frozen=True)
class Mark:
    """A change of phase; the thread tells one from the next by identity."""

    phase: str
    step: int
    count: int


class Watchdog:
    """A context manager; enter it on every rank or none, after the run folder is made.

    Leaving it in good order waits until every rank has left, so that rank 0, which hosts the store, is the last. A
    process that is stopped (SIGSTOP) counts as lost. One that holds the interpreter's lock for long gives no sign of
    life either, but counts as running as long as another rank of its host sees it run.
    """

    def __init__(self, cluster: Cluster, folder: RunFolder, section: GuardSection) -> None:
        self._cluster, self._folder = cluster, folder.path / "stacks"
        self._lost, self._hang = section.lost_seconds, 60.0 * section.hang_minutes
        self._interval = min(INTERVAL_S, self._lost / 30)
        self._judge = Judge(cluster.world_size, self._interval, self._lost, self._hang, self._folder)
        self._mark = self._timed = Mark("start", 0, 0)
        self._beat = Beat(cluster.rank, platform.node(), os.getpid())
        self._at = ("", False)
        """Where the main thread was when the stacks were written, and whether it waited for others."""
        self._farewell: tuple[int | None, str] = (None, "")
        """Exit code and error."""
        self._said = Verdict(main=self._beat)
        self._answers = 0
        self._broken = False
        self._over, self._wake = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._store: TCPStore | None = None
        self._stacks: StackFile | None = None

    def phase(self, name: str, step: int) -> None:
        """Say what begins now: one of beats.PHASES, in which step. The same again starts its clock anew. Under 1 us."""
        self._mark = Mark(name, step, self._mark.count + 1)

    def explain(self, error: BaseException) -> UserError | None:
        """Who is to blame for an error of a collective, or None if no rank is missing; waits a few beats to see.

        TryAgain names a rank that was lost; a rank that left with a UserError of its own makes it a QuietError.
        """
        if not re.search(COLLECTIVE, str(error), re.I):
            return None
        deadline = time.monotonic() + 5 * self._interval + 2
        while self._store is not None and time.monotonic() < deadline:
            said, broken = self._said, self._broken
            for missing in (m for m in said.missing if m.beat.rank != self._cluster.rank):
                if missing.beat.left is not None:
                    text, code = ended(missing.beat)
                    return TryAgain(text) if code == os.EX_TEMPFAIL else QuietError(text)
                if not missing.runs:
                    return TryAgain(missing.lost(missing.seconds))
            if broken:
                return TryAgain(Silent(said.main, self._interval).lost(self._interval))
            time.sleep(self._interval / 4)
        return None

    def __enter__(self) -> Self:
        if self._cluster.world_size > 1:
            self._connect()
        if self._hang:
            try:
                self._stacks = StackFile(self._folder, self._cluster.rank, self._beat.name)
            except OSError as error:
                print(f"warning: no stacks of a rank that hangs: {error}", file=sys.stderr)
        self._threads = [threading.Thread(target=self._beats, name="watchdog", daemon=True)]
        if not self._cluster.is_main:
            self._threads.append(threading.Thread(target=self._watch_main, name="watchdog-main", daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.phase("end", self._mark.step)
        self._farewell = (exit_status(error), str(error) if isinstance(error, UserError) else "")
        self._wake.set()
        if self._store is not None and self._cluster.is_main:
            # Others learn from the store why this rank leaves; after an error they may be too stuck to come.
            deadline = time.monotonic() + 3 * self._interval
            beating = self._threads[0].is_alive  # if its store fails it ends, and nobody is heard of any more
            while beating() and (
                self._judge.present if kind is None else self._judge.heard and time.monotonic() < deadline
            ):
                self._wake.set()  # look at once, not at the next beat: a run's end should not wait for that
                time.sleep(self._interval / 20)
        self._over.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(3 * self._interval)  # one that waits for a store which does not answer is left behind
        if self._stacks is not None:
            self._stacks.close()
        self._store = None

    def _connect(self) -> None:
        """Make the store at rank 0, and have every rank's first beat in it before anyone looks."""
        host, wait = self._cluster.master_addr, timedelta(seconds=max(60.0, self._lost))

        def serve() -> int:
            # a connection a rank, as the group's own store has
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if hard > soft < 1024 + 4 * self._cluster.world_size:
                resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1024 + 4 * self._cluster.world_size), hard))
            store = TCPStore(host, 0, is_master=True, timeout=wait, wait_for_workers=False)
            self._store = store
            return int(store.port)

        port = self._cluster.on_main(serve)
        if self._store is None:
            self._store = TCPStore(host, port, timeout=wait, wait_for_workers=False)
        if self._cluster.is_main:
            self._store.set(VERDICT, self._said.encode())
        self._store.set(str(self._cluster.rank), self._beat.encode())
        self._cluster.barrier()
        self._said = Verdict.decode(self._store.get(VERDICT))

    def _beats(self) -> None:
        """The thread: a beat, the verdict, and what it demands."""
        last = time.monotonic()
        while True:
            self._wake.wait(self._interval)
            self._wake.clear()
            over, now = self._over.is_set(), time.monotonic()
            self._beat = self._next(now - last)
            try:
                self._said = self._exchange(now - last)
            except dist.DistError:
                self._broken = True  # rank 0 is gone; the other thread, or the main one, says so
                return
            last = now
            self._answers += 1
            if over or (self._beat.left is not None and not self._cluster.is_main):
                return
            if self._said.main.left and not self._said.stop and not self._cluster.is_main:
                return  # rank 0 leaves with an error, and the store with it
            if self._said.dump and not self._at[0]:
                self._dump()
                for missing in self._said.missing:
                    if missing.seen_by == self._cluster.rank:
                        self._ask(missing.beat)
            if self._said.stop:
                self._stop(self._said)

    def _next(self, passed: float) -> Beat:
        """This rank's beat. Time it was suspended for is not in its phase."""
        mark, passed = self._mark, min(passed, 3 * self._interval)
        seconds = self._beat.seconds + passed if mark is self._timed else 0.0
        self._timed = mark
        silent = [m.beat for m in self._said.missing if m.beat.left is None and m.beat.rank != self._cluster.rank]
        return replace(
            self._beat,
            count=self._beat.count + 1,
            phase=mark.phase,
            step=mark.step,
            marks=mark.count,
            seconds=seconds,
            hangs=0 < self._hang < seconds,
            where=self._at[0],
            waits=self._at[1],
            left=self._farewell[0],
            why=self._farewell[1],
            runs=tuple(beat.rank for beat in silent if beat.host == self._beat.host and runs(beat.pid)),
        )

    def _exchange(self, passed: float) -> Verdict:
        """Publish the beat and learn the verdict; at rank 0, give it. Raises DistError when the store is gone."""
        if self._store is None:
            return self._judge.look([self._beat.encode().encode()], passed)
        self._store.set(str(self._cluster.rank), self._beat.encode())
        if not self._cluster.is_main:
            return Verdict.decode(self._store.get(VERDICT))
        beats = self._store.multi_get([str(rank) for rank in range(self._cluster.world_size)])
        verdict = self._judge.look(beats, passed)
        self._store.set(VERDICT, verdict.encode())
        return verdict

    def _stop(self, verdict: Verdict) -> NoReturn:
        """End this rank as the verdict says; rank 0 after the others have read it."""
        self._farewell = (verdict.code, verdict.stop)
        if self._cluster.is_main:
            for missing in verdict.missing if verdict.dump else ():
                show(self._folder / f".rank-{missing.beat.rank:05d}")
            self._tell(verdict.stop)
        with suppress(dist.DistError):  # rank 0 has not waited
            self._beat = self._next(0.0)
            self._exchange(0.0)
            deadline = time.monotonic() + 3 * self._interval
            while self._cluster.is_main and self._judge.heard and time.monotonic() < deadline:
                time.sleep(self._interval / 4)
                self._exchange(0.0)
        self._leave(verdict.code)

    def _dump(self) -> None:
        """Write the stacks, and tell so at once."""
        self._at = main_thread()
        beat = self._beat
        if self._stacks is not None:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            with suppress(OSError):  # a full disk: the message says where this rank is
                self._stacks.write(f"{beat.name}, {beat.seconds:.0f} s {beat.place}, {now}")
        self._wake.set()

    def _ask(self, beat: Beat) -> None:
        """Have a rank of this host whose Python cannot run write its stacks all the same."""
        with suppress(ProcessLookupError):
            os.kill(beat.pid, SIGNAL)

    def _watch_main(self) -> None:
        """The second thread, on other ranks than 0: is rank 0 there, and do its threads get their turn?"""
        answers, count, silence, frozen, last = 0, 0, 0.0, 0.0, time.monotonic()
        while not self._over.wait(self._interval):
            now = time.monotonic()
            passed, last = min(now - last, 3 * self._interval), now
            silence = 0.0 if self._answers != answers else silence + passed
            frozen = 0.0 if self._said.count != count else frozen + passed
            answers, count = self._answers, self._said.count
            if silence > self._lost:
                main = self._said.main
                text, code = ended(main) if main.left else (Silent(main, silence).lost(self._lost), os.EX_TEMPFAIL)
                self._tell(text)
                self._leave(code)
            if 0 < self._hang < frozen and not silence:  # the store answers, for which rank 0 needs no Python
                self._dump()
                if self._said.main.host == self._beat.host and self._cluster.local_rank == 1:
                    self._ask(self._said.main)
                show(self._folder / ".rank-00000")
                self._tell(hung(self._said.main, frozen, self._folder))
                self._leave(os.EX_TEMPFAIL)

    def _tell(self, message: str) -> None:
        # not print: the main thread may hang with stderr's lock
        os.write(2, f"\nerror: {message}\n".encode())

    def _leave(self, code: int) -> NoReturn:
        """End the process, of which only this thread can be relied on."""
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(1.0)
        os._exit(code)
