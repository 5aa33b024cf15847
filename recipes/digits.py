"""scikit-learn's bundled digits as samples: 1,797 grey 8 x 8 images in ten classes; nothing is downloaded."""

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cairn.config.recipes import DigitsSection
from cairn.data.batches import Item
from cairn.data.order import Order, mix, permute

SIZE = 8
N_CLASS = 10

Images = NDArray[np.float32]


@lru_cache(maxsize=1)
def _all() -> tuple[Images, NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images[:, None] / 8 - 1).astype(np.float32), digits.target.astype(np.int64)


def split(section: DigitsSection, name: str) -> tuple[Images, NDArray[np.int64]]:
    """Images (N, 1, 8, 8) in [-1, 1] and classes (N,) of "train" or "valid"; the same for every seed."""
    images, labels = _all()
    place = permute(np.arange(len(labels)), len(labels), 0)
    held_out = place < max(1, round(section.held_out * len(labels)))
    chosen = held_out if name == "valid" else ~held_out
    return images[chosen], labels[chosen]


def fingerprint(section: DigitsSection) -> str:
    """SHA-256 of the training images and their classes, hex."""
    images, labels = split(section, "train")
    return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()


class Digits:
    """Samples {"image": (1, 8, 8) fp32 in [-1, 1], "labels": () int64}.

    Training ones are shuffled anew each epoch and, with `shift`, moved to the left or right by up to that many pixels
    (never up or down: digits fill the height); sample k is a pure function of (seed, k).
    """

    def __init__(self, section: DigitsSection, name: str, seed: int, shift: int = 0) -> None:
        self.images, self.labels = split(section, name)
        self.order = Order(len(self.labels), seed) if name == "train" else None
        self.seed, self.shift = seed, shift if self.order else 0

    def __len__(self) -> int:
        """Images of the split."""
        return len(self.labels)

    def item(self, k: int) -> Item:
        """Sample k."""
        i = self.order[k] if self.order else k
        image = self.images[i]
        if self.shift:
            dx = np.random.default_rng(mix(self.seed, k)).integers(-self.shift, self.shift + 1)
            image = moved(image, int(dx))
        return {"image": image, "labels": self.labels[i]}


def moved(image: Images, dx: int) -> Images:
    """An image (1, H, W) moved right by dx pixels, filled with background (-1)."""
    width = image.shape[-1]
    out = np.full_like(image, -1)
    out[..., max(dx, 0) : width + min(dx, 0)] = image[..., max(-dx, 0) : width + min(-dx, 0)]
    return out
