"""The DCGAN recipe: two engines through the one trainer."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cairn.config.load import load
from cairn.config.schema import GANConfig
from cairn.train.folder import RunFolder
from recipes.digits import split
from recipes.gan.dcgan import DCGAN, Discriminator, Generator, fixed_noise, walk
from recipes.gan.measure import Measure
from tests.recipes.runs import RECIPES, run, several
from tests.train.dist import run_distributed

SMALL = ["model.n_channel=4", "model.d_latent=8"]
CONFIG = GANConfig()


def test_shapes_and_range() -> None:
    noise = fixed_noise(5, CONFIG.model.d_latent)
    images = Generator(CONFIG.model)(noise)
    assert images.shape == (5, 1, 8, 8)
    assert images.abs().max() <= 1
    assert Discriminator(CONFIG.model)(images).shape == (5,)


def test_images_do_not_depend_on_their_batch() -> None:
    generator, noise = Generator(CONFIG.model), fixed_noise(6, CONFIG.model.d_latent)
    torch.testing.assert_close(generator(noise)[:2], generator(noise[:2]))


def test_noise_is_pure_and_differs_between_samples_and_steps() -> None:
    task = DCGAN(CONFIG)
    one, other = task.samples("train").item(7)["noise"], task.samples("train").item(8)["noise"]
    assert np.array_equal(one, DCGAN(CONFIG).samples("train").item(7)["noise"])
    assert not np.array_equal(one, other)
    assert not np.array_equal(one[0], one[1])
    assert not np.array_equal(one, DCGAN(GANConfig(seed=1)).samples("train").item(7)["noise"])


def test_each_step_updates_its_own_network() -> None:
    class Plain:
        """What the task asks of an engine, in plain PyTorch; keeps the gradient it steps by."""

        def __init__(self, module: torch.nn.Module) -> None:
            self.module, self.device, self.gradients = module, torch.device("cpu"), []

        def __call__(self, *args: torch.Tensor) -> torch.Tensor:
            return self.module(*args)

        def backward(self, loss: torch.Tensor, last: bool) -> None:
            loss.backward()

        def step(self, lr_factor: float) -> None:
            self.gradients.append([p.grad.clone() for p in self.module.parameters()])
            self.module.zero_grad()

    def gradients(cuts: list[int]) -> tuple[dict[str, list[torch.Tensor]], dict[str, torch.Tensor]]:
        task = DCGAN(CONFIG)
        torch.manual_seed(0)
        engines = {name: Plain(model) for name, model in task.models().items()}
        samples = task.samples("train")
        items = [samples.item(k) for k in range(8)]
        batches = [
            {key: torch.from_numpy(np.stack([item[key] for item in part])) for key in items[0]}
            for part in np.split(np.array(items), cuts)
        ]
        metrics = task.step(engines, batches, 1.0)  # type: ignore[arg-type]
        assert all(p.requires_grad and p.grad is None for p in engines["discriminator"].module.parameters())
        assert all(len(engine.gradients) == 1 for engine in engines.values())
        return {name: engine.gradients[0] for name, engine in engines.items()}, metrics

    whole, metrics = gradients([])
    parts, same = gradients([2, 5])
    for name in whole:
        assert all(gradient.abs().max() > 0 for gradient in whole[name])
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(same, metrics)
    assert metrics["loss"] == metrics["generator"] + metrics["discriminator"]


def test_resume_is_exact_and_draws_every_kept_step(tmp_path: Path) -> None:
    keys = ["train.steps=8", "checkpoint.every=4", "checkpoint.keep_every=4", "run.name=gan", *SMALL]
    straight = run("dcgan", str(tmp_path), *keys)
    (tmp_path / "gan/checkpoints/step-00000008").rename(tmp_path / "gone")
    again = run("dcgan", str(tmp_path), *keys)
    names = ("generator", "discriminator", "grad_norm/generator", "grad_norm/discriminator")
    losses = [[row[name] for name in names] for row in straight if "loss" in row]
    assert len(losses) == 8
    assert [[row[name] for name in names] for row in again if "loss" in row] == losses
    folder = RunFolder(tmp_path / "gan")
    said = DCGAN(load(GANConfig, folder.config, [])).report(folder, 8)
    assert f"{again[-1]['valid/frechet']:.3f} (held-out" in said
    assert (folder.path / "samples.png").stat().st_size > 10_000


@pytest.mark.slow
def test_every_stage_and_world_size_trains_the_same(tmp_path: Path) -> None:
    keys = ["train.steps=4", *SMALL]
    stages = [0, 1, 2, 3]
    runs = [("dcgan", [*keys, f"engine.zero_stage={stage}"]) for stage in stages]
    alone = run_distributed(several, 1, str(tmp_path / "one"), runs)[0]
    both = run_distributed(several, 2, str(tmp_path / "two"), runs)[0]
    for losses in alone + both:
        assert losses == pytest.approx(alone[0], rel=2e-4)
    mixed = run_distributed(
        several,
        2,
        str(tmp_path / "bf16"),
        [("dcgan", [*keys, "engine.precision=bf16", f"engine.zero_stage={s}"]) for s in (1, 3)],
    )[0]
    for losses in mixed:
        assert losses == pytest.approx(alone[0], rel=0.03)


def test_measure_ranks_real_above_blurred_above_noise_and_sees_a_collapse() -> None:
    images, labels = split(CONFIG.data, "train")
    held_out, _ = split(CONFIG.data, "valid")
    measure = Measure(images, labels)
    rng = np.random.default_rng(0)
    noise = rng.uniform(-1, 1, held_out.shape).astype(np.float32)
    real, blurred, random = measure(held_out), measure(0.5 * held_out + 0.5 * noise), measure(noise)
    assert real["frechet"] < 0.5 < blurred["frechet"] < random["frechet"]
    assert measure(images)["frechet"] == pytest.approx(0, abs=1e-6)
    assert real["confidence"] > 0.9
    assert real["classes"] > 9.5
    collapsed = measure(images[labels == 3])
    assert collapsed["classes"] < 1.5
    assert collapsed["frechet"] > 5


def test_operations_are_counted_over_both_steps() -> None:
    c, d = CONFIG.model.n_channel, CONFIG.model.d_latent
    generator = 4 * d * 4 * c + 4 * 16 * 4 * c * 2 * c + 16 * 16 * 2 * c * c + 64 * 9 * c
    discriminator = 64 * 9 * c + 16 * 16 * c * 2 * c + 4 * 16 * 2 * c * 4 * c + 4 * 4 * c
    assert DCGAN(CONFIG).flops_per_sample == 2 * (4 * generator + 8 * discriminator)


def test_walk_visits_its_stops_at_constant_length() -> None:
    stops = torch.nn.functional.normalize(torch.eye(6)[:4], dim=1)
    points = walk(stops, 16)
    torch.testing.assert_close(points[[0, 5, 10, 15]], stops)
    torch.testing.assert_close(points.norm(dim=1), torch.ones(16))


@pytest.mark.slow
def test_shipped_config_makes_digits(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recipes.gan", str(RECIPES["dcgan"][2]), f"run.dir={tmp_path}"]
    done = subprocess.run([*command, "track.progress=false"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines() if "(held-out" in line}
    # An untrained generator has about 17, 0.2 and 5; digits that it never saw 0.2, 0.94 and 9.9.
    assert measured["frechet"] < 3
    assert measured["confidence"] > 0.75
    assert measured["classes"] > 7
    assert (tmp_path / "dcgan-digits" / "samples.png").stat().st_size > 10_000
