"""From a section to a model, and what it costs."""

import torch
from torch import nn

from cairn.config.model import BERTSection, GPTSection
from cairn.errors import UserError
from cairn.models.bert import BERT
from cairn.models.gpt import GPT


def padded_vocab(section: GPTSection | BERTSection, vocab_size: int) -> int:
    """Rows of the embedding for a tokenizer of `vocab_size`: model.vocab_size, or rounded up to vocab_multiple."""
    return section.vocab_size or -(-vocab_size // section.vocab_multiple) * section.vocab_multiple


def build_model(section: GPTSection | BERTSection, vocab_size: int) -> GPT | BERT:
    """The model on torch's default device, its weights drawn from torch's generator.

    `vocab_size` is the tokenizer's. Raises UserError where model.vocab_size is smaller.
    """
    rows = padded_vocab(section, vocab_size)
    if rows < vocab_size:
        raise UserError(f"model.vocab_size {rows} is smaller than the tokenizer's {vocab_size}: leave it empty")
    return GPT(section, rows) if isinstance(section, GPTSection) else BERT(section, rows)


def _meta(section: GPTSection | BERTSection, vocab_size: int) -> nn.Module:
    with torch.device("meta"):
        return build_model(section, vocab_size)


def count_parameters(section: GPTSection | BERTSection, vocab_size: int) -> int:
    """Parameters, a tied one counted once; nothing is allocated."""
    return sum(p.numel() for p in _meta(section, vocab_size).parameters())


def flops_per_token(section: GPTSection | BERTSection, vocab_size: int, seq_len: int) -> float:
    """Floating-point operations a trained token costs, forward and backward, recomputation left out.

    6 for each weight of a matrix product (embedding look-ups are none; the head is one), and
    12 x layers x width x keys seen for attention: half the sequence when causal, at most the window.
    BERT's vocabulary product is counted at 15 % of the positions, and its pooler not at all.
    """
    model = _meta(section, vocab_size)
    products = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("blocks."))
    head = float(padded_vocab(section, vocab_size) * section.d_model)
    causal = isinstance(section, GPTSection)
    if not causal:
        head = 0.15 * (head + section.d_model**2)
    window = section.sliding_window or seq_len
    if causal:
        w = min(window, seq_len)
        keys = (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len
    else:
        keys = min(2 * window - 1, seq_len)
    return 6.0 * (products + head) + 12.0 * section.n_layer * section.d_model * keys
