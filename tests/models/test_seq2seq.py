"""The encoder-decoder: T5's numbers, what sees what, packing, and a cache that changes nothing."""

from itertools import pairwise

import pytest
import torch
import transformers
from torch import Tensor

from cairn.config.model import Seq2SeqSection
from cairn.models.build import build_model, count_parameters, flops_per_token
from cairn.models.seq2seq import Memory, Seq2Seq

SMALL = {"n_layer": 2, "n_decoder_layer": 3, "n_head": 4, "d_model": 32, "max_seq_len": 48, "init_std": 0.3}
STYLES = {
    "t5": {},
    "learned, layernorm, post, bias": {
        "position": "learned",
        "norm": "layernorm",
        "norm_position": "post",
        "bias": True,
    },
    "sinusoidal, untied": {"position": "sinusoidal", "tie_embeddings": False, "activation": "gelu"},
    "rope, grouped heads": {"position": "rope", "n_kv_head": 2, "qk_norm": True, "activation": "geglu"},
    "alibi, window": {"position": "alibi", "sliding_window": 5, "activation": "swiglu"},
    "none": {"position": "none", "norm_affine": False},
}


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 200, shape, generator=torch.Generator().manual_seed(seed))


def make(style: str = "t5", **keys: object) -> Seq2Seq:
    torch.manual_seed(0)
    model = build_model(Seq2SeqSection(**{**SMALL, **STYLES[style], **keys}), 200)  # type: ignore[arg-type]
    assert isinstance(model, Seq2Seq)
    return model.eval()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def from_t5(theirs: dict[str, Tensor], ours: Seq2Seq, grads: bool) -> dict[str, Tensor]:
    """T5's weights or gradients under our names. T5 does not divide scores by sqrt(D): ours has it in its queries."""
    root = ours.section.head_dim ** (-0.5 if grads else 0.5)
    out = {"embed.token.weight": theirs["shared.weight"]}
    if ours.head is not None:
        out["head.weight"] = theirs["lm_head.weight"]
    for stack, n_layer in (("encoder", ours.section.n_layer), ("decoder", ours.section.decoder_layers)):
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        out[f"{stack}.relative.weight"] = theirs[table]
        out[f"{stack}.final_norm.weight"] = theirs[f"{stack}.final_layer_norm.weight"]
        for i in range(n_layer):
            here, there = f"{stack}.blocks.{i}", f"{stack}.block.{i}.layer"
            q, k, v, o = (theirs[f"{there}.0.SelfAttention.{x}.weight"] for x in "qkvo")
            out[f"{here}.attention.qkv.weight"] = torch.cat([q * root, k, v])
            out[f"{here}.attention.out.weight"] = o
            out[f"{here}.attention_norm.weight"] = theirs[f"{there}.0.layer_norm.weight"]
            if stack == "decoder":
                q, k, v, o = (theirs[f"{there}.1.EncDecAttention.{x}.weight"] for x in "qkvo")
                out[f"{here}.cross_attention.q.weight"] = q * root
                out[f"{here}.cross_attention.kv.weight"] = torch.cat([k, v])
                out[f"{here}.cross_attention.out.weight"] = o
                out[f"{here}.cross_attention_norm.weight"] = theirs[f"{there}.1.layer_norm.weight"]
            last = 2 if stack == "decoder" else 1
            out[f"{here}.mlp_norm.weight"] = theirs[f"{there}.{last}.layer_norm.weight"]
            gates = {"gate": "wi_0", "up": "wi_1"} if ours.section.gated else {"up": "wi"}
            for name, part in {**gates, "down": "wo"}.items():
                out[f"{here}.mlp.{name}.weight"] = theirs[f"{there}.{last}.DenseReluDense.{part}.weight"]
    return out


