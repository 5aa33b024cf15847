"""Linear layers in 8-bit floats, as a CPU emulates them, beside the same rounding written in fp32."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cairn.ops import fp8
from cairn.ops.linear import Linear


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as 8 bits keep it, in fp32."""
    x = x.detach().float()
    scale = x.abs().max() / torch.finfo(dtype).max
    return (x / scale).to(dtype).float() * scale


def operands(rows: int = 48) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (2, rows / 2, 64), weight (96, 64), bias (96,) and a gradient of the result, of unlike magnitudes."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, rows // 2, 64), torch.randn(96, 64) * 0.02
    bias, grad = torch.randn(96), torch.randn(2, rows // 2, 96) * 1e-6
    return x.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_(), bias.bfloat16(), grad.bfloat16()


def error(got: Tensor | None, expected: Tensor) -> float:
    assert got is not None
    return float((got.float() - expected).norm() / expected.norm())


def test_products_are_those_of_rounded_operands() -> None:
    x, weight, bias, grad = operands()
    bias.requires_grad_()
    y = fp8.linear(x, weight, bias)
    assert y.dtype == torch.bfloat16
    assert y.shape == (2, 24, 96)
    y.backward(grad)
    y = y.detach()
    x8, weight8, grad8 = rounded(x, fp8.E4M3), rounded(weight, fp8.E4M3), rounded(grad, fp8.E5M2)
    bf16 = 0.004  # what results are rounded to; a wrong operand or scale would be off by 0.03 and more
    assert error(y, x8 @ weight8.T + bias.detach().float()) < bf16
    assert error(x.grad, grad8 @ weight8) < bf16
    assert error(weight.grad, grad8.flatten(0, 1).T @ x8.flatten(0, 1)) < bf16
    assert error(bias.grad, grad.float().sum((0, 1))) < bf16
    unrounded = (x.float() @ weight.float().T).detach()
    assert 0.01 < error(y - bias.detach(), unrounded) < 0.05, "3 bits are kept of a number"


def test_operands_lie_as_tensor_cores_take_them() -> None:
    """A CPU takes any layout: the left operand by row, the right one by column is what a GPU asks for."""
    given = []

    def product(a: Tensor, b: Tensor, *args: object, **options: object) -> Tensor:
        given.append((a.is_contiguous(), b.t().is_contiguous()))
        return scaled_mm(a, b, *args, **options)

    scaled_mm = F.scaled_mm
    columns, weight = torch.randn(64, 48).bfloat16().requires_grad_(), operands()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_mm", product)
        y = fp8.linear(columns.t(), weight)
        y.t().backward(torch.randn(96, 48).bfloat16())
    assert given == [(True, True)] * 3


def test_magnitudes_do_not_matter() -> None:
    x, weight, _, _ = operands()
    y = fp8.linear(x, weight)
    assert torch.equal(fp8.linear(x * 2.0**40, weight * 2.0**-20), y * 2.0**20)
    assert torch.equal(fp8.linear(torch.zeros_like(x), weight), torch.zeros_like(y))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_stay_bad(bad: float) -> None:
    x, weight, _, grad = operands()
    with torch.no_grad():
        grad[0, 3, 5] = bad
    y = fp8.linear(x, weight)
    y.backward(grad)
    assert weight.grad is not None
    assert not weight.grad.isfinite().all(), "the guard would not see it"
    with torch.no_grad():
        x[1, 2, 3] = bad
    assert not fp8.linear(x, weight).isfinite().all()


@pytest.mark.parametrize(("rows", "wide"), [(46, 96), (48, 90)])
def test_sizes_that_tensor_cores_do_not_take_stay_in_bf16(rows: int, wide: int) -> None:
    x, weight, bias, _ = operands(rows)
    weight, bias = weight[:wide], bias[:wide]
    assert torch.equal(fp8.linear(x, weight, bias), F.linear(x, weight, bias))


def test_a_frozen_weight_has_no_gradient() -> None:
    x, weight, _, grad = operands()
    weight = weight.detach()
    fp8.linear(x, weight).backward(grad)
    assert error(x.grad, rounded(grad, fp8.E5M2) @ rounded(weight, fp8.E4M3)) < 0.004
    assert weight.grad is None


def test_a_layer_is_evaluated_in_bf16_and_compiles_whole() -> None:
    layer, x = Linear(64, 96).bfloat16(), operands()[0]
    plain = layer(x)
    layer.fp8 = True
    eight = layer(x, "relu2")
    assert torch.equal(eight, fp8.linear(x, layer.weight, layer.bias).relu().square())
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x, "relu2"), eight)
    assert torch.equal(layer.eval()(x), plain)
