"""Every shipped config loads, and the large ones fit 1 to 64 GPUs."""

from pathlib import Path

import pytest

from cairn.config.load import load
from cairn.config.schema import PretrainConfig
from launch.cli import VERBS

ROOT = Path(__file__).parents[2] / "configs"
FILES = sorted(path for path in ROOT.glob("*/*.yaml") if path.parent.name not in ("cluster", "eval"))  # no runs


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_it_loads(path):
    config = load(VERBS[path.parent.name].schema, path)  # configs/VERB/NAME.yaml
    assert config.run.name in (path.stem, "run")
    assert config.train.global_batch_size % config.train.micro_batch_size == 0


@pytest.mark.parametrize("name", ["gpt2-124m", "llama-1b", "gpt-1.3b", "bert-base", "bert-large"])
def test_large_ones_fit_1_to_64_gpus(name):
    config = load(PretrainConfig, ROOT / "pretrain" / f"{name}.yaml")
    assert config.train.global_batch_size % (config.train.micro_batch_size * 64) == 0
    assert config.model.vocab_size >= config.tokenizer.vocab_size
    assert config.schedule.warmup_steps < config.train.steps / 10


def test_classic_and_modern_differ_in_recipe_alone():
    modern = load(PretrainConfig, ROOT / "pretrain" / "gpt-tiny.yaml")
    classic = load(PretrainConfig, ROOT / "pretrain" / "gpt-tiny-classic.yaml")
    assert modern.optim.name == "muon"
    assert classic.optim.name == "adamw"
    assert modern.train == classic.train
    assert modern.data == classic.data
    assert modern.tokenizer == classic.tokenizer
    for key in ("n_layer", "n_head", "d_model", "ff_dim", "max_seq_len", "vocab_size"):
        assert getattr(modern.model, key) == getattr(classic.model, key), key
