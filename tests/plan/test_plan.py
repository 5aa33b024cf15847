"""`cairn plan`: what it prints, chooses and refuses."""

from pathlib import Path

import pytest

from cairn.config.load import load
from cairn.config.schema import PretrainConfig
from cairn.errors import UserError
from cairn.ops.precision import fast_bf16
from cairn.plan.__main__ import plan
from cairn.plan.choose import Place, fastest, options, sizes
from cairn.plan.hardware import GPUS, hardware, settled_for
from cairn.plan.memory import Setting, count
from cairn.plan.speed import speed, whole_run

ROOT = Path(__file__).parents[2]


def file(name):
    return str(ROOT / f"configs/pretrain/{name}.yaml")


def config(name, *more):
    return settled_for("h100", load(PretrainConfig, Path(file(name)), more))


def test_a_plan_ends_in_overrides_that_the_config_takes(capsys):
    assert plan([file("gpt2-124m"), "--gpu", "a100-40", "--nodes", "2", "--gpus-per-node", "4", "--price", "2"]) == 0
    out = capsys.readouterr().out
    assert "124,4" in out.splitlines()[0]
    assert max(map(len, out.splitlines())) <= 100
    (line,) = [line for line in out.splitlines() if line.startswith("  train.micro_batch_size=")]
    chosen = config("gpt2-124m", *line.split())
    assert chosen.train.global_batch_size % (8 * chosen.train.micro_batch_size) == 0
    assert "dollars" in out


def test_a_measured_speed_decides_time_and_cost(capsys):
    args = [file("gpt2-124m"), "--gpu", "h100", "--price", "1", "train.steps=1000", "train.eval_samples=8"]
    plan([*args, "--tokens-per-s", "1000000"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("to the end")]
    wanted = config("gpt2-124m")
    hours = 1000 * wanted.train.global_batch_size * wanted.seq_len / 1e6 / 3600
    assert f"{hours * 60:.1f} min" in line or f"{hours:.1f} h" in line


@pytest.mark.parametrize("config_name", ["llama-1b", "bert-base", "gpt-tiny"])
def test_what_is_chosen_fits_and_is_no_slower_than_the_rest(config_name):
    wanted = config(config_name)
    place = Place(GPUS["h100"], 1, 8)
    facts = count(wanted, 4096 if config_name == "gpt-tiny" else wanted.model.vocab_size)
    found = options(wanted, 4096 if config_name == "gpt-tiny" else wanted.model.vocab_size, facts, place)
    best = fastest(wanted, found)
    assert best.fits
    assert best.speed.seconds <= 1.04 * min(option.speed.seconds for option in found if option.fits)
    assert 0.001 < best.speed.mfu < 0.6  # gpt-tiny waits for its launches


def test_auto_is_the_precision_that_the_place_is_fast_in(capsys):
    def said(gpu, *more):
        plan([file("gpt-tiny"), "--gpu", gpu, "--gpus-per-node", "1", *more])
        return capsys.readouterr().out.partition("TFLOP/s in ")[2].partition(";")[0]

    assert said("h100") == "bf16"
    assert said("v100") == "fp16"
    assert said("v100", "engine.precision=fp32") == "fp32"
    assert said("cpu") == ("bf16" if fast_bf16("cpu") else "fp32")


def test_nothing_fits_names_what_would(capsys):
    with pytest.raises(UserError, match=r"nothing fits: .* what would: \d+ x 1 rtx4090 with train.micro_batch_size=1"):
        plan([file("gpt-1.3b"), "--gpu", "rtx4090", "--gpus-per-node", "1", "model.n_layer=96"])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--gpu", "h900"], "--gpu h900: not in the table; choose from b200"),
        (["--gpu", "h100", "--nodes", "3"], "train.global_batch_size 512 does not divide over 24 ranks: set 504"),
        (["--gpu", "v100", "engine.precision=bf16"], "engine.precision=bf16 is not supported on v100"),
        (["--gpu", "v100", "engine.fp8=true"], "engine.fp8 needs engine.precision=bf16, and here it is fp16"),
        (["--gpu", "a100-80", "engine.fp8=true"], "engine.fp8: a100-80 has no 8-bit floats; leave it out, or choose"),
        (["--gpu", "h100", "--nodes", "0"], "--nodes 0: expected at least 1"),
        (["--gpu", "h100", "--gpus-per-node", "0"], "--gpus-per-node 0: expected at least 1"),
        (["--gpu", "h100", "--price", "-2"], "--price -2: expected a positive number"),
        (["--gpu", "h100", "--tokens-per-s", "0"], "--tokens-per-s 0: expected a positive number"),
        (["--gpu", "h100", "model.attention_backend=blocked"], "blocked is made for CPUs"),
        (["--gpu", "h100", "tokenizer.name=file", "tokenizer.path=/nowhere.model"], "/nowhere.model"),
    ],
)
def test_mistakes_are_told(args, says):
    with pytest.raises(UserError) as error:
        plan([file("gpt-1.3b"), *args])
    assert says in str(error.value)


def test_sizes_divide_a_rank_s_share_and_hold_the_config_s_own():
    wanted = config("bench-8x512", "train.global_batch_size=48", "train.micro_batch_size=3")
    assert sizes(wanted, 2) == [1, 2, 3, 4, 8]


def test_nothing_is_prepared(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan([file("gpt-tiny"), "--gpu", "h100", "--gpus-per-node", "1", f"data.dir={tmp_path / 'data'}"])
    assert list(tmp_path.iterdir()) == []


def test_a_whole_run_is_steps_evaluations_and_saves():
    wanted, h100 = config("gpt-1.3b"), hardware("h100", "bf16")
    facts = count(wanted, 50257)

    step = speed(wanted, facts, Setting(1, 8, False), h100, 1, 8)
    seconds, evaluation, saves = whole_run(wanted, facts, Setting(1, 8, False), step, 8, 0)
    assert seconds == 25000 * step.seconds
    assert 0 < saves < evaluation < 0.02 * seconds
