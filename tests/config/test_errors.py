"""Each mistake is one line: where it was written, the key, what was expected, what it got; and all are told."""

import pytest

from cairn.config.load import load
from cairn.config.schema import PretrainConfig
from cairn.errors import UserError


@pytest.fixture
def told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def told(text: str, *overrides: str) -> list[str]:
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(UserError) as error:
            load(PretrainConfig, (tmp_path / "x.yaml").relative_to(tmp_path), overrides)
        return str(error.value).splitlines()

    return told


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train: {stps: 5}", "x.yaml:1: train.stps: unknown key; did you mean train.steps?"),
        ("\ntrian: {steps: 5}", "x.yaml:2: trian: unknown key; did you mean train?"),
        ("lr: 1", "x.yaml:1: lr: unknown key; did you mean optim.lr?"),
        ("zzz: 1", "x.yaml:1: zzz: unknown key"),
        ("optim: {ns_steps: 5}", "x.yaml:1: optim.ns_steps: unknown key of optim.name adamw; muon has it"),
        ("train: {steps: true}", "x.yaml:1: train.steps: expected an integer >= 1, got true"),
        ("engine: {zero_stage: true}", "x.yaml:1: engine.zero_stage: expected an integer >= 0 and <= 3, got true"),
        (
            "train: {steps: 1e9}",
            "x.yaml:1: train.steps: expected an integer >= 1, got the fractional number 1000000000.0; write 1000000000",
        ),
        ("train: {steps: 0}", "x.yaml:1: train.steps: expected an integer >= 1, got 0"),
        ("optim: {lr: fast}", "x.yaml:1: optim.lr: expected a number > 0, got 'fast'"),
        ("optim: {betas: [0.9, 1]}", "x.yaml:1: optim.betas[1]: expected a list of 2 numbers >= 0 and < 1, got 1"),
        (
            "objective: {name: masked}\nmodel: {name: bert, n_segment: 1}",
            "x.yaml:2: objective.next_sentence needs model.n_segment of at least 2",
        ),
        (
            "objective: {name: masked}\nmodel: {name: bert}\ndata: {document_mask: true}",
            "x.yaml:3, x.yaml:1: data.document_mask is for objective.name causal, not masked",
        ),
        ("optim: {lr: .inf}", "x.yaml:1: optim.lr: expected a number > 0, got inf"),
        ("model: {bias: 1}", "x.yaml:1: model.bias: expected true or false, got 1"),
        (
            "data: {dir: 3}",
            "x.yaml:1: data.dir: expected text, got 3; put it in quotes (on the command line: '\"...\"')",
        ),
        ("train: 3", "x.yaml:1: train: expected a section with keys below it, got 3"),
        (
            "schedule: {name: cosin}",
            "x.yaml:1: schedule.name: expected one of cosine, linear, wsd, constant, got 'cosin'; did you mean cosine?",
        ),
        ("optim: muon", "x.yaml:1: optim: expected one of adamw, muon, got 'muon'; write {name: muon}"),
        ("optim: {name: mun}", "x.yaml:1: optim.name: expected one of adamw, muon, got 'mun'; did you mean muon?"),
        ("tokenizer: {name: file}", "x.yaml:1: tokenizer.path: missing; expected text"),
        ("data:\n  source:\n  - {weight: 2}", "x.yaml:3: data.source[0].source: missing; expected text"),
        ("data: {source: 3}", "x.yaml:1: data.source: expected text or a list of sections, got 3"),
        ("model: {d_model: 100}", "x.yaml:1: model: d_model 100 is not a multiple of n_head 12"),
        ("model: {name: bert}", "x.yaml:1: model.name bert trains with objective.name masked, not causal"),
        ("train: {steps: 1,\n steps: 2}", "x.yaml:2: train.steps: given twice; first on line 1"),
        ("1: 2", "x.yaml:1: top level: expected a key, got '1'"),
        ("train: {steps", "x.yaml:1: not YAML: expected ',' or '}', but got '<stream end>'"),
        ("- 1", "x.yaml: expected `section:` headings with keys below them"),
        ("a: !!python/name:os.system", "x.yaml:1: not YAML: could not determine a constructor for the tag"),
        ("extends: no.yaml", "x.yaml:1: extends: no.yaml: no such file; there is x.yaml"),
    ],
)
def test_one(told, text, line):
    (got,) = told(text)
    assert got.startswith(line), got
    assert got == line or not line.endswith(("?", "key", "section"))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.stps=5", "command line: train.stps: unknown key; did you mean train.steps?"),
        ("train.steps=", "command line: train.steps: expected an integer >= 1, got nothing"),
        ("steps", "command line: 'steps': expected section.key=value"),
        ("extends=a.yaml", "command line: extends: belongs in a YAML file"),
        ("optim.betas=[1", "command line: optim.betas: '[1' is not YAML"),
    ],
)
def test_an_override(told, override, line):
    (got,) = told("", override)
    assert got.startswith(line), got


def test_a_config_of_another_verb_is_said_to_be_one(told):
    text = "base: {path: runs/x}\ndata: {train: a.tsv}\ntask: {name: classify}"
    assert told(text) == ["x.yaml is a config of `cairn finetune`; one of `cairn pretrain` is wanted here"]
    assert "x.yaml:3: task: unknown key; did you mean track?" in told(text + "\nzzz: 1")


def test_all_at_once(told, tmp_path):
    (tmp_path / "base.yaml").write_text("seed: no\n")
    lines = told("extends: base.yaml\ntrain:\n  stps: 5\n  log_every: x\n", "modl.n_layer=2", "foo")
    assert [line.split(": ")[:2] for line in lines] == [
        ["command line", "'foo'"],
        ["base.yaml:1", "seed"],
        ["x.yaml:4", "train.log_every"],
        ["x.yaml:3", "train.stps"],
        ["command line", "modl"],
    ]


def test_a_missing_file_names_its_neighbours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt-tiny", "bert"):
        (tmp_path / f"{name}.yaml").write_text("")
    with pytest.raises(UserError) as error:
        load(PretrainConfig, tmp_path.joinpath("gpt-tny.yaml").relative_to(tmp_path))
    assert (
        str(error.value)
        == "gpt-tny.yaml: no such file; did you mean gpt-tiny.yaml? (there is bert.yaml, gpt-tiny.yaml)"
    )
