"""Going on with pretraining, on own text: the same corpus folders, objectives and sequences, a base's weights."""

from pathlib import Path

from pydantic import ValidationError
from torch import nn

from cairn.cluster import Cluster
from cairn.config.data import (
    CausalSection,
    DataSection,
    MaskedSection,
    ObjectiveSection,
    SpanSection,
    TokenizerFileSection,
    TokenizerSection,
)
from cairn.config.finetune import TextSection
from cairn.config.model import ModelSection
from cairn.config.schema import FinetuneConfig, PretrainConfig
from cairn.data.prepare import Prepared, open_prepared, prepare
from cairn.data.tokenizer import Tokenizer
from cairn.errors import UserError
from cairn.train.language_model import LanguageModel
from cairn.train.run import build_network
from finetune.start import Start, open_start
from finetune.task import settled

OBJECTIVES: dict[str, ObjectiveSection] = {
    "causal": CausalSection(),
    "masked": MaskedSection(next_sentence=False),
    "span": SpanSection(),
}
"""By what a kind of model trains with."""


class Text(LanguageModel):
    """A language model that a base's weights begin."""

    unit = "sequences"

    def __init__(self, config: FinetuneConfig, start: Start, prepared: Prepared) -> None:
        """Raises UserError where the tokenizer lacks a token, or the corpus is shorter than a sequence."""
        assert isinstance(config.task, TextSection)
        super().__init__(pretraining(config, start.section), prepared)
        self.start, self.tokenizer = start, prepared.tokenizer
        self.sizes = {split: len(self.samples(split)) for split in ("train", "valid")}
        self.settled = settled(
            config.model_copy(update={"model": start.section}), config.task, self.sizes["train"], "loss"
        )
        self.config = self.settled
        self.notes: list[str] = []

    def models(self) -> dict[str, nn.Module]:
        """The network, with the weights of the base."""
        model = build_network(self.settled, self.tokenizer.vocab_size)
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError("tune.name frozen leaves task.name text nothing to train; set tune.last_blocks")
        self.start.fill(model)
        return {"model": model}


def open_text(config: FinetuneConfig, cluster: Cluster) -> Text:
    """COLLECTIVE: the task, its base opened and its corpus prepared. Raises UserError as these do."""
    data = config.data
    if data.valid is not None:
        raise UserError(
            "data.valid: task.name text holds data.held_out of the documents of data.train out; leave it out"
        )
    if config.base.path is None:
        assert config.model is not None
        assert config.tokenizer is not None
        section, tokenizer, start = config.model, config.tokenizer, None
    else:
        start = open_start(config, list, cluster)
        section, tokenizer = start.section, cluster.on_main(lambda: _kept(start.tokenizer, Path(data.dir)))
    text = pretraining(config, section)
    folder = cluster.on_main(lambda: prepare(text.data, tokenizer))
    prepared = cluster.on_all(lambda: open_prepared(folder))
    start = start or Start(section, prepared.tokenizer, None, "random weights")
    return cluster.on_all(lambda: Text(config, start, prepared))


def pretraining(config: FinetuneConfig, model: ModelSection) -> PretrainConfig:
    """The config with which pretraining would train that model on this text. Raises UserError where it cannot."""
    task, data = config.task, config.data
    assert isinstance(task, TextSection)
    source = DataSection(
        source=data.train,
        text_field=task.text,
        dir=data.dir,
        held_out=data.held_out,
        seq_len=task.seq_len or data.max_len,
        document_mask=task.document_mask,
    )
    try:
        return PretrainConfig(
            seed=config.seed, data=source, model=model, objective=task.objective or OBJECTIVES[model.objective]
        )
    except ValidationError as error:
        told = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise UserError(f"task: {told.replace('data.', 'task.')}") from error


def _kept(tokenizer: Tokenizer, folder: Path) -> TokenizerSection:
    """A base's tokenizer in a folder of its own, named by what it is."""
    path = folder / f"tokenizer-{tokenizer.fingerprint[:12]}"
    if not path.exists():
        partial = path.with_name(f".{path.name}.tmp")
        tokenizer.save(partial)
        partial.rename(path)
    return TokenizerFileSection(path=str(path))
