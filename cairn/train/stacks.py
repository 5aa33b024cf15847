"""Python stacks of a rank that hangs, written even where its Python cannot run any more."""

import faulthandler
import os
import signal
import sys
import sysconfig
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType

SIGNAL = signal.SIGUSR2
"""At which a rank writes its stacks."""
WAITING = ("torch.distributed", "deepspeed.comm")
"""Modules whose functions wait for other ranks."""


class StackFile:
    """runs/NAME/stacks/rank-00003.txt, which appears once there is something in it.

    Until then it is a hidden file that is open already: at SIGUSR2, sent by another rank when no Python thread here
    gets a turn, a handler in C writes into it, which needs neither the interpreter nor its lock. A timer in C would
    run out while a job is suspended, and read stacks of threads that run: that crashes.
    """

    def __init__(self, folder: Path, rank: int, title: str) -> None:
        self.path = folder / f"rank-{rank:05d}.txt"
        self._hidden = folder / f".rank-{rank:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self._hidden.open("w", encoding="utf-8")
        self._say(f"{title}, whose Python threads got no turn\n\n")
        faulthandler.register(SIGNAL, file=self._file)

    def write(self, title: str) -> None:
        """Write the stacks of all threads, and show the file."""
        self._file.seek(0)
        self._file.truncate()
        self._say(f"{title}\n\n")
        faulthandler.dump_traceback(file=self._file)
        show(self._hidden)

    def close(self) -> None:
        """Leave nothing behind where nothing was shown."""
        faulthandler.unregister(SIGNAL)
        self._file.close()
        with suppress(OSError):  # the folder holds stacks, or another rank's file
            self._hidden.unlink(missing_ok=True)
            self._hidden.parent.rmdir()

    def _say(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()


def show(hidden: Path) -> None:
    """Give `.rank-00003` its visible name; for rank 0 too, on behalf of a rank that cannot."""
    with suppress(OSError):  # it has been shown already, or the folder is gone: the message matters more
        hidden.rename(hidden.with_name(f"{hidden.name.removeprefix('.')}.txt"))


def main_thread() -> tuple[str, bool]:
    """Where the main thread is, as FILE:LINE FUNCTION of the innermost function that is not a library's, and whether
    it waits for other ranks. Where it waits for a loader's thread (data/batches.py), it is where that thread is."""
    frames = _frames(threading.main_thread())
    if not frames:
        return "no Python function", False
    waits = any(_module(frame).startswith(WAITING) for frame in frames)
    if _module(own := _own(frames) or frames[0]) == "cairn.data.batches":
        loaders = [_own(_frames(thread)) for thread in threading.enumerate() if thread.name.startswith("loader")]
        own = next((frame for frame in loaders if frame is not None), own)
    return f"{_short(own.f_code.co_filename)}:{own.f_lineno} {own.f_code.co_name}", waits


def _frames(thread: threading.Thread) -> list[FrameType]:
    """Of the innermost function first."""
    frames, frame = [], sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _own(frames: list[FrameType]) -> FrameType | None:
    """The innermost that is not a library's."""
    return next((frame for frame in frames if not _of_library(frame.f_code.co_filename)), None)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def runs(pid: int) -> bool:
    """Whether a process of this machine is there and not stopped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "TtZX"


def _of_library(file: str) -> bool:
    libraries = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    return file.startswith("<") or any(file.startswith(f"{path}{os.sep}") for path in libraries)


def _short(file: str) -> str:
    relative = os.path.relpath(file)
    return file if relative.startswith(os.pardir) else relative
