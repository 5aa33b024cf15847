"""Two ranks and other ZeRO stages fine-tune to the same numbers; a run goes on where another topology left off."""

from pathlib import Path

import pytest

from cairn.cluster import Cluster
from finetune.seeds import train_seed
from tests.finetune.conftest import config_of, reviews
from tests.train.dist import run_distributed

pytestmark = pytest.mark.slow


def several(rank: int, folder: str, runs: list[list[str]]) -> list[dict[int, float]]:
    """The losses of each of several runs by step, and the accuracies by minus the step."""
    out = []
    cluster = Cluster.from_env()
    with cluster.init():
        for overrides in runs:
            outcome = train_seed(config_of(Path(folder) / f"rank{rank}", *overrides), 1, cluster, several=False)
            cluster.barrier()
            rows = outcome.folder.rows()
            out.append(
                {row["step"]: row["loss"] for row in rows if "loss" in row}
                | {-row["step"]: row["valid/accuracy"] for row in rows if "valid/accuracy" in row}
            )
    return out


def test_ranks_and_stages_agree(tmp_path: Path, bases: dict[str, Path]) -> None:
    for rank in range(2):
        (tmp_path / f"rank{rank}").mkdir()
    train, valid = (
        reviews(tmp_path / "t.tsv", 90),
        reviews(tmp_path / "v.tsv", 33, seed=3),
    )  # the last batch is not full
    keys = [
        f"data.train={train}",
        f"data.valid={valid}",
        f"base.path={bases['bert']}",
        "base.dropout=0",
        "optim.lr=3e-3",
    ]
    keys += [f"run.dir={tmp_path}", f"data.dir={tmp_path}", "train.global_batch_size=16", "train.micro_batch_size=4"]
    keys += ["train.steps=8", "train.eval_every=4", "checkpoint.every=4"]
    lora = [*keys, "tune.name=lora"]
    one = run_distributed(several, 1, str(tmp_path), [[*keys, "run.name=one"], [*lora, "run.name=lora-1"]])[0]
    cases = [[*keys, f"run.name=two-{stage}", f"engine.zero_stage={stage}"] for stage in (1, 3)]
    cases += [[*lora, "run.name=lora-2", "engine.zero_stage=2"], [*keys, "run.name=one", "train.eval_samples=16"]]
    two = run_distributed(several, 2, str(tmp_path), cases)[0]
    for rows in two[:2]:
        assert rows == pytest.approx(one[0], abs=2e-4)
    assert two[2] == pytest.approx(one[1], abs=2e-4)
    assert two[3] == one[0]  # finished already, and opened by two
