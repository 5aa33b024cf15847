"""Ranks that hang, are lost, or leave: who is named, with which stacks, and with which exit code the others end."""

import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from cairn.cluster import Cluster
from cairn.config.train import GuardSection
from cairn.data.batches import Item, Loader
from cairn.train.beats import Beat, Judge, Verdict
from cairn.train.folder import RunFolder
from cairn.train.stacks import main_thread, runs
from cairn.train.watchdog import Watchdog
from tests.pretrain.runs import Done, Job, start

LOST_S = 2.0
MAIN = threading.main_thread().ident or 0


def job(folder: Path, mishap: str, rank: int, ranks: int = 2, hang: float = 0.0, steps: int = 6) -> Job:
    """Ranks of tests/train/watched.py, one of which meets a mishap in step 3. `hang`: seconds."""
    return start(folder, LOST_S, hang, steps, mishap, rank, folder=folder, ranks=ranks, module="tests.train.watched")


def end(job: Job, victim: int) -> Done:
    """Wait for all ranks but the victim, then kill that one, as a launcher does."""
    for rank, process in enumerate(job.processes):
        if rank != victim:
            process.join(60)
    job.processes[victim].kill()
    return job.wait()


def errors(text: str) -> list[str]:
    return re.findall(r"^error: (.*)$", text, re.M)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named_with_all_stacks(tmp_path: Path, rank: int) -> None:
    done = job(tmp_path, "sleep", rank, hang=1.5).wait()
    assert done.codes == [75, 75]
    (said,) = errors(done.text)
    assert re.match(
        rf"rank {rank} \(.+, pid \d+\) hangs: \d+ s in step 3, in .*watched.py:\d+ read_sample_of_doom;", said
    )
    assert said.endswith(f"stacks of all ranks: {tmp_path / 'stacks'}")
    assert errors(done.output[0]) == [said]
    stacks = [(tmp_path / "stacks" / f"rank-0000{i}.txt").read_text() for i in range(2)]
    assert "read_sample_of_doom" in stacks[rank]
    assert "all_reduce" in stacks[1 - rank]
    assert re.match(rf"rank {rank} \(.+, pid \d+\), \d+ s in step 3, \d{{4}}-", stacks[rank])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_holds_the_interpreter_lock_hangs_and_is_not_lost(tmp_path: Path, rank: int) -> None:
    done = end(job(tmp_path, "gil", rank, hang=2.5), rank)
    assert done.codes[1 - rank] == 75
    assert re.match(rf"rank {rank} \(.+\) hangs: .* in a call that lets no Python thread run;", errors(done.text)[0])
    stacks = [(tmp_path / "stacks" / f"rank-0000{i}.txt").read_text() for i in range(2)]
    assert "in befall" in stacks[rank]  # written without Python
    assert "all_reduce" in stacks[1 - rank]


def test_holding_the_lock_for_longer_than_a_lost_rank_is_silent_does_no_harm(tmp_path: Path) -> None:
    done = job(tmp_path, "gil-short", 1).wait()
    assert (done.codes, done.text.strip()) == ([0, 0], "")


@pytest.mark.parametrize(("rank", "ranks"), [(0, 2), (1, 2), (1, 3)])
def test_a_killed_rank_is_named_by_the_others(tmp_path: Path, rank: int, ranks: int) -> None:
    done = job(tmp_path, "kill", rank, ranks).wait()
    assert done.codes == [-signal.SIGKILL if r == rank else 75 for r in range(ranks)]
    pid = r"\d+"
    for other in range(ranks):
        if other != rank:
            (said,) = errors(done.output[other])
            assert re.match(rf"rank {rank} \(.+, pid {pid}\) was lost: no sign of life for \d+ s, last ", said)
    assert "Traceback" not in done.text


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_is_lost(tmp_path: Path, rank: int) -> None:
    done = end(job(tmp_path, "stop", rank), rank)
    assert done.codes[1 - rank] == 75
    assert re.match(rf"rank {rank} \(.+\) was lost: no sign of life for 2 s, last ", errors(done.text)[0])


def test_a_job_suspended_as_a_whole_goes_on(tmp_path: Path) -> None:
    running = job(tmp_path, "none", 0, hang=2.0, steps=100)
    deadline = time.monotonic() + 60
    while not (tmp_path / "step-20").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for number, pause in ((signal.SIGSTOP, LOST_S + 1), (signal.SIGCONT, 0.0)):
        for process in running.processes:
            os.kill(process.pid, number)
        time.sleep(pause)
    done = running.wait()
    assert (done.codes, done.text.strip()) == ([0, 0], "")


