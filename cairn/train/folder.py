"""The run folder: where everything a run leaves behind lives, and whether a config may go on in it."""

import errno
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cairn.config.load import dump, load
from cairn.config.schema import RunConfig
from cairn.errors import UserError

MAY_DIFFER = (
    "run",
    "engine.zero_stage",
    "engine.offload",
    "engine.activation_checkpointing",
    "engine.compile",
    "engine.deterministic",
    "engine.kernels",
    "engine.deepspeed",
    "track",
    "checkpoint",
    "guard",
    "select",
    "data.dir",
    "data.workers",
    "train.micro_batch_size",
    "train.max_hours",
    "train.log_every",
    "train.eval_every",
    "train.eval_samples",
)
"""Keys (with all below them) that decide how and where a run goes, and not what it computes."""


class RunFolder:
    """runs/NAME: config.yaml, metrics.jsonl, checkpoints/, tokenizer/, samples.jsonl, report.html, wandb/."""

    def __init__(self, *parts: str | Path) -> None:
        self.path = path = Path(*parts)
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.checkpoints = path / "checkpoints"
        self.tokenizer = path / "tokenizer"
        self.report = path / "report.html"

    def create(self, config: RunConfig) -> bool:
        """Make the folder, or check that this config may go on in it; config.yaml then holds the given one.

        Returns whether the folder held a run already. Only one rank calls this. Raises UserError listing the keys
        that differ, or when the folder cannot be made or written.
        """
        with disk_errors(f"run folder {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
        existed = self.config.exists()
        if existed and (changes := self.changes(config)):
            raise UserError(
                f"{self.path} holds a run with another config ({'; '.join(changes)}): "
                "choose another run.name, or put these keys back"
            )
        with disk_errors(str(self.config)):
            write_atomically(self.config, dump(config).encode())
        return existed

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, training steps and evaluations, in order. Raises UserError when there are none."""
        rows = list(parse_rows(self.metrics))
        if not rows:
            raise UserError(f"{self.path} has no rows in metrics.jsonl: is it a run folder, and has it taken a step?")
        return rows

    def last_evaluation(self) -> dict[str, float]:
        """Metrics of the newest evaluation, without its step; empty when there is none."""
        newest: dict[str, Any] = next(reversed(self.evaluations()), {})
        return {key: value for key, value in newest.items() if key != "step"}

    def was_evaluated(self, step: int) -> bool:
        """Whether there is an evaluation of a step."""
        return any(row["step"] == step for row in self.evaluations())

    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of evaluations, in order."""
        return [row for row in parse_rows(self.metrics) if any(key.startswith("valid/") for key in row)]

    def keep_tokenizer(self, save: Callable[[Path], None]) -> None:
        """Have `save` write the tokenizer, in one step, unless the folder has it: whoever reads the model needs it.

        Raises UserError when the folder cannot be written.
        """
        if not self.tokenizer.exists():
            temporary = self.tokenizer.with_name(".tokenizer.tmp")
            with disk_errors(str(self.tokenizer)):
                save(temporary)
                temporary.rename(self.tokenizer)

    def changes(self, config: RunConfig) -> list[str]:
        """Keys that may not differ and do. One that the version which wrote config.yaml had not yet has its default."""
        before = load(type(config), self.config)
        old, new = flatten(before.model_dump(mode="json")), flatten(config.model_dump(mode="json"))
        free = list(MAY_DIFFER)
        if config.schedule.name == "constant" and config.train.steps > before.train.steps:
            free.append("train.steps")  # the other schedules are stretched over them
        if before.engine.precision == "auto":
            free.append("engine.precision")  # of an imported run, which no machine has trained yet
        note = {"train.steps": " (it may grow only where schedule.name is constant)"}
        return [
            f"{key} was {old.get(key, 'unset')}, now {new.get(key, 'unset')}{note.get(key, '')}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not any(f"{key}.".startswith(f"{other}.") for other in free)
        ]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested config as {"section.key": value}; lists are values."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def parse_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl file, none where there is no file; null is nan. Passed over are lines that are none: a last
    one that a kill left half written, and zeros, which a node that went down may leave where its newest rows were."""
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            if not line.endswith("\n"):
                return
            try:
                row: dict[str, Any] = json.loads(line)
            except ValueError:
                continue
            yield {key: math.nan if value is None else value for key, value in row.items()}


def format_row(row: dict[str, Any]) -> str:
    """A row as a line. JSON knows no nan and no infinity: both become null, which pandas and jq read as well."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content: after a kill it holds the old or the new, never a part."""
    replace_content(path, content)
    fsync_folder(path.parent)


def replace_content(path: Path, content: bytes) -> None:
    """As write_atomically, but it is for others to see to it that the new content survives a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb", buffering=0) as file:  # a buffer would be written once more when the file is closed
            write_whole(file, content)
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk needs the room
        raise


def write_whole(file: io.FileIO, content: bytes | memoryview) -> None:
    """Write to an unbuffered file, which may take a part at a time."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Raise the OSError of what is done to a file or folder as a UserError, which begins with `what`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {explain(error)}") from error


def explain(error: OSError) -> str:
    """What is wrong with a file system, and what to do about it."""
    text = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{text}: free space there and run again"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{text}: make it writable, or set run.dir to a folder that is"
    if error.errno in (errno.ENOENT, errno.ESTALE):
        return "it vanished while the run was using it: put it back and run again, or choose another run.name"
    if error.errno == errno.EIO:
        return f"{text}: its disk or file server fails; move the run elsewhere (run.dir) and run again"
    return f"{text}; set run.dir to a folder that can be written"


def fsync_folder(path: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_name(path: Path) -> Path:
    """The path, or the first of path-2, path-3, ... that does not exist."""
    taken, count = path, 1
    while taken.exists():
        count += 1
        taken = path.with_name(f"{path.name}-{count}")
    return taken
