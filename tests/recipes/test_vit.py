"""The ViT recipe."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cairn.config.load import load
from cairn.config.recipes import ViTSection
from cairn.config.schema import VisionConfig
from cairn.errors import UserError
from cairn.train.folder import RunFolder
from recipes.digits import split
from recipes.vision.vit import ViT, ViTClassifier, draw_predictions
from tests.recipes.runs import RECIPES, run

SMALL = ["model.n_layer=1", "model.d_model=16", "model.n_head=2"]


def test_class_token_sees_every_pixel_and_where_it_is() -> None:
    torch.manual_seed(0)
    model = ViT(ViTSection(n_layer=1, n_head=2, d_model=16)).eval()
    image = torch.randn(1, 1, 8, 8, requires_grad=True)
    logits = model(image)
    (gradient,) = torch.autograd.grad(logits[0, 3], image)
    assert logits.shape == (1, 10)
    assert (gradient != 0).all()
    assert not torch.allclose(model(image.flip(-1)), logits, atol=1e-4)


def test_patch_size_must_divide_the_image() -> None:
    with pytest.raises(UserError, match=r"model\.patch_size 3"):
        ViTClassifier(VisionConfig(model=ViTSection(patch_size=3)))


def test_heads_must_divide_the_width() -> None:
    path = RECIPES["vit"][2]
    with pytest.raises(UserError, match="n_head"):
        load(VisionConfig, path, ["model.n_head=7"])


def test_short_run_learns_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    straight = run("vit", str(tmp_path), "run.name=straight", "train.steps=40", "checkpoint.every=20", *SMALL)
    losses = [row["loss"] for row in straight if "loss" in row]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3
    # The same run, cut off after its checkpoint of step 20 and started again.
    folder = RunFolder(tmp_path / "straight")
    (folder.checkpoints / "step-00000040").rename(tmp_path / "gone")
    again = run("vit", str(tmp_path), "run.name=straight", "train.steps=40", "checkpoint.every=20", *SMALL)
    assert [row["loss"] for row in again if "loss" in row] == losses
    config = load(VisionConfig, folder.config, [])
    said = ViTClassifier(config).report(folder, 40)
    assert f"{again[-1]['valid/accuracy']:.1%} of held-out" in said
    assert (folder.path / "predictions.png").stat().st_size > 10_000


def test_picture_draws_fewer_images_than_places(tmp_path: Path) -> None:
    images, labels = split(VisionConfig().data, "valid")
    draw_predictions(images[:5], labels[:5], labels[:5], tmp_path / "few.png")
    assert (tmp_path / "few.png").exists()


@pytest.mark.slow
def test_shipped_config_classifies_97_percent(tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "recipes.vision", str(RECIPES["vit"][2]), f"run.dir={tmp_path}"]
    done = subprocess.run([*command, "track.progress=false"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    accuracy = float(done.stdout.split("accuracy    ")[1].split("%")[0])
    assert accuracy >= 97
    assert (tmp_path / "vit-digits" / "predictions.png").exists()
