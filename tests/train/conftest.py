"""Fixtures of the trainer's tests."""

import os
from collections.abc import Iterator

import pytest

from cairn.cluster import Cluster


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """One process, and the environment as it was."""
    before, one = dict(os.environ), Cluster()
    with one.init():
        yield one
    os.environ.clear()
    os.environ.update(before)
