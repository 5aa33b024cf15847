"""Several nodes, here launchers on one machine: who joins, what each is told, and how they end together."""

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cairn.errors import UserError
from launch import rendezvous
from launch.failure import Failure, cause, last_words
from launch.job import Job
from launch.link import parse
from tests.launch.launchers import Launcher, runs, until

READY = "(folder / f'ready-{rank}').write_text(str(os.getpid()))\n"
WAIT = "time.sleep(60)\n"
QUICK = {"GRACE_S": 1.0, "PATIENCE_S": 0.5}


@pytest.fixture
def rdzv(free_port: int) -> str:
    return f"127.0.0.1:{free_port}"


@pytest.fixture
def begin(tmp_path: Path, rdzv: str) -> Iterator[object]:
    """Starts launchers of one job; those still running at the end are killed."""
    started = []

    def start(code: str, node_rank: int | None, nodes: int = 2, **options: object) -> Launcher:
        options = {"rdzv": rdzv, "constants": QUICK} | options
        started.append(Launcher(tmp_path, code, nodes=nodes, node_rank=node_rank, **options))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for launcher in started:
        launcher.process.kill()


def waiting(launcher: Launcher) -> Launcher:
    """The launcher once it says that it waits for others: slow starts are behind it."""
    assert launcher.process.stderr is not None
    until(lambda: b"waiting" in launcher.process.stderr.readline())
    return launcher


def test_ranks_are_counted_over_nodes(tmp_path: Path, begin) -> None:
    code = (
        "names = 'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'\n"
        "print([os.environ[name] for name in names])"
    )
    last, middle, head = begin(code, 2, 3, ranks=1), begin(code, 1, 3, ranks=2), begin(code, 0, 3, ranks=1)
    said = [launcher.end(0) for launcher in (head, middle, last)]
    port = eval(head.log(0)[0])[-1]
    own = ["127.0.0.1", port]
    assert [eval(head.log(rank)[0]) for rank in range(4)] == [
        ["0", "0", "4", "1", *own],
        ["1", "0", "4", "2", *own],
        ["2", "1", "4", "2", *own],
        ["3", "0", "4", "1", *own],
    ]
    assert "LOCAL_RANK" not in said[1] + said[2]
    assert said[0].count("127.0.0.1'") == 1  # rank 0 alone is on the terminal


def test_without_node_ranks_who_has_the_address_leads(begin) -> None:
    launchers = [begin("print('here', rank)", None, ranks=2) for _ in range(2)]
    said = [launcher.end(0) for launcher in launchers]
    assert sorted("here 0" in text for text in said) == [False, True]
    assert launchers[0].log(3) == ["here 3"]


def test_the_ranks_of_two_nodes_compute_together(tmp_path: Path, begin) -> None:
    code = (
        "import torch, torch.distributed as dist\n"
        "from cairn.cluster import Cluster\n"
        "with Cluster.from_env().init():\n"
        "    x = torch.ones(()); dist.all_reduce(x); print('sum', x.item())\n"
    )
    launchers = [begin(code, node_rank) for node_rank in (0, 1)]
    assert "sum 2.0" in launchers[0].end(0)
    launchers[1].end(0)
    assert launchers[0].log(1)[-1] == "sum 2.0"


def port_of_a_job() -> int:
    """A free port among those that a SLURM job's number gives."""
    for port in range(15000 + os.getpid() % 9000, 25000):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no free port")


def test_in_an_srun_step_the_launchers_find_each_other(begin) -> None:
    step = {"SLURM_JOB_ID": str(port_of_a_job() - 15000), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost,n2"}
    step |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}
    code = "print(rank, world, sorted(name for name in os.environ if name.startswith('SLURM_')))"
    launchers = [
        begin(code, None, 1, rdzv=None, ranks=2, env=step | {"SLURM_PROCID": node, "SLURM_NODEID": node})
        for node in ("1", "0")
    ]
    for launcher in launchers:
        launcher.end(0)
    assert [launchers[0].log(rank) for rank in range(4)] == [[f"{rank} 4 ['SLURM_JOB_ID']"] for rank in range(4)]


