"""Two ranks and other ZeRO stages fine-tune to the same numbers; a run goes on where another topology left off."""

from pathlib import Path

import pytest

from cairn.cluster import Cluster
from finetune.seeds import train_seed
from tests.finetune import test_answer, test_choice, test_tag
from tests.finetune.conftest import config_of, reviews
from tests.train.dist import run_distributed

pytestmark = pytest.mark.slow


def several(rank: int, folder: str, runs: list[list[str]]) -> list[dict[int, float]]:
    """The losses of each of several runs by step, and those of its evaluations by minus the step."""
    out = []
    cluster = Cluster.from_env()
    with cluster.init():
        for overrides in runs:
            outcome = train_seed(config_of(Path(folder) / f"rank{rank}", *overrides), 1, cluster, several=False)
            cluster.barrier()
            rows = outcome.folder.rows()
            out.append(
                {row["step"]: row["loss"] for row in rows if "loss" in row}
                | {-row["step"]: row["valid/loss"] for row in rows if "valid/loss" in row}
            )
    return out


def test_ranks_and_stages_agree(tmp_path: Path, bases: dict[str, Path]) -> None:
    for rank in range(2):
        (tmp_path / f"rank{rank}").mkdir()
    keys = ["base.dropout=0", "optim.lr=3e-3", f"run.dir={tmp_path}", f"data.dir={tmp_path}", "checkpoint.every=4"]
    keys += ["train.global_batch_size=16", "train.micro_batch_size=4", "train.steps=8", "train.eval_every=4"]

    def task(base: str, train: Path, valid: Path, *more: str) -> list[str]:
        return [*keys, f"base.path={bases[base]}", f"data.train={train}", f"data.valid={valid}", *more]

    # 33 for evaluation: the last batch is not full
    classify = task("bert", reviews(tmp_path / "t.tsv", 90), reviews(tmp_path / "v.tsv", 33, seed=3))
    lora = [*classify, "tune.name=lora"]
    tags = (test_tag.sentences(tmp_path / f"{n}.conll", n) for n in (90, 33))
    questions = (test_answer.numbers(tmp_path / f"{n}.json", n) for n in (90, 33))
    choices = (test_choice.reviews(tmp_path / f"{n}.jsonl", n) for n in (90, 33))
    others = [
        task("gpt", *tags, "task.name=tag"),
        task("gpt", *questions, *test_answer.KEYS),
        task("bert", *choices, "task.name=choice"),
    ]
    single = [[*classify, "run.name=one"], [*lora, "run.name=lora"]]
    single += [[*other, f"run.name=other-{n}"] for n, other in enumerate(others)]
    one = run_distributed(several, 1, str(tmp_path), single)[0]
    double = [[*classify, "run.name=two-1", "engine.zero_stage=1"], [*lora, "run.name=two-2", "engine.zero_stage=2"]]
    double += [[*other, f"run.name=two-other-{n}", f"engine.zero_stage={n + 1}"] for n, other in enumerate(others)]
    double += [[*classify, "run.name=two-3", "engine.zero_stage=3"]]
    double += [[*classify, "run.name=one", "train.eval_samples=16"]]
    two = run_distributed(several, 2, str(tmp_path), double)[0]
    for ours, alone in zip(two, [*one, one[0]], strict=False):
        assert len(ours) == 10
        assert ours == pytest.approx(alone, abs=2e-4)
    assert two[-1] == one[0]  # finished already, and opened by two
