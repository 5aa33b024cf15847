"""The one transformer: embeddings, blocks and the final norm, from which GPT and BERT are made.

Every parameter is used inside its own module's forward, since ZeRO-3 gathers weights per module call.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cairn.config.model import Activation, TransformerSection
from cairn.models.base import LanguageModel
from cairn.models.cache import KVCache
from cairn.ops import positions
from cairn.ops.attention import attention
from cairn.ops.backends import attention_map
from cairn.ops.embedding import embedding
from cairn.ops.losses import cross_entropy_sum, logits_of
from cairn.ops.masks import Mask
from cairn.ops.norms import layer_norm, rms_norm


@dataclass(frozen=True)
class Context:
    """What all blocks of one forward pass share."""

    mask: Mask
    bias: Tensor | None
    """(1, H, T, S) added to attention scores: T5's or ALiBi's."""
    rope: tuple[Tensor, Tensor] | None
    cache: KVCache | None
    record: list[Tensor] | None = None
    """Where each layer leaves its attention map (B, H, T, S), for those who want to look at it."""


def activate(x: Tensor, name: Activation) -> Tensor:
    """The non-linearity; swiglu's gate uses silu."""
    match name:
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()
        case "swiglu":
            return F.silu(x)


class Norm(nn.Module):
    """LayerNorm or RMSNorm, learned or not; statistics in fp32."""

    def __init__(self, dim: int, section: TransformerSection, kind: str | None = None) -> None:
        super().__init__()
        self.kind, self.eps = kind or section.norm, section.norm_eps
        self.weight = nn.Parameter(torch.ones(dim)) if section.norm_affine else None
        shifted = section.norm_affine and section.bias and self.kind == "layernorm"
        self.bias = nn.Parameter(torch.zeros(dim)) if shifted else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rmsnorm":
            return rms_norm(x, self.weight, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps)


class Lookup(nn.Module):
    """A table of vectors, read by id."""

    def __init__(self, n_rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., width)."""
        return embedding(ids, self.weight)


class Vocabulary(Lookup):
    """One row per token. Reads ids into vectors, and as a head scores vectors against every row.

    A tied model calls the same module both ways, so its weight is one parameter that is always used in this forward.
    """

    def forward(
        self,
        x: Tensor,
        as_head: bool = False,
        labels: Tensor | None = None,
        bias: Tensor | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Ids (...) -> (..., D); as head (..., D) -> logits (..., V), or with labels (...) the summed loss."""
        if not as_head:
            return embedding(x, self.weight)
        if labels is None:
            return logits_of(x, self.weight, bias, softcap)
        return cross_entropy_sum(x, self.weight, labels, bias, softcap)


class Embedding(nn.Module):
    """Token, position and (BERT) segment vectors, summed; then norm, if any, and dropout."""

    def __init__(self, section: TransformerSection, vocab_size: int, n_segment: int = 0) -> None:
        super().__init__()
        self.section = section
        self.token = Vocabulary(vocab_size, section.d_model)
        self.position = Lookup(section.max_seq_len, section.d_model) if section.position == "learned" else None
        self.segment = Lookup(n_segment, section.d_model) if n_segment else None
        self.norm = Norm(section.d_model, section) if section.embed_norm else None

    def forward(self, input_ids: Tensor, segment_ids: Tensor | None, places: Tensor) -> Tensor:
        """input_ids, segment_ids (B, T), places (T,) or (B, T) -> (B, T, D)."""
        x: Tensor = self.token(input_ids)
        if self.segment is not None:
            x = x + self.segment(torch.zeros_like(input_ids) if segment_ids is None else segment_ids)
        if self.position is not None:
            x = x + self.position(places)
        elif self.section.position == "sinusoidal":
            x = x + positions.sinusoids(places, self.section.d_model).to(x.dtype)
        if self.norm is not None:
            x = self.norm(x)
        return F.dropout(x, self.section.dropout, self.training)


class RelativeBias(Lookup):
    """T5's learned bias of each head for each bucket of distances; one table for all layers."""

    def __init__(self, section: TransformerSection, causal: bool) -> None:
        super().__init__(32, section.n_head)
        self.causal = causal

    def forward(self, distance: Tensor) -> Tensor:
        """(T, S) -> (1, H, T, S)."""
        return embedding(positions.t5_buckets(distance, self.causal), self.weight).permute(2, 0, 1)[None]


