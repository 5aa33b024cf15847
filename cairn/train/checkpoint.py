"""Checkpoints that know no topology: safetensors by tensor name, JSON for the rest, checksummed, renamed in one step.

    checkpoints/step-00001000/
        state.json                  step, the caller's state, and of every file its size, sha256 and tensor names
        rank-00000-000.safetensors  what rank 0 owned, in pieces
        rank-00001-000.safetensors  ...

Every rank writes the tensors it owns into `.tmp-step-00001000`, then a small JSON that says it is done; rank 0 waits
for all of these (files are the rendezvous, so that no collective runs in a thread), writes state.json and renames the
folder. A folder without the `.tmp-` is therefore whole; its checksums tell whether it still is.

A rank that cannot write leaves `rank-00001.failed` there, and the others give up at once. No rank raises in `save`,
where the others may be gathering tensors with it: `trouble` tells the loop, which stops all ranks together.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cairn.errors import QuietError, UserError
from cairn.train import parts
from cairn.train.folder import disk_errors, free_name, fsync_folder, write_atomically
from cairn.train.tensorfile import Damaged, check_space, verify

Tensors = Iterable[tuple[str, Tensor]]
Wait = Callable[[], None]
FORMAT = 1
STATE = "state.json"


class Checkpoint:
    """One checkpoint, memory-mapped: a tensor costs memory only once it is read.

    All files are opened at once, so pruning the folder meanwhile does no harm.
    """

    def __init__(self, path: Path, verified: bool = False) -> None:
        """Raises Damaged when a file is missing, cut or (with `verified`) altered."""
        self.path = path
        document = _read_state(path / STATE)
        files: dict[str, dict[str, Any]] = document["files"]
        if verified:
            with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
                list(pool.map(lambda item: verify(path / item[0], item[1]), files.items()))
        self.step: int = document["step"]
        self.world_size: int = document["world_size"]
        self.state: dict[str, Any] = document["state"]
        self._handles: dict[str, Any] = {}  # tensor name -> open file
        for name, entry in files.items():
            try:
                handle = safe_open(path / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise Damaged(f"{path / name}: {error}") from error
            self._handles.update(dict.fromkeys(entry["tensors"], handle))

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._handles)

    def read(self, name: str) -> Tensor | None:
        """The tensor on the CPU, or None when the checkpoint has none of that name."""
        handle = self._handles.get(name)
        return None if handle is None else handle.get_tensor(name)


def steps_in(root: Path) -> list[int]:
    """Steps of the checkpoints in a folder, oldest first."""
    return sorted(int(path.name.removeprefix("step-")) for path in root.glob("step-*") if path.name[5:].isdigit())


def folder_of(root: Path, step: int) -> Path:
    """Folder of a step's checkpoint."""
    return root / f"step-{step:08d}"


def newest(root: Path, verified: bool = True) -> tuple[Checkpoint | None, list[Path]]:
    """The newest good checkpoint in a folder, and the damaged ones passed over, each named by a printed line.

    Raises UserError when there are checkpoints and none is good: starting over in silence would be worse.
    """
    damaged: list[Path] = []
    for step in reversed(steps_in(root)):
        try:
            return Checkpoint(folder_of(root, step), verified), damaged
        except Damaged as error:
            damaged.append(folder_of(root, step))
            print(f"warning: damaged checkpoint: {error}; trying the one before it", flush=True)
    if damaged:
        raise UserError(f"every checkpoint in {root} is damaged: restore one, or start afresh with another run.name")
    return None, []


