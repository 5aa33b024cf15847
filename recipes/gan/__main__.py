"""`python -m recipes.gan CONFIG [section.key=value ...]`, alone, under torchrun or under srun."""

from typing import TYPE_CHECKING

from cairn.config.main import run_main
from cairn.config.schema import GANConfig
from recipes.run import run

if TYPE_CHECKING:
    from recipes.gan.dcgan import DCGAN


def main() -> None:
    """Train two networks, print how real the images look, draw them."""
    run(GANConfig, make)


def make(config: GANConfig) -> "DCGAN":
    """The task that model.name names."""
    from recipes.gan.dcgan import DCGAN

    tasks = {"dcgan": DCGAN}
    return tasks[config.model.name](config)


if __name__ == "__main__":
    run_main(main)
