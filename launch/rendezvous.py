"""The launchers of several nodes find each other: the first listens, the others come and get their places."""

import asyncio
import errno
import hashlib
import ipaddress
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from cairn.cluster import Cluster
from cairn.errors import UserError
from launch.failure import printable
from launch.job import Job
from launch.link import LARGEST, Link, Message, Peer

PORT = 29400
JOIN_S = 300.0  # that nodes may take to come, and to come back
HELLO_S = 10.0  # that one may take to say who it is
RETRY_S = 0.5
MOST_RANKS = 4096  # on a node


class Head(Link):
    """The first node's: the others connect to it."""

    def __init__(self, job: Job, nodes: int, host: str) -> None:
        super().__init__()
        self.nodes = nodes
        self._job, self._host = job, host
        self._hosts: dict[int, str] = {}
        """Who had each place last."""
        self._server: asyncio.Server | None = None

    async def listen(self, listener: socket.socket) -> None:
        """Let others come from now on."""
        self._server = await asyncio.start_server(self._welcome, sock=listener, limit=LARGEST)

    @property
    def complete(self) -> bool:
        """Whether all nodes are here."""
        return len(self.peers) == self.nodes - 1

    def place(self) -> None:
        """Give a place to every node that has none: its former one, else the first that is free."""
        for peer in [peer for peer in self.peers if peer.node_rank is None]:
            taken = {other.node_rank for other in self.peers}
            free = [rank for rank in range(1, self.nodes) if rank not in taken]
            peer.node_rank = next((rank for rank in free if self._hosts.get(rank) == peer.host), free[0])
        self.peers.sort(key=lambda peer: peer.node_rank or 0)
        self._hosts = {peer.node_rank or 0: peer.host for peer in self.peers}

    def start(self, attempt: int, addr: str, port: int) -> Cluster:
        """Tell every node where its ranks are in the job; the place of our own first one, which others reach at `addr`
        as they reach us."""
        world = self._job.ranks + sum(peer.ranks for peer in self.peers)
        first = self._job.ranks
        for peer in self.peers:
            peer.busy, peer.failures = True, []
            peer.send("start", attempt=attempt, rank=first, world_size=world, port=port)
            first += peer.ranks
        return Cluster(0, world, 0, self._job.ranks, addr, port)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        await super().close()

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        try:
            async with asyncio.timeout(HELLO_S):
                hello = await peer.receive()
        except (OSError, EOFError, ValueError, TimeoutError):
            writer.close()  # a stranger
            return
        if hello["type"] != "hello":
            writer.close()
            return
        peer.host, peer.ranks, peer.node_rank = printable(hello["host"]), hello["ranks"], hello["node_rank"]
        why, again = self._objection(peer, hello)
        if why:
            peer.send("refused", why=why, again=again)
            peer.close()
            return
        peer.send("welcome", host=self._host)
        self.follow(peer)
        self.on_change()

    def _objection(self, peer: Peer, hello: Message) -> tuple[str, bool]:
        """Why it may not join, and whether it may ask again."""
        ours = fingerprint(self._job)
        if hello["nodes"] != self.nodes:
            return f"it has --nodes {hello['nodes']}, {self._host} has --nodes {self.nodes}", False
        if len(hello["command"]) != len(ours):
            return f"its command has {len(hello['command'])} words, that of {self._host} has {len(ours)}", False
        for i, (theirs, own) in enumerate(zip(hello["command"], ours, strict=True)):
            if theirs != own:
                return f"word {i + 1} of its command differs from that of {self._host}", False
        if not 1 <= peer.ranks <= MOST_RANKS:
            return f"it has {peer.ranks} ranks", False
        if peer.node_rank is not None and not 1 <= peer.node_rank < self.nodes:
            return f"node rank {peer.node_rank} is not one of 1 to {self.nodes - 1}; {self._host} has 0", False
        for other in self.peers:
            if peer.node_rank is not None and other.node_rank == peer.node_rank:
                return f"node rank {peer.node_rank} is taken by {other.host}", True  # may be its own, not yet missed
        return (f"all {self.nodes} nodes are here", True) if self.complete else ("", False)


