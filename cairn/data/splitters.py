"""Where words begin, for the tokenizers that are known to encode them one by one.

Kinds of characters are not listed here: they are asked of the tokenizer itself, character by character as they turn up,
so that they are those of its own Unicode tables.
"""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend

from cairn.data.words import ALONE, BLANK, END, LETTER, NUMBER, OTHER, SPACE, Codes, Kinds, Splitter


def splitter_of(backend: Backend, state: dict[str, Any]) -> Splitter | None:
    """The splitter of a `tokenizers` tokenizer whose tokenizer.json is `state`; None for one that is not known.

    Known are GPT-2's (byte-level BPE with its pattern) and BERT's (its normalizer, its pre-tokenizer and WordPiece),
    with any vocabulary. Special tokens must be taken for text, and there must be no added tokens of another sort.
    """
    if not all(token["special"] for token in state["added_tokens"]) or state["model"].get("dropout"):
        return None
    kinds = tuple((state[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model"))
    words = state["pre_tokenizer"] or {}
    if kinds == (None, "ByteLevel", "BPE") and words["use_regex"] and not words["add_prefix_space"]:
        return Splitter(lambda character: _byte_level_kind(backend, character), _byte_level_begins)
    if kinds == ("BertNormalizer", "BertPreTokenizer", "WordPiece"):
        return Splitter(lambda character: _bert_kind(backend, character), _bert_begins)
    return None


def spaces_splitter(letter: re.Pattern[str], alone: str) -> Splitter:
    """Spaces and what follows them are a word, whose characters all match `letter` or all do not; `alone` is one."""

    def kind(character: str) -> int:
        if character in (" ", alone):
            return SPACE if character == " " else ALONE
        return LETTER if letter.match(character) else OTHER

    return Splitter(kind, _spaces_begin)


def _changes(kinds: Kinds) -> NDArray[np.bool_]:
    """Where a run of one kind begins."""
    begins = np.ones(len(kinds), np.bool_)
    np.not_equal(kinds[1:], kinds[:-1], out=begins[1:])
    return begins


def _byte_level_kind(backend: Backend, character: str) -> int:
    """What a character may share a word with: letters, numbers or other signs; if with none, it is white space."""
    for kind, other in ((LETTER, "a"), (NUMBER, "1"), (OTHER, "!")):
        if len(backend.pre_tokenizer.pre_tokenize_str(other + character)) == 1:
            return kind
    return SPACE


def _byte_level_begins(codes: Codes, kinds: Kinds) -> NDArray[np.bool_]:
    # 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ as rules on runs of a kind.
    begins = _changes(kinds)
    # White space before a word leaves its last character to it: a space as its beginning, another as a word.
    last = np.flatnonzero((kinds[:-1] == SPACE) & (kinds[1:] > SPACE))
    begins[last] = True
    begins[last[codes[last] == ord(" ")] + 1] = False
    # An apostrophe that begins a word, and letters: where they are one of the endings, another word begins after it.
    quotes = np.flatnonzero(codes[:-1] == ord("'"))
    quotes = quotes[begins[quotes] & (kinds[quotes + 1] == LETTER)]
    one, two = codes[quotes + 1], codes[np.minimum(quotes + 2, len(codes) - 1)]
    short = np.isin(one, [ord(letter) for letter in "stmd"])
    long = np.isin(one * 256 + two, [ord(a) * 256 + ord(b) for a, b in ("re", "ve", "ll")])
    for ending, length in ((quotes[short], 2), (quotes[long], 3)):
        begins[ending + 1] = False
        begins[ending + length] = True
    return begins


def _bert_kind(backend: Backend, character: str) -> int:
    """Whether a character parts two letters, and is nothing itself or a word; else it may be anything within a word."""
    text = backend.normalizer.normalize_str(f"x{character}x")
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    if pieces[0] == pieces[-1] == "x" and len(pieces) > 1:
        return BLANK if len(pieces) == 2 else ALONE
    return LETTER


def _bert_begins(codes: Codes, kinds: Kinds) -> NDArray[np.bool_]:
    """Words are between blanks and punctuation or Chinese characters, each of which is a word."""
    begins = _changes(kinds)
    begins |= kinds == ALONE  # a word each, though together they would encode alike: a few words, not many runs
    return begins


def _spaces_begin(codes: Codes, kinds: Kinds) -> NDArray[np.bool_]:
    """Where a kind ends, but not between spaces and the word they belong to."""
    begins = _changes(kinds)
    begins |= kinds == ALONE
    begins[1:] &= (kinds[:-1] != SPACE) | (kinds[1:] == ALONE) | (kinds[1:] == END)
    return begins
