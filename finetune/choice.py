"""Which of several texts goes with a first one."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cairn.config.finetune import ChoiceSection
from cairn.data.batches import IGNORE, Batch, Item
from cairn.data.packing import pack
from cairn.data.tables import Row, text_of, value_of
from cairn.errors import UserError
from finetune.labelled import Labelled
from finetune.task import Example, Output


class Choice(Labelled):
    """The text with each choice gets a score; a softmax over those of an example.

    An item has the tokens of all of them, one after another, and the choice that each is of. In a batch each is a text
    of its own, and `choices` (B, M) has the texts of an example, -1 where it has fewer than others.
    """

    metric = "accuracy"
    section: ChoiceSection

    def texts(self, row: Row) -> list[str]:
        """The text and the choices."""
        return [text_of(row, self.section.text, "task.text"), *self.choices(row)]

    def choices(self, row: Row) -> list[str]:
        """Two or more. Raises UserError where they are not there."""
        columns = self.section.choices
        if len(columns) > 1:
            return [text_of(row, column, "task.choices") for column in columns]
        values = value_of(row, columns[0], "task.choices")
        if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
            raise UserError(
                f"{row.place}: column {columns[0]!r} has no list of texts; set task.choices to the column that has it, "
                "or to the columns of the choices"
            )
        if len(values) < 2:
            raise UserError(f"{row.place}: column {columns[0]!r} has {len(values)} choices: give two or more")
        return values

    def label(self, row: Row) -> NDArray[np.int64]:
        """The number of the right choice."""
        value, choices = value_of(row, self.section.label, "task.label"), self.choices(row)
        if isinstance(value, str) and value in choices:
            return np.array(choices.index(value), dtype=np.int64)
        text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
        if isinstance(value, bool) or not text.isdecimal() or int(text) >= len(choices):
            raise UserError(
                f"{row.place}: {self.section.label} {value!r} is none of the {len(choices)} choices: "
                f"give its number, 0 to {len(choices) - 1}, or its text"
            )
        return np.array(int(text), dtype=np.int64)

    def encode(self, rows: Sequence[Row], labelled: bool = True) -> list[Example]:
        """The text with each choice, in their frame and cut to fit it."""
        texts = [self.texts(row) for row in rows]
        ids = iter(self.tokenizer.encode_batch(list(chain.from_iterable(texts))))
        room = self.max_len - self.frame.special(2)
        examples = []
        for row, parts in zip(rows, texts, strict=True):
            text, *choices = [next(ids) for _ in parts]
            framed = [self.frame(self.fit(row.place, text, choice, room=room)) for choice in choices]
            item = {key: np.concatenate([one[key] for one in framed]) for key in framed[0]}
            item["choice"] = np.repeat(np.arange(len(framed)), [len(one["input_ids"]) for one in framed])
            item["labels"] = self.label(row) if labelled else np.array(IGNORE)
            examples.append(Example(row.place, item, row.values))
        return examples

    def collate(self, items: Sequence[Item]) -> Batch:
        """Texts side by side in rows."""
        texts = [list(divide(item, self.streams[0].fill)) for item in items]
        batch = pack(list(chain.from_iterable(texts)), self.streams)
        choices = torch.full((len(items), max(map(len, texts))), -1)
        count = 0
        for row, parts in zip(choices, texts, strict=True):
            row[: len(parts)] = torch.arange(count, count + len(parts))
            count += len(parts)
        whole = {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in ("labels", "example_label")}
        return batch | whole | {"choices": choices}

    def scores(self, outputs: Tensor, batch: Batch) -> Tensor:
        """(B, M), of no choice minus infinity."""
        choices = batch["choices"]
        return outputs[:, 0][choices.clamp(min=0)].masked_fill(choices < 0, float("-inf"))

    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Negative log likelihood of the right choices, in nats."""
        scores = self.scores(outputs, batch)
        return {"loss": F.cross_entropy(scores, batch["labels"], ignore_index=IGNORE, reduction="sum")}

    def split(self, outputs: Tensor, batch: Batch) -> list[Output]:
        """A score each choice."""
        there = (batch["choices"] >= 0).cpu().numpy()
        return [row[own] for row, own in zip(self.scores(outputs, batch).cpu().numpy(), there, strict=True)]

    def measure(self, examples: Sequence[Example], outputs: Sequence[Output]) -> dict[str, float]:
        """Share of examples with the right choice."""
        right = [output.argmax() == example.item["labels"] for example, output in zip(examples, outputs, strict=True)]
        return {"accuracy": float(np.mean(right))}

    def predict(self, examples: Sequence[Example], outputs: Sequence[Output]) -> Iterator[dict[str, Any]]:
        """The number of the likeliest choice, its text, and the probability of each."""
        for example, output in zip(examples, outputs, strict=True):
            probs = np.exp(output - np.logaddexp.reduce(output))
            best = int(output.argmax())
            text = self.choices(Row(example.place, example.row))[best]
            yield {"prediction": best, "text": text, "probability": [round(float(p), 6) for p in probs]}


def divide(item: Item, keys: Sequence[str]) -> Iterator[Item]:
    """The texts of an item."""
    borders = np.flatnonzero(np.diff(item["choice"])) + 1
    parts = {key: np.split(item[key], borders) for key in keys}
    return ({key: parts[key][n] for key in keys} for n in range(len(borders) + 1))
