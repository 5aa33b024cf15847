"""The one transformer: attention, blocks and stacks of them, of which all models are made.

Every parameter is used inside its own module's forward, since ZeRO-3 gathers weights per module call.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cairn.config.model import TransformerSection
from cairn.models.base import LanguageModel
from cairn.models.cache import KVCache
from cairn.models.layers import MLP, Embedding, Norm, RelativeBias
from cairn.ops import positions
from cairn.ops.attention import attention
from cairn.ops.backends import attention_map
from cairn.ops.linear import Linear
from cairn.ops.masks import Mask


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
    memory: Tensor | None = None
    """(B, S, D), what cross-attention looks at: the encoder's output."""
    memory_mask: Mask = field(default_factory=Mask)
    cross_record: list[Tensor] | None = None
    """As `record`, of cross-attention."""


class Attention(nn.Module):
    """Self-attention with grouped key-value heads."""

    def __init__(self, section: TransformerSection, layer: int) -> None:
        super().__init__()
        self.section, self.layer = section, layer
        width = (section.n_head + 2 * section.kv_heads) * section.head_dim
        self.qkv = Linear(section.d_model, width, bias=section.bias)
        self.q_norm = Norm(section.head_dim, section, "rmsnorm") if section.qk_norm else None
        self.k_norm = Norm(section.head_dim, section, "rmsnorm") if section.qk_norm else None
        self.out = Linear(section.d_model, section.d_model, bias=section.bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        s = self.section
        heads = self.qkv(x).unflatten(-1, (-1, s.head_dim))  # (B, T, H + 2 Hkv, D)
        # Split before they are turned: in this order the gradients are put together in one copy.
        q, k, v = (part.transpose(1, 2) for part in heads.split([s.n_head, s.kv_heads, s.kv_heads], 2))
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


class CrossAttention(nn.Module):
    """Attention to what an encoder made of the source; where it stands counts for nothing here.

    With a cache, keys and values are made at its first use, which fixes the source.
    """

    def __init__(self, section: TransformerSection, layer: int) -> None:
        super().__init__()
        self.section, self.layer = section, layer
        self.q = Linear(section.d_model, section.d_model, bias=section.bias)
        self.kv = Linear(section.d_model, 2 * section.kv_heads * section.head_dim, bias=section.bias)
        self.q_norm = Norm(section.head_dim, section, "rmsnorm") if section.qk_norm else None
        self.k_norm = Norm(section.head_dim, section, "rmsnorm") if section.qk_norm else None
        self.out = Linear(section.d_model, section.d_model, bias=section.bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        s = self.section
        q = self.q(x).unflatten(-1, (-1, s.head_dim)).transpose(1, 2)
        if self.q_norm is not None:
            q = self.q_norm(q)
        known = None if context.cache is None else context.cache.cross.get(self.layer)
        k, v = self._keys_values(context) if known is None else known
        if context.cache is not None:
            context.cache.cross[self.layer] = k, v
        if context.cross_record is not None:
            context.cross_record.append(attention_map(q, k, context.memory_mask, None))
        dropout = s.attention_dropout if self.training else 0.0
        y = attention(q, k, v, context.memory_mask, None, dropout, s.attention_backend)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _keys_values(self, context: Context) -> tuple[Tensor, Tensor]:
        """(B, Hkv, S, D) each."""
        k, v = self.kv(context.memory).unflatten(-1, (-1, self.section.head_dim)).transpose(1, 2).chunk(2, 1)
        return k if self.k_norm is None else self.k_norm(k), v


class Block(nn.Module):
    """Attention, cross-attention where there is a source, feed-forward, each beside the residual stream; norms before
    (GPT-2) or after the sum (BERT)."""

    def __init__(self, section: TransformerSection, layer: int, cross: bool = False) -> None:
        super().__init__()
        self.pre, self.dropout = section.norm_position == "pre", section.dropout
        self.attention_norm = Norm(section.d_model, section)
        self.attention = Attention(section, layer)
        self.cross_attention_norm = Norm(section.d_model, section) if cross else None
        self.cross_attention = CrossAttention(section, layer) if cross else None
        self.mlp_norm = Norm(section.d_model, section)
        self.mlp = MLP(section)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        cross, cross_norm = self.cross_attention, self.cross_attention_norm
        if self.pre:
            x, normed = self.attention_norm(x, residual=True)
            branch = self._drop(self.attention(normed, context))
            if cross is not None and cross_norm is not None:
                x, normed = cross_norm(x, branch, residual=True)
                branch = self._drop(cross(normed, context))
            x, normed = self.mlp_norm(x, branch, residual=True)
            return x + self._drop(self.mlp(normed))
        _, x = self.attention_norm(x, self._drop(self.attention(x, context)), residual=True)
        if cross is not None and cross_norm is not None:
            _, x = cross_norm(x, self._drop(cross(x, context)), residual=True)
        _, x = self.mlp_norm(x, self._drop(self.mlp(x)), residual=True)
        return x

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Stack(nn.Module):
    """Blocks and the final norm: an encoder or, causal, a decoder, which with `cross` looks at a source.

    `first`: modules that come before these in the order in which weights are drawn.
    """

    def __init__(
        self, section: TransformerSection, n_layer: int, causal: bool, cross: bool = False, **first: nn.Module
    ) -> None:
        super().__init__()
        for name, module in first.items():
            self.add_module(name, module)
        self.section, self.causal = section, causal
        self.activation_checkpointing = False
        """Recompute each block in the backward pass; the engine sets it."""
        self.relative = RelativeBias(section, causal) if section.position == "t5" else None
        self.blocks = nn.ModuleList(Block(section, i, cross) for i in range(n_layer))
        self.final_norm = Norm(section.d_model, section) if section.norm_position == "pre" else None

    def through(
        self,
        x: Tensor,
        document_ids: Tensor | None = None,
        key_padding: Tensor | None = None,
        cache: KVCache | None = None,
        record: list[Tensor] | None = None,
        layers: list[Tensor] | None = None,
        memory: Tensor | None = None,
        memory_mask: Mask | None = None,
        cross_record: list[Tensor] | None = None,
    ) -> Tensor:
        """Embedded tokens (B, T, D) -> (B, T, D).

        `record` gets the attention map of each layer, `cross_record` that of its cross-attention to `memory` (B, S, D),
        `layers` what comes out of each block (B, T, D), the last one normed as what is returned.
        """
        past = 0 if cache is None else cache.length
        n_key = past + x.shape[1]
        places = torch.arange(past, n_key, device=x.device)
        mask = Mask(self.causal, self.section.sliding_window, document_ids, key_padding, past)
        bias, rope, seen = self._bias(places, n_key), self._rope(places), memory_mask or Mask()
        context = Context(mask, bias, rope, cache, record, memory, seen, cross_record)
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

    def products(self) -> float:
        """Weights of matrix products."""
        return float(sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2))

    def attention_flops(self, seq_len: int) -> float:
        """Of a trained token: 12 x layers x width x keys seen, half the sequence when causal, at most the window."""
        window = self.section.sliding_window or seq_len
        if self.causal:
            w = min(window, seq_len)
            keys = (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len
        else:
            keys = float(min(2 * window - 1, seq_len))
        return 12.0 * len(self.blocks) * self.section.d_model * keys

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


class Transformer(Stack, LanguageModel):
    """Embedding, blocks, final norm. GPT and BERT add their heads to it."""

    section: TransformerSection
    embed: Embedding

    def __init__(self, section: TransformerSection, vocab_size: int, causal: bool, n_segment: int = 0) -> None:
        super().__init__(section, section.n_layer, causal, embed=Embedding(section, vocab_size, n_segment))

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
        x = self.embed(input_ids, segment_ids, positions, 0 if cache is None else cache.length)
        return self.through(x, document_ids, key_padding, cache, record, layers)

    def flops_per_token(self, seq_len: int) -> float:
        """6 for each weight of a matrix product (embedding look-ups are none; the head is one), and those of attention.
        BERT's vocabulary product is counted at 15 % of the positions, and its pooler not at all.
        """
        head = float(self.embed.token.weight.numel())
        if not self.causal:
            head = 0.15 * (head + self.section.d_model**2)
        return 6.0 * (self.products() + head) + self.attention_flops(seq_len)

    def initialize(self) -> None:
        """Draw every weight from torch's generator; biases are zero and norms one."""
        draw_weights(self, self.section, 2 * self.section.n_layer)


def draw_weights(model: nn.Module, section: TransformerSection, n_sum: int) -> None:
    """Every weight of a model or a part of one, from torch's generator; biases are zero and norms one.

    `n_sum`: how often its residual stream is added to, by which residual_init "scaled" divides.
    """
    residual = {"same": 1.0, "scaled": n_sum**-0.5, "zero": 0.0}[section.residual_init]
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "norm" in name:
            nn.init.ones_(parameter)
        elif name.endswith(("attention.out.weight", "mlp.down.weight")):
            nn.init.normal_(parameter, std=section.init_std * residual)
        else:
            nn.init.normal_(parameter, std=section.init_std)
