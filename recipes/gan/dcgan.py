"""DCGAN (arXiv 1511.06434) on digits: two models, two engines, one trainer.

GroupNorm stands where the paper has BatchNorm: batch statistics would make the gradient depend on how a batch is cut
into ranks and micro-batches, and a run could not go on elsewhere with the same losses.
"""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cairn.config.recipes import DCGANSection
from cairn.config.schema import GANConfig
from cairn.data.batches import Batch, Item, Samples
from cairn.data.order import mix
from cairn.train.checkpoint import Checkpoint, folder_of, steps_in
from cairn.train.folder import RunFolder
from cairn.train.run import load_weights
from cairn.train.task import Engines, Metrics, evaluating, sum_over_ranks, to_device
from recipes.digits import SIZE, Digits, Images, fingerprint, split
from recipes.gan.measure import Measure

N_JUDGED = 512
"""Images generated for an evaluation."""
N_COLUMN = 16
"""Images in a row of the picture."""


class Generator(nn.Module):
    """Images (B, 1, 8, 8) in [-1, 1] from noise (B, d_latent)."""

    def __init__(self, section: DCGANSection) -> None:
        super().__init__()
        c = section.n_channel
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(section.d_latent, 4 * c, 2, bias=False),  # (B, 4c, 2, 2)
            nn.GroupNorm(4, 4 * c),
            nn.ReLU(),
            nn.ConvTranspose2d(4 * c, 2 * c, 4, stride=2, padding=1, bias=False),  # (B, 2c, 4, 4)
            nn.GroupNorm(4, 2 * c),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * c, c, 4, stride=2, padding=1, bias=False),  # (B, c, 8, 8)
            nn.GroupNorm(4, c),
            nn.ReLU(),
            nn.Conv2d(c, 1, 3, padding=1),
            nn.Tanh(),
        )
        self.apply(_init)

    def forward(self, noise: Tensor) -> Tensor:
        """Generate."""
        return self.layers(noise[:, :, None, None].to(next(self.parameters()).dtype))  # type: ignore[no-any-return]


class Discriminator(nn.Module):
    """Logits (B,), positive for real, of images (B, 1, 8, 8)."""

    def __init__(self, section: DCGANSection) -> None:
        super().__init__()
        c = section.n_channel
        self.layers = nn.Sequential(
            nn.Conv2d(1, c, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(c, 2 * c, 4, stride=2, padding=1, bias=False),  # (B, 2c, 4, 4)
            nn.GroupNorm(4, 2 * c),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * c, 4 * c, 4, stride=2, padding=1, bias=False),  # (B, 4c, 2, 2)
            nn.GroupNorm(4, 4 * c),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * c, 1, 2),
        )
        self.apply(_init)

    def forward(self, images: Tensor) -> Tensor:
        """Judge."""
        return self.layers(images.to(next(self.parameters()).dtype))[:, 0, 0, 0]  # type: ignore[no-any-return]


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, std=0.02)


class WithNoise:
    """Digits with the noise of two fakes beside each, "noise" (2, d_latent): one for each network's step.

    Noise in the sample makes it a pure function of (seed, k), so it is the same on every topology and after a resume.
    """

    def __init__(self, digits: Digits, d_latent: int) -> None:
        self.digits, self.d_latent = digits, d_latent

    def __len__(self) -> int:
        """Images of the split."""
        return len(self.digits)

    def item(self, k: int) -> Item:
        """Sample k."""
        noise = np.random.default_rng(mix(self.digits.seed, k, 1)).standard_normal((2, self.d_latent), np.float32)
        return self.digits.item(k) | {"noise": noise}


