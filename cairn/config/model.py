"""The `model` section of language models: one transformer, many configurations."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cairn.config.base import Section

Position = Literal["learned", "sinusoidal", "t5", "rope", "alibi", "none"]
Activation = Literal["gelu", "gelu_tanh", "relu", "relu2", "swiglu", "geglu"]
AttentionBackend = Literal["auto", "reference", "sdpa", "flex", "blocked", "amx"]


class LanguageModelSection(Section):
    """What every language model has."""

    objective: ClassVar[Literal["causal", "masked", "span"]] = "causal"
    """The objective.name it trains with."""
    max_seq_len: int = Field(1024, ge=1)
    """Longest sequence the model is built for."""
    vocab_size: int | None = Field(None, ge=1)
    """Rows of the embedding; empty: the tokenizer's vocabulary rounded up to vocab_multiple."""
    vocab_multiple: int = Field(128, ge=1)
    """An empty vocab_size is rounded up to a multiple of this, which GEMM kernels like."""


class TransformerSection(LanguageModelSection):
    """The transformer core; GPT-2-like, Llama-like, BERT-like and T5-like models are values of these keys."""

    n_layer: int = Field(12, ge=1)
    """Transformer blocks."""
    n_head: int = Field(12, ge=1)
    """Attention heads."""
    n_kv_head: int | None = Field(None, ge=1)
    """Key-value heads of grouped-query attention; empty: as many as n_head."""
    d_model: int = Field(768, ge=1)
    """Width of the residual stream."""
    d_ff: int | None = Field(None, ge=1)
    """Width of the feed-forward layer; empty: 4 x d_model (8/3 x d_model rounded up to 128 for swiglu and geglu)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation layer."""
    norm_position: Literal["pre", "post"] = "pre"
    """Normalise before each sub-layer (GPT-2) or after its residual sum (BERT)."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the variance in a norm."""
    norm_affine: bool = True
    """Whether norms have a learned scale (and, for layernorm with bias, a shift)."""
    position: Position = "learned"
    """Positional encoding."""
    embed_norm: bool = False
    """Normalise the sum of the embeddings before the first block."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of RoPE's wavelengths."""
    activation: Activation = "gelu_tanh"
    """Feed-forward non-linearity."""
    bias: bool = True
    """Whether linear layers (and layernorms) have a bias."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head before their product."""
    tie_embeddings: bool = True
    """Whether the output head shares the token embedding."""
    logit_softcap: float | None = Field(None, gt=0)
    """Cap logits at c * tanh(logits / c); empty: off."""
    sliding_window: int | None = Field(None, ge=1)
    """Tokens each position attends to, itself included, to its left (both sides when bidirectional); empty: all."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout after embeddings and sub-layers."""
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on attention probabilities."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of initial weights."""
    residual_init: Literal["same", "scaled", "zero"] = "scaled"
    """Initial weights of projections into the residual stream: as the rest, over the root of their number
    (GPT-2: sqrt(2 n_layer)), or zero."""
    attention_backend: AttentionBackend = "auto"
    """Kernel of attention; auto picks by device, mask and shape."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.d_model % self.n_head:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_head {self.n_head}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.kv_heads}")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"rope needs an even head dimension, and d_model / n_head is {self.head_dim}")
        return self

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.n_head

    @property
    def kv_heads(self) -> int:
        """Key-value heads."""
        return self.n_kv_head or self.n_head

    @property
    def ff_dim(self) -> int:
        """Width of the feed-forward layer."""
        if self.d_ff:
            return self.d_ff
        return -(-8 * self.d_model // 3 // 128) * 128 if self.gated else 4 * self.d_model

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a gate."""
        return self.activation in ("swiglu", "geglu")


class GPTSection(TransformerSection):
    """A decoder: every position sees what is left of it."""

    name: Literal["gpt"] = "gpt"


class BERTSection(TransformerSection):
    """An encoder with segment embeddings, a pooler, a masked-LM head and a next-sentence head."""

    objective = "masked"
    name: Literal["bert"] = "bert"
    norm_position: Literal["pre", "post"] = "post"
    norm_eps: float = Field(1e-12, gt=0)
    embed_norm: bool = True
    activation: Activation = "gelu"
    residual_init: Literal["same", "scaled", "zero"] = "same"
    max_seq_len: int = Field(512, ge=1)
    n_segment: int = Field(2, ge=1)
    """Segment (token type) embeddings."""
    dropout: float = Field(0.1, ge=0, lt=1)
    attention_dropout: float = Field(0.1, ge=0, lt=1)


class Seq2SeqSection(TransformerSection):
    """An encoder of the source and a decoder that writes the target, looking at it; T5-like by default."""

    objective = "span"
    name: Literal["seq2seq"] = "seq2seq"
    n_layer: int = Field(12, ge=1)
    """Blocks of the encoder."""
    n_decoder_layer: int | None = Field(None, ge=1)
    """Blocks of the decoder; empty: n_layer."""
    max_seq_len: int = Field(512, ge=1)
    """Longest source, and longest target, that the model is built for."""
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: float = Field(1e-6, gt=0)
    position: Position = "t5"
    activation: Activation = "relu"
    bias: bool = False
    residual_init: Literal["same", "scaled", "zero"] = "same"
    dropout: float = Field(0.1, ge=0, lt=1)

    @property
    def decoder_layers(self) -> int:
        """Blocks of the decoder."""
        return self.n_decoder_layer or self.n_layer


ModelSection = Annotated[GPTSection | BERTSection | Seq2SeqSection, Field(discriminator="name")]
