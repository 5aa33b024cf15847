from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cairn.ops import losses
from cairn.ops.losses import cross_entropy_sum, logits_of


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(50, 16), torch.randn(300, 16), torch.randn(300)
    labels = torch.randint(300, (50,))
    labels[::4] = -100
    made = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    return made[0], made[1], made[2], labels


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "piece"), [(50, 3), (7, 3), (7, 7)])
def test_loss_and_gradients_equal_cross_entropy(
    softcap: float | None, with_bias: bool, rows: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "chunks", lambda hidden, vocab: (rows, piece))
    results = []
    for ours in (False, True):
        hidden, weight, bias, labels = inputs()
        tensors = [hidden, weight, *([bias] if with_bias else [])]
        if ours:
            loss = cross_entropy_sum(hidden, weight, labels, bias if with_bias else None, softcap)
        else:
            logits = logits_of(hidden, weight, bias if with_bias else None, softcap)
            loss = F.cross_entropy(logits, labels, reduction="sum")
        (loss * 0.5).backward()
        results.append([loss.detach(), *(x.grad for x in tensors)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_bf16_loss_is_fp32_and_close() -> None:
    hidden, weight, _, labels = inputs(torch.bfloat16)
    loss = cross_entropy_sum(hidden, weight, labels)
    exact = F.cross_entropy(hidden.float() @ weight.float().t(), labels, reduction="sum")
    assert loss.dtype == torch.float32
    assert abs(loss - exact) < 2e-3 * exact
    loss.backward()
    (expected,) = torch.autograd.grad(exact, weight)
    assert weight.grad is not None
    assert (weight.grad - expected).norm() < 0.01 * expected.norm()


def test_no_target_gives_zero_loss_and_zero_gradient() -> None:
    hidden, weight, bias, labels = inputs()
    for some in (slice(None), slice(0)):
        loss = cross_entropy_sum(hidden[some], weight, torch.full_like(labels, -100)[some], bias)
        loss.backward()
        assert loss == 0
        assert weight.grad is not None
        assert not weight.grad.any()


def test_without_gradient_nothing_is_kept() -> None:
    hidden, weight, _, labels = inputs()
    trained = cross_entropy_sum(hidden, weight, labels)
    with torch.no_grad():
        loss = cross_entropy_sum(hidden, weight, labels)
    assert not loss.requires_grad
    assert loss == trained


def test_many_logits_on_a_gpu_are_never_whole() -> None:
    class Largest(TorchDispatchMode):
        """The most elements that one result has."""

        most = 0

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = op(*args, **(kwargs or {}))
            self.most = max(self.most, out.numel() if isinstance(out, Tensor) else 0)
            return out

    vocab = 2**17
    for n, limit in ((1024, 1024 * vocab), (16384, losses.CHUNK_LOGITS)):
        with torch.device("meta"):
            tensors = [torch.empty(*shape, requires_grad=True) for shape in ((n, 64), (vocab, 64), (vocab,))]
            labels = torch.empty(n, dtype=torch.long)
        with Largest() as largest:
            loss = cross_entropy_sum(tensors[0], tensors[1], labels, tensors[2], 30.0)
            loss.backward()
        assert [x.grad.device.type for x in tensors if x.grad is not None] == ["meta"] * 3
        assert largest.most == limit
