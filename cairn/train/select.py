"""Which checkpoint is the best, and whether a better one is still to be hoped for: read from the rows of evaluations.

Rows are the truth and are cut back with the run, so a resumed run comes to the same answers and nothing more is saved.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cairn.cluster import Cluster
from cairn.config.train import SelectSection
from cairn.errors import UserError
from cairn.train.checkpoint import Checkpoint, CheckpointStore, folder_of, newest, steps_in
from cairn.train.folder import RunFolder

LESS_IS_BETTER = ("loss", "bits_per_byte", "perplexity")


@dataclass(frozen=True)
class Standing:
    """The best evaluation so far."""

    step: int
    value: float
    since: int
    """Evaluations after it, none of them better."""


def standing(rows: Iterable[Mapping[str, Any]], section: SelectSection) -> Standing | None:
    """By select.metric; the earlier of equals; None where nothing is selected or nothing was evaluated.

    Raises UserError for a metric that evaluations do not have.
    """
    best: Standing | None = None
    key = f"valid/{section.metric}"
    for row in rows:
        if section.metric is None or not any(name.startswith("valid/") for name in row):
            continue
        if key not in row:
            known = sorted(name.removeprefix("valid/") for name in row if name.startswith("valid/"))
            raise UserError(f"select.metric {section.metric}: evaluations have {', '.join(known)}; choose one of these")
        value = float(row[key])
        if value == value and (best is None or _better(value, best.value, section.metric)):  # nan is never better
            best = Standing(row["step"], value, 0)
        elif best is not None:
            best = Standing(best.step, best.value, best.since + 1)
    return best


class Selection:
    """The best of a run that is under way; its checkpoint is kept from being pruned."""

    def __init__(self, section: SelectSection, folder: RunFolder, store: CheckpointStore, cluster: Cluster) -> None:
        self.section, self.folder, self.store, self.cluster = section, folder, store, cluster
        self.best: Standing | None = None

    def look(self, step: int) -> None:
        """COLLECTIVE: go by the evaluations up to a step. Raises UserError as `standing` does."""
        if self.section.metric is not None:
            rows = (row for row in self.folder.evaluations() if row["step"] <= step)
            self.best = self.cluster.on_main(lambda: standing(rows, self.section))
            self.store.best = None if self.best is None else self.best.step

    def decides(self, step: int) -> bool:
        """Whether the checkpoint of a step must be written: it is the best, or the last."""
        return self.exhausted or (self.best is not None and self.best.step == step)

    @property
    def exhausted(self) -> bool:
        """Whether select.patience evaluations in a row brought nothing better, so that the run ends."""
        patience = self.section.patience
        return self.best is not None and patience is not None and self.best.since >= patience


def chosen(folder: RunFolder, section: SelectSection) -> Checkpoint | None:
    """The best checkpoint, or the newest good one where none is selected; None where there is none."""
    best = standing(folder.evaluations(), section)
    if best is not None and best.step in steps_in(folder.checkpoints):
        return Checkpoint(folder_of(folder.checkpoints, best.step), verified=True)
    return newest(folder.checkpoints)[0]


def _better(value: float, than: float, metric: str) -> bool:
    return value < than if metric.endswith(LESS_IS_BETTER) else value > than
