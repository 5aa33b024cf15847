"""Answers as spans: the loss of transformers, windows that together see all, text as the context has it."""

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from cairn.cluster import Cluster
from cairn.errors import UserError
from cairn.train.checkpoint import folder_of
from cairn.train.outcome import Outcome
from finetune.answer import Answer, Window, candidates, tokens_of
from finetune.build import make_task
from finetune.run import outputs_of
from finetune.task import Finetune
from tests.finetune.conftest import config_of
from tests.finetune.theirs import same_model, save

WORDS = ["the", "sea", "of", "men", "was", "a", "story", "film"]
KEYS = ["task.name=answer", "task.stride=4", "task.max_question_len=12", "data.max_len=32"]


def squad(path: Path, *questions: tuple[str, str, str | None]) -> Path:
    """A file of (question, context, answer); None where there is none."""
    paragraphs = []
    for n, (question, context, answer) in enumerate(questions):
        answers = [] if answer is None else [{"text": answer, "answer_start": context.index(answer)}]
        qa = {"id": str(n), "question": question, "answers": answers, "is_impossible": answer is None}
        paragraphs.append({"context": context, "qas": [qa]})
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    return path


def numbers(path: Path, n: int, seed: int = 0) -> Path:
    """How many? The number in a context of several windows; a fifth of them have none."""
    rng = random.Random(seed)
    rows: list[tuple[str, str, str | None]] = []
    for i in range(n):
        text = rng.choices(WORDS, k=rng.randint(3, 30))
        number = str(rng.randint(0, 9)) if i % 5 else None
        text.insert(rng.randrange(len(text)), number or "a")
        rows.append(("How many?", " ".join(text), number))
    return squad(path, *rows)


def both(file: Path) -> list[str]:
    return [f"data.train={file}", f"data.valid={file}"]


def make(folder: Path, cluster: Cluster, *overrides: str) -> Answer:
    task = make_task(config_of(folder, *KEYS, *overrides), cluster)
    assert isinstance(task, Answer)
    return task


