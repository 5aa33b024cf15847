"""T5 (`T5ForConditionalGeneration`): what it leaves out of scores and adds to a tied head is put into weights."""

from collections.abc import Mapping
from typing import Any

from cairn.config.model import Seq2SeqSection
from cairn.errors import UserError
from cairn.hub.convert import Entry, linear, qkv_rows, require, require_config

ARCHITECTURE = "T5ForConditionalGeneration"
PREFIX = ""
ACTIVATIONS = {
    "relu": "relu",
    "geglu": "gated-gelu",
    "swiglu": "gated-silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "relu2": "relu2",
}


def to_config(section: Seq2SeqSection, vocab_rows: int) -> dict[str, Any]:
    """Arguments of T5Config. Raises UserError naming keys it cannot express.

    T5 has one rate for all dropout; that of attention does not change what the model computes, and is left out.
    """
    require(
        section,
        ARCHITECTURE,
        kv_heads=section.n_head,
        norm="rmsnorm",
        norm_position="pre",
        norm_affine=True,
        embed_norm=False,
        position="t5",
        bias=False,
        qk_norm=False,
        logit_softcap=None,
        sliding_window=None,
    )
    return {
        "vocab_size": vocab_rows,
        "n_positions": section.max_seq_len,
        "d_model": section.d_model,
        "d_kv": section.head_dim,
        "d_ff": section.ff_dim,
        "num_layers": section.n_layer,
        "num_decoder_layers": section.decoder_layers,
        "num_heads": section.n_head,
        "feed_forward_proj": ACTIVATIONS[section.activation],
        "layer_norm_epsilon": section.norm_eps,
        "dropout_rate": section.dropout,
        "tie_word_embeddings": section.tie_embeddings,
    }


def to_section(config: Mapping[str, Any]) -> Seq2SeqSection:
    """The section of a config.json. Raises UserError naming keys without a counterpart here."""
    require_config(config, relative_attention_num_buckets=32, relative_attention_max_distance=128)
    names = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
    if config["feed_forward_proj"] not in names:
        require_config(config, feed_forward_proj="relu")
    heads, width = config["num_heads"], config["d_kv"]
    if heads * width != config["d_model"]:
        raise UserError(
            f"config.json has {heads} heads of d_kv {width}, and here they make up d_model, {config['d_model']}: "
            "it cannot be imported"
        )
    return Seq2SeqSection(
        n_layer=config["num_layers"],
        n_decoder_layer=config["num_decoder_layers"],
        n_head=heads,
        d_model=config["d_model"],
        d_ff=config["d_ff"],
        max_seq_len=config.get("n_positions", 512),
        vocab_size=config["vocab_size"],
        norm_eps=config["layer_norm_epsilon"],
        activation=names[config["feed_forward_proj"]],  # type: ignore[arg-type]
        dropout=float(config["dropout_rate"]),
        attention_dropout=float(config["dropout_rate"]),
        # T5Config says that all are tied; those that are not are those without a factor before the head.
        tie_embeddings=config["scale_decoder_outputs"],
    )


def table(section: Seq2SeqSection) -> list[Entry]:
    """Our names beside theirs."""
    before_head = (section.d_model**-0.5,) if section.tie_embeddings else ()
    entries = [
        Entry("embed.token.weight", ("shared.weight",)),
        *linear("encoder.final_norm", "encoder.final_layer_norm", bias=False),
        *linear("decoder.final_norm", "decoder.final_layer_norm", bias=False, scales=before_head),
    ]
    if not section.tie_embeddings:
        entries.append(Entry("head.weight", ("lm_head.weight",)))
    for part, n_layer in (("encoder", section.n_layer), ("decoder", section.decoder_layers)):
        bias = "block.0.layer.0.SelfAttention.relative_attention_bias"
        entries += linear(f"{part}.relative", f"{part}.{bias}", bias=False)
        for i in range(n_layer):
            entries += _block(section, f"{part}.blocks.{i}", f"{part}.block.{i}.layer", cross=part == "decoder")
    return entries


def _block(section: Seq2SeqSection, ours: str, theirs: str, cross: bool) -> list[Entry]:
    rows, root = qkv_rows(section), section.head_dim**0.5  # our scores are divided by it
    q, k, v, o = (f"{theirs}.0.SelfAttention.{name}" for name in "qkvo")
    entries = linear(f"{ours}.attention_norm", f"{theirs}.0.layer_norm", bias=False)
    entries += linear(f"{ours}.attention.qkv", q, k, v, bias=False, rows=rows, scales=(root, 1.0, 1.0))
    entries += linear(f"{ours}.attention.out", o, bias=False)
    if cross:
        q, k, v, o = (f"{theirs}.1.EncDecAttention.{name}" for name in "qkvo")
        entries += linear(f"{ours}.cross_attention_norm", f"{theirs}.1.layer_norm", bias=False)
        entries += linear(f"{ours}.cross_attention.q", q, bias=False, scales=(root,))
        entries += linear(f"{ours}.cross_attention.kv", k, v, bias=False, rows=rows[1:])
        entries += linear(f"{ours}.cross_attention.out", o, bias=False)
    last = f"{theirs}.{2 if cross else 1}"
    names = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if section.gated else {"up": "wi", "down": "wo"}
    entries += linear(f"{ours}.mlp_norm", f"{last}.layer_norm", bias=False)
    for name, their_name in names.items():
        entries += linear(f"{ours}.mlp.{name}", f"{last}.DenseReluDense.{their_name}", bias=False)
    return entries
