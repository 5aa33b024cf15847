"""What a run begins with: its loaders, its folder, its checkpoints, and what the newest of them says."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from cairn.cluster import Cluster
from cairn.config.load import load
from cairn.config.schema import RunConfig
from cairn.data.batches import Loader
from cairn.errors import UserError
from cairn.ops.precision import settled
from cairn.train.checkpoint import Checkpoint, CheckpointStore, steps_in
from cairn.train.engine import Engine
from cairn.train.folder import RunFolder
from cairn.train.lock import RunLock
from cairn.train.task import Engines, Task

C = TypeVar("C", bound=RunConfig)


def settled_config(config: C, cluster: Cluster) -> C:
    """COLLECTIVE: the config with what `engine.precision: auto` stands for: the precision of the run that the folder
    holds, as that one goes on in it, else what rank 0's machine is fast in.

    Raises UserError for a run folder whose config.yaml cannot be read.
    """
    if config.engine.precision != "auto":
        return config

    def precision() -> str:
        folder = RunFolder(config.run.dir, config.run.name)
        engine = load(type(config), folder.config).engine if folder.config.exists() else config.engine
        return settled(engine, cluster.device.type).precision

    engine = config.engine.model_copy(update={"precision": cluster.on_main(precision)})
    return config.model_copy(update={"engine": engine})


def open_loader(task: Task, split: str, config: RunConfig, cluster: Cluster) -> Loader:
    """The loader of "train" or "valid". Raises UserError for a batch that does not divide, or where nothing is."""
    section = config.train
    # evaluation has no global batch: it takes micro-batches until the samples are used up
    size = section.global_batch_size if split == "train" else section.micro_batch_size * cluster.world_size
    return Loader(task.samples(split), size, section.micro_batch_size, cluster.rank, cluster.world_size)


def open_folder(folder: RunFolder, config: RunConfig, cluster: Cluster) -> tuple[RunLock, CheckpointStore]:
    """COLLECTIVE: the run folder, locked by the main rank, and its checkpoints.

    Raises UserError when it is in use, of another config, or holds checkpoints that must not be resumed.
    """
    lock = RunLock(folder.path)

    def make() -> None:
        lock.acquire()
        if not config.checkpoint.resume and (steps := steps_in(folder.checkpoints)):
            raise UserError(
                f"checkpoint.resume is false, but {folder.path} holds a checkpoint of step {steps[-1]}: "
                "choose another run.name, or remove that folder"
            )
        folder.create(config)

    def store() -> CheckpointStore:
        section = config.checkpoint
        keep = section.keep_last, section.keep_every
        return CheckpointStore(folder.checkpoints, cluster.rank, cluster.world_size, *keep, section.background)

    try:
        cluster.on_main(make)
        return lock, cluster.on_all(store)
    except UserError:
        lock.release()
        raise


def newest_checkpoint(store: CheckpointStore, task: Task, cluster: Cluster) -> Checkpoint | None:
    """COLLECTIVE: the newest good one: rank 0 checks it and what it was trained on, every rank opens it.

    Raises UserError when that is not what the task trains on, or no checkpoint is good.
    """

    def step_of_latest() -> int | None:
        checkpoint = store.latest()
        if checkpoint is None:
            return None
        for key, value in task.identity().items():
            saved = checkpoint.state["identity"].get(key)
            if saved is not None and saved != value:  # an imported run has met no corpus yet
                raise UserError(
                    f"{store.root.parent}: the {key} is not the one this run was trained with "
                    f"({value[:12]} now, {str(saved)[:12]} then): restore it, or choose another run.name"
                )
        return checkpoint.step

    step = cluster.on_main(step_of_latest)
    return None if step is None else cluster.on_all(lambda: store.open(step))


def build_engines(task: Task, config: RunConfig, cluster: Cluster) -> tuple[dict[str, Engine], dict[str, int]]:
    """COLLECTIVE: the task's models in their engines, and their numbers of parameters, both by name."""
    torch.manual_seed(config.seed)
    models, micro = task.models(), config.train.micro_batch_size
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    return {
        name: Engine(model, config.engine, config.optim, micro, cluster, name) for name, model in models.items()
    }, sizes


def restore(engines: Engines, checkpoint: Checkpoint) -> None:
    """COLLECTIVE: bring the engines to where they were when the checkpoint was written."""
    for name, engine in engines.items():
        engine.load(_of(name, checkpoint))
        engine.load_scalars(checkpoint.state["engines"][name])


def _of(name: str, checkpoint: Checkpoint) -> Callable[[str], Tensor | None]:
    return lambda key: checkpoint.read(f"{name}/{key}")
