"""Whether generated digits are like real ones, measured without a trained network."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
N_COMPONENT = 16


class Measure:
    """Compares images (N, 1, 8, 8) with real ones by two means that need no downloaded network.

    `frechet`: the Fréchet distance (arXiv 1706.08500) between Gaussians fitted to both, in the first 16 principal
    components of the real images instead of Inception features. `confidence` and `classes`: the mean probability that a
    logistic regression trained on the real images gives its own answer, and the effective number of classes among its
    answers, exp(entropy): 10 when all digits are equally frequent, 1 after a collapse onto one.
    """

    def __init__(self, images: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
        from sklearn.linear_model import LogisticRegression

        pixels = _flat(images)
        self.centre = pixels.mean(0)
        _, vectors = np.linalg.eigh(np.cov(pixels.T))
        self.axes = vectors[:, -N_COMPONENT:]
        self.real = self._moments(pixels)
        self.judge = LogisticRegression(max_iter=300).fit(pixels, labels)

    def __call__(self, images: NDArray[np.float32]) -> dict[str, float]:
        """`frechet` (smaller is better; 0 for the real images), `confidence` in (0, 1], `classes` in [1, 10]."""
        pixels = _flat(images)
        probs = self.judge.predict_proba(pixels)
        share = np.bincount(probs.argmax(1), minlength=probs.shape[1]) / len(probs)
        entropy = -sum(p * np.log(p) for p in share if p > 0)
        return {
            "frechet": _frechet(*self.real, *self._moments(pixels)),
            "confidence": float(probs.max(1).mean()),
            "classes": float(np.exp(entropy)),
        }

    def _moments(self, pixels: Array) -> tuple[Array, Array]:
        projected = (pixels - self.centre) @ self.axes
        return projected.mean(0), np.cov(projected.T)


def _flat(images: NDArray[np.float32]) -> Array:
    return images.reshape(len(images), -1).astype(np.float64)


def _frechet(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    # The trace of sqrt(A B) is that of sqrt(sqrt(A) B sqrt(A)), which is symmetric.
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
