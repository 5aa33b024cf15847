"""Fine-tuning on labelled texts: it learns, resumes to the bit, keeps its best, and names what is wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cairn.cluster import Cluster
from cairn.data.tokenizer import BytesTokenizer
from cairn.errors import UserError
from cairn.hub import bert
from cairn.hub.heads import head_counterpart
from cairn.models.headed import Headed
from cairn.train.checkpoint import folder_of, steps_in
from cairn.train.outcome import Outcome
from cairn.train.run import load_model
from finetune.build import build_task, make_task
from finetune.run import outputs_of
from tests.finetune.conftest import config_of, reviews

Run = Callable[..., Outcome]
SCRATCH = [
    "base.path=",
    "tokenizer={name: wordpiece, vocab_size: 300}",
    "model={name: bert, n_layer: 2, n_head: 2, d_model: 32, max_seq_len: 48, dropout: 0.0, attention_dropout: 0.0}",
]
QUICK = ["train.global_batch_size=16", "train.micro_batch_size=16", "optim.lr=3e-3", "run.name=r"]


def data(folder: Path, n: int = 240) -> list[str]:
    train, valid = reviews(folder / "train.tsv", n), reviews(folder / "valid.tsv", 64, seed=1)
    return [f"data.train={train}", f"data.valid={valid}"]


@pytest.mark.parametrize(("kind", "pooling"), [("bert", "token"), ("gpt", "token"), ("bert", "mean")])
def test_it_learns_from_a_run_of_either_kind(
    kind: str, pooling: str, tmp_path: Path, bases: dict[str, Path], finetune: Run
) -> None:
    keys = [*data(tmp_path), *QUICK, f"base.path={bases[kind]}", "train.epochs=6", "train.evals=3", "base.dropout=0"]
    keys += [f"task.pooling={pooling}"]
    outcome = finetune(*keys)
    assert outcome.step == 6 * 240 // 16
    assert outcome.best is not None
    assert outcome.best.value >= 0.95
    run = load_model(outcome.folder.path, torch.device("cpu"))
    assert run.config.task.labels == ["neg", "pos"]  # type: ignore[union-attr]


def test_a_killed_run_goes_on_to_the_bit(tmp_path: Path, bases: dict[str, Path], finetune: Run) -> None:
    keys = [*data(tmp_path, 64), *QUICK, f"base.path={bases['bert']}", "train.steps=8", "checkpoint.every=4"]
    outcome = finetune(*keys, "base.dropout=0.1", "select.metric=loss", "train.eval_every=8")
    straight = [row["loss"] for row in outcome.folder.rows() if "loss" in row]
    folder_of(outcome.folder.checkpoints, 8).rename(tmp_path / "gone")
    again = finetune(*keys, "base.dropout=0.1", "select.metric=loss", "train.eval_every=8")
    assert (again.first, again.step) == (4, 8)
    assert [row["loss"] for row in again.folder.rows() if "loss" in row] == straight


@pytest.mark.parametrize("pooling", ["token", "mean"])
@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_packed_texts_have_the_outputs_they_have_alone(
    kind: str, pooling: str, tmp_path: Path, one: Cluster, bases: dict[str, Path]
) -> None:
    keys = [*data(tmp_path, 40), f"base.path={bases[kind]}", f"task.pooling={pooling}"]
    task = make_task(config_of(tmp_path, *keys), one)
    model = task.models()["model"]
    together = outputs_of(task, model, task.examples["valid"], 64)
    alone = outputs_of(task, model, task.examples["valid"], 1)
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_the_mean_is_that_over_a_texts_tokens(tmp_path: Path, one: Cluster, bases: dict[str, Path]) -> None:
    task = make_task(config_of(tmp_path, *data(tmp_path, 40), f"base.path={bases['bert']}", "task.pooling=mean"), one)
    model = task.models()["model"].eval()
    assert isinstance(model, Headed)
    examples = task.examples["valid"][:9]
    for example, output in zip(examples, outputs_of(task, model, examples, 9), strict=True):
        ids = torch.from_numpy(example.item["input_ids"])[None]
        with torch.no_grad():
            expected = model.head(model.hidden(ids, torch.zeros_like(ids)).mean(1))[0]
        np.testing.assert_allclose(output, expected, atol=1e-5)
    with pytest.raises(UserError, match=r"task\.pooling mean cannot be exported"):
        head_counterpart(bert, model, task.section)


def test_the_best_checkpoint_is_kept_and_used_and_patience_ends_the_run(tmp_path: Path, finetune: Run) -> None:
    keys = [*SCRATCH, *data(tmp_path), *QUICK, "train.steps=400", "train.eval_every=10", "checkpoint.keep_last=1"]
    keys += ["select.metric=accuracy", "select.patience=3", "checkpoint.every=10"]
    outcome = finetune(*keys)
    best = outcome.best
    assert best is not None
    assert outcome.step == best.step + 30 < 400
    assert steps_in(outcome.folder.checkpoints) == [best.step, outcome.step]
    assert load_model(outcome.folder.path, torch.device("cpu")).step == best.step
    again = finetune(*keys)
    assert (again.first, again.step) == (outcome.step, outcome.step)  # it had ended


def test_lora_trains_little_and_merges_to_the_same(
    tmp_path: Path, one: Cluster, bases: dict[str, Path], finetune: Run
) -> None:
    keys = [*data(tmp_path), *QUICK, f"base.path={bases['bert']}", "tune.name=lora", "tune.rank=4", "base.dropout=0"]
    task = make_task(config_of(tmp_path, *keys), one)
    model = task.models()["model"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained if name.startswith("blocks")} == {"lora_a", "lora_b"}
    full = make_task(config_of(tmp_path, *keys[:-3], "base.dropout=0"), one)
    torch.manual_seed(0)
    plain = full.models()["model"]
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if ".lora_" not in n})
    examples = task.examples["valid"]
    np.testing.assert_allclose(  # B is zero: nothing has changed yet
        outputs_of(task, model, examples, 64), outputs_of(full, plain, examples, 64), atol=1e-6
    )
    outcome = finetune(*keys, "train.epochs=8", "optim.lr=1e-2", "train.evals=1")
    losses = [row["loss"] for row in outcome.folder.rows() if "loss" in row]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    run = load_model(outcome.folder.path, torch.device("cpu"))
    assert not any("lora" in name for name, _ in run.model.named_parameters())
    merged = build_task(run.config, run.tokenizer)  # type: ignore[arg-type]
    measured = merged.measure(examples, outputs_of(merged, run.model, examples, 64))
    assert measured["accuracy"] == outcome.metrics["valid/accuracy"]


def test_a_frozen_body_stays_as_it_was(tmp_path: Path, bases: dict[str, Path], finetune: Run) -> None:
    keys = [*data(tmp_path, 64), *QUICK, f"base.path={bases['bert']}", "train.steps=4", "tune.name=frozen"]
    outcome = finetune(*keys, "tune.last_blocks=1")
    base, tuned = (
        dict(load_model(p, torch.device("cpu")).model.named_parameters()) for p in (bases["bert"], outcome.folder.path)
    )
    same = {name for name in tuned.keys() & base.keys() if torch.equal(tuned[name], base[name])}
    moved = (tuned.keys() & base.keys()) - same
    assert moved
    assert all(name.startswith(("blocks.1.", "pooler.")) for name in moved)


def test_seeds_are_judged_by_the_same_examples(tmp_path: Path, one: Cluster, bases: dict[str, Path]) -> None:
    keys = [f"data.train={reviews(tmp_path / 't.tsv', 200)}", f"base.path={bases['bert']}"]
    a, b = (make_task(config_of(tmp_path, *keys, f"seed={seed}"), one) for seed in (1, 2))
    assert [e.place for e in a.examples["valid"]] == [e.place for e in b.examples["valid"]]
    assert 10 <= len(a.examples["valid"]) <= 35
    assert [a.origin(k) for k in range(20)] != [b.origin(k) for k in range(20)]


@pytest.mark.slow
def test_regression_and_label_sets(tmp_path: Path, finetune: Run) -> None:
    rows = [(" ".join(["sea"] * (i % 8) + ["men"] * (7 - i % 8)), i % 8) for i in range(160)]
    (tmp_path / "n.csv").write_text("text,label\n" + "".join(f"{t},{n / 7}\n" for t, n in rows))
    keys = [*SCRATCH, *QUICK, f"data.train={tmp_path / 'n.csv'}", f"data.valid={tmp_path / 'n.csv'}"]
    keys[1] = "tokenizer.name=bytes"
    outcome = finetune(*keys, "task.name=regress", "train.epochs=8", "run.name=n")
    assert outcome.metrics["valid/pearson"] > 0.9
    (tmp_path / "m.csv").write_text(
        "text,labels\n" + "".join(f"{t},{';'.join(['sea'] * (n > 0) + ['men'] * (n < 7))}\n" for t, n in rows)
    )
    keys[-2:] = [f"data.train={tmp_path / 'm.csv'}", f"data.valid={tmp_path / 'm.csv'}"]
    outcome = finetune(*keys, "task.name=multilabel", "task.delimiter=;", "train.epochs=12", "run.name=m")
    assert outcome.metrics["valid/f1_micro"] > 0.95
    assert outcome.metrics["valid/exact"] > 0.8


def test_rare_classes_weigh_more_where_weights_are_balanced(
    tmp_path: Path, one: Cluster, bases: dict[str, Path]
) -> None:
    (tmp_path / "t.tsv").write_text("text\tlabel\n" + "a film\tx\n" * 30 + "the sea\ty\n" * 10)
    keys = [f"data.train={tmp_path / 't.tsv'}", f"data.valid={tmp_path / 't.tsv'}", f"base.path={bases['bert']}"]
    task = make_task(config_of(tmp_path, *keys, "task.class_weights=balanced"), one)
    samples = task.samples("valid")
    batch = samples.collate([samples.item(0), samples.item(39)])  # type: ignore[attr-defined]
    outputs = torch.zeros(2, 2)
    assert task.weights(batch)["loss"] == pytest.approx(20 / 30 + 20 / 10)
    assert float(task.sums(outputs, batch)["loss"]) == pytest.approx((20 / 30 + 20 / 10) * np.log(2))


@pytest.mark.parametrize(
    ("rows", "overrides", "said"),
    [
        ("text\tlabel\na b\tx\na c\ty\n", ["task.text=body"], r"line 2: no column 'body'.*task\.text"),
        ("text\tlabel\na b\tx\n \ty\n", [], r"line 3: column 'text' is empty"),
        ("text\tlabel\na b\tx\na\t\n", [], r"line 3: label is empty"),
        ("text\tlabel\na b\tx\na c\tx\n", [], r"t\.tsv: one class \(all rows have label 'x'\)"),
        ("text\tlabel\na b\tx\tz\n", [], r"line 2 has 3 columns .*, the header 2"),
        ("text\tlabel\na b\tx\na c\ty\n", ["task.name=regress"], r"line 2: label 'x' is no number"),
        ("text\tlabel\n", [], r"t\.tsv: no examples"),
        (
            "text\tlabel\na b\tx\na c\ty\n",
            ["data.valid="],
            r"held_out leaves \d rows to train on and \d to judge",
        ),
        ("text\tlabel\na b\tx\na c\tx\n", ["data.valid="], r"t\.tsv: one class"),
        ("text\tlabel\na b\tx\n" + "sea " * 90 + "\ty\n", ["data.too_long=error"], r"line 3: \d+ tokens, and \d+ fit"),
        ("text\tlabel\na b\tx\na c\ty\n", ["base.path=nowhere"], r"base\.path nowhere: neither a run folder"),
        (
            "text\tlabel\na b\tx\na c\ty\n",
            ["task.name=translate"],
            r"base\.path .*bert: task\.name translate needs.*seq2seq",
        ),
        ("text\tlabel\na b\tx\na c\ty\n", ["data.max_len=99"], r"data\.max_len 99 is more than model\.max_seq_len 48"),
    ],
)
def test_what_is_wrong_is_named(
    rows: str, overrides: list[str], said: str, tmp_path: Path, one: Cluster, bases: dict[str, Path]
) -> None:
    (tmp_path / "t.tsv").write_text(rows)
    keys = [f"data.train={tmp_path / 't.tsv'}", f"data.valid={tmp_path / 't.tsv'}", f"base.path={bases['bert']}"]
    with pytest.raises(UserError, match=said) as found:
        make_task(config_of(tmp_path, *keys, *overrides), one)
    assert len(str(found.value).splitlines()) == 1


def test_a_class_of_held_out_rows_alone_is_a_class(tmp_path: Path, one: Cluster, bases: dict[str, Path]) -> None:
    (tmp_path / "t.tsv").write_text("text\tlabel\n" + "".join(f"a film\tL{n}\n" for n in range(30)))
    task = make_task(config_of(tmp_path, f"data.train={tmp_path / 't.tsv'}", f"base.path={bases['bert']}"), one)
    assert len(task.section.labels) == task.sizes["train"] + task.sizes["valid"] == 30


def test_a_label_that_training_never_saw_is_named(tmp_path: Path, one: Cluster, bases: dict[str, Path]) -> None:
    (tmp_path / "v.tsv").write_text("text\tlabel\na film\tmeh\n")
    keys = [*data(tmp_path, 40), f"data.valid={tmp_path / 'v.tsv'}", f"base.path={bases['bert']}"]
    with pytest.raises(
        UserError, match=r"v\.tsv: line 2: label 'meh' is not among the labels of training \(neg, pos\)"
    ):
        make_task(config_of(tmp_path, *keys), one)


def test_a_tokenizer_that_is_not_the_checkpoints_is_named(tmp_path: Path, one: Cluster, bases: dict[str, Path]) -> None:
    other = tmp_path / "other"
    shutil.copytree(bases["bert"], other)
    shutil.rmtree(other / "tokenizer")
    BytesTokenizer().save(other / "tokenizer")
    with pytest.raises(UserError, match=r"other/tokenizer is not the tokenizer that step-00000004 was trained with"):
        make_task(config_of(tmp_path, *data(tmp_path, 40), f"base.path={other}"), one)