def test_several_nodes_need_an_address(begin) -> None:
    assert "error: --nodes 2: give --rdzv HOST[:PORT] too" in begin("", None, rdzv=None).end(2)


def test_a_failure_on_one_node_ends_all_and_all_start_again_together(tmp_path: Path, begin) -> None:
    code = (
        "tries = len(list(folder.glob(f'try-{rank}-*'))); (folder / f'try-{rank}-{tries}').touch()\n"
        "while not (folder / 'try-0-0').exists(): time.sleep(0.01)\n"  # killed before, it would not know of its try
        "if tries == 0 and rank == 1:\n    os.kill(os.getpid(), 9)\n"
        "if tries == 0: time.sleep(60)\n"
        "print('well', os.environ['MASTER_PORT'])"
    )
    launchers = [begin(code, node_rank, restarts=2) for node_rank in (0, 1)]
    said = [launcher.end(0) for launcher in launchers]
    assert "restart 1 of 2: rank 1 (" in said[0]
    assert "restart" not in said[1]
    assert launchers[0].log(0)[-1] == launchers[0].log(1)[-1]
    assert launchers[0].log(0)[-1].startswith("well ")


def test_the_cause_is_told_once_wherever_it_is(begin) -> None:
    code = (
        "if rank == 0: sys.exit('RuntimeError: Connection closed by peer')\ntime.sleep(0.3); raise ValueError('mine')"
    )
    patient = QUICK | {"GRACE_S": 30.0}  # rank 1 may be slow to start, and must come to its error
    said = [launcher.end(1) for launcher in [begin(code, node_rank, constants=patient) for node_rank in (0, 1)]]
    assert said[0].endswith("ValueError: mine\n")
    assert "rank 1 on " in said[0]
    assert "mine" not in said[1]


def test_many_long_last_words_come_through(begin) -> None:
    code = "if rank == 0: time.sleep(60)\nfor _ in range(20): print('\\u00e9' * 1000, file=sys.stderr)\nsys.exit(3)"
    utf8 = {"PYTHONIOENCODING": "utf-8"}
    head, other = begin(code, 0, env=utf8), begin(code, 1, ranks=3, env=utf8)
    assert " failed with exit status 3 in attempt 1:" in head.end(3)
    other.end(3)


@pytest.mark.parametrize("at", [0, 1])
def test_a_stop_signal_at_one_node_reaches_every_rank(tmp_path: Path, begin, at: int) -> None:
    code = (
        "heard = []\nsignal.signal(2, lambda number, frame: heard.append(number))\n"
        + READY
        + "while not heard: time.sleep(0.01)\ntime.sleep(0.3); print('heard', heard)"
    )
    launchers = [begin(code, node_rank, restarts=1) for node_rank in (0, 1)]
    until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    launchers[at].process.send_signal(signal.SIGINT)
    for launcher in launchers:
        launcher.end(0)
    assert [launchers[0].log(rank) for rank in (0, 1)] == [["heard [2]"]] * 2


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_node_ends_the_others(tmp_path: Path, begin, lost: int) -> None:
    launchers = [begin(READY + WAIT, node_rank) for node_rank in (0, 1)]
    files = [tmp_path / f"ready-{rank}" for rank in (0, 1)]
    until(lambda: all(file.exists() and file.read_text() for file in files))
    launchers[lost].process.kill()
    said = launchers[1 - lost].end(75)
    assert f"{socket.gethostname().partition('.')[0]}" in said
    assert "was lost" in said
    until(lambda: not any(runs(int(file.read_text())) for file in files))


def test_a_silent_node_is_lost(tmp_path: Path, begin) -> None:
    quick = QUICK | {"ALIVE_S": 0.5, "LOST_S": 6.0}
    launchers = [begin(READY + WAIT, node_rank, constants=quick) for node_rank in (0, 1)]
    until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    launchers[1].process.send_signal(signal.SIGSTOP)
    assert "was lost in attempt 1: no sign of life for 6 s" in launchers[0].end(75)


