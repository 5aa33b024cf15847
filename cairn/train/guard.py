"""Bad numbers: steps without an update, and losses that jump. Judged by the rows, which are the same on every rank.

A loss or gradient that is not finite makes no update (Engine.step), so the weights stay good; too many such steps in a
row stop the run, once diagnosis.py has found out where it began. A spike makes the run go back to its last checkpoint
and pass over the samples since: the loader is asked for later steps from there on, by an offset that checkpoints keep.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cairn.config.train import GuardSection
from cairn.train.engine import Engine


@dataclass(frozen=True)
class Spike:
    """A loss far above those before it."""

    step: int
    loss: float
    mean: float
    std: float
    """Of the `count` losses before."""
    count: int

    def __str__(self) -> str:
        before = f"{self.count} before: {self.mean:.4f} +- {self.std:.4f}"
        return f"step {self.step}: loss {self.loss:.4f} is a spike ({before})"


class Guard:
    """Counts what was left out, finds spikes, and knows which samples the steps are made of."""

    def __init__(self, section: GuardSection) -> None:
        self._section = section
        self._streak = 0
        self._overflowed: set[int] = set()
        self.bad = 0
        """Steps in a row without an update, save those that fp16's loss scale may be to blame for."""
        self.first_bad = 0
        """The first of them."""
        self._losses: deque[float] = deque(maxlen=section.spike_window)
        self.rollbacks = 0
        self._jumps: list[tuple[int, int]] = []
        """(step, offset): steps from this one on take the samples of the step so much later."""

    def data_step(self, step: int) -> int:
        """The loader's step whose samples are those of `step` (both from 0): itself, until a roll-back."""
        return step + next((offset for start, offset in reversed(self._jumps) if start <= step), 0)

    def stepped(self, step: int, engines: Mapping[str, Engine]) -> bool:
        """Note how step `step` (from 1) went, as far as the host knows. Whether its row is to be judged at once."""
        skipped = [engine for engine in engines.values() if engine.skipped]
        self._streak = self._streak + 1 if skipped else 0
        if skipped and all(engine.overflowed for engine in skipped):
            self._overflowed.add(step)
        return 0 < self._section.max_skipped <= self._streak

    def judge(self, rows: Sequence[dict[str, Any]], first_only: bool) -> list[Spike]:
        """Take in the rows of the steps since the last call; the spikes among them.

        With `first_only`, nothing after the first spike is taken in, as the run goes back from there.
        """
        spikes = []
        for row in rows:
            step, loss = int(row["step"]), float(row["loss"])
            if "skipped" not in row:
                self.bad = 0
            elif step not in self._overflowed or not math.isfinite(loss):
                self.first_bad = self.first_bad if self.bad else step
                self.bad += 1
            if (spike := self._spike(step, loss)) is not None:
                spikes.append(spike)
                if first_only:
                    break
            if self._section.spike_factor and math.isfinite(loss):
                self._losses.append(loss)
        self._overflowed.clear()
        return spikes

    @property
    def exhausted(self) -> bool:
        """Whether too many steps in a row made no update."""
        return 0 < self._section.max_skipped <= self.bad

    def roll_back(self, spike: Spike, step: int, state: dict[str, Any]) -> None:
        """Go back to a checkpoint after step `step`, whose state this is, and from there on pass over the samples up to
        the spike's. What it says of roll-backs is older than what is known here."""
        offset = self.data_step(spike.step - 1) + 1 - step
        rollbacks, jumps = self.rollbacks + 1, [jump for jump in self._jumps if jump[0] < step]
        self.load(state)
        self.rollbacks, self._jumps = rollbacks, [*jumps, (step, offset)]

    def state(self) -> dict[str, Any]:
        """What `load` takes, JSON."""
        return {
            "bad": [self.first_bad, self.bad],
            "losses": list(self._losses),
            "rollbacks": self.rollbacks,
            "jumps": self._jumps,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; an empty state is that of one which has none."""
        self.first_bad, self.bad = state.get("bad", (0, 0))
        self._streak = self.bad
        self._overflowed.clear()
        self._losses = deque(state.get("losses", ()), maxlen=self._section.spike_window)
        self.rollbacks = state.get("rollbacks", 0)
        self._jumps = [(step, offset) for step, offset in state.get("jumps", ())]

    def _spike(self, step: int, loss: float) -> Spike | None:
        count = len(self._losses)
        if not self._section.spike_factor or not math.isfinite(loss) or 2 * count < self._section.spike_window:
            return None
        mean = math.fsum(self._losses) / count
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in self._losses) / count)
        return Spike(step, loss, mean, std, count) if loss > mean + self._section.spike_factor * std else None
