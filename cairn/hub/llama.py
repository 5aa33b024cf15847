"""Llama (`LlamaForCausalLM`)."""

from collections.abc import Mapping
from typing import Any

from cairn.config.model import GPTSection
from cairn.hub.convert import Entry, linear, qkv_rows, require, require_config

ARCHITECTURE = "LlamaForCausalLM"
PREFIX = "model."
NAME = "Llama"
HEADS = {"sequence": "score", "token": "score"}


def to_config(section: GPTSection, vocab_rows: int) -> dict[str, Any]:
    """Arguments of LlamaConfig. Raises UserError naming keys it cannot express.

    Dropout after sub-layers has no counterpart; it does not change what the model computes, and is left out.
    """
    require(
        section,
        ARCHITECTURE,
        norm="rmsnorm",
        norm_position="pre",
        norm_affine=True,
        embed_norm=False,
        position="rope",
        activation="swiglu",
        qk_norm=False,
        logit_softcap=None,
        sliding_window=None,
    )
    return {
        "vocab_size": vocab_rows,
        "max_position_embeddings": section.max_seq_len,
        "hidden_size": section.d_model,
        "num_hidden_layers": section.n_layer,
        "num_attention_heads": section.n_head,
        "num_key_value_heads": section.kv_heads,
        "intermediate_size": section.ff_dim,
        "rms_norm_eps": section.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": section.rope_theta},
        "attention_bias": section.bias,
        "mlp_bias": section.bias,
        "attention_dropout": section.attention_dropout,
        "initializer_range": section.init_std,
        "tie_word_embeddings": section.tie_embeddings,
    }


def to_section(config: Mapping[str, Any]) -> GPTSection:
    """The section of a config.json. Raises UserError naming keys without a counterpart here."""
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    require_config(
        config,
        hidden_act="silu",
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        mlp_bias=config.get("attention_bias", False),
        rope_scaling=None,
    )
    require_config(rope, rope_type="default", partial_rotary_factor=1.0)
    return GPTSection(
        n_layer=config["num_hidden_layers"],
        n_head=config["num_attention_heads"],
        n_kv_head=config.get("num_key_value_heads"),
        d_model=config["hidden_size"],
        d_ff=config["intermediate_size"],
        max_seq_len=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
        norm="rmsnorm",
        norm_eps=config["rms_norm_eps"],
        position="rope",
        rope_theta=float(rope["rope_theta"]),
        activation="swiglu",
        bias=config.get("attention_bias", False),
        attention_dropout=float(config.get("attention_dropout", 0.0)),
        init_std=config["initializer_range"],
        tie_embeddings=config.get("tie_word_embeddings", False),
    )


def table(section: GPTSection) -> list[Entry]:
    """Our names beside theirs."""
    entries = [
        Entry("embed.token.weight", ("model.embed_tokens.weight",)),
        *linear("final_norm", "model.norm", bias=False),
    ]
    if not section.tie_embeddings:
        entries.append(Entry("head.weight", ("lm_head.weight",)))
    bias = section.bias
    for i in range(section.n_layer):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        qkv = [f"{theirs}.self_attn.{name}_proj" for name in "qkv"]
        entries += linear(f"{ours}.attention_norm", f"{theirs}.input_layernorm", bias=False)
        entries += linear(f"{ours}.attention.qkv", *qkv, bias=bias, rows=qkv_rows(section))
        entries += linear(f"{ours}.attention.out", f"{theirs}.self_attn.o_proj", bias=bias)
        entries += linear(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", bias=False)
        for name in ("up", "gate", "down"):
            entries += linear(f"{ours}.mlp.{name}", f"{theirs}.mlp.{name}_proj", bias=bias)
    return entries
