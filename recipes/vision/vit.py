"""A vision transformer (arXiv 2010.11929) on digits: patches in, the blocks of the language models, a class out."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cairn.config.model import TransformerSection
from cairn.config.recipes import ViTSection
from cairn.config.schema import VisionConfig
from cairn.data.batches import IGNORE, Batch, Samples
from cairn.errors import UserError
from cairn.models.layers import Norm
from cairn.models.transformer import Block, Context
from cairn.ops.masks import Mask
from cairn.train.checkpoint import Checkpoint, folder_of
from cairn.train.engine import Engine
from cairn.train.folder import RunFolder
from cairn.train.run import load_weights
from cairn.train.task import Engines, LossTask, evaluating, sum_over_ranks
from recipes.digits import N_CLASS, SIZE, Digits, Images, fingerprint, split


class PatchEmbedding(nn.Module):
    """A class token, then a vector for each square patch, each with its learned position."""

    def __init__(self, patch_size: int, n_patch: int, d_model: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, d_model, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, d_model))
        self.position = nn.Parameter(torch.zeros(n_patch + 1, d_model))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, 1 + patches, D)."""
        patches = self.patch(images.to(self.position.dtype)).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1) + self.position


class ViT(nn.Module):
    """Logits (B, 10) from images (B, 1, 8, 8)."""

    def __init__(self, section: ViTSection) -> None:
        super().__init__()
        n_patch = (SIZE // section.patch_size) ** 2
        self.core = TransformerSection(
            n_layer=section.n_layer,
            n_head=section.n_head,
            d_model=section.d_model,
            max_seq_len=n_patch + 1,
            dropout=section.dropout,
        )
        self.embed = PatchEmbedding(section.patch_size, n_patch, section.d_model)
        self.blocks = nn.ModuleList(Block(self.core, i) for i in range(section.n_layer))
        self.final_norm = Norm(section.d_model, self.core)
        self.head = nn.Linear(section.d_model, N_CLASS)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # By the width, which is small here: 0.02 suits models ten times wider.
                nn.init.normal_(parameter, std=section.d_model**-0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """Classify by what the class token has become."""
        x = F.dropout(self.embed(images), self.core.dropout, self.training)
        context = Context(mask=Mask(), bias=None, rope=None, cache=None)
        for block in self.blocks:
            x = block(x, context)
        return self.head(self.final_norm(x[:, 0]))  # type: ignore[no-any-return]


class ViTClassifier(LossTask):
    """The task: cross-entropy on digits moved by up to a pixel."""

    def __init__(self, config: VisionConfig) -> None:
        if SIZE % config.model.patch_size:
            raise UserError(
                f"model.patch_size {config.model.patch_size} does not divide the images' side, {SIZE} pixels"
            )
        self.config = config

    def models(self) -> dict[str, nn.Module]:
        """The one network."""
        return {"model": ViT(self.config.model)}

    def samples(self, split: str) -> Samples:
        """Digits; training ones are moved."""
        return Digits(self.config.data, split, self.config.seed, shift=1)

    def weights(self, batch: Batch) -> dict[str, float]:
        """Images that have a class."""
        return {"class": float((batch["labels"] != IGNORE).sum())}

    def loss_sums(self, model: nn.Module | Engine, batch: Batch) -> dict[str, Tensor]:
        """Negative log likelihood of the classes, in nats."""
        logits = model(batch["image"]).float()
        return {"class": F.cross_entropy(logits, batch["labels"], ignore_index=IGNORE, reduction="sum")}

    def evaluate(self, engines: Engines, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean loss, and the share of images classified right."""
        (engine,) = engines.values()
        sums = {"loss": 0.0, "accuracy": 0.0, "images": 0.0}
        with evaluating(engine):
            for batch in batches:
                labels = batch["labels"].to(engine.device)
                logits = engine(batch["image"].to(engine.device)).float()
                sums["loss"] += F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").item()
                sums["accuracy"] += float((logits.argmax(1) == labels).sum())
                sums["images"] += self.weights(batch)["class"]
        totals = sum_over_ranks(sums)
        return {name: totals[name] / totals["images"] for name in ("loss", "accuracy")}

    def identity(self) -> dict[str, str]:
        """The training images."""
        return {"data": fingerprint(self.config.data)}

    @property
    def tokens_per_sample(self) -> int:
        """Patches, and the class token."""
        return (SIZE // self.config.model.patch_size) ** 2 + 1

    @property
    def flops_per_sample(self) -> float:
        """Of an image, forward and backward: 6 for each weight of a block and each token, and attention."""
        section, n = self.config.model, self.tokens_per_sample
        return section.n_layer * (6 * 12 * section.d_model**2 * n + 12 * section.d_model * n * n)

    def report(self, folder: RunFolder, step: int) -> str:
        """Draw predictions.png by the checkpoint of a step, and say how many held-out images are right."""
        images, labels = split(self.config.data, "valid")
        model = ViT(self.config.model).eval()
        load_weights(model, Checkpoint(folder_of(folder.checkpoints, step)))
        with torch.no_grad():
            predicted = model(torch.from_numpy(images)).argmax(1).numpy()
        path = folder.path / "predictions.png"
        draw_predictions(images, labels, predicted, path)
        right = int((predicted == labels).sum())
        return (
            f"accuracy    {right / len(labels):.1%} of held-out digits ({right} of {len(labels)})\npicture     {path}"
        )


def draw_predictions(images: Images, labels: np.ndarray, predicted: np.ndarray, path: Path, n: int = 60) -> None:
    """A grid of n images with their predicted classes: the mistakes first and in red, then the others."""
    from matplotlib.figure import Figure

    order = np.argsort(predicted == labels, kind="stable")[:n]
    figure = Figure(figsize=(12, n / 12 * 1.25), layout="constrained")
    for ax, i in zip(figure.subplots(-(-n // 12), 12).flat, order, strict=False):
        wrong = predicted[i] != labels[i]
        ax.imshow(images[i, 0], cmap="gray")
        ax.set_title(
            f"{predicted[i]}, is {labels[i]}" if wrong else str(predicted[i]), color="red" if wrong else "black"
        )
        ax.set_axis_off()
    mistakes = int((predicted != labels).sum())
    figure.suptitle(f"held-out digits and what the model takes them for: {mistakes} mistakes in {len(labels)}")
    figure.savefig(path, dpi=100)
