"""Metrics: metrics.jsonl is the truth; the terminal, wandb and TensorBoard mirror it. Only rank 0 writes."""

import io
import netrc
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self
from urllib.parse import urlparse

from cairn.config.train import TrackSection
from cairn.errors import UserError
from cairn.train.display import Display, Messages, Output, Row
from cairn.train.folder import RunFolder, disk_errors, format_row, parse_rows, write_atomically, write_whole


class Mirror(Protocol):
    """Where rows go besides metrics.jsonl. Its methods raise OSError when it cannot go on, which ends no run."""

    def rows(self, rows: Sequence[Row]) -> None: ...
    def close(self, failed: bool) -> None: ...


class Tracker:
    """Records rows {"step": ..., "loss": ...} of one run; does nothing on ranks other than the main one."""

    def __init__(
        self, folder: RunFolder, section: TrackSection, config: dict[str, Any], main: bool, steps: int
    ) -> None:
        """`steps`: length of the run, for the time left.

        Raises UserError when track.tensorboard is on and its extra is not installed. Later, when metrics.jsonl cannot
        be written, no method raises, as the other ranks would wait for this one: `trouble` tells the loop.
        """
        self._folder, self._section, self._main = folder, section, main
        self._file: io.FileIO | None = None
        self._trouble: UserError | None = None
        self._mirrors: list[Mirror] = []
        self._log: Messages | None = None
        self._console = Output()
        self._display = Display(self._console, steps, section.progress) if main else None
        if main and section.tensorboard:
            self._start("TensorBoard", lambda: TensorBoard(folder.path / "tensorboard"))
        if main and section.wandb != "off":
            self._start("wandb", lambda: self._wandb(config))

    def __enter__(self) -> Self:
        if self._main:
            self._log = Messages(self.message)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close(failed=kind is not None)
        if kind is None and self._trouble is not None:
            raise self._trouble

    def trouble(self) -> UserError | None:
        """Why rows have not reached metrics.jsonl; ask at every step. Leaving the context raises it."""
        return self._trouble

    def truncate(self, step: int) -> None:
        """Drop rows after `step`, and a last line that a kill left half written. Call before the first rows.

        wandb keeps what it was sent and gets the steps since again: with the same x and, as a resumed run is exact,
        the same losses. TensorBoard hides what lies after `step`.
        """
        if not self._main:
            return
        self._mirrored(lambda mirror: mirror.restart(step + 1) if isinstance(mirror, TensorBoard) else None)
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._folder.metrics.exists():
            with self._recording():
                lines = (format_row(row) for row in parse_rows(self._folder.metrics) if row["step"] <= step)
                write_atomically(self._folder.metrics, "".join(lines).encode())

    def rows(self, rows: Sequence[Row]) -> None:
        """Append rows, in order of step, in one write."""
        if not self._main or not rows or self._trouble is not None:
            return
        with self._recording():
            if self._file is None:
                self._file = self._folder.metrics.open("ab", buffering=0)
            write_whole(self._file, "".join(format_row(row) for row in rows).encode())
        self._mirrored(lambda mirror: mirror.rows(rows))
        if self._display is not None:
            for row in rows:
                self._display.fields |= row

    def sync(self) -> None:
        """Bring the rows to disk; call before each checkpoint, so that none outlives its rows."""
        if self._file is not None:
            with self._recording():
                os.fsync(self._file.fileno())
                self._folder.metrics.stat()  # a file that was removed takes what is written to it along

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Keep the first error of writing metrics.jsonl as `trouble`."""
        try:
            with disk_errors(str(self._folder.metrics)):
                yield
        except UserError as error:
            self._trouble = self._trouble or error

    def _mirrored(self, do: Callable[[Mirror], None]) -> None:
        """Do something to each mirror, and go on without one that cannot."""
        for mirror in list(self._mirrors):
            try:
                do(mirror)
            except OSError as error:
                self._mirrors.remove(mirror)
                self.message(f"warning: {type(mirror).__name__} failed, going on without it: {error}")

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
        self._mirrored(lambda mirror: mirror.close(failed))
        self._mirrors.clear()

    def _start(self, name: str, make: "Callable[[], Mirror]") -> None:
        try:
            self._mirrors.append(make())
        except OSError as error:
            self.message(f"warning: {name} did not start, going on without it: {error}")

    def _wandb(self, config: dict[str, Any]) -> "Wandb":
        online = self._section.wandb != "offline" and has_wandb_key()
        if self._section.wandb == "online" and not online:
            self.message(
                "warning: track.wandb=online but no key was found: recording offline (`wandb login` makes one)"
            )
        started = Wandb(self._folder, self._section.project, config, "online" if online else "offline")
        self.message(f"wandb: {started.where}")
        return started


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
        import wandb  # 0.5 s

        id_file = folder.path / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        # Of the machine and the command only what cannot hold a secret: no arguments, no code, no URL of a git remote.
        settings = wandb.Settings(
            init_timeout=30,
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            x_disable_meta=True,
        )
        with _as_os_error():
            self._run = wandb.init(
                project=project,
                name=folder.path.name,
                id=id_file.read_text().strip(),
                resume="allow" if mode == "online" else None,  # offline there is nothing to ask, and it warns
                dir=folder.path,
                config=config,
                mode=mode,
                settings=settings,
            )
            self._run.define_metric("*", step_metric="step")
        sync = f"offline in {self._run.settings.sync_dir} (`wandb sync` sends it)"
        self.where = self._run.url if mode == "online" else sync

    def rows(self, rows: Sequence[Row]) -> None:
        """Send rows."""
        with _as_os_error():
            for row in rows:
                self._run.log(row)

    def close(self, failed: bool) -> None:
        """Finish the run there."""
        with _as_os_error():
            self._run.finish(exit_code=int(failed))


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Raise wandb's own errors as what a Mirror raises."""
    import wandb

    try:
        yield
    except wandb.Error as error:
        raise OSError(str(error)) from error


def has_wandb_key() -> bool:
    """Whether wandb would log in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return host in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False
