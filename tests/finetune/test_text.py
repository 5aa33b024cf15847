"""Continued pretraining: it begins where the base ended, by the same loss, for every kind of model."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cairn.cluster import Cluster
from cairn.config.model import GPTSection, Seq2SeqSection
from cairn.errors import UserError
from cairn.train.checkpoint import folder_of
from cairn.train.outcome import Outcome
from cairn.train.run import load_model
from finetune.build import build_task
from finetune.text import open_text
from tests.finetune.conftest import OTHER, config_of
from tests.hub.runs import SMALL, make_pretrained

Run = Callable[..., Outcome]
QUICK = ["task.name=text", "run.name=x", "train.global_batch_size=8", "train.micro_batch_size=4", "optim.lr=3e-3"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = random.Random(3)
    path = tmp_path / "own.txt"
    path.write_text("\n".join(" ".join(rng.choices([*OTHER, "ocean"], k=12)) for _ in range(400)))
    return path


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_it_goes_on_from_a_base(kind: str, corpus: Path, bases: dict[str, Path], finetune: Run) -> None:
    keys = [*QUICK, f"base.path={bases[kind]}", f"data.train={corpus}", "base.dropout=0", "train.evals=2"]
    outcome = finetune(*keys, "train.steps=20")
    rows = [row["valid/loss"] for row in outcome.folder.evaluations()]
    assert rows[-1] < rows[0]
    assert ("valid/bits_per_byte" in outcome.metrics) == (kind == "gpt")
    run = load_model(outcome.folder.path, torch.device("cpu"))
    assert run.tokenizer.fingerprint == load_model(bases[kind], torch.device("cpu")).tokenizer.fingerprint
    with pytest.raises(UserError, match=r"task\.name text predicts nothing of a row"):
        build_task(run.config, run.tokenizer)


def test_its_weights_and_loss_are_those_of_the_base(corpus: Path, tmp_path: Path, one: Cluster) -> None:
    for section in (GPTSection(**SMALL), Seq2SeqSection(**SMALL)):
        base = make_pretrained(tmp_path / section.name, section)
        task = open_text(config_of(tmp_path, *QUICK, f"base.path={base}", f"data.train={corpus}"), one)
        model, run = task.models()["model"], load_model(base, torch.device("cpu"))
        weights = dict(run.model.named_parameters())
        assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
        batch = {name: torch.from_numpy(value)[None] for name, value in task.samples("valid").item(0).items()}
        model.eval()
        assert float(task.loss_sums(model, batch)["loss"]) == float(task.loss_sums(run.model, batch)["loss"])


def test_from_scratch_it_is_pretraining_and_goes_on_to_the_bit(corpus: Path, tmp_path: Path, finetune: Run) -> None:
    model = "model={name: gpt, n_layer: 1, n_head: 2, d_model: 32, max_seq_len: 32, dropout: 0.1}"
    keys = [*QUICK, model, "tokenizer.name=bytes", f"data.train={corpus}", "train.epochs=0.06", "checkpoint.every=2"]
    outcome = finetune(*keys)
    assert outcome.step >= 3
    straight = [row["loss"] for row in outcome.folder.rows() if "loss" in row]
    folder_of(outcome.folder.checkpoints, outcome.step).rename(tmp_path / "gone")
    again = finetune(*keys)
    assert 0 < again.first < again.step == outcome.step
    assert [row["loss"] for row in again.folder.rows() if "loss" in row] == straight


def test_lora_trains_little(corpus: Path, tmp_path: Path, one: Cluster, bases: dict[str, Path]) -> None:
    keys = [*QUICK, f"base.path={bases['gpt']}", f"data.train={corpus}"]
    model = open_text(config_of(tmp_path, *keys, "tune.name=lora"), one).models()["model"]
    assert all(("lora_" in name) == p.requires_grad for name, p in model.named_parameters())
    with pytest.raises(UserError, match=r"leaves task\.name text nothing to train"):
        open_text(config_of(tmp_path, *keys, "tune.name=frozen"), one).models()


def test_mistakes_are_told(corpus: Path, tmp_path: Path, one: Cluster, bases: dict[str, Path]) -> None:
    keys = [*QUICK, f"base.path={bases['gpt']}", f"data.train={corpus}"]
    for more, told in (
        ("data.valid=own.txt", "data.valid: .* leave it out"),
        ("task.seq_len=100", "task.seq_len 100 is longer than model.max_seq_len 48"),
        ("task.objective.name=masked", "model.name gpt trains with objective.name causal, not masked"),
        (f"data.train={tmp_path / 'none.txt'}", "none.txt"),
    ):
        with pytest.raises(UserError, match=told):
            open_text(config_of(tmp_path, *keys, more), one)
