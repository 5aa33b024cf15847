"""Fixtures shared by all tests; keep it tiny."""

import signal
import socket

import pytest


def find_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def free_port() -> int:
    """One such port."""
    return find_port()


@pytest.fixture(scope="session", autouse=True)
def hangups_are_heard() -> None:
    """Under nohup they are ignored, and what tests start would inherit that."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
