"""Compare two runs of one config: to the bit, or by how much they differ."""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cairn.errors import UserError
from cairn.train.checkpoint import Checkpoint, newest
from cairn.train.folder import RunFolder

OF_THE_MACHINE = {"tokens_per_s", "step_seconds", "flops_per_s", "mfu", "data_wait", "memory_gb", "time", "seconds"}


@dataclass(frozen=True)
class Result:
    """What a run left: every metric that does not measure the machine, and its last checkpoint."""

    metrics: dict[tuple[int, str], Any]
    """(step, name) -> value, in order of step."""
    checkpoint: Checkpoint

    @classmethod
    def of(cls, folder: RunFolder) -> "Result":
        """Raises UserError when the folder has no rows or no good checkpoint."""
        checkpoint, _ = newest(folder.checkpoints)
        if checkpoint is None:
            raise UserError(f"{folder.checkpoints} has no checkpoint")
        metrics = {
            (row["step"], key): value
            for row in folder.rows()
            for key, value in row.items()
            if key != "step" and key not in OF_THE_MACHINE
        }
        return cls(metrics, checkpoint)

    def steps(self) -> int:
        """Steps with metrics."""
        return len({step for step, _ in self.metrics})


def first_differences(a: Result, b: Result) -> list[str]:
    """The first metric, the first tensor and the first entry of the state that differ to the bit; [] if identical."""
    found = []
    for step, name in a.metrics | b.metrics:
        x, y = a.metrics.get((step, name), "missing"), b.metrics.get((step, name), "missing")
        if json.dumps(x) != json.dumps(y):
            found.append(f"step {step}: {name} is {x!r} and {y!r}")
            break
    for name in dict.fromkeys([*a.checkpoint.names(), *b.checkpoint.names()]):
        said = tensor_difference(a.checkpoint.read(name), b.checkpoint.read(name))
        if said:
            found.append(f"tensor {name}: {said}")
            break
    for key in a.checkpoint.state | b.checkpoint.state:
        x, y = _of_the_run(a.checkpoint.state.get(key)), _of_the_run(b.checkpoint.state.get(key))
        if key not in OF_THE_MACHINE and json.dumps(x, sort_keys=True) != json.dumps(y, sort_keys=True):
            found.append(f"state {key}: {x!r} and {y!r}")
            break
    return found


def tensor_difference(a: Tensor | None, b: Tensor | None) -> str | None:
    """The first element of which a bit differs, with both values; None if there is none."""
    if a is None or b is None:
        return "only one checkpoint has it"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
    x, y = a.contiguous(), b.contiguous()
    bits = (x.reshape(-1, 1).view(torch.uint8) != y.reshape(-1, 1).view(torch.uint8)).any(dim=1)
    if not bits.any():
        return None
    first = int(bits.nonzero()[0])
    place = ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(first), a.shape))
    differing = f"{int(bits.sum()):,} of {a.numel():,} elements differ"
    return f"[{place}] is {x.reshape(-1)[first].item()!r} and {y.reshape(-1)[first].item()!r} ({differing})"


def relative_differences(a: Result, b: Result) -> dict[str, tuple[float, str]]:
    """By how much two runs differ: name -> (difference, where it is largest).

    For metrics the largest relative difference of a step; for tensors, by kind (weight, exp_avg, ...), the norm of
    the difference of all of them over the norm of all. A difference per tensor would say little: where the true
    gradient is zero (the bias of keys) Adam scales rounding noise up to whole steps. Something missing is inf.
    """
    found: dict[str, tuple[float, str]] = {}
    for step, name in a.metrics | b.metrics:
        x, y = a.metrics.get((step, name), "missing"), b.metrics.get((step, name), "missing")
        difference = 0.0
        if json.dumps(x) != json.dumps(y):
            comparable = isinstance(x, int | float) and isinstance(y, int | float)
            difference = abs(x - y) / max(abs(x), abs(y)) if comparable else math.inf
        difference = math.inf if math.isnan(difference) else difference
        if name not in found or difference > found[name][0]:
            found[name] = (difference, f"step {step}")
    squares: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for name in dict.fromkeys([*a.checkpoint.names(), *b.checkpoint.names()]):
        one, two = a.checkpoint.read(name), b.checkpoint.read(name)
        kind = " ".join(part for part in name.split("/")[:2] if part != "model")
        if one is None or two is None or one.shape != two.shape:
            squares[kind].append((math.inf, 1.0, name))
        else:
            norms = (one.double() - two.double()).norm().item(), one.double().norm().item()
            squares[kind].append((norms[0] ** 2, norms[1] ** 2, name))
    for kind, parts in squares.items():
        difference, size = math.fsum(part[0] for part in parts), math.fsum(part[1] for part in parts)
        relative = math.sqrt(difference / size) if difference else 0.0
        found[kind] = (relative, max(parts)[2] if difference else "")
    return found


def _of_the_run(value: Any) -> Any:
    """A value of the state without what measures the machine."""
    if not isinstance(value, dict):
        return value
    return {key: part for key, part in value.items() if key not in OF_THE_MACHINE}
