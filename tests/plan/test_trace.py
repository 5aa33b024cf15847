"""What a pass holds, found without memory, is what a real pass holds."""

from pathlib import Path

import pytest
import torch

from cairn.config.load import load
from cairn.config.schema import PretrainConfig
from cairn.models.build import build_model
from cairn.models.transformer import Stack
from cairn.ops import native
from cairn.plan.trace import Activations, Counter, Trace, _inputs, trace_activations

ROOT = Path(__file__).parents[2]
SMALL = ["model.n_layer=4", "model.n_head=2", "model.d_model=64", "model.max_seq_len=256", "model.vocab_size=512"]


def config(name="bench-8x512", *more):
    return load(PretrainConfig, ROOT / f"configs/pretrain/{name}.yaml", ["engine.precision=bf16", *SMALL, *more])


def really(wanted, batch, recompute):
    """Most bytes in the forward pass, and in the whole of it and the backward pass, on real tensors of a CPU."""
    torch.manual_seed(0)
    model = build_model(wanted.model, 512).to(torch.bfloat16).train()
    for stack in (module for module in model.modules() if isinstance(module, Stack)):
        stack.activation_checkpointing = recompute

    def arrived(parameter):
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(arrived)
    inputs = _inputs(wanted, batch, wanted.data.document_mask)
    with Counter([*model.parameters(), *inputs.values()]) as counter:
        out = model(**inputs)
        forward = counter.most
        (sum(out.values()) if isinstance(out, dict) else out).backward()
    return forward, counter.most


CASES = {
    "gpt": ("bench-8x512", (), False),
    "recomputed": ("bench-8x512", (), True),
    "modern": ("gpt-tiny", (), False),
    "documents": ("gpt-tiny", ("data.document_mask=true",), False),
    "window": ("gpt-tiny", ("model.sliding_window=64", "model.n_kv_head=1"), False),
    "reference": ("bench-8x512", ("model.attention_backend=reference",), False),
    "bert": ("bert-tiny", (), False),
    "seq2seq": ("seq2seq-tiny", ("model.n_layer=3",), False),
    "seq2seq, recomputed": ("seq2seq-tiny", ("model.n_decoder_layer=2",), True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_pass_without_memory_holds_what_a_real_one_does(case):
    name, more, recompute = case
    wanted = config(name, *more)
    found = trace_activations(wanted, 512, 8, recompute, "cpu")
    forward, most = really(wanted, 8, recompute)
    assert found.at(lambda trace: trace.forward) == pytest.approx(forward, rel=0.05)
    planned = max(found.at(lambda trace: trace.forward), *found.backward(0.0))
    assert planned == pytest.approx(most, rel=0.05)


def test_gradients_that_stay_are_added_where_they_come():
    points = Trace(first=[(0.0, 100.0), (10.0, 90.0)], last=[(50.0, 20.0)])
    found = Activations((points,))
    assert found.backward(0.0) == (100.0, 20.0)
    assert found.backward(2.0) == (110.0, 120.0)


def test_depth_is_read_off_beyond_the_models_that_were_run():
    found = Activations((Trace(blocks=10.0), Trace(blocks=14.0), Trace(blocks=11.0)), (22, 5))
    assert found.at(lambda trace: trace.blocks) == 10 + 22 * 4 + 5


def test_fused_attention_grows_with_the_length_and_blocked_on_a_cpu_with_its_square(monkeypatch):
    def grows(device):
        short, long = (
            trace_activations(config("bench-8x512", f"data.seq_len={n}"), 512, 2, False, device) for n in (128, 256)
        )
        return long.at(lambda trace: trace.blocks) / short.at(lambda trace: trace.blocks)

    assert grows("cuda") == pytest.approx(2.0, rel=0.01)
    if native.available():
        assert grows("cpu") == pytest.approx(2.0, rel=0.01)
    monkeypatch.setattr(native, "available", lambda: False)
    assert grows("cpu") > 2.1
