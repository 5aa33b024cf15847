"""Start a job's ranks on this node, together with the launchers of the other nodes, and see them to their end."""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from cairn.cluster import Cluster, launchers
from cairn.errors import TryAgain, UserError, exit_status
from launch import rendezvous
from launch.failure import FINAL, Failure, cause, printable, say
from launch.job import Job
from launch.link import Link, Message, Peer
from launch.ranks import Ranks
from launch.rendezvous import Head

GRACE_S = 5.0  # that ranks have to end by themselves once one has failed
STUCK_S = 30.0  # that one may take to die; longer, and it is stuck in the kernel
PATIENCE_S = 3.0  # that nodes may take to come before we say that we wait
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def run(
    job: Job, nodes: int = 1, rdzv: str | None = None, node_rank: int | None = None, until_eof: bool = False
) -> int:
    """Run a job here, one of `nodes` that all call this, and return its exit status: that of the rank that failed, 128
    + N for one killed by signal N, 75 where a node was lost.

    Args:
        rdzv: HOST[:PORT] of the first node; in an srun step of one task a node it may be left out, and `nodes` too.
        node_rank: this node's place; by default the scheduler's, else by order of arrival.
        until_eof: whether the end of stdin counts as SIGTERM, and a line `USR1` as that signal.

    Raises UserError (of 2) where the nodes do not find each other, TryAgain (75) where they lose each other.
    """
    addr, port = "127.0.0.1", 0
    if nodes > 1 and rdzv is not None:
        addr, port = rendezvous.address(rdzv)
    elif rdzv is None:
        step = launchers()
        if nodes not in (1, step.world_size):
            remedy = f"this srun step has {step.world_size}" if step.world_size > 1 else "give --rdzv HOST[:PORT] too"
            raise UserError(f"--nodes {nodes}: {remedy}")
        if step.world_size > 1:
            nodes, node_rank, addr, port = step.world_size, step.rank, step.master_addr, step.master_port
    if node_rank is not None and not 0 <= node_rank < nodes:
        raise UserError(f"--node-rank {node_rank}: expected 0 to {nodes - 1} with --nodes {nodes}")
    return asyncio.run(_run(job, nodes, addr, port, node_rank, until_eof))


async def _run(job: Job, nodes: int, addr: str, port: int, node_rank: int | None, until_eof: bool) -> int:
    launcher = Launcher(job)
    launcher.watch_signals(until_eof)
    if nodes == 1:
        return await launcher.lead(Head(job, 1, launcher.host), addr)
    listener = rendezvous.listener(addr, port, must=node_rank == 0) if node_rank in (None, 0) else None
    if listener is not None:
        return await launcher.lead(Head(job, nodes, launcher.host), addr, port, listener)
    joining = asyncio.ensure_future(rendezvous.join(job, nodes, node_rank, addr, port, say))
    launcher.on_first_stop = joining.cancel
    try:
        return await launcher.serve(await joining, addr)
    except asyncio.CancelledError:
        return 128 + (launcher.stopped or 0)


