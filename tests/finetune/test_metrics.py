"""Entities and answers are scored as conlleval and SQuAD's scorer do."""

import random

import pytest

from finetune import metrics


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("O O", []),
        ("I-PER I-PER O I-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),  # IOB1
        ("I-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)]),
        ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("B-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)]),  # another type ends the one and begins the other
        ("S-LOC B-PER I-PER E-PER S-LOC", [("LOC", 0, 1), ("PER", 1, 4), ("LOC", 4, 5)]),
        ("B-PER E-PER I-PER", [("PER", 0, 2), ("PER", 2, 3)]),
        ("E-PER E-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("B I O B", [("", 0, 2), ("", 3, 4)]),
        ("B-X-Y I-X-Y", [("X-Y", 0, 2)]),
        ("NN B-PER NN", [("PER", 1, 2)]),
    ],
)
def test_entities(tags: str, found: list[tuple[str, int, int]]) -> None:
    assert metrics.entities(tags.split()) == found


def conlleval(tags: list[str]) -> list[tuple[str, int, int]]:
    """As conlleval has it: two tables of what ends and what begins a chunk."""
    ends = {"BB", "BS", "BO", "IB", "IS", "IO", "EE", "EI", "EO", "EB", "ES", "SE", "SI", "SO", "SB", "SS"}
    begins = {"EE", "EI", "SE", "SI", "OE", "OI"}
    found, start = [], 0
    for n, (a, b) in enumerate(zip(["O", *tags], [*tags, "O"], strict=True)):
        (p, kind_p), (q, kind_q) = ((tag[0], tag[2:]) for tag in (a, b))
        if p + q in ends or (p != "O" and kind_p != kind_q):
            found.append((kind_p, start, n))
        if q in "BS" or p + q in begins or (q != "O" and kind_p != kind_q):
            start = n
    return found


def test_entities_of_any_tags() -> None:
    rng = random.Random(0)
    some = ["O", *(f"{mark}-{kind}" for mark in "BIES" for kind in "XY")]
    for _ in range(2000):
        tags = rng.choices(some, k=rng.randint(1, 8))
        assert metrics.entities(tags) == conlleval(tags), tags


def test_scores_of_tags_by_hand() -> None:
    # seqeval's example: one of two entities found, and one of two predicted right
    true = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    predicted = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    found = metrics.tagging(true, predicted, True)
    assert found == {"accuracy": 0.8, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert metrics.tagging([["NN", "VB"]], [["NN", "NN"]], False) == {"accuracy": 0.5}
    assert metrics.tagging([["O"]], [["O"]], True)["f1"] == 0.0
    assert not metrics.are_entities(["NN", "O", "BX"])


@pytest.mark.parametrize(
    ("answer", "predicted", "f1"),
    [
        ("The  Eiffel-Tower!", "eiffeltower", 1.0),
        ("in the city of Oslo", "Oslo", 2 / (4 + 1)),
        ("a cat a cat", "cat cat cat", 2 * 2 / (2 + 3)),
        ("Oslo", "", 0.0),
        ("", "", 1.0),
        ("黑豹队", "黑豹", 2 * 2 / (3 + 2)),
        ("《红楼梦》", "红楼梦", 1.0),
    ],
)
def test_f1_of_answers(answer: str, predicted: str, f1: float) -> None:
    assert metrics.overlap(answer, predicted) == pytest.approx(f1)


def test_scores_of_answers_by_hand() -> None:
    found = metrics.answering([["Oslo", "in Oslo, Norway"], ["1999"]], ["the Oslo Norway", "2000"])
    assert found == {"exact": 0.0, "f1": pytest.approx((2 * 2 / 5) / 2)}  # the better of its two answers
    found = metrics.answering([["Oslo"], [], []], ["oslo.", "", "Rome"])
    assert found == pytest.approx({"exact": 2 / 3, "f1": 2 / 3, "f1_answered": 1.0, "f1_no_answer": 0.5})
