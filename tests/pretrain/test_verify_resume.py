import subprocess
import sys
import time
from pathlib import Path

import pytest

from cairn.config.schema import PretrainConfig
from cairn.config.train import TrainSection
from cairn.errors import UserError
from cairn.train.folder import RunFolder
from pretrain.verify_resume import Ranks, _kill, _micro_batch_size

TINY = """
tokenizer: {name: bytes}
model: {n_layer: 1, n_head: 2, d_model: 16, max_seq_len: 16, dropout: 0.1}
train: {global_batch_size: 4, micro_batch_size: 2}
"""


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_failing_rank_ends_all_and_its_output_is_told(tmp_path: Path) -> None:
    program = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit('lost my way'); time.sleep(60)"
    ranks = Ranks([sys.executable, "-c", program], 2, tmp_path / "log")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"status 1(.|\n)*lost my way"):
        ranks.wait()
    assert time.monotonic() - start < 30
    assert not any(alive(process.pid) for process in ranks._processes)


def test_kill_waits_for_the_step_and_a_checkpoint(tmp_path: Path) -> None:
    program = f"""
import json, time, pathlib
folder = pathlib.Path({str(tmp_path)!r})
for step in range(1, 2000):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({{"step": step}}) + "\\n")
    if step == 4:
        (folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    time.sleep(0.02)
"""
    ranks = Ranks([sys.executable, "-c", program], 1, tmp_path / "log")
    assert 6 <= _kill(ranks, RunFolder(tmp_path), 6) < 1999
    assert not alive(ranks._processes[0].pid)


def test_a_run_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--steps"):
        _kill(Ranks([sys.executable, "-c", ""], 1, tmp_path / "log"), RunFolder(tmp_path), 3)


def test_micro_batch_size_divides_the_share_of_a_rank() -> None:
    config = PretrainConfig(train=TrainSection(global_batch_size=12, micro_batch_size=4))
    assert [_micro_batch_size(config, world) for world in (1, 2, 3, 6)] == [4, 3, 4, 2]
    with pytest.raises(UserError, match="does not divide by 5 ranks"):
        _micro_batch_size(config, 5)


def verify(tmp_path: Path, *options: str) -> str:
    config = tmp_path / "tiny.yaml"
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(40):
        (corpus / f"{i}.txt").write_text(f"The {i} ships went out to sea and {i + 1} came back again.\n" * 5)
    config.write_text(TINY + f"data: {{source: {corpus}, dir: {tmp_path / 'data'}, workers: 1, held_out: 0.2}}\n")
    command = [sys.executable, "-m", "pretrain.verify_resume", str(config), "--steps", "8", *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_same_topology_is_identical(tmp_path: Path) -> None:
    assert "identical: 8 steps" in verify(tmp_path)


@pytest.mark.slow
def test_another_topology_agrees_within_reduction_order(tmp_path: Path) -> None:
    said = verify(tmp_path, "--resume-world", "2", "--resume-zero", "3")
    assert "within reduction order" in said
    assert "dropout" in said
