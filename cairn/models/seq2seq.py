"""An encoder of the source and a decoder of the target (arXiv 1706.03762); T5 (1910.10683) is a value of its keys."""

from dataclasses import dataclass

from torch import Tensor

from cairn.config.model import Seq2SeqSection
from cairn.models.base import LanguageModel
from cairn.models.cache import KVCache
from cairn.models.layers import Embedding, Vocabulary
from cairn.models.transformer import Stack, draw_weights
from cairn.ops.masks import Mask

SPAN_TARGET = 0.2
"""Tokens of a target for each of the source in span denoising, to count FLOPs by: 15 % of them and a sentinel for 3."""


@dataclass(frozen=True)
class Memory:
    """A source that has been read."""

    hidden: Tensor
    """(B, S, D)"""
    padding: Tensor | None = None
    """(B, S) bool: True where the source is text; None: everywhere."""
    documents: Tensor | None = None
    """(B, S): the number of each token's source, where a row holds several."""


class Seq2Seq(LanguageModel):
    """Predicts each next token of a target from a whole source. Both share the vectors of tokens and positions."""

    section: Seq2SeqSection

    def __init__(self, section: Seq2SeqSection, vocab_size: int) -> None:
        super().__init__()
        self.section = section
        self.embed = Embedding(section, vocab_size)
        self.encoder = Stack(section, section.n_layer, causal=False)
        self.decoder = Stack(section, section.decoder_layers, causal=True, cross=True)
        self.head = None if section.tie_embeddings else Vocabulary(vocab_size, section.d_model)
        self.initialize()

    def forward(
        self,
        source_ids: Tensor,
        input_ids: Tensor,
        labels: Tensor | None = None,
        source_documents: Tensor | None = None,
        source_positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
        source_padding: Tensor | None = None,
    ) -> Tensor:
        """Sources (B, S), targets (B, T), which are read all at once. Logits (B, T, V), or with labels (shifted
        already, -100 = ignore) the fp32 sum of their losses.

        `source_padding` is True where a source is text. Where a row holds several pairs, `source_documents` and
        `document_ids` number them: a target sees its own source alone. `source_positions` and `positions` then say
        where in it each token is; encodings that look at distances alone do without.
        """
        memory = self.encode(source_ids, source_documents, source_positions, source_padding)
        return self.decode(input_ids, memory, None, document_ids, positions, labels)

    def encode(
        self,
        source_ids: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        padding: Tensor | None = None,
        record: list[Tensor] | None = None,
        layers: list[Tensor] | None = None,
    ) -> Memory:
        """Read sources (B, S), as in `forward`. `record` gets the attention map (B, H, S, S) of each layer, `layers`
        what comes out of each block (B, S, D)."""
        x = self.embed(source_ids, positions=positions)
        return Memory(self.encoder.through(x, documents, padding, None, record, layers), padding, documents)

    def decode(
        self,
        input_ids: Tensor,
        memory: Memory,
        cache: KVCache | None = None,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
        record: list[Tensor] | None = None,
        cross_record: list[Tensor] | None = None,
    ) -> Tensor:
        """Targets (B, T) of sources that were read -> logits (B, T, V), or with labels the fp32 sum of their losses.

        With `cache`, input_ids follow what it holds; it belongs to the memory that it was first used with. `record` and
        `cross_record` get the maps of each layer, (B, H, T, all of the target so far) and (B, H, T, S).
        """
        if (document_ids is None) != (memory.documents is None):
            raise ValueError("sources and targets are either both numbered or neither")
        x = self.embed(input_ids, positions=positions, past=0 if cache is None else cache.length)
        seen = Mask(document_ids=document_ids, key_padding=memory.padding, key_document_ids=memory.documents)
        hidden = self.decoder.through(
            x,
            document_ids,
            cache=cache,
            record=record,
            memory=memory.hidden,
            memory_mask=seen,
            cross_record=cross_record,
        )
        head = self.embed.token if self.head is None else self.head
        return head(hidden, as_head=True, labels=labels, softcap=self.section.logit_softcap)  # type: ignore[no-any-return]

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `capacity` tokens of the target, where and in the dtype that the weights are."""
        weight = self.embed.token.weight
        decoder = self.section.model_copy(update={"n_layer": self.section.decoder_layers})
        return KVCache(decoder, batch, capacity, weight.device, weight.dtype)

    def flops(self, n_source: int, n_target: int) -> float:
        """Floating-point operations of a pair, forward and backward: as Transformer.flops_per_token, the keys and
        values of cross-attention being made of each token of the source, and seen by each of the target."""
        section, encoder, decoder = self.section, self.encoder, self.decoder
        keys_values = 2.0 * section.d_model * section.kv_heads * section.head_dim * section.decoder_layers
        head = float(self.embed.token.weight.numel())
        source = 6.0 * (encoder.products() + keys_values) + encoder.attention_flops(n_source)
        target = 6.0 * (decoder.products() - keys_values + head) + decoder.attention_flops(n_target)
        across = 12.0 * section.decoder_layers * section.d_model * n_source
        return n_source * source + n_target * (target + across)

    def flops_per_token(self, seq_len: int) -> float:
        """Of a token of the source, its share of the target in span denoising included."""
        return self.flops(seq_len, max(1, round(SPAN_TARGET * seq_len))) / seq_len

    def initialize(self) -> None:
        """Draw every weight from torch's generator; biases are zero and norms one."""
        draw_weights(self.embed, self.section, 1)
        draw_weights(self.encoder, self.section, 2 * self.section.n_layer)
        draw_weights(self.decoder, self.section, 3 * self.section.decoder_layers)
        if self.head is not None:
            draw_weights(self.head, self.section, 1)
