"""A text or a pair of texts and its label: classes, numbers, sets of classes."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cairn.config.finetune import ClassifySection, LabelledText, MultilabelSection, RegressSection, TaskSection
from cairn.config.schema import FinetuneConfig
from cairn.data.batches import IGNORE, Batch
from cairn.data.tables import Row, text_of, value_of
from cairn.data.tokenizer import Tokenizer
from cairn.errors import UserError
from cairn.train.engine import Engine
from finetune import metrics
from finetune.task import Example, Finetune, Output
from finetune.texts import Frame


class Labelled(Finetune):
    """What the three share: framing texts, and an output each."""

    section: TaskSection
    nothing: ClassVar[Any] = IGNORE
    """The label of an example that has none."""

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        assert config.model is not None
        self.frame = Frame(tokenizer, config.model, config.base.path)

    @property
    def columns(self) -> list[str]:
        """Of the texts."""
        assert isinstance(self.section, LabelledText)
        return [self.section.text] + ([self.section.text_pair] if self.section.text_pair else [])

    def texts(self, row: Row) -> list[str]:
        """One or two."""
        keys = ("task.text", "task.text_pair")
        return [text_of(row, column, key) for column, key in zip(self.columns, keys, strict=False)]

    def label(self, row: Row) -> Any:
        """The row's label as an array. Raises UserError naming file and line of one that is none."""
        raise NotImplementedError

    def encode(self, rows: Sequence[Row], labelled: bool = True) -> list[Example]:
        """Texts in their frame, cut to fit it."""
        texts = [self.texts(row) for row in rows]
        ids = iter(self.tokenizer.encode_batch(list(chain.from_iterable(texts))))
        examples = []
        for row, parts in zip(rows, texts, strict=True):
            encoded = [next(ids) for _ in parts]
            fitted = self.fit(row.place, *encoded, room=self.max_len - self.frame.special(len(parts)))
            label = self.label(row) if labelled else np.array(self.nothing)
            examples.append(Example(row.place, self.frame(fitted) | {"labels": label}, row.values))
        return examples

    def forward(self, model: nn.Module | Engine, batch: Batch) -> Tensor:
        """(B, K) outputs."""
        keys = ("input_ids", "segment_ids", "document_ids", "positions", "first", "last")
        outputs: Tensor = model(*(batch[key] for key in keys))
        return outputs.float()


class Classify(Labelled):
    """One class a text: cross-entropy."""

    metric = "accuracy"
    section: ClassifySection

    def learn(self, rows: Sequence[Row]) -> TaskSection:
        """The classes of the training rows, and their weights."""
        found = Counter(self._class(row) for row in rows)
        labels = self.section.labels or sort_labels(found)
        if len(found) < 2 or len(labels) < 2:
            only = f"all rows have {self.section.label} {next(iter(found))!r}" if found else "there is none"
            raise UserError(f"{self.config.data.train}: one class ({only}): give examples of two classes or more")
        self.section = self.section.model_copy(update={"labels": labels})
        if self.section.class_weights == "balanced":
            mean = sum(found.values()) / len(labels)
            self.class_weights = [mean / max(found[label], 1) for label in labels]
        return self.section

    def label(self, row: Row) -> NDArray[np.int64]:
        """The number of its class."""
        return np.array(number_of(self._class(row), self.section.labels, row, self.section.label), dtype=np.int64)

    def _class(self, row: Row) -> str:
        return label_text(row, self.section.label)

    def weights(self, batch: Batch) -> dict[str, float]:
        """Weights of the examples."""
        labels = batch["labels"]
        return {"loss": float(self._weights(labels)[labels.clamp(min=0)][labels != IGNORE].sum())}

    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Negative log likelihood of the classes, in nats."""
        labels = batch["labels"]
        weight = self._weights(labels).to(outputs.dtype)
        return {"loss": F.cross_entropy(outputs, labels, weight, ignore_index=IGNORE, reduction="sum")}

    def _weights(self, like: Tensor) -> Tensor:
        weights = getattr(self, "class_weights", None) or [1.0] * len(self.section.labels)
        return torch.tensor(weights, device=like.device)

    def measure(self, examples: Sequence[Example], outputs: Sequence[Output]) -> dict[str, float]:
        """Accuracy, F1 and Matthews correlation."""
        return metrics.classification(_stack(examples), np.stack(outputs).argmax(1), len(self.section.labels))

    def predict(self, examples: Sequence[Example], outputs: Sequence[Output]) -> Iterator[dict[str, Any]]:
        """The likeliest class and its probability."""
        for probs in _softmax(np.stack(outputs)):
            best = int(probs.argmax())
            yield {"prediction": self.section.labels[best], "probability": round(float(probs[best]), 6)}


class Regress(Labelled):
    """A number: mean squared error."""

    metric = "spearman"
    section: RegressSection
    nothing = np.float32(IGNORE)

    def label(self, row: Row) -> NDArray[np.float32]:
        """The number."""
        value = value_of(row, self.section.label, "task.label")
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not np.isfinite(number):
            raise UserError(f"{row.place}: {self.section.label} {value!r} is no number: mend it or remove the row")
        return np.array(number, dtype=np.float32)

    def learn(self, rows: Sequence[Row]) -> TaskSection:
        """Nothing but that the numbers differ."""
        if len({float(self.label(row)) for row in rows}) < 2:
            raise UserError(
                f"{self.config.data.train}: every {self.section.label} is the same number: nothing to learn"
            )
        return self.section

    def weights(self, batch: Batch) -> dict[str, float]:
        """Examples."""
        return {"loss": float((batch["example_label"] != IGNORE).sum())}

    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Squared errors."""
        errors = (outputs[:, 0] - batch["labels"]).square()
        return {"loss": errors.masked_fill(batch["example_label"] == IGNORE, 0.0).sum()}

    def measure(self, examples: Sequence[Example], outputs: Sequence[Output]) -> dict[str, float]:
        """Pearson and Spearman correlation."""
        return metrics.regression(_stack(examples), np.stack(outputs)[:, 0])

    def predict(self, examples: Sequence[Example], outputs: Sequence[Output]) -> Iterator[dict[str, Any]]:
        """The number."""
        return ({"prediction": round(float(output[0]), 6)} for output in outputs)


