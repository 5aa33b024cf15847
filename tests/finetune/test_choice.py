"""One of several choices: the loss of transformers, any number of choices, what is wrong by line."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from cairn.cluster import Cluster
from cairn.data.batches import blank
from cairn.errors import UserError
from cairn.train.checkpoint import folder_of
from cairn.train.outcome import Outcome
from finetune.build import make_task
from finetune.run import outputs_of
from tests.finetune.conftest import BAD, GOOD, config_of, sentence
from tests.finetune.theirs import same_model, save


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reviews(path: Path, n: int, seed: int = 0) -> Path:
    """Which of two to four reviews is a good one."""
    rng, rows = random.Random(seed), []
    for i in range(n):
        right = rng.randrange(2 + i % 3)
        choices = [sentence(rng, GOOD if c == right else BAD) for c in range(2 + i % 3)]
        rows.append({"question": "which film", "choices": choices, "label": choices[right] if i % 2 else right})
    return write(path, *rows)


def both(file: Path) -> list[str]:
    return ["task.name=choice", f"data.train={file}", f"data.valid={file}"]


def test_loss_is_that_of_transformers(tmp_path: Path, one: Cluster) -> None:
    hf = save(transformers.BertForMultipleChoice, tmp_path)
    task, model = same_model(hf, "classifier", tmp_path, one, *both(reviews(tmp_path / "t.jsonl", 7)))
    examples, expected, logits = task.examples["valid"], 0.0, []
    for example in examples:
        parts = [example.item["choice"] == c for c in range(int(example.item["choice"].max()) + 1)]
        width = max(int(part.sum()) for part in parts)
        ids, segments, real = (torch.zeros(1, len(parts), width, dtype=torch.long) for _ in range(3))
        for c, part in enumerate(parts):
            ids[0, c, : part.sum()] = torch.from_numpy(example.item["input_ids"][part])
            segments[0, c, : part.sum()] = torch.from_numpy(example.item["segment_ids"][part])
            real[0, c, : part.sum()] = 1
        label = torch.from_numpy(example.item["labels"])[None]
        with torch.no_grad():
            out = hf(input_ids=ids, token_type_ids=segments, attention_mask=real, labels=label)
        expected += float(out.loss)
        logits.append(out.logits[0].numpy())
    assert {len(row) for row in logits} == {2, 3, 4}
    samples = task.samples("valid")
    items = [samples.item(n) for n in range(7)]
    batch = samples.collate([*items, blank(items[0])])  # type: ignore[attr-defined]
    with torch.no_grad():
        loss = task.sums(task.forward(model, batch), batch)["loss"]
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert task.weights(batch)["loss"] == 7
    for size in (1, 7):
        for ours, theirs in zip(outputs_of(task, model, examples, size), logits, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_labels_are_numbers_or_texts(tmp_path: Path, one: Cluster, bases: dict[str, Path]) -> None:
    rows = [{"question": "q", "choices": ["x", "y", "z"], "label": label} for label in (0, 2, "1", "z", 1.0)]
    task = make_task(config_of(tmp_path, *both(write(tmp_path / "t.jsonl", *rows)), f"base.path={bases['bert']}"), one)
    assert [int(example.item["labels"]) for example in task.examples["valid"]] == [0, 2, 1, 2, 1]
    (tmp_path / "t.csv").write_text("goal,a,b,right\nq,x,y,1\nq,x,y,x\n")
    keys = ["task.text=goal", "task.choices=[a, b]", "task.label=right", f"base.path={bases['gpt']}"]
    task = make_task(config_of(tmp_path, *both(tmp_path / "t.csv"), *keys), one)
    assert [int(example.item["labels"]) for example in task.examples["valid"]] == [1, 0]
    eos = task.tokenizer.eos_id
    ids = [7 + ord("q"), eos, 7 + ord("x"), eos, 7 + ord("q"), eos, 7 + ord("y"), eos]
    assert task.examples["valid"][0].item["input_ids"].tolist() == ids


@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_predictions_need_no_labels(kind: str, tmp_path: Path, one: Cluster, bases: dict[str, Path]) -> None:
    task = make_task(config_of(tmp_path, *both(reviews(tmp_path / "t.jsonl", 9)), f"base.path={bases[kind]}"), one)
    bare = [{"question": "which", "choices": ["a film", "the sea", "bad men " * 40][: 2 + n % 2]} for n in range(3)]
    rows = list(task.rows(str(write(tmp_path / "bare.jsonl", *bare))))
    assert not task.labelled(rows)
    examples = task.encode(rows, labelled=False)
    assert all(len(example.item["input_ids"]) <= 3 * 48 for example in examples)
    assert task.cut
    found = list(task.predict(examples, outputs_of(task, task.models()["model"], examples, 2)))
    for row, one_found in zip(bare, found, strict=True):
        assert one_found["text"] == row["choices"][one_found["prediction"]]
        assert len(one_found["probability"]) == len(row["choices"])
        assert sum(one_found["probability"]) == pytest.approx(1, abs=1e-4)


SCRATCH = [
    "tokenizer.name=wordpiece",
    "tokenizer.vocab_size=300",
    "model={name: bert, n_layer: 2, n_head: 2, d_model: 32, max_seq_len: 48, dropout: 0.1, attention_dropout: 0.0}",
    "train.global_batch_size=16",
    "train.micro_batch_size=8",
    "optim.lr=3e-3",
    "run.name=r",
]


@pytest.mark.slow
def test_it_learns(tmp_path: Path, finetune: Callable[..., Outcome]) -> None:
    train, valid = reviews(tmp_path / "t.jsonl", 200), reviews(tmp_path / "v.jsonl", 40, seed=1)
    keys = ["task.name=choice", f"data.train={train}", f"data.valid={valid}", "train.epochs=8", "train.evals=1"]
    assert finetune(*SCRATCH, *keys).metrics["valid/accuracy"] >= 0.9


def test_a_killed_run_goes_on_to_the_bit(tmp_path: Path, finetune: Callable[..., Outcome]) -> None:
    keys = [*SCRATCH, *both(reviews(tmp_path / "t.jsonl", 37)), "train.steps=4", "checkpoint.every=2"]
    outcome = finetune(*keys)
    straight = [row["loss"] for row in outcome.folder.rows() if "loss" in row]
    folder_of(outcome.folder.checkpoints, 4).rename(tmp_path / "gone")
    again = finetune(*keys)
    assert (again.first, again.step) == (2, 4)
    assert [row["loss"] for row in again.folder.rows() if "loss" in row] == straight
    assert again.metrics == outcome.metrics


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"choices": ["x", "y"], "label": 2}, r"line 1: label 2 is none of the 2 choices: give its number, 0 to 1"),
        ({"choices": ["x", "y"], "label": "w"}, r"line 1: label 'w' is none of the 2 choices"),
        ({"choices": ["x", "y"], "label": -1}, r"label -1 is none"),
        ({"choices": ["x", "y"], "label": True}, r"label True is none"),
        ({"choices": ["x"], "label": 0}, r"line 1: column 'choices' has 1 choices: give two or more"),
        ({"choices": "x or y", "label": 0}, r"line 1: column 'choices' has no list of texts; set task\.choices"),
        ({"endings": ["x", "y"], "label": 0}, r"line 1: no column 'choices', .*; set task\.choices"),
    ],
)
def test_what_is_wrong_is_named(
    row: dict[str, Any], said: str, tmp_path: Path, one: Cluster, bases: dict[str, Path]
) -> None:
    file = write(tmp_path / "t.jsonl", {"question": "q"} | row)
    with pytest.raises(UserError, match=said) as found:
        make_task(config_of(tmp_path, *both(file), f"base.path={bases['bert']}"), one)
    assert len(str(found.value).splitlines()) == 1
