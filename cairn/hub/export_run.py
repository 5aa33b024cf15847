"""A run as a folder that `transformers` loads, checked by loading it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cairn.config.model import BERTSection, GPTSection, ModelSection, Seq2SeqSection
from cairn.config.schema import FinetuneConfig
from cairn.errors import UserError
from cairn.hub import bert, gpt2, llama, t5
from cairn.hub.compare import TOLERANCE, compare
from cairn.hub.convert import Entry, to_hub
from cairn.hub.heads import head_counterpart, padding_id
from cairn.hub.tensors import INDEX
from cairn.hub.tokenizer import Template, export_tokenizer
from cairn.models.build import padded_vocab
from cairn.models.headed import Headed
from cairn.objectives.span import start_of
from cairn.train.folder import RunFolder
from cairn.train.run import LoadedRun, load_model


@dataclass(frozen=True)
class Export:
    """What is written of a run, besides its tokenizer's own files."""

    architecture: str
    arguments: dict[str, Any]
    """Of its config."""
    weights: dict[str, Tensor]
    """By their names."""
    template: Template | None
    """What the tokenizer puts around texts."""
    pad_id: int | None = None
    """Of padding; None: the tokenizer's."""
    max_len: int | None = None


def export_run(run: Path, folder: Path, max_shard_size: str = "5GB") -> list[str]:
    """Write config.json, weights (in shards above `max_shard_size`) and the tokenizer; returns lines to print.

    Raises UserError when transformers has no counterpart for the model or its head, or its logits with what was written
    differ by more than 1e-4 of the largest; the folder is then removed.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already: give a new folder")
    loaded = load_model(run, torch.device("cpu"))
    export = export_of(loaded)
    folder.mkdir(parents=True)
    try:
        write_model(folder, export.architecture, export.arguments, export.weights, max_shard_size)
        difference = compare(loaded.model, folder, export.architecture)
        if not difference <= TOLERANCE:
            raise UserError(
                f"{folder} is removed: transformers' logits differ from ours by {difference:.1e} of the largest, and "
                f"{TOLERANCE:.0e} is allowed"
            )
        what = f"{folder}: {export.architecture}, step {loaded.step}"
        lines = [f"{what}; logits differ by {difference:.1e} of the largest"]
        saved = RunFolder(run).tokenizer
        if not export_tokenizer(loaded.tokenizer, saved, folder, export.template, export.pad_id, export.max_len):
            shutil.copytree(saved, folder / "tokenizer")
            lines.append(f"{folder}/tokenizer holds the run's own: AutoTokenizer has no form that gives the same ids")
    except BaseException:
        shutil.rmtree(folder)
        raise
    return lines


def export_of(loaded: LoadedRun) -> Export:
    """What is to be written of a run. Raises UserError naming what has no counterpart."""
    section, tokenizer, config = loaded.section, loaded.tokenizer, loaded.config
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_id") for kind in ("bos", "eos", "pad")}
    rows = padded_vocab(section, tokenizer.vocab_size)
    weights: dict[str, Tensor] = dict(loaded.model.named_parameters())
    if not isinstance(loaded.model, Headed):
        architecture, arguments, table = counterpart(section, rows)
        if isinstance(section, Seq2SeqSection):
            special["decoder_start_token_id"] = start_of(tokenizer)
        return Export(architecture, arguments | special, to_hub(weights, table), template_of(section))

    assert isinstance(config, FinetuneConfig)
    family = family_of(section)
    special["pad_token_id"] = pad_id = padding_id(tokenizer)
    if pad_id >= rows:  # a row that no text reads
        weights["embed.token.weight"] = F.pad(weights["embed.token.weight"], (0, 0, 0, pad_id + 1 - rows))
    architecture, head, table = head_counterpart(family, loaded.model, config.task)
    arguments = family.to_config(section, max(rows, pad_id + 1)) | special | head
    max_len = config.data.max_len or section.max_seq_len
    ended = ENDED if tokenizer.eos_id is not None else Template(None, "sep", segments=False)
    return Export(architecture, arguments, to_hub(weights, table), template_of(section) or ended, pad_id, max_len)


ENDED = Template(None, "eos", segments=False)


def template_of(section: ModelSection) -> Template | None:
    """What a language model reads around a text: nothing, for a decoder."""
    if isinstance(section, BERTSection):
        return Template("cls", "sep", segments=section.n_segment > 1)
    return ENDED if isinstance(section, Seq2SeqSection) else None


def family_of(section: ModelSection) -> ModuleType:
    """The one that may express it. Raises UserError if none does."""
    if isinstance(section, BERTSection):
        return bert
    if isinstance(section, Seq2SeqSection):
        return t5
    if not isinstance(section, GPTSection):
        raise UserError(f"model.name {section.name} has no counterpart in transformers")
    return llama if section.position == "rope" else gpt2


def counterpart(section: ModelSection, vocab_rows: int) -> tuple[str, dict[str, Any], list[Entry]]:
    """Architecture of transformers, arguments of its config, and the table of names. Raises UserError if none fits."""
    family = family_of(section)
    return family.ARCHITECTURE, family.to_config(section, vocab_rows), family.table(section)


def write_model(
    folder: Path,
    architecture: str,
    arguments: dict[str, Any],
    weights: dict[str, Tensor],
    max_shard_size: str = "5GB",
) -> None:
    """config.json and model.safetensors, in shards with an index above `max_shard_size`.

    Raises UserError for a size that is none.
    """
    import transformers
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    weights = {name: tensor.detach() for name, tensor in weights.items()}
    try:
        split = split_torch_state_dict_into_shards(weights, max_shard_size=max_shard_size)
    except ValueError as error:
        raise UserError(f"--max-shard-size {max_shard_size}: no size; give one such as 5GB or 500MB") from error
    make = getattr(transformers, architecture).config_class
    config = make(**arguments, architectures=[architecture], dtype="float32").to_diff_dict()
    # T5Config says true whatever it is told, and wants the truth when it reads.
    if "tie_word_embeddings" in arguments:
        config["tie_word_embeddings"] = arguments["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file, names in split.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
