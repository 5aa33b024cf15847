"""What a micro-batch's forward and backward pass hold, found by running them on tensors without memory.

The real model and the real objective's inputs go through autograd; every storage that an operation makes is counted
from its birth to its death. Only small depths are run: memory is linear in the number of equal blocks.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cairn.config.data import MaskedSection, SpanSection
from cairn.config.model import Seq2SeqSection
from cairn.config.schema import PretrainConfig
from cairn.errors import UserError
from cairn.models.build import build_model
from cairn.models.transformer import Stack
from cairn.objectives.span import lengths, window_of
from cairn.ops import losses

DEPTH = 2
"""Blocks of the model that is run, of each of its stacks; what a third adds is added again for every further one."""


@dataclass
class Trace:
    """Bytes alive in a micro-batch, weights and gradients that are done left out."""

    blocks: float = 0.0
    """After the last block, before the head: the activations."""
    forward: float = 0.0
    """The most in the forward pass."""
    first: list[tuple[float, float]] = field(default_factory=list)
    """(elements of gradients done, most bytes since the one before) in the backward pass, head and last block; of each
    stack, where there are several."""
    last: list[tuple[float, float]] = field(default_factory=list)
    """The same in the first block and the embedding."""


@dataclass(frozen=True)
class Activations:
    """A trace of few blocks, one more for each stack with a block more, and how many blocks each lacks in the first."""

    traces: tuple[Trace, ...]
    lacking: tuple[int, ...] = ()

    def at(self, read: Callable[[Trace], float]) -> float:
        """`read` of a trace of the model itself."""
        first, *deeper = (read(trace) for trace in self.traces)
        return first + sum((value - first) * n for value, n in zip(deeper, self.lacking, strict=True))

    def backward(self, grad_bytes: float) -> tuple[float, float]:
        """Most bytes at the beginning of the backward pass and at its end, where every gradient that is done stays,
        `grad_bytes` an element. In between, activations go as gradients come, both evenly: no more than at one end."""

        def most(points: list[tuple[float, float]]) -> float:
            return max((live + done * grad_bytes for done, live in points), default=0.0)

        return self.at(lambda trace: most(trace.first)), self.at(lambda trace: most(trace.last))


def trace_activations(
    config: PretrainConfig, vocab_size: int, micro_batch_size: int, recompute: bool, device: str
) -> Activations:
    """Run the model of `config` at small depths, on no memory, as it would run on `device` ("cpu" or "cuda").

    Args:
        config: its model, sequence length, precision and objective.
        vocab_size: the tokenizer's.
        micro_batch_size: samples.
        recompute: engine.activation_checkpointing.
        device: decides the kernels of attention, embedding and loss.
    """
    whole = {"n_layer": config.model.n_layer}
    if isinstance(config.model, Seq2SeqSection):
        whole["n_decoder_layer"] = config.model.decoder_layers
    if all(n <= DEPTH + 1 for n in whole.values()):
        return Activations((_trace(config, vocab_size, micro_batch_size, recompute, device, whole),))
    few = {key: min(n, DEPTH) for key, n in whole.items()}
    deeper = [few | {key: few[key] + 1} for key, n in whole.items() if n > few[key]]
    traces = [_trace(config, vocab_size, micro_batch_size, recompute, device, depths) for depths in (few, *deeper)]
    return Activations(tuple(traces), tuple(n - few[key] for key, n in whole.items() if n > few[key]))


def _trace(
    config: PretrainConfig, vocab_size: int, micro_batch_size: int, recompute: bool, device: str, depths: dict[str, int]
) -> Trace:
    section = config.model.model_copy(update={**depths, "sliding_window": _window(config, device)})
    if device == "cuda" and section.attention_backend == "blocked":
        raise UserError("model.attention_backend blocked is made for CPUs; auto picks one that can run on this GPU")
    if section.attention_backend == "flex":
        section = section.model_copy(update={"attention_backend": "sdpa"})  # both keep q, k, v, the output and a sum
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.engine.precision]
    trace = Trace()
    with ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(FakeTensorMode())
            stack.enter_context(_cheap_loss())
        with torch.device("cpu" if device == "cpu" else "meta"):
            with _default_dtype(dtype):  # a fake model cannot be converted
                model = build_model(section, vocab_size).train()
            inputs = _inputs(config, micro_batch_size, document_ids=config.data.document_mask and device == "cpu")
        stacks = [module for module in model.modules() if isinstance(module, Stack)]
        for stacked in stacks:
            stacked.activation_checkpointing = recompute
        counter = Counter([*model.parameters(), *inputs.values()])
        stacks[-1].blocks[-1].register_forward_hook(lambda *_: setattr(trace, "blocks", float(counter.live)))
        into: dict[int, list[tuple[float, float]]] = {}
        for first, *rest in (stacked.blocks for stacked in stacks):
            into |= {id(p): trace.first for block in rest[-1:] for p in block.parameters()}
            into |= {id(p): [] for block in rest[:-1] for p in block.parameters()}
            into |= {id(p): trace.last for p in first.parameters()}
        done, points = 0, trace.first

        def arrived(parameter: Tensor) -> None:
            nonlocal done, points
            points = into.get(id(parameter), points)
            points.append((float(done), float(counter.most)))
            done += parameter.numel()
            parameter.grad = None  # the engine's, from here on
            counter.most = counter.live

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
        stack.enter_context(_fused_kernels(device))
        stack.enter_context(counter)
        output = model(**inputs)
        loss = sum(output.values()) if isinstance(output, dict) else output
        trace.forward, counter.most = float(counter.most), counter.live
        loss.backward()  # type: ignore[union-attr]
    return trace


def _window(config: PretrainConfig, device: str) -> int | None:
    """On a GPU a window is FlexAttention's, which holds no mask."""
    return config.model.sliding_window if device == "cpu" else None


