"""Fine-tuned runs as classes of transformers: the same outputs, and the same predictions from its pipelines."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from cairn.config.data import WordPieceSection
from cairn.config.finetune import (
    AnswerSection,
    ChoiceSection,
    ClassifySection,
    LoRASection,
    MultilabelSection,
    RegressSection,
    TagSection,
    TaskSection,
)
from cairn.config.schema import FinetuneConfig
from cairn.data.huggingface import HuggingFaceTokenizer, train_wordpiece
from cairn.data.tables import Row
from cairn.errors import UserError
from cairn.hub import export_run as export_module
from cairn.hub.body import load_body
from cairn.hub.export_run import export_run, write_model
from cairn.models.headed import Headed
from cairn.train.checkpoint import newest
from cairn.train.run import LoadedRun, load_model
from finetune.build import build_task
from finetune.run import outputs_of
from tests.hub.runs import BODIES, make_finetuned

LABELS = ["bad", "good", "odd"]
TASKS: dict[str, TaskSection] = {
    "classify": ClassifySection(labels=LABELS),
    "regress": RegressSection(),
    "multilabel": MultilabelSection(labels=LABELS),
    "tag": TagSection(labels=["O", "B-NAME", "I-NAME"], spaces=True),
    "answer": AnswerSection(),
    "choice": ChoiceSection(),
}
CLASSES = {
    "classify": "SequenceClassification",
    "regress": "SequenceClassification",
    "multilabel": "SequenceClassification",
    "tag": "TokenClassification",
    "answer": "QuestionAnswering",
    "choice": "MultipleChoice",
}
TEXTS = ["a film that I liked", "no", "I would not see it twice, and you?"]


def opened(run: Path) -> LoadedRun:
    return load_model(run, torch.device("cpu"))


def pipeline(task: str, folder: Path, **keys: Any) -> Any:
    return transformers.pipeline(task, model=str(folder), device="cpu", **keys)


def predictions(loaded: LoadedRun, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours, as `cairn predict` makes them."""
    assert isinstance(loaded.config, FinetuneConfig)
    task = build_task(loaded.config, loaded.tokenizer)
    examples = task.encode([Row(f"row {i}", row) for i, row in enumerate(rows)], labelled=False)
    return list(task.predict(examples, outputs_of(task, loaded.model, examples, 2)))


def byte_level(folder: Path) -> Path:
    """As GPT-2's tokenizer: it pads with the end of text, or rather with nothing."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<|endoftext|>"])
    HuggingFaceTokenizer(backend, {"eos": "<|endoftext|>"}).save(folder)
    return folder


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wordpiece")
    text = Path(os.__file__).read_text(encoding="utf-8")
    train_wordpiece([text], WordPieceSection(vocab_size=400), folder)
    return folder


@pytest.mark.parametrize(
    ("body", "task"), [(body, task) for body in BODIES for task in TASKS if body == "Bert" or task != "choice"]
)
def test_each_head_becomes_its_class(body: str, task: str, tmp_path: Path) -> None:
    run = make_finetuned(tmp_path / "run", BODIES[body], TASKS[task])
    (said,) = export_run(run, tmp_path / "out")  # which compares outputs, of a text alone and of padded ones
    assert f"{body}For{CLASSES[task]}, step 7; logits differ by" in said
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [f"{body}For{CLASSES[task]}"]
    auto = getattr(transformers, f"AutoModelFor{CLASSES[task]}")
    theirs = auto.from_pretrained(tmp_path / "out", local_files_only=True)
    assert theirs.config.pad_token_id == 0
    if labels := getattr(TASKS[task], "labels", None):
        assert [theirs.config.id2label[i] for i in range(len(labels))] == labels
        assert theirs.config.label2id[labels[1]] == 1
    problems = {"classify": "single_label", "multilabel": "multi_label"}
    assert str(theirs.config.problem_type).removesuffix("_classification") == problems.get(
        task, "regression" if task == "regress" else "None"
    )


@pytest.mark.parametrize("body", BODIES)
def test_the_pipeline_classifies_as_we_do(body: str, tmp_path: Path) -> None:
    task = ClassifySection(labels=LABELS, text_pair="other")
    run, out = make_finetuned(tmp_path / "run", BODIES[body], task), tmp_path / "out"
    export_run(run, out)
    pairs = [{"text": text, "text_pair": other} for text, other in zip(TEXTS, ["yes", "why, then?", "?"], strict=True)]
    ours = predictions(opened(run), [{"text": pair["text"], "other": pair["text_pair"]} for pair in pairs])
    classify = pipeline("text-classification", out)
    for theirs in (classify(pairs), classify(pairs, batch_size=3)):
        assert [row["label"] for row in theirs] == [row["prediction"] for row in ours]
        np.testing.assert_allclose([row["score"] for row in theirs], [row["probability"] for row in ours], atol=1e-5)


def test_the_pipeline_gives_our_numbers_and_sets(tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS]
    run = make_finetuned(tmp_path / "number", BODIES["Llama"], RegressSection())
    export_run(run, tmp_path / "number-out")
    ours = [row["prediction"] for row in predictions(opened(run), rows)]
    theirs = [row["score"] for row in pipeline("text-classification", tmp_path / "number-out")(TEXTS, batch_size=3)]
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)

    run = make_finetuned(tmp_path / "sets", BODIES["Bert"], TASKS["multilabel"])
    export_run(run, tmp_path / "sets-out")
    scores = [row["probability"] for row in predictions(opened(run), rows)]
    for row, theirs in zip(
        scores, pipeline("text-classification", tmp_path / "sets-out", top_k=None)(TEXTS), strict=True
    ):
        assert {one["label"]: pytest.approx(one["score"], abs=1e-5) for one in theirs} == row


@pytest.mark.parametrize("body", BODIES)
def test_the_pipeline_tags_as_we_do(body: str, tmp_path: Path, wordpiece: Path) -> None:
    tokenizer = wordpiece if body == "Bert" else None
    run, out = make_finetuned(tmp_path / "run", BODIES[body], TASKS["tag"], tokenizer=tokenizer), tmp_path / "out"
    export_run(run, out)
    loaded, words = opened(run), ["Open", "the", "files", "that", "John", "Smith", "read"]
    (ours,) = predictions(loaded, [{"tokens": words}])
    assert len(set(ours["prediction"])) > 1
    theirs = pipeline("token-classification", out, ignore_labels=[])(" ".join(words))
    sizes = [len(loaded.tokenizer.encode(word if i == 0 else f" {word}")) for i, word in enumerate(words)]
    assert sum(sizes) == len(theirs)
    assert [theirs[sum(sizes[:i])]["entity"] for i in range(len(words))] == ours["prediction"]


def test_padding_that_is_the_end_of_text_gets_an_id_of_its_own(tmp_path: Path) -> None:
    """GPT-2's: else transformers would take the end of text, which the output is read from, for padding."""
    tokenizer = byte_level(tmp_path / "tokenizer")
    for name, rows in (("full", 257), ("roomy", None)):
        section = BODIES["GPT2"].model_copy(update={"vocab_size": rows})
        run, out = (
            make_finetuned(tmp_path / name, section, TASKS["classify"], tokenizer=tokenizer),
            tmp_path / f"{name}-o",
        )
        export_run(run, out)
        config = json.loads((out / "config.json").read_text())
        assert (config["pad_token_id"], config["eos_token_id"]) == (257, 256)
        assert config["vocab_size"] == (258 if rows else 384)
        ours = predictions(opened(run), [{"text": text} for text in TEXTS])
        theirs = pipeline("text-classification", out)(TEXTS, batch_size=3)
        np.testing.assert_allclose([row["score"] for row in theirs], [row["probability"] for row in ours], atol=1e-5)


