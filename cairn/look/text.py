"""Texts as a model reads them, and their pieces as people read them."""

from collections.abc import Sequence
from dataclasses import dataclass

from cairn.data.tokenizer import Tokenizer
from cairn.errors import UserError
from cairn.models.seq2seq import Seq2Seq
from cairn.models.transformer import Transformer
from cairn.train.run import LoadedRun

Body = Transformer | Seq2Seq
NAMES = {
    "cls_id": "[CLS]",
    "sep_id": "[SEP]",
    "mask_id": "[MASK]",
    "unk_id": "[UNK]",
    "pad_id": "[PAD]",
    "eos_id": "</s>",
    "bos_id": "<s>",
}
VISIBLE = {" ": "␣", "\n": "↵", "\r": "↵", "\t": "⇥"}


@dataclass(frozen=True)
class Tokens:
    """One input of a model."""

    ids: list[int]
    segments: list[int]
    """0, and 1 in the second text of a BERT."""
    left_out: int = 0
    """Tokens that did not fit."""


def body_of(run: LoadedRun) -> Body:
    """A run's model. Raises UserError for one that is no transformer."""
    if not isinstance(run.model, Body):
        raise UserError(f"the model is a {type(run.model).__name__}: only transformers can be looked into")
    return run.model


def has_cls(model: Body) -> bool:
    """Whether it reads texts behind a [CLS], as BERT does."""
    return isinstance(model, Transformer) and not model.causal


def tokenize(
    model: Body,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    limit: int | None = None,
) -> list[Tokens]:
    """What the model reads of each text: a BERT [CLS] text [SEP], or [CLS] text [SEP] pair [SEP]; others the text, a
    pair on its next line, an encoder-decoder with the end of text behind it. Of what is longer than `limit` tokens the
    ends are left out, of the longer text first.

    Raises UserError where the tokenizer lacks one of these tokens, or the model segments for pairs.
    """
    if not has_cls(model):
        whole = texts if pairs is None else [f"{text}\n{pair}" for text, pair in zip(texts, pairs, strict=True)]
        end = [end_of_text(tokenizer)] if isinstance(model, Seq2Seq) else []
        return [_cut([ids], limit, [], end) for ids in tokenizer.encode_batch(whole)]
    if tokenizer.cls_id is None or tokenizer.sep_id is None:
        raise UserError("the run's tokenizer has no [CLS] and [SEP], between which an encoder reads a text")
    if pairs is not None and (model.embed.segment is None or len(model.embed.segment.weight) < 2):
        raise UserError("the model has one segment (model.n_segment) and reads no pairs: leave out --text-pair")
    parts = [[ids] for ids in tokenizer.encode_batch(texts)]
    for part, ids in zip(parts, tokenizer.encode_batch(pairs or []), strict=pairs is not None):
        part.append(ids)
    return [_cut(each, limit, [tokenizer.cls_id], [tokenizer.sep_id]) for each in parts]


def end_of_text(tokenizer: Tokenizer) -> int:
    """The token that ends a source. Raises UserError where there is none."""
    if tokenizer.eos_id is None:
        raise UserError("the run's tokenizer has no token that ends a text, which an encoder-decoder reads behind each")
    return tokenizer.eos_id


def _cut(parts: list[list[int]], limit: int | None, before: list[int], after: list[int]) -> Tokens:
    """Parts with the tokens `before` them all and `after` each, as long as may be."""
    lengths = [len(part) for part in parts]
    marks = len(before) + len(parts) * len(after)
    over = 0 if limit is None else max(0, sum(lengths) + marks - limit)
    for _ in range(over):
        lengths[lengths.index(max(lengths))] -= 1
    ids, segments = list(before), [0] * len(before)
    for number, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        ids += part[:length] + after
        segments += [number] * (length + len(after))
    return Tokens(ids, segments, over)


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """A label for each token: its text, without spaces unless it is nothing else, or a special token's name."""
    special = {i: f"<{i}>" for i in tokenizer.special_ids()}
    special |= {i: name for key, name in reversed(NAMES.items()) if (i := getattr(tokenizer, key)) is not None}
    return [special[i] if i in special else _shown(tokenizer.decode([i])) for i in ids]


def _shown(text: str) -> str:
    text = text.strip(" ") or text
    return "".join(VISIBLE.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in text)
