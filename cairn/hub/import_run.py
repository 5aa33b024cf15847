"""A folder of `transformers` as a run: what pretrain and generate go on from."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from cairn.config.data import CausalSection, MaskedSection, SpanSection, TokenizerFileSection
from cairn.config.load import dump, load
from cairn.config.schema import PretrainConfig
from cairn.config.train import RunSection
from cairn.data.tokenizer import load_tokenizer
from cairn.errors import UserError
from cairn.hub.body import Body, load_body
from cairn.hub.compare import TOLERANCE, compare
from cairn.hub.export_run import family_of
from cairn.models.build import build_model
from cairn.optim.build import build_optimizer
from cairn.train.checkpoint import CheckpointStore
from cairn.train.folder import RunFolder
from cairn.train.run import copy_weights

OBJECTIVES = {"causal": CausalSection, "masked": MaskedSection, "span": SpanSection}


def import_run(folder: Path, run: Path, overrides: Sequence[str] = ()) -> list[str]:
    """Make a run folder of step 0 from a folder of transformers; returns lines to print.

    `overrides` ("section.key=value") set what the folder does not say: data, optimizer, schedule. Raises UserError when
    there is no counterpart here, a tensor is missing, or our logits differ from transformers'.
    """
    if run.exists():
        raise UserError(f"{run} exists already: give a new run folder")
    try:
        RunSection(name=run.name)
    except ValidationError as error:
        raise UserError(f"{run}: a run's name is made of letters, digits and . _ - only: give another RUN") from error
    body = load_body(folder, whole=True)
    run.mkdir(parents=True)
    try:
        return _fill(RunFolder(run), folder, body, overrides)
    except BaseException:
        shutil.rmtree(run)
        raise


def _fill(run: RunFolder, folder: Path, body: Body, overrides: Sequence[str]) -> list[str]:
    body.tokenizer.save(run.tokenizer)
    tokenizer = load_tokenizer(run.tokenizer)
    config = PretrainConfig(
        model=body.section,
        objective=OBJECTIVES[body.section.objective](),
        tokenizer=TokenizerFileSection(path=str(run.tokenizer.resolve())),
        run=RunSection(name=run.path.name, dir=str(run.path.parent)),
    )
    run.config.write_text(dump(config), encoding="utf-8")
    config = load(PretrainConfig, run.config, overrides)
    run.config.write_text(dump(config), encoding="utf-8")

    model = build_model(config.model, tokenizer.vocab_size)
    if left := copy_weights(dict(model.named_parameters()), body.weights.get, str(folder)):
        raise UserError(f"{folder} has no {left[0]}, which model.* asks for: leave these keys to the folder")
    architecture = family_of(body.section).ARCHITECTURE
    difference = compare(model, folder, architecture, exact=False)
    if not difference <= TOLERANCE:
        raise UserError(f"our logits differ from transformers' by {difference:.1e} of the largest: nothing is imported")
    # A checkpoint that was never trained: zero moments, and no corpus yet that it must be resumed with.
    state = {
        "step": 0,
        "samples": 0,
        "seed": config.seed,
        "identity": {"tokenizer": tokenizer.fingerprint},
        "engines": {"model": {"optimizer_step": 0}},
    }
    with CheckpointStore(run.checkpoints) as store:
        store.save(0, _tensors(model, config), state)
    return [
        f"{run.path}: {architecture} at step 0; logits differ by {difference:.1e} of the largest",
        f"generate: cairn generate {run.path}; train on: cairn pretrain {run.config}",
    ]


def _tensors(model: torch.nn.Module, config: PretrainConfig) -> Iterator[tuple[str, Tensor]]:
    """The weights, and zeros for the moments of the configured optimizer."""
    moments = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum",)}
    names = {id(p): name for name, p in model.named_parameters()}
    for group in build_optimizer(model.named_parameters(), model, config.optim).param_groups:
        for p in group["params"]:
            yield f"model/weight/{names[id(p)]}", p.detach()
            for moment in moments[group["kind"]]:
                yield f"model/{moment}/{names[id(p)]}", torch.zeros_like(p)
