"""A real run under the launcher: a rank killed by signal 9, and the restart that ends as if nothing had been."""

import os
import signal
import time
from pathlib import Path

import pytest

from cairn.train.checkpoint import steps_in
from cairn.train.folder import RunFolder, parse_rows
from tests.launch.launchers import Launcher, until

CONFIG = """
tokenizer: {{name: bytes}}
data: {{source: {here}/corpus, dir: {here}/data, workers: 1, held_out: 0.2}}
model: {{name: gpt, n_layer: 2, n_head: 2, d_model: 32, max_seq_len: 32}}
objective: {{name: causal}}
optim: {{name: adamw, lr: 0.01}}
schedule: {{warmup_steps: 2}}
engine: {{precision: fp32}}
train: {{steps: 400, global_batch_size: 8, micro_batch_size: 4, log_every: 1, eval_every: 0, eval_samples: 8}}
checkpoint: {{every: 40}}
run: {{dir: {here}/runs}}
track: {{progress: false}}
"""


def losses(run: RunFolder) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in parse_rows(run.metrics) if "loss" in row}


def rank_1_of(launcher: Launcher) -> int | None:
    """Its pid, from the environment that it was started with."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                started_with = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if int(parent) == launcher.process.pid and b"RANK=1" in started_with:
                return int(folder.name)
    return None


@pytest.mark.slow
def test_a_killed_rank_and_a_restart_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for i in range(8):
        text = " ".join(str((i * 7919 + k * k) % 1000) for k in range(600))
        (tmp_path / "corpus" / f"{i}.txt").write_text(text)
    config = tmp_path / "gpt.yaml"
    config.write_text(CONFIG.format(here=tmp_path))

    def start(name: str, restarts: int) -> tuple[Launcher, RunFolder]:
        run = RunFolder(tmp_path, "runs", name)
        args = [str(config), f"run.name={name}"]
        return Launcher(run.path, "", module="pretrain", args=args, ranks=2, restarts=restarts), run

    straight, undisturbed = start("straight", 0)
    straight.end(0, 200)
    launcher, killed = start("killed", 1)
    until(lambda: killed.checkpoints.exists() and steps_in(killed.checkpoints), 120)
    pid = rank_1_of(launcher)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    begin = time.monotonic()
    said = launcher.end(0, 200)
    assert "rank 1 (" in said
    assert "was killed by signal 9; going on from the last checkpoint" in said
    assert "going on from the checkpoint of step" in said
    assert time.monotonic() - begin < 120
    assert losses(killed) == losses(undisturbed)
    assert sorted(losses(killed)) == list(range(1, 401))
