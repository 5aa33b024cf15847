"""Questions whose answer is a span of a context, as in SQuAD 1.1 and 2.0."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cairn.config.finetune import AnswerSection, TaskSection
from cairn.config.schema import FinetuneConfig
from cairn.data.batches import IGNORE, Batch
from cairn.data.packing import spans
from cairn.data.squad import read_squad
from cairn.data.tables import Row
from cairn.data.tokenizer import Tokenizer
from cairn.errors import UserError
from finetune import metrics
from finetune.task import Example, Output, flat
from finetune.tokens import PerToken, by_row

Places = NDArray[np.int32]
"""(N, 2) characters [begin, end) of tokens."""


@dataclass(frozen=True)
class Window(Example):
    """A question and a part of its context."""

    places: Places
    """Characters of the context that its tokens here stand for."""
    before: int
    """Tokens before these."""


class Span(NamedTuple):
    """A possible answer."""

    score: float
    """Logarithm of its probability in its window."""
    text: str
    start: int | None
    """First character; of no answer None."""


class Answer(PerToken):
    """A softmax over the tokens of a window says where the answer begins, another where it ends; where the window has
    none, that is [CLS], or a decoder's last token."""

    metric = "f1"
    section: AnswerSection

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        room = self.max_len - self.frame.special(2) - self.section.max_question_len
        if room <= self.section.stride:
            raise UserError(
                f"task.stride {self.section.stride}: beside a question of {self.section.max_question_len} tokens a "
                f"window of data.max_len {self.max_len} has {max(room, 0)} of the context, which must be more than two "
                "windows share: lower task.stride or task.max_question_len, or raise data.max_len"
            )

    def rows(self, source: str) -> Iterable[Row]:
        """Questions of SQuAD's JSON."""
        data = self.config.data
        return read_squad(str(Path(source).expanduser()), answered=source in (data.train, data.valid))

    def texts(self, row: Row) -> list[str]:
        """Question and context."""
        return [row.values["question"], row.values["context"]]

    def learn(self, rows: Sequence[Row]) -> TaskSection:
        """Whether questions may have no answer."""
        if self.section.no_answer is None:
            found = any(row.values["is_impossible"] for row in rows)
            self.section = self.section.model_copy(update={"no_answer": found})
        return self.section

    def labelled(self, rows: Sequence[Row]) -> bool:
        """Whether all questions have answers, or are said to have none."""
        return all("answers" in row.values for row in rows)

    def encode(self, rows: Sequence[Row], labelled: bool = True) -> list[Example]:
        """Windows of the contexts, each behind its question."""
        questions = self.tokenizer.encode_batch([row.values["question"] for row in rows])
        examples: list[Example] = []
        text, ids = None, list[int]()
        places: Places = np.empty((0, 2), dtype=np.int32)
        for row, question in zip(rows, questions, strict=True):
            if row.values["context"] != text:  # a context comes with all its questions
                text = row.values["context"]
                ids, offsets = self.tokenizer.encode_offsets(text)
                places = np.array(offsets, dtype=np.int32).reshape(-1, 2)
            question = self._fit(row, question)
            size = self.max_len - self.frame.special(2) - len(question)
            found = tokens_of(row.values, places) if labelled else None
            for start in range(0, max(1, len(ids) - self.section.stride), size - self.section.stride):
                item = self.frame([question, ids[start : start + size]])
                before = len(self.frame.begin) + len(question) + 1
                ends = (self._none(len(item["input_ids"])),) * 2 if labelled else (IGNORE, IGNORE)
                if found is not None and start <= found[0] and found[1] < start + size:
                    ends = found[0] - start + before, found[1] - start + before
                item |= {"start_label": np.array(ends[0]), "end_label": np.array(ends[1])}
                examples.append(Window(row.place, item, row.values, places[start : start + size], before))
        return examples

    def _none(self, length: int) -> int:
        return 0 if self.frame.begin else length - 1

    def _fit(self, row: Row, question: list[int]) -> list[int]:
        most = self.section.max_question_len
        if len(question) > most:
            if self.config.data.too_long == "error":
                raise UserError(
                    f"{row.place}: the question has {len(question)} tokens: shorten it, raise task.max_question_len "
                    f"({most}), or set data.too_long=cut"
                )
            self.cut.append((row.place, len(question)))
        return question[:most]

    def told_of_cuts(self, split: str, total: int) -> list[str]:
        """A warning where questions were cut."""
        if not self.cut:
            return []
        most, place = self.section.max_question_len, self.cut[0][0]
        return [
            f"warning: {split}: {len(self.cut):,} of {total:,} questions are longer than task.max_question_len {most} "
            f"and are cut (such as {place}); data.too_long=error refuses them"
        ]

    def weights(self, batch: Batch) -> dict[str, float]:
        """Windows."""
        return {"loss": float((batch["start_label"] != IGNORE).sum())}

    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Negative log likelihood of the first and the last token, in nats, halved."""
        places, there = spans(batch["first"], batch["last"])
        logits = flat(outputs, places).masked_fill(~there[..., None], float("-inf"))
        losses = [
            F.cross_entropy(logits[..., n], batch[key], ignore_index=IGNORE, reduction="sum")
            for n, key in enumerate(("start_label", "end_label"))
        ]
        return {"loss": (losses[0] + losses[1]) / 2}

    def measure(self, examples: Sequence[Example], outputs: Sequence[Output]) -> dict[str, float]:
        """Exact match and F1, as SQuAD's scorer has them."""
        answers, texts = [], []
        for windows in by_row(examples, outputs):
            answers.append(windows[0][0].row["answers"])
            texts.append(self._best(windows)[0].text)
        return metrics.answering(answers, texts)

    def predict(self, examples: Sequence[Example], outputs: Sequence[Output]) -> Iterator[dict[str, Any]]:
        """The answer as the context has it, "" for none; `start` counts its characters from 0."""
        for windows in by_row(examples, outputs):
            found = [
                {"text": span.text, "start": span.start, "probability": round(float(np.exp(span.score)), 6)}
                for span in self._best(windows)
            ]
            first = found[0]
            yield {"prediction": first["text"], **{k: first[k] for k in ("start", "probability")}, "n_best": found}

    def _best(self, windows: Sequence[tuple[Example, Output]]) -> list[Span]:
        """The best answers of a question, the one to give first. There is one at least."""
        found: dict[tuple[int | None, str], Span] = {}
        without = 0.0  # that there is no answer is as sure as the window that doubts it most
        for window, output in windows:
            assert isinstance(window, Window)
            log_probs = output - np.logaddexp.reduce(output, axis=0, dtype=np.float64)
            without = min(without, float(log_probs[self._none(len(output))].sum()))
            for span in candidates(window, log_probs, self.section):
                key = (span.start, span.text)
                found[key] = max(span, found.get(key, span), key=lambda one: one.score)
        best = sorted(found.values(), key=lambda span: -span.score)[: self.section.n_best]
        none = Span(without, "", None)
        if not self.section.no_answer:
            return best or [none]
        first = not best or without + self.section.no_answer_bias > best[0].score
        return [none, *best] if first else [*best, none]


def tokens_of(row: dict[str, Any], places: Places) -> tuple[int, int] | None:
    """First and last token of a question's first answer; None where there is none."""
    if not row["answers"]:
        return None
    begin, end = row["starts"][0], row["starts"][0] + len(row["answers"][0])
    inside = np.flatnonzero((places[:, 0] < end) & (places[:, 1] > begin))
    return (int(inside[0]), int(inside[-1])) if len(inside) else None


def candidates(window: Window, log_probs: Output, section: AnswerSection) -> Iterator[Span]:
    """The likeliest spans of a window's context, at most max_answer_len tokens long."""
    size = len(window.places)
    own = log_probs[window.before : window.before + size]
    first = np.arange(size)[:, None]
    last = first + np.arange(min(section.max_answer_len, size))
    scores = np.where(last < size, own[first, 0] + own[np.minimum(last, size - 1), 1], -np.inf).ravel()
    context = window.row["context"]
    for place in np.argsort(-scores, kind="stable")[: section.n_best]:
        a, b = place // last.shape[1], last.ravel()[place]
        if b < size:
            begin, end = window.places[a, 0], window.places[b, 1]
            if text := context[begin:end].strip():
                yield Span(float(scores[place]), text, int(begin) + context[begin:end].index(text))
