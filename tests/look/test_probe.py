"""`cairn probe`: features are those of `transformers`, judges find what is there and nothing where nothing is."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from cairn.config.model import Seq2SeqSection
from cairn.config.table import TableFormat
from cairn.data.tokenizer import BytesTokenizer
from cairn.errors import UserError
from cairn.hub.export_run import export_run
from cairn.look.examples import Columns, read_examples, table_format
from cairn.look.features import batches, features
from cairn.look.judge import folds, judge_features, judge_majority, judge_words
from cairn.look.probe import main
from cairn.look.text import body_of, tokenize
from cairn.models.build import build_model
from cairn.train.run import load_model
from tests.look.runs import BERT, GPT, SMALL, make_run

CPU = torch.device("cpu")
TEXTS = ["a", "some words", "quite a number of words, this time", "b c"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {section.name: make_run(folder / section.name, section) for section in (BERT, GPT)}


@pytest.mark.parametrize(("name", "pairs"), [("gpt", None), ("bert", None), ("bert", ["x", "y z", "w", "v"])])
def test_features_are_hidden_states_of_transformers(
    name: str, pairs: list[str] | None, runs: dict[str, Path], tmp_path: Path
) -> None:
    export_run(runs[name], tmp_path / "out")
    auto = transformers.AutoModel if name == "gpt" else transformers.BertModel
    theirs = auto.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    run = load_model(runs[name], CPU)
    model = body_of(run)
    tokens = tokenize(model, run.tokenizer, TEXTS, pairs)
    made = {pool: features(model, tokens, [0, 1], pool) for pool in ("cls", "mean", "last")}
    for i, text in enumerate(TEXTS):
        read = tokenizer(text, pairs[i] if pairs else None, return_tensors="pt")
        with torch.no_grad():
            states = theirs(**read, output_hidden_states=True).hidden_states[1:]
        for layer in (0, 1):
            expected = {"cls": states[layer][0, 0], "mean": states[layer][0].mean(0), "last": states[layer][0, -1]}
            for pool, vectors in made.items():
                np.testing.assert_allclose(vectors[layer, i], expected[pool].numpy(), rtol=0, atol=1e-4)


def test_an_encoder_decoder_is_judged_by_its_encoder() -> None:
    torch.manual_seed(0)
    model = build_model(Seq2SeqSection(**SMALL), BytesTokenizer.vocab_size).eval()
    tokens = tokenize(model, BytesTokenizer(), TEXTS)  # type: ignore[arg-type]
    assert tokens[0].ids == [*BytesTokenizer().encode("a"), 3]
    made = features(model, tokens, [1], "mean")  # type: ignore[arg-type]
    for row, each in zip(made[0], tokens, strict=True):
        with torch.no_grad():
            expected = model.encode(torch.tensor([each.ids])).hidden[0].mean(0)  # type: ignore[operator]
        np.testing.assert_allclose(row, expected.numpy(), rtol=0, atol=1e-4)


def test_batches_have_each_text_once_and_are_not_too_large() -> None:
    lengths = np.random.default_rng(0).integers(1, 900, 500).tolist()
    made = batches(lengths)
    assert sorted(place for batch in made for place in batch) == list(range(500))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 4096 for batch in made)
    assert sum(len(batch) * max(lengths[i] for i in batch) for batch in made) < 1.1 * sum(lengths)


def test_long_texts_are_cut_the_longer_of_a_pair_first(runs: dict[str, Path]) -> None:
    run = load_model(runs["bert"], CPU)
    found = tokenize(body_of(run), run.tokenizer, ["a" * 9], ["b" * 4], limit=12)[0]
    assert run.tokenizer.decode(found.ids) == "aaaaabbbb"
    assert (len(found.ids), found.left_out, found.segments) == (12, 4, [0] * 7 + [1] * 5)


def clouds(distance: float) -> tuple[np.ndarray, np.ndarray]:
    """Three clouds, 40 points each, that far apart; scales and shifts of features are to make no difference."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 40)
    rows = rng.standard_normal((120, 8)) + distance * np.eye(8)[labels]
    return (rows * 10.0 ** np.arange(-3, 5) + 7).astype(np.float32), labels


def test_judges_tell_apart_what_is_apart_and_nothing_else() -> None:
    rows, labels = clouds(12.0)
    found = judge_features(rows, labels, folds(labels, 3))
    assert {key: score.mean for key, score in found.items()} == dict.fromkeys(found, pytest.approx(1.0))
    assert set(found) == {"linear", "neighbours", "clusters", "rand", "information"}
    found = judge_features(clouds(0.0)[0], labels, folds(labels, 3))
    assert all(abs(found[key].mean - 1 / 3) < 0.15 for key in ("linear", "neighbours", "clusters"))
    assert all(abs(found[key].mean) < 0.1 for key in ("rand", "information"))
    assert found["linear"].deviation > 0  # type: ignore[operator]


def test_baselines_by_hand() -> None:
    labels = np.array([0] * 12 + [1] * 8)
    splits = folds(labels, 4)
    assert sorted(place for _, judged in splits for place in judged) == list(range(20))
    assert judge_majority(labels, splits)["accuracy"].mean == pytest.approx(0.6)
    words = ["good 片" if label else "bad 影" for label in labels]
    assert judge_words(words, labels, splits)["linear"].mean == 1.0
    alone = judge_majority(labels, [(np.arange(15), np.arange(15, 20))])["accuracy"]
    assert (alone.mean, alone.deviation) == (0.0, None)


