"""What a checkpoint takes of the engines, copied while the next step computes its gradient."""

from collections.abc import Iterator

from torch import Tensor

from cairn.train.task import Engines


class Snapshot:
    """The tensors of all engines by the names of a checkpoint. COLLECTIVE, every rank to the end, to iterate over.

    Args:
        engines: by name; their next steps wait for what `later` leaves to do.
        later: the tensors are `filled` by threads. Else they are at once.
    """

    def __init__(self, engines: Engines, later: bool) -> None:
        self._engines, self._later = engines, later

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, engine in self._engines.items():
            for key, value in engine.tensors(self._later):
                yield f"{name}/{key}", value

    def filled(self) -> None:
        """Wait until they are."""
        for engine in self._engines.values():
            engine.copied()
