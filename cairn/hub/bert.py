"""BERT (`BertForPreTraining`)."""

from collections.abc import Mapping
from typing import Any

from cairn.config.model import BERTSection
from cairn.hub.convert import Entry, linear, qkv_rows, require, require_config

ARCHITECTURE = "BertForPreTraining"
PREFIX = "bert."
NAME = "Bert"
HEADS = {"sequence": "classifier", "token": "classifier"}
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "relu2": "relu2"}


def to_config(section: BERTSection, vocab_rows: int) -> dict[str, Any]:
    """Arguments of BertConfig. Raises UserError naming keys it cannot express."""
    require(
        section,
        ARCHITECTURE,
        kv_heads=section.n_head,
        norm="layernorm",
        norm_position="post",
        norm_affine=True,
        embed_norm=True,
        position="learned",
        bias=True,
        qk_norm=False,
        logit_softcap=None,
        sliding_window=None,
        tie_embeddings=True,
    )
    if section.activation not in ACTIVATIONS:
        require(section, ARCHITECTURE, activation="gelu")
    return {
        "vocab_size": vocab_rows,
        "max_position_embeddings": section.max_seq_len,
        "type_vocab_size": section.n_segment,
        "hidden_size": section.d_model,
        "num_hidden_layers": section.n_layer,
        "num_attention_heads": section.n_head,
        "intermediate_size": section.ff_dim,
        "hidden_act": ACTIVATIONS[section.activation],
        "layer_norm_eps": section.norm_eps,
        "hidden_dropout_prob": section.dropout,
        "attention_probs_dropout_prob": section.attention_dropout,
        "initializer_range": section.init_std,
        "tie_word_embeddings": True,
    }


def to_section(config: Mapping[str, Any]) -> BERTSection:
    """The section of a config.json. Raises UserError naming keys without a counterpart here."""
    require_config(
        config,
        position_embedding_type="absolute",
        is_decoder=False,
        add_cross_attention=False,
        tie_word_embeddings=True,
    )
    names = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}
    if config["hidden_act"] not in names:
        require_config(config, hidden_act="gelu")
    return BERTSection(
        n_layer=config["num_hidden_layers"],
        n_head=config["num_attention_heads"],
        d_model=config["hidden_size"],
        d_ff=config["intermediate_size"],
        max_seq_len=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
        n_segment=config["type_vocab_size"],
        norm_eps=config["layer_norm_eps"],
        activation=names[config["hidden_act"]],  # type: ignore[arg-type]
        dropout=float(config["hidden_dropout_prob"]),
        attention_dropout=float(config["attention_probs_dropout_prob"]),
        init_std=config["initializer_range"],
    )


def table(section: BERTSection) -> list[Entry]:
    """Our names beside theirs."""
    entries = [
        Entry("embed.token.weight", ("bert.embeddings.word_embeddings.weight",)),
        Entry("embed.position.weight", ("bert.embeddings.position_embeddings.weight",)),
        Entry("embed.segment.weight", ("bert.embeddings.token_type_embeddings.weight",)),
        Entry("masked_head.bias", ("cls.predictions.bias",)),
        *linear("embed.norm", "bert.embeddings.LayerNorm", bias=True),
        *linear("pooler.dense", "bert.pooler.dense", bias=True),
        *linear("masked_head.dense", "cls.predictions.transform.dense", bias=True),
        *linear("masked_head.norm", "cls.predictions.transform.LayerNorm", bias=True),
        *linear("next_sentence_head", "cls.seq_relationship", bias=True),
    ]
    for i in range(section.n_layer):
        ours, theirs = f"blocks.{i}", f"bert.encoder.layer.{i}"
        qkv = [f"{theirs}.attention.self.{name}" for name in ("query", "key", "value")]
        entries += linear(f"{ours}.attention.qkv", *qkv, bias=True, rows=qkv_rows(section))
        entries += linear(f"{ours}.attention.out", f"{theirs}.attention.output.dense", bias=True)
        entries += linear(f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm", bias=True)
        entries += linear(f"{ours}.mlp.up", f"{theirs}.intermediate.dense", bias=True)
        entries += linear(f"{ours}.mlp.down", f"{theirs}.output.dense", bias=True)
        entries += linear(f"{ours}.mlp_norm", f"{theirs}.output.LayerNorm", bias=True)
    return entries
