"""One tag a word: named entities, parts of speech."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from cairn.config.finetune import TagSection, TaskSection
from cairn.config.schema import FinetuneConfig
from cairn.data.batches import IGNORE, Batch
from cairn.data.conll import read_conll
from cairn.data.corpus import kind_of
from cairn.data.packing import Stream
from cairn.data.tables import Row, value_of
from cairn.data.tokenizer import Tokenizer
from cairn.errors import UserError
from finetune import metrics
from finetune.labelled import number_of, sort_labels
from finetune.task import Example, Output
from finetune.tokens import PerToken, by_row

CHINESE = ("\u3400", "\u9fff")


class Tag(PerToken):
    """Every word is encoded alone, its first piece has its tag. A long sentence becomes windows of whole words.

    Outputs are the numbers of the tags, a word.
    """

    section: TagSection

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.streams = [Stream({"input_ids": tokenizer.pad_id or 0, "segment_ids": 0, "labels": IGNORE, "starts": 0})]
        # Llama's tokenizer puts a space before any text by itself, and would see two.
        self.space = " " if tokenizer.encode("a a") == tokenizer.encode("a") + tokenizer.encode(" a") else ""

    @property
    def metric(self) -> str:  # type: ignore[override]
        """F1 of entities, where there are some."""
        return "f1" if metrics.are_entities(self.section.labels) else "accuracy"

    def rows(self, source: str) -> Iterable[Row]:
        """Sentences of a table, or of CoNLL columns where the file's ending is of no table."""
        data = self.config.data
        if source.startswith("datasets:") or Path(source).is_dir() or kind_of(Path(source)) != "text":
            return super().rows(source)
        names = {"tokens": self.section.tokens, "tags": self.section.tags}
        sentences = read_conll(str(Path(source).expanduser()), tagged=source in (data.train, data.valid))
        return (Row(row.place, {names[key]: value for key, value in row.values.items()}) for row in sentences)

    def texts(self, row: Row) -> list[str]:
        """The sentence."""
        words = self.words(row)
        return [self.joined(words)]

    def words(self, row: Row) -> list[str]:
        """The words of a row. Raises UserError where they are no list of texts."""
        return _strings(row, self.section.tokens, "task.tokens")

    def joined(self, words: Sequence[str]) -> str:
        """Words as running text."""
        spaces = have_spaces(words) if self.section.spaces is None else self.section.spaces
        return (" " if spaces else "").join(words)

    def learn(self, rows: Sequence[Row]) -> TaskSection:
        """The tags of the training rows, and whether words have spaces between them."""
        found = Counter(chain.from_iterable(self._tags(row) for row in rows))
        labels = self.section.labels or sort_labels(found)
        if len(found) < 2 or len(labels) < 2:
            raise UserError(f"{self.config.data.train}: one tag ({next(iter(found))!r}): give examples of two or more")
        spaces = self.section.spaces
        if spaces is None:
            spaces = have_spaces(chain.from_iterable(self.words(row) for row in rows))
        self.section = self.section.model_copy(update={"labels": labels, "spaces": spaces})
        return self.section

    def labelled(self, rows: Sequence[Row]) -> bool:
        """Whether there are tags."""
        return self.section.tags in rows[0].values

    def encode(self, rows: Sequence[Row], labelled: bool = True) -> list[Example]:
        """Windows of sentences."""
        sentences = [self._spaced(self.words(row)) for row in rows]
        words = list(dict.fromkeys(chain.from_iterable(sentences)))
        unknown = [self.frame.end if self.tokenizer.unk_id is None else self.tokenizer.unk_id]
        room = self.max_len - self.frame.special(1)
        # Of a word that is wider than a window, what is not first makes no difference to where its tag is.
        ids = {w: (i or unknown)[:room] for w, i in zip(words, self.tokenizer.encode_batch(words), strict=True)}
        examples = []
        for row, sentence in zip(rows, sentences, strict=True):
            pieces = [ids[word] for word in sentence]
            labels = self._numbers(row) if labelled else [IGNORE] * len(pieces)
            for start, stop in windows([len(piece) for piece in pieces], room):
                examples.append(self._example(row, pieces[start:stop], labels[start:stop]))
        return examples

    def _example(self, row: Row, pieces: Sequence[list[int]], labels: Sequence[int]) -> Example:
        item = self.frame([list(chain.from_iterable(pieces))])
        sizes = np.array([len(self.frame.begin), *map(len, pieces)])
        places = sizes.cumsum()[:-1]
        item["labels"] = np.full(len(item["input_ids"]), IGNORE, dtype=np.int64)
        item["starts"] = np.zeros_like(item["labels"])
        item["labels"][places], item["starts"][places] = labels, 1
        return Example(row.place, item, row.values)

    def _spaced(self, words: list[str]) -> list[str]:
        """Words with what stands before them in running text."""
        if not self.section.spaces:
            return words
        return [words[0], *(self.space + word for word in words[1:])]

    def _tags(self, row: Row) -> list[str]:
        words, tags = self.words(row), _strings(row, self.section.tags, "task.tags")
        if len(words) != len(tags):
            raise UserError(f"{row.place}: {len(words)} words and {len(tags)} tags: give every word its tag")
        return tags

    def _numbers(self, row: Row) -> list[int]:
        numbers = {tag: n for n, tag in enumerate(self.section.labels)}
        tags = self._tags(row)
        for n, (word, tag) in enumerate(zip(self.words(row), tags, strict=True), 1):
            if tag not in numbers:
                place = f"{row.place}, word {n} ({word})"
                number_of(tag, self.section.labels, Row(place, row.values), self.section.tags)
        return [numbers[tag] for tag in tags]

    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Negative log likelihood of the tags, in nats."""
        flat, labels = outputs.flatten(0, 1), batch["labels"].flatten()
        return {"loss": F.cross_entropy(flat, labels, ignore_index=IGNORE, reduction="sum")}

    def split(self, outputs: Tensor, batch: Batch) -> list[Output]:
        """(W,) the likeliest tag of each word."""
        chosen = super().split(outputs.argmax(-1), batch)
        starts = super().split(batch["starts"], batch)
        return [tags[begins > 0] for tags, begins in zip(chosen, starts, strict=True)]

    def measure(self, examples: Sequence[Example], outputs: Sequence[Output]) -> dict[str, float]:
        """Share of words with the right tag; of entities precision, recall and F1."""
        true, predicted = [], []
        for sentence in by_row(examples, outputs):
            found = np.concatenate([example.item["labels"] for example, _ in sentence])
            true.append([self.section.labels[n] for n in found[found != IGNORE]])
            predicted.append(self._names(sentence))
        return metrics.tagging(true, predicted, metrics.are_entities(self.section.labels))

    def predict(self, examples: Sequence[Example], outputs: Sequence[Output]) -> Iterator[dict[str, Any]]:
        """A tag a word, and the entities: `start` and `end` count words from 0, the end is behind the last."""
        for sentence in by_row(examples, outputs):
            words, tags = sentence[0][0].row[self.section.tokens], self._names(sentence)
            found: dict[str, Any] = {"prediction": tags}
            if metrics.are_entities(self.section.labels):
                found["entities"] = [
                    {"type": kind, "start": start, "end": end, "text": self.joined(words[start:end])}
                    for kind, start, end in metrics.entities(tags)
                ]
            yield found

    def _names(self, sentence: Sequence[tuple[Example, Output]]) -> list[str]:
        return [self.section.labels[n] for _, tags in sentence for n in tags]


def have_spaces(words: Iterable[str]) -> bool:
    """Whether running text has spaces between such words: not where most are single Chinese characters."""
    single = [len(word) == 1 and CHINESE[0] <= word <= CHINESE[1] for word in words]
    return sum(single) * 2 <= len(single)


def windows(sizes: Sequence[int], room: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of words whose pieces fit into the room together, each word in one."""
    start = used = 0
    for n, size in enumerate(sizes):
        if used + size > room:
            yield start, n
            start, used = n, 0
        used += size
    yield start, len(sizes)


def _strings(row: Row, column: str, key: str) -> list[str]:
    values = value_of(row, column, key)
    if not isinstance(values, list):
        raise UserError(
            f"{row.place}: column {column!r} has no list but a {type(values).__name__}; set {key}, "
            "or give the file the ending .conll if it has a word and its tag a line"
        )
    if not values:
        raise UserError(f"{row.place}: column {column!r} is empty: remove the row or fill it in")
    for value in values:
        if not isinstance(value, str | int) or value == "":
            raise UserError(f"{row.place}: column {column!r} has {value!r} in its list: give every word text and a tag")
    return [str(value) for value in values]
