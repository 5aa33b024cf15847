"""A run on machines that no scheduler gives out: one launcher on each, started and held by ssh.

ssh carries no signals, so each launcher is held by its standard input: the line USR1 is that signal, the end of the
file asks it to stop, and so does whatever else cuts the connection.
"""

import math
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from cairn.config.cluster import is_secret
from cairn.errors import UserError
from launch.failure import say

SSH = ("ssh", "-o", "ServerAliveInterval=15")
GRACE = 300.0
"""Seconds that the others have to stop by themselves once one launcher has ended."""
TICK = 0.2
"""Seconds after which a wait is begun anew: a signal that comes just before it would else be heard only at its end."""
CARRIED = ("NCCL_", "GLOO_", "TORCH_", "OMP_", "PYTHONPATH", "CUDA_HOME", "HF_HOME", "HF_HUB_OFFLINE", "WANDB_MODE")
"""How the variables begin that go along: ssh takes none by itself. The command line of a process is for all to see, so
no secret does."""


@dataclass(frozen=True)
class Host:
    """One line of a hosts file."""

    name: str
    """What ssh calls it, `user@` included."""
    count: tuple[str, ...] = ()
    """`--gpus N` or `--procs N` for it alone."""

    @property
    def address(self) -> str:
        """The host without its user."""
        return self.name.rpartition("@")[2]

    @property
    def ranks(self) -> int | None:
        """Processes it starts; None where the machine itself decides."""
        return int(self.count[1]) if self.count else None