def test_lora_is_exported_merged(tmp_path: Path) -> None:
    section, tune = BODIES["Llama"], LoRASection(rank=2, targets=["qkv", "down"])
    run, out = make_finetuned(tmp_path / "run", section, TASKS["classify"], tune), tmp_path / "out"
    export_run(run, out)
    checkpoint, _ = newest(run / "checkpoints")
    assert checkpoint is not None
    w, a, b = (checkpoint.read(f"model/weight/blocks.1.mlp.down.{name}") for name in ("weight", "lora_a", "lora_b"))
    assert w is not None
    assert a is not None
    assert b is not None
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out, local_files_only=True)
    torch.testing.assert_close(theirs.model.layers[1].mlp.down_proj.weight.detach(), w + 8 * b @ a)
    rows = [{"text": text} for text in TEXTS]
    expected = [row["probability"] for row in predictions(opened(run), rows)]
    scores = [row["score"] for row in pipeline("text-classification", out)(TEXTS)]
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize("body", BODIES)
def test_another_fine_tuning_begins_from_the_body_of_what_was_exported(body: str, tmp_path: Path) -> None:
    run, out = make_finetuned(tmp_path / "run", BODIES[body], TASKS["answer"]), tmp_path / "out"
    export_run(run, out)
    found = load_body(out)
    assert found.architecture == f"{body}ForQuestionAnswering"
    ours = {name: p for name, p in opened(run).model.named_parameters() if not name.startswith("head.")}
    assert found.weights.keys() == ours.keys()
    assert all(torch.equal(found.weights[name], p) for name, p in ours.items())
    assert found.tokenizer.encode("a b") == opened(run).tokenizer.encode("a b")


def test_choices_of_a_decoder_are_refused(tmp_path: Path) -> None:
    run = make_finetuned(tmp_path / "run", BODIES["GPT2"], TASKS["choice"])
    with pytest.raises(UserError, match=r"transformers has no GPT2ForMultipleChoice: task\.name choice of model\.name"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("body", BODIES)
def test_a_head_that_computes_something_else_is_removed(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(folder: Path, architecture: str, arguments: Any, weights: dict[str, torch.Tensor], size: str) -> None:
        name = next(name for name in weights if name.endswith(("score.weight", "classifier.weight")))
        write_model(folder, architecture, arguments, weights | {name: weights[name].flip(0)}, size)

    monkeypatch.setattr(export_module, "write_model", spoiled)
    run = make_finetuned(tmp_path / "run", BODIES[body], TASKS["classify"])
    assert isinstance(opened(run).model, Headed)
    with pytest.raises(UserError, match="logits differ from ours by"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
