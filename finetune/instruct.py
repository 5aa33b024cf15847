"""Instruction tuning: conversations in a chat template, of which the assistant's turns are learned."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from cairn.config.finetune import InstructSection
from cairn.config.schema import FinetuneConfig
from cairn.data.batches import IGNORE, Batch
from cairn.data.chat import Chat
from cairn.data.packing import Stream
from cairn.data.tables import Row, text_of, value_of
from cairn.data.tokenizer import Tokenizer
from cairn.errors import UserError
from cairn.models.base import LanguageModel
from cairn.models.build import padded_vocab
from cairn.train.engine import Engine
from finetune.task import Example, Finetune, Output


class Instruct(Finetune):
    """Targets are what the assistant says, up to the token that ends each of its turns; the rest is only read.

    Judged by loss and accuracy of these tokens; predictions are answers, written with the likeliest token each.
    Raises UserError when the tokenizer has no token that ends an answer.
    """

    metric = "loss"
    section: InstructSection

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.chat = Chat(tokenizer)
        tokenizer.chat_template = self.chat.template  # so that the run keeps it
        self.streams = [Stream({"input_ids": self.chat.end_id, "labels": IGNORE})]

    def texts(self, row: Row) -> list[str]:
        """What is said."""
        return [message["content"] for message in self._messages(row)]

    def labelled(self, rows: Sequence[Row]) -> bool:
        """Never: an answer that is written freely may be right in other words."""
        return False

    def encode(self, rows: Sequence[Row], labelled: bool = True) -> list[Example]:
        """Conversations, the end of long ones cut; those whose first answer is cut off are left out."""
        examples, lost = [], []
        for row in rows:
            parts = self._parts(row, labelled)
            ids = [i for part, _ in parts for i in part]
            if not labelled:  # of a long prompt, generation reads the end
                examples.append(_example(row, ids, [IGNORE] * len(ids)))
                continue
            (ids,) = self.fit(row.place, ids, room=self.max_len)
            said = [spoken for part, spoken in parts for _ in part]
            labels = [i if spoken else IGNORE for i, spoken in zip(ids, said, strict=False)]
            if any(label != IGNORE for label in labels[1:]):
                examples.append(_example(row, ids[:-1], labels[1:]))
            else:
                lost.append(row.place)
        if lost:
            told = f"{len(lost):,} of {len(rows):,} rows have no answer within data.max_len {self.max_len}"
            if not examples:
                raise UserError(f"{lost[0]}: {told}: raise it, or shorten the prompts")
            self.notes.append(f"warning: {told} and are left out (first: {lost[0]})")
        return examples

    def forward(self, model: nn.Module | Engine, batch: Batch) -> Tensor:
        """Logits (R, C, V)."""
        logits: Tensor = model(batch["input_ids"], document_ids=batch["document_ids"], positions=batch["positions"])
        return logits

    def loss_sums(self, model: nn.Module | Engine, batch: Batch) -> dict[str, Tensor]:
        """Negative log likelihood of what the assistant says, in nats, without keeping logits."""
        loss: Tensor = model(
            batch["input_ids"], batch["labels"], document_ids=batch["document_ids"], positions=batch["positions"]
        )
        return {"loss": loss}

    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The same, of logits."""
        real = batch["labels"] != IGNORE
        return {"loss": F.cross_entropy(outputs[real].float(), batch["labels"][real], reduction="sum")}

    def split(self, outputs: Tensor, batch: Batch) -> list[Output]:
        """Of each conversation: tokens of the assistant that are the likeliest there, and all of them."""
        labels = batch["labels"].flatten()
        right = (outputs.argmax(-1).flatten() == labels).cpu().numpy()
        real = (labels != IGNORE).cpu().numpy()
        bounds = zip(batch["first"].tolist(), batch["last"].tolist(), strict=True)
        return [np.array([right[a : b + 1].sum(), real[a : b + 1].sum()]) for a, b in bounds]

    def measure(self, examples: Sequence[Example], outputs: Sequence[Output]) -> dict[str, float]:
        """Share of the assistant's tokens that are the likeliest after what is before them."""
        right, total = np.sum(outputs, 0)
        return {"accuracy": float(right / total)}

    def outputs(self, model: nn.Module, batch: Batch) -> list[Output]:
        """The ids of an answer to each prompt of a packed batch."""
        from cairn.decode.generate import allowed_tokens, generate
        from cairn.decode.sample import Sampling

        assert isinstance(model, LanguageModel)
        ids = batch["input_ids"].flatten()
        bounds = zip(batch["first"].tolist(), batch["last"].tolist(), strict=True)
        prompts = [ids[a : b + 1].tolist() for a, b in bounds]
        assert self.config.model is not None
        rows = padded_vocab(self.config.model, self.tokenizer.vocab_size)
        allowed = allowed_tokens(self.tokenizer, rows)
        allowed[self.chat.end_id] = True
        written = generate(
            model,
            prompts,
            self.section.max_new_tokens,
            Sampling(temperature=0),
            eos_id=self.chat.end_id,
            allowed=allowed.to(ids.device),
        )
        return [np.array(answer, dtype=np.int64) for answer in written]

    def predict(self, examples: Sequence[Example], outputs: Sequence[Output]) -> Iterator[dict[str, Any]]:
        """The answer."""
        return ({"prediction": self.tokenizer.decode(ids.tolist())} for ids in outputs)

    def _parts(self, row: Row, labelled: bool) -> list[tuple[list[int], bool]]:
        messages = self._messages(row, labelled)
        try:
            return self.chat.turns(messages) if labelled else [(self.chat.prompt(messages), False)]
        except UserError as error:
            raise UserError(f"{row.place}: {error}") from error

    def _messages(self, row: Row, labelled: bool = True) -> list[dict[str, str]]:
        """What is said in a row; without its last answer where that is to be written."""
        section = self.section
        begin = [{"role": "system", "content": section.system}] if section.system else []
        if section.messages is None:
            said = [{"role": "user", "content": text_of(row, section.prompt, "task.prompt")}]
            if labelled:
                said.append({"role": "assistant", "content": text_of(row, section.response, "task.response")})
            return begin + said
        said = _conversation(row, section.messages)
        if labelled and not any(message["role"] == "assistant" for message in said):
            raise UserError(f"{row.place}: {section.messages} has no turn of the assistant: add one or remove the row")
        if not labelled and said[-1]["role"] == "assistant":
            said = said[:-1]
        return said if said[0]["role"] == "system" else begin + said


def _conversation(row: Row, column: str) -> list[dict[str, str]]:
    """Messages as they must be. Raises UserError naming the one that is not."""
    found = value_of(row, column, "task.messages")
    if not isinstance(found, list) or not found:
        raise UserError(f"{row.place}: {column} is no list of messages: give {{role, content}} of each turn")
    for number, message in enumerate(found, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(f"{row.place}: message {number} of {column} needs a role and a content, both text")
        if not message["content"].strip():
            raise UserError(f"{row.place}: message {number} of {column} is empty: fill it in or remove the row")
    return [{"role": message["role"], "content": message["content"]} for message in found]


def _example(row: Row, ids: Sequence[int], labels: Sequence[int]) -> Example:
    item = {"input_ids": np.array(ids, dtype=np.int64), "labels": np.array(labels, dtype=np.int64)}
    return Example(row.place, item, row.values)
