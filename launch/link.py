"""A launcher's connections to those of other nodes: JSON lines over TCP, each lost when it closes or falls silent."""

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from launch.failure import Failure

ALIVE_S = 5.0
LOST_S = 30.0  # without a sign of life after which a node is lost
LARGEST = 1 << 18  # bytes of a message
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "hello": {"host": (str,), "ranks": (int,), "node_rank": (int, type(None)), "nodes": (int,), "command": (list,)},
    "refused": {"why": (str,), "again": (bool,)},
    "welcome": {"host": (str,)},
    "start": {"attempt": (int,), "rank": (int,), "world_size": (int,), "port": (int,)},
    "signal": {"number": (int,), "times": (int,)},
    "failed": {},
    "ended": {"failures": (list,)},
    "end": {"status": (int,), "why": (str,)},
    "alive": {},
}
"""Every message with its fields: who it is; the answer; where an attempt's ranks are; a signal to pass on; a rank of
mine has failed; all of mine have ended; we are done."""
Message = dict[str, Any]


class Peer:
    """Another launcher: to the first one each of the others, to these the first."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str = "") -> None:
        self.host = host
        self.ranks = 0
        self.node_rank: int | None = None
        self.busy = False
        """Whether its ranks of this attempt have not all ended yet."""
        self.failures: list[Failure] = []
        """Of these ranks."""
        self.heard = time.monotonic()
        self._reader, self._writer = reader, writer

    def send(self, kind: str, **fields: Any) -> None:
        """Without waiting; if it does not get through, the silence from there will tell."""
        if self._writer.transport.get_write_buffer_size() < LARGEST and not self._writer.is_closing():
            self._writer.write(json.dumps({"type": kind, **fields}).encode() + b"\n")

    async def receive(self) -> Message:
        """The next message. Raises EOFError at the end, OSError, and ValueError for what is no message of ours."""
        while True:
            line = await self._reader.readline()
            if not line.endswith(b"\n"):
                raise EOFError
            self.heard = time.monotonic()
            message = parse(line)
            if message["type"] != "alive":
                return message

    def close(self) -> None:
        """After what was sent has left, as far as it can."""
        self._writer.close()

    async def drained(self) -> None:
        """Wait, for a second at most, until what was sent has left."""
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._writer.wait_closed()


class Link:
    """This launcher's connections to others, each lost when it closes or is silent for LOST_S."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.on_message: Callable[[Peer, Message], None] = lambda peer, message: None
        self.on_change: Callable[[], None] = lambda: None
        """Called when a node has come."""
        self.on_lost: Callable[[Peer, str], None] = lambda peer, why: None
        self._tasks: set[asyncio.Task[None]] = set()

    def tell(self, kind: str, but: Peer | None = None, **fields: Any) -> None:
        """Send to all, one excepted."""
        for peer in self.peers:
            if peer is not but:
                peer.send(kind, **fields)

    def follow(self, peer: Peer) -> None:
        """From now on, this peer's messages and its loss are reported."""
        if not self._tasks:
            self._keep(self._beat())
        self.peers.append(peer)
        self._keep(self._listen(peer))

    async def close(self) -> None:
        """Send what is left, and leave."""
        for task in self._tasks:
            task.cancel()
        for peer in self.peers:
            peer.close()
        await asyncio.gather(*(peer.drained() for peer in self.peers))

    def drop(self, peer: Peer, why: str) -> None:
        """It is lost."""
        if peer in self.peers:
            self.peers.remove(peer)
            peer.close()
            self.on_lost(peer, why)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _listen(self, peer: Peer) -> None:
        try:
            while True:
                self.on_message(peer, await peer.receive())
        except EOFError:
            self.drop(peer, "its launcher has closed the connection")
        except OSError as error:
            self.drop(peer, f"the connection to its launcher: {error.strerror or error}")
        except (ValueError, TypeError, KeyError) as error:
            self.drop(peer, f"its launcher sent what makes no sense: {error}")

    async def _beat(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(ALIVE_S)
            now = time.monotonic()
            if now - last > 2 * ALIVE_S:  # we slept: what they have sent meanwhile is not read yet
                for peer in self.peers:
                    peer.heard = now
            last = now
            self.tell("alive")
            for peer in [peer for peer in self.peers if now - peer.heard > LOST_S]:
                self.drop(peer, f"no sign of life for {LOST_S:.0f} s")


def parse(line: bytes) -> Message:
    """A message from its line. Raises ValueError for what is none: a peer's bytes may be anybody's."""
    try:
        message = json.loads(line)
    except RecursionError as error:
        raise ValueError("not a message") from error
    if not isinstance(message, dict) or message.get("type") not in tuple(FIELDS):
        raise ValueError("not a message of cairn launch")
    for name, types in FIELDS[message["type"]].items():
        if name not in message or type(message[name]) not in types:
            raise ValueError(f"{message['type']} without a proper {name}")
    return message
