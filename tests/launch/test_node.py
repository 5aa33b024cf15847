"""One node: what ranks are given and print, how they fail, are tried again, and stop."""

import json
import os
import pty
import re
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest

from tests.launch.launchers import Launcher, runs, until

WAIT = "time.sleep(60)\n"
READY = "(folder / f'ready-{rank}').write_text(str(os.getpid()))\n"


def pids(folder: Path, ranks: int) -> list[int]:
    """Of ranks that have come to READY."""
    files = [folder / f"ready-{rank}" for rank in range(ranks)]
    until(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def test_each_rank_has_its_place_threads_and_caches(tmp_path: Path) -> None:
    code = "import json; (folder / f'env-{rank}').write_text(json.dumps(dict(os.environ)))"
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "SLURM_JOB_ID": "7", "MALLOC_MMAP_MAX_": "5"}
    Launcher(tmp_path, code, ranks=2, env=env).end(0)
    zero, one = (json.loads((tmp_path / f"env-{rank}").read_text()) for rank in (0, 1))
    assert (one["RANK"], one["LOCAL_RANK"], one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"]) == ("1", "1", "2", "2")
    assert (zero["MASTER_ADDR"], zero["MASTER_PORT"]) == ("127.0.0.1", one["MASTER_PORT"])
    assert zero["OMP_NUM_THREADS"] == "1"
    assert zero["MALLOC_MMAP_MAX_"] == "5"
    assert zero["MALLOC_TRIM_THRESHOLD_"] == "100000000000"
    assert zero["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert zero["SLURM_JOB_ID"] == "7"
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert zero[name] != one[name]
        assert Path(zero[name]).is_relative_to(tmp_path / "cache")


def test_one_rank_alone_needs_no_address(tmp_path: Path) -> None:
    Launcher(tmp_path, "assert not {'RANK', 'WORLD_SIZE', 'MASTER_PORT', 'MASTER_ADDR'} & os.environ.keys()").end(0)


def test_rank_0_is_on_the_terminal_and_every_rank_in_its_log(tmp_path: Path) -> None:
    code = "print('out', rank); print('err', rank, file=sys.stderr); print('no end', end='')"
    for _ in range(2):
        launcher = Launcher(tmp_path, code, ranks=2)
        assert launcher.end(0) == "out 0\nno enderr 0\n"  # stdout, then stderr
    for rank in (0, 1):
        assert sorted(launcher.log(rank)) == sorted([f"out {rank}", f"err {rank}", "no end"] * 2)
    first = (tmp_path / "logs" / "rank-00001.log").read_text().splitlines()[0]
    assert " attempt 1: " in first
    assert "-m tests.launch.rank" in first


def test_output_of_any_kind(tmp_path: Path) -> None:
    code = (
        "os.write(1, b'\\xff\\xfe caf\\xc3\\xa9\\n')\n"
        "os.write(1, b'x' * 200_000 + b'\\n')\n"
        "for i in range(50_000): print('line', i)\n"
        "print('1%\\r2%\\r100%\\r\\n\\x1b[31mred\\x1b[0m'); sys.stdout.flush()\n"
        "os.close(1); os.write(2, b'last')"
    )
    launcher = Launcher(tmp_path, code)
    said = launcher.end(0)
    assert said.count("\nline ") >= 49_999
    lines = launcher.log(0)
    assert lines[0] == "\\xff\\xfe café"
    assert sum(line.count("x") for line in lines if set(line) == {"x"}) == 200_000
    assert [line for line in lines if line.startswith("line")] == [f"line {i}" for i in range(50_000)]
    assert lines[-3:] == ["100%", "red", "last"]


def test_a_log_that_cannot_be_written_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    said = Launcher(tmp_path, "print('fine', rank)", ranks=2).end(0)
    assert said.count("warning: ") == 1
    assert "fine 0" in said
    if Path("/dev/full").exists():
        (tmp_path / "logs").unlink()
        (tmp_path / "logs").mkdir()
        for rank in (0, 1):
            (tmp_path / "logs" / f"rank-{rank:05}.log").symlink_to("/dev/full")
        said = Launcher(tmp_path, "print('fine', rank)", ranks=2).end(0)
        assert said.count("warning: ") == 1
        assert "No space left" in said


def test_a_terminal_reaches_rank_0(tmp_path: Path) -> None:
    code = (
        "if rank: sys.exit(sys.stdout.isatty() or sys.stderr.isatty())\n"
        "print(sys.stdout.isatty(), sys.stderr.isatty(), os.get_terminal_size(1).columns)\n"
        "for i in range(5): print(f'\\r\\x1b[2Kbar {i}', end='', flush=True)\n"
        "print('\\ndone')"
    )
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    termios.tcsetwinsize(theirs, (33, 77))
    launcher = Launcher(tmp_path, code, ranks=2, stdout=theirs)
    os.close(theirs)
    shown = b""

    def ended() -> bool:
        nonlocal shown
        try:
            shown += os.read(ours, 65536)
        except BlockingIOError:
            pass
        except OSError:
            return True
        return False

    until(ended)
    launcher.end(0)
    assert b"True True 77\r\n" in shown
    assert shown.count(b"\r\x1b[2Kbar") == 5
    assert launcher.log(0) == ["True True 77", "bar 4", "done"]


def test_the_failing_ranks_own_error_is_last(tmp_path: Path) -> None:
    code = (
        "if rank == 1:\n"
        "    print('noise', file=sys.stderr)\n"
        "    def deep(n): return 1 / 0 if n == 0 else deep(n - 1)\n"
        "    deep(1)\n" + WAIT
    )
    said = Launcher(tmp_path, code, ranks=2, constants={"GRACE_S": 0.5}).end(1).splitlines()
    head = next(i for i, line in enumerate(said) if line.startswith("rank 1 on "))
    assert " failed with exit status 1 in attempt 1:" in said[head]
    assert said[head + 1].startswith("Traceback")
    assert said[-1] == "ZeroDivisionError: division by zero"
    assert "noise" not in said


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        (
            "if rank == 1: os.kill(os.getpid(), 9)\n",
            137,
            "rank 1 on HOST was killed by signal 9 (SIGKILL) in attempt 1",
        ),
        ("if rank == 0: os.kill(os.getpid(), 11)\n", 139, "rank 0 on HOST was killed by signal 11 (SIGSEGV)"),
        # what another rank says of its neighbour's death must not hide it, though it is seen first
        (
            "if rank == 0: sys.exit('RuntimeError: Connection closed by peer [127.0.0.1]:1')\n"
            "time.sleep(0.5); os.kill(os.getpid(), 9)\n",
            137,
            "rank 1 on HOST was killed by signal 9",
        ),
        # a rank that leaves it to another to tell the mistake
        (
            "if rank == 0: sys.exit(2)\ntime.sleep(0.5); print('error: no corpus', file=sys.stderr); sys.exit(2)\n",
            2,
            "rank 1 on HOST failed with exit status 2 in attempt 1:\nerror: no corpus\n",
        ),
        (
            "if rank == 0: sys.exit('RuntimeError: Broken pipe')\n"
            "time.sleep(0.5); print('error: rank 0 hangs', file=sys.stderr); sys.exit(75)\n",
            75,
            "rank 1 on HOST failed with exit status 75 in attempt 1:\nerror: rank 0 hangs\n",
        ),
    ],
    ids=["killed", "fault", "killed-later", "quiet", "try-again"],
)
def test_the_cause_is_told(tmp_path: Path, code: str, status: int, told: str) -> None:
    grace = 30.0 if "time.sleep" in code else 0.5  # both end by themselves, however slowly; or one of them never
    said = Launcher(tmp_path, code + WAIT, ranks=2, constants={"GRACE_S": grace}).end(status)
    assert told.replace("HOST", "H") in re.sub(r"on \S+ \(pid \d+\)", "on H", said)


