"""What ranks print: each line with its rank and node in the run folder's logs, rank 0's on the terminal as it comes."""

import os
import pty
import re
import select
import selectors
import sys
import termios
import threading
import tty
from collections import deque
from collections.abc import Callable
from pathlib import Path

LONGEST = 1 << 16  # bytes; a longer line is cut
KEPT = 200  # lines of its stderr that are kept of each rank
ESCAPES = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
SHOW_CURSOR = b"\x1b[?25h"


class Lines:
    """Bytes as they come to lines of text, without escape codes and what a carriage return has overwritten."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """The lines that `data` completes."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST:
            self._rest = self._rest[self._rest.rfind(b"\r", 0, -1) + 1 :]  # a progress bar of many states
        while len(self._rest) > LONGEST:
            whole.append(self._rest[:LONGEST])
            self._rest = self._rest[LONGEST:]
        return [_text(line) for line in whole]

    def end(self) -> list[str]:
        """The last line, if it had no end."""
        rest, self._rest = self._rest, b""
        return [_text(rest)] if rest else []


class Stream:
    """One of a rank's two streams: a pipe, or a terminal where the rank shall think that it writes to ours."""

    def __init__(self, show: int | None) -> None:
        """show: the descriptor of ours that gets the same bytes, if any."""
        self.show = show
        self.lines = Lines()
        self.at_line_start = True
        self.terminal = show is not None and os.isatty(show)
        self.source, self.target = pty.openpty() if self.terminal else os.pipe()
        if self.terminal:
            tty.setraw(self.target)  # our own terminal adds the carriage returns
            self.resize()

    def resize(self) -> None:
        """Take the size of our own terminal."""
        if self.terminal and self.show is not None:
            try:
                termios.tcsetwinsize(self.source, termios.tcgetwinsize(self.show))
            except (OSError, termios.error):
                self.terminal = False  # it has gone

    def read(self) -> bytes:
        """What has come; empty at the end."""
        try:
            return os.read(self.source, 1 << 16)
        except OSError:  # how a terminal says that nobody has it open any more
            return b""

    def echo(self, data: bytes) -> None:
        """Pass bytes on; never again once our own stream is gone."""
        while data and self.show is not None:
            try:
                written = os.write(self.show, data)
                self.at_line_start = data[:written].endswith(b"\n")
                data = data[written:]
            except BlockingIOError:
                select.select([], [self.show], [], 1.0)
            except OSError:
                self.show = None


class RankOutput:
    """The two streams of one rank, its log and the last lines of its stderr."""

    def __init__(self, rank: int, host: str, path: Path, show: bool, warn: Callable[[OSError], None]) -> None:
        self.stdout, self.stderr = Stream(1 if show else None), Stream(2 if show else None)
        self.tail: deque[str] = deque(maxlen=KEPT)
        self._prefix = f"[rank {rank} {host}] "
        self._warn = warn
        self._log: int | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            warn(error)

    def write(self, lines: list[str]) -> None:
        """Append to the log. One that cannot be written must not end a run."""
        if self._log is not None and lines:
            try:
                os.write(self._log, "".join(f"{self._prefix}{line}\n" for line in lines).encode(errors="replace"))
            except OSError as error:
                self._warn(error)

    def take(self, stream: Stream) -> bool:
        """Pass on what has come from a stream; False at its end."""
        data = stream.read()
        stream.echo(data)
        lines = stream.lines.feed(data) if data else stream.lines.end()
        if stream is self.stderr:
            self.tail.extend(lines)
        self.write(lines)
        return bool(data)

    def release(self) -> None:
        """Close our copies of the ends that the rank has now, so that its end is seen."""
        os.close(self.stdout.target)
        os.close(self.stderr.target)

    def close(self) -> None:
        """Write lines without an end, and leave the terminal as it was."""
        for stream in (self.stdout, self.stderr):
            rest = stream.lines.end()
            if stream is self.stderr:
                self.tail.extend(rest)
            self.write(rest)
            if stream.terminal:
                stream.echo(SHOW_CURSOR + (b"" if stream.at_line_start else b"\n"))  # a bar hides it
            os.close(stream.source)
        if self._log is not None:
            os.close(self._log)


class Output:
    """What the ranks of one attempt on this node print, read by a thread: a slow disk must not stop the launcher."""

    def __init__(self, folder: Path, host: str) -> None:
        """folder: of the logs, made if need be."""
        self._folder, self._host = folder, host
        self._ranks: dict[int, RankOutput] = {}
        self._warned = False
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._read, name="output", daemon=True)

    def open(self, rank: int, header: str) -> RankOutput:
        """Streams for a rank about to start; rank 0's are shown. `header` is the first line in its log."""
        path = self._folder / f"rank-{rank:05}.log"
        self._ranks[rank] = output = RankOutput(rank, self._host, path, rank == 0, self._warn)
        output.write([header])
        return output

    def start(self) -> None:
        """Begin to read; after the last rank has been started, as a fork beside threads is not safe."""
        self._thread.start()

    def resize(self) -> None:
        """Our terminal has another size."""
        for output in self._ranks.values():
            output.stdout.resize()
            output.stderr.resize()

    def finish(self, limit_s: float) -> None:
        """Read what is left, for at most so many seconds: a process that left its rank may hold a stream open."""
        self._ending.set()
        if self._thread.ident is not None:
            self._thread.join(limit_s)

    def tail(self, rank: int) -> list[str]:
        """The last lines of a rank's stderr."""
        return list(self._ranks[rank].tail)

    def _read(self) -> None:
        with selectors.DefaultSelector() as selector:
            for output in self._ranks.values():
                for stream in (output.stdout, output.stderr):
                    selector.register(stream.source, selectors.EVENT_READ, (output, stream))
            while selector.get_map():
                found = selector.select(0.2)
                if not found and self._ending.is_set():
                    break
                for key, _ in found:
                    output, stream = key.data
                    if not output.take(stream):
                        selector.unregister(key.fileobj)
        for output in self._ranks.values():
            output.close()

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            print(f"warning: {self._host}: logs in {self._folder}: {error.strerror}; going on without", file=sys.stderr)


def _text(line: bytes) -> str:
    visible = ESCAPES.sub(b"", line).rstrip(b"\r")
    return CONTROLS.sub("", visible[visible.rfind(b"\r") + 1 :].decode(errors="backslashreplace"))
