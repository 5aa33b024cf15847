"""Our kernels for AMX, beside PyTorch in fp32: where they round, they are as close as PyTorch's own bf16."""

import logging
import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from cairn.config.model import Activation
from cairn.errors import UserError
from cairn.ops import native
from cairn.ops.activations import activate
from cairn.ops.attention import attention, choose
from cairn.ops.linear import FUSED, Linear, linear
from cairn.ops.losses import cross_entropy_sum
from cairn.ops.masks import Mask
from cairn.ops.norms import Scale, add_norm, norm
from cairn.ops.positions import rope_table, rotate
from cairn.optim.fused import norms

needs_amx = pytest.mark.skipif(not native.available(), reason="this machine has no AMX, or no g++")
Function = Callable[..., Tensor | tuple[Tensor, ...]]


def gradients(function: Function, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """What a function gives and the gradients it leaves, of the same bf16 numbers in any dtype."""
    inputs = [x if x is None else x.bfloat16().to(dtype).requires_grad_() for x in tensors]
    outputs = function(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    torch.manual_seed(1)
    sum((y * torch.randn(y.shape).bfloat16().to(y.dtype)).sum() for y in outputs).backward()  # type: ignore[union-attr]
    return [*(y.detach() for y in outputs), *(x.grad for x in inputs if x is not None and x.grad is not None)]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected).norm() / expected.norm().clamp(min=1e-9))