class Multilabel(Labelled):
    """Any number of classes: a binary cross-entropy each."""

    metric = "f1_micro"
    section: MultilabelSection

    def learn(self, rows: Sequence[Row]) -> TaskSection:
        """The classes of the training rows."""
        found = Counter(chain.from_iterable(self._classes(row) for row in rows))
        labels = self.section.labels or sort_labels(found)
        if not labels:
            raise UserError(f"{self.config.data.train}: no row has a class in {self.section.label}: nothing to learn")
        self.section = self.section.model_copy(update={"labels": labels})
        return self.section

    def _classes(self, row: Row) -> list[str]:
        value = value_of(row, self.section.label, "task.label")
        parts = value if isinstance(value, list) else str(value or "").split(self.section.delimiter)
        return [text for part in parts if (text := str(part).strip())]

    def label(self, row: Row) -> NDArray[np.float32]:
        """(K,) 1 where a class is there."""
        out = np.zeros(len(self.section.labels), dtype=np.float32)
        for name in self._classes(row):
            out[number_of(name, self.section.labels, row, self.section.label)] = 1
        return out

    def encode(self, rows: Sequence[Row], labelled: bool = True) -> list[Example]:
        """As others."""
        self.nothing = np.full(len(self.section.labels), IGNORE, dtype=np.float32)
        return super().encode(rows, labelled)

    def weights(self, batch: Batch) -> dict[str, float]:
        """Examples times classes."""
        return {"loss": float((batch["labels"] >= 0).sum())}

    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Negative log likelihood of every class being there or not."""
        labels = batch["labels"]
        each = F.binary_cross_entropy_with_logits(outputs, labels.clamp(min=0), reduction="none")
        return {"loss": each.masked_fill(labels < 0, 0.0).sum()}

    def measure(self, examples: Sequence[Example], outputs: Sequence[Output]) -> dict[str, float]:
        """F1, and the share of examples with all classes right."""
        return metrics.multilabel(_stack(examples) > 0, self._there(outputs))

    def predict(self, examples: Sequence[Example], outputs: Sequence[Output]) -> Iterator[dict[str, Any]]:
        """The classes that are there, and the probability of each."""
        for probs, there in zip(_sigmoid(np.stack(outputs)), self._there(outputs), strict=True):
            names = [name for name, yes in zip(self.section.labels, there, strict=True) if yes]
            scores = dict(zip(self.section.labels, (round(float(p), 6) for p in probs), strict=True))
            yield {"prediction": names, "probability": scores}

    def _there(self, outputs: Sequence[Output]) -> NDArray[np.bool_]:
        there: NDArray[np.bool_] = _sigmoid(np.stack(outputs)) >= self.section.threshold
        return there


def label_text(row: Row, column: str) -> str:
    """A label as text: `1`, 1 and 1.0 are one class. Raises UserError for an empty one."""
    value = value_of(row, column, "task.label")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip() if value is not None else ""
    if not text:
        raise UserError(f"{row.place}: {column} is empty: give the row a label or remove it")
    return text


def sort_labels(found: Iterable[str]) -> list[str]:
    """Numbers by value, else by name."""
    labels = list(found)
    numbers = all(label.lstrip("-").isdigit() for label in labels)
    return sorted(labels, key=(lambda label: (int(label), label)) if numbers else (lambda label: (0, label)))


def number_of(label: str, labels: Sequence[str], row: Row, column: str) -> int:
    """The place of a label. Raises UserError for one that training never saw."""
    if label not in labels:
        some = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
        raise UserError(
            f"{row.place}: {column} {label!r} is not among the labels of training ({some}): "
            "mend it, remove the row, or list it in task.labels"
        )
    return labels.index(label)


def _stack(examples: Sequence[Example]) -> NDArray[Any]:
    return np.stack([example.item["labels"] for example in examples])


def _softmax(x: NDArray[Any]) -> NDArray[Any]:
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    out: NDArray[Any] = e / e.sum(-1, keepdims=True)
    return out


def _sigmoid(x: NDArray[Any]) -> NDArray[Any]:
    out: NDArray[Any] = 0.5 * (1 + np.tanh(x.astype(np.float64) / 2))
    return out
