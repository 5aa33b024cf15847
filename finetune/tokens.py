"""What tasks with an output a token share; long texts are divided into windows, and nothing is cut off."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from torch import Tensor, nn

from cairn.config.schema import FinetuneConfig
from cairn.data.batches import Batch
from cairn.data.tokenizer import Tokenizer
from cairn.train.engine import Engine
from finetune.task import Example, Finetune, Output
from finetune.texts import Frame


class PerToken(Finetune):
    """Outputs (R, C, K) of every token in the batch. Windows of a row follow each other and share its values."""

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        assert config.model is not None
        self.frame = Frame(tokenizer, config.model, config.base.path)

    def forward(self, model: nn.Module | Engine, batch: Batch) -> Tensor:
        """(R, C, K) outputs."""
        outputs: Tensor = model(batch["input_ids"], batch["segment_ids"], batch["document_ids"], batch["positions"])
        return outputs.float()

    def split(self, outputs: Tensor, batch: Batch) -> list[Output]:
        """(T, K) of each window."""
        values = outputs.flatten(0, 1).cpu().numpy()
        ends = zip(batch["first"].tolist(), batch["last"].tolist(), strict=True)
        return [values[first : last + 1] for first, last in ends]


def by_row(examples: Sequence[Example], outputs: Sequence[Output]) -> Iterator[list[tuple[Example, Output]]]:
    """The windows of each row, in order, with their outputs."""
    pairs = zip(examples, outputs, strict=True)
    return (list(windows) for _, windows in groupby(pairs, key=lambda pair: id(pair[0].row)))
