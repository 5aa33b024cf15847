"""One run, however it is split: over micro-batches, processes, launchers and ZeRO stages, also from its middle on."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest

from cairn.config.load import load
from cairn.config.schema import PretrainConfig
from cairn.data.prepare import open_prepared, prepare
from cairn.train.checkpoint import folder_of
from cairn.train.folder import RunFolder
from cairn.train.language_model import LanguageModel
from pretrain.compare import Result, relative_differences
from tests.pretrain.conftest import STEPS, Place
from tests.pretrain.runs import LAUNCHERS, copied, steps

# Without dropout, which is drawn by rank; and with an eps that keeps Adam from blowing rounding noise up to whole
# steps where the gradient is zero, and makes its steps depend on the size of the gradient.
EXACT = ("model.dropout=0.0", "model.attention_dropout=0.0", "optim.eps=1e-3")


def agree(a: RunFolder, b: RunFolder, tolerance: float = 1e-5) -> None:
    """All metrics of all steps, and weights and moments together, within a relative tolerance."""
    assert steps(a) == steps(b) == list(range(1, STEPS + 1))
    differences = relative_differences(Result.of(a), Result.of(b))
    assert {"loss", "grad_norm", "valid/loss", "weight", "exp_avg", "exp_avg_sq"} <= differences.keys()
    assert {name: found for name, found in differences.items() if found[0] > tolerance} == {}


@pytest.fixture(scope="session")
def gpt(place: Place) -> RunFolder:
    """One process, one micro-batch a step."""
    place.run(place.gpt, "gpt", *EXACT)
    return place.folder("gpt")


@pytest.fixture(scope="session")
def bert(place: Place) -> RunFolder:
    place.run(place.bert, "bert", *EXACT)
    return place.folder("bert")


def test_masked_counts_are_uneven(place: Place) -> None:
    """Else the tests below could not tell a mean over micro-batches from a mean over targets."""
    config = load(PretrainConfig, place.bert, [])
    task = LanguageModel(config, open_prepared(prepare(config.data, config.tokenizer)))
    counts = [int(np.sum(task.samples("train").item(k)["labels"] >= 0)) for k in range(8)]
    assert max(counts) >= 2 * min(counts)


@pytest.mark.parametrize(("ranks", "micro", "launcher"), [(1, 2, ""), (2, 4, "torchrun"), (2, 1, "srun")])
def test_gpt(place: Place, gpt: RunFolder, ranks: int, micro: int, launcher: str) -> None:
    name = f"gpt-{ranks}-{micro}"
    said = place.run(place.gpt, name, *EXACT, f"train.micro_batch_size={micro}", ranks=ranks, launcher=launcher)
    assert f"= {ranks} x {8 // micro // ranks} x {micro}" in said.output[0]
    assert all(line == "" for line in said.output[1:]), "only the main rank speaks"
    agree(gpt, place.folder(name))


@pytest.mark.parametrize(
    ("ranks", "micro", "launcher"),
    [
        (1, 1, ""),
        (2, 1, "torchrun"),
        (2, 4, "srun"),
        pytest.param(8, 1, "torchrun", marks=pytest.mark.slow),
    ],
)
def test_bert(place: Place, bert: RunFolder, ranks: int, micro: int, launcher: str) -> None:
    name = f"bert-{ranks}-{micro}"
    place.run(place.bert, name, *EXACT, f"train.micro_batch_size={micro}", ranks=ranks, launcher=launcher)
    agree(bert, place.folder(name))


def test_an_encoder_decoder_whose_weights_are_shared_out(place: Place) -> None:
    place.run(place.seq2seq, "spans-1", *EXACT)
    place.run(place.seq2seq, "spans-2", *EXACT, "train.micro_batch_size=2", "engine.zero_stage=3", ranks=2)
    agree(place.folder("spans-1"), place.folder("spans-2"))


def test_bf16(place: Place) -> None:
    bf16 = (*EXACT, "engine.precision=bf16")
    place.run(place.bert, "bf16", *bf16)
    place.run(place.bert, "bf16-split", *bf16, "train.micro_batch_size=2", "engine.zero_stage=2", ranks=2)
    a, b = Result.of(place.folder("bf16")), Result.of(place.folder("bf16-split"))
    found = relative_differences(a, b)
    assert found["loss"][0] < 5e-3
    assert found["grad_norm"][0] < 5e-2
    assert found["weight"][0] < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("start", [(), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")])
def test_the_commands_of_the_handbook(place: Place, gpt: RunFolder, start: Sequence[str]) -> None:
    """`python -m pretrain`, `torchrun -m pretrain`: real ones, where the tests above fork."""
    name = "plain" if not start else "torchrun"
    env = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    command = [sys.executable, *start, "-m", "pretrain", str(place.gpt), f"run.name={name}", *EXACT]
    if start:
        command.append("train.micro_batch_size=4")
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"finished {STEPS} steps") == 1
    agree(gpt, place.folder(name))


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [
        (2, 3),
        (1, 0),
        pytest.param(2, 0, marks=pytest.mark.slow),
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(2, 2, marks=pytest.mark.slow),
        pytest.param(1, 3, marks=pytest.mark.slow),
    ],
)
def test_resume_on_another_topology(place: Place, gpt: RunFolder, ranks: int, stage: int) -> None:
    name = f"resumed-{ranks}-{stage}"
    _resume(place, gpt, name, f"engine.zero_stage={stage}", ranks=ranks)


@pytest.mark.slow
def test_resume_on_fewer_ranks(place: Place, gpt: RunFolder) -> None:
    place.run(place.gpt, "wide", *EXACT, "train.micro_batch_size=4", "engine.zero_stage=3", ranks=2)
    wide = place.folder("wide")
    _resume(place, wide, "narrow", "engine.zero_stage=1", ranks=1)
    agree(gpt, place.folder("narrow"))


def _resume(place: Place, before: RunFolder, name: str, *overrides: str, ranks: int) -> None:
    """Go on from step 8 of a run on other ranks; both runs agree."""
    folder = copied(before, name)
    for step in (12, STEPS):
        shutil.rmtree(folder_of(folder.checkpoints, step))
    micro = f"train.micro_batch_size={8 // ranks}"
    said = place.run(place.gpt, name, *EXACT, micro, *overrides, ranks=ranks).text
    assert "going on from the checkpoint of step 8" in said
    agree(before, folder)
