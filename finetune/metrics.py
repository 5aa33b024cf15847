"""Metrics of held-out examples, by scikit-learn and SciPy."""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]


def classification(labels: Numbers, predicted: Numbers, n_class: int) -> dict[str, float]:
    """Accuracy, Matthews correlation, and F1: of class 1 where there are two, as in GLUE, else the mean of all."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    average = {"average": "macro", "labels": list(range(n_class))} if n_class > 2 else {}
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": float(f1_score(labels, predicted, zero_division=0.0, **average)),
        "matthews": float(matthews_corrcoef(labels, predicted)),
    }


def regression(labels: Numbers, predicted: Numbers) -> dict[str, float]:
    """Pearson and Spearman correlation; 0 where one side is constant."""
    from scipy.stats import pearsonr, spearmanr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant input: told by the 0
        found = {"pearson": pearsonr(labels, predicted)[0], "spearman": spearmanr(labels, predicted)[0]}
    return {name: float(np.nan_to_num(value)) for name, value in found.items()}


def multilabel(labels: Numbers, predicted: Numbers) -> dict[str, float]:
    """F1 over all decisions and as the mean over classes, and the share of examples with every class right."""
    from sklearn.metrics import accuracy_score, f1_score

    return {
        "f1_micro": float(f1_score(labels, predicted, average="micro", zero_division=0.0)),
        "f1_macro": float(f1_score(labels, predicted, average="macro", zero_division=0.0)),
        "exact": float(accuracy_score(labels, predicted)),
    }
