"""What `python -m recipes.X CONFIG [section.key=value ...]` does, for every X."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from cairn.cluster import Cluster
from cairn.config.main import read_args
from cairn.config.schema import RunConfig
from cairn.train.signals import leave_at_signal

if TYPE_CHECKING:
    from cairn.train.folder import RunFolder
    from cairn.train.task import Task

    class Recipe(Task, Protocol):
        """A task that can show what it has learnt."""

        def report(self, folder: RunFolder, step: int) -> str:
            """Draw it by the checkpoint of a step; what is worth saying of it."""
            ...


C = TypeVar("C", bound=RunConfig)


def run(schema: type[C], make: "Callable[[C], Recipe]") -> None:
    """Train what `make` makes of the command line's config; print how it ended and, of a whole run, its report."""
    config = read_args(schema, sys.argv[1:])

    cluster = Cluster.from_env()
    leave_at_signal(cluster)

    from cairn.train.trainer import train

    with cluster.init():
        task = cluster.on_all(lambda: make(config))
        outcome = train(task, config, cluster)
        if cluster.is_main:
            print(outcome.summary())
            if not outcome.stopped_by:
                print(task.report(outcome.folder, outcome.step))
