import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cairn.errors import UserError
from cairn.train import lock as lock_module
from cairn.train.lock import RunLock

HOLD = textwrap.dedent("""
    import subprocess, sys, time
    from pathlib import Path
    from cairn.train.lock import RunLock
    with RunLock(Path(sys.argv[1])):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)  # inherits what is not closed at exec
        print(child.pid, flush=True)
        sys.stdin.read()
""")


@contextlib.contextmanager
def held(path: Path) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A process that holds the lock until its stdin ends, and the pid of a child that it leaves behind."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=pipe, stdout=pipe, text=True) as process:
        child = int(process.stdout.readline())
        try:
            yield process, child
        finally:
            os.kill(child, signal.SIGKILL)
            process.kill()


def write_holder(path: Path, host: str = "elsewhere", job: str | None = None, age_s: float = 0.0) -> Path:
    """A .lock as a process of another host leaves it, touched `age_s` ago."""
    file = path / ".lock"
    file.write_text(json.dumps({"host": host, "pid": 4711, "job": job, "started": "2026-01-01 00:00:00"}))
    os.utime(file, times=(time.time() - age_s,) * 2)
    return file


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of all times but POLL_S, which is a fiftieth."""
    for name, value in (("BEAT_S", 0.1), ("ALIVE_S", 0.5), ("STALE_S", 1.0), ("GRACE_S", 0.2), ("POLL_S", 0.005)):
        monkeypatch.setattr(lock_module, name, value)


def test_the_second_is_refused_with_host_and_pid_and_touches_nothing(tmp_path: Path, fast: None) -> None:
    path = tmp_path / "x"
    with held(path) as (process, _):
        before = (path / ".lock").read_bytes()
        with pytest.raises(UserError) as caught:
            RunLock(path).acquire()
        said = rf"{path} is in use by pid {process.pid} on host {re.escape(socket.gethostname())} \(since 20.*\): wait"
        assert re.match(said, str(caught.value))
        assert "run.name" in str(caught.value)
        assert (path / ".lock").read_bytes() == before
        assert os.listdir(path) == [".lock"]


def test_after_kill_9_the_next_goes_on_at_once(tmp_path: Path) -> None:
    with held(tmp_path) as (process, child):
        process.kill()
        process.wait()
        os.kill(child, 0)  # the child it left behind lives, and holds nothing
        start = time.monotonic()
        with RunLock(tmp_path):
            assert time.monotonic() - start < lock_module.GRACE_S
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_holder_that_is_about_to_go_is_waited_for(tmp_path: Path) -> None:
    with held(tmp_path) as (process, _):
        threading.Timer(0.5, process.kill).start()
        with RunLock(tmp_path):
            assert process.wait() == -signal.SIGKILL


def test_a_clean_end_leaves_nobody_in_the_file(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "new" / "folder")
    for _ in range(2):
        with lock:
            lock.acquire()  # held already
            assert (lock.path / ".lock").stat().st_size > 0
        assert (lock.path / ".lock").read_text() == ""
    lock.release()


def test_it_beats(tmp_path: Path, fast: None) -> None:
    with RunLock(tmp_path):
        os.utime(tmp_path / ".lock", times=(0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / ".lock").stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("flock", [True, None], ids=["locks of one node", "no locks"])
class TestAnotherHost:
    """Whose lock this host does not see."""

    @pytest.fixture(autouse=True)
    def local_locks(self, monkeypatch: pytest.MonkeyPatch, fast: None, flock: bool | None) -> None:
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        monkeypatch.setattr(lock_module, "_flock", lambda _: flock)

    def test_that_lives_is_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file, stop = write_holder(tmp_path), threading.Event()

        def beat() -> None:
            while not stop.wait(0.05):
                os.utime(file)

        thread = threading.Thread(target=beat)
        thread.start()
        try:
            with pytest.raises(UserError, match=r"in use by pid 4711 on host elsewhere \(since 2026-01-01"):
                RunLock(tmp_path).acquire()
        finally:
            stop.set()
            thread.join()
        assert capsys.readouterr().out.count("\n") == 1
        assert json.loads(file.read_text())["pid"] == 4711

    def test_that_ends_in_time_makes_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lock_module, "STALE_S", 60.0)
        file = write_holder(tmp_path)
        threading.Timer(0.3, file.write_text, [""]).start()
        start = time.monotonic()
        with RunLock(tmp_path):
            assert 0.2 < time.monotonic() - start < 30.0

    def test_that_died_is_taken_over_once_it_is_stale(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_holder(tmp_path)
        start = time.monotonic()
        with RunLock(tmp_path):
            assert time.monotonic() - start >= 0.9
        assert "was in use by pid 4711 on host elsewhere" in capsys.readouterr().out

    def test_that_died_long_ago_is_not_watched(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_holder(tmp_path, age_s=3600)
        with RunLock(tmp_path):
            assert capsys.readouterr().out == ""

    def test_of_this_very_job_was_requeued(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        monkeypatch.setattr(lock_module, "STALE_S", 60.0)
        write_holder(tmp_path, job="77")
        start = time.monotonic()
        with RunLock(tmp_path):
            assert time.monotonic() - start < 30.0
            assert json.loads((tmp_path / ".lock").read_text())["job"] == "77"


def test_a_server_that_keeps_the_lock_of_a_dead_host_is_waited_for(
    tmp_path: Path, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_holder(tmp_path, age_s=3600)
    freed = time.monotonic() + 1.5
    monkeypatch.setattr(lock_module, "_flock", lambda _: time.monotonic() > freed)
    with RunLock(tmp_path):
        assert time.monotonic() > freed


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run folder .*file/x: Not a directory; set run\.dir"):
        RunLock(tmp_path / "file" / "x").acquire()