async def join(job: Job, nodes: int, node_rank: int | None, host: str, port: int, say: Callable[[str], None]) -> Peer:
    """Connect to the first node, which may not be there yet, but do not follow it yet: it may say more at once. Raises
    UserError when it does not come or does not want us."""
    deadline, waits, why = time.monotonic() + JOIN_S, False, "nothing listens there"
    while True:
        connected = False
        try:
            async with asyncio.timeout(HELLO_S):
                reader, writer = await asyncio.open_connection(host, port, limit=LARGEST)
                connected = True
                peer = Peer(reader, writer)
                peer.send(
                    "hello",
                    host=own_name(),
                    ranks=job.ranks,
                    node_rank=node_rank,
                    nodes=nodes,
                    command=fingerprint(job),
                )
                answer = await peer.receive()
            if answer["type"] == "welcome":
                peer.host = printable(answer["host"])
                return peer
            peer.close()
            if answer["type"] == "refused":
                why = f"{host}:{port} refuses {own_name()}: {printable(answer['why'])}"
                if not answer["again"]:
                    raise UserError(f"{why}; every node needs the same command")
        except (EOFError, ValueError, TimeoutError):
            why = "what listens there is not cairn launch" if connected else "no answer: wrong host, or a firewall?"
        except OSError as error:
            why = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise UserError(
                f"the first of {nodes} nodes was not to be had at {host}:{port} within {JOIN_S:.0f} s ({why}): is "
                "cairn launch running there, with this --rdzv and --nodes?"
            )
        if not waits:
            say(f"waiting up to {JOIN_S:.0f} s for the first of {nodes} nodes at {host}:{port} ({why})")
            waits = True
        await asyncio.sleep(RETRY_S)


def fingerprint(job: Job) -> list[str]:
    """What all nodes must agree on, a hash for each word of the command: the words themselves are nobody's business."""
    return [hashlib.sha256(word.encode(errors="surrogateescape")).hexdigest()[:16] for word in (job.module, *job.args)]


def own_name() -> str:
    """This host's name, without its domain."""
    return socket.gethostname().partition(".")[0]


def address(text: str) -> tuple[str, int]:
    """`HOST[:PORT]` of --rdzv. Raises UserError."""
    host, port = text, str(PORT)
    if text.startswith("["):  # [::1]:29400
        host, _, rest = text[1:].partition("]")
        port = rest[1:] if rest.startswith(":") else (rest or port)
    elif text.count(":") == 1:
        host, port = text.split(":")
    if not host or not port.isascii() or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise UserError(f"--rdzv {text}: expected HOST or HOST:PORT, such as node01:{PORT}")
    return host, int(port)


def listener(host: str, port: int, must: bool) -> socket.socket | None:
    """A socket that listens at HOST if this machine has that address, and nobody else listens there; else None.

    must: this is node 0 whatever its address; then UserError where it cannot listen.
    """
    places: Sequence[tuple[int, tuple[Any, ...]]] = []
    with suppress(socket.gaierror):
        places = [(info[0], info[4]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if any(_is_alias(host, place) for _, place in places) or (must and not places):
        places = [(socket.AF_INET, ("", port))]
    elif must:
        places = [*places, (socket.AF_INET, ("", port))]  # behind a translated address
    for family, place in places:
        try:
            return _listening(family, place)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and not must:
                return None  # the first node runs on this machine already
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise UserError(f"--rdzv {host}:{port}: {error.strerror}; choose another port") from error
    return None


def reserve_port() -> socket.socket:
    """A socket bound to a free port, not listening: rank 0 may listen there as well, and nobody else gets the port."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as PyTorch's store sets it
    held.bind(("", 0))
    return held


def _listening(family: int, place: tuple[Any, ...]) -> socket.socket:
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what a launcher before us left is no obstacle
        found.bind(place)
        found.listen()
    except OSError:
        found.close()
        raise
    return found


def _is_alias(host: str, place: tuple[Any, ...]) -> bool:
    """Whether HOST is this host's name, which its own /etc/hosts says is loopback: others reach it elsewhere."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host != "localhost" and ipaddress.ip_address(place[0].partition("%")[0]).is_loopback
    return False
