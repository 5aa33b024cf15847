"""Files, extends, overrides: what wins, what is replaced, where each value came from."""

from pathlib import Path

import pytest

from cairn.config.load import dump, load, resolve
from cairn.config.model import BERTSection, GPTSection
from cairn.config.schema import FinetuneConfig, PretrainConfig
from cairn.config.train import AdamWSection, MuonSection
from cairn.errors import UserError


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_an_empty_file_gives_the_defaults(write):
    assert load(PretrainConfig, write("x.yaml", "")) == PretrainConfig()


def test_overrides_win_over_the_file_and_the_file_over_what_it_extends(write):
    write("base/a.yaml", "train: {steps: 1, log_every: 1, eval_every: 1}")
    write("b.yaml", "extends: base/a.yaml\ntrain: {log_every: 2, eval_every: 2}")
    path = write("c/c.yaml", "extends: ../b.yaml\ntrain: {eval_every: 3}")
    got = load(PretrainConfig, path, ["train.micro_batch_size=4", "train.micro_batch_size=2"]).train
    assert (got.steps, got.log_every, got.eval_every, got.micro_batch_size) == (1, 2, 3, 2)


@pytest.mark.parametrize(
    ("text", "lr"), [("6e-4", 6e-4), ("1e9", 1e9), ("+1.5E-3", 1.5e-3), ("2", 2.0), (".5", 0.5), ("1_000.5", 1000.5)]
)
def test_numbers(write, text, lr):
    assert load(PretrainConfig, write("x.yaml", f"optim: {{lr: {text}}}")).optim.lr == lr
    assert load(PretrainConfig, write("y.yaml", ""), [f"optim.lr={text}"]).optim.lr == lr


def test_words_that_yaml_1_1_misreads(write):
    path = write("x.yaml", "track: {wandb: off}\nrun: {name: yes}\ndata: {dir: 1:30, text_field: 010}")
    got = load(PretrainConfig, path)
    assert (got.track.wandb, got.run.name, got.data.dir, got.data.text_field) == ("off", "yes", "1:30", "010")


def test_values_of_overrides(write):
    got = load(
        PretrainConfig,
        write("x.yaml", "data: {seq_len: 5}"),
        [
            "model.bias=false",
            "data.seq_len=",
            "optim.betas=[0.8, 0.9]",
            "engine.deepspeed={zero_optimization: {overlap_comm: true}}",
            "engine.deepspeed.zero_optimization.round_robin_gradients=true",
            "data.source=*.txt",
            "run.name='12'",
        ],
    )
    assert got.model.bias is False
    assert got.data.seq_len is None
    assert got.optim.betas == (0.8, 0.9)
    assert got.engine.deepspeed == {"zero_optimization": {"overlap_comm": True, "round_robin_gradients": True}}
    assert got.data.source == "*.txt"
    assert got.run.name == "12"


def test_a_choice_keeps_the_default_name(write):
    got = load(PretrainConfig, write("x.yaml", "model: {n_layer: 3}\noptim: {lr: 1e-3}"))
    assert got.model == GPTSection(n_layer=3)
    assert got.optim == AdamWSection(lr=1e-3)


@pytest.mark.parametrize("overrides", [["optim.name=muon", "optim.lr=0.5"], ["optim.lr=0.5", "optim.name=muon"]])
def test_another_name_replaces_the_section(write, overrides):
    path = write("x.yaml", "optim: {name: adamw, lr: 1e-3, weight_decay: 0.3, grad_clip: 9.0}")
    assert load(PretrainConfig, path, overrides).optim == MuonSection(lr=0.5)


def test_another_name_replaces_what_is_extended(write):
    write("base.yaml", "optim: {name: muon, ns_steps: 7}\nmodel: {norm: rmsnorm}\n")
    path = write("x.yaml", "extends: base.yaml\noptim: {name: adamw}\nmodel: {name: bert}\nobjective: {name: masked}")
    got = load(PretrainConfig, path)
    assert got.optim == AdamWSection()
    assert got.model == BERTSection()


def test_the_same_name_merges(write):
    write("base.yaml", "optim: {name: muon, ns_steps: 7}")
    path = write("x.yaml", "extends: base.yaml\noptim: {name: muon, lr: 0.1}")
    assert load(PretrainConfig, path).optim == MuonSection(ns_steps=7, lr=0.1)


def test_names_that_are_no_choice_replace_nothing(write):
    path = write("x.yaml", "run: {name: a, dir: there}\nschedule: {name: wsd, warmup_steps: 7}")
    got = load(PretrainConfig, path, ["run.name=b", "schedule.name=linear"])
    assert (got.run.name, got.run.dir) == ("b", "there")
    assert (got.schedule.name, got.schedule.warmup_steps) == ("linear", 7)


def test_a_heading_with_nothing_below_changes_nothing(write):
    write("base.yaml", "train: {steps: 5}")
    assert load(PretrainConfig, write("x.yaml", "extends: base.yaml\ntrain:\n")).train.steps == 5


def test_an_optional_section_is_left_out_where_it_is_set_to_nothing(write):
    path = write("x.yaml", "data: {train: t.tsv}\ntokenizer: {name: wordpiece}\nmodel: {name: bert}")
    got = load(FinetuneConfig, path, ["base.path=runs/mine", "tokenizer=", "model="])
    assert (got.base.path, got.tokenizer, got.model) == ("runs/mine", None, None)
    with pytest.raises(UserError, match=r"brings its own .*tokenizer= model="):
        load(FinetuneConfig, path, ["base.path=runs/mine"])


def test_provenance(write):
    write("base.yaml", "train:\n  steps: 5\n  log_every: 3\noptim: {name: muon}\n")
    path = write("x.yaml", "extends: base.yaml\n\ntrain:\n  log_every: 4\noptim: {name: adamw}")
    got = resolve(PretrainConfig, path, ["train.eval_every=2"]).origins
    assert got["train.steps"] == "base.yaml:2"
    assert got["train.log_every"] == "x.yaml:4"
    assert got["train.eval_every"] == "command line"
    assert got["train.micro_batch_size"] == got["optim.lr"] == "default"
    assert got["optim.name"] == "x.yaml:5"


def test_dump_reads_back(write):
    path = write("x.yaml", "model: {name: bert, norm_eps: 1e-12}\nobjective: {name: masked}")
    tricky = ["run.name='6e-4'", "track.wandb=off", "engine.deepspeed={a: {b: [1, {c: off}]}, 'd.e': '1e9'}"]
    config = load(PretrainConfig, path, [*tricky, "data.source=[{source: a}, {source: 'null', weight: 2}]"])
    write("run/config.yaml", dump(config))
    assert load(PretrainConfig, Path("run")) == config


def test_the_config_is_frozen(write):
    config = load(PretrainConfig, write("x.yaml", ""))
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3


def test_a_cycle(write):
    write("a.yaml", "extends: b.yaml")
    with pytest.raises(UserError, match=r"circle: a\.yaml -> b\.yaml -> a\.yaml"):
        load(PretrainConfig, write("b.yaml", "extends: a.yaml") and Path("a.yaml"))
