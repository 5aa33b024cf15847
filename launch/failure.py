"""A rank that failed: which of several is the cause of the others, and how it is told."""

import os
import signal
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

FINAL = (2, 130)
"""Exit statuses at which nothing is tried again: a mistake of the user, and Ctrl-C."""
MOST = 20  # lines of a rank's stderr that are shown
WIDEST = 1000  # characters of each
HINTS = {
    signal.SIGKILL: "out of memory? `dmesg` says so, and so does the scheduler",
    signal.SIGBUS: "was a data file cut short while it was read, or is /dev/shm full?",
    signal.SIGSEGV: "a fault in compiled code; PYTHONFAULTHANDLER=1 shows where",
}
KNOCK_ON = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "DistBackendError",
    "DistNetworkError",
    "DistStoreError",
    "recvValue failed",
    "sendBytes failed",
    "NCCL communicator was aborted",
    "ncclRemoteError",
    "ncclSystemError",
)
"""What a rank says when another one has gone."""


@dataclass(frozen=True)
class Failure:
    """How one rank ended, or (rank None) that a node was lost."""

    host: str
    status: int
    """Exit status, or minus the number of the signal that killed it."""
    seconds: float
    """Since the attempt began on its node."""
    rank: int | None = None
    pid: int = 0
    lines: tuple[str, ...] = ()
    """The end of its stderr; of a lost node, what is known."""
    asked: bool = False
    """Whether it was killed by a signal that was passed on to it."""

    @property
    def exit_status(self) -> int:
        """As a shell would give it."""
        return self.status if self.status >= 0 else 128 - self.status

    @property
    def order(self) -> tuple[int, float]:
        """The least is the cause. Who was killed from outside has no part in the others' troubles; a mistake that was
        told ends all; then errors of a rank's own come before those of ranks that say another one is gone."""
        text = "\n".join(self.lines)
        if self.rank is None or (self.status < 0 and not self.asked and -self.status != signal.SIGABRT):
            kind = 0
        elif self.status in FINAL:
            kind = 1 if "error:" in text or self.status != 2 else 5  # one that is silent leaves it to another to tell
        elif self.asked or any(words in text for words in KNOCK_ON) or -self.status == signal.SIGABRT:
            kind = 4  # NCCL aborts the ranks that are left
        else:
            kind = 3 if self.status == os.EX_TEMPFAIL else 2
        return kind, self.seconds

    def who(self) -> str:
        """`rank 1 (n1) was killed by signal 9`."""
        if self.rank is None:
            return f"{self.host} was lost"
        how = f"failed with exit status {self.status}" if self.status >= 0 else f"was killed by signal {-self.status}"
        return f"rank {self.rank} ({self.host}) {how}"

    def describe(self, attempt: int) -> str:
        """What the user sees last: the rank, and its own words."""
        if self.rank is None:
            return f"{self.host} was lost in attempt {attempt}: {' '.join(self.lines)}"
        who = f"rank {self.rank} on {self.host} (pid {self.pid})"
        if self.status >= 0:
            head = f"{who} failed with exit status {self.status} in attempt {attempt}"
            return f"{head}:\n" + "\n".join(self.lines) if self.lines else f"{head}, and said nothing"
        number = -self.status
        head = f"{who} was killed by signal {number} ({_name(number)}) in attempt {attempt}"
        if number in HINTS:
            head += f"; {HINTS[signal.Signals(number)]}"
        # What a rank said long before it was killed from outside is not its error.
        return f"{head}:\n" + "\n".join(self.lines) if self.lines and number != signal.SIGKILL else head

    def to_json(self) -> dict[str, Any]:
        """For another node."""
        return self.__dict__ | {"lines": list(self.lines)}

    @classmethod
    def from_json(cls, data: Any) -> "Failure":
        """What another node sent. Raises ValueError for anything else."""
        types = {"host": str, "status": int, "seconds": float, "rank": int, "pid": int, "lines": list, "asked": bool}
        if not isinstance(data, dict) or {name: type(value) for name, value in data.items()} != types:
            raise ValueError("not a failure")
        if not -64 <= data["status"] <= 255:
            raise ValueError(f"an exit status of {data['status']}")
        lines = tuple(printable(line) for line in data["lines"][:MOST])
        return cls(**data | {"host": printable(data["host"]), "lines": lines})


def cause(failures: Iterable[Failure]) -> Failure | None:
    """The failure that the others follow from; None when there is none."""
    return min(failures, key=lambda failure: failure.order, default=None)


def last_words(lines: Sequence[str]) -> tuple[str, ...]:
    """The error at the end of a rank's stderr: its last traceback, or lines of `error:`; at most MOST."""
    lines = [printable(line) for line in lines if line.strip()]
    begins = [
        i
        for i, line in enumerate(lines)
        if line.startswith("Traceback (most recent")
        or (line.startswith("error:") and not (i and lines[i - 1].startswith("error:")))
    ]
    found = lines[begins[-1] if begins else -MOST :]
    return tuple(found if len(found) <= MOST else [found[0], "...", *found[2 - MOST :]])


def printable(line: object) -> str:
    """A line of limited width without what would drive a terminal."""
    text = str(line)
    return "".join(c for c in text[:WIDEST] if c.isprintable() or c == "\t")


def say(text: str) -> None:
    """A line on stderr, in one piece as threads may write at once. Whoever read it may have gone, and the run goes on.

    Not print: what it cannot write stays in a buffer, at which Python fails in the end, with status 120.
    """
    with suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="replace"))


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "a real-time signal"
