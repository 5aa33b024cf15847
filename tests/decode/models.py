"""Tiny models, ours and the same of `transformers`."""

from typing import Any

import torch

from cairn.config.model import GPTSection, Seq2SeqSection
from cairn.hub import gpt2, llama
from cairn.hub.convert import to_hub
from cairn.models.build import build_model
from cairn.models.gpt import GPT
from cairn.models.seq2seq import Seq2Seq

TINY = {"n_layer": 2, "n_head": 4, "d_model": 32, "max_seq_len": 64, "init_std": 0.3}
LLAMA = {"norm": "rmsnorm", "position": "rope", "activation": "swiglu", "bias": False, "n_kv_head": 2}


def tiny_gpt(seed: int = 0, vocab_size: int = 96, **keys: object) -> GPT:
    """Rows of its vocabulary: as many as asked for."""
    torch.manual_seed(seed)
    model = build_model(GPTSection.model_validate(TINY | {"vocab_multiple": 1} | keys), vocab_size)
    assert isinstance(model, GPT)
    return model.eval()


def tiny_seq2seq(seed: int = 0, vocab_size: int = 96, **keys: object) -> Seq2Seq:
    torch.manual_seed(seed)
    more = {"dropout": 0.0, "vocab_multiple": 1}
    model = build_model(Seq2SeqSection.model_validate(TINY | more | keys), vocab_size)
    assert isinstance(model, Seq2Seq)
    return model.eval()


def their_gpt(model: GPT) -> Any:
    """GPT2LMHeadModel or LlamaForCausalLM with the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    section, rows = model.section, model.embed.token.weight.shape[0]
    theirs: Any
    if section.position == "rope":
        theirs, table = LlamaForCausalLM(LlamaConfig(**llama.to_config(section, rows))), llama.table(section)
    else:
        theirs, table = GPT2LMHeadModel(GPT2Config(**gpt2.to_config(section, rows))), gpt2.table(section)
    missing = theirs.load_state_dict(to_hub(dict(model.named_parameters()), table), strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}
    return theirs.eval()


def their_t5(model: Seq2Seq) -> Any:
    """T5ForConditionalGeneration with the same weights; T5 does not divide scores by the root of a head's width."""
    from transformers import T5Config, T5ForConditionalGeneration

    s, rows = model.section, model.embed.token.weight.shape[0]
    config = T5Config(
        vocab_size=rows,
        d_model=s.d_model,
        d_kv=s.head_dim,
        d_ff=s.ff_dim,
        num_layers=s.n_layer,
        num_decoder_layers=s.decoder_layers,
        num_heads=s.n_head,
        dropout_rate=0.0,
        layer_norm_epsilon=s.norm_eps,
        feed_forward_proj="relu",
        tie_word_embeddings=False,  # logits that are not scaled; the weights are tied all the same
    )
    theirs = T5ForConditionalGeneration(config).eval()
    ours = {name: p.detach() for name, p in model.named_parameters()}
    weights = dict.fromkeys(("shared.weight", "lm_head.weight"), ours["embed.token.weight"])
    root = s.head_dim**-0.5
    for side in ("encoder", "decoder"):
        weights[f"{side}.embed_tokens.weight"] = ours["embed.token.weight"]
        weights[f"{side}.final_layer_norm.weight"] = ours[f"{side}.final_norm.weight"]
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        weights[bias] = ours[f"{side}.relative.weight"]
        for i in range(s.n_layer):
            block, layer = f"{side}.blocks.{i}", f"{side}.block.{i}.layer"
            q, k, v = ours[f"{block}.attention.qkv.weight"].chunk(3)
            weights |= {
                f"{layer}.0.SelfAttention.{name}.weight": w for name, w in zip("qkv", (q * root, k, v), strict=True)
            }
            weights[f"{layer}.0.SelfAttention.o.weight"] = ours[f"{block}.attention.out.weight"]
            weights[f"{layer}.0.layer_norm.weight"] = ours[f"{block}.attention_norm.weight"]
            last = 1
            if side == "decoder":
                last = 2
                k, v = ours[f"{block}.cross_attention.kv.weight"].chunk(2)
                q = ours[f"{block}.cross_attention.q.weight"]
                weights |= {
                    f"{layer}.1.EncDecAttention.{name}.weight": w
                    for name, w in zip("qkv", (q * root, k, v), strict=True)
                }
                weights[f"{layer}.1.EncDecAttention.o.weight"] = ours[f"{block}.cross_attention.out.weight"]
                weights[f"{layer}.1.layer_norm.weight"] = ours[f"{block}.cross_attention_norm.weight"]
            weights[f"{layer}.{last}.DenseReluDense.wi.weight"] = ours[f"{block}.mlp.up.weight"]
            weights[f"{layer}.{last}.DenseReluDense.wo.weight"] = ours[f"{block}.mlp.down.weight"]
            weights[f"{layer}.{last}.layer_norm.weight"] = ours[f"{block}.mlp_norm.weight"]
    theirs.load_state_dict(weights)
    return theirs
