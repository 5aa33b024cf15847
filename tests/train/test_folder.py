import os
from pathlib import Path

import pytest

from cairn.errors import UserError
from cairn.train.folder import RunFolder, flatten, parse_rows, write_atomically

CONFIG = """
seed: 1
optim: {name: adamw, lr: 0.001, betas: [0.9, 0.95]}
train: {steps: 100, micro_batch_size: 4, global_batch_size: 8}
engine: {zero_stage: 1, precision: bf16, deepspeed: {}}
data: {workers: null, seq_len: 64}
"""


def test_the_same_config_may_go_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "name")
    assert not folder.create(CONFIG)
    assert folder.create(CONFIG)
    assert folder.config.read_text() == CONFIG


def test_another_config_is_refused_with_every_key(tmp_path: Path) -> None:
    RunFolder(tmp_path).create(CONFIG)
    changed = (
        CONFIG.replace("0.001", "0.002").replace("seq_len: 64", "seq_len: 32").replace("[0.9, 0.95]", "[0.9, 0.9]")
    )
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path).create(changed)
    assert "optim.lr was 0.001, now 0.002" in str(caught.value)
    assert "data.seq_len was 64, now 32" in str(caught.value)
    assert "optim.betas was [0.9, 0.95], now [0.9, 0.9]" in str(caught.value)
    assert "run.name" in str(caught.value)
    assert RunFolder(tmp_path).config.read_text() == CONFIG


def test_topology_may_change_and_is_recorded(tmp_path: Path) -> None:
    RunFolder(tmp_path).create(CONFIG)
    moved = CONFIG.replace("zero_stage: 1", "zero_stage: 3").replace("micro_batch_size: 4", "micro_batch_size: 2")
    moved = moved.replace("workers: null", "workers: 2")
    moved = moved.replace("deepspeed: {}", "deepspeed: {communication_data_type: bf16}")
    RunFolder(tmp_path).create(moved)
    assert RunFolder(tmp_path).config.read_text() == moved


def test_precision_is_what_a_run_computes(tmp_path: Path) -> None:
    RunFolder(tmp_path).create(CONFIG)
    with pytest.raises(UserError, match=r"engine\.precision was bf16, now fp16"):
        RunFolder(tmp_path).create(CONFIG.replace("bf16", "fp16"))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/name: .*run\.dir"):
        RunFolder(tmp_path, "file", "name").create(CONFIG)


def test_a_key_that_only_begins_like_a_free_one_may_not_change(tmp_path: Path) -> None:
    RunFolder(tmp_path).create("engine_name: a")
    with pytest.raises(UserError, match="engine_name"):
        RunFolder(tmp_path).create("engine_name: b")


def test_a_key_of_a_newer_version_at_none_is_no_change(tmp_path: Path) -> None:
    RunFolder(tmp_path).create("seed: 1")
    RunFolder(tmp_path).create("seed: 1\nmodel: {window: null}")


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [1]}}, "e": None}) == {"a.b": 1, "a.c.d": [1], "e": None}


def test_write_atomically_leaves_nothing_beside(tmp_path: Path) -> None:
    write_atomically(tmp_path / "x", b"one")
    write_atomically(tmp_path / "x", b"two")
    assert (tmp_path / "x").read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["x"]


def test_rows_pass_over_a_half_written_last_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"step": 1}\n{"step": 1, "valid/loss": 2.0}\n{"step": 2, "lo')
    assert list(parse_rows(folder.metrics)) == folder.rows() == [{"step": 1}, {"step": 1, "valid/loss": 2.0}]
    assert folder.last_evaluation() == {"valid/loss": 2.0}


def test_no_rows_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rows"):
        RunFolder(tmp_path).rows()
    assert RunFolder(tmp_path).last_evaluation() == {}