def write(path: Path, rows: list[tuple[str, str]], header: str = "sentence\tlabel") -> Path:
    path.write_text("\n".join([header, *("\t".join(row) for row in rows)]) + "\n")
    return path


def probe(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["probe", *map(str, words)])
    main()


ROWS = [(f"{'good' if i % 3 else 'bad'} thing {i}", "yes" if i % 3 else "no") for i in range(30)]


@pytest.mark.parametrize("name", ["bert", "gpt"])
def test_the_command_shows_a_row_for_each_layer_and_writes_the_numbers(
    name: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = write(tmp_path / "rows.tsv", ROWS)
    probe(monkeypatch, runs[name], file, "--text", "sentence", "--label", "label", "--folds", "3")
    shown = capsys.readouterr().out
    assert f"{name}, step 7: {'cls' if name == 'bert' else 'last'} of layers 1 to 2" in shown
    found = json.loads((runs[name] / "probe.json").read_text())
    assert (found["rows"], found["classes"], found["folds"]) == (30, {"no": 10, "yes": 20}, 3)
    assert [(row["features"], row["layer"]) for row in found["scores"]] == [
        ("majority", None), ("words", None), ("untrained", 1), ("untrained", 2), ("trained", 1), ("trained", 2)
    ]  # fmt: skip
    for row in found["scores"]:
        label = {"majority": "most frequent class", "words": "bag of words"}.get(
            row["features"], f"{row['features']}, layer {row['layer']}"
        )
        line = next(line for line in shown.splitlines() if line.startswith(label))
        score = row["scores"].get("linear") or row["scores"]["accuracy"]
        assert f"{100 * score['mean']:.1f}" in line
    assert found["scores"][0]["scores"]["accuracy"]["mean"] == pytest.approx(2 / 3)
    untrained, trained = (found["scores"][i]["scores"]["linear"]["mean"] for i in (3, 5))
    assert max(untrained, trained) <= 1


def test_a_test_file_is_judged_as_a_whole_and_layers_can_be_chosen(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = tmp_path / "train.txt"
    train.write_text("\n".join(f"{text};{label}" for text, label in ROWS))
    test = tmp_path / "test.txt"
    test.write_text("\n".join(f"{text};{label}" for text, label in ROWS[:9]))
    options = ["--text", "a", "--label", "b", "--separator", ";", "--columns", "a,b", "--layer", "last"]
    probe(monkeypatch, runs["gpt"], train, *options, "--test", test, "--pool", "mean")
    assert "mean of layer 2" in capsys.readouterr().out
    found = json.loads((runs["gpt"] / "probe.json").read_text())
    assert (found["rows"], found["folds"], len(found["scores"])) == (39, None, 4)
    assert found["scores"][1]["scores"]["linear"] == {"mean": 1.0, "deviation": None}
    # A model that has learned by heart what it is asked for.
    assert found["scores"][3]["scores"]["linear"]["mean"] > 0.8


def test_a_limit_takes_rows_from_everywhere(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.tsv", [(f"text {i}", "ab"[i % 2]) for i in range(100)])
    found = read_examples(str(file), TableFormat(), Columns("sentence", "label"), 4)
    assert found.texts == ["text 0", "text 25", "text 50", "text 75"]
    assert found.places[1] == f"{file}: line 27"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--layer", "3"], "--layer 3: the model has 2, counted from 1"),
        (["--pool", "cls"], "--pool cls: the model reads no [CLS]"),
        (["--folds", "12"], "--label label: class 'no' has 10 rows for 12 folds"),
        (["--label", "sentence"], "has 1 rows for 5 folds"),
        (["--label", "lable"], "no column 'lable', only 'sentence', 'label'; set --label"),
        (["--text", "txt"], "set --text"),
        (["--separator", ";;"], "--separator: expected one character"),
        (["--columns", "a,a"], "--columns: expected different names"),
        (["--columns", "a"], "line 1 has 2 columns (--separator '\\t'), --columns 1"),
        (["--test", "NEW"], "line 2: class 'maybe' is none of those to learn from, no, yes"),
        (["--limit", "2"], "all rows are of the one class"),
        (["--layer", "first"], "'first' is no number, and neither all nor last"),
        (["--folds", "1"], "'1' is not an integer from 2"),
    ],
)
def test_mistakes_are_told_in_one_line(
    options: list[str], says: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = write(tmp_path / "new.tsv", [("what", "maybe")])
    rows = [*ROWS[:15], ROWS[15], *ROWS[16:]]
    file = write(tmp_path / "rows.tsv", rows)
    given = {"--text": "sentence", "--label": "label"} | dict([[w if w != "NEW" else str(new) for w in options]])
    words = [word for pair in given.items() for word in pair]
    with pytest.raises(UserError) as error:
        probe(monkeypatch, runs["gpt"], file, *words)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_format_that_cannot_be_is_refused() -> None:
    assert table_format(r"\t", "true", "a,b") == TableFormat(separator="\t", quoting=True, columns=["a", "b"])
    assert table_format(None, None, None) == TableFormat()
