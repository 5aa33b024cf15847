"""Questions about passages, as SQuAD 1.1 (arXiv 1606.05250) and 2.0 (arXiv 1806.03822) have them in JSON."""

from collections.abc import Iterator
from typing import Any

from cairn.data.readers import opened, parse_json
from cairn.data.tables import Row
from cairn.errors import UserError


def read_squad(path: str, answered: bool = True) -> Iterator[Row]:
    """Questions {"id", "question", "context", "title": str, "answers": [str], "starts": [int], "is_impossible": bool},
    in order; `starts` count characters of the context from 0. Where `answered` is false, a question may lack "answers",
    and has neither these nor what follows then.

    Raises UserError naming article, paragraph and question where the file is not so, an answer is not where it is said
    to be, a question has none though it is not impossible, or an id is there twice.
    """
    with opened(path) as file:
        root = parse_json(file.read(), path)
    places: dict[str, str] = {}
    for i, article in enumerate(_get(root, "data", list, path), 1):
        at = f"{path}: article {i}"
        paragraphs = _get(article, "paragraphs", list, at)
        title = _get(article, "title", str, at) if "title" in article else ""
        for j, paragraph in enumerate(paragraphs, 1):
            within = f"{at}, paragraph {j}"
            context = _get(paragraph, "context", str, within)
            for k, question in enumerate(_get(paragraph, "qas", list, within), 1):
                place = f"{within}, question {k}"
                values = {"title": title, "context": context} | _question(question, context, place, answered)
                name = values["id"]
                if name in places:
                    again = place.removeprefix(f"{path}: ")
                    raise UserError(f"{places[name]} has the id {name!r}, and {again} has it again: give it its own")
                places[name] = place
                yield Row(place, values)


def _question(question: Any, context: str, place: str, answered: bool) -> dict[str, Any]:
    name = _get(question, "id", str, place)
    place = f"{place} (id {name})"
    text = _get(question, "question", str, place)
    if not answered and "answers" not in question:
        return {"id": name, "question": text}
    impossible = _get(question, "is_impossible", bool, place) if "is_impossible" in question else False
    answers, starts = [], []
    for answer in _get(question, "answers", list, place):
        answers.append(_get(answer, "text", str, place))
        starts.append(_get(answer, "answer_start", int, place))
        _check_answer(answers[-1], starts[-1], context, place)
    if impossible and answers:
        raise UserError(f"{place}: has answers, but is_impossible is true: remove one of them")
    if not impossible and not answers:
        raise UserError(f"{place}: has no answers: give one, or set is_impossible to true")
    return {"id": name, "question": text, "answers": answers, "starts": starts, "is_impossible": impossible}


def _check_answer(answer: str, start: int, context: str, place: str) -> None:
    if not answer.strip():
        raise UserError(f"{place}: has an empty answer: give its text, or remove it")
    there = context[start : start + len(answer)] if start >= 0 else ""
    if there != answer:
        found = context.find(answer)
        hint = f"it is at {found}" if found >= 0 else "the context does not have it"
        raise UserError(
            f"{place}: answer {answer!r} is not at answer_start {start} of the context, there is {there!r}; {hint} "
            "(characters, from 0): correct it"
        )


def _get(holder: Any, key: str, kind: type, place: str) -> Any:
    if not isinstance(holder, dict) or key not in holder:
        raise UserError(f"{place}: has no {key!r}; expected SQuAD's data > paragraphs > qas > answers")
    value = holder[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{place}: {key!r} is a {type(value).__name__}, expected a {kind.__name__}")
    return value
