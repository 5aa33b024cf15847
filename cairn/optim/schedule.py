"""Learning-rate schedules, as pure functions of the step."""

import math
from collections.abc import Callable

from cairn.config.train import ScheduleSection


def schedule(section: ScheduleSection, total_steps: int) -> Callable[[int], float]:
    """The learning rate of step s (from 0) of `total_steps`, as a share of its peak.

    Linear warmup, 1 / warmup_steps at step 0, reaches the peak at its last step; the shape goes on from there to
    `min_ratio` at the last step of the run and stays there. wsd (arXiv 2405.18392) keeps the peak until its decay.
    """
    peak = max(section.warmup_steps - 1, 0)
    last = max(total_steps - 1, peak + 1)
    decay = total_steps // 5 if section.decay_steps is None else section.decay_steps
    fall = max(last - decay, peak)

    def factor(step: int) -> float:
        if step < section.warmup_steps:
            return (step + 1) / section.warmup_steps
        if section.name == "constant":
            return 1.0
        if section.name == "wsd":
            shape = 1.0 - min(max(step - fall, 0) / max(last - fall, 1), 1.0)
        elif section.name == "linear":
            shape = 1.0 - min((step - peak) / (last - peak), 1.0)
        else:
            shape = 0.5 * (1.0 + math.cos(math.pi * min((step - peak) / (last - peak), 1.0)))
        return section.min_ratio + (1.0 - section.min_ratio) * shape

    return factor
