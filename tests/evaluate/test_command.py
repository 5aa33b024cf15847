"""`cairn eval`: the table and the file, and one line for what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cairn.config.model import BERTSection, GPTSection
from cairn.errors import UserError
from cairn.evaluate.__main__ import main
from cairn.train.run import load_model
from tests.evaluate.runs import SMALL, make_rows, make_run, make_task

ROOT = Path(__file__).parents[2]
ROWS = make_rows(20)
SHORT = [row | {"query": str(row["query"])[:20]} for row in ROWS]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", GPTSection(**SMALL))


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["eval", *map(str, words)])
    main()


def accuracy(run: Path, rows: list[dict[str, object]]) -> float:
    """Of the likeliest choice, one text at a time."""
    loaded = load_model(run, torch.device("cpu"))
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            context, both = (loaded.tokenizer.encode(text) for text in (row["query"], f"{row['query']} {choice}"))
            with torch.no_grad():
                logs = loaded.model(torch.tensor([both[:-1]]))[0].log_softmax(-1)
            scores.append(sum(logs[at - 1, both[at]].item() for at in range(len(context), len(both))))
        right += scores.index(max(scores)) == row["gold"]
    return right / len(rows)


def test_table_and_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    for kind in ("choice", "write"):
        make_task(tmp_path / "tasks", kind, SHORT)
    make_task(tmp_path, "rolling", ROWS)
    command(monkeypatch, run, "--tasks", f"{tmp_path / 'tasks'},{tmp_path / 'rolling.yaml'}", "--limit", 15)
    out = run / "eval" / "tasks+rolling.json"
    report = json.loads(out.read_text())
    assert (report["step"], report["limit"], list(report["tasks"])) == (7, 15, ["choice", "write", "rolling"])
    expected = accuracy(run, SHORT[:15])
    assert 0 < expected < 1
    choice = report["tasks"]["choice"]
    assert (choice["n"], choice["num_fewshot"]) == (15, 0)
    assert choice["metrics"]["acc"]["value"] == pytest.approx(expected)
    assert choice["metrics"]["acc"]["stderr"] == pytest.approx((expected * (1 - expected) / 14) ** 0.5)
    said = capsys.readouterr().out
    assert f"{expected:.4f}" in said
    assert "bits_per_byte" in said
    assert said.splitlines()[-1] == str(out)
    assert "texts were longer than model.max_seq_len 48" not in said  # rolling windows lose nothing

    command(
        monkeypatch, run, "--tasks", tmp_path / "tasks/choice.yaml", "--num-fewshot", 2, "--out", tmp_path / "x.json"
    )
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["tasks"]["choice"]["num_fewshot"] == 2
    assert "texts were longer than model.max_seq_len 48" in capsys.readouterr().out


def test_what_is_wrong_is_told(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")

    def refused(says: str, *words: object) -> None:
        with pytest.raises(UserError, match=says) as error:
            command(monkeypatch, run, *words)
        assert len(str(error.value).splitlines()) == 1

    good = make_task(tmp_path, "choice", SHORT)
    refused(r"--tasks is empty", "--tasks", ",")
    refused(r"no/such.yaml: no such file", "--tasks", "no/such.yaml")
    refused(r"there is a task choice already", "--tasks", f"{good},{good}")
    refused(r"--limit: '0' is not a positive integer", "--tasks", good, "--limit", 0)
    (tmp_path / "empty").mkdir()
    refused(r"no task file \(\*\.yaml\) in it", "--tasks", tmp_path / "empty")
    refused(r"choice.yaml: UndefinedError: 'query'", "--tasks", make_task(tmp_path / "a", "choice", [{"gold": 0}]))
    refused(r"tasks choice: ", "--tasks", make_task(tmp_path / "b", "choice", [SHORT[0], SHORT[1] | {"choices": []}]))
    fixed = make_task(tmp_path / "c", "choice", SHORT)
    fixed.write_text(fixed.read_text() + "num_fewshot: 0\n")
    refused(r"--num-fewshot 3: task choice is defined without examples", "--tasks", fixed, "--num-fewshot", 3)
    (tmp_path / "c" / "choice.jsonl").write_text("oops\n")
    refused(r"choice.yaml: \w+: ", "--tasks", fixed)
    (tmp_path / "c" / "choice.jsonl").unlink()
    refused(r"choice.yaml: dataset_kwargs.data_files: there is no .*/c/choice.jsonl", "--tasks", fixed)
    fixed.write_text("task: [b")
    refused(r"choice.yaml: ", "--tasks", fixed)
    fixed.write_text("output_type: multiple_choice")
    refused(r"choice.yaml: no key `task`", "--tasks", fixed)


def test_bert_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    bert = make_run(tmp_path / "bert", BERTSection(**SMALL))
    with pytest.raises(UserError, match="give a run of a causal language model"):
        command(monkeypatch, bert, "--tasks", "piqa")


def test_without_the_package(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'cairn\[eval\]'"):
        command(monkeypatch, run, "--tasks", "piqa")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "eval").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_tasks(path: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    rows = [
        {"query": "Question: a", "choices": ["b", "c"], "gold": i % 2, "context": "a b", "continuation": "c"}
        for i in range(4)
    ]
    (tmp_path / "data" / "eval").mkdir(parents=True)
    (tmp_path / "data" / "eval" / f"{path.stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    copy = tmp_path / "configs" / "eval" / path.name
    copy.parent.mkdir(parents=True)
    copy.write_text(path.read_text())
    command(monkeypatch, run, "--tasks", copy, "--out", tmp_path / "out.json")
    (scores,) = json.loads((tmp_path / "out.json").read_text())["tasks"].values()
    assert scores["n"] == 4
    assert scores["metrics"]["acc"]["value"] == (0 if path.stem == "lambada" else 0.5)


@pytest.mark.slow
def test_names_of_the_harness(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")

    def refused(name: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "cairn.evaluate", str(run), "--tasks", name],
            env={"HF_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1
        return done.stderr

    assert "task piqa: " in (said := refused("piqa"))
    assert "HF_HUB_OFFLINE=0" in said
    assert "the harness knows no such task; did you mean arc_easy?" in refused("arc_esy")