@pytest.mark.parametrize("mishap", ["late", "none"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_normal_end_in_any_order_is_silent(tmp_path: Path, mishap: str, rank: int) -> None:
    done = job(tmp_path, mishap, rank, hang=2.0).wait()
    assert (done.codes, done.text.strip()) == ([0, 0], "")
    assert not (tmp_path / "stacks").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_of_the_user_on_one_rank_is_told_once_and_final(tmp_path: Path, rank: int) -> None:
    done = job(tmp_path, "user-error", rank).wait()
    assert done.codes == [2, 2]
    assert errors(done.output[rank]) == ["a mistake of the user"]
    assert done.output[1 - rank].strip() == ""


def test_a_crash_of_one_rank_is_named_by_the_other(tmp_path: Path) -> None:
    done = job(tmp_path, "crash", 1).wait()
    assert done.codes == [75, 1]
    assert re.match(r"rank 1 \(.+\) ended with an error .*: its own output says which", errors(done.output[0])[0])
    assert "RuntimeError: a bug" in done.output[1]


def test_one_process_alone_writes_its_stack(tmp_path: Path) -> None:
    done = job(tmp_path, "sleep", 0, ranks=1, hang=1.0).wait()
    assert done.codes == [75]
    assert re.match(r"rank 0 .* hangs: .* read_sample_of_doom;", errors(done.text)[0])
    assert "read_sample_of_doom" in (tmp_path / "stacks" / "rank-00000.txt").read_text()


def test_phase_costs_next_to_nothing(tmp_path: Path) -> None:
    with Watchdog(Cluster(), RunFolder(tmp_path), GuardSection()) as watchdog:
        best = math.inf
        for _ in range(20):
            begin = time.perf_counter()
            for step in range(1000):
                watchdog.phase("step", step)
            best = min(best, (time.perf_counter() - begin) / 1000)
        assert best < 5e-6
        assert watchdog.explain(RuntimeError("not a rank's fault")) is None


def judge(ranks: int, hang: float = 600.0) -> Judge:
    return Judge(ranks, 2.0, 60.0, hang, Path("runs/x/stacks"))


def beats(count: int, *given: Beat) -> list[bytes]:
    return [Beat(**{**vars(beat), "count": beat.count or count}).encode().encode() for beat in given]


@pytest.mark.parametrize(
    ("given", "behind"),
    [
        ([("step", 120, 5, True), ("step", 119, 4, True)], 1),
        ([("step", 120, 5, True), ("data", 120, 4, False)], 1),
        ([("save", 120, 5, True), ("evaluate", 120, 5, True)], 1),
        ([("evaluate", 120, 7, True), ("evaluate", 120, 6, True)], 1),
        ([("step", 120, 5, True), ("step", 120, 5, False)], 1),
        ([("step", 120, 5, True), ("step", 120, 5, True)], 0),
    ],
    ids=["step", "phase", "order-of-phases", "batch", "not-in-a-collective", "all-alike"],
)
def test_who_is_behind(given: list[tuple[str, int, int, bool]], behind: int) -> None:
    ranks = [
        Beat(rank, f"n{rank}", 77, 1, phase, step, marks, 601.0, hangs=True, where="a.py:1 f", waits=waits)
        for rank, (phase, step, marks, waits) in enumerate(given)
    ]
    said = judge(2).look(beats(1, *ranks), 2.0).stop
    assert said.startswith(f"rank {behind} (n{behind}, pid 77) hangs: 10 min ")


def test_silence_is_counted_in_beats_and_not_by_the_clock() -> None:
    here, gone = Beat(0, "n1", 7), Beat(1, "n2", 77, count=1, phase="step", step=120)
    court = judge(2)
    for count in range(2, 12):  # ten looks, days apart: the job was suspended
        assert not court.look(beats(count, here, gone), 1e6).stop
    said = [court.look(beats(count, here, gone), 2.0) for count in range(12, 40)]
    assert said[0].missing[0].beat.rank == 1
    assert said[-1].stop == "rank 1 (n2, pid 77) was lost: no sign of life for 60 s, last in step 120"
    assert Verdict.decode(said[-1].encode().encode()) == said[-1]


def test_a_silent_rank_that_a_neighbour_sees_run_is_not_lost_and_may_hang() -> None:
    silent = Beat(1, "n2", 77, count=1, phase="step", step=120, seconds=100.0)
    court = judge(3)
    verdicts = []
    for count in range(2, 300):
        first = Beat(0, "n1", 7, phase="step", step=120, where="b.py:2 g", waits=True)
        third = Beat(2, "n2", 78, phase="step", step=120, runs=(1,), where="a.py:1 f", waits=True)
        verdicts.append(court.look(beats(count, first, silent, third), 2.0))
    stops = [verdict.stop for verdict in verdicts if verdict.stop]
    assert stops[0].startswith(
        "rank 1 (n2, pid 77) hangs: 10 min in step 120, in a call that lets no Python thread run"
    )
    assert len(verdicts) - len(stops) > 240  # 500 s


def test_many_ranks_cost_little() -> None:
    court = judge(10_000)
    text = [Beat(rank, f"node{rank // 8}", rank, 1).encode().encode() for rank in range(10_000)]
    other = [Beat(rank, f"node{rank // 8}", rank, 2).encode().encode() for rank in range(10_000)]
    best = math.inf
    for i in range(10):
        begin = time.perf_counter()
        court.look((text, other)[i % 2], 2.0)
        best = min(best, time.perf_counter() - begin)
    assert best < 0.1  # of two seconds, and it takes a tenth of that


def test_where_the_main_thread_is() -> None:
    with ThreadPoolExecutor(1) as pool:
        where, waits = pool.submit(main_thread).result()
    assert re.fullmatch(r"tests/train/test_watchdog.py:\d+ test_where_the_main_thread_is", where)
    assert not waits
    assert runs(os.getpid())
    assert not runs(2**22 + 1)


def test_a_main_thread_that_waits_for_the_loader_is_where_the_loader_is() -> None:
    read, go = threading.Event(), threading.Event()

    class Slow:
        def __len__(self) -> int:
            return 1

        def item(self, k: int) -> Item:
            read.set()
            go.wait()
            return {"input_ids": np.zeros(2)}

    said = []

    def watch() -> None:
        read.wait()
        while "in _wait" not in "".join(traceback.format_stack(sys._current_frames()[MAIN])):
            time.sleep(0.01)  # until the main thread waits
        said.append(main_thread()[0])
        go.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    with closing(Loader(Slow(), 1, 1)) as loader:
        loader.step(0)
    watcher.join()
    assert re.fullmatch(r"tests/train/test_watchdog.py:\d+ item", said[0])
