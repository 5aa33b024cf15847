"""Open a finished or running language-model run: its config, model and tokenizer."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cairn.config.load import load
from cairn.config.schema import PretrainConfig
from cairn.data.tokenizer import Tokenizer, load_tokenizer
from cairn.errors import UserError
from cairn.models.base import LanguageModel
from cairn.models.build import build_model
from cairn.train.checkpoint import Checkpoint, newest
from cairn.train.folder import RunFolder


@dataclass(frozen=True)
class LoadedRun:
    """A run as it stood at `step`; the model is in fp32 and in evaluation mode."""

    config: PretrainConfig
    model: LanguageModel
    tokenizer: Tokenizer
    step: int


def load_model(run_dir: Path, device: torch.device) -> LoadedRun:
    """The newest good checkpoint of a run folder. Raises UserError naming what is missing or does not fit."""
    folder = RunFolder(run_dir)
    if not folder.config.exists():
        raise UserError(f"{run_dir} has no config.yaml: give a run folder such as runs/gpt-tiny")
    config = load(PretrainConfig, folder.config, [])
    checkpoint, _ = newest(folder.checkpoints)
    if checkpoint is None:
        raise UserError(f"{folder.checkpoints} has no checkpoint yet: train the run to its first one")
    tokenizer = load_tokenizer(folder.tokenizer)
    with torch.device("meta"):
        model = build_model(config.model, tokenizer.vocab_size)
    model.to_empty(device=device)
    load_weights(model, checkpoint)
    return LoadedRun(config, model.eval(), tokenizer, checkpoint.step)


def load_weights(model: nn.Module, checkpoint: Checkpoint, engine: str = "model") -> None:
    """Copy "ENGINE/weight/PARAM" and "ENGINE/buffer/NAME" into the model.

    Raises UserError naming one that is missing or mis-shaped.
    """
    wanted: dict[str, Tensor] = {f"{engine}/weight/{name}": p for name, p in model.named_parameters()}
    wanted |= {f"{engine}/buffer/{name}": b for name, b in model.named_buffers()}
    for name, target in wanted.items():
        tensor = checkpoint.read(name)
        if tensor is None:
            raise UserError(f"{checkpoint.path} has no tensor {name}: it was written by a model of another config")
        if tensor.shape != target.shape:
            raise UserError(
                f"{checkpoint.path}: {name} is {tuple(tensor.shape)}, and config.yaml makes it {tuple(target.shape)}"
            )
        with torch.no_grad():
            target.copy_(tensor)