def test_nobody_waits_for_a_rank_that_does_not_end(tmp_path: Path) -> None:
    code = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "import subprocess\n"
        "if rank == 0: child = subprocess.Popen(['sleep', '600']); (folder / 'child').write_text(str(child.pid))\n"
        + READY
        + "if rank == 1:\n    while not (folder / 'ready-0').exists(): time.sleep(0.01)\n    sys.exit(7)\n"
        + WAIT
    )
    launcher = Launcher(tmp_path, code, ranks=2, constants={"GRACE_S": 0.5})
    assert "rank 1 on " in launcher.end(7)
    left = [*pids(tmp_path, 2), int((tmp_path / "child").read_text())]
    until(lambda: not any(runs(pid) for pid in left))  # SIGKILL was sent; to die takes a moment of the CPU


COUNT = "tries = len(list(folder.glob('try-*'))); (folder / f'try-{tries}').touch()\n"


def test_a_failed_job_is_tried_again(tmp_path: Path) -> None:
    code = COUNT + "\nif tries < 2: os.kill(os.getpid(), 9)\nprint('well', tries)"
    launcher = Launcher(tmp_path, code, restarts=3)
    said = launcher.end(0)
    assert "restart 1 of 3: rank 0 (" in said
    assert "was killed by signal 9; going on from the last checkpoint" in said
    assert "restart 2 of 3" in said
    assert "restart 3 of 3" not in said
    assert "well 2" in said
    text = (tmp_path / "logs" / "rank-00000.log").read_text()
    assert [f"attempt {n}: " in text for n in (1, 2, 3, 4)] == [True, True, True, False]


