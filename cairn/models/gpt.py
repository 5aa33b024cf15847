"""A decoder: GPT-2-like and Llama-like models are values of its section."""

from typing import ClassVar

from torch import Tensor

from cairn.config.model import GPTSection
from cairn.models.cache import KVCache
from cairn.models.layers import Vocabulary
from cairn.models.transformer import Transformer


class GPT(Transformer):
    """Predicts each next token."""

    section: GPTSection
    takes_padding: ClassVar[bool] = True

    def __init__(self, section: GPTSection, vocab_size: int) -> None:
        super().__init__(section, vocab_size, causal=True)
        self.head = None if section.tie_embeddings else Vocabulary(vocab_size, section.d_model)
        self.initialize()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        key_padding: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """All (B, T). Logits (B, T, V), or with labels (shifted already, -100 = ignore) the fp32 sum of their losses.

        With `document_ids`, tokens see only their own document, and `positions` say where in it they are. With `cache`,
        input_ids follow what it holds; `key_padding` (B, cached + T) is then False where a row holds no text.
        `last_only` makes the logits of the last position alone, (B, 1, V).
        """
        hidden = self.hidden(
            input_ids, document_ids=document_ids, key_padding=key_padding, cache=cache, positions=positions
        )
        if last_only:
            hidden = hidden[:, -1:]
        head = self.embed.token if self.head is None else self.head
        return head(hidden, as_head=True, labels=labels, softcap=self.section.logit_softcap)  # type: ignore[no-any-return]

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `capacity` tokens, where and in the dtype that the weights are."""
        weight = self.embed.token.weight
        return KVCache(self.section, batch, capacity, weight.device, weight.dtype)
