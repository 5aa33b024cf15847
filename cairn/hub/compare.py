"""Logits of a model here beside those of `transformers` with what is in a folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cairn.errors import UserError
from cairn.models.base import LanguageModel
from cairn.models.bert import BERT
from cairn.models.headed import Headed
from cairn.models.seq2seq import Seq2Seq

TOLERANCE = 1e-4
Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def compare(model: LanguageModel, folder: Path, architecture: str, exact: bool = True) -> float:
    """Largest difference of logits between ours and transformers' of the folder, over the largest logit.

    Raises UserError when transformers finds a tensor missing or, if `exact`, one that it does not know.
    """
    import transformers

    theirs, info = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    wrong = sorted([*info["missing_keys"], *(info["unexpected_keys"] if exact else ())])
    if wrong:
        raise UserError(f"{folder}: transformers' {architecture} misses or does not know {', '.join(wrong[:5])}")
    theirs.eval()
    model.eval()
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in _pairs(model, theirs))


def _pairs(model: LanguageModel, theirs: Any) -> Iterator[Pair]:
    """Ours and theirs for the same random ids."""
    n = min(64, model.section.max_seq_len)
    ids = torch.randint(theirs.config.vocab_size, (2, n), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(n) > n // 2).long().expand(2, n) % getattr(model.section, "n_segment", 1)
    if isinstance(model, Headed):
        yield from _headed(model, theirs, ids, segments)
    elif isinstance(model, BERT):
        ours, output = model(ids, segments), theirs(input_ids=ids, token_type_ids=segments)
        yield ours["logits"], output.prediction_logits
        yield ours["next_sentence_logits"], output.seq_relationship_logits
    elif isinstance(model, Seq2Seq):
        source, text = ids.flip(0), _text(n)
        output = theirs(input_ids=source, attention_mask=text.long(), decoder_input_ids=ids)
        yield model(source, ids, source_padding=text), output.logits
    else:
        yield model(ids), theirs(input_ids=ids).logits


def _headed(model: Headed, theirs: Any, ids: Tensor, segments: Tensor) -> Iterator[Pair]:
    """Each text alone, and both in a batch, where the shorter one is padded."""
    pad, text = theirs.config.pad_token_id, _text(ids.shape[1])
    ids = ids.masked_fill(ids == pad, int(pad == 0)).masked_fill(~text, pad)
    together = _outputs(theirs, ids, segments, text.long())
    for row, n in enumerate(text.sum(1).tolist()):
        alone, segment = ids[row : row + 1, :n], segments[row : row + 1, :n]
        places = {} if model.kind == "token" else {"first": torch.tensor([0]), "last": torch.tensor([n - 1])}
        ours = model(alone, segment, **places)[0]
        yield ours, _outputs(theirs, alone, segment, torch.ones_like(alone))[0]
        yield ours, together[row, :n] if model.kind == "token" else together[row]


def _outputs(theirs: Any, ids: Tensor, segments: Tensor, text: Tensor) -> Tensor:
    """(B, K) or (B, T, K) in whatever form their class gives them."""
    inputs = {"input_ids": ids, "attention_mask": text}
    if theirs.config.model_type == "bert":
        inputs["token_type_ids"] = segments
    if type(theirs).__name__.endswith("ForMultipleChoice"):  # each text as the one choice there is
        return theirs(**{name: value[:, None] for name, value in inputs.items()}).logits  # type: ignore[no-any-return]
    output = theirs(**inputs)
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1)
    return output.logits  # type: ignore[no-any-return]


def _text(n: int) -> Tensor:
    """(2, n) bool: a row of n tokens of text, and one of about two thirds."""
    return torch.arange(n) < torch.tensor([[n], [max(1, 2 * n // 3)]])
