"""The model and tokenizer of a `transformers` folder, whatever head it has or lacks, read without building theirs."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cairn.config.model import ModelSection
from cairn.data.tokenizer import Tokenizer, load_tokenizer
from cairn.errors import UserError
from cairn.hub import bert, gpt2, llama, t5
from cairn.hub.convert import Entry, from_hub
from cairn.hub.tensors import Tensors
from cairn.models.build import build_model

FAMILIES: dict[str, ModuleType] = {"gpt2": gpt2, "llama": llama, "bert": bert, "t5": t5}
"""By model_type."""

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json", "tokenizer")
HEADS = ("head.", "pooler.", "masked_head.", "next_sentence_head.")
"""What a folder may lack: our names begin so."""
IN_BLOCK = re.compile(r"(^|\.)(h|layers?|block)\.\d+\.")
"""Their names in a block, none of which may be left over."""
BUFFERS = (".attn.bias", ".attn.masked_bias", ".inv_freq", "EncDecAttention.relative_attention_bias.weight")
"""But for these, which older versions saved and nothing needs."""


@dataclass(frozen=True)
class Body:
    """A model by its section, and weights by our names: those that the folder has."""

    section: ModelSection
    tokenizer: Tokenizer
    weights: dict[str, Tensor]
    """In fp32. A head that the folder lacks is not there, nor is the head of another task."""
    architecture: str
    """The class of transformers that wrote the folder."""


def load_body(folder: Path, whole: bool = False) -> Body:
    """Read a folder of transformers: a bare body, a language model, or one with the head of a task.

    `whole`: the language model's heads must be there too. Raises UserError for a kind that has no counterpart here,
    weights or a tokenizer that are missing, damaged, or do not fit each other or config.json.
    """
    family, settings = read_settings(folder)
    section, tokenizer = read_section(folder, family), _tokenizer(folder)
    assert section.vocab_size is not None
    if tokenizer.vocab_size > section.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, and the embedding "
            f"{section.vocab_size} rows: give the folder the tokenizer that the model was trained with"
        )
    weights = _weights(Tensors(folder), family, section, whole)
    architecture = (settings.get("architectures") or [family.ARCHITECTURE])[0]
    return Body(section, tokenizer, weights, str(architecture))


def read_settings(folder: Path) -> tuple[ModuleType, dict[str, Any]]:
    """The family of a folder, and its config.json. Raises UserError where there is none, or no counterpart."""
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: {error}") from error
    if kind not in FAMILIES:
        raise UserError(f"{path}: model_type {kind} is none of {', '.join(FAMILIES)}")
    return FAMILIES[kind], settings


def read_section(folder: Path, family: ModuleType) -> ModelSection:
    """Our section of a config.json. Raises UserError naming what has no counterpart."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:  # pydantic's ValidationError is a ValueError too
        config = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
        section: ModelSection = family.to_section(config)
    except UserError as error:
        raise UserError(f"{folder}/{error}") from error
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise UserError(f"{folder}/config.json: {' '.join(str(error).split())}") from error
    return section


def _tokenizer(folder: Path) -> Tokenizer:
    there = [name for name in TOKENIZERS if (folder / name).exists()]
    if not there:
        raise UserError(f"{folder} has no tokenizer ({', '.join(TOKENIZERS[:-1])}): save the model's own there")
    # `cairn export` keeps a run's own in a folder where AutoTokenizer has no form of it.
    return load_tokenizer(folder / "tokenizer" if there == ["tokenizer"] else folder)


def _weights(tensors: Tensors, family: ModuleType, section: ModelSection, whole: bool) -> dict[str, Tensor]:
    """Weights by our names, their shapes checked."""
    found: dict[str, str] = {}
    table: list[Entry] = []
    missing: list[str] = []
    for entry in family.table(section):
        names = {theirs: _spelling(theirs, family.PREFIX, tensors) for theirs in entry.theirs}
        lacking = [theirs for theirs, name in names.items() if name is None]
        if not lacking:
            found |= {theirs: name for theirs, name in names.items() if name is not None}
            table.append(entry)
        elif whole or not entry.ours.startswith(HEADS):
            missing += lacking
    if missing:
        raise UserError(
            f"{tensors.folder} lacks {len(missing)} tensors of {family.ARCHITECTURE}, such as {sorted(missing)[0]}"
        )
    left = sorted(tensors.file.keys() - found.values())
    if strange := [name for name in left if IN_BLOCK.search(name) and not name.endswith(BUFFERS)]:
        raise UserError(
            f"{tensors.folder} holds {len(strange)} tensors that config.json has no place for, such as {strange[0]}"
        )
    if not section.tie_embeddings or "lm_head.weight" not in left:
        weights = from_hub(tensors.read(found), table)
    else:
        read = tensors.read(found | {"lm_head.weight": "lm_head.weight"})
        head = read.pop("lm_head.weight")
        weights = from_hub(read, table)
        if not torch.equal(head, weights["embed.token.weight"]):
            raise UserError(
                f"{tensors.folder}: lm_head.weight is not the embedding, and config.json ties them: "
                "set its tie_word_embeddings to false"
            )
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in build_model(section, 1).named_parameters()}
    for name, tensor in weights.items():
        if tensor.shape != shapes[name]:
            raise UserError(
                f"{tensors.folder}: {name} is {tuple(tensor.shape)}, and config.json makes it {tuple(shapes[name])}"
            )
    return weights


def _spelling(name: str, prefix: str, tensors: Tensors) -> str | None:
    """The name in the folder of what a table calls `name`, if it is there."""
    return next((spelled for spelled in _spellings(name, prefix) if spelled in tensors.file), None)


def _spellings(name: str, prefix: str) -> Iterator[str]:
    """A bare body has no prefix, some heads have another, old BERTs call their norms' weights gamma and beta, and of
    T5's embeddings any may be the one that is saved."""
    bare = name.removeprefix(prefix)
    yield name
    yield bare
    yield f"transformer.{bare}"
    for spelled in (name, bare):
        yield spelled.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    if name == "shared.weight":
        yield from ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
