"""GPT-2 (`GPT2LMHeadModel`)."""

from collections.abc import Mapping
from typing import Any

from cairn.config.model import GPTSection
from cairn.hub.convert import Entry, linear, require, require_config

ARCHITECTURE = "GPT2LMHeadModel"
PREFIX = "transformer."
NAME = "GPT2"
HEADS = {"sequence": "score", "token": "classifier"}
ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "relu2": "relu2"}


def to_config(section: GPTSection, vocab_rows: int) -> dict[str, Any]:
    """Arguments of GPT2Config. Raises UserError naming keys it cannot express."""
    require(
        section,
        ARCHITECTURE,
        kv_heads=section.n_head,
        norm="layernorm",
        norm_position="pre",
        norm_affine=True,
        embed_norm=False,
        position="learned",
        bias=True,
        qk_norm=False,
        logit_softcap=None,
        sliding_window=None,
    )
    if section.activation not in ACTIVATIONS:
        require(section, ARCHITECTURE, activation="gelu_tanh")
    return {
        "vocab_size": vocab_rows,
        "n_positions": section.max_seq_len,
        "n_embd": section.d_model,
        "n_layer": section.n_layer,
        "n_head": section.n_head,
        "n_inner": section.ff_dim,
        "activation_function": ACTIVATIONS[section.activation],
        "layer_norm_epsilon": section.norm_eps,
        "resid_pdrop": section.dropout,
        "embd_pdrop": section.dropout,
        "attn_pdrop": section.attention_dropout,
        "initializer_range": section.init_std,
        "tie_word_embeddings": section.tie_embeddings,
    }


def to_section(config: Mapping[str, Any]) -> GPTSection:
    """The section of a config.json. Raises UserError naming keys without a counterpart here."""
    require_config(
        config,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
        embd_pdrop=config["resid_pdrop"],
    )
    names = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}
    if config["activation_function"] not in names:
        require_config(config, activation_function="gelu_new")
    return GPTSection(
        n_layer=config["n_layer"],
        n_head=config["n_head"],
        d_model=config["n_embd"],
        d_ff=config["n_inner"],
        max_seq_len=config["n_positions"],
        vocab_size=config["vocab_size"],
        norm_eps=config["layer_norm_epsilon"],
        activation=names[config["activation_function"]],  # type: ignore[arg-type]
        dropout=float(config["resid_pdrop"]),
        attention_dropout=float(config["attn_pdrop"]),
        init_std=config["initializer_range"],
        tie_embeddings=config.get("tie_word_embeddings", True),
    )


def table(section: GPTSection) -> list[Entry]:
    """Our names beside theirs."""
    entries = [
        Entry("embed.token.weight", ("transformer.wte.weight",)),
        Entry("embed.position.weight", ("transformer.wpe.weight",)),
        *linear("final_norm", "transformer.ln_f", bias=True),
    ]
    if not section.tie_embeddings:
        entries.append(Entry("head.weight", ("lm_head.weight",)))
    for i in range(section.n_layer):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        entries += linear(f"{ours}.attention_norm", f"{theirs}.ln_1", bias=True)
        entries += linear(f"{ours}.attention.qkv", f"{theirs}.attn.c_attn", bias=True, transposed=True)
        entries += linear(f"{ours}.attention.out", f"{theirs}.attn.c_proj", bias=True, transposed=True)
        entries += linear(f"{ours}.mlp_norm", f"{theirs}.ln_2", bias=True)
        entries += linear(f"{ours}.mlp.up", f"{theirs}.mlp.c_fc", bias=True, transposed=True)
        entries += linear(f"{ours}.mlp.down", f"{theirs}.mlp.c_proj", bias=True, transposed=True)
    return entries
