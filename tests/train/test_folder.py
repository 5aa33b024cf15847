import math
import os
from pathlib import Path
from typing import Any

import pytest

from cairn.config.data import DataSection
from cairn.config.load import load
from cairn.config.schema import PretrainConfig
from cairn.errors import UserError
from cairn.train.folder import RunFolder, flatten, format_row, parse_rows, write_atomically

CONFIG = PretrainConfig(data=DataSection(seq_len=64))


def changed(**sections: dict[str, Any]) -> PretrainConfig:
    """CONFIG with some keys of some sections changed."""
    return CONFIG.model_copy(
        update={name: getattr(CONFIG, name).model_copy(update=keys) for name, keys in sections.items()}
    )


def test_the_same_config_may_go_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "name")
    assert not folder.create(CONFIG)
    assert folder.create(CONFIG)
    assert load(PretrainConfig, folder.config) == CONFIG


def test_another_config_is_refused_with_every_key(tmp_path: Path) -> None:
    RunFolder(tmp_path).create(CONFIG)
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path).create(changed(optim={"lr": 0.002, "betas": (0.9, 0.9)}, data={"seq_len": 32}))
    assert "optim.lr was 0.0006, now 0.002" in str(caught.value)
    assert "data.seq_len was 64, now 32" in str(caught.value)
    assert "optim.betas was [0.9, 0.95], now [0.9, 0.9]" in str(caught.value)
    assert "run.name" in str(caught.value)
    assert load(PretrainConfig, RunFolder(tmp_path).config) == CONFIG


def test_topology_may_change_and_is_recorded(tmp_path: Path) -> None:
    RunFolder(tmp_path).create(CONFIG)
    engine = {"zero_stage": 3, "deepspeed": {"communication_data_type": "bf16"}}
    moved = changed(engine=engine, train={"micro_batch_size": 2}, data={"workers": 2})
    RunFolder(tmp_path).create(moved)
    assert load(PretrainConfig, RunFolder(tmp_path).config) == moved


def test_precision_is_what_a_run_computes(tmp_path: Path) -> None:
    RunFolder(tmp_path).create(CONFIG)  # auto: imported, and not trained yet
    RunFolder(tmp_path).create(changed(engine={"precision": "bf16"}))
    with pytest.raises(UserError, match=r"engine\.precision was bf16, now fp16"):
        RunFolder(tmp_path).create(changed(engine={"precision": "fp16"}))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/name: .*run\.dir"):
        RunFolder(tmp_path, "file", "name").create(CONFIG)


@pytest.mark.parametrize("key", ["eps: 1.0e-08", "weight_decay: 0.1"])
def test_a_key_that_an_older_version_had_not_counts_as_its_default(tmp_path: Path, key: str) -> None:
    folder = RunFolder(tmp_path)
    folder.create(CONFIG)
    text = folder.config.read_text()
    assert text.count(key) == 1
    folder.config.write_text(text.replace(f"  {key}\n", ""))
    folder.create(CONFIG)
    folder.config.write_text(text.replace(f"  {key}\n", ""))
    with pytest.raises(UserError, match=key.split(":")[0]):
        folder.create(changed(optim={key.split(":")[0]: 0.25}))


def test_only_a_run_whose_schedule_is_not_stretched_may_get_longer(tmp_path: Path) -> None:
    longer, shorter = {"steps": 2000}, {"steps": 10}
    RunFolder(tmp_path / "cosine").create(CONFIG)
    with pytest.raises(UserError, match=r"train\.steps was 1000, now 2000 .*only where schedule\.name is constant"):
        RunFolder(tmp_path / "cosine").create(changed(train=longer))
    constant = {"name": "constant"}
    RunFolder(tmp_path / "constant").create(changed(schedule=constant))
    with pytest.raises(UserError, match=r"train\.steps was 1000, now 10 "):
        RunFolder(tmp_path / "constant").create(changed(schedule=constant, train=shorter))
    RunFolder(tmp_path / "constant").create(changed(schedule=constant, train=longer))


def test_rows_are_json_and_what_is_not_finite_is_nan_again(tmp_path: Path) -> None:
    line = format_row({"step": 1, "loss": math.nan, "grad_norm": math.inf, "skipped": True})
    assert line == '{"step": 1, "loss": null, "grad_norm": null, "skipped": true}\n'
    (tmp_path / "x").write_text(line)
    (row,) = parse_rows(tmp_path / "x")
    assert math.isnan(row["loss"])
    assert math.isnan(row["grad_norm"])
    assert format_row(row) == line


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
