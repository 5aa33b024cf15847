"""How well simple classifiers tell classes apart by given features."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
Split = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Places of the rows to learn from, and of those to judge."""
NEIGHBOURS = range(5, 16)
WORD = r"[\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]"  # what is written without spaces by the character


@dataclass(frozen=True)
class Score:
    """Of all that is judged."""

    mean: float
    deviation: float | None
    """Over folds; None where there are none."""


Scores = dict[str, Score]


def folds(labels: Labels, count: int) -> list[Split]:
    """Each row judged once, every class as frequent in each fold; each class has `count` rows or more."""
    from sklearn.model_selection import StratifiedKFold

    return list(StratifiedKFold(count, shuffle=True, random_state=0).split(np.zeros(len(labels)), labels))


def score(rows: Iterator[dict[str, float]]) -> Scores:
    """Numbers of each fold -> their mean and deviation."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    return {
        key: Score(float(np.mean(values)), float(np.std(values)) if len(values) > 1 else None)
        for key, values in columns.items()
    }


def judge_features(features: NDArray[np.float32], labels: Labels, splits: Sequence[Split]) -> Scores:
    """Accuracy of logistic regression (`linear`), of nearest neighbours (`neighbours`) and of k-means (`clusters`), and
    the clusters' Rand index (`rand`) and mutual information (`information`), both adjusted for chance.

    features (N, D). All three see each feature less its mean over its deviation, as the training rows have them.
    """
    return score(_judged(features[a], labels[a], features[b], labels[b]) for a, b in splits)


def _judged(train: NDArray[np.float32], known: Labels, test: NDArray[np.float32], wanted: Labels) -> dict[str, float]:
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train)
    train, test = scaler.transform(train), scaler.transform(test)
    found = {"linear": linear(train, known, test, wanted), "neighbours": neighbours(train, known, test, wanted)}
    return found | clusters(train, known, test, wanted)


def linear(train: Any, known: Labels, test: Any, wanted: Labels) -> float:
    """Accuracy of logistic regression; rows (N, D), dense or sparse."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # nearly there is near enough for three digits
        model = LogisticRegression(max_iter=500).fit(train, known)
    return float(np.mean(model.predict(test) == wanted))


def neighbours(train: NDArray[np.float32], known: Labels, test: NDArray[np.float32], wanted: Labels) -> float:
    """Accuracy of the vote of the nearest rows by cosine; of NEIGHBOURS, the number that does best among the training
    rows, each judged by the others."""
    from sklearn.neighbors import NearestNeighbors

    most = min(NEIGHBOURS[-1], len(train) - 1)
    search = NearestNeighbors(n_neighbors=most, metric="cosine").fit(train)
    votes = _votes(known[search.kneighbors(return_distance=False)])
    sizes = [k for k in NEIGHBOURS if k <= most] or [most]
    best = max(sizes, key=lambda k: float(np.mean(votes[:, k - 1] == known)))
    return float(np.mean(_votes(known[search.kneighbors(test, return_distance=False)])[:, best - 1] == wanted))


def _votes(near: Labels) -> Labels:
    """Labels of neighbours, nearest first (N, K) -> what the first 1, 2, ..., K of them vote for (N, K)."""
    counts = np.eye(near.max() + 1)[near].cumsum(1)
    return np.asarray(counts.argmax(-1))


def clusters(train: NDArray[np.float32], known: Labels, test: NDArray[np.float32], wanted: Labels) -> dict[str, float]:
    """k-means with as many clusters as classes, found without labels; accuracy where each cluster is given the class
    with which the training rows match best."""
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

    count = int(known.max()) + 1
    means = KMeans(count, n_init=10, random_state=0).fit(train)
    together = np.zeros((count, count))
    np.add.at(together, (means.labels_, known), 1)
    class_of = linear_sum_assignment(together, maximize=True)[1]
    found = means.predict(test)
    return {
        "clusters": float(np.mean(class_of[found] == wanted)),
        "rand": float(adjusted_rand_score(wanted, found)),
        "information": float(adjusted_mutual_info_score(wanted, found)),
    }


def judge_majority(labels: Labels, splits: Sequence[Split]) -> Scores:
    """`accuracy` of always naming the most frequent class."""
    return score({"accuracy": float(np.mean(labels[b] == np.bincount(labels[a]).argmax()))} for a, b in splits)


def judge_words(texts: Sequence[str], labels: Labels, splits: Sequence[Split]) -> Scores:
    """`linear`, the accuracy of logistic regression on how often each word of the training rows is in a text."""
    return score({"linear": _words(texts, labels, a, b)} for a, b in splits)


def _words(texts: Sequence[str], labels: Labels, train: NDArray[np.int64], test: NDArray[np.int64]) -> float:
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(token_pattern=WORD)
    counts = counter.fit_transform([texts[i] for i in train])
    return linear(counts, labels[train], counter.transform([texts[i] for i in test]), labels[test])
