"""A folder of `transformers` as a run: what pretrain and generate go on from."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch
from pydantic import ValidationError
from torch import Tensor

from cairn.config.data import CausalSection, MaskedSection, TokenizerFileSection
from cairn.config.load import dump, load
from cairn.config.model import BERTSection
from cairn.config.schema import PretrainConfig
from cairn.config.train import RunSection
from cairn.data.tokenizer import load_tokenizer
from cairn.errors import UserError
from cairn.hub import bert, gpt2, llama
from cairn.hub.convert import from_hub
from cairn.hub.export_run import TOLERANCE, compare
from cairn.models.build import build_model
from cairn.optim.build import build_optimizer
from cairn.train.checkpoint import CheckpointStore
from cairn.train.folder import RunFolder

FAMILIES: dict[str, ModuleType] = {"gpt2": gpt2, "llama": llama, "bert": bert}


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
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/config.json: {error}") from error
    kind = settings.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{folder}/config.json: model_type {kind} is none of {', '.join(FAMILIES)}")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has no .safetensors (pickled weights are not read): save it with transformers again")
    run.mkdir(parents=True)
    try:
        return _fill(RunFolder(run), folder, FAMILIES[kind], overrides)
    except BaseException:
        shutil.rmtree(run)
        raise


def _fill(run: RunFolder, folder: Path, family: ModuleType, overrides: Sequence[str]) -> list[str]:
    import transformers

    theirs, info = getattr(transformers, family.ARCHITECTURE).from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"{folder} lacks {len(missing)} tensors of {family.ARCHITECTURE}, such as {missing[0]}")
    section = family.to_section(theirs.config.to_dict())
    load_tokenizer(folder).save(run.tokenizer)
    tokenizer = load_tokenizer(run.tokenizer)
    config = PretrainConfig(
        model=section,
        objective=MaskedSection() if isinstance(section, BERTSection) else CausalSection(),
        tokenizer=TokenizerFileSection(path=str(run.tokenizer.resolve())),
        run=RunSection(name=run.path.name, dir=str(run.path.parent)),
    )
    run.config.write_text(dump(config), encoding="utf-8")
    config = load(PretrainConfig, run.config, overrides)
    run.config.write_text(dump(config), encoding="utf-8")

    model = build_model(config.model, tokenizer.vocab_size)
    model.load_state_dict(from_hub(dict(theirs.named_parameters()), family.table(section)))
    difference = compare(model, folder, family.ARCHITECTURE)
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
        f"{run.path}: {family.ARCHITECTURE} at step 0; logits differ by {difference:.1e} of the largest",
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
