"""Run a function on several processes that share a gloo group (for tests)."""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _child(rank: int, world_size: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",  # never asked for: the file store below brings the ranks together
    )
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", world_size), rank=rank, world_size=world_size
    )
    try:
        torch.save(fn(rank, *args), Path(folder) / f"result-{rank}")
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # the interpreter's own way out, with gloo's threads about, aborts once in a while
    except BaseException:  # noqa: BLE001 (whatever ends a rank must reach the parent)
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc(), encoding="utf-8")
        os._exit(1)  # the others may wait for this rank: leave at once, so that spawn ends them


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`fn(rank, *args)` on `world_size` new processes in one gloo group; its results, by rank.

    `fn` is a module-level function; arguments and results are what `pickle` and `torch.save` take (a result is read
    back with weights_only, so: tensors, numbers, strings, lists, tuples, dicts). One thread a process. The first
    error of any rank is raised here, with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(_child, args=(world_size, folder, fn, args), nprocs=world_size)  # type: ignore[no-untyped-call]
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            said = sorted(Path(folder).glob("error-*"), key=lambda p: p.stat().st_mtime)
            raise AssertionError("\n".join(f"{p.name}:\n{p.read_text()}" for p in said) or str(error)) from error
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=True) for rank in range(world_size)]
