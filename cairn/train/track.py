"""Metrics: metrics.jsonl is the truth; the terminal, wandb and TensorBoard mirror it. Only rank 0 writes."""

import logging
import netrc
import os
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TextIO
from urllib.parse import urlparse

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from cairn.config.train import TrackSection
from cairn.errors import UserError
from cairn.train.folder import RunFolder, format_row, parse_rows

Row = dict[str, Any]
PLAIN_EVERY_S = 10.0  # seconds between two progress lines when the output is a file


class Mirror(Protocol):
    """Where rows go besides metrics.jsonl."""

    def rows(self, rows: Sequence[Row]) -> None: ...
    def close(self, failed: bool) -> None: ...


class Tracker:
    """Records rows {"step": ..., "loss": ...} of one run; does nothing on ranks other than the main one."""

    def __init__(
        self, folder: RunFolder, section: TrackSection, config: dict[str, Any], main: bool, steps: int
    ) -> None:
        """`steps`: length of the run, for the time left.

        Raises UserError when track.tensorboard is on and its extra is not installed.
        """
        self._folder, self._section, self._main = folder, section, main
        self._file: TextIO | None = None
        self._mirrors: list[Mirror] = []
        self._log: Messages | None = None
        self._console = Console(file=sys.stdout)
        self._display = Display(self._console, steps, section.progress) if main else None
        if main and section.tensorboard:
            self._mirrors.append(TensorBoard(folder.path / "tensorboard"))
        if main and section.wandb != "off" and (wandb := self._start_wandb(config)):
            self._mirrors.append(wandb)

    def __enter__(self) -> Self:
        if self._main:
            self._log = Messages(self.message)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close(failed=kind is not None)

    def truncate(self, step: int) -> None:
        """Drop rows after `step`, and a last line that a kill left half written. Call before the first rows.

        wandb keeps what it was sent and gets the steps since again: with the same x and, as a resumed run is exact,
        the same losses. TensorBoard hides what lies after `step`.
        """
        if not self._main:
            return
        for mirror in self._mirrors:
            if isinstance(mirror, TensorBoard):
                mirror.restart(step + 1)
        if not self._folder.metrics.exists():
            return
        temporary = self._folder.metrics.with_name(".metrics.jsonl.tmp")
        with temporary.open("w", encoding="utf-8") as kept:
            kept.writelines(format_row(row) for row in parse_rows(self._folder.metrics) if row["step"] <= step)
            kept.flush()
            os.fsync(kept.fileno())
        temporary.replace(self._folder.metrics)

    def rows(self, rows: Sequence[Row]) -> None:
        """Append rows, in order of step, in one write."""
        if not self._main or not rows:
            return
        if self._file is None:
            self._file = self._folder.metrics.open("a", encoding="utf-8")
        self._file.write("".join(format_row(row) for row in rows))
        self._file.flush()
        for mirror in self._mirrors:
            mirror.rows(rows)
        if self._display is not None:
            for row in rows:
                self._display.fields |= row

    def sync(self) -> None:
        """Bring the rows to disk; call before each checkpoint, so that none outlives its rows."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def progress(self, step: int, fields: Row) -> None:
        """Show a step done, with the newest loss, tokens_per_s and mfu of the rows so far and of `fields`."""
        if self._display is not None:
            self._display.fields |= fields
            self._display.update(step)

    def message(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self._main:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self, failed: bool = False) -> None:
        """End the progress bar, the messages and the mirrors."""
        if self._log is not None:
            self._log.close()
        if self._display is not None:
            self._display.close()
        if self._file is not None:
            self._file.close()
            self._file = None
        while self._mirrors:
            self._mirrors.pop().close(failed)

    def _start_wandb(self, config: dict[str, Any]) -> "Wandb | None":
        import wandb  # 0.5 s

        online = self._section.wandb != "offline" and _has_wandb_key()
        if self._section.wandb == "online" and not online:
            self.message(
                "warning: track.wandb=online but no key was found: recording offline (`wandb login` makes one)"
            )
        try:
            started = Wandb(self._folder, self._section.project, config, "online" if online else "offline")
        except (wandb.Error, OSError) as error:
            self.message(f"warning: wandb did not start, going on without it: {error}")
            return None
        self.message(f"wandb: {started.where}")
        return started


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
        text = describe(self.fields, (self._total - step) * elapsed / done if done else None)
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


class TensorBoard:
    """Events for TensorBoard, in the run folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.restart(None)

    def restart(self, purge_step: int | None) -> None:
        """Write to a new file from here; events at purge_step and later of earlier files are hidden."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "track.tensorboard=true needs the extra `tensorboard`: pip install 'cairn[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(self._path, purge_step=purge_step)

    def rows(self, rows: Sequence[Row]) -> None:
        """Write the numbers of rows."""
        for row in rows:
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(key, value, row["step"])

    def close(self, failed: bool) -> None:
        """Flush and close."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; its id is kept in the run folder, so that a resumed run is the same run there.

    `step` is the x axis of every metric (not wandb's own counter, which refuses to go back after a resume). Offline,
    every start writes a folder of its own under wandb/, all with the one id: `wandb sync --append` joins them.
    """

    def __init__(
        self, folder: RunFolder, project: str, config: dict[str, Any], mode: Literal["online", "offline"]
    ) -> None:
        import wandb

        id_file = folder.path / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=project,
            name=folder.path.name,
            id=id_file.read_text().strip(),
            resume="allow" if mode == "online" else None,  # offline there is nothing to ask, and it warns
            dir=folder.path,
            config=config,
            mode=mode,
            settings=wandb.Settings(init_timeout=30, silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="step")
        sync = f"offline in {self._run.settings.sync_dir} (`wandb sync` sends it)"
        self.where = self._run.url if mode == "online" else sync

    def rows(self, rows: Sequence[Row]) -> None:
        """Send rows."""
        for row in rows:
            self._run.log(row)

    def close(self, failed: bool) -> None:
        """Finish the run there."""
        self._run.finish(exit_code=int(failed))


def _has_wandb_key() -> bool:
    """Whether wandb would log in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return host in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False
