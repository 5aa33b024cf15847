"""A run as a folder that `transformers` loads, checked by loading it."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cairn.config.model import BERTSection, GPTSection, ModelSection
from cairn.errors import UserError
from cairn.hub import bert, gpt2, llama
from cairn.hub.convert import Entry, to_hub
from cairn.hub.tokenizer import export_tokenizer
from cairn.models.base import LanguageModel
from cairn.models.bert import BERT
from cairn.models.build import padded_vocab
from cairn.models.gpt import GPT
from cairn.train.folder import RunFolder
from cairn.train.run import load_model

TOLERANCE = 1e-4


def export_run(run: Path, folder: Path) -> list[str]:
    """Write config.json, model.safetensors (in shards above 5 GB) and the tokenizer; returns lines to print.

    Raises UserError when transformers has no counterpart for the model, or its logits with what was written differ by
    more than 1e-4 of the largest; the folder is then removed.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already: give a new folder")
    loaded = load_model(run, torch.device("cpu"))
    architecture, arguments, table = counterpart(
        loaded.section, padded_vocab(loaded.section, loaded.tokenizer.vocab_size)
    )
    folder.mkdir(parents=True)
    try:
        special = {f"{kind}_token_id": getattr(loaded.tokenizer, f"{kind}_id") for kind in ("bos", "eos", "pad")}
        write_model(folder, architecture, arguments | special, to_hub(dict(loaded.model.named_parameters()), table))
        difference = compare(loaded.model, folder, architecture)
        if not difference <= TOLERANCE:
            raise UserError(
                f"{folder} is removed: transformers' logits differ from ours by {difference:.1e} of the largest, and "
                f"{TOLERANCE:.0e} is allowed"
            )
        lines = [f"{folder}: {architecture}, step {loaded.step}; logits differ by {difference:.1e} of the largest"]
        saved = RunFolder(run).tokenizer
        if not export_tokenizer(loaded.tokenizer, saved, folder, isinstance(loaded.model, BERT)):
            shutil.copytree(saved, folder / "tokenizer")
            lines.append(f"{folder}/tokenizer holds the run's own: AutoTokenizer has no form that gives the same ids")
    except BaseException:
        shutil.rmtree(folder)
        raise
    return lines


def counterpart(section: ModelSection, vocab_rows: int) -> tuple[str, dict[str, Any], list[Entry]]:
    """Architecture of transformers, arguments of its config, and the table of names. Raises UserError if none fits."""
    if isinstance(section, BERTSection):
        return bert.ARCHITECTURE, bert.to_config(section, vocab_rows), bert.table(section)
    if not isinstance(section, GPTSection):
        raise UserError(f"model.name {section.name} has no counterpart in transformers")
    if section.position == "rope":
        return llama.ARCHITECTURE, llama.to_config(section, vocab_rows), llama.table(section)
    return gpt2.ARCHITECTURE, gpt2.to_config(section, vocab_rows), gpt2.table(section)


def write_model(folder: Path, architecture: str, arguments: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """config.json and model.safetensors, in shards with an index above 5 GB."""
    import transformers
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    make = getattr(transformers, architecture).config_class
    make(**arguments, architectures=[architecture], dtype="float32").save_pretrained(folder)
    weights = {name: tensor.detach() for name, tensor in weights.items()}
    split = split_torch_state_dict_into_shards(weights, max_shard_size="5GB")
    for file, names in split.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


@torch.no_grad()
def compare(model: LanguageModel, folder: Path, architecture: str) -> float:
    """Largest difference of logits between ours and transformers' of the folder, over the largest logit.

    Raises UserError when transformers finds a tensor missing.
    """
    import transformers

    theirs, info = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        wrong = sorted([*info["missing_keys"], *info["unexpected_keys"]])
        raise UserError(f"{folder} is removed: transformers misses or does not know {', '.join(wrong[:5])}")
    shape = (2, min(64, model.section.max_seq_len))
    ids = torch.randint(theirs.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    theirs.eval()
    model.eval()
    if isinstance(model, GPT):
        pairs = [(model(ids), theirs(input_ids=ids).logits)]
    else:
        segments = (torch.arange(shape[1]) > shape[1] // 2).long().expand(shape)
        ours, output = model(ids, segments), theirs(input_ids=ids, token_type_ids=segments)
        pairs = [
            (ours["logits"], output.prediction_logits),
            (ours["next_sentence_logits"], output.seq_relationship_logits),
        ]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
