"""What every fine-tuning task shares: examples from files, packed batches, outputs gathered over ranks, metrics."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from cairn.config.finetune import TaskSection
from cairn.config.schema import FinetuneConfig
from cairn.data.batches import IGNORE, Batch, Item, Samples
from cairn.data.order import MASK, Order, mix
from cairn.data.packing import Stream, pack
from cairn.data.tables import Row, read_table
from cairn.data.tokenizer import Tokenizer
from cairn.errors import UserError
from cairn.models.build import flops_per_token, padded_vocab
from cairn.train.engine import Engine
from cairn.train.run import build_network
from cairn.train.task import Engines, LossTask, evaluating, sum_over_ranks, to_device
from finetune.start import Start

Output = NDArray[Any]


@dataclass(frozen=True)
class Example:
    """A text, or several, with its label."""

    place: str
    """Where it comes from: `file: line 7`."""
    item: Item
    """What the model reads, and its labels."""
    row: dict[str, Any]
    """What it was made of."""


class Examples:
    """Examples as samples: of "train" endless and shuffled by the seed, else in their order."""

    def __init__(
        self, examples: Sequence[Example], collate: Callable[[Sequence[Item]], Batch], seed: int | None
    ) -> None:
        self.examples, self.collate = examples, collate
        self._order = Order(len(examples), seed) if seed is not None and examples else None

    def __len__(self) -> int:
        return len(self.examples)

    def number(self, k: int) -> int:
        """The example of sample k."""
        return k if self._order is None else self._order[k]

    def item(self, k: int) -> Item:
        """Sample k; example_label is the number of its example."""
        number = self.number(k)
        return self.examples[number].item | {"example_label": np.array(number, dtype=np.int64)}


class Finetune(LossTask):
    """A task on labelled examples. Subclasses say how a row becomes an example, the loss, the metrics, a prediction."""

    metric: ClassVar[str]
    """What the best checkpoint is chosen by, where select.metric is empty."""
    unit: ClassVar[str] = "examples"

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        """`config` has its model. Raises UserError when the tokenizer lacks a token that the task needs."""
        assert config.model is not None
        self.config, self.tokenizer = config, tokenizer
        self.section: TaskSection = config.task
        self.max_len = config.data.max_len or config.model.max_seq_len
        if self.max_len > config.model.max_seq_len and getattr(config.model, "position", "") == "learned":
            raise UserError(f"data.max_len {self.max_len} is more than model.max_seq_len {config.model.max_seq_len}")
        self.streams = [Stream({"input_ids": tokenizer.pad_id or 0, "segment_ids": 0})]
        self.cut: list[tuple[str, int]] = []
        """Place and tokens of the texts that were longer than `max_len`."""
        self.examples: dict[str, list[Example]] = {}
        self.notes: list[str] = []
        """What is worth telling about the examples."""

    # What a task says.

    def rows(self, source: str) -> Iterable[Row]:
        """Rows of data.train or data.valid. Raises UserError naming file and line."""
        return read_table(source, self.config.data)

    def texts(self, row: Row) -> list[str]:
        """The texts of a row, which a tokenizer may be trained on."""
        raise NotImplementedError

    def learn(self, rows: Sequence[Row]) -> TaskSection:
        """The section with what only the training rows say, such as the labels."""
        return self.section

    def labelled(self, rows: Sequence[Row]) -> bool:
        """Whether rows that are to be predicted have labels, so that predictions can be judged."""
        label = getattr(self.section, "label", None)
        return label in rows[0].values

    def encode(self, rows: Sequence[Row], labelled: bool = True) -> list[Example]:
        """Rows as examples; a row may be several. Without labels, all of them are IGNORE."""
        raise NotImplementedError

    def collate(self, items: Sequence[Item]) -> Batch:
        """Items side by side in rows."""
        return pack(items, self.streams)

    def forward(self, model: nn.Module | Engine, batch: Batch) -> Tensor:
        """The model's outputs."""
        raise NotImplementedError

    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Summed loss of each term, in fp32."""
        raise NotImplementedError

    def split(self, outputs: Tensor, batch: Batch) -> list[Output]:
        """What `measure` and `predict` need of each sample in the batch."""
        return list(outputs.float().cpu().numpy())

    def outputs(self, model: nn.Module, batch: Batch) -> list[Output]:
        """The same, of a batch that nothing else is asked of."""
        return self.split(self.forward(model, batch), batch)

    def measure(self, examples: Sequence[Example], outputs: Sequence[Output]) -> dict[str, float]:
        """Metrics of all held-out examples."""
        raise NotImplementedError

    def predict(self, examples: Sequence[Example], outputs: Sequence[Output]) -> Iterator[dict[str, Any]]:
        """What is predicted of each row: columns beside its own."""
        raise NotImplementedError

    # What is the same for all.

    def load(self, start: Start) -> None:
        """Read the examples and settle what depends on them. Raises UserError naming file and line."""
        self.start = start
        data = self.config.data
        train = self._rows_of(data.train)
        self.section = self.learn(train)
        if data.valid is not None:
            valid = self._rows_of(data.valid)
        else:  # by number and not by seed: runs of several seeds are judged by the same examples
            held = [mix(0x7E57, n) / MASK < data.held_out for n in range(len(train))]
            valid = [row for row, out in zip(train, held, strict=True) if out]
            train = [row for row, out in zip(train, held, strict=True) if not out]
            if not train or not valid:
                raise UserError(
                    f"{data.train}: data.held_out leaves {len(train)} rows to train on and {len(valid)} to judge by: "
                    "give more rows, or a file of its own as data.valid"
                )
        for split, rows in (("train", train), ("valid", valid)):
            self.cut = []
            self.examples[split] = self.encode(rows)
            self.notes += self.told_of_cuts(split, len(rows))
        self.config = settled(self.config, self.section, len(self.examples["train"]), self.metric)

    def _rows_of(self, source: str) -> list[Row]:
        """All of a file's. Raises UserError where there is none."""
        rows = list(self.rows(source))
        if not rows:
            raise UserError(f"{source}: no examples: give a file that has rows")
        return rows

    @property
    def sizes(self) -> dict[str, int]:
        """Examples by split."""
        return {split: len(examples) for split, examples in self.examples.items()}

    def models(self) -> dict[str, nn.Module]:
        """The network, with the weights of the base."""
        model = build_network(self.config, self.tokenizer.vocab_size)
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError(f"tune.name frozen leaves task.name {self.section.name} nothing to train; set last_blocks")
        self.new = self.start.fill(model)
        return {"model": model}

    def samples(self, split: str) -> Samples:
        """Of "train" shuffled."""
        seed = mix(self.config.seed, 0xF17E) if split == "train" else None
        return Examples(self.examples[split], self.collate, seed)

    def origin(self, index: int) -> list[str]:
        """File and line of training sample `index`."""
        samples = self.samples("train")
        assert isinstance(samples, Examples)
        return [self.examples["train"][samples.number(index)].place]

    def weights(self, batch: Batch) -> dict[str, float]:
        """Examples that have a label."""
        return {"loss": float((batch["labels"] != IGNORE).sum())}

    def loss_sums(self, model: nn.Module | Engine, batch: Batch) -> dict[str, Tensor]:
        """Summed loss of each term."""
        return self.sums(self.forward(model, batch), batch)

    def evaluate(self, engines: Engines, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean loss, and the task's metrics over all ranks' held-out examples."""
        (engine,) = engines.values()
        totals: dict[str, float] = {}
        found: dict[int, Output] = {}
        with evaluating(engine):
            for batch in batches:
                weights = self.weights(batch)
                batch = to_device(batch, engine.device)
                outputs = self.forward(engine, batch)
                for name, value in self.sums(outputs, batch).items():
                    totals[name] = totals.get(name, 0.0) + value.double().item()
                    totals[f"#{name}"] = totals.get(f"#{name}", 0.0) + weights[name]
                found |= numbered(self.split(outputs, batch), batch)
        totals = sum_over_ranks(totals)
        found = merge_over_ranks(found)
        losses = {name: totals[name] / max(totals[f"#{name}"], 1.0) for name in totals if f"#{name}" in totals}
        numbers = sorted(found)
        examples = [self.examples["valid"][n] for n in numbers]
        return {"loss": sum(losses.values()), **self.measure(examples, [found[n] for n in numbers])}

    def identity(self) -> dict[str, str]:
        """Fingerprints of the training examples and the tokenizer."""
        digest = hashlib.sha256()
        for example in self.examples["train"]:
            for key in sorted(example.item):
                digest.update(key.encode() + np.ascontiguousarray(example.item[key]).tobytes())
        return {"examples": digest.hexdigest(), "tokenizer": self.tokenizer.fingerprint}

    @property
    def tokens_per_sample(self) -> int:
        """Mean over the training examples."""
        keys = [next(iter(stream.fill)) for stream in self.streams]
        sizes = [sum(len(example.item[key]) for key in keys) for example in self.examples["train"]]
        return max(1, round(sum(sizes) / len(sizes)))

    @property
    def flops_per_sample(self) -> float:
        """Of a sample of mean length, forward and backward, as if every weight were trained."""
        assert self.config.model is not None
        rows = padded_vocab(self.config.model, self.tokenizer.vocab_size)
        return self.tokens_per_sample * flops_per_token(self.config.model, rows, self.tokens_per_sample)

    def fit(self, place: str, *texts: list[int], room: int) -> list[list[int]]:
        """Texts cut to `room` tokens together, the longer one first. Raises UserError where that is refused."""
        total = sum(map(len, texts))
        if total > room:
            if self.config.data.too_long == "error":
                raise UserError(
                    f"{place}: {total} tokens, and {room} fit: shorten it, raise data.max_len, or set data.too_long=cut"
                )
            self.cut.append((place, total))
        out = [list(text) for text in texts]
        while (over := sum(map(len, out)) - room) > 0:
            longest = max(out, key=len)
            second = max((len(text) for text in out if text is not longest), default=0)
            del longest[max(len(longest) - over, min(second, len(longest) - 1)) :]
        return out

    def told_of_cuts(self, split: str, total: int) -> list[str]:
        """A warning where texts were cut; empty where none was."""
        if not self.cut:
            return []
        place, size = max(self.cut, key=lambda found: found[1])
        return [
            f"warning: {split}: {len(dict(self.cut)):,} of {total:,} rows are longer than data.max_len {self.max_len} "
            f"and are cut (longest: {place}, {size:,} tokens); data.too_long=error refuses them"
        ]


def settled(config: FinetuneConfig, task: TaskSection, n_examples: int, metric: str) -> FinetuneConfig:
    """The config with what its examples decide: labels, steps of the epochs, evaluations, warmup, metric."""
    train, schedule, select = config.train, config.schedule, config.select
    if train.epochs is not None:
        steps = math.ceil(train.epochs * n_examples / train.global_batch_size)
        train = train.model_copy(update={"steps": max(1, steps)})
    if train.evals is not None:
        train = train.model_copy(update={"eval_every": max(1, math.ceil(train.steps / train.evals))})
    if schedule.warmup_ratio is not None and not schedule.warmup_steps:
        schedule = schedule.model_copy(update={"warmup_steps": round(schedule.warmup_ratio * train.steps)})
    if select.metric is None:
        select = select.model_copy(update={"metric": metric})
    return config.model_copy(update={"task": task, "train": train, "schedule": schedule, "select": select})


def numbered(outputs: Sequence[Output], batch: Batch) -> dict[int, Output]:
    """Outputs of a batch by the number of their example; what only fills the batch is left out."""
    numbers = batch["example_label"].tolist()
    return {n: output for n, output in zip(numbers, outputs, strict=True) if n != IGNORE}


def merge_over_ranks(found: dict[int, Output]) -> dict[int, Output]:
    """COLLECTIVE: what all ranks have found, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return found
    parts: list[dict[int, Output]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    return {n: output for part in parts for n, output in part.items()}


def flat(x: Tensor, places: Tensor) -> Tensor:
    """Of (R, C, ...) what is at places (...) of the flattened rows."""
    return x.flatten(0, 1)[places]
