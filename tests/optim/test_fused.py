"""Optimizer steps in our kernels for AMX, beside PyTorch's."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import nn

from cairn.ops import native
from cairn.optim import muon
from cairn.optim.adamw import AdamW
from cairn.optim.fused import Fused, norms
from cairn.optim.layout import FlatLayout, Piece
from cairn.optim.muon import MuonAdamW, orthogonalise

pytestmark = pytest.mark.skipif(not native.available(), reason="this machine has no AMX, or no g++")


@pytest.mark.parametrize("half", [False, True])
def test_fused_adamw_is_pytorchs(half: bool) -> None:
    torch.manual_seed(0)
    start = torch.randn(1003)
    weights = [nn.Parameter(start.clone()) for _ in range(2)]
    group: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    theirs, ours = torch.optim.AdamW([{"params": [weights[0]], **group}]), AdamW([{"params": [weights[1]], **group}])
    copy = torch.zeros(1003, dtype=torch.bfloat16)
    for step in range(5):
        grad = torch.randn(1003).bfloat16()
        weights[0].grad = grad.float() * 0.25
        if step < 2:  # steps of PyTorch's own before, whose state is taken over
            weights[1].grad = weights[0].grad.clone()
        else:
            pieces = (grad if half else grad.float()).split([500, 503])
            ours.fused = Fused({id(weights[1]): copy}, lambda key, pieces=pieces: pieces, lambda: 0.25)  # type: ignore[misc]
        theirs.step()
        ours.step()
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)
    for key in ("step", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(ours.state[weights[1]][key], theirs.state[weights[0]][key], rtol=1e-5, atol=1e-7)
    assert torch.equal(copy, weights[1].detach().bfloat16())


@pytest.mark.parametrize("half", [False, True])
def test_fused_muon_is_the_plain_one(half: bool) -> None:
    torch.manual_seed(0)
    shapes = [(96, 40), (40, 130), (33, 33)]
    sizes = [rows * columns for rows, columns in shapes]
    ends = list(accumulate(sizes))
    start = torch.randn(ends[-1])
    plain, ours = (nn.Parameter(start.clone()) for _ in range(2))
    group: dict[str, Any] = {"kind": "muon", "lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "ns_steps": 5}
    pieces = [Piece(str(i), shapes[i], 0, ends[i] - sizes[i], sizes[i]) for i in range(3)]
    optimizers = [MuonAdamW([{"params": [p], **group}]) for p in (plain, ours)]
    for p, optimizer in zip((plain, ours), optimizers, strict=True):
        optimizer.attach({id(p): FlatLayout(pieces, None)})
    copy = torch.zeros(ends[-1], dtype=torch.bfloat16)
    for step in range(4):
        grad = torch.randn(ends[-1]).bfloat16()
        plain.grad = grad.float() * 0.25
        if step < 2:
            ours.grad = plain.grad.clone()
        else:
            given = (grad if half else grad.float()).split(sizes)
            optimizers[1].fused = Fused({id(ours): copy}, lambda key, given=given: given, lambda: 0.25)  # type: ignore[misc]
        for optimizer in optimizers:
            optimizer.step()
    expected, momentum = (
        optimizer.state[p]["momentum"] for p, optimizer in zip((plain, ours), optimizers, strict=True)
    )
    torch.testing.assert_close(momentum, expected, rtol=1e-5, atol=1e-6)
    # The iterations, in bf16, amplify the last bit of their input.
    torch.testing.assert_close(ours, plain, rtol=0, atol=0.01 * 0.02)
    assert torch.equal(copy, ours.detach().bfloat16())


@pytest.mark.parametrize("shape", [(64, 64), (384, 1536), (1536, 384), (37, 70), (100, 33)])
def test_orthogonalising_is_as_good_as_pytorchs_and_the_same_on_any_number_of_threads(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    update = torch.randn(shape)
    ours = orthogonalise(update, 5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(orthogonalise(update, 5), ours)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(muon, "fast_bf16", lambda device: False)
    exact = orthogonalise(update, 5)
    monkeypatch.undo()
    monkeypatch.setattr(native, "available", lambda: False)
    torchs = orthogonalise(update, 5)
    assert (ours - exact).norm() < 1.1 * (torchs - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_double_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(n).to(dtype) * 3 for n in (1, 77, 64, 100_001)] + [
        torch.tensor([1.0, torch.inf]).to(dtype)
    ]
    found = norms(gradients)
    torch.testing.assert_close(found, torch.stack([x.double().norm() for x in gradients]).float(), rtol=1e-6, atol=0)
