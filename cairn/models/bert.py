"""An encoder with BERT's two heads (arXiv 1810.04805)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cairn.config.model import BERTSection
from cairn.models.layers import Norm, Vocabulary
from cairn.models.transformer import Transformer
from cairn.ops.linear import Linear
from cairn.ops.losses import IGNORE


class MaskedHead(nn.Module):
    """Dense, activation and norm, then a score for every row of the vocabulary."""

    def __init__(self, section: BERTSection, vocab_size: int) -> None:
        super().__init__()
        self.section = section
        self.dense = Linear(section.d_model, section.d_model, bias=section.bias)
        self.norm = Norm(section.d_model, section)
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if section.bias else None

    def forward(self, hidden: Tensor, vocabulary: Vocabulary, labels: Tensor | None = None) -> Tensor:
        """(..., D) -> logits (..., V), or with labels (...) the summed loss."""
        x = self.norm(self.dense(hidden, self.section.activation))
        return vocabulary(x, True, labels, self.bias, self.section.logit_softcap)  # type: ignore[no-any-return]


class Pooler(nn.Module):
    """The first position, through a dense layer and tanh."""

    def __init__(self, section: BERTSection) -> None:
        super().__init__()
        self.dense = Linear(section.d_model, section.d_model, bias=section.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, D)."""
        return self.dense(hidden[:, 0]).tanh()  # type: ignore[no-any-return]


class BERT(Transformer):
    """Predicts masked tokens, and whether the second segment follows the first."""

    section: BERTSection

    def __init__(self, section: BERTSection, vocab_size: int) -> None:
        super().__init__(section, vocab_size, causal=False, n_segment=section.n_segment)
        self.pooler = Pooler(section)
        self.masked_head = MaskedHead(section, vocab_size)
        self.next_sentence_head = Linear(section.d_model, 2, bias=section.bias)
        self.head = None if section.tie_embeddings else Vocabulary(vocab_size, section.d_model)
        self.initialize()

    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        target_positions: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """All (B, T) but next_sentence_label (B,). attention_mask: 1 = real token; labels: -100 = ignore.

        Without labels {"logits": (B, T, V), "next_sentence_logits": (B, 2)}; with labels the fp32 sums {"masked"} and,
        given next_sentence_label, {"next_sentence"}. The masked head runs at the targets only: at target_positions
        (B, K), labels being (B, K) then, or else wherever labels has one. To count those waits for the device.
        """
        padding = None if attention_mask is None else attention_mask.bool()
        hidden = self.hidden(input_ids, segment_ids, key_padding=padding)
        vocabulary = self.embed.token if self.head is None else self.head
        if labels is None:
            return {
                "logits": self.masked_head(hidden, vocabulary),
                "next_sentence_logits": self.next_sentence_head(self.pooler(hidden)),
            }
        if target_positions is None:
            target = labels != IGNORE
            at, wanted = hidden[target], labels[target]
        else:
            at = hidden.gather(1, target_positions[..., None].expand(-1, -1, hidden.shape[-1]))  # (B, K, D)
            wanted = labels
        sums = {"masked": self.masked_head(at, vocabulary, wanted)}
        if next_sentence_label is not None:
            scores = self.next_sentence_head(self.pooler(hidden)).float()
            sums["next_sentence"] = F.cross_entropy(scores, next_sentence_label, reduction="sum")
        return sums
