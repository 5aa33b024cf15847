"""The parts of a checkpoint that is being written: each rank's files, and how rank 0 learns that they are there.

rank-00001-000.safetensors   tensors of rank 1, in pieces
rank-00001.json              it has written all of them: their entries in state.json
rank-00001.failed            it could not, and why
"""

import errno
import json
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from cairn.errors import UserError
from cairn.train.folder import explain, replace_content, write_atomically
from cairn.train.tensorfile import pieces, write_tensors

LAST_PATIENCE_S = 5.0  # for the other ranks' files once this rank has failed


def write(folder: Path, rank: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a rank's part. Raises OSError, or UserError with the word of a rank that has failed meanwhile."""
    entries: dict[str, dict[str, Any]] = {}
    for index, piece in enumerate(pieces(tensors)):
        _listen(folder)
        name = f"rank-{rank:05d}-{index:03d}.safetensors"
        entries[name] = write_tensors(folder / name, piece)
    _listen(folder)
    # Rank 0 syncs the folder. It may have renamed it once the report is there, so nothing can be done in it after that.
    replace_content(_report(folder, rank), json.dumps(entries).encode())


def withdraw(folder: Path, rank: int, text: str) -> None:
    """Take back what a rank has written, which frees space, and leave word of why.

    On a full disk the word may be an empty file; on a broken one there is none, and rank 0 learns it from the loop.
    """
    for path in folder.glob(f"rank-{rank:05d}*"):
        with suppress(OSError):
            path.unlink()
    word = folder / f"rank-{rank:05d}.failed"
    with suppress(OSError):
        try:
            write_atomically(word, text.encode())
        except OSError:
            word.touch()


def gather(
    folder: Path, step: int, world_size: int, patience_s: float, abandoned: threading.Event
) -> dict[str, dict[str, Any]]:
    """For rank 0, whose part is written: wait for the others' and return all entries of state.json.

    `abandoned`: set when the run fails, after which the others have LAST_PATIENCE_S. Raises UserError with the word of
    a rank that failed, or naming those that did not write; OSError when the folder has gone.
    """
    deadline = time.monotonic() + patience_s
    pause = 0.005
    while missing := [rank for rank in range(world_size) if not _report(folder, rank).exists()]:
        _listen(folder)
        if 0 in missing:
            raise FileNotFoundError(errno.ENOENT, "removed", str(folder))
        if abandoned.is_set():  # the others may have died of the same error
            deadline = min(deadline, time.monotonic() + LAST_PATIENCE_S)
        if time.monotonic() > deadline:
            raise UserError(
                f"ranks {missing} did not write their part of the checkpoint of step {step} into {folder} within "
                f"{patience_s:.0f} s: see their output; run.dir must be a folder that all nodes share"
            )
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    files: dict[str, dict[str, Any]] = {}
    for rank in range(world_size):
        files |= json.loads(_report(folder, rank).read_bytes())
    return files


def clear(folder: Path, world_size: int) -> None:
    """Remove the reports, once state.json says what is there."""
    for rank in range(world_size):
        _report(folder, rank).unlink()


def describe(error: OSError, step: int, rank: int, root: Path, folder: Path) -> str:
    """What a user is told of an error while the checkpoint of a step was written into `folder`, below `root`."""
    if error.errno in (errno.ENOENT, errno.ESTALE):
        gone = next((path for path in (root.parent, root, folder) if not path.exists()), error.filename)
        return (
            f"{gone} vanished while the checkpoint of step {step} was written (rank {rank}): put it back, or choose "
            "another run.name; the same command goes on from the newest checkpoint that is left"
        )
    fewer = " (a lower checkpoint.keep_last keeps fewer)" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    text = f"checkpoint of step {step} in {root} (rank {rank}): {explain(error)}"
    return f"{text}; earlier checkpoints are intact{fewer}"


def _listen(folder: Path) -> None:
    """Raise UserError with the word of a rank that failed, if one did."""
    for word in sorted(folder.glob("rank-*.failed"))[:1]:
        raise UserError(word.read_text(encoding="utf-8") or f"{word.stem} could not write into {folder}")


def _report(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"
