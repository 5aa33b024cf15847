"""What a person at the terminal sees of a run: progress, and what cairn logs."""

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

Row = dict[str, Any]
PLAIN_EVERY_S = 10.0  # seconds between two progress lines when the output is a file


class Output(Console):
    """Stdout. When who reads it has gone (a Ctrl-C ends `| tee` too), the run goes on in silence, to be saved."""

    def __init__(self) -> None:
        super().__init__(file=sys.stdout)

    def on_broken_pipe(self) -> None:
        """Write to nowhere from here on."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class Messages(logging.Handler):
    """What is logged to "cairn" at INFO or above, as lines, until `close`."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._show, self._logger = show, logging.getLogger("cairn")
        self._level = self._logger.level
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record."""
        self._show(record.getMessage())

    def close(self) -> None:
        """Leave the logger as it was."""
        if self in self._logger.handlers:
            self._logger.removeHandler(self)
            self._logger.setLevel(self._level)
        super().close()


class Display:
    """A progress bar on a terminal, else a line every PLAIN_EVERY_S seconds."""

    def __init__(self, console: Console, total: int, bar: bool) -> None:
        self._console, self._total = console, total
        self.fields: Row = {}
        self._first: tuple[int, float] | None = None  # step and time of the first update, from which speed counts
        self._last_line = -PLAIN_EVERY_S
        self._bar: Progress | None = None
        if bar and console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(None), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=console, expand=True)
            self._task = self._bar.add_task("", total=total)

    def update(self, step: int) -> None:
        """Show a step and what is left of the run at the speed so far."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        done, elapsed = step - self._first[0], now - self._first[1]
        text = describe(self.fields, (self._total - step) * elapsed / done if done > 0 else None)
        if self._bar is not None:
            self._bar.start()  # a no-op when it runs
            self._bar.update(self._task, completed=step, description=text)
        elif self.fields and (now - self._last_line >= PLAIN_EVERY_S or step == self._total):
            self._last_line = now
            self._console.print(f"step {step}/{self._total}  {text}", markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()


def describe(fields: Row, seconds_left: float | None) -> str:
    """`loss 3.2145  12.3k tok/s  MFU 41.0 %  0:12:03 left`, of what there is."""
    parts = []
    if "loss" in fields:
        parts.append(f"loss {fields['loss']:.4f}")
    if "valid/loss" in fields:
        parts.append(f"valid {fields['valid/loss']:.4f}")
    if (rate := fields.get("tokens_per_s")) is not None:
        parts.append(f"{rate:,.0f} tok/s" if rate < 10_000 else f"{rate / 1000:,.1f}k tok/s")
    if (mfu := fields.get("mfu")) is not None:
        parts.append(f"MFU {100 * mfu:.1f} %")
    if seconds_left is not None:
        minutes, seconds = divmod(round(seconds_left), 60)
        parts.append(f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left")
    return "  ".join(parts)
