"""`python -m recipes.vision CONFIG [section.key=value ...]`, alone, under torchrun or under srun."""

from typing import TYPE_CHECKING

from cairn.config.main import run_main
from cairn.config.schema import VisionConfig
from recipes.run import run

if TYPE_CHECKING:
    from recipes.vision.vit import ViTClassifier


def main() -> None:
    """Train a classifier, print its held-out accuracy, draw what it says of held-out images."""
    run(VisionConfig, make)


def make(config: VisionConfig) -> "ViTClassifier":
    """The task that model.name names."""
    from recipes.vision.vit import ViTClassifier

    tasks = {"vit": ViTClassifier}
    return tasks[config.model.name](config)


if __name__ == "__main__":
    run_main(main)