class DCGAN:
    """The task: the discriminator learns to tell real from generated, the generator to pass for real."""

    tokens_per_sample = SIZE * SIZE

    def __init__(self, config: GANConfig) -> None:
        self.config = config

    def models(self) -> dict[str, nn.Module]:
        """Both networks."""
        return {"generator": Generator(self.config.model), "discriminator": Discriminator(self.config.model)}

    def samples(self, split: str) -> Samples:
        """Digits with noise."""
        return WithNoise(Digits(self.config.data, split, self.config.seed), self.config.model.d_latent)

    def origin(self, index: int) -> list[str]:
        """Its number: images have no file of their own."""
        return [f"sample {index}"]

    def identity(self) -> dict[str, str]:
        """The training images."""
        return {"data": fingerprint(self.config.data)}

    @cached_property
    def flops_per_sample(self) -> float:
        """Of both networks' steps: a backward pass costs two forward ones, or one where weights need no gradient."""
        with FlopCounterMode(display=False) as generator:
            fake = Generator(self.config.model)(fixed_noise(1, self.config.model.d_latent))
        with FlopCounterMode(display=False) as discriminator:
            Discriminator(self.config.model)(fake)
        # Discriminator's step: one fake made, real and fake judged and learned from. Generator's: one more fake.
        return float(4 * generator.get_total_flops() + 8 * discriminator.get_total_flops())

    def step(self, engines: Engines, batches: list[Batch], lr_factor: float) -> Metrics:
        """One update of the discriminator, then one of the generator against it."""
        generator, discriminator = engines["generator"], engines["discriminator"]
        n = sum_over_ranks({"images": float(sum(len(batch["image"]) for batch in batches))})["images"]
        batches = [to_device(batch, generator.device) for batch in batches]
        metrics: Metrics = {}

        def backward(engine: str, loss: Tensor, i: int) -> None:
            engines[engine].backward(loss / n, last=i == len(batches) - 1)
            for name in (engine, "loss"):
                metrics[name] = metrics.get(name, 0.0) + loss.detach().float() / n

        for i, batch in enumerate(batches):
            with torch.no_grad():
                fake = generator(batch["noise"][:, 0])
            # Real and fake in one pass: each engine sees one forward for each backward.
            logits = discriminator(torch.cat([batch["image"].to(fake.dtype), fake])).float()
            real, faked = logits.chunk(2)
            backward("discriminator", F.softplus(-real).sum() + F.softplus(faked).sum(), i)
        discriminator.step(lr_factor)

        # The generator's gradient flows through the discriminator, which must not collect one of its own meanwhile.
        discriminator.module.requires_grad_(False)
        for i, batch in enumerate(batches):
            fake = generator(batch["noise"][:, 1])
            backward("generator", F.softplus(-discriminator.module(fake).float()).sum(), i)
        discriminator.module.requires_grad_(True)
        generator.step(lr_factor)
        return metrics

    def evaluate(self, engines: Engines, batches: Iterable[Batch]) -> dict[str, float]:
        """How much generated digits are like held-out ones (see Measure). Every rank makes the same images."""
        generator = engines["generator"]
        noise = fixed_noise(N_JUDGED, self.config.model.d_latent).to(generator.device)
        with evaluating(generator):
            fake = generator(noise)
        return self.measure(fake.float().cpu().numpy())

    def report(self, folder: RunFolder, step: int) -> str:
        """Draw samples.png by the checkpoints that the run kept up to a step, and say how real the last images are."""
        generator = Generator(self.config.model).eval()
        noise = fixed_noise(N_JUDGED, self.config.model.d_latent)
        shown = noise[:N_COLUMN]
        rows: dict[str, Images] = {}
        with torch.no_grad():
            for kept in (s for s in steps_in(folder.checkpoints) if s <= step):
                load_weights(generator, Checkpoint(folder_of(folder.checkpoints, kept)), "generator")
                rows[f"step {kept}"] = generator(shown).numpy()
            rows["a walk\nbetween four"] = generator(walk(shown[-4:], N_COLUMN)).numpy()
            made = self.measure(generator(noise).numpy())
        images, _ = split(self.config.data, "valid")
        rows["held-out\ndigits"] = images[:N_COLUMN]
        path = folder.path / "samples.png"
        draw_rows(rows, path)
        real = self.measure(images)
        lines = [f"{name:12}{made[name]:.3f} (held-out digits: {real[name]:.3f})" for name in made]
        return "\n".join([*lines, f"picture     {path}"])

    @cached_property
    def measure(self) -> Measure:
        """Judges by the training images."""
        return Measure(*split(self.config.data, "train"))


def fixed_noise(n: int, d_latent: int) -> Tensor:
    """The same noise (n, d_latent) always, to compare generators by."""
    return torch.randn(n, d_latent, generator=torch.Generator().manual_seed(0))


def walk(stops: Tensor, n: int) -> Tensor:
    """n points (n, d_latent) from the first of several noises (S, d_latent) through each to the last.

    Along circles, since Gaussian noise lies near a sphere and the generator knows nothing of what is inside.
    """
    place = torch.linspace(0, len(stops) - 1, n)
    start = place.long().clamp(max=len(stops) - 2)
    angle = (place - start)[:, None] * (np.pi / 2)
    return stops[start] * angle.cos() + stops[start + 1] * angle.sin()


def draw_rows(rows: dict[str, Images], path: Path) -> None:
    """A picture with one labelled row of images (N, 1, H, W) for each entry."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 0.75 * len(rows)), layout="constrained")
    for name, images, ax in zip(rows, rows.values(), figure.subplots(len(rows)), strict=True):
        # A margin of background on the right of each, since digits fill their frame.
        framed = np.pad(images[:, 0], ((0, 0), (0, 0), (0, 1)), constant_values=-1)
        ax.imshow(np.concatenate(list(framed), axis=1), cmap="gray", vmin=-1, vmax=1)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=100)
