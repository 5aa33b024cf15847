"""A text into another by an encoder-decoder: translations, summaries."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cairn.config.finetune import TranslateSection
from cairn.config.schema import FinetuneConfig
from cairn.data.batches import IGNORE, Batch
from cairn.data.packing import Stream
from cairn.data.parallel import read_parallel
from cairn.data.readers import text_lines
from cairn.data.tables import Row, read_table, text_of
from cairn.data.tokenizer import Tokenizer
from cairn.errors import UserError
from cairn.models.build import build_model
from cairn.models.seq2seq import Seq2Seq
from cairn.objectives.span import start_of
from cairn.train.engine import Engine
from cairn.train.run import build_network
from cairn.train.task import Engines, LossTask, evaluating
from finetune import metrics
from finetune.task import Example, Finetune, Output, merge_over_ranks

BATCH = 64
"""Sources that are translated together in an evaluation."""


class Translate(Finetune):
    """The source and an end token are read; the target and an end token are written, after what T5 begins with.

    Outputs are the ids that are written. Raises UserError when the tokenizer lacks an end token.
    """

    section: TranslateSection

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        if tokenizer.eos_id is None:
            raise UserError(
                "the tokenizer has no end-of-text token, which sources and targets end with: "
                "choose another base or tokenizer"
            )
        self.end, self.begin = tokenizer.eos_id, start_of(tokenizer)
        target = Stream({"input_ids": self.begin, "labels": IGNORE})
        self.streams = [Stream({"source_ids": self.begin}, prefix="source_"), target]

    @property
    def metric(self) -> str:  # type: ignore[override]
        """BLEU, where evaluations translate."""
        return "bleu" if self.section.eval_texts else "loss"

    def rows(self, source: str) -> Iterable[Row]:
        """Rows of a table, or lines: with those of task.target_train or task.target_valid beside them where `source` is
        data.train or data.valid, else alone."""
        data, section = self.config.data, self.section
        if section.target_train is None:
            return read_table(source, data)
        target = section.target_train if source == data.train else section.target_valid
        if source not in (data.train, data.valid):
            lines = ((number, line.rstrip("\r\n")) for number, line in text_lines(source))
            return (Row(f"{source}: line {number}", {section.source: line}) for number, line in lines)
        if target is None:
            raise UserError(f"task.target_valid: data.valid {source} holds sources alone; name the file of its targets")
        pairs = ((row.place, row.values) for row in read_parallel(source, target))
        return (Row(place, {section.source: v["source"], section.target: v["target"]}) for place, v in pairs)

    def texts(self, row: Row) -> list[str]:
        """Source and target."""
        return [self._source(row), text_of(row, self.section.target, "task.target")]

    def labelled(self, rows: Sequence[Row]) -> bool:
        """Whether targets are there."""
        return self.section.target in rows[0].values

    def encode(self, rows: Sequence[Row], labelled: bool = True) -> list[Example]:
        """Source and target, each cut to fit with its end token; no target: one token that is none."""
        texts = [self.texts(row) if labelled else [self._source(row), ""] for row in rows]
        ids = iter(self.tokenizer.encode_batch(list(chain.from_iterable(texts))))
        examples = []
        for row in rows:
            source, target = ([*self.fit(row.place, next(ids), room=self.max_len - 1)[0], self.end] for _ in range(2))
            item = {
                "source_ids": np.array(source, dtype=np.int64),
                "input_ids": np.array([self.begin, *target[:-1]], dtype=np.int64),
                "labels": np.array(target if labelled else [IGNORE], dtype=np.int64),
            }
            examples.append(Example(row.place, item, row.values))
        return examples

    def loss_sums(self, model: nn.Module | Engine, batch: Batch) -> dict[str, Tensor]:
        """Negative log likelihood of the targets' tokens, in nats."""
        loss: Tensor = model(
            batch["source_ids"],
            batch["input_ids"],
            batch["labels"],
            batch["source_document_ids"],
            batch["source_positions"],
            batch["document_ids"],
            batch["positions"],
        )
        return {"loss": loss}

    def evaluate(self, engines: Engines, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean loss of a target's token; BLEU and chrF of task.eval_texts held-out sources, which ranks share out."""
        losses = LossTask.evaluate(self, engines, batches)
        (engine,) = engines.values()
        held_out = self.examples["valid"]
        count = min(self.section.eval_texts, len(held_out))
        if not count:
            return losses
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        numbers = [i * len(held_out) // count for i in range(rank, count, world)]
        with evaluating(engine):
            written = self.write(self._whole(engine), [held_out[n].item["source_ids"] for n in numbers])
        found = merge_over_ranks(dict(zip(numbers, written, strict=True)))
        return losses | self.measure([held_out[n] for n in sorted(found)], [found[n] for n in sorted(found)])

    def outputs(self, model: nn.Module, batch: Batch) -> list[Output]:
        """What is written for each source of a packed batch."""
        ids, first, last = batch["source_ids"].flatten(), batch["source_first"].tolist(), batch["source_last"].tolist()
        return self.write(model, [ids[a : b + 1].cpu().numpy() for a, b in zip(first, last, strict=True)])

    def write(self, model: nn.Module, sources: Sequence[Output]) -> list[Output]:
        """The targets of sources (S,) of ids, without their end tokens."""
        from cairn.decode.generate import allowed_tokens
        from cairn.decode.translate import translate

        assert isinstance(model, Seq2Seq)
        table, section = model.embed.token.weight, self.section
        allowed = allowed_tokens(self.tokenizer, len(table)).to(table.device)
        written = translate(
            model,
            [source.tolist() for source in sources],
            self.begin,
            self.end,
            section.max_new_tokens,
            section.beams,
            section.length_penalty,
            BATCH,
            allowed,
        )
        return [np.array(ids, dtype=np.int64) for ids in written]

    def measure(self, examples: Sequence[Example], outputs: Sequence[Output]) -> dict[str, float]:
        """BLEU and chrF."""
        references = [example.row[self.section.target] for example in examples]
        return metrics.translation(references, [self.tokenizer.decode(ids.tolist()) for ids in outputs])

    def predict(self, examples: Sequence[Example], outputs: Sequence[Output]) -> Iterator[dict[str, Any]]:
        """The text that is written."""
        return ({"prediction": self.tokenizer.decode(ids.tolist())} for ids in outputs)

    @cached_property
    def flops_per_sample(self) -> float:
        """Of a pair of mean length, forward and backward. Kept: counting builds the model, on no device."""
        assert self.config.model is not None
        with torch.device("meta"):
            model = build_model(self.config.model, self.tokenizer.vocab_size)
        assert isinstance(model, Seq2Seq)
        items = [example.item for example in self.examples["train"]]
        n_source, n_target = (sum(len(item[key]) for item in items) for key in ("source_ids", "labels"))
        return model.flops(round(n_source / len(items)), round(n_target / len(items)))

    def _whole(self, engine: Engine) -> nn.Module:
        """COLLECTIVE: the network, or a copy where ranks, which take different numbers of steps, cannot share it."""
        if not engine.partitioned:
            return engine.module
        with torch.device("meta"):
            model = build_network(self.config, self.tokenizer.vocab_size)
        model.to_empty(device=engine.device).to(engine.dtype)
        wanted = dict(model.named_parameters())
        for name, weight in engine.weights():
            wanted[name].data.copy_(weight)
        return model

    def _source(self, row: Row) -> str:
        return text_of(row, self.section.source, "task.source")
