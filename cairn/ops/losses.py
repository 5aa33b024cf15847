"""The language-model loss: from hidden states to a summed negative log likelihood."""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from cairn.ops import native
from cairn.ops.linear import SHORT_SUM, linear, product, weight_gradient

IGNORE = -100
PRODUCT_BYTES = 256 * 2**20  # logits kept at once on a CPU
CACHE_BYTES = 2**20  # fp32 logits in flight there: about a core's second-level cache
WHOLE_LOGITS = 2**28  # elsewhere: the most logits that exist at once; in fp32 they are 1 GiB
CHUNK_LOGITS = 2**27  # and those of a chunk where there are more


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Sum of -log softmax(hidden weight^T + bias)[label] over labels that are not -100, an fp32 scalar.

    hidden (..., D), weight (V, D), labels (...). `softcap` c maps logits to c tanh(logits / c) first.

    On a GPU all logits are kept where they are few, which compiles and fuses well; else they are made in chunks. A
    compiled model leaves its graph for this on a CPU: traced, each piece would be code of its own, minutes to compile.
    """
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    on_cpu = hidden.device.type == "cpu"
    if on_cpu or hidden.shape[0] * weight.shape[0] > WHOLE_LOGITS:
        summed: Any = _CrossEntropySum.apply
        if on_cpu and torch.compiler.is_compiling():
            summed = torch.compiler.disable(summed)  # type: ignore[no-untyped-call]
        total: Tensor = summed(hidden, weight, labels, bias, softcap, torch.is_grad_enabled())
        return total
    logits = logits_of(hidden, weight, bias, softcap)
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None) -> Tensor:
    """Scores of every token: (..., D) -> (..., V)."""
    logits = linear(hidden, weight, bias)
    return logits if softcap is None else (logits.float() / softcap).tanh().mul(softcap).to(logits.dtype)


def chunks(hidden: Tensor, vocab: int) -> tuple[int, int]:
    """Rows whose logits are made at once, and rows of those that are in fp32 at once."""
    if hidden.device.type == "cpu":
        return max(1, PRODUCT_BYTES // (vocab * hidden.element_size())), max(1, CACHE_BYTES // (vocab * 4))
    rows = max(1, CHUNK_LOGITS // vocab)
    return rows, rows


class _CrossEntropySum(torch.autograd.Function):
    """On a CPU memory traffic decides: logits stay in the compute dtype, fp32 exists only for a cache-sized piece,
    and the gradient overwrites the logits in the same pass, so that the backward pass only scales. On a GPU it is
    memory that this saves: of 2^30 logits in bf16, 10 GB and more for the logits, their fp32 copy and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        train: bool,
    ) -> Tensor:
        n, vocab = hidden.shape[0], weight.shape[0]
        rows, piece = chunks(hidden, vocab)
        ours = native.usable(hidden, weight, bias)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if train else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros(vocab, device=hidden.device) if train and bias is not None else None
        for start in range(0, n, rows):
            h = hidden[start : start + rows]
            logits = product(h, weight, None) if ours and weight.shape[1] <= SHORT_SUM else h @ weight.t()  # (rows, V)
            if ours:
                total += _rows(logits, labels[start : start + rows], bias, softcap, train)
            else:
                for i in range(0, h.shape[0], piece):
                    label = labels[start + i : start + min(i + piece, rows)]
                    total += _piece(logits[i : i + piece], label, bias, softcap, train)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[start : start + rows])
                share = weight_gradient(logits, h, False)[0] if ours else logits.t() @ h
                if n > rows:  # several products: their sum is kept in fp32
                    share = share.float() if grad_weight is None else grad_weight.add_(share)
                grad_weight = share
                if grad_bias is not None:
                    grad_bias += logits.sum(0, dtype=torch.float32)
        if train:
            if grad_weight is None:
                grad_weight = torch.zeros_like(weight)
            ctx.bias_dtype = bias.dtype if bias is not None else None
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype), grad_bias)
        return total.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        scaled_bias = None if grad_bias is None else (grad_bias * grad).to(ctx.bias_dtype)
        return grad_hidden * grad, grad_weight * grad, None, scaled_bias, None, None


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "vocab", "ignore")),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("train", "threads")),
    )


def _rows(logits: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None, train: bool) -> Tensor:
    """As `_piece`, of any number of rows, by our kernel. Raises IndexError for a label beyond the vocabulary."""
    labels = labels.long().contiguous()
    if labels.numel() and not isinstance(labels, FakeTensor):
        low, high = labels.masked_fill(labels == IGNORE, 0).aminmax()
        if low < 0 or high >= logits.shape[1]:
            raise IndexError(f"labels from {int(low)} to {int(high)}, of a vocabulary of {logits.shape[1]}")
    loss = torch.empty(logits.shape[0])
    shape = _Shape(*logits.shape, IGNORE, softcap or 0.0, train, torch.get_num_threads())
    native.call("cairn_cross_entropy", shape, logits, bias, labels, loss)
    return loss.sum(dtype=torch.float64)


def _piece(logits: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None, train: bool) -> Tensor:
    """Summed loss of some rows; when training, `logits` (rows, V) become its gradient in place."""
    z = logits.float()
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = z.div_(softcap).tanh_()
        slope = 1 - z.square() if train else None
        z = z.mul_(softcap)
    real = labels != IGNORE
    index = labels.clamp(min=0)[:, None]
    target = z.gather(1, index)
    top = z.amax(-1, keepdim=True)
    norm = z.sub_(top).exp_().sum(-1, keepdim=True)
    loss = (norm.log() + top - target).squeeze(1).masked_fill(~real, 0.0).sum(dtype=torch.float64)
    if train:
        z = z.div_(norm)
        z.scatter_add_(1, index, torch.full_like(index, -1, dtype=z.dtype))
        if softcap is not None and slope is not None:
            z.mul_(slope)
        z.masked_fill_(~real[:, None], 0.0)
        logits.copy_(z)
    return loss
