"""What fine-tuning begins from: a run, a folder of `transformers`, or nothing but a tokenizer."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cairn.cluster import Cluster
from cairn.config.data import TokenizerFileSection
from cairn.config.model import ModelSection, TransformerSection
from cairn.config.schema import FinetuneConfig, check_kind
from cairn.data.tokenizer import BytesTokenizer, Tokenizer, load_tokenizer
from cairn.data.train_tokenizer import train_on_texts
from cairn.errors import UserError
from cairn.models.headed import Headed
from cairn.train.run import copy_weights, load_model


@dataclass(frozen=True)
class Start:
    """A model's section and tokenizer, and its weights by name."""

    section: ModelSection
    tokenizer: Tokenizer
    weights: dict[str, Tensor] | None
    """None: drawn anew."""
    origin: str
    """In words."""

    def fill(self, model: nn.Module) -> list[str]:
        """Copy the weights into a model; the names of the new ones. Raises UserError where the base lacks some."""
        wanted: dict[str, Tensor] = dict(model.named_parameters())
        if self.weights is None:
            return list(wanted)
        weights, headed = self.weights, isinstance(model, Headed)
        # `head` of a language model is not a task's, nor is another task's.
        own = {name for name in wanted if ".lora_" in name or (headed and name.startswith("head."))}
        left = copy_weights({n: p for n, p in wanted.items() if n not in own}, weights.get, self.origin)
        if lacking := [name for name in left if not (headed and name.startswith("pooler."))]:
            raise UserError(f"base.path: {self.origin} has no {lacking[0]}: its language-model head was taken off")
        return sorted(own) + left


def open_start(config: FinetuneConfig, texts: Callable[[], Iterable[str]], cluster: Cluster) -> Start:
    """COLLECTIVE: the start of a config; `texts` are what a tokenizer is trained on where one is.

    Raises UserError for a base that is not there, or of a kind that cannot do the task.
    """
    if config.base.path is None:
        assert config.model is not None
        folder = cluster.on_main(lambda: make_tokenizer(config, texts))
        return Start(config.model, load_tokenizer(folder), None, "random weights")
    start = cluster.on_all(lambda: open_base(Path(config.base.path or "")))
    section = _with_dropout(start.section, config.base.dropout)
    if config.model is not None and config.model != section:
        raise UserError("model: it is that of base.path; leave the section out, or base.path")
    try:
        check_kind(config.task, section)
    except ValueError as error:
        raise UserError(f"base.path {config.base.path}: {error}") from error
    return Start(section, start.tokenizer, start.weights, start.origin)


def open_base(path: Path) -> Start:
    """A run folder, or one of `transformers`. Raises UserError for anything else."""
    path = path.expanduser()
    if (path / "config.yaml").is_file():
        run = load_model(path, torch.device("cpu"))
        return Start(run.section, run.tokenizer, dict(run.model.named_parameters()), f"{path}, step {run.step}")
    if not (path / "config.json").is_file():
        raise UserError(
            f"base.path {path}: neither a run folder (config.yaml) nor a transformers folder (config.json) is there"
        )
    from cairn.hub.body import load_body

    body = load_body(path)
    return Start(body.section, body.tokenizer, body.weights, f"{path} ({body.architecture})")


def make_tokenizer(config: FinetuneConfig, texts: Callable[[], Iterable[str]]) -> Path:
    """A folder with the tokenizer that a config without a base names, trained on the texts if it is to be."""
    section = config.tokenizer
    assert section is not None
    if isinstance(section, TokenizerFileSection):
        return Path(section.path).expanduser()
    state = hashlib.sha256(section.model_dump_json().encode())
    trained = section.name != "bytes"
    if trained:
        for text in texts():
            state.update(text.encode() + b"\0")
    folder = Path(config.data.dir) / f"tokenizer-{state.hexdigest()[:12]}"
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.tmp")
        if section.name == "bytes":
            BytesTokenizer().save(partial)
        else:
            train_on_texts(texts(), section, partial)
        partial.rename(folder)
    return folder


def _with_dropout(section: ModelSection, dropout: float | None) -> ModelSection:
    if dropout is None or not isinstance(section, TransformerSection):
        return section
    return section.model_copy(update={"dropout": dropout, "attention_dropout": dropout})
