"""The help lists every key with its type, default and doc."""

from itertools import takewhile

import pytest

from cairn.config.fields import dotted
from cairn.config.help import entries, print_help
from cairn.config.schema import GANConfig, PretrainConfig, VisionConfig


@pytest.mark.parametrize("schema", [PretrainConfig, VisionConfig, GANConfig])
def test_every_key_is_told_and_has_a_doc(schema):
    told = {e.key for e in entries(schema)}
    for key in dotted([schema]):
        assert key in told or any(heading.startswith((key, f"{key}=")) for heading in told), key
    assert [e.key for e in entries(schema) if e.kind and not e.doc] == []


def test_a_choice_is_told_by_what_differs():
    listed = list(entries(PretrainConfig))
    start = next(i for i, e in enumerate(listed) if e.key == "model.name=bert")
    bert = {e.key: e.default for e in takewhile(lambda e: e.kind, listed[start + 1 :])}
    assert bert["model.norm_position"] == "post"
    assert "model.d_model" not in bert


def test_plain_without_a_terminal(capsys):
    print_help(PretrainConfig, "usage: x")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "train.steps = 1000   (an integer >= 1)\n      Optimizer steps." in out
