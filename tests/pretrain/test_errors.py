"""What a user may get wrong, through the front door: one line says what to do, exit code 2, nothing left behind."""

import re
from pathlib import Path

import pytest

from cairn.train.folder import RunFolder
from tests.pretrain.conftest import Place

CASES = {
    "typo": ("gpt", ["train.stepz=3"], "train.stepz: unknown key; did you mean train.steps"),
    "type": ("gpt", ["train.steps=many"], "train.steps: expected"),
    "config": ("gtp", [], "gtp.yaml: no such file; did you mean .*gpt.yaml"),
    "source": ("gpt", ["data.source={here}/nowhere"], "data.source.*nowhere"),
    "empty": ("gpt", ["data.source={here}/empty"], "data.source.*empty"),
    "short": (
        "gpt",
        ["data.source={here}/short"],
        "data.source.* fewer than one sequence of 33; .*data.seq_len",
    ),
    "vocabulary": ("gpt", ["model.vocab_size=100"], "model.vocab_size 100 is smaller than the tokenizer's 263"),
    "mask": (
        "bert",
        ["tokenizer.name=file", "tokenizer.path={here}/vocab.txt"],
        r"objective.name masked needs \[MASK\].*tokenizer",
    ),
    "divide": (
        "gpt",
        ["train.micro_batch_size=3"],
        "train.global_batch_size 8 is not .* 3 x world size 1",
    ),
    "objective": ("bert", ["objective.name=causal"], "model.name bert trains with objective.name masked"),
    "offload": ("gpt", ["engine.offload=optimizer", "engine.zero_stage=0"], "engine.offload=optimizer needs"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_says_what_to_do(place: Place, name: str) -> None:
    (place.here / "empty").mkdir(exist_ok=True)
    (place.here / "empty" / "a.txt").touch()
    (place.here / "short").mkdir(exist_ok=True)
    for i in range(3):
        (place.here / "short" / f"{i}.txt").write_text(f"{i} words")
    (place.here / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh", "##a", "##b"]))
    config, overrides, expected = CASES[name]
    argv = [f"run.name={name}", *(override.format(here=place.here) for override in overrides)]
    said = place.door(place.here / f"{config}.yaml", *argv, code=2).text
    errors = [line for line in said.splitlines() if not line.startswith("prepared ")]
    assert len(errors) == 1, said
    assert errors[0].startswith("error: ")
    assert re.search(expected, errors[0]), said
    if name != "offload":  # which is met when the model is built, and may be mended in the same folder
        assert not place.folder(name).path.exists()


def test_a_mistake_is_told_once(place: Place) -> None:
    """Of two ranks that both meet it."""
    said = place.run(place.gpt, "ranks", ranks=2, code=2).text
    assert said.count("error:") == 1
    assert re.search("train.global_batch_size 8 is not a multiple of .*8 x world size 2", said)


def test_another_config_does_not_go_on_in_a_run(place: Place, straight: RunFolder) -> None:
    before = straight.config.read_bytes()
    said = place.run(place.gpt, "straight", "engine.precision=bf16", "seed=7", code=2).text
    assert "seed was 1234, now 7" in said
    assert straight.config.read_bytes() == before


def test_another_corpus_does_not_go_on_in_a_run(place: Place, tmp_path: Path) -> None:
    """The same path, other text."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(9):
        (corpus / f"{i}.txt").write_text(f"{i} ships went out to sea. " * 20)
    own = (f"data.source={corpus}", "train.steps=2", "checkpoint.every=1")
    place.run(place.gpt, "sea", *own)
    for step in ("step-00000002",):
        (place.folder("sea").checkpoints / step).rename(tmp_path / step)
    (corpus / "10.txt").write_text("And then they came back. " * 20)
    said = place.run(place.gpt, "sea", *own, code=2).text
    assert "the corpus is not the one this run was trained with" in said
