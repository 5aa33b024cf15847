"""What a language model is, beside the forward pass that its objective calls."""

from typing import ClassVar, Protocol

from torch import nn

from cairn.config.model import LanguageModelSection


class Cache(Protocol):
    """What a decoder has read, kept so that the next token costs one position; `length` positions of it."""

    length: int


class LanguageModel(nn.Module):
    """Base of the models in `cairn.models.build.MODELS`, each made as MODEL(section, rows of the vocabulary).

    A causal one has forward(input_ids, labels=None, document_ids=None, cache=None), a masked one that of BERT.
    """

    section: LanguageModelSection
    takes_padding: ClassVar[bool] = False
    """Whether forward takes `positions`, `key_padding` and `last_only` too: prompts of all lengths go in one batch."""

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations a trained token costs, forward and backward, recomputation left out."""
        raise NotImplementedError

    def new_cache(self, batch: int, capacity: int) -> Cache | None:
        """An empty cache for `capacity` tokens; None: generation reads the whole context for every token."""
        return None
