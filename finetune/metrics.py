"""Metrics of held-out examples, by scikit-learn, SciPy and sacreBLEU; of entities and answers by what is here."""

import re
import string
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
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


def translation(references: Sequence[str], written: Sequence[str]) -> dict[str, float]:
    """BLEU (arXiv 1804.08771) and chrF of whole corpora, from 0 to 100."""
    from sacrebleu import corpus_bleu, corpus_chrf

    return {
        "bleu": float(corpus_bleu(written, [references], force=True).score),
        "chrf": float(corpus_chrf(written, [references]).score),
    }


def are_entities(tags: Iterable[str]) -> bool:
    """Whether tags mark spans: some begin with B- or I-."""
    return any(tag.startswith(("B-", "I-")) for tag in tags)


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Type, start and end (behind the last word) of the entities in BIO, IOB1 or BIOES, as conlleval reads them.

    One begins with B, with S, with another type, or with I or E where none is open; it ends before what begins one and
    before O, and with E and S.
    """
    found: list[tuple[str, int, int]] = []
    start, before, kind_before = 0, "O", ""
    for n, tag in enumerate([*tags, "O"]):
        mark, _, kind = tag.partition("-")
        mark = mark if mark in ("B", "I", "E", "S") else "O"
        begins = mark != "O" and (mark in "BS" or before in "OES" or kind != kind_before)
        if before != "O" and (begins or mark == "O"):
            found.append((kind_before, start, n))
        start = n if begins else start
        before, kind_before = mark, kind
    return found


def tagging(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], spans: bool) -> dict[str, float]:
    """Share of words with the right tag; where tags mark spans, precision, recall and F1 of entities: right are those
    whose type, start and end are."""
    words = [a == b for pair in zip(true, predicted, strict=True) for a, b in zip(*pair, strict=True)]
    scores = {"accuracy": sum(words) / max(len(words), 1)}
    if not spans:
        return scores
    there = {(n, *entity) for n, tags in enumerate(true) for entity in entities(tags)}
    said = {(n, *entity) for n, tags in enumerate(predicted) for entity in entities(tags)}
    right = len(there & said)
    f1 = 2 * right / max(len(there) + len(said), 1)
    return scores | {"precision": right / max(len(said), 1), "recall": right / max(len(there), 1), "f1": f1}


def answering(answers: Sequence[Sequence[str]], predicted: Sequence[str]) -> dict[str, float]:
    """Exact match and F1 over words, as SQuAD's scorer has them, from 0 to 1; of questions without an answer ([]),
    what is right is "". F1 of both kinds of questions alone, where there are both."""
    pairs = list(zip(answers, predicted, strict=True))
    f1 = [max(overlap(one, text) for one in given or [""]) for given, text in pairs]
    exact = [max(normalized(one) == normalized(text) for one in given or [""]) for given, text in pairs]
    scores = {"exact": float(np.mean(exact)), "f1": float(np.mean(f1))}
    if any(answers) and not all(answers):
        scores["f1_answered"] = float(np.mean([score for score, given in zip(f1, answers, strict=True) if given]))
        scores["f1_no_answer"] = float(np.mean([score for score, given in zip(f1, answers, strict=True) if not given]))
    return scores


def normalized(text: str) -> list[str]:
    """Words in lower case, without punctuation and English articles; a Chinese character is a word."""
    kept = re.sub(f"[{re.escape(string.punctuation)}\u3000-\u303f\uff00-\uff0f\uff1a-\uff20]", "", text.lower())
    return re.findall(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+", re.sub(r"\b(a|an|the)\b", " ", kept))


def overlap(answer: str, predicted: str) -> float:
    """F1 of the words of two texts; 1 where neither has any."""
    a, b = normalized(answer), normalized(predicted)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if a or b else 1.0