def read_hosts(path: Path, count: Sequence[str] = ()) -> list[Host]:
    """The hosts of a file, `HOST [gpus=N|procs=N]` a line and # before comments. `count`: of a host that says none.

    Raises UserError with every mistake of the file.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"{path}: {said}; --hosts takes a file with a host on each line") from error
    hosts: list[Host] = []
    problems = []
    for number, line in enumerate(lines, 1):
        name, *options = line.partition("#")[0].split() or [""]
        if not name:
            continue
        found = [re.fullmatch(r"(gpus|procs)=([1-9]\d*)", option) for option in options]
        if not re.fullmatch(r"(\w[\w.-]*@)?\w[\w.:-]*", name, re.ASCII):
            problems.append(f"{path}:{number}: {name!r} is no name of a host; options of ssh belong in ~/.ssh/config")
        elif len(found) > 1 or not all(found):
            problems.append(f"{path}:{number}: expected `{name}`, `{name} gpus=N` or `{name} procs=N`")
        elif any(host.name == name for host in hosts):
            problems.append(f"{path}:{number}: {name} is there twice; give it more processes instead")
        else:
            own = [word for match in found if match for word in (f"--{match[1]}", match[2])]
            hosts.append(Host(name, tuple(own or count)))
    if not hosts and not problems:
        problems.append(f"{path}: no host in it")
    if problems:
        raise UserError("\n".join(problems))
    return hosts


def command(host: Host, options: Sequence[str], rest: Sequence[str], cwd: Path) -> str:
    """What the remote shell is given: one string, each word in it quoted. `rest`: VERB CONFIG and the overrides."""
    carried = {k: v for k, v in sorted(os.environ.items()) if k.startswith(CARRIED) and not is_secret(k)}
    env = ["env", *(f"{key}={value}" for key, value in carried.items())] if carried else []
    launch = [sys.executable, "-m", "launch.cli", "launch", *options, *host.count, *rest]
    return f"cd -- {shlex.quote(str(cwd))} && exec {shlex.join([*env, *launch])}"


def start_line(ssh: Sequence[str], host: Host, text: str) -> list[str]:
    """The words that start a command on a host; BatchMode: a question for a password would wait for ever."""
    return [*ssh, "-o", "BatchMode=yes", host.name, "--", text]


def stops() -> list[signal.Signals]:
    """The signals that are passed on; nohup wants SIGHUP unheard."""
    hang_up = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *hang_up]


def run(commands: Sequence[tuple[Host, list[str]]]) -> int:
    """Start all, wait for all, pass signals on; the exit status. The first host's output is shown, of the others what
    they say to standard error. Raises UserError naming a host that ssh could not reach."""
    events: queue.SimpleQueue[int | signal.Signals] = queue.SimpleQueue()  # a host that ended, or a signal

    def on_signal(number: int, frame: FrameType | None) -> None:
        events.put(signal.Signals(number))

    previous = {number: signal.signal(number, on_signal) for number in stops()}
    launchers: list[_Launcher] = []
    try:
        launchers += (_Launcher(i, host, words, events) for i, (host, words) in enumerate(commands))
        return _follow(launchers, events)
    finally:
        for launcher in launchers:
            launcher.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _follow(launchers: "list[_Launcher]", events: "queue.SimpleQueue[int | signal.Signals]") -> int:
    ended: list[int] = []
    interrupted, patience = False, math.inf
    while len(ended) < len(launchers):
        try:
            event = events.get(timeout=TICK)
        except queue.Empty:
            if time.monotonic() > patience:
                for launcher in launchers:
                    launcher.kill()
            continue
        if isinstance(event, signal.Signals):
            again = interrupted and event == signal.SIGINT
            interrupted = interrupted or event == signal.SIGINT
            for launcher in launchers:
                if again:
                    launcher.kill()
                elif event == signal.SIGUSR1:
                    launcher.tell(b"USR1\n")
                else:
                    launcher.stop()
            continue
        ended.append(event)
        patience = time.monotonic() + GRACE
        if launchers[event].status:
            for launcher in launchers:  # the launchers tell each other; where one was cut off they cannot
                launcher.stop()
    lost = [launchers[i] for i in ended if launchers[i].status == 255]
    if lost:
        raise UserError("\n".join(f"{one.host.name}: {one.last_words or 'the connection was lost'}" for one in lost))
    statuses = [launchers[i].status for i in ended]
    return next((status for status in statuses if status), 0)


class _Launcher:
    """One ssh, and the launcher at its other end."""

    def __init__(self, index: int, host: Host, words: list[str], events: "queue.SimpleQueue[int | signal.Signals]"):
        self.host, self.status, self.last_words = host, 0, ""
        self._first = index == 0
        try:
            # A group of its own: Ctrl-C on the terminal must not end ssh before the run has stopped.
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=None if self._first else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                process_group=0,
            )
        except FileNotFoundError as error:
            raise UserError(f"{words[0]} is not on this machine: install it, or give another with --ssh") from error
        except OSError as error:
            raise UserError(f"{words[0]}: {error.strerror}; give another with --ssh") from error
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, args=(index, events), daemon=True).start()

    def tell(self, line: bytes) -> None:
        """Write a line to its standard input, if it still reads it."""
        assert self._process.stdin is not None
        with self._lock:
            if not self._process.stdin.closed:
                with suppress(BrokenPipeError):  # it has ended: its watcher says so
                    self._process.stdin.write(line)
                    self._process.stdin.flush()

    def stop(self) -> None:
        """Ask it to stop in good order."""
        assert self._process.stdin is not None
        with self._lock, suppress(BrokenPipeError):
            self._process.stdin.close()

    def kill(self) -> None:
        """End ssh itself, if it has not ended."""
        if self._process.poll() is None:
            self._process.kill()

    def _watch(self, index: int, events: "queue.SimpleQueue[int | signal.Signals]") -> None:
        assert self._process.stderr is not None
        self._show(self._process.stderr)
        status = self._process.wait()
        self.status = status if status >= 0 else 128 - status
        events.put(index)

    def _show(self, stream: IO[bytes]) -> None:
        for line in stream:
            text = line.decode("utf-8", "replace").rstrip("\r\n")
            self.last_words = text or self.last_words
            shown = text if self._first else f"[{self.host.name}] {text}"
            say(shown)
