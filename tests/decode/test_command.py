"""From a trained run folder to text, each command a process as a user starts it."""

import subprocess
import sys
from pathlib import Path

import pytest

from cairn.config.data import MaskedSection
from cairn.config.model import BERTSection
from cairn.config.schema import PretrainConfig
from cairn.decode.__main__ import main
from cairn.errors import UserError
from cairn.train.run import LoadedRun


def started(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)


def test_a_refusal_comes_before_the_prompt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bert = PretrainConfig(model=BERTSection(), objective=MaskedSection())
    monkeypatch.setattr("cairn.train.run.load_model", lambda *_: LoadedRun(bert, bert.model, None, None, 0))  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "argv", ["generate", "RUN", "--prompt", "once"])
    with pytest.raises(UserError, match="cannot generate"):
        main()
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_run_that_knows_one_sentence_recites_it(tmp_path: Path) -> None:
    sentence = "a quick brown fox jumps over the lazy dog; "
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(sentence * 8 + str(i))
    config = tmp_path / "config.yaml"
    config.write_text(
        "tokenizer: {name: bytes}\n"
        "model: {name: gpt, n_layer: 2, n_head: 2, d_model: 64, max_seq_len: 48, position: rope}\n"
        "optim: {name: adamw, lr: 3e-3}\n"
        "schedule: {warmup_steps: 10}\n"
        "train: {steps: 120, global_batch_size: 8, micro_batch_size: 8}\n"
        "track: {progress: false}\n"
        f"data: {{source: '{tmp_path}/*.txt', dir: {tmp_path / 'data'}, held_out: 0.1, workers: 1}}\n"
        f"run: {{dir: {tmp_path / 'runs'}, name: fox}}\n"
    )
    trained = started("pretrain", str(config))
    assert trained.returncode == 0, trained.stderr
    run = str(tmp_path / "runs" / "fox")
    said = started("cairn.decode", run, "--prompt", "a quick ", "--greedy", "--max-new-tokens", "100")
    assert said.returncode == 0, said.stderr
    assert said.stdout[:100] == (sentence * 3)[:100]
    refused = started("cairn.decode", run, "--top-p", "3")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "top-p 3.0 must lie in (0, 1]" in refused.stderr