@pytest.mark.parametrize(("activation", "theirs", "tied"), [("relu", "relu", True), ("geglu", "gated-gelu", False)])
def test_logits_and_gradients_are_those_of_t5(activation: str, theirs: str, tied: bool) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 3}
    # Said to be untied, it is tied all the same, but for the scale of its outputs.
    config = transformers.T5Config(**sizes, d_ff=64, feed_forward_proj=theirs, tie_word_embeddings=False)
    config.tie_word_embeddings = tied
    hf = transformers.T5ForConditionalGeneration(config).eval()
    hf.set_input_embeddings(hf.shared)  # which no longer tied are three tables
    with torch.no_grad():
        for name, p in hf.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + ("norm" in name))
    ours = make(activation=activation, d_ff=64, vocab_size=256, tie_embeddings=tied)
    weights = from_t5({n: p.detach() for n, p in hf.named_parameters()}, ours, False)
    ours.load_state_dict(weights)

    source, target, labels = ids(3, 40), ids(3, 30, seed=2), ids(3, 30, seed=3)
    real = torch.arange(40) < torch.tensor([40, 25, 7])[:, None]
    labels[:, ::3] = -100
    logits = hf(input_ids=source, attention_mask=real.long(), decoder_input_ids=target).logits
    close(ours(source, target, source_padding=real), logits)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    ours(source, target, labels, source_padding=real).backward()
    expected = from_t5({n: p.grad for n, p in hf.named_parameters() if p.grad is not None}, ours, True)
    got = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (got[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("style", STYLES)
def test_the_decoder_sees_no_future_and_the_whole_source(style: str) -> None:
    model = make(style, sliding_window=None)
    source, target = ids(1, 20), ids(1, 15, seed=2)
    later, other = target.clone(), source.clone()
    later[0, 9] += 1
    other[0, 12] += 1
    before = model(source, target)
    changed = (before - model(source, later)).abs().amax((0, 2)) > 1e-6
    assert not changed[:9].any()
    assert changed[9:].all()
    assert ((before - model(other, target)).abs().amax((0, 2)) > 1e-6).all()


@pytest.mark.parametrize("style", STYLES)
def test_padding_changes_nothing(style: str) -> None:
    model = make(style)
    source, target = ids(2, 20), ids(2, 15, seed=2)
    real = torch.arange(20) < torch.tensor([[13], [20]])
    padded = model(source, target, source_padding=real)
    close(padded[:1], model(source[:1, :13], target[:1]))
    close(padded[1:], model(source[1:], target[1:]))


@pytest.mark.parametrize("style", STYLES)
def test_packed_pairs_are_as_alone(style: str) -> None:
    model = make(style)
    sources, targets = [ids(1, n, seed=n) for n in (7, 9, 4)], [ids(1, n, seed=n) for n in (5, 3, 8)]
    labels = [ids(1, n, seed=50 + n) for n in (5, 3, 8)]

    def row(parts: list[Tensor], pad: int, value: int = 0) -> Tensor:
        return torch.nn.functional.pad(torch.cat(parts, 1), (0, pad), value=value)

    def numbers(parts: list[Tensor]) -> Tensor:
        return row([torch.full_like(part, i) for i, part in enumerate(parts)], 3, value=-1)

    def places(parts: list[Tensor]) -> Tensor:
        return row([torch.arange(part.shape[1])[None] for part in parts], 3)

    keys = {
        "source_documents": numbers(sources),
        "source_positions": places(sources),
        "document_ids": numbers(targets),
        "positions": places(targets),
        "source_padding": numbers(sources) >= 0,
    }
    together = model(row(sources, 3), row(targets, 3), **keys)
    alone = [model(source, target) for source, target in zip(sources, targets, strict=True)]
    close(together[:, :-3], torch.cat(alone, 1))
    loss = model(row(sources, 3), row(targets, 3), row(labels, 3, value=-100), **keys)
    close(loss, sum(model(*pair) for pair in zip(sources, targets, labels, strict=True)))
    with pytest.raises(ValueError, match="both numbered"):
        model(row(sources, 3), row(targets, 3), document_ids=numbers(targets))


@pytest.mark.parametrize("style", STYLES)
def test_with_a_cache_it_predicts_as_without(style: str) -> None:
    model = make(style)
    source, target = ids(2, 20), ids(2, 15, seed=2)
    real = torch.arange(20) < torch.tensor([[13], [20]])
    with torch.no_grad():
        whole = model(source, target, source_padding=real)
        memory = model.encode(source, padding=real)
        cache = model.new_cache(2, 15)
        parts = [model.decode(target[:, :4], memory, cache)]
        # Keys and values of the source are there by now.
        empty = Memory(torch.full_like(memory.hidden, torch.nan), memory.padding)
        parts += [model.decode(target[:, a:b], empty, cache) for a, b in pairwise([4, 5, 9, 15])]
    close(torch.cat(parts, 1), whole)
    assert cache.length == 15


def test_maps_of_every_layer_can_be_looked_at() -> None:
    model = make()
    source, target = ids(2, 20), ids(2, 15, seed=2)
    real = torch.arange(20) < torch.tensor([[13], [20]])
    maps: list[list[Tensor]] = [[], [], []]
    memory = model.encode(source, padding=real, record=maps[0])
    model.decode(target, memory, record=maps[1], cross_record=maps[2])
    assert [(len(found), found[0].shape) for found in maps] == [
        *((2, (2, 4, 20, 20)), (3, (2, 4, 15, 15)), (3, (2, 4, 15, 20)))
    ]
    for found in (found for each in maps for found in each):
        close(found.sum(-1), torch.ones(found.shape[:3]))
    assert not maps[2][0][0, :, :, 13:].any()
    assert not maps[1][0].triu(1).any()


def test_every_parameter_learns_and_recomputed_blocks_have_the_same_gradients() -> None:
    grads = []
    for recompute in (False, True):
        model = make("learned, layernorm, post, bias", dropout=0.2, attention_dropout=0.2, init_std=0.02).train()
        for stack in (model.encoder, model.decoder):
            stack.activation_checkpointing = recompute
        torch.manual_seed(1)
        loss = model(ids(4, 20), ids(4, 15, seed=2), ids(4, 15, seed=3))
        assert abs(loss - 60 * torch.log(torch.tensor(256.0))) < 0.05 * loss
        loss.backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_cost_by_hand() -> None:
    section = Seq2SeqSection(**{**SMALL, "vocab_size": 256})  # type: ignore[arg-type]
    d, source, target = 32, 40, 8  # a fifth
    encoder, decoder, cross, head = 2 * 12 * d * d, 3 * 12 * d * d, 3 * 2 * d * d, 256 * d
    keys = source * 2 * source + target * 3 * (target + 1) / 2 + target * 3 * source
    products = source * (encoder + cross) + target * (decoder + cross + head)
    assert flops_per_token(section, 200, 40) == pytest.approx((6 * products + 12 * d * keys) / source, rel=1e-12)
    norms, tables = (2 * 2 + 1 + 3 * 3 + 1) * d, 2 * 32 * 4
    assert count_parameters(section, 200) == encoder + decoder + 2 * cross + head + norms + tables
