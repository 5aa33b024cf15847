"""Ids of texts, fast: the few words that texts are made of are encoded once each, and remembered.

For tokenizers that encode words one by one as they encode them together; a `Splitter` says where words begin. A chunk
of text is worked on as arrays: the kind of each character, the places where words begin, words of up to 16 characters
of Latin-1 as 128-bit keys, the entry of each key from a hash table, and the ids of the entries, end to end. Other words
are looked up one by one, in a dictionary. Texts whose words hardly come again, as clauses without spaces, are encoded
whole.
"""

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 18  # characters worked on at once
REMEMBERED = 1 << 18  # words; when there are more all are forgotten
NEW = 0.5  # share of a chunk's characters that lie in words met first, above which remembering costs more than it saves
WHOLE = 15  # chunks that are encoded whole after such a one, before words are tried again
SLOT_BITS = 19
WIDTH = 16  # characters of a key
MASKS = np.array([b"\xff" * n + bytes(WIDTH - n) for n in range(WIDTH + 1)], "V16").view("<u8").reshape(-1, 2)
FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)  # odd, with no pattern

# Python's white space is more than that of any splitter, so what is none here is none there.
UP_TO_SPACE = re.compile(r"(?s:.*\S)(?=[ \n])")

END, BLANK, SPACE, LETTER, NUMBER, OTHER, ALONE = range(7)
"""Kinds of characters. END is the end of a text and BLANK gives no ids; the rest is what a splitter makes of it."""
UNKNOWN = 255
END_CODE = 0x110000  # the first number that is no character

Codes = NDArray[np.uint32]
Kinds = NDArray[np.uint8]


@dataclass(frozen=True)
class Splitter:
    """How a tokenizer parts a text into words."""

    kind: Callable[[str], int]
    """The kind of a character."""
    begins: Callable[[Codes, Kinds], NDArray[np.bool_]]
    """(n,), (n,) to (n,): whether a word begins at each character of some texts, each ended by an END."""


def cut_at_space(text: str, limit: int) -> list[str]:
    """`text` in parts of at most `limit` characters that encode as they would together.

    Each ends where the last white space begins: a word ends there and another begins, whatever else the text holds.
    Only where there is none are `limit` characters cut off.
    """
    parts, start = [], 0
    while len(text) - start > limit:
        found = UP_TO_SPACE.match(text, start, start + limit)
        end = found.end() if found else start + limit
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def _chunks(parts: Iterable[str]) -> Iterator[list[str]]:
    """The parts, as many at a time as have CHUNK characters, and the last of them."""
    chunk: list[str] = []
    waiting = 0
    for part in parts:
        chunk.append(part)
        waiting += len(part)
        if waiting >= CHUNK:
            yield chunk
            chunk, waiting = [], 0
    if chunk:
        yield chunk


