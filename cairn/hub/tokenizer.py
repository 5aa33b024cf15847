"""A run's tokenizer in the form that `transformers.AutoTokenizer` loads."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sentencepiece as spm
from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Backend

from cairn.data.tokenizer import SPECIALS, BytesTokenizer, Tokenizer

SAMPLES = (
    Path(os.__file__).read_text(encoding="utf-8")[:30_000],
    "  Grüße, 世界!\n\n\tfour    spaces, a\u00a0hard one, 🙂 and e\u0301  ",
    "",
)
KINDS = ("pad", "unk", "bos", "eos", "mask", "cls", "sep")
PAD = "<|pad|>"


@dataclass(frozen=True)
class Template:
    """The special tokens that a model reads around texts: BERT's <cls> A <sep> B <sep>, or A <eos> B <eos>."""

    begin: Literal["cls"] | None
    end: Literal["sep", "eos"]
    segments: bool
    """Whether the tokens of B are of another segment."""


def export_tokenizer(
    tokenizer: Tokenizer,
    saved: Path,
    folder: Path,
    template: Template | None = None,
    pad_id: int | None = None,
    max_len: int | None = None,
) -> bool:
    """Write the tokenizer kept in `saved` into `folder` for AutoTokenizer.

    `pad_id`: of the token for padding, one more than the tokenizer has where it has none of its own. `max_len`: what
    texts are cut to, where the caller of AutoTokenizer asks for that. Returns whether what AutoTokenizer then loads
    gives the same ids on sample text; if not, nothing is written.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    segments = template is not None and template.segments
    for backend in _candidates(tokenizer, saved):
        if any(backend.encode(text, add_special_tokens=False).ids != tokenizer.encode(text) for text in SAMPLES):
            continue
        ids = {kind: getattr(tokenizer, f"{kind}_id") for kind in KINDS}
        if pad_id is not None and pad_id != ids["pad"]:
            ids["pad"] = pad_id
            backend.add_special_tokens([AddedToken(PAD, special=True, normalized=False)])
            if backend.token_to_id(PAD) != pad_id:
                continue
        named = {kind: backend.id_to_token(i) for kind, i in ids.items() if i is not None}
        if template is not None and {template.end, template.begin or template.end} <= named.keys():
            begin = f"{named[template.begin]} " if template.begin else ""
            end, other = named[template.end], int(template.segments)
            backend.post_processor = processors.TemplateProcessing(
                single=f"{begin}$A {end}",
                pair=f"{begin}$A {end} $B:{other} {end}:{other}",
                special_tokens=[(named[kind], ids[kind]) for kind in (template.begin, template.end) if kind],
            )
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            clean_up_tokenization_spaces=False,
            model_input_names=["input_ids", *(["token_type_ids"] if segments else []), "attention_mask"],
            chat_template=tokenizer.chat_template,
            **({} if max_len is None else {"model_max_length": max_len}),
            **{f"{kind}_token": token for kind, token in named.items()},
        ).save_pretrained(folder)
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        encoded = [loaded(text, add_special_tokens=False, verbose=False)["input_ids"] for text in SAMPLES]
        if encoded == [tokenizer.encode(text) for text in SAMPLES]:
            return True
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            (folder / name).unlink(missing_ok=True)
    return False


def _candidates(tokenizer: Tokenizer, saved: Path) -> Iterator[Backend]:
    """What may be the same tokenizer; the caller compares."""
    if isinstance(tokenizer, BytesTokenizer):
        names = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
        yield _spaced(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True), SPECIALS, False)
    elif (saved / "tokenizer.json").is_file():
        yield Backend.from_file(str(saved / "tokenizer.json"))
    else:
        pieces = spm.SentencePieceProcessor(model_file=str(saved / "tokenizer.model"))
        scores = {pieces.id_to_piece(i): pieces.get_score(i) for i in range(pieces.get_piece_size())}
        ids = {piece: i for i, piece in enumerate(scores)}
        special = [p for p, i in ids.items() if pieces.is_control(i) or pieces.is_unknown(i)]
        text = {p for p, i in ids.items() if p not in special and not pieces.is_byte(i)}
        yield _spaced(
            models.BPE(
                ids, _merges(text, ids, scores), byte_fallback=True, unk_token=pieces.id_to_piece(pieces.unk_id())
            ),
            special,
            True,
        )
        yield _spaced(models.Unigram(list(scores.items()), pieces.unk_id(), byte_fallback=True), special, True)


def _merges(text: set[str], ids: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, the best-scored piece first, as SentencePiece merges."""
    splits = [
        (-scores[piece], ids[piece[:i]], ids[piece[i:]], piece[:i], piece[i:])
        for piece in text
        for i in range(1, len(piece))
        if piece[:i] in text and piece[i:] in text
    ]
    return [(left, right) for *_, left, right in sorted(splits)]


def _spaced(model: models.Model, special: "tuple[str, ...] | list[str]", marked: bool) -> Backend:
    """A tokenizer over a model; `marked`: its pieces have U+2581 for a space."""
    backend = Backend(model)
    steps: list[decoders.Decoder] = [decoders.ByteFallback(), decoders.Fuse()]
    if marked:
        backend.normalizer = normalizers.Replace(" ", "\u2581")
        steps.insert(0, decoders.Replace("\u2581", " "))
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return backend