class Attention(nn.Module):
    """Self-attention with grouped key-value heads."""

    def __init__(self, section: TransformerSection, layer: int) -> None:
        super().__init__()
        self.section, self.layer = section, layer
        width = (section.n_head + 2 * section.kv_heads) * section.head_dim
        self.qkv = nn.Linear(section.d_model, width, bias=section.bias)
        self.q_norm = Norm(section.head_dim, section, "rmsnorm") if section.qk_norm else None
        self.k_norm = Norm(section.head_dim, section, "rmsnorm") if section.qk_norm else None
        self.out = nn.Linear(section.d_model, section.d_model, bias=section.bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        s = self.section
        heads = self.qkv(x).unflatten(-1, (-1, s.head_dim)).transpose(1, 2)  # (B, H + 2 Hkv, T, D)
        q, k, v = heads.split([s.n_head, s.kv_heads, s.kv_heads], 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rope is not None:
            q, k = positions.rotate(q, context.rope), positions.rotate(k, context.rope)
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)
        if context.record is not None:
            context.record.append(attention_map(q, k, context.mask, context.bias))
        dropout = s.attention_dropout if self.training else 0.0
        y = attention(q, k, v, context.mask, context.bias, dropout, s.attention_backend)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Feed-forward layer; swiglu (arXiv 2002.05202) has a gate beside it."""

    def __init__(self, section: TransformerSection) -> None:
        super().__init__()
        self.activation = section.activation
        self.up = nn.Linear(section.d_model, section.ff_dim, bias=section.bias)
        gated = section.activation == "swiglu"
        self.gate = nn.Linear(section.d_model, section.ff_dim, bias=section.bias) if gated else None
        self.down = nn.Linear(section.ff_dim, section.d_model, bias=section.bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        hidden = activate(up, self.activation) if self.gate is None else activate(self.gate(x), "swiglu") * up
        return self.down(hidden)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention, then feed-forward, each beside the residual stream; norms before (GPT-2) or after the sum (BERT)."""

    def __init__(self, section: TransformerSection, layer: int) -> None:
        super().__init__()
        self.pre, self.dropout = section.norm_position == "pre", section.dropout
        self.attention_norm = Norm(section.d_model, section)
        self.attention = Attention(section, layer)
        self.mlp_norm = Norm(section.d_model, section)
        self.mlp = MLP(section)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        if self.pre:
            x = x + self._drop(self.attention(self.attention_norm(x), context))
            return x + self._drop(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x + self._drop(self.attention(x, context)))
        return self.mlp_norm(x + self._drop(self.mlp(x)))  # type: ignore[no-any-return]

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Transformer(LanguageModel):
    """Embedding, blocks, final norm. GPT and BERT add their heads to it."""

    section: TransformerSection

    def __init__(self, section: TransformerSection, vocab_size: int, causal: bool, n_segment: int = 0) -> None:
        super().__init__()
        self.section, self.causal = section, causal
        self.activation_checkpointing = False
        """Recompute each block in the backward pass; the engine sets it."""
        self.embed = Embedding(section, vocab_size, n_segment)
        self.relative = RelativeBias(section, causal) if section.position == "t5" else None
        self.blocks = nn.ModuleList(Block(section, i) for i in range(section.n_layer))
        self.final_norm = Norm(section.d_model, section) if section.norm_position == "pre" else None

    def hidden(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        key_padding: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        record: list[Tensor] | None = None,
        layers: list[Tensor] | None = None,
    ) -> Tensor:
        """input_ids (B, T) -> (B, T, D). Raises ValueError past max_seq_len where positions are learned.

        `positions` (B, T): of each token in its own text, where a row does not begin with its first or holds several;
        encodings that look at distances alone do without. `record` gets the attention map of each layer,
        `layers` what comes out of each block (B, T, D), the last one normed as what is returned.
        """
        past = 0 if cache is None else cache.length
        n_key = past + input_ids.shape[1]
        if n_key > self.section.max_seq_len and self.section.position == "learned" and positions is None:
            raise ValueError(f"{n_key} tokens are more than model.max_seq_len {self.section.max_seq_len}")
        places = torch.arange(past, n_key, device=input_ids.device)
        x: Tensor = self.embed(input_ids, segment_ids, places if positions is None else positions)
        mask = Mask(self.causal, self.section.sliding_window, document_ids, key_padding, past)
        context = Context(mask, self._bias(places, n_key), self._rope(places), cache, record)
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
            if layers is not None:
                layers.append(x)
        if cache is not None:
            cache.length = n_key
        if self.final_norm is not None:
            x = self.final_norm(x)
        if layers is not None:
            layers[-1] = x
        return x

    def flops_per_token(self, seq_len: int) -> float:
        """6 for each weight of a matrix product (embedding look-ups are none; the head is one), and
        12 x layers x width x keys seen for attention: half the sequence when causal, at most the window.
        BERT's vocabulary product is counted at 15 % of the positions, and its pooler not at all.
        """
        s, window = self.section, self.section.sliding_window or seq_len
        products = float(sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2))
        head = float(self.embed.token.weight.numel())
        if self.causal:
            w = min(window, seq_len)
            keys = (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len
        else:
            head = 0.15 * (head + s.d_model**2)
            keys = float(min(2 * window - 1, seq_len))
        return 6.0 * (products + head) + 12.0 * s.n_layer * s.d_model * keys

    def _rope(self, places: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.section.position != "rope":
            return None
        return positions.rope_table(places, self.section.head_dim, self.section.rope_theta)

    def _bias(self, places: Tensor, n_key: int) -> Tensor | None:
        if self.relative is None and self.section.position != "alibi":
            return None
        distance = torch.arange(n_key, device=places.device) - places[:, None]
        if self.relative is not None:
            return self.relative(distance)  # type: ignore[no-any-return]
        return positions.alibi_bias(distance, self.section.n_head)

    def initialize(self) -> None:
        """Draw every weight from torch's generator; biases are zero and norms one."""
        std, residual = self.section.init_std, {"same": 1.0, "scaled": (2 * self.section.n_layer) ** -0.5, "zero": 0.0}
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" in name:
                nn.init.ones_(parameter)
            elif name.endswith(("attention.out.weight", "mlp.down.weight")):
                nn.init.normal_(parameter, std=std * residual[self.section.residual_init])
            else:
                nn.init.normal_(parameter, std=std)
