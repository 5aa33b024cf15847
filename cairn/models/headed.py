"""A GPT or BERT whose language-model heads have given way to the head of a task."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cairn.config.finetune import FrozenSection, Head, LoRASection, TuneSection
from cairn.config.model import BERTSection, TransformerSection
from cairn.models.bert import Pooler
from cairn.models.lora import add_lora
from cairn.models.transformer import Transformer
from cairn.ops.linear import Linear


class Outputs(Linear):
    """The last product, in fp32 whatever the model computes in: what bf16 rounds to one number has no order."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(..., D) -> (..., K)."""
        return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class Headed(Transformer):
    """Outputs of a text or of its tokens, as `transformers`' AutoModelForSequenceClassification and its kin give them.

    Of a text: from its [CLS] through the pooler, from a decoder's last token, or from the mean over its tokens. Names
    of parameters are those of the language model, so that its weights fit; only `head` is new.
    """

    def __init__(self, section: TransformerSection, vocab_size: int, head: Head) -> None:
        encoder = section if isinstance(section, BERTSection) else None
        super().__init__(section, vocab_size, causal=encoder is None, n_segment=encoder.n_segment if encoder else 0)
        self.kind = head.kind
        self.pooler = Pooler(encoder) if encoder and head.kind == "sequence" else None
        # GPT2ForSequenceClassification and its kin have no bias there.
        self.head = Outputs(section.d_model, head.n_out, bias=encoder is not None or head.kind == "token")
        self.initialize()

    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
        first: Tensor | None = None,
        last: Tensor | None = None,
    ) -> Tensor:
        """All (R, C): rows of texts. Outputs (R, C, K) of every token; or, with the places (B,) in the flattened rows
        of the first and last tokens of B texts, those of the texts (B, K)."""
        x = self.hidden(input_ids, segment_ids, document_ids=document_ids, positions=positions)
        if first is not None and last is not None:
            x = x.flatten(0, 1)
            if self.kind == "mean":
                x = _means(x, first, last)
            else:
                x = x[last] if self.pooler is None else self.pooler(x[first][:, None])
        return self.head(F.dropout(x, self.section.dropout, self.training))  # type: ignore[no-any-return]


def _means(x: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """(N, D) -> (B, D): the mean over places first to last of each of B texts, none of which overlap."""
    order = first.argsort()
    places = torch.arange(len(x), device=x.device)
    owner = order[(torch.searchsorted(first[order], places, right=True) - 1).clamp(min=0)]
    within = (places >= first[owner]) & (places <= last[owner])
    size = (last - first + 1)[:, None].to(x.dtype)
    return torch.zeros_like(x[: len(first)]).index_add(0, owner, x * within[:, None]) / size


def prepare_tuning(model: nn.Module, tune: TuneSection) -> None:
    """Freeze what does not train, and add LoRA's updates where they are asked for."""
    training: tuple[str, ...] = ("head.", "pooler.") if isinstance(model, Headed) else ()
    names = {id(module): f"{name}." for name, module in model.named_modules()}
    if isinstance(tune, LoRASection):
        add_lora(model, tune)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = ".lora_" in name or name.startswith(training)
    elif isinstance(tune, FrozenSection):
        if tune.last_blocks:
            training += ("final_norm.",)
            for module in (m for m in model.modules() if isinstance(m, nn.ModuleList)):
                training += tuple(names[id(block)] for block in list(module)[-tune.last_blocks :])
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.startswith(training)
