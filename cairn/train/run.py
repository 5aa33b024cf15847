"""Open a finished or running language-model run, pretrained or fine-tuned: its config, model and tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cairn.config.finetune import Head
from cairn.config.load import has_section, load
from cairn.config.model import ModelSection
from cairn.config.schema import FinetuneConfig, PretrainConfig
from cairn.data.tokenizer import Tokenizer, load_tokenizer
from cairn.errors import UserError
from cairn.models.base import LanguageModel
from cairn.models.build import build_model, padded_vocab
from cairn.models.headed import Headed, prepare_tuning
from cairn.models.lora import merge_lora
from cairn.train.checkpoint import Checkpoint
from cairn.train.folder import RunFolder
from cairn.train.select import chosen


@dataclass(frozen=True)
class LoadedRun:
    """A run as it stood at `step`; the model is in fp32 and in evaluation mode, LoRA's updates merged."""

    config: PretrainConfig | FinetuneConfig
    section: ModelSection
    model: LanguageModel
    tokenizer: Tokenizer
    step: int


def open_config(folder: RunFolder) -> PretrainConfig | FinetuneConfig:
    """The config of a language model's run. Raises UserError where there is none."""
    if not folder.config.exists():
        raise UserError(f"{folder.path} has no config.yaml: give a run folder such as runs/gpt-tiny")
    if has_section(folder.config, "task"):
        return load(FinetuneConfig, folder.config)
    return load(PretrainConfig, folder.config)


def load_model(run_dir: Path, device: torch.device) -> LoadedRun:
    """The best checkpoint of a run folder, of a run that selects none the newest good one.

    Raises UserError naming what is missing or does not fit.
    """
    folder = RunFolder(run_dir)
    config = open_config(folder)
    checkpoint = chosen(folder, config.select)
    if checkpoint is None:
        raise UserError(f"{folder.checkpoints} has no checkpoint yet: train the run to its first one")
    assert config.model is not None, "a run folder's config has its model"
    tokenizer = load_tokenizer(folder.tokenizer)
    trained_with = checkpoint.state.get("identity", {}).get("tokenizer", tokenizer.fingerprint)
    if tokenizer.fingerprint != trained_with:
        raise UserError(
            f"{folder.tokenizer} is not the tokenizer that {checkpoint.path.name} was trained with "
            f"({tokenizer.fingerprint[:12]} now, {trained_with[:12]} then): put it back"
        )
    with torch.device("meta"):
        model = build_network(config, tokenizer.vocab_size)
    model.to_empty(device=device)
    load_weights(model, checkpoint)
    merge_lora(model)
    return LoadedRun(config, config.model, model.eval(), tokenizer, checkpoint.step)


def build_network(config: PretrainConfig | FinetuneConfig, vocab_size: int) -> LanguageModel:
    """The model that a config trains, its weights drawn anew; with a task's head, where it has one."""
    assert config.model is not None
    head: Head | None = config.task.head if isinstance(config, FinetuneConfig) else None
    if head is None:
        model = build_model(config.model, vocab_size)
    else:
        model = Headed(config.model, padded_vocab(config.model, vocab_size), head)
    if isinstance(config, FinetuneConfig):
        prepare_tuning(model, config.tune)
    return model


def load_weights(model: nn.Module, checkpoint: Checkpoint, engine: str = "model") -> None:
    """Copy "ENGINE/weight/PARAM" and "ENGINE/buffer/NAME" into the model.

    Raises UserError naming one that is missing or mis-shaped.
    """
    wanted: dict[str, Tensor] = {f"weight/{name}": p for name, p in model.named_parameters()}
    wanted |= {f"buffer/{name}": b for name, b in model.named_buffers()}
    left = copy_weights(wanted, lambda name: checkpoint.read(f"{engine}/{name}"), str(checkpoint.path))
    if left:
        raise UserError(f"{checkpoint.path} has no tensor {left[0]}: it was written by a model of another config")


@torch.no_grad()
def copy_weights(wanted: dict[str, Tensor], read: Callable[[str], Tensor | None], where: str) -> list[str]:
    """Copy what `read` gives for each name; the names it has nothing for. Raises UserError for one of another shape."""
    left = []
    for name, target in wanted.items():
        tensor = read(name)
        if tensor is None:
            left.append(name)
        elif tensor.shape != target.shape:
            raise UserError(f"{where}: {name} is {tuple(tensor.shape)}, and config.yaml makes it {tuple(target.shape)}")
        else:
            target.copy_(tensor)
    return left
