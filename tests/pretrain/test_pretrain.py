"""What a run is for: it learns; several ranks stop together; wandb follows."""

import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from cairn.train.checkpoint import steps_in
from cairn.train.folder import RunFolder
from tests.pretrain.conftest import Place
from tests.pretrain.runs import LAUNCHERS, Mishap, losses, rows, steps

LONGER = (
    *("train.steps=200", "train.global_batch_size=32", "train.micro_batch_size=32", "optim.lr=0.003"),
    *("train.eval_every=0", "train.eval_samples=64", "checkpoint.every=0"),
    *("model.max_seq_len=64", "model.dropout=0.0", "model.attention_dropout=0.0", "engine.precision=auto"),
)


def entropy(place: Place) -> float:
    """Of single bytes of the corpus, in nats: the loss of a model that knows how frequent each is and no more."""
    counts: Counter[int] = Counter()
    for path in (place.here / "corpus").iterdir():
        counts.update(path.read_bytes())
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())


def test_gpt_learns_more_than_how_frequent_bytes_are(place: Place) -> None:
    place.run(place.gpt, "learning", *LONGER)
    folder = place.folder("learning")
    found, evaluation = losses(folder), folder.last_evaluation()
    assert found[0] == pytest.approx(math.log(384), rel=0.05)  # 384 rows: 263 tokens rounded up
    assert sum(found[-10:]) / 10 < entropy(place) - 0.4
    assert evaluation["valid/loss"] < entropy(place) - 0.4
    # a token is a byte, but for the ends of documents
    assert evaluation["valid/bits_per_byte"] == pytest.approx(evaluation["valid/loss"] / math.log(2), rel=0.01)


def test_bert_learns_masked_tokens(place: Place) -> None:
    place.run(place.bert, "masking", *LONGER)
    folder = place.folder("masking")
    found = rows(folder)
    assert found[0]["masked"] == pytest.approx(math.log(384), rel=0.05)
    assert found[0]["next_sentence"] == pytest.approx(math.log(2), rel=0.2)
    # down to how frequent each byte is, where it stays for long
    assert sum(row["masked"] for row in found[-10:]) / 10 < entropy(place) + 0.1
    assert all(row["loss"] == pytest.approx(row["masked"] + row["next_sentence"], rel=1e-5) for row in found)
    assert folder.last_evaluation().keys() == {"valid/loss", "valid/masked", "valid/next_sentence"}


@pytest.mark.parametrize("rank", [None, 1])
def test_ranks_stop_together(place: Place, rank: int | None) -> None:
    """Ctrl-C reaches every rank, a scheduler's signal perhaps one."""
    name, two = f"together-{rank}", {"ranks": 2}
    own = ("train.micro_batch_size=4", "engine.zero_stage=2")
    said = place.run(place.gpt, name, *own, before=Mishap(signal.SIGINT, 5, rank=rank), **two).output[0]
    saved = steps_in(place.folder(name).checkpoints)
    assert 5 <= saved[-1] <= 7
    assert f"after step {saved[-1]}, checkpoint saved: the same command goes on" in said
    assert ("stopped by SIGINT" if rank is None else "stopped by a signal on another rank") in said
    place.run(place.gpt, name, *own, **two)
    assert steps(place.folder(name)) == list(range(1, 15))


@pytest.mark.slow
def test_ctrl_c_under_torchrun(place: Place) -> None:
    """torchrun itself ends with status 1 after a signal, whatever its ranks did."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    more = ["train.steps=4000", "train.micro_batch_size=4", "train.eval_every=0"]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pretrain"]
    command = [sys.executable, *start, str(place.gpt), "run.name=interrupted", *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=env, start_new_session=True, **pipes) as process:
        folder = place.folder("interrupted")
        deadline = time.monotonic() + 120
        while not folder.metrics.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said = process.communicate(timeout=60)[0]
    saved = steps_in(folder.checkpoints)[-1]
    assert f"stopped by SIGINT after step {saved}, checkpoint saved: the same command goes on" in said
    assert steps(folder) == list(range(1, saved + 1))


@pytest.mark.slow
def test_wandb_offline_stays_one_run(place: Place, straight: RunFolder) -> None:
    own = (place.gpt, "tracked", "engine.precision=bf16", "track.wandb=offline")
    said = place.run(*own, before=Mishap(signal.SIGTERM, 6)).text
    assert "wandb: offline in" in said
    place.run(*own)
    folder = place.folder("tracked")
    found = [path.name.rpartition("-")[2] for path in (folder.path / "wandb").glob("offline-run-*")]
    assert found == [(folder.path / "wandb_id").read_text().strip()] * 2
    assert losses(folder) == losses(straight)
    assert all(any(path.glob("*.wandb")) for path in (folder.path / "wandb").glob("offline-run-*"))
