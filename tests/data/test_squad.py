"""SQuAD's JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

from cairn.data.squad import read_squad
from cairn.errors import UserError

CONTEXT = "Café Nord is in Oslo, not in Rome."


def question(name: str = "q1", **more: Any) -> dict[str, Any]:
    return {"id": name, "question": "Where?", "answers": [{"text": "Oslo", "answer_start": 16}]} | more


def write(folder: Path, *questions: dict[str, Any]) -> str:
    paragraphs = [{"context": CONTEXT, "qas": [item]} for item in questions]
    path = folder / "a.json"
    path.write_text(json.dumps({"version": "2.0", "data": [{"title": "Cafés", "paragraphs": paragraphs}]}))
    return str(path)


def test_both_versions(tmp_path: Path) -> None:
    answers = [{"text": "Oslo", "answer_start": 16}, {"text": "in Oslo", "answer_start": 13}]
    no_answer = question("q2", answers=[], is_impossible=True, plausible_answers=[{"text": "Rome"}])
    path = write(tmp_path, question(answers=answers), no_answer)
    first, second = read_squad(path)
    same = {"title": "Cafés", "context": CONTEXT, "question": "Where?"}
    assert first.values == same | {
        "id": "q1",
        "answers": ["Oslo", "in Oslo"],
        "starts": [16, 13],
        "is_impossible": False,
    }
    assert second.values == same | {"id": "q2", "answers": [], "starts": [], "is_impossible": True}
    assert second.place == f"{path}: article 1, paragraph 2, question 1"


def answer(text: str, start: Any) -> dict[str, Any]:
    return question(answers=[{"text": text, "answer_start": start}])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (answer("Oslo", 17), r"\(id q1\): answer 'Oslo' is not at answer_start 17 .* there is 'slo,'; it is at 16"),
        (answer("Oslo", -18), r"is not at answer_start -18"),
        (answer("Paris", 16), r"there is 'Oslo,'; the context does not have it"),
        (answer("", 3), r"\(id q1\): has an empty answer"),
        (answer("Oslo", "16"), r"'answer_start' is a str, expected a int"),
        (question(answers=[]), r"\(id q1\): has no answers: give one, or set is_impossible"),
        (question(is_impossible=True), r"\(id q1\): has answers, but is_impossible is true"),
        (question(answers=None), r"\(id q1\): 'answers' is a NoneType, expected a list"),
        ({"question": "?"}, r"article 1, paragraph 1, question 1: has no 'id'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, item: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(read_squad(write(tmp_path, item)))


def test_questions_without_answers_where_none_are_needed(tmp_path: Path) -> None:
    path = write(tmp_path, {"id": "q1", "question": "Where?"}, question("q2"))
    first, second = read_squad(path, answered=False)
    assert first.values == {"title": "Cafés", "context": CONTEXT, "id": "q1", "question": "Where?"}
    assert second.values["answers"] == ["Oslo"]
    with pytest.raises(UserError, match=r"\(id q1\): has no 'answers'"):
        list(read_squad(path))


def test_an_id_that_is_there_twice(tmp_path: Path) -> None:
    path = write(tmp_path, question(), question("q2"), question())
    with pytest.raises(UserError) as caught:
        list(read_squad(path))
    places = "article 1, paragraph 1, question 1 has the id 'q1', and article 1, paragraph 3, question 1 has it again"
    assert str(caught.value) == f"{path}: {places}: give it its own"


def test_other_files(tmp_path: Path) -> None:
    for text, message in [
        ("[1]", r"has no 'data'; expected SQuAD's"),
        ("{", "not JSON"),
        ('{"data": {}}', "is a dict"),
    ]:
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=message):
            list(read_squad(str(tmp_path / "a.json")))
