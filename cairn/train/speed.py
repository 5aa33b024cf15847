"""Throughput of a run, from one write of rows to the next, evaluations and saves left out."""

import resource
import sys
import time

import torch

from cairn.data.batches import Loader
from cairn.train.task import Task


class Speed:
    """Measures steps. Call `mark` where a stretch of steps begins.

    Args:
        loader: whose waiting is told.
        task: says how many tokens and FLOPs a sample has.
        samples: in a step.
        peak: FLOP/s of all ranks together at best.
    """

    def __init__(self, loader: Loader, task: Task, samples: int, peak: float) -> None:
        self._loader, self._samples, self._peak = loader, samples, peak
        self._tokens, self._flops = task.tokens_per_sample, task.flops_per_sample
        self.mark()

    def mark(self) -> None:
        """Begin a stretch."""
        self._start, self._waited = time.perf_counter(), self._loader.wait_seconds

    def row(self, steps: int) -> dict[str, float]:
        """What the stretch of so many steps since the last mark gave, for its last row; on this rank."""
        seconds = time.perf_counter() - self._start
        samples = steps * self._samples
        flops = samples * self._flops / seconds
        # the peak of this rank since its start
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()
        else:
            # ru_maxrss counts kilobytes on Linux and bytes on macOS
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {
            "tokens_per_s": samples * self._tokens / seconds,
            "step_seconds": seconds / steps,
            "flops_per_s": flops,
            "mfu": flops / self._peak,
            "data_wait": (self._loader.wait_seconds - self._waited) / seconds,
            "memory_gb": memory / 2**30,
        }
