"""The same weights give the same logits and the same gradients as `transformers`."""

from collections.abc import Mapping

import pytest
import torch
import transformers
from torch import Tensor, nn

from cairn.hub import bert, gpt2, llama
from cairn.hub.convert import from_hub
from cairn.models.build import build_model

SIZE = {"vocab_size": 256, "num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4}


def spread(model: nn.Module) -> None:
    """Random values for every parameter, biases and norms too, so that none can be mixed up unseen."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + ("norm" in name.lower() and name.endswith("weight")))


def in_theirs(model: nn.Module, grads: bool) -> dict[str, Tensor]:
    return {n: (p.grad if grads else p).detach() for n, p in model.named_parameters()}  # type: ignore[union-attr]


def close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error, top = (ours[name] - expected), expected.abs().max()
        assert top > 0, name
        assert error.norm() <= 1e-4 * expected.norm(), name
        assert error.abs().max() <= 1e-4 * top, name


def pair(family, hf: nn.Module):  # type: ignore[no-untyped-def]
    spread(hf)
    hf.eval()
    section = family.to_section(hf.config.to_dict())
    model = build_model(section, 256)
    table = family.table(section)
    model.load_state_dict(from_hub(in_theirs(hf, False), table))
    return model.eval(), table


GPTS = {
    "gpt2": (gpt2, lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=256, n_layer=2, n_embd=48, n_head=4, n_positions=64))),
    "gpt2 untied": (gpt2, lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=256, n_layer=2, n_embd=48, n_head=4, n_positions=64, tie_word_embeddings=False))),
    "llama": (llama, lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **SIZE, num_key_value_heads=2, intermediate_size=80, max_position_embeddings=64))),
    "llama tied, biased": (llama, lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **SIZE, num_key_value_heads=1, intermediate_size=80, attention_bias=True, mlp_bias=True,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}))),
}  # fmt: skip


@pytest.mark.parametrize("name", GPTS)
def test_gpt_logits_and_gradients(name: str) -> None:
    family, make = GPTS[name]
    hf = make()
    model, table = pair(family, hf)
    ids, labels = torch.randint(256, (3, 40)), torch.randint(256, (3, 40))
    labels[:, ::3] = -100
    logits = hf(input_ids=ids).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    close({"logits": model(ids).detach()}, {"logits": logits.detach()})
    model(ids, labels=labels).backward()
    close(in_theirs(model, True), from_hub(in_theirs(hf, True), table))


def test_bert_logits_and_gradients() -> None:
    hf = transformers.BertForPreTraining(transformers.BertConfig(**SIZE, intermediate_size=96))
    model, table = pair(bert, hf)
    ids, labels = torch.randint(256, (3, 40)), torch.randint(256, (3, 40))
    segments, real = torch.randint(2, (3, 40)), torch.ones(3, 40, dtype=torch.long)
    real[1, 30:], real[2, 11:] = 0, 0
    labels[torch.rand(3, 40) < 0.7] = -100
    labels[real == 0] = -100
    follows = torch.tensor([0, 1, 1])
    theirs = hf(input_ids=ids, attention_mask=real, token_type_ids=segments)
    entropy = torch.nn.functional.cross_entropy
    masked = entropy(theirs.prediction_logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (masked + entropy(theirs.seq_relationship_logits, follows, reduction="sum")).backward()

    outputs = model(ids, segments, real)
    seen = real.bool()
    close(
        {"logits": outputs["logits"][seen].detach(), "pair": outputs["next_sentence_logits"].detach()},
        {"logits": theirs.prediction_logits[seen].detach(), "pair": theirs.seq_relationship_logits.detach()},
    )
    sums = model(ids, segments, real, labels, follows)
    assert torch.allclose(sums["masked"], masked, rtol=1e-5)
    (sums["masked"] + sums["next_sentence"]).backward()
    close(in_theirs(model, True), from_hub(in_theirs(hf, True), table))
