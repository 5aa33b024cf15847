import pytest
import torch

from cairn.ops.embedding import embedding


@pytest.mark.parametrize("n_rows", [40, 20_000])
def test_gradient_of_a_frequent_token_keeps_its_precision_in_bf16(n_rows: int) -> None:
    torch.manual_seed(0)
    ids = torch.where(torch.rand(4, 500) < 0.6, 3, torch.randint(n_rows, (4, 500)))
    weight = torch.randn(n_rows, 16)
    grad = (torch.randn(4, 500, 16) + 0.3).bfloat16()
    low, exact = weight.bfloat16().requires_grad_(), weight.clone().requires_grad_()
    rows = embedding(ids, low)
    assert torch.equal(rows, low[ids])
    rows.backward(grad)
    embedding(ids, exact).backward(grad.float())
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(low.grad.float(), exact.grad, rtol=2**-8, atol=1e-6)
