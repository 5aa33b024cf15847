import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from cairn.cluster import Cluster
from cairn.train.signals import StopSignal
from tests.train.dist import run_distributed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_request(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal(Cluster()) as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed()
        assert stop.name == number.name
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_ends_at_once() -> None:
    program = textwrap.dedent("""
        import time
        from cairn.cluster import Cluster
        from cairn.train.signals import StopSignal
        with StopSignal(Cluster()) as stop:
            print("ready", flush=True)
            while not stop.agreed():
                time.sleep(0.01)
            print("first", flush=True)
            time.sleep(60)
    """)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "first\n"
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=20)[1]


def steps_until_agreed(rank: int, world_size: int, hit: int) -> tuple[int, str]:
    with StopSignal(Cluster(rank=rank, world_size=world_size)) as stop:
        step = 0
        while not stop.agreed():
            if step == 5 and rank == hit:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.002 * rank)  # ranks do not run in step
            step += 1
            assert step < 1000
        return step, str(stop.name)


@pytest.mark.slow
def test_all_ranks_stop_at_the_same_step() -> None:
    results = run_distributed(steps_until_agreed, 2, 2, 1)
    steps, names = zip(*results, strict=True)
    assert len(set(steps)) == 1
    assert 6 <= steps[0] <= 7
    assert names[1] == "SIGTERM"
    assert "another rank" in names[0]