def test_loss_is_that_of_transformers(tmp_path: Path, one: Cluster) -> None:
    hf = save(transformers.BertForQuestionAnswering, tmp_path)
    keys = [*KEYS, *both(numbers(tmp_path / "t.json", 7))]
    task, model = same_model(hf, "qa_outputs", tmp_path, one, *keys)
    examples, expected, logits = task.examples["valid"], 0.0, []
    assert len(examples) > 7
    for example in examples:
        inputs = {key: torch.from_numpy(example.item[key])[None] for key in ("input_ids", "segment_ids")}
        ends = {f"{end}_positions": torch.tensor([int(example.item[f"{end}_label"])]) for end in ("start", "end")}
        with torch.no_grad():
            out = hf(input_ids=inputs["input_ids"], token_type_ids=inputs["segment_ids"], **ends)
        expected += float(out.loss)
        logits.append(torch.stack([out.start_logits[0], out.end_logits[0]], -1).numpy())
    samples = task.samples("valid")
    batch = samples.collate([samples.item(n) for n in range(len(examples))])  # type: ignore[attr-defined]
    with torch.no_grad():
        loss = task.sums(task.forward(model, batch), batch)["loss"]
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert task.weights(batch)["loss"] == len(examples)
    for size in (1, len(examples)):
        for ours, theirs in zip(outputs_of(task, model, examples, size), logits, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


def sure(task: Finetune, answers: dict[str, tuple[int, int] | None]) -> list[np.ndarray[Any, Any]]:
    """Outputs of a model that knows the characters of each question's answer."""
    outputs = []
    for example in task.examples["valid"]:
        assert isinstance(example, Window)
        out = np.zeros((len(example.item["input_ids"]), 2), dtype=np.float32)
        place = answers[example.row["id"]]
        own = [] if place is None else [n for n, (a, b) in enumerate(example.places) if a < place[1] and b > place[0]]
        whole = (
            place is not None
            and own
            and example.places[own[-1]][1] >= place[1]
            and example.places[own[0]][0] <= place[0]
        )
        first, last = (own[0] + example.before, own[-1] + example.before) if whole else (0, 0)
        out[first if whole or task.frame.begin else -1, 0] = 9  # type: ignore[attr-defined]
        out[last if whole or task.frame.begin else -1, 1] = 9  # type: ignore[attr-defined]
        outputs.append(out)
    return outputs


@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_answers_come_back_as_the_context_has_them(
    kind: str, tmp_path: Path, one: Cluster, bases: dict[str, Path]
) -> None:
    # The tokenizer knows neither capitals nor accents; the second answer is far behind the first window.
    context = "The Café of ÉCOLE Ñu,  " + "sea " * 30 + "was in São Paulo's Sea."
    file = squad(
        tmp_path / "t.json",
        ("Which?", context, "Café of ÉCOLE Ñu"),
        ("Where?", context, "São Paulo"),
        ("Why?", context, None),
    )
    task = make(tmp_path, one, *both(file), f"base.path={bases[kind]}", "data.max_len=40")
    assert task.section.no_answer is True
    examples = task.examples["valid"]
    assert all(len(example.item["input_ids"]) <= 40 for example in examples)
    answers = {"0": (4, 20), "1": (context.index("São"), context.index("São") + 9), "2": None}
    found = list(task.predict(examples, sure(task, answers)))
    assert [one["prediction"] for one in found] == ["Café of ÉCOLE Ñu", "São Paulo", ""]
    assert [one["start"] for one in found] == [4, answers["1"][0], None]  # type: ignore[index]
    assert all(one["probability"] > 0.9 for one in found)
    assert [len(one["n_best"]) for one in found] == [6, 6, 6]
    scores = task.measure(examples, sure(task, answers))
    assert scores == {"exact": 1.0, "f1": 1.0, "f1_answered": 1.0, "f1_no_answer": 1.0}
    # What training is told agrees with what was predicted.
    for example, output in zip(examples, sure(task, answers), strict=True):
        assert [int(example.item["start_label"]), int(example.item["end_label"])] == output.argmax(0).tolist()
    lenient = make(tmp_path, one, *both(file), f"base.path={bases[kind]}", "task.no_answer_bias=-30", "data.max_len=40")
    assert next(lenient.predict(examples[-1:], sure(task, answers)[-1:]))["prediction"] != ""
    never = make(tmp_path, one, *both(file), f"base.path={bases[kind]}", "task.no_answer=false", "data.max_len=40")
    assert all(one["prediction"] for one in never.predict(examples, sure(task, answers)))


def test_windows_see_every_token_and_share_some(tmp_path: Path, one: Cluster, bases: dict[str, Path]) -> None:
    task = make(tmp_path, one, *both(numbers(tmp_path / "t.json", 4)), f"base.path={bases['gpt']}")
    for n in range(1, 60):
        examples = task.encode(list(task.rows(str(squad(tmp_path / "n.json", ("Why?", "b" * n, "b"))))))
        places = [example.places[:, 0].tolist() for example in examples if isinstance(example, Window)]
        assert sorted({place for window in places for place in window}) == list(range(n))
        assert all(a[-4:] == b[:4] for a, b in pairwise(places))
        assert all(len(example.item["input_ids"]) == 32 for example in examples[:-1])


def test_spans_are_the_best_there_are(tmp_path: Path, one: Cluster, bases: dict[str, Path]) -> None:
    file = squad(tmp_path / "t.json", ("Why?", "abcdefghij", "b"))
    section = make(tmp_path, one, *both(file), f"base.path={bases['gpt']}").section
    places = np.stack([np.arange(10), np.arange(1, 11)], 1)
    window = Window("here", {}, {"context": "abcdefghij"}, places, 3)
    for seed in range(20):
        scores = np.random.default_rng(seed).normal(size=(15, 2))
        section = section.model_copy(update={"max_answer_len": seed % 12 + 1, "n_best": 7})
        every = [
            (scores[3 + a, 0] + scores[3 + b, 1], "abcdefghij"[a : b + 1], a)
            for a in range(10)
            for b in range(a, min(10, a + section.max_answer_len))
        ]
        found = [(span.score, span.text, span.start) for span in candidates(window, scores, section)]
        assert found == sorted(every, reverse=True)[:7]


def test_tokens_of_an_answer() -> None:
    places = np.array([(0, 3), (3, 3), (3, 4), (4, 4), (5, 9)])
    row = {"answers": ["x", "y"], "starts": [3, 7]}
    assert tokens_of(row, places) == (2, 2)
    assert tokens_of(row | {"answers": ["xxxxx"], "starts": [2]}, places) == (0, 4)
    assert tokens_of(row | {"answers": ["x"], "starts": [4]}, places) is None
    assert tokens_of(row | {"answers": [], "starts": []}, places) is None


def test_questions_may_be_asked_without_answers(tmp_path: Path, one: Cluster, bases: dict[str, Path]) -> None:
    train, bare = numbers(tmp_path / "t.json", 4), tmp_path / "bare.json"
    qas = [{"id": "x", "question": "How many men?"}]
    bare.write_text(json.dumps({"data": [{"paragraphs": [{"context": "9 men.", "qas": qas}]}]}))
    task = make(tmp_path, one, *both(train), f"base.path={bases['bert']}")
    rows = list(task.rows(str(bare)))
    assert not task.labelled(rows)
    assert task.labelled(list(task.rows(str(train))))
    examples = task.encode(rows, labelled=False)
    assert [int(example.item["start_label"]) for example in examples] == [-100]
    (found,) = task.predict(examples, outputs_of(task, task.models()["model"], examples, 4))
    assert all(one["text"] in "9 men." for one in found["n_best"])
    with pytest.raises(UserError, match=r"bare\.json: .*has no 'answers'"):
        make(tmp_path, one, *both(bare), f"base.path={bases['bert']}")


SCRATCH = [
    *KEYS,
    "tokenizer.name=wordpiece",
    "tokenizer.vocab_size=300",
    "model={name: bert, n_layer: 2, n_head: 2, d_model: 32, max_seq_len: 32, dropout: 0.1, attention_dropout: 0.0}",
    "train.global_batch_size=16",
    "train.micro_batch_size=8",
    "optim.lr=5e-3",
    "run.name=r",
]


@pytest.mark.slow
def test_it_learns(tmp_path: Path, finetune: Callable[..., Outcome]) -> None:
    train, valid = numbers(tmp_path / "t.json", 200), numbers(tmp_path / "v.json", 40, seed=1)
    outcome = finetune(*SCRATCH, f"data.train={train}", f"data.valid={valid}", "train.epochs=12", "train.evals=1")
    assert outcome.metrics["valid/exact"] >= 0.9
    assert outcome.metrics["valid/f1_no_answer"] >= 0.8


def test_a_killed_run_goes_on_to_the_bit(tmp_path: Path, finetune: Callable[..., Outcome]) -> None:
    keys = [*SCRATCH, *both(numbers(tmp_path / "t.json", 40)), "train.steps=4", "checkpoint.every=2"]
    outcome = finetune(*keys)
    straight = [row["loss"] for row in outcome.folder.rows() if "loss" in row]
    folder_of(outcome.folder.checkpoints, 4).rename(tmp_path / "gone")
    again = finetune(*keys)
    assert (again.first, again.step) == (2, 4)
    assert [row["loss"] for row in again.folder.rows() if "loss" in row] == straight
    assert again.metrics == outcome.metrics


def test_what_is_wrong_is_named(tmp_path: Path, one: Cluster, bases: dict[str, Path]) -> None:
    keys = [*both(numbers(tmp_path / "t.json", 4)), f"base.path={bases['bert']}"]
    with pytest.raises(
        UserError, match=r"task\.stride 20: beside a question of 12 tokens a window of data\.max_len 32 has 17"
    ):
        make(tmp_path, one, *keys, "task.stride=20")
    with pytest.raises(UserError, match=r"question 1: the question has \d+ tokens: .*task\.max_question_len \(2\)"):
        make(tmp_path, one, *keys, "task.max_question_len=2", "data.too_long=error")
    task = make(tmp_path, one, *keys, "task.max_question_len=2")
    assert "4 of 4 questions are longer than task.max_question_len 2" in task.notes[0]
