"""train.max_hours: the run ends in time, with its learning rate decayed, an evaluation and a checkpoint."""

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from cairn.config.schema import RunConfig

RECENT = 20
"""Stretches of steps that the speed is taken from."""
MARGIN_S = 1.0
"""Kept free for what nothing measures."""
SLACK = 0.05
"""Share of the time of a cooldown that is kept free when its length is decided."""
UNDECIDED = -1


@dataclass(frozen=True)
class Cooldown:
    """The decay that ends a run early. Steps count from 0; those from `start` to before `end` are in it."""

    begin: int
    """Where it began."""
    start: int
    """From where the factor falls to its end: `begin`, or where the end was last brought forward."""
    factor: float
    """The factor of `start`, had it gone on as before."""
    end: int
    max_hours: float
    """What the user had asked for."""


class Deadline:
    """Decides when the run must cool down, and gives the learning rate's factor, with a cooldown or without.

    Time counts over all calls of a run, from the making of this object; what a killed call did after its last
    checkpoint is lost and does not count. When the time left just suffices, the factor falls linearly from where it is
    to schedule.min_ratio over schedule.decay_steps of wsd, else over a fifth of the run as it then is; constant does
    not fall. If steps turn slower the end comes earlier. Where train.steps are done in time, nothing changes.

    A cooldown once begun holds, whatever train.max_hours is later: what has decayed is not undone, and the run is
    finished at its end. A larger max_hours only takes effect from a checkpoint where nothing had decayed: that of the
    cooldown's first step (remove the later ones), or the last one with the constant schedule.
    """

    def __init__(self, config: RunConfig, factor: Callable[[int], float], evaluated: int) -> None:
        """`evaluated`: samples of an evaluation, to guess its time until one is measured."""
        self._config, self._schedule, self._evaluated = config, factor, evaluated
        self._start, self._before = time.perf_counter(), 0.0
        self._stretches: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._opening = True
        """Whether none is known but the first of this call, in which code is compiled and memory first touched."""
        self.cooldown: Cooldown | None = None
        self.eval_seconds: float | None = None
        """What the last evaluation took."""
        self.save_seconds = 0.0
        """What the last save took, with its write in the background."""

    @property
    def end(self) -> int:
        """Steps after which the run ends."""
        return self._config.train.steps if self.cooldown is None else self.cooldown.end

    def factor(self, step: int) -> float:
        """The learning rate of a step (from 0) as a share of its peak."""
        cooldown = self.cooldown
        if cooldown is None or step < cooldown.start:
            return self._schedule(step)
        if self._config.schedule.name == "constant":
            return cooldown.factor
        done = min((step + 1 - cooldown.start) / (cooldown.end - cooldown.start), 1.0) if cooldown.end > step else 1.0
        return cooldown.factor * (1.0 - done) + self._config.schedule.min_ratio * done

    def seconds(self) -> float:
        """Time of all calls so far."""
        return self._before + time.perf_counter() - self._start

    def propose(self, step: int, steps: int, seconds: float) -> int:
        """By this rank's clock: how many steps after `step` (so many are done) the run should end, or UNDECIDED.

        `steps`, `seconds`: in the stretch since the last call, and what each took, evaluations and saves left out.
        """
        if self._opening and self._stretches:
            self._stretches.clear()
            self._opening = False
        self._stretches.append((steps, steps * seconds))
        config, left = self._config, self.end - step
        if config.train.max_hours is None or not left:
            return UNDECIDED
        fits = self._fits(SLACK)
        if self._opening and fits > 2 * steps:
            return UNDECIDED
        if self.cooldown is not None:
            return UNDECIDED if self._fits(0.0) >= left else fits
        length = min(self._length(step), left)
        # The next look comes after log_every steps.
        return UNDECIDED if fits >= left or fits - config.train.log_every > length else min(length, fits)

    def adopt(self, step: int, proposed: int) -> bool:
        """Take what rank 0 proposed, on every rank. Whether that is news, which only a checkpoint makes last."""
        if proposed == UNDECIDED or self._config.train.max_hours is None:
            return False
        start, factor, end = step, self.factor(step), step + proposed
        if self.cooldown is None:
            self.cooldown = Cooldown(step, start, factor, end, self._config.train.max_hours)
        else:
            self.cooldown = replace(self.cooldown, start=start, factor=factor, end=end)
        return True

    def state(self) -> dict[str, Any]:
        """What `load` takes, JSON."""
        return {"seconds": self.seconds(), "cooldown": None if self.cooldown is None else asdict(self.cooldown)}

    def load(self, step: int, state: dict[str, Any], same_call: bool = False) -> None:
        """Go on from the checkpoint of a step. `same_call`: the clock goes on too."""
        if not same_call:
            self._before = state.get("seconds", 0.0)
        self.cooldown = Cooldown(**state["cooldown"]) if state.get("cooldown") else None
        hours = self._config.train.max_hours
        if (
            self.cooldown is not None
            and self.cooldown.begin == step
            and (hours or float("inf")) > self.cooldown.max_hours
        ):
            self.cooldown = None

    def _length(self, step: int) -> int:
        """Steps of a cooldown that begins now."""
        schedule = self._config.schedule
        if schedule.name == "constant":
            return 0
        return step // 4 if schedule.name != "wsd" or schedule.decay_steps is None else schedule.decay_steps

    def _fits(self, slack: float) -> int:
        """Steps for which there is time, before the evaluation and the save of the end."""
        train = self._config.train
        # Of a stretch in which the machine stood still only the time counts, which is gone: it says nothing of steps.
        each = statistics.median(seconds / steps for steps, seconds in self._stretches)
        guessed = each * self._evaluated / train.global_batch_size
        evaluation, save = guessed if self.eval_seconds is None else self.eval_seconds, self.save_seconds
        rhythm = ((evaluation, train.eval_every), (save, self._config.checkpoint.every))
        reserve = MARGIN_S + (1 + slack) * (evaluation + save) + each * train.log_every
        time_left = 3600.0 * (train.max_hours or 0.0) - self.seconds() - reserve
        total = each + sum(seconds / every for seconds, every in rhythm if every)
        return max(0, int(time_left / (total * (1 + slack))))
