"""Which runs a grid has, and what they are called."""

import re

import pytest

from cairn.config.load import load
from cairn.config.schema import VisionConfig
from cairn.errors import UserError
from launch.sweep import names, parse, points

CONFIG = "configs/vision/vit-digits.yaml"


def test_the_last_axis_turns_fastest():
    axes = parse(["optim.lr=1e-3,2e-3", "seed=1,2"])
    assert points(axes) == [
        ("optim.lr=1e-3", "seed=1"),
        ("optim.lr=1e-3", "seed=2"),
        ("optim.lr=2e-3", "seed=1"),
        ("optim.lr=2e-3", "seed=2"),
    ]
    assert names("x", axes) == ["x-lr_1e-3-seed_1", "x-lr_1e-3-seed_2", "x-lr_2e-3-seed_1", "x-lr_2e-3-seed_2"]


def test_commas_inside_brackets_and_quotes_separate_nothing():
    (axis,) = parse(["optim.betas=[0.9, 0.95],[0.9,0.99]"])
    assert axis.values == ("[0.9, 0.95]", "[0.9,0.99]")
    (axis,) = parse(["a.b={x: 1, y: 2},'p,q'"])
    assert axis.values == ("{x: 1, y: 2}", "'p,q'")


@pytest.mark.parametrize(
    "options",
    [
        ["optim.betas=[0.9,0.95],[0.9,0.99]"],
        ["data.source=a/b c.txt,/x/$(rm);`y`"],
        ["a.x=1,2", "b.x=1,2"],
        ["a.x=a b,a/b"],  # the same word
        ["a.x=-1,1"],
        ["a.x=" + ",".join(f"{'long' * 60}{k}" for k in range(3))],
        ["a.x=../../y,.."],
        ["a.x=é,ü"],
    ],
)
def test_names_are_apart_and_fit_a_folder(options):
    axes = parse(options)
    found = names("run", axes)
    assert len(set(found)) == len(found) == len(points(axes))
    for name in found:
        assert re.fullmatch(r"run-[A-Za-z0-9._-]+", name)
        assert len(name) < 200
        assert load(VisionConfig, _root() / CONFIG, [f"run.name={name}"]).run.name == name


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["optim.lr"], "expected KEY=V1,V2"),
        (["=1"], "expected KEY=V1,V2"),
        (["optim.lr="], "expected KEY=V1,V2"),
        (["optim.lr=1,,2"], "expected KEY=V1,V2"),
        (["run.name=a,b"], "named by its values"),
        (["seed=1", "seed=2"], "seed: given twice"),
        (["seed=1,2,1"], "seed: 1 is given twice"),
    ],
)
def test_mistakes(options, says):
    with pytest.raises(UserError, match=re.escape(says)):
        parse(options)


def _root():
    from pathlib import Path

    return Path(__file__).parents[2]