def test_a_lost_node_that_comes_back_joins_the_next_attempt(tmp_path: Path, begin) -> None:
    code = "if (folder / 'again').exists(): print('well'); sys.exit()\n" + READY + WAIT
    launchers = [begin(code, node_rank, restarts=1) for node_rank in (0, 1)]
    until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    (tmp_path / "again").touch()
    launchers[1].process.kill()
    begin(code, None).end(0)
    said = launchers[0].end(0)
    assert "was lost; going on from the last checkpoint" in said
    assert launchers[0].log(1) == ["well"]


def test_a_lost_node_that_stays_away_is_for_another_try(tmp_path: Path, begin) -> None:
    other = waiting(begin(READY + WAIT, 1, restarts=1))
    launchers = [begin(READY + WAIT, 0, restarts=1, constants=QUICK | {"JOIN_S": 4}), other]
    until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    launchers[1].process.kill()
    assert "error: 1 of 2 nodes came to 127.0.0.1:" in launchers[0].end(75)


def test_another_command_is_refused_and_the_difference_named(tmp_path: Path, begin, rdzv: str) -> None:
    head = begin("print('fine')", 0)
    for other, told in (
        (begin("print('else')", 1), "word 2 of its command differs"),
        (begin("print('fine')", 1, args=["x"]), "its command has 2 words, that of "),
        (begin("print('fine')", 1, nodes=3), "it has --nodes 3, "),
    ):
        said = other.end(2)
        assert told in said
        assert rdzv in said
        assert "Traceback" not in said
    right = begin("print('fine')", 1)
    assert right.end(0) == ""
    assert "fine\n" in head.end(0)


def test_nodes_that_do_not_come_are_counted(begin, rdzv: str) -> None:
    other = waiting(begin("", 1, 3))
    head = begin("", 0, 3, constants=QUICK | {"JOIN_S": 3.0})
    said = head.end(2)
    assert "waiting up to 3 s for " in said
    assert f"error: 2 of 3 nodes came to {rdzv} within 3 s (" in said
    other.end(2)


def test_the_first_node_that_does_not_come_is_named(begin, rdzv: str) -> None:
    said = begin("", 1, constants=QUICK | {"JOIN_S": 1.0}).end(2)
    assert f"waiting up to 1 s for the first of 2 nodes at {rdzv}" in said
    assert f"error: the first of 2 nodes was not to be had at {rdzv} within 1 s" in said


def test_ctrl_c_while_waiting_ends_at_once(begin) -> None:
    for node_rank in (0, 1):
        launcher = waiting(begin("", node_rank))
        launcher.process.send_signal(signal.SIGINT)
        launcher.end(130)


def test_strangers_do_no_harm(begin, rdzv: str) -> None:
    head = begin("print('fine')", 0)
    host, port = rdzv.split(":")

    def stranger(said: bytes) -> None:
        with socket.create_connection((host, int(port)), timeout=30) as s:
            s.sendall(said)
            s.settimeout(30)
            try:
                while s.recv(100):
                    pass
            except ConnectionError:
                pass

    def listens() -> bool:
        with socket.socket() as s:
            return s.connect_ex((host, int(port))) == 0

    until(listens)
    noise = [b"GET / HTTP/1.1\r\n\r\n", b"\xff\x00\n", b"[" * 100_000 + b"\n", b"{}\n", b'{"type": "end"}\n']
    noise += [b"x" * 600_000, b'{"type": "signal", "number": 15, "times": 1}\n', b'{"type": "alive"}\n' * 3 + b"1\n"]
    threads = [threading.Thread(target=stranger, args=(said,)) for said in noise]
    for thread in threads:
        thread.start()
    begin("print('fine')", 1).end(0)
    said = head.end(0)
    assert "fine\n" in said
    assert "Traceback" not in said
    for thread in threads:
        thread.join()


