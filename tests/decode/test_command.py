"""From a trained run folder to text, each command a process as a user starts it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cairn.config.data import MaskedSection
from cairn.config.model import BERTSection
from cairn.config.schema import PretrainConfig
from cairn.data.tokenizer import BytesTokenizer
from cairn.decode.__main__ import main
from cairn.decode.beam import Beams
from cairn.decode.generate import generate
from cairn.decode.sample import Sampling
from cairn.decode.texts import Task, write_texts
from cairn.errors import UserError
from cairn.models.base import LanguageModel
from cairn.train.run import LoadedRun
from tests.decode.models import tiny_gpt, tiny_seq2seq


def started(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)


def test_a_refusal_comes_before_the_prompt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bert = PretrainConfig(model=BERTSection(), objective=MaskedSection())
    monkeypatch.setattr("cairn.train.run.load_model", lambda *_: LoadedRun(bert, bert.model, None, None, 0))  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "argv", ["generate", "RUN", "--prompt", "once"])
    with pytest.raises(UserError, match="cannot generate"):
        main()
    assert capsys.readouterr().out == ""


def byte_run(make: Callable[..., LanguageModel]) -> LoadedRun:
    tokenizer = BytesTokenizer()
    model = make(vocab_size=tokenizer.vocab_size)
    return LoadedRun(PretrainConfig(), model.section, model, tokenizer, 1)  # type: ignore[arg-type]


def says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: LoadedRun, *words: object) -> str:
    monkeypatch.setattr("cairn.train.run.load_model", lambda *_: run)
    monkeypatch.setattr(sys, "argv", ["generate", "RUN", *map(str, words)])
    main()
    return capsys.readouterr().out


def test_a_file_of_prompts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run, file = byte_run(tiny_gpt), tmp_path / "prompts.txt"
    file.write_text("one\nanother one\n")
    prompts, rule = ["one", "another one"], "\n" + "-" * 40 + "\n"
    new = ("--file", file, "--max-new-tokens", 12)
    said = says(monkeypatch, capsys, run, *new, "--samples", 2, "--seed", 5, "--batch-size", 1)
    groups = write_texts(run, prompts, Task(Sampling(0.8), 12, samples=2, seed=5))
    assert said == rule.join(p + text for p, group in zip(prompts, groups, strict=True) for text in group) + "\n"
    assert len({text for group in groups for text in group}) == 4
    said = says(monkeypatch, capsys, run, *new, "--beams", 3, "--n-best", 2, "--length-penalty", 0.5)
    groups = write_texts(run, prompts, Task(Beams(3, 0.5, 2), 12))
    assert said == rule.join(p + text for p, group in zip(prompts, groups, strict=True) for text in group) + "\n"


def test_an_encoder_decoder_writes_a_line_a_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = byte_run(tiny_seq2seq)
    new = ("--prompt", "a source", "--max-new-tokens", 9)
    for options, how in (((), Sampling(0.0)), (("--beams", 2, "--n-best", 2), Beams(2, n_best=2))):
        (texts,) = write_texts(run, ["a source"], Task(how, 9))
        assert says(monkeypatch, capsys, run, *new, *options) == "".join(text + "\n" for text in texts)
    drawn = says(monkeypatch, capsys, run, *new, "--temperature", 3, "--samples", 2, "--seed", 1)
    assert drawn == "".join(t + "\n" for t in write_texts(run, ["a source"], Task(Sampling(3.0), 9, 0, 2, 1))[0])


@pytest.mark.parametrize("make", [tiny_gpt, tiny_seq2seq])
def test_half_precision(
    make: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = byte_run(make)
    says(monkeypatch, capsys, run, "--prompt", "one", "--precision", "bf16", "--greedy", "--max-new-tokens", 40)
    assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}
    prompts = [[1, 2, 3], [4, 5]]
    if make is tiny_gpt:  # with the cache it is the same model as without
        written = [generate(run.model, prompts, 30, Sampling(0.0), cached=cached) for cached in (True, False)]
        assert written[0] == written[1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            "--beams 4 --temperature 1 --samples 2",
            "--beams searches and draws nothing: leave out --temperature, --samples",
        ),
        ("--n-best 2", "--n-best: only for beam search; add --beams N"),
        ("--beams 2 --n-best 3", r"n-best 3 must lie in \[1, 2\], the number of beams"),
        ("--greedy --top-k 3", "--greedy takes the most likely token always: leave out --top-k"),
        ("--prompt x --file y", "--prompt and --file: give one of the two"),
        ("--file nowhere.txt", "--file nowhere.txt: No such file"),
        ("--batch-size 3", "--batch-size is for the prompts of --file FILE"),
        ("--min-new-tokens 9 --max-new-tokens 8", "--min-new-tokens 9 is more than --max-new-tokens 8"),
        ("--repetition-penalty 0", "repetition-penalty 0.0 must be a positive number"),
        ("--beams 2 --length-penalty inf", "length-penalty inf must be a number"),
        ("--beams 2 --max-new-tokens 64", "prompt 1: 1 tokens and 64 new ones are more than model.max_seq_len 64"),
    ],
)
def test_bad_options_are_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str, told: str
) -> None:
    with pytest.raises(UserError, match=told) as error:
        says(monkeypatch, capsys, byte_run(tiny_gpt), *options.split())
    assert "\n" not in str(error.value)
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
