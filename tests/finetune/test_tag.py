"""A tag a word: the loss of transformers, sentences of any length, what is wrong by file, line and word."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from cairn.cluster import Cluster
from cairn.errors import UserError
from cairn.train.outcome import Outcome
from finetune.build import make_task
from finetune.run import outputs_of
from finetune.tag import Tag, windows
from tests.finetune.conftest import config_of
from tests.finetune.theirs import same_model, save

LAST = {"LOC": "city", "PER": "smith"}
CITIES, NAMES, OTHER = ["oslo", "rome", "lima"], ["ann", "bob"], ["the", "sea", "of", "men", "was", "a", "story"]


def sentences(path: Path, n: int, seed: int = 0) -> Path:
    """CoNLL columns: names, cities of one word or two, and other words."""
    rng = random.Random(seed)
    lines = []
    for _ in range(n):
        for _ in range(rng.randint(2, 6)):
            lines += [f"{word} O" for word in rng.choices(OTHER, k=rng.randint(1, 2))]
            kind, word = rng.choice([("LOC", rng.choice(CITIES)), ("PER", rng.choice(NAMES))])
            lines += [f"{word} B-{kind}"] + [f"{LAST[kind]} I-{kind}"] * rng.randint(0, 1)
        lines.append("")
    path.write_text("\n".join(lines))
    return path


SCRATCH = [
    "task.name=tag",
    "tokenizer={name: wordpiece, vocab_size: 300}",
    "model={name: bert, n_layer: 2, n_head: 2, d_model: 32, max_seq_len: 48, dropout: 0.0, attention_dropout: 0.0}",
]


def test_loss_and_outputs_are_those_of_transformers(tmp_path: Path, one: Cluster) -> None:
    hf = save(transformers.BertForTokenClassification, tmp_path, num_labels=5)
    data = sentences(tmp_path / "t.conll", 9)
    task, model = same_model(
        hf, "classifier", tmp_path, one, "task.name=tag", f"data.train={data}", f"data.valid={data}"
    )
    assert isinstance(task, Tag)
    assert task.section.labels == ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]
    expected, chosen = 0.0, []
    for example in task.examples["valid"]:
        ids, labels = (torch.from_numpy(example.item[key])[None] for key in ("input_ids", "labels"))
        with torch.no_grad():
            out = hf(input_ids=ids, labels=labels)
        expected += float(out.loss) * int((labels != -100).sum())
        chosen.append(out.logits.argmax(-1)[labels != -100].numpy())
    samples = task.samples("valid")
    batch = samples.collate([samples.item(n) for n in range(9)])  # type: ignore[attr-defined]
    with torch.no_grad():
        outputs = task.forward(model, batch)
        assert float(task.sums(outputs, batch)["loss"]) == pytest.approx(expected, rel=1e-5)
    assert task.weights(batch)["loss"] == sum(len(c) for c in chosen)
    for ours, theirs in zip(task.split(outputs, batch), chosen, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(outputs_of(task, model, task.examples["valid"], 1), chosen, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_a_long_sentence_is_windows_of_whole_words(
    kind: str, tmp_path: Path, one: Cluster, bases: dict[str, Path]
) -> None:
    rng = random.Random(0)
    rows = [{"tokens": rng.choices(["film", "story", "xq", "\u3000"], k=k), "tags": ["A", "B"] * k} for k in (1, 70)]
    rows = [{"tokens": row["tokens"], "tags": row["tags"][: len(row["tokens"])]} for row in rows]
    rows.append({"tokens": ["story" * 40, "film"], "tags": ["A", "B"]})  # a word that is wider than a window
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = make_task(
        config_of(tmp_path, "task.name=tag", f"data.train={path}", f"data.valid={path}", f"base.path={bases[kind]}"),
        one,
    )
    examples = task.examples["valid"]
    assert len(examples) > len(rows)
    assert max(len(example.item["input_ids"]) for example in examples) <= 48
    assert task.notes == []
    model = task.models()["model"]
    outputs = outputs_of(task, model, examples, 4)
    predicted = list(task.predict(examples, outputs))
    assert [len(one["prediction"]) for one in predicted] == [1, 70, 2]
    blind = task.encode(list(task.rows(str(path))), labelled=False)
    assert all((example.item["labels"] == -100).all() for example in blind)
    for a, b in zip(outputs_of(task, model, blind, 4), outputs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_windows() -> None:
    assert list(windows([2, 2, 2], 6)) == [(0, 3)]
    assert list(windows([2, 2, 3, 6, 1], 6)) == [(0, 2), (2, 3), (3, 4), (4, 5)]


def test_pieces_are_those_of_running_text(tmp_path: Path, one: Cluster, bases: dict[str, Path]) -> None:
    path = sentences(tmp_path / "t.conll", 8)
    task = make_task(
        config_of(tmp_path, "task.name=tag", f"data.train={path}", f"data.valid={path}", f"base.path={bases['gpt']}"),
        one,
    )
    assert isinstance(task, Tag)
    row, example = next(iter(task.rows(str(path)))), task.examples["valid"][0]
    ids = example.item["input_ids"]
    running = task.tokenizer.encode(" ".join(row.values["tokens"]))
    assert ids.tolist() == [*running[: len(ids) - 1], task.tokenizer.eos_id]
    first = np.flatnonzero(example.item["starts"])
    words = [f" {word[0]}" for word in row.values["tokens"][1 : len(first)]]
    assert [task.tokenizer.decode(ids[n : n + 2]) for n in first[1:]] == words


def test_chinese_has_no_spaces(tmp_path: Path, one: Cluster, bases: dict[str, Path]) -> None:
    path = tmp_path / "t.conll"
    path.write_text("我 O\n在 O\n北 B-LOC\n京 I-LOC\n2 O\n\n中 B-ORG\n共 I-ORG\n中 I-ORG\n央 I-ORG\n")
    keys = ["task.name=tag", f"data.train={path}", f"data.valid={path}", f"base.path={bases['gpt']}"]
    task = make_task(config_of(tmp_path, *keys), one)
    assert isinstance(task, Tag)
    assert task.section.spaces is False
    names = {name: n for n, name in enumerate(task.section.labels)}
    said = [
        np.array([names[t] for t in tags]) for tags in (["O", "O", "B-LOC", "I-LOC", "O"], ["B-ORG"] + ["I-ORG"] * 3)
    ]
    found = list(task.predict(task.examples["valid"], said))
    assert found[0]["entities"] == [{"type": "LOC", "start": 2, "end": 4, "text": "北京"}]
    assert found[1]["entities"][0]["text"] == "中共中央"
    assert task.measure(task.examples["valid"], said)["f1"] == 1.0
    spaced = make_task(config_of(tmp_path, *keys, "task.spaces=true"), one)
    assert next(spaced.predict(spaced.examples["valid"], said))["entities"][0]["text"] == "北 京"


@pytest.mark.slow
def test_it_learns(tmp_path: Path, finetune: Callable[..., Outcome]) -> None:
    train, valid = sentences(tmp_path / "t.conll", 200), sentences(tmp_path / "v.conll", 40, seed=1)
    keys = [*SCRATCH, f"data.train={train}", f"data.valid={valid}", "train.epochs=8", "optim.lr=5e-3", "train.evals=2"]
    outcome = finetune(*keys, "train.global_batch_size=16", "train.micro_batch_size=8", "run.name=r")
    assert outcome.metrics["valid/f1"] >= 0.95
    assert outcome.metrics["valid/accuracy"] >= 0.95
    assert outcome.best is not None
    assert outcome.best.value == outcome.metrics["valid/f1"]


def test_a_file_may_have_words_alone_to_be_predicted(tmp_path: Path, one: Cluster, bases: dict[str, Path]) -> None:
    train, bare = sentences(tmp_path / "t.conll", 8), tmp_path / "bare.txt"
    bare.write_text("oslo\nwas\n\nann\n")
    keys = ["task.name=tag", f"data.train={train}", f"data.valid={train}", f"base.path={bases['bert']}"]
    task = make_task(config_of(tmp_path, *keys), one)
    rows = list(task.rows(str(bare)))
    assert [row.values for row in rows] == [{"tokens": ["oslo", "was"]}, {"tokens": ["ann"]}]
    assert not task.labelled(rows)
    assert task.labelled(list(task.rows(str(train))))
    with pytest.raises(UserError, match=r"bare\.txt: line 1 has one column"):
        make_task(config_of(tmp_path, *keys, f"data.train={bare}"), one)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "v.conll",
            "a O\n\nb O\nann B-DOG\n",
            r"v\.conll: line 3, word 2 \(ann\): tags 'B-DOG' is not among the labels",
        ),
        ("v.jsonl", '{"tokens": ["a"], "tags": ["O", "O"]}', r"v\.jsonl: line 1: 1 words and 2 tags"),
        (
            "v.jsonl",
            '{"tokens": "a b", "tags": ["O"]}',
            r"line 1: column 'tokens' has no list but a str; set task\.tokens",
        ),
        ("v.csv", "tokens,tags\na,O\n", r"v\.csv: line 2: column 'tokens' has no list .*\.conll"),
        ("v.jsonl", '{"tokens": [], "tags": []}', r"line 1: column 'tokens' is empty"),
        ("v.jsonl", '{"tokens": ["a", ""], "tags": ["O", "O"]}', r"line 1: column 'tokens' has '' in its list"),
        ("v.jsonl", '{"words": ["a"], "tags": ["O"]}', r"no column 'tokens', only 'words', 'tags'; set task\.tokens"),
    ],
)
def test_what_is_wrong_is_named(
    name: str, text: str, said: str, tmp_path: Path, one: Cluster, bases: dict[str, Path]
) -> None:
    (tmp_path / name).write_text(text)
    keys = ["task.name=tag", f"data.train={sentences(tmp_path / 't.conll', 8)}", f"data.valid={tmp_path / name}"]
    with pytest.raises(UserError, match=said) as found:
        make_task(config_of(tmp_path, *keys, f"base.path={bases['bert']}"), one)
    assert len(str(found.value).splitlines()) == 1


def test_one_tag_is_nothing_to_learn(tmp_path: Path, one: Cluster, bases: dict[str, Path]) -> None:
    (tmp_path / "t.txt").write_text("a O\nb O\n")
    keys = ["task.name=tag", f"data.train={tmp_path / 't.txt'}", f"data.valid={tmp_path / 't.txt'}"]
    with pytest.raises(UserError, match=r"t\.txt: one tag \('O'\)"):
        make_task(config_of(tmp_path, *keys, f"base.path={bases['bert']}"), one)
