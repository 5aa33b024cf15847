"""What `engine.precision: auto` becomes when a run begins, and when it goes on."""

from pathlib import Path

import pytest

from cairn.cluster import Cluster
from cairn.config.load import load
from cairn.config.schema import RunConfig
from cairn.config.train import EngineSection
from cairn.errors import UserError
from cairn.ops import precision
from cairn.train.opening import settled_config
from cairn.train.trainer import train
from tests.train.dist import run_distributed
from tests.train.toy import Toy, config


def kept(path: Path) -> str:
    """The precision in the config.yaml of the run `toy`."""
    return load(RunConfig, path / "toy").engine.precision


@pytest.mark.parametrize(("fast", "name"), [(True, "bf16"), (False, "fp32")])
def test_a_run_keeps_what_it_began_with(
    tmp_path: Path,
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fast: bool,
    name: str,
) -> None:
    auto = config(tmp_path, engine=EngineSection())
    for now in (fast, not fast):  # another machine
        monkeypatch.setattr(precision, "fast_bf16", lambda _, now=now: now)
        monkeypatch.setattr("cairn.train.outcome.fast_bf16", lambda _, now=now: now)
        train(Toy(), auto.model_copy(update={"train": auto.train.model_copy(update={"eval_every": 0})}), cluster)
        assert kept(tmp_path) == name
        (tmp_path / "toy/checkpoints/step-00000012").rename(tmp_path / f"checkpoint-{now}")
    first, second = capsys.readouterr().out.split("going on from the checkpoint of step 8")
    assert f"1 x CPU, {name}, ZeRO" in first
    assert "warning: bf16 is emulated" not in second
    assert ("warning: bf16 is emulated" in first.splitlines()[-1]) == fast


def test_another_precision_is_refused_when_it_is_given(tmp_path: Path, cluster: Cluster) -> None:
    train(Toy(), config(tmp_path, steps=2), cluster)
    with pytest.raises(UserError, match=r"engine\.precision was fp32, now bf16"):
        train(Toy(), config(tmp_path, steps=2, engine=EngineSection(precision="bf16")), cluster)


def differently(rank: int, path: str) -> str:
    """On machines of which only rank 0's is fast in bf16."""
    precision.fast_bf16 = lambda _: rank == 0
    return settled_config(config(Path(path), engine=EngineSection()), Cluster(rank, 2, rank, 2)).engine.precision


def test_all_ranks_follow_the_first(tmp_path: Path) -> None:
    assert run_distributed(differently, 2, str(tmp_path)) == ["bf16", "bf16"]
