import json
import math
from pathlib import Path

import torch

from cairn.train.checkpoint import CheckpointStore
from cairn.train.folder import RunFolder
from pretrain.compare import Result, first_differences, relative_differences, tensor_difference


def make(path: Path, loss: float = 2.0, weight: float = 1.0, seed: int = 1, name: str = "model/weight/w") -> Result:
    folder = RunFolder(path)
    path.mkdir()
    rows = [{"step": step, "loss": loss if step == 2 else 3.0, "tokens_per_s": hash(path)} for step in (1, 2, 3)]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tensors = [(name, torch.tensor([[1.0, 2.0], [weight, 0.0]])), ("model/exp_avg/w", torch.tensor([3.0, 4.0]))]
    CheckpointStore(folder.checkpoints).save(3, tensors, {"seed": seed})
    return Result.of(folder)


def test_identical_runs(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b")
    assert first_differences(a, b) == []
    assert {difference for difference, _ in relative_differences(a, b).values()} == {0.0}
    assert a.steps() == 3


def test_the_first_step_and_element_are_named_with_both_values(tmp_path: Path) -> None:
    a = make(tmp_path / "a")
    b = make(tmp_path / "b", loss=math.nextafter(2.0, 3.0), weight=1.0000001, seed=2)
    loss, tensor, state = first_differences(a, b)
    assert loss == "step 2: loss is 2.0 and 2.0000000000000004"
    assert tensor.startswith("tensor model/weight/w: [1, 0] is 1.0 and 1.0000001")
    assert "1 of 4 elements" in tensor
    assert state == "state seed: 1 and 2"


def test_missing_rows_and_tensors_differ(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b", name="model/weight/v")
    (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
    b = Result.of(RunFolder(tmp_path / "b"))
    found = first_differences(a, b)
    assert found[0] == "step 3: loss is 3.0 and 'missing'"
    assert found[1] == "tensor model/weight/w: only one checkpoint has it"
    assert relative_differences(a, b)["weight"][0] == math.inf
    assert relative_differences(a, b)["loss"] == (math.inf, "step 3")


def test_bits_count_and_not_values() -> None:
    nan = torch.tensor([float("nan"), 0.0])
    assert tensor_difference(nan, nan.clone()) is None
    assert tensor_difference(torch.tensor(0.0), torch.tensor(-0.0)) is not None
    assert "float16" in str(tensor_difference(torch.zeros(1), torch.zeros(1).half()))
    assert tensor_difference(torch.zeros(2, 0), torch.zeros(2, 0)) is None


def test_relative_differences_are_of_a_step_and_of_all_tensors_of_a_kind(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b", loss=2.5, weight=1.3)
    found = relative_differences(a, b)
    assert found["loss"] == (0.2, "step 2")
    assert math.isclose(found["weight"][0], 0.3 / math.sqrt(6.0), rel_tol=1e-6)
    assert found["weight"][1] == "model/weight/w"
    assert found["exp_avg"] == (0.0, "")


def test_a_run_that_went_nan_is_not_close(tmp_path: Path) -> None:
    found = relative_differences(make(tmp_path / "a"), make(tmp_path / "b", loss=math.nan))
    assert not found["loss"][0] <= 1.0