class CheckpointStore:
    """The checkpoints of one run. A context manager: leaving it waits for the last write."""

    def __init__(
        self,
        root: Path,
        rank: int = 0,
        world_size: int = 1,
        keep_last: int = 2,
        keep_every: int = 0,
        background: bool = False,
        patience_s: float = 1800.0,
    ) -> None:
        """Build on every rank before the first save: rank 0 clears away what a killed run left half written.

        `patience_s`: seconds that rank 0 waits for the other ranks' files. Raises UserError, on rank 0, when the folder
        cannot be made or cleared.
        """
        self.root, self.rank, self.world_size = root, rank, world_size
        self.keep_last, self.keep_every, self.patience_s = keep_last, keep_every, patience_s
        self.background = background
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[None] | None = None
        self._abandoned = threading.Event()
        self.last_step: int | None = None
        """Step of the last save."""
        self.best: int | None = None  # the step whose checkpoint is never pruned
        self.write_seconds = 0.0
        """What the last write took here, whether in the background or not."""
        if rank == 0:
            with disk_errors(str(root)):
                root.mkdir(parents=True, exist_ok=True)
                for stale in root.glob(".tmp-*"):
                    shutil.rmtree(stale)
                for replaced in root.glob(".replaced-*"):  # killed between the two renames of _publish
                    final = root / replaced.name.removeprefix(".replaced-")
                    shutil.rmtree(replaced) if final.exists() else replaced.rename(final)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._abandoned.set()
            if self._pool is not None:
                self._pool.shutdown()  # after an error too: the write under way may be the newest checkpoint
            if self.rank == 0:
                for given_up in self.root.glob(".tmp-*"):
                    shutil.rmtree(given_up, ignore_errors=True)

    def save(self, step: int, tensors: Tensors, state: dict[str, Any], filled: Wait = lambda: None) -> None:
        """Write a checkpoint; every rank calls this with the tensors it owns. Rank 0's state (JSON) is kept.

        `tensors` is always read to its end before this returns, so it may be a collective generator. They are written
        later when in the background, once `filled` has returned: nobody may change them any more. When a rank cannot
        write, `trouble` says so and the next `wait` raises; until then nothing more is written. Earlier ones stay.
        """
        self.last_step = step
        failed = self._settled()
        if failed is not None:
            deque(tensors, maxlen=0)
            with suppress(OSError):
                self._folder(step).mkdir(exist_ok=True)
            parts.withdraw(self._folder(step), self.rank, str(failed))
        elif self._pool is not None:
            snapshot = list(tensors)
            frozen = json.loads(json.dumps(state))  # the caller may change its state while we write
            self._pending = self._pool.submit(self._write, step, snapshot, frozen, filled)
        else:
            done: Future[None] = Future()
            rest = iter(tensors)
            try:
                self._write(step, rest, state, filled)
                done.set_result(None)
            except UserError as error:
                done.set_exception(error)
                deque(rest, maxlen=0)  # the other ranks are gathering them
            self._pending = done

    def trouble(self) -> UserError | None:
        """The error of a write that has failed, without waiting for one that is under way; ask at every step."""
        if self._pending is None or not self._pending.done():
            return None
        error = self._pending.exception()
        return error if isinstance(error, UserError) else None

    def wait(self) -> None:
        """Wait for this rank's write in the background, and raise its error if it had one (UserError: of the disk)."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _settled(self) -> UserError | None:
        """Wait for the write under way; its trouble, which stays for `trouble` to tell. Raises any other error."""
        if self._pending is not None and not isinstance(self._pending.exception(), UserError):
            self.wait()
        return self.trouble()

    def _folder(self, step: int) -> Path:
        """Where a step's checkpoint is written."""
        final = folder_of(self.root, step)
        return final.with_name(f".tmp-{final.name}")

    def latest(self, verify: bool = True) -> Checkpoint | None:
        """The newest good checkpoint, or None when there is none. For rank 0: it tells the others the step to open.

        Damaged newer ones are renamed to `damaged-step-...`, which keeps them for a look and out of the way.
        Raises UserError as `newest` does.
        """
        checkpoint, damaged = newest(self.root, verified=verify)
        for path in damaged:
            path.rename(free_name(path.with_name(f"damaged-{path.name}")))
        return checkpoint

    def open(self, step: int) -> Checkpoint:
        """The checkpoint of a step, unverified. Raises UserError when it is missing or unreadable."""
        try:
            return Checkpoint(folder_of(self.root, step))
        except Damaged as error:
            raise UserError(f"rank {self.rank} cannot open the checkpoint of step {step}: {error}") from error

    def _write(self, step: int, tensors: Tensors, state: dict[str, Any], filled: Wait) -> None:
        folder, start = self._folder(step), time.perf_counter()
        filled()
        try:
            self.root.mkdir(exist_ok=True)  # not its parents: a run folder that has gone has taken config.yaml along
            folder.mkdir(exist_ok=True)
            if self.rank == 0:
                check_space(folder, _size_of_last(self.root))
            parts.write(folder, self.rank, tensors)
            if self.rank == 0:
                self._publish(step, folder, folder_of(self.root, step), state)
            self.write_seconds = time.perf_counter() - start
        except OSError as error:
            if self.rank and isinstance(error, FileNotFoundError) and self.root.exists():
                raise QuietError(f"rank 0 gave up the checkpoint of step {step}, and says why") from error
            text = parts.describe(error, step, self.rank, self.root, folder)
            self._give_up(folder, text)
            raise UserError(text) from error
        except UserError as error:
            self._give_up(folder, str(error))
            raise

    def _give_up(self, folder: Path, text: str) -> None:
        """Free the space of what was written, rank 0 of all of it, and leave word of why for ranks that still write."""
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            if self.world_size == 1:
                return
            with suppress(OSError):
                folder.mkdir()
        parts.withdraw(folder, self.rank, text)

    def _publish(self, step: int, folder: Path, final: Path, state: dict[str, Any]) -> None:
        """Rank 0: wait for all ranks, write state.json, rename the folder, prune."""
        files = parts.gather(folder, step, self.world_size, self.patience_s, self._abandoned)
        names = [name for entry in files.values() for name in entry["tensors"]]
        if len(names) != len(set(names)):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"tensors owned by more than one rank: {', '.join(twice[:5])}")
        body = {"format": FORMAT, "step": step, "world_size": self.world_size, "state": state, "files": files}
        write_atomically(folder / STATE, json.dumps(body | {"sha256": _digest(body)}, indent=1).encode())
        parts.clear(folder, self.world_size)
        fsync_folder(folder)
        replaced = final.with_name(f".replaced-{final.name}")
        if final.exists():
            final.rename(replaced)
        folder.rename(final)
        fsync_folder(self.root)
        shutil.rmtree(replaced, ignore_errors=True)
        self._prune()

    def _prune(self) -> None:
        steps = steps_in(self.root)
        for step in steps[: -self.keep_last]:
            if step != self.best and (not self.keep_every or step % self.keep_every):
                # Renamed first, so that a kill halfway leaves no folder that looks like a damaged checkpoint.
                path = folder_of(self.root, step)
                doomed = path.rename(free_name(path.with_name(f".tmp-pruned-{path.name}")))
                shutil.rmtree(doomed, ignore_errors=True)


def _size_of_last(root: Path) -> int:
    """Bytes of the newest checkpoint, which the next one will need too; 0 when there is none."""
    try:
        files = _read_state(folder_of(root, steps_in(root)[-1]) / STATE)["files"]
    except (IndexError, Damaged):
        return 0
    return sum(entry["bytes"] for entry in files.values())


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read_state(path: Path) -> dict[str, Any]:
    try:
        body: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Damaged(f"{path}: {error}") from error
    if not isinstance(body, dict) or body.pop("sha256", None) != _digest(body):
        raise Damaged(f"{path}: its content does not match its sha256")
    if body["format"] != FORMAT:
        raise UserError(
            f"{path} has format {body['format']}, and this version reads {FORMAT}: use the one that wrote it"
        )
    return body