class Words:
    """Ids of texts by their words. Memory is that of a chunk and of REMEMBERED words."""

    def __init__(
        self, splitter: Splitter, encode: Callable[[list[str]], Iterable[Sequence[int]]], apart: bool = False
    ) -> None:
        """`encode` gives the ids of words, each of them taken as a text of its own.

        `apart`: of whole texts it gives those of their words, always, so that texts may be given to it as well.
        """
        self._splitter = splitter
        self._encode = encode
        self._kinds = np.full(END_CODE + 1, UNKNOWN, np.uint8)
        self._kinds[END_CODE] = END
        self._apart = apart
        self._met = self._whole = 0
        self._forget()

    def _forget(self) -> None:
        self._numbers: dict[str, int] = {}  # word to entry
        self._ids = array("i", [0])  # of all entries; 0 is nobody's, and marks a free slot
        self._borders = array("q", [0, 1])  # entry e has the ids [borders[e], borders[e + 1])
        # The entry of a key is in one slot alone; who finds it taken is known by `_numbers` only.
        self._keys = np.zeros((2, 1 << SLOT_BITS), np.uint64)
        self._entries = np.zeros(1 << SLOT_BITS, np.int32)

    def encode(self, texts: Sequence[Sequence[str]]) -> list[NDArray[np.int32]]:
        """Ids of each text, which is given in parts, best of `cut_at_space`: every part is taken as a text of its own.

        Raises UnicodeEncodeError for half a surrogate pair.
        """
        found = chain.from_iterable(map(self._encode_chunk, _chunks(chain.from_iterable(texts))))
        return [np.concatenate([np.empty(0, np.int32), *(next(found) for _ in parts)]) for parts in texts]

    def _encode_chunk(self, texts: list[str]) -> list[NDArray[np.int32]]:
        if len(self._numbers) > REMEMBERED:
            self._forget()
        joined = "\0".join([*texts, ""])
        codes = np.frombuffer(bytearray(joined.encode("utf-32-le")), np.uint32)
        if self._whole:  # only now: whoever encodes them, half a surrogate pair is told above
            self._whole -= 1
            return [np.array(ids, np.int32) for ids in self._encode(texts)]
        ends = np.cumsum([len(text) + 1 for text in texts]) - 1
        codes[ends] = END_CODE
        kinds = self._kinds_of(codes)
        starts = np.flatnonzero(self._splitter.begins(codes, kinds))
        lengths = np.diff(starts, append=len(codes))
        kept = kinds[starts] > BLANK
        starts, lengths = starts[kept], lengths[kept]

        before = self._met
        entries = self._look_up(joined, codes, starts, lengths)
        if self._apart and len(joined) >= CHUNK and self._met - before > NEW * len(joined):
            self._whole = WHOLE
        borders = np.frombuffer(self._borders, np.int64)
        first = borders[entries]
        done = np.concatenate([[0], np.cumsum(borders[entries + 1] - first)])
        places = np.repeat(first - done[:-1], np.diff(done)) + np.arange(done[-1])
        ids = np.frombuffer(self._ids, np.int32)[places]
        return np.split(ids, done[np.searchsorted(starts, ends[:-1])])

    def _kinds_of(self, codes: Codes) -> Kinds:
        kinds = self._kinds.take(codes)
        if (unknown := kinds == UNKNOWN).any():
            for code in np.unique(codes[unknown]).tolist():
                self._kinds[code] = self._splitter.kind(chr(code))
            kinds = self._kinds.take(codes)
        return kinds

    def _look_up(
        self, joined: str, codes: Codes, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.int32]:
        """The entry of each word, made where it is a new one."""
        if not len(starts):
            return np.empty(0, np.int32)
        narrow = np.zeros(len(codes) + WIDTH, np.uint8)
        narrow[: len(codes)] = codes
        # Every character begins a window of 16; those of the words, zero after their ends, are the keys.
        windows = np.ndarray(len(codes), "V16", narrow, strides=(1,))
        low, high = (windows[starts].view("<u8").reshape(-1, 2) & MASKS.take(np.minimum(lengths, WIDTH), 0)).T
        slots = ((low * FACTORS[0] + high * FACTORS[1]) >> np.uint64(64 - SLOT_BITS)).astype(np.int64)
        has_key = lengths <= WIDTH
        wide = np.flatnonzero((codes == 0) | (codes > 255))
        at = np.searchsorted(starts, wide, side="right") - 1
        has_key[at[wide < starts[at] + lengths[at]]] = False  # those of no word are ends and blanks
        entries: NDArray[np.int32] = self._entries[slots]
        missing = np.flatnonzero((self._keys[0][slots] != low) | (self._keys[1][slots] != high) | ~has_key)
        if len(missing):
            spans = zip(starts[missing].tolist(), (starts + lengths)[missing].tolist(), strict=True)
            entries[missing] = self._numbers_of([joined[begin:end] for begin, end in spans])
            free = missing[has_key[missing] & (self._entries[slots[missing]] == 0)]
            _, one_a_slot = np.unique(slots[free], return_index=True)
            free = free[one_a_slot]
            self._keys[0][slots[free]], self._keys[1][slots[free]] = low[free], high[free]
            self._entries[slots[free]] = entries[free]
        return entries

    def _numbers_of(self, words: list[str]) -> list[int]:
        numbers = self._numbers
        new = [word for word in dict.fromkeys(words) if word not in numbers]
        self._met += sum(map(len, new))
        for word, ids in zip(new, self._encode(new), strict=True):
            numbers[word] = len(self._borders) - 1
            self._ids.extend(ids)
            self._borders.append(len(self._ids))
        return [numbers[word] for word in words]
