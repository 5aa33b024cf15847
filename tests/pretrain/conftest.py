"""A corpus of real text, prepared once, and runs that several tests look at."""

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cairn.config.load import load
from cairn.config.schema import PretrainConfig
from cairn.data.prepare import prepare
from cairn.train.folder import RunFolder
from tests.pretrain import runs

STEPS = 14
CONFIG = """
tokenizer: {{name: bytes}}
data: {{source: {here}/corpus, dir: {here}/data, workers: 1, held_out: 0.2}}
model: {model}
objective: {objective}
optim: {{name: adamw, lr: 0.01}}
schedule: {{warmup_steps: 2}}
engine: {{precision: fp32}}
train: {{steps: {steps}, global_batch_size: 8, micro_batch_size: 8, log_every: 5, eval_every: 7, eval_samples: 12}}
checkpoint: {{every: 4, keep_last: 10}}
run: {{dir: {here}/runs}}
track: {{progress: false}}
"""
SIZE = "n_layer: 2, n_head: 2, d_model: 32, max_seq_len: 32"


@dataclass(frozen=True)
class Place:
    """Where configs and runs of the tests lie."""

    here: Path

    @property
    def gpt(self) -> Path:
        return self.here / "gpt.yaml"

    @property
    def bert(self) -> Path:
        return self.here / "bert.yaml"

    @property
    def seq2seq(self) -> Path:
        return self.here / "seq2seq.yaml"

    def folder(self, name: str) -> RunFolder:
        return RunFolder(self.here, "runs", name)

    def run(self, config: Path, name: str, *overrides: str, **options: Any) -> runs.Done:
        """Train under a name, to the end."""
        return runs.run(config, f"run.name={name}", *overrides, folder=self.here, **options)

    def door(self, *argv: str | Path, **options: Any) -> runs.Done:
        """`cairn pretrain ARGV`."""
        return runs.run("pretrain", *argv, folder=self.here, module="launch.cli", **options)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Configs of a GPT, a BERT and a T5 with dropout, and their corpus, prepared: files of the standard library."""
    here = tmp_path_factory.mktemp("pretrain")
    corpus = here / "corpus"
    corpus.mkdir()
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("[a-f]*.py"))[:25]:
        (corpus / path.name).write_bytes(path.read_bytes()[:8000])
    objectives = {"gpt": "{name: causal}", "bert": "{name: masked, short_prob: 0.5}", "seq2seq": "{name: span}"}
    for name, objective in objectives.items():
        model = f"{{name: {name}, {SIZE}, dropout: 0.1, attention_dropout: 0.1}}"
        text = CONFIG.format(here=here, model=model, objective=objective, steps=STEPS)
        (here / f"{name}.yaml").write_text(text)
    config = load(PretrainConfig, here / "gpt.yaml", [])
    prepare(config.data, config.tokenizer)
    return Place(here)


@pytest.fixture(scope="session")
def straight(place: Place) -> RunFolder:
    """A GPT with dropout in bf16 that nothing disturbed."""
    place.run(place.gpt, "straight", "engine.precision=bf16")
    return place.folder("straight")
