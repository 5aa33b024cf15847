"""Tiny runs to begin from, and a task that a small model learns in seconds."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cairn.cluster import Cluster
from cairn.config.load import load
from cairn.config.schema import FinetuneConfig, PretrainConfig
from cairn.data.prepare import open_prepared, prepare
from cairn.train.language_model import LanguageModel
from cairn.train.outcome import Outcome
from cairn.train.trainer import Trainer
from finetune.seeds import train_seed

GOOD, BAD = ["good", "fine", "great", "lovely"], ["bad", "poor", "awful", "dull"]
OTHER = ["the", "film", "was", "a", "story", "of", "men", "and", "sea"]
SMALL = ["model.n_layer=2", "model.n_head=2", "model.d_model=32", "model.max_seq_len=48", "engine.precision=fp32"]
CHEAP = ["track.progress=false", "train.log_every=50", "checkpoint.background=false"]


def sentence(rng: random.Random, words: list[str]) -> str:
    text = rng.choices(OTHER, k=rng.randint(3, 12))
    text.insert(rng.randrange(len(text)), rng.choice(words))
    return " ".join(text)


def reviews(path: Path, n: int, seed: int = 0) -> Path:
    """A table of n reviews that one word makes good or bad."""
    rng = random.Random(seed)
    rows = [(sentence(rng, GOOD if i % 2 else BAD), "pos" if i % 2 else "neg") for i in range(n)]
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    return path


@pytest.fixture
def one() -> Iterator[Cluster]:
    """One process, and the environment as it was."""
    before, cluster = dict(os.environ), Cluster()
    with cluster.init():
        yield cluster
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A BERT and a GPT run, a few steps old."""
    root, before, cluster = tmp_path_factory.mktemp("bases"), dict(os.environ), Cluster()
    rng = random.Random(7)
    (root / "corpus.txt").write_text("\n".join(sentence(rng, GOOD + BAD) for _ in range(2000)))
    made = {}
    for name, kind in (("bert", "wordpiece"), ("gpt", "bytes")):
        (root / f"{name}.yaml").write_text(f"model: {{name: {name}}}\n")
        keys = [
            f"run.name={name}",
            f"run.dir={root}",
            f"data.source={root / 'corpus.txt'}",
            f"data.dir={root / 'data'}",
        ]
        keys += [
            f"tokenizer.name={kind}",
            *(["tokenizer.vocab_size=300"] if kind == "wordpiece" else []),
            *SMALL,
            *CHEAP,
        ]
        keys += ["objective.name=masked", "objective.next_sentence=false"] if name == "bert" else []
        keys += ["data.workers=1", "train.steps=4", "train.global_batch_size=4", "train.micro_batch_size=4"]
        config = load(PretrainConfig, root / f"{name}.yaml", keys)
        with cluster.init():
            prepared = open_prepared(prepare(config.data, config.tokenizer))
            trainer = Trainer(LanguageModel(config, prepared), config, cluster)
            trainer.folder.keep_tokenizer(prepared.tokenizer.save)
            trainer.run()
        made[name] = root / name
    os.environ.clear()
    os.environ.update(before)
    return made


@pytest.fixture
def finetune(tmp_path: Path, one: Cluster) -> Callable[..., Outcome]:
    """Fine-tune by overrides, in a folder of the test's own."""

    def run(*overrides: str, yaml: str = "data: {train: x}\n") -> Outcome:
        return train_seed(config_of(tmp_path, *overrides, yaml=yaml), 1, one, several=False)

    return run


def config_of(folder: Path, *overrides: str, yaml: str = "data: {train: x}\n") -> FinetuneConfig:
    """A config with cheap settings."""
    (folder / "config.yaml").write_text(yaml)
    cheap = [f"run.dir={folder}", f"data.dir={folder / 'data'}", "engine.precision=fp32", "checkpoint.every=0", *CHEAP]
    return load(FinetuneConfig, folder / "config.yaml", [*cheap, *overrides])
