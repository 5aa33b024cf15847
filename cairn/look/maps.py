"""What each token of a text takes of each other one, as a trained model computes it."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cairn.decode.generate import allowed_tokens
from cairn.decode.translate import encode_source, translate
from cairn.errors import UserError
from cairn.look.text import body_of, end_of_text, pieces, tokenize
from cairn.models.seq2seq import Seq2Seq
from cairn.objectives.span import start_of
from cairn.train.run import LoadedRun


@dataclass(frozen=True)
class Maps:
    """Attention maps of one input."""

    values: NDArray[np.float32]
    """(layers, heads, T, S); the row of a query sums to 1."""
    queries: list[str]
    """Labels of the T tokens that look."""
    keys: list[str]
    """Labels of the S tokens that are looked at."""
    cross: bool = False
    """Whether the decoder of an encoder-decoder looks at the source; its queries are the tokens that are written."""


def attention_maps(run: LoadedRun, text: str, pair: str | None = None, target: str | None = None) -> Maps:
    """Of a text that the model reads; of an encoder-decoder those from the target, None: the one it writes, to the
    source. Raises UserError for texts that are empty, longer than max_seq_len or not for such a model."""
    model = body_of(run)
    for option, given in (("--text", text), ("--text-pair", pair), ("--target", target)):
        if given is not None and not given.strip():
            raise UserError(f"{option} is empty: give some words")
    if isinstance(model, Seq2Seq):
        if pair is not None:
            raise UserError("--text-pair is for models that read pairs; this is an encoder-decoder, see --target")
        return _across(run, model, text, target)
    if target is not None:
        raise UserError("--target is for an encoder-decoder, and this model has no decoder that looks at a source")
    tokens = tokenize(model, run.tokenizer, [text], None if pair is None else [pair])[0]
    _check_length("--text", tokens.ids, model.section.max_seq_len)
    device = model.embed.token.weight.device
    record: list[Tensor] = []
    ids, segments = (torch.tensor([row], device=device) for row in (tokens.ids, tokens.segments))
    with torch.no_grad():
        model.hidden(ids, segments, record=record)
    labels = pieces(run.tokenizer, tokens.ids)
    return Maps(_stacked(record), labels, labels)


def _across(run: LoadedRun, model: Seq2Seq, text: str, target: str | None) -> Maps:
    tokenizer, limit = run.tokenizer, model.section.max_seq_len
    source, start, end = encode_source(tokenizer, text), start_of(tokenizer), end_of_text(tokenizer)
    _check_length("--text", source, limit)
    weight = model.embed.token.weight
    if target is None:
        allowed = allowed_tokens(tokenizer, len(weight)).to(weight.device)
        written = translate(model, [source], start, end, limit - 1, allowed=allowed)[0]
    else:
        written = tokenizer.encode(target)
        _check_length("--target", [start, *written], limit)
    record: list[Tensor] = []
    with torch.no_grad():
        memory = model.encode(torch.tensor([source], device=weight.device))
        model.decode(torch.tensor([[start, *written]], device=weight.device), memory, cross_record=record)
    return Maps(_stacked(record), pieces(tokenizer, [*written, end]), pieces(tokenizer, source), cross=True)


def _check_length(option: str, ids: list[int], limit: int) -> None:
    if len(ids) > limit:
        raise UserError(f"{option} has {len(ids)} tokens, and model.max_seq_len is {limit}: shorten it")


def _stacked(record: list[Tensor]) -> NDArray[np.float32]:
    """Maps (1, H, T, S) of each layer -> (L, H, T, S)."""
    made: NDArray[np.float32] = torch.cat(record).cpu().numpy()
    return made
