"""Short runs of a recipe for tests."""

from pathlib import Path

from cairn.cluster import Cluster
from cairn.config.load import load
from cairn.config.schema import GANConfig, VisionConfig
from cairn.train.folder import parse_rows
from cairn.train.trainer import train
from recipes.gan.dcgan import DCGAN
from recipes.vision.vit import ViTClassifier

RECIPES = {
    "vit": (ViTClassifier, VisionConfig, Path("configs/vision/vit-digits.yaml")),
    "dcgan": (DCGAN, GANConfig, Path("configs/gan/dcgan-digits.yaml")),
}
SHORT = ("train.global_batch_size=16", "train.micro_batch_size=8", "track.progress=false", "checkpoint.keep_every=0")


def run(name: str, folder: str, *overrides: str) -> list[dict[str, float]]:
    """Train the shipped config with overrides in runs folder `folder`; the rows of metrics.jsonl."""
    task, schema, path = RECIPES[name]
    config = load(schema, path, [*SHORT, f"run.dir={folder}", *overrides])
    cluster = Cluster.from_env()
    with cluster.init():
        outcome = train(task(config), config, cluster)
    cluster.barrier()
    return list(parse_rows(outcome.folder.metrics))


def several(rank: int, folder: str, runs: list[tuple[str, list[str]]]) -> list[list[float]]:
    """The losses of each of several runs, for tests.train.dist.run_distributed."""
    out = []
    for i, (name, overrides) in enumerate(runs):
        rows = run(name, folder, f"run.name=run-{i}", *overrides)
        out.append([row["loss"] for row in rows if "loss" in row])
    return out