def test_a_free_place_is_given_by_host_then_order(tmp_path: Path) -> None:
    head = rendezvous.Head(Job("m", (), tmp_path), 4, "a")

    def come(host: str, node_rank: int | None = None) -> rendezvous.Peer:
        peer = rendezvous.Peer(None, None, host)  # type: ignore[arg-type]
        peer.node_rank = node_rank
        head.peers.append(peer)
        return peer

    b, c, d = come("b"), come("c", 1), come("d")
    head.place()
    assert [peer.node_rank for peer in (b, c, d)] == [2, 1, 3]
    head.peers = [c]
    d, b = come("d"), come("new")
    head.place()
    assert [peer.node_rank for peer in (b, c, d)] == [2, 1, 3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("n1", ("n1", 29400)), ("n1:7", ("n1", 7)), ("[::1]:7", ("::1", 7)), ("::1", ("::1", 29400))],
)
def test_address(text: str, expected: tuple[str, int]) -> None:
    assert rendezvous.address(text) == expected


@pytest.mark.parametrize("text", ["", ":7", "n1:", "n1:x", "n1:0", "n1:70000"])
def test_a_wrong_address(text: str) -> None:
    with pytest.raises(UserError, match="expected HOST or HOST:PORT"):
        rendezvous.address(text)


def test_a_taken_port_is_told(begin, rdzv: str) -> None:
    with socket.create_server(("127.0.0.1", int(rdzv.split(":")[1]))):
        assert f"error: --rdzv {rdzv}: Address already in use" in begin("", 0).end(2)


@pytest.mark.parametrize(
    "line",
    [b"", b"1", b'{"type": []}', b'{"type": "x"}', b'{"type": "start"}', b'{"type": "failed"', b'{"type":"ended"}'],
)
def test_what_is_no_message(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(line)


def test_failures_cross_the_wire_and_only_they() -> None:
    failure = Failure("n1", -9, 1.5, 3, 77, ("a", "b"))
    sent = json.loads(json.dumps(failure.to_json()))
    assert Failure.from_json(sent) == failure
    for wrong in ({}, [], sent | {"rank": None}, sent | {"status": 10**9}, sent | {"seconds": "x"}, sent | {"more": 1}):
        with pytest.raises(ValueError, match=r"."):
            Failure.from_json(wrong)
    assert "\x1b" not in Failure.from_json(sent | {"host": "\x1b[31mn"}).host


def test_the_order_of_causes() -> None:
    own = Failure("n", 1, 9.0, 0, 1, ("ValueError: x",))
    killed = Failure("n", -9, 9.0, 1, 1)
    asked = Failure("n", -15, 1.0, 2, 1, asked=True)
    mistake, quiet = Failure("n", 2, 9.0, 3, 1, ("error: x",)), Failure("n", 2, 1.0, 4, 1)
    later, knocked = Failure("n", 75, 2.0, 5, 1, ("error: lost",)), Failure("n", 1, 1.0, 6, 1, ("x: Broken pipe",))
    aborted = Failure("n", -6, 1.0, 7, 1)
    causes = [killed, mistake, own, later, knocked, quiet]
    for i, failure in enumerate(causes):
        assert cause([*reversed(causes[i:]), aborted] if i < 4 else causes[i:]) == failure
    assert cause([asked, own]) == own
    assert cause([]) is None


def test_last_words() -> None:
    trace = ["Traceback (most recent call last):", "  File x", "ValueError: y"]
    assert last_words(["error: old", "noise", *trace, ""]) == tuple(trace)
    assert last_words([*trace, "error: one", "error: two"]) == ("error: one", "error: two")
    long = last_words([trace[0], *map(str, range(100))])
    assert (len(long), long[0], long[1], long[-1]) == (20, trace[0], "...", "99")
    assert last_words(["plain"] * 30) == ("plain",) * 20


def test_a_reserved_port_is_rank_0s_alone() -> None:
    with rendezvous.reserve_port() as held, socket.socket() as other, socket.socket() as store:
        port = held.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            other.bind(("", port))
        store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        store.bind(("", port))
        store.listen()
