"""The layers that models are made of: tables of vectors, norms and the feed-forward layer.

Every parameter is used inside its own module's forward, since ZeRO-3 gathers weights per module call.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cairn.config.model import TransformerSection
from cairn.ops.activations import activate
from cairn.ops.embedding import embedding
from cairn.ops.linear import Linear
from cairn.ops.losses import cross_entropy_sum, logits_of
from cairn.ops.norms import Scale, add_norm, norm
from cairn.ops.positions import sinusoids, t5_buckets


class Norm(nn.Module):
    """LayerNorm or RMSNorm, learned or not; statistics in fp32."""

    def __init__(self, dim: int, section: TransformerSection, kind: str | None = None) -> None:
        super().__init__()
        self.kind, self.eps = kind or section.norm, section.norm_eps
        self.weight = nn.Parameter(torch.ones(dim)) if section.norm_affine else None
        shifted = section.norm_affine and section.bias and self.kind == "layernorm"
        self.bias = nn.Parameter(torch.zeros(dim)) if shifted else None

    def forward(
        self, x: Tensor, branch: Tensor | None = None, residual: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (..., D) normed; or with `residual` x + branch, or x, and that normed: where the stream goes on beside."""
        scale = Scale(self.weight, self.bias, self.eps, self.kind == "layernorm")
        return add_norm(x, branch, scale) if residual else norm(x, scale)


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

    def forward(
        self, input_ids: Tensor, segment_ids: Tensor | None = None, positions: Tensor | None = None, past: int = 0
    ) -> Tensor:
        """input_ids, segment_ids, positions (B, T) -> (B, T, D); without positions they count on from `past`.

        Raises ValueError past max_seq_len where positions are learned.
        """
        stop = past + input_ids.shape[1]
        if positions is None:
            if self.position is not None and stop > self.section.max_seq_len:
                raise ValueError(f"{stop} tokens are more than model.max_seq_len {self.section.max_seq_len}")
            positions = torch.arange(past, stop, device=input_ids.device)
        x: Tensor = self.token(input_ids)
        if self.segment is not None:
            x = x + self.segment(torch.zeros_like(input_ids) if segment_ids is None else segment_ids)
        if self.position is not None:
            x = x + self.position(positions)
        elif self.section.position == "sinusoidal":
            x = x + sinusoids(positions, self.section.d_model).to(x.dtype)
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
        return embedding(t5_buckets(distance, self.causal), self.weight).permute(2, 0, 1)[None]


class MLP(nn.Module):
    """Feed-forward layer; swiglu and geglu (arXiv 2002.05202) have a gate beside it."""

    def __init__(self, section: TransformerSection) -> None:
        super().__init__()
        self.activation = section.activation
        self.up = Linear(section.d_model, section.ff_dim, bias=section.bias)
        self.gate = Linear(section.d_model, section.ff_dim, bias=section.bias) if section.gated else None
        self.down = Linear(section.ff_dim, section.d_model, bias=section.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            hidden = self.up(x, self.activation)
        else:
            hidden = activate(self.gate(x), self.activation) * self.up(x)
        return self.down(hidden)  # type: ignore[no-any-return]
