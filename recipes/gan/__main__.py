"""`python -m recipes.gan CONFIG [section.key=value ...]`, alone, under torchrun or under srun."""

import sys

from cairn.config.main import read_args, run_main
from cairn.config.schema import GANConfig


def main() -> None:
    """Train two networks, print how real the images look, draw them."""
    config = read_args(GANConfig, sys.argv[1:])

    from cairn.cluster import Cluster
    from cairn.train.trainer import train
    from recipes.gan.dcgan import DCGAN

    tasks = {"dcgan": DCGAN}
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
