"""One run folder, one run: a lock that says who holds it.

The folder's `.lock` names the holder and is locked (flock) while its process lives: the kernel drops the lock after a
kill -9 too. Some file systems keep these locks to one node. So a thread touches the file every BEAT_S, and who would
take the folder over from a holder on another host watches for that sign of life first.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from cairn.cluster import job_id
from cairn.errors import UserError
from cairn.train.folder import disk_errors

FILE = ".lock"
BEAT_S = 3.0  # between two signs of life
ALIVE_S = 10.0  # since the last sign: lives
STALE_S = 30.0  # since the last sign: gone
OLD_S = 600.0  # older than this no clocks of two nodes differ: gone, and not worth watching
GRACE_S = 3.0  # for a killed process to be gone from this host
POLL_S = 0.25
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system without any


@dataclass(frozen=True)
class Holder:
    """Who holds a run folder."""

    host: str
    pid: int
    job: str | None
    """The scheduler's id of its job."""
    started: str

    @classmethod
    def here(cls) -> "Holder":
        """This process."""
        return cls(socket.gethostname(), os.getpid(), job_id(), time.strftime("%Y-%m-%d %H:%M:%S"))

    @classmethod
    def parse(cls, text: str) -> "Holder | None":
        """What `.lock` says; None when it says nothing, after a clean end, or is half written."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None

    def __str__(self) -> str:
        return f"pid {self.pid} on host {self.host} (since {self.started})"


class RunLock:
    """The lock of a run folder, for the main rank alone. A context manager: leaving it releases.

    Take it before anything else in the folder is touched; what only reads a run needs none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._left = threading.Event()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock, making the folder if there is none; nothing happens when it is held already.

        Waits GRACE_S for a holder on this host to go and about STALE_S for one on another, unless that one was of
        this very job, which the scheduler has requeued. Raises UserError naming host and pid of the holder, or when
        the folder cannot be written; nothing in the folder is touched then.
        """
        if self._descriptor is not None:
            return
        with disk_errors(f"run folder {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._await_turn(descriptor)
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(asdict(Holder.here())).encode(), 0)
            except BaseException:
                os.close(descriptor)
                raise
        self._descriptor = descriptor
        self._left.clear()
        self._thread = threading.Thread(target=self._beat, args=(descriptor,), name="run-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the folder free; nothing happens when it is not held."""
        if self._descriptor is None:
            return
        self._left.set()
        self._thread.join()
        descriptor, self._descriptor = self._descriptor, None
        with suppress(OSError):  # the folder has gone, or its disk: closing frees the lock all the same
            os.ftruncate(descriptor, 0)  # so that nobody on another host waits
        os.close(descriptor)

    def _beat(self, descriptor: int) -> None:
        while not self._left.wait(BEAT_S):
            try:
                os.utime(descriptor)
            except OSError:
                continue  # a file server that is away may come back

    def _await_turn(self, descriptor: int) -> None:
        """Return once the lock is ours; raise UserError when its holder lives."""
        begun = beaten = time.monotonic()
        last: float | None = None
        told = False
        while True:
            locked = _flock(descriptor)
            holder, modified = _read(self.path / FILE)
            now = time.monotonic()
            if last is not None and modified != last:
                beaten = now
            last, waited, quiet = modified, now - begun, now - beaten
            own_host = holder is not None and holder.host == socket.gethostname()
            free = holder is None or (holder.job is not None and holder.job == job_id()) or (own_host and bool(locked))
            if locked is not False and (free or quiet >= STALE_S or time.time() - modified > OLD_S):
                return
            if locked is False and (holder is None or own_host):
                if waited > GRACE_S:
                    raise self._refusal(holder)
            elif waited > STALE_S and (
                quiet < ALIVE_S or waited > 4 * STALE_S
            ):  # else a server keeps a dead one's lock
                raise self._refusal(holder)
            elif not told:
                told = True
                print(f"{self.path} was in use by {holder}: waiting {STALE_S:.0f} s for a sign of life", flush=True)
            time.sleep(POLL_S)

    def _refusal(self, holder: Holder | None) -> UserError:
        who = holder or "another process"
        return UserError(f"{self.path} is in use by {who}: wait for it, stop it, or choose another run.name")


def _flock(descriptor: int) -> bool | None:
    """Whether the lock is ours now; None where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def _read(path: Path) -> tuple[Holder | None, float]:
    """The holder, and when it last touched the file (s); opened anew, as only then an NFS client asks the server."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return Holder.parse(file.read()), os.fstat(file.fileno()).st_mtime
