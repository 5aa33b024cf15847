"""`python -m recipes.vision CONFIG [section.key=value ...]`, alone, under torchrun or under srun."""

import sys

from cairn.config.main import read_args, run_main
from cairn.config.schema import VisionConfig


def main() -> None:
    """Train a classifier, print its held-out accuracy, draw what it says of held-out images."""
    config = read_args(VisionConfig, sys.argv[1:])

    from cairn.cluster import Cluster
    from cairn.train.trainer import train
    from recipes.vision.vit import ViTClassifier

    tasks = {"vit": ViTClassifier}
    cluster = Cluster.from_env()
    with cluster.init():
        task = tasks[config.model.name](config)
        outcome = train(task, config, cluster)
        if cluster.is_main:
            print(outcome.summary())
            if not outcome.stopped_by:
                print(task.report(outcome.folder, outcome.step))


if __name__ == "__main__":
    run_main(main)
