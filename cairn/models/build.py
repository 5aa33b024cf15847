"""From a section to a model, and what it costs."""

import torch

from cairn.config.model import LanguageModelSection, ModelSection
from cairn.errors import UserError
from cairn.models.base import LanguageModel
from cairn.models.bert import BERT
from cairn.models.gpt import GPT
from cairn.models.seq2seq import Seq2Seq

MODELS: dict[str, type[LanguageModel]] = {"gpt": GPT, "bert": BERT, "seq2seq": Seq2Seq}
"""By model.name."""


def padded_vocab(section: LanguageModelSection, vocab_size: int) -> int:
    """Rows of the embedding for a tokenizer of `vocab_size`: model.vocab_size, or rounded up to vocab_multiple.

    Raises UserError where model.vocab_size is smaller.
    """
    rows = section.vocab_size or -(-vocab_size // section.vocab_multiple) * section.vocab_multiple
    if rows < vocab_size:
        raise UserError(
            f"model.vocab_size {rows} is smaller than the tokenizer's {vocab_size}: "
            "raise it, or leave it empty to follow the tokenizer"
        )
    return rows


def build_model(section: ModelSection, vocab_size: int) -> LanguageModel:
    """The model on torch's default device, its weights drawn from torch's generator.

    `vocab_size` is the tokenizer's. Raises UserError where model.vocab_size is smaller.
    """
    return MODELS[section.name](section, padded_vocab(section, vocab_size))


def _meta(section: ModelSection, vocab_size: int) -> LanguageModel:
    with torch.device("meta"):
        return build_model(section, vocab_size)


def count_parameters(section: ModelSection, vocab_size: int) -> int:
    """Parameters, a tied one counted once; nothing is allocated."""
    return sum(p.numel() for p in _meta(section, vocab_size).parameters())


def flops_per_token(section: ModelSection, vocab_size: int, seq_len: int) -> float:
    """Floating-point operations a trained token costs, forward and backward, recomputation left out."""
    return _meta(section, vocab_size).flops_per_token(seq_len)
