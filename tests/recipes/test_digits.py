"""The digits as samples: split, order, augmentation."""

import numpy as np
import pytest

from cairn.config.recipes import DigitsSection
from recipes.digits import Digits, fingerprint, moved, split

SECTION = DigitsSection()


def test_split_holds_every_image_once() -> None:
    (train, _), (valid, labels) = split(SECTION, "train"), split(SECTION, "valid")
    assert len(train) + len(valid) == 1797
    assert len(valid) == round(0.2 * 1797)
    assert set(labels) == set(range(10))
    assert (train.min(), train.max(), train.shape[1:]) == (-1, 1, (1, 8, 8))
    seen = {image.tobytes() for image in train}
    assert not any(image.tobytes() in seen for image in valid)


def test_epoch_visits_each_image_once_in_an_order_of_the_seed() -> None:
    samples, other = Digits(SECTION, "train", seed=1), Digits(SECTION, "train", seed=2)
    first = [samples.item(k)["image"].tobytes() for k in range(len(samples))]
    assert sorted(first) == sorted(image.tobytes() for image in samples.images)
    assert first[:8] != [samples.item(len(samples) + k)["image"].tobytes() for k in range(8)]
    assert first[:8] != [other.item(k)["image"].tobytes() for k in range(8)]


def test_augmented_sample_is_pure_and_held_out_one_is_untouched() -> None:
    samples = Digits(SECTION, "train", seed=1, shift=1)
    items = [samples.item(k)["image"] for k in range(30)]
    assert all(np.array_equal(a, Digits(SECTION, "train", 1, 1).item(k)["image"]) for k, a in enumerate(items))
    plain = Digits(SECTION, "train", seed=1)
    assert sum(not np.array_equal(a, plain.item(k)["image"]) for k, a in enumerate(items)) > 15
    valid = Digits(SECTION, "valid", seed=1, shift=1)
    assert all(np.array_equal(valid.item(k)["image"], valid.images[k]) for k in range(len(valid)))


@pytest.mark.parametrize("dx", [0, 1, -1, -2])
def test_moved(dx: int) -> None:
    image = np.full((1, 8, 8), -1, np.float32)
    image[0, 3, 4] = 0.5
    out = moved(image, dx)
    assert out[0, 3, 4 + dx] == 0.5
    assert (out != -1).sum() == 1


def test_fingerprint_names_the_training_images() -> None:
    assert fingerprint(SECTION) == fingerprint(DigitsSection())
    assert fingerprint(SECTION) != fingerprint(DigitsSection(held_out=0.3))