@pytest.mark.parametrize(("status", "tries"), [(2, 1), (130, 1), (75, 2), (1, 2)])
def test_what_is_tried_again(tmp_path: Path, status: int, tries: int) -> None:
    said = Launcher(tmp_path, COUNT + f"print('error: x', file=sys.stderr); sys.exit({status})", restarts=1).end(status)
    assert len(list(tmp_path.glob("try-*"))) == tries
    assert f"in attempt {tries}:" in said
    assert said.endswith("error: x\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_stop_signal_reaches_every_rank_once_and_is_no_failure(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "heard = []\n"
        "for n in (2, 15, 10): signal.signal(n, lambda number, frame: heard.append(number))\n"
        + READY
        + "while not heard: time.sleep(0.01)\n"
        "while not (folder / 'all-sent').exists(): time.sleep(0.01)\n"
        "time.sleep(0.5); print('heard', heard, flush=True); (folder / f'heard-{rank}').write_text(str(heard))\n"
    )
    launcher = Launcher(tmp_path, code, ranks=2, restarts=1)
    pids(tmp_path, 2)
    for _ in range(1 if number == signal.SIGINT else 3):
        launcher.process.send_signal(number)
        time.sleep(0.05)
    (tmp_path / "all-sent").touch()
    launcher.end(0)
    told = signal.SIGTERM if number == signal.SIGHUP else number
    assert [(tmp_path / f"heard-{rank}").read_text() for rank in (0, 1)] == [f"[{int(told)}]"] * 2


def test_a_second_ctrl_c_goes_on_too_and_ends_all(tmp_path: Path) -> None:
    code = (
        "def heard(number, frame):\n"
        "    signal.signal(2, lambda *_: sys.exit(130)); (folder / f'once-{rank}').touch()\n"
        "signal.signal(2, heard)\n" + READY + WAIT
    )
    launcher = Launcher(tmp_path, code, ranks=2, restarts=5)
    pids(tmp_path, 2)
    launcher.process.send_signal(signal.SIGINT)
    until(lambda: len(list(tmp_path.glob("once-*"))) == 2)
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.end(130) == "stopped at once, without saving\n"


@pytest.mark.parametrize("how", ["end-of-file", "USR1"])
def test_stdin_stands_in_for_signals(tmp_path: Path, how: str) -> None:
    code = (
        "heard = []\n"
        "for n in (15, 10): signal.signal(n, lambda number, frame: heard.append(number))\n"
        + READY
        + "while not heard: time.sleep(0.01)\n"
        "print('heard', heard)\n"
    )
    launcher = Launcher(tmp_path, code, until_eof=True, stdin=subprocess.PIPE)
    pids(tmp_path, 1)
    assert launcher.process.stdin is not None
    if how == "USR1":
        launcher.process.stdin.write(b"USR1\n")
        launcher.process.stdin.flush()
        until(lambda: "heard [10]" in launcher.log(0))
    assert f"heard [{10 if how == 'USR1' else 15}]" in launcher.end(0)


def test_kill_9_of_the_launcher_leaves_nobody(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, "signal.signal(15, signal.SIG_IGN)\n" + READY + WAIT, ranks=3)
    ranks = pids(tmp_path, 3)
    launcher.process.kill()
    launcher.process.wait()
    until(lambda: not any(runs(pid) for pid in ranks))