class Launcher:
    """One node's launcher. All of it runs on one thread; `_changed` wakes whoever waits for something to happen."""

    def __init__(self, job: Job) -> None:
        self.host = rendezvous.own_name()
        self.stopped: int | None = None
        """The first signal that asked us to stop."""
        self.on_first_stop: Callable[[], object] = lambda: None
        self._job = job
        self._link = Link()
        self._changed = asyncio.Event()
        self._ranks: Ranks | None = None
        self._lost: list[Failure] = []
        self._ending: list[asyncio.TimerHandle] = []
        """What will be done to ranks that do not end by themselves."""
        self._stuck = False
        self._signals: dict[int, int] = {}
        """How often each was passed on."""
        self._orders: list[Message] = []

    def watch_signals(self, until_eof: bool) -> None:
        """Have signals, and stdin if asked, heard from now on."""
        loop = asyncio.get_running_loop()
        for number in STOPS:
            loop.add_signal_handler(number, self._stop, number)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup wants it unheard
            loop.add_signal_handler(signal.SIGHUP, self._stop, signal.SIGTERM)
        loop.add_signal_handler(signal.SIGCHLD, self._on_child)
        loop.add_signal_handler(signal.SIGWINCH, self._on_resize)
        if until_eof:
            try:
                loop.add_reader(0, self._on_stdin)
            except PermissionError:  # a file: its end is near
                loop.call_soon(self._stop, signal.SIGTERM)

    async def lead(self, head: Head, addr: str, port: int = 0, listener: socket.socket | None = None) -> int:
        """As the first node: gather the others, which come to `listener`, and decide. `addr`: where all reach us."""
        self._attach(head)
        head.on_change = self._changed.set
        if listener is not None:
            await head.listen(listener)
        status, why = os.EX_SOFTWARE, "the first node's launcher failed"
        try:
            status, why = await self._lead(head, addr, port)
        except UserError as error:
            status, why = exit_status(error), str(error)
            raise
        finally:
            head.tell("end", status=status, why=why)
            await head.close()
        return status

    async def _lead(self, head: Head, addr: str, port: int) -> tuple[int, str]:
        attempt = 1
        while True:
            await self._gather(head, f"{addr}:{port}", attempt)
            if self.stopped is not None:
                return 128 + self.stopped, "stopped before a rank was started"
            self._lost = []
            with rendezvous.reserve_port() as held:
                first = head.start(attempt, addr, held.getsockname()[1])
                failures = await self._attempt(first, attempt)
                await self._until(lambda: not any(peer.busy for peer in head.peers))
            for peer in head.peers:
                failures += peer.failures
            failed = cause(failures + self._lost)
            if failed is None:
                return 0, ""
            asked = self.stopped is not None and (failed.asked or failed.status == 130)
            say("stopped at once, without saving" if asked else failed.describe(attempt))
            if failed.exit_status in FINAL or self.stopped is not None or attempt > self._job.restarts:
                return failed.exit_status, failed.who()
            say(f"restart {attempt} of {self._job.restarts}: {failed.who()}; going on from the last checkpoint")
            attempt += 1

    async def _gather(self, head: Head, where: str, attempt: int) -> None:
        """Wait until all nodes are here, and give them their places."""

        def settled() -> bool:
            return head.complete or self.stopped is not None

        deadline = time.monotonic() + rendezvous.JOIN_S
        if not await self._until(settled, min(PATIENCE_S, rendezvous.JOIN_S)):
            missing = head.nodes - 1 - len(head.peers)
            say(f"waiting up to {rendezvous.JOIN_S:.0f} s for {missing} of {head.nodes} nodes to come to {where}")
        if not await self._until(settled, deadline - time.monotonic()):
            came = ", ".join([self.host, *(peer.host for peer in head.peers)])
            raise (UserError if attempt == 1 else TryAgain)(
                f"{len(head.peers) + 1} of {head.nodes} nodes came to {where} within {rendezvous.JOIN_S:.0f} s "
                f"({came}): start the same command on the others, with --rdzv {where}"
            )
        if head.complete:
            head.place()

    async def serve(self, head: Peer, addr: str) -> int:
        """As another node: do what the first one, at `addr`, says."""
        link = Link()
        self._attach(link)
        link.follow(head)  # it may have spoken already
        for number, times in self._signals.items():  # came when there was nobody to tell
            link.tell("signal", number=number, times=times)
        try:
            while True:
                await self._until(lambda: bool(self._orders or self._lost))
                if self._lost:
                    lost = self._lost[0]
                    raise TryAgain(f"{lost.host}, the first node, was lost: {' '.join(lost.lines)}")
                order = self._orders.pop(0)
                if order["type"] == "end":
                    if order["why"] and sys.stderr.isatty():  # else the first node's words are in the same place
                        say(f"{printable(order['why'])}; the first node, {head.host}, says more")
                    return int(order["status"]) & 255
                ranks = self._job.ranks
                first = Cluster(order["rank"], order["world_size"], 0, ranks, addr, order["port"])
                failures = await self._attempt(first, order["attempt"])
                worst = cause(failures)  # alone: all of many ranks would not fit into a message
                link.tell("ended", failures=[] if worst is None else [worst.to_json()])
        finally:
            await link.close()

    async def _attempt(self, first: Cluster, attempt: int) -> list[Failure]:
        """This node's ranks from start to end; those that failed by themselves."""
        self._ending, self._stuck = [], False
        self._ranks = ranks = Ranks(self._job, first, attempt, self.host)
        try:
            for number in self._signals:  # came while it was started
                ranks.forward(number)
            self._on_child()
            if self._lost:
                self._end()
            await self._until(lambda: self._stuck or not ranks.running)
        finally:
            for timer in self._ending:
                timer.cancel()
            ranks.kill()
            self._ranks = None
            failures = ranks.close()
        return failures

    def _attach(self, link: Link) -> None:
        self._link = link
        link.on_message, link.on_lost = self._on_message, self._on_lost

    async def _until(self, done: Callable[[], bool], limit_s: float | None = None) -> bool:
        """Wait until something has happened that makes `done` true; False after so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while not done():
                    self._changed.clear()
                    await self._changed.wait()
        return done()

    def _on_child(self) -> None:
        if self._ranks is not None and self._ranks.poll():
            self._link.tell("failed")
            self._end()
        self._changed.set()

    def _end(self) -> None:
        """The attempt has failed: ranks end by themselves within GRACE_S, or are killed."""
        if self._ranks is not None and not self._ending:
            loop = asyncio.get_running_loop()
            self._ending = [
                loop.call_later(GRACE_S, self._ranks.kill),
                loop.call_later(GRACE_S + STUCK_S, self._give_up),
            ]

    def _give_up(self) -> None:
        say(f"warning: {self.host}: ranks do not die of SIGKILL; they are left behind, stuck in the kernel")
        self._stuck = True
        self._changed.set()

    def _stop(self, number: int, times: int | None = None, origin: Peer | None = None) -> None:
        """A signal asks us to stop: tell our ranks and the other nodes, each once, as a scheduler may signal all nodes;
        a second Ctrl-C goes on too."""
        times = times or self._signals.get(number, 0) + 1
        if times > 1 and number != signal.SIGINT:
            return
        if times > self._signals.get(number, 0):
            self._signals[number] = times
            if self._ranks is not None:
                self._ranks.forward(number)
            self._link.tell("signal", but=origin, number=number, times=times)
        if self.stopped is None:
            self.stopped = number
            self.on_first_stop()
        self._changed.set()

    def _on_message(self, peer: Peer, message: Message) -> None:
        leads = isinstance(self._link, Head)
        match message["type"]:
            case "signal" if message["number"] in STOPS and message["times"] >= 1:
                self._stop(message["number"], message["times"], origin=peer)
            case "failed":
                if leads:
                    self._link.tell("failed", but=peer)
                self._end()
            case "ended" if leads:
                peer.busy, peer.failures = False, [Failure.from_json(failure) for failure in message["failures"]]
            case "start" | "end" if not leads:
                self._orders.append(message)
                if message["type"] == "end":
                    self._end()
            case kind:
                raise ValueError(f"a message {kind} at this time")
        self._changed.set()

    def _on_lost(self, peer: Peer, why: str) -> None:
        if isinstance(self._link, Head):
            matters = peer.busy  # else the next attempt waits for it
        else:
            matters = not any(order["type"] == "end" for order in self._orders)
        if matters:
            self._lost.append(Failure(host=peer.host, status=os.EX_TEMPFAIL, seconds=0.0, lines=(why,)))
            self._link.tell("failed")
            self._end()
        self._changed.set()

    def _on_resize(self) -> None:
        if self._ranks is not None:
            self._ranks.resize()

    def _on_stdin(self) -> None:
        data = os.read(0, 4096)
        if not data:
            asyncio.get_running_loop().remove_reader(0)
            self._stop(signal.SIGTERM)
        elif b"USR1" in data.split():
            self._stop(signal.SIGUSR1)