def assert_close(function: Function, tensors: Sequence[Tensor | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours in bf16 is no farther from fp32 than PyTorch's operators in bf16 are."""
    exact = gradients(function, tensors, torch.float32)
    ours = gradients(function, tensors, torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(native, "available", lambda: False)
        theirs = gradients(function, tensors, torch.bfloat16)
    assert len(ours) == len(exact)
    for mine, other, expected in zip(ours, theirs, exact, strict=True):
        assert error(mine, expected) <= 1.1 * error(other, expected) + 1e-4


MASKS = {
    "all": lambda t, s: Mask(),
    "causal": lambda t, s: Mask(causal=True, offset=s - t),
    "window": lambda t, s: Mask(window=17, offset=s - t),
    "causal window": lambda t, s: Mask(causal=True, window=40, offset=s - t),
    "documents": lambda t, s: Mask(
        document_ids=torch.tensor([[0] * 20 + [1] * (t - 30) + [-1] * 10, [0] * t]),
        key_document_ids=torch.tensor([[0] * 31 + [1] * (s - 31), [0] * 40 + [3] * (s - 40)]),
    ),
    "padding": lambda t, s: Mask(key_padding=torch.arange(s)[None] < torch.tensor([[s - 9], [0]])),
    "left padding": lambda t, s: Mask(causal=True, offset=s - t, key_padding=torch.arange(s)[None] >= 33),
}


@needs_amx
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("h", "kv", "t", "s", "d"), [(4, 4, 130, 130, 64), (4, 2, 97, 130, 48), (2, 1, 64, 64, 80)])
def test_attention(mask: str, h: int, kv: int, t: int, s: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, n, heads, d).transpose(1, 2) for n, heads in ((t, h), (s, kv), (s, kv))]
    seen = MASKS[mask](t, s)
    assert choose(*(x.bfloat16() for x in tensors[:2]), seen, None, 0.0)[0] == "amx"
    assert_close(lambda q, k, v: attention(q, k, v, MASKS[mask](t, s)), tensors, monkeypatch)


def dropped(q: Tensor, k: Tensor, v: Tensor, mask: Mask, rate: float = 0.3) -> Tensor:
    """Attention with dropout, the same at each call."""
    torch.manual_seed(7)
    return attention(q, k, v, mask, dropout=rate, backend="amx")


@needs_amx
@pytest.mark.parametrize("mask", ["causal window", "documents"])
def test_attention_with_dropout(mask: str) -> None:
    """Values that are the unit vectors show what was dropped; with that told, it is plain attention."""
    torch.manual_seed(0)
    n, rate, seen = 130, 0.3, MASKS[mask](130, 130)
    q, k, v = (torch.randn(2, n, heads, 144).transpose(1, 2) for heads in (4, 2, 2))
    units = torch.eye(n, 144).bfloat16().expand(2, 2, n, 144)
    kept = dropped(q.bfloat16() * 0, k.bfloat16() * 0, units, seen)[..., :n] != 0  # (B, H, T, S)
    dense = seen.dense(slice(0, n), slice(0, n), q.device)
    assert dense is not None
    assert abs(float(kept.sum() / dense.expand_as(kept).sum()) - (1 - rate)) < 0.01

    def told(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        probs = (q @ k.mT / 12).masked_fill(~dense, -1e9).softmax(-1) * dense
        return (probs * kept / (1 - rate)) @ v

    exact = gradients(told, [q, k, v], torch.float32)
    for mine, expected in zip(
        gradients(lambda q, k, v: dropped(q, k, v, seen), [q, k, v], torch.bfloat16), exact, strict=True
    ):
        assert error(mine, expected) < 0.01


@needs_amx
def test_dropout_is_drawn_for_each_probability_alone() -> None:
    n = 256
    x, units = torch.zeros(1, 4, n, n).bfloat16(), torch.eye(n).bfloat16().expand(1, 4, n, n)
    torch.manual_seed(0)
    first, second = ((attention(x, x, units, Mask(), dropout=0.5, backend="amx") != 0).double() for _ in range(2))
    deviation = 0.5 / (4 * n * n) ** 0.5
    for a, b in (
        (first, second),  # of one call and the next
        (first.roll(1, 1), first),  # of one head and the next
        *((first.roll(by, dim), first) for dim in (2, 3) for by in (1, 2, 16, 32)),  # of queries and of keys
    ):
        assert abs(float(((a - 0.5) * (b - 0.5)).mean())) < 4.5 * deviation * 0.5
    for dim in (2, 3):  # no row and no column is favoured: chi-square of the sums
        sums = first.sum(dim)
        assert abs(float(((sums - n / 2) ** 2 / (n / 4)).mean()) - 1) < 4.5 * (2 / sums.numel()) ** 0.5


@needs_amx
def test_what_attention_in_ranges_cannot_do_is_left_to_others_or_refused_with_the_reason() -> None:
    q = torch.randn(1, 2, 6, 16).bfloat16()
    mixed = Mask(document_ids=torch.tensor([[0, 1, 0, 1, 0, 1]]))
    holes = Mask(key_padding=torch.tensor([[True, False, True, True, True, True]]))
    for mask, bias, why in (
        (mixed, None, "not one range of keys"),
        (holes, None, "not one range of keys"),
        (Mask(), torch.zeros(1, 2, 6, 6), "no bias"),
    ):
        assert choose(q, q, mask, bias, 0.0)[0] == "blocked"
        with pytest.raises(UserError, match=why):
            attention(q, q, q, mask, bias, backend="amx")
    with pytest.raises(UserError, match="made for bf16 on CPUs, and this is float32"):
        attention(*[q.float()] * 3, Mask(), backend="amx")


@needs_amx
@pytest.mark.parametrize("activation", [None, *(name for name in get_args(Activation) if name in FUSED)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (111, 90, 70), (300, 1000, 1700), (1700, 70, 300), (1700, 1000, 70)]
)
def test_linear(
    activation: Activation | None, with_bias: bool, m: int, n: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    bias = torch.randn(n) if with_bias else None
    tensors = [torch.randn(m, k), torch.randn(n, k) * 2 / k**0.5, bias]
    assert_close(lambda x, w, b: linear(x, w, b, activation), tensors, monkeypatch)


@needs_amx
@pytest.mark.parametrize(("n", "k", "with_bias"), [(1000, 96, True), (32, 32, False), (31, 64, True), (70, 50, True)])
def test_few_rows_where_nothing_is_trained(n: int, k: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(32, k).bfloat16(), (torch.randn(n, k) * 2 / k**0.5).bfloat16()
    bias = torch.randn(n).bfloat16() if with_bias else None
    exact = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    with torch.no_grad():
        ours = linear(x, weight, bias)
        with monkeypatch.context() as patch:
            patch.setattr(native, "available", lambda: False)
            theirs = linear(x, weight, bias)
        assert error(ours, exact) <= 1.1 * error(theirs, exact)
        for rows in (1, 5, 17) if n >= 32 and k % 32 == 0 else ():  # the row's numbers do not depend on those beside it
            assert torch.equal(linear(x[None, :rows], weight, bias)[0], ours[:rows])


@needs_amx
def test_activations_of_extreme_numbers() -> None:
    x = torch.tensor([0.0, -0.0, 1e-30, 3.0, 9.0, 200.0, 1e30, float("nan")])
    x = torch.cat([x, -x])[:, None]
    for name in FUSED[1:]:
        weight = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
        got = linear(x.bfloat16(), weight, None, name)  # type: ignore[arg-type]
        expected = activate(x.bfloat16(), name)  # type: ignore[arg-type]
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3, equal_nan=True)


@needs_amx
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_cross_entropy(softcap: float | None, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 1003, (300,))
    labels[::7] = -100
    tensors = [torch.randn(300, 64), torch.randn(1003, 64) * 0.3, torch.randn(1003) if with_bias else None]
    assert_close(lambda h, w, b: cross_entropy_sum(h, w, labels, b, softcap), tensors, monkeypatch)


@needs_amx
def test_a_label_beyond_the_vocabulary_is_refused() -> None:
    hidden, weight = torch.randn(2, 32).bfloat16(), torch.randn(50, 32).bfloat16()
    with pytest.raises(IndexError, match="from 1 to 50, of a vocabulary of 50"):
        cross_entropy_sum(hidden, weight, torch.tensor([1, 50]))


@needs_amx
def test_a_number_that_is_none_shows_in_the_loss() -> None:
    hidden, weight = torch.randn(8, 32).bfloat16(), torch.randn(50, 32).bfloat16()
    hidden[3, 5] = float("nan")
    assert cross_entropy_sum(hidden, weight, torch.arange(8)).isnan()
    q = torch.randn(1, 1, 8, 32).bfloat16()
    q[0, 0, 3, 5] = float("nan")
    bad = attention(q, q.nan_to_num(), q.nan_to_num(), Mask(causal=True), backend="amx").isnan().any(-1).flatten()
    assert bad.tolist() == [i == 3 for i in range(8)]


@needs_amx
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("width", [512, 70])
@pytest.mark.parametrize("with_branch", [False, True])
def test_norms(centred: bool, affine: bool, width: int, with_branch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, branch = torch.randn(3, 300, width) * 2 + 0.3, torch.randn(3, 300, width) if with_branch else None
    scale = [torch.rand(width) + 0.5, torch.randn(width) if centred else None] if affine else [None, None]

    def both(x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return add_norm(x, branch, Scale(weight, bias, 1e-5, centred))

    assert_close(both, [x, branch, *scale], monkeypatch)


@needs_amx
def test_norm_and_rotation_of_heads_that_lie_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    table = rope_table(torch.arange(50), 48, 10000.0)

    def queries(qkv: Tensor) -> Tensor:
        q = qkv.split(4, 2)[1].transpose(1, 2)
        return rotate(norm(q, Scale(None, None, 1e-6, False)), table)

    assert_close(queries, [torch.randn(2, 50, 12, 48)], monkeypatch)


@needs_amx
def test_a_result_does_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(700, 96), torch.randn(160, 96), torch.randn(160)
    q = torch.randn(2, 3, 100, 32)
    labels = torch.randint(0, 160, (700,))

    def everything() -> list[Tensor]:
        scale = torch.ones(96), torch.zeros(96)
        return [
            *gradients(lambda x, w, b: linear(x, w, b, "gelu"), [x, weight, bias], torch.bfloat16),
            *gradients(lambda q: attention(q, q, q, Mask(causal=True), backend="amx"), [q], torch.bfloat16),
            *gradients(lambda q: dropped(q, q, q, Mask(causal=True)), [q], torch.bfloat16),
            *gradients(lambda x, w, b: norm(x, Scale(w, b, 1e-5, True)), [x, *scale], torch.bfloat16),
            *gradients(lambda x, w: cross_entropy_sum(x, w, labels), [x, weight], torch.bfloat16),
            norms([x]),
        ]

    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything())
    finally:
        torch.set_num_threads(before)
    for some, others in pairwise(results):
        assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@needs_amx
def test_a_compiled_model_computes_the_same() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = Linear(64, 192), Linear(64, 64)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (6, 32)).transpose(1, 2).split(2, 1)
            return self.out(attention(q, k, v, Mask(document_ids=ids)).transpose(1, 2).flatten(2), "gelu")

    torch.manual_seed(0)
    layer, ids = Layer().bfloat16(), torch.arange(60).div(25, rounding_mode="floor").expand(2, 60)
    results = []
    for model in (layer, torch.compile(layer, fullgraph=True)):
        layer.zero_grad()
        x = torch.linspace(-1, 1, 2 * 60 * 64).view(2, 60, 64).bfloat16().requires_grad_()
        y = model(x, ids)
        y.float().square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("lacking", "why"),
    [("compiler", "there is no g\\+\\+"), ("tiles", "this CPU has no amx_bf16"), ("sense", "g\\+\\+ failed")],
)
def test_without_amx_or_compiler_the_reason_is_logged(
    lacking: str, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "library", cache(native.library.__wrapped__))
    monkeypatch.setattr(native, "obstacle", cache(native.obstacle.__wrapped__))
    monkeypatch.setattr(native, "cpu_flags", lambda: native.NEEDS - ({"amx_bf16"} if lacking == "tiles" else set()))
    if lacking == "compiler":
        monkeypatch.setattr(native.shutil, "which", lambda name: None)
    elif lacking == "sense":
        monkeypatch.setattr(native, "FLAGS", ["--no-such-flag"])
    with caplog.at_level(logging.INFO, "cairn"):
        assert not native.available()
    assert any("kernels for AMX are not used" in record.message for record in caplog.records)
    assert re.search(why, caplog.text)
    assert not list(tmp_path.rglob("*.so"))


@needs_amx
def test_none_of_ours_runs_where_the_config_says_so() -> None:
    q = torch.randn(1, 2, 6, 16).bfloat16()
    native.allow(False)
    try:
        assert choose(q, q, Mask(), None, 0.0)[0] == "blocked"
        with pytest.raises(UserError, match=r"engine\.kernels is pytorch"):
            attention(q, q, q, Mask(), backend="amx")
    finally:
        native.allow(True)