def _inputs(config: PretrainConfig, batch: int, document_ids: bool) -> dict[str, Tensor]:
    ids = torch.zeros(batch, config.seq_len, dtype=torch.int64)
    objective = config.objective
    if isinstance(objective, MaskedSection):
        special = 3 if objective.next_sentence else 2
        targets = torch.zeros(batch, max(1, round(objective.mask_prob * (config.seq_len - special))), dtype=torch.int64)
        inputs = {"input_ids": ids, "segment_ids": ids, "attention_mask": ids, "labels": targets}
        inputs["target_positions"] = targets
        if objective.next_sentence:
            inputs["next_sentence_label"] = torch.zeros(batch, dtype=torch.int64)
        return inputs
    if isinstance(objective, SpanSection):
        source, target, _ = lengths(objective, window_of(objective, config.seq_len))
        return {"source_ids": ids[:, :source], "input_ids": ids[:, :target], "labels": ids[:, :target]}
    return {"input_ids": ids, "labels": ids, **({"document_ids": ids} if document_ids else {})}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


@contextmanager
def _cheap_loss() -> Iterator[None]:
    """On a CPU the loss works through its logits in thousands of pieces of a megabyte, which count for nothing."""

    def piece(logits: Tensor, *_: Any) -> Tensor:
        return torch.zeros((), dtype=torch.float64)

    with patch.object(losses, "_piece", piece):
        yield


@contextmanager
def _fused_kernels(device: str) -> Iterator[None]:
    """PyTorch's fused attention and, on GPUs, its RMS norm: memory-less tensors would take the long way instead."""
    functional = nn.functional
    real = functional.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if device == "cpu" and options.get("dropout_p"):  # there dropout takes the slow path
            return real(q, k, v, attn_mask=attn_mask, **options)
        return _Fused.apply(q, k, v, attn_mask)  # type: ignore[no-any-return, no-untyped-call]

    def rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return _FusedNorm.apply(x, weight)  # type: ignore[no-any-return, no-untyped-call]

    with patch.object(functional, "scaled_dot_product_attention", attention), ExitStack() as stack:
        if device != "cpu":
            stack.enter_context(patch.object(functional, "rms_norm", rms_norm))
        yield


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages made under it, as long as they live; those of `known` are not."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.most = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes or not size:
            return
        self._sizes[key] = size
        weakref.finalize(storage, self._remove, key)
        self.live += size
        self.most = max(self.most, self.live)

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class _Fused(torch.autograd.Function):
    """Keeps queries, keys, values, mask, output and a sum for each query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        # The kernels give (B, T, H, D) seen as (B, H, T, D), so that the flattening after them copies nothing.
        b, h, t, d = q.shape
        out = q.new_empty(b, t, h, d).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(b, h, t, dtype=torch.float32), mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_, mask = ctx.saved_tensors
        needs = mask is not None and ctx.needs_input_grad[3]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(mask) if needs else None


class _FusedNorm(torch.autograd.Function):
    """Keeps its input and a number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)
