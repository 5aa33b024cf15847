"""Run folders of small models with large random weights."""

from pathlib import Path

import torch

from cairn.config.data import BytesSection, CausalSection, MaskedSection
from cairn.config.model import BERTSection, GPTSection
from cairn.config.schema import PretrainConfig
from cairn.data.tokenizer import BytesTokenizer
from cairn.models.build import build_model
from cairn.train.checkpoint import CheckpointStore
from cairn.train.folder import RunFolder

SMALL = {"n_layer": 2, "n_head": 4, "d_model": 32, "max_seq_len": 48, "init_std": 0.3}
BERT, GPT = BERTSection(**SMALL), GPTSection(**SMALL)


def make_run(path: Path, section: BERTSection | GPTSection) -> Path:
    """A run of text as bytes, at step 7."""
    folder = RunFolder(path)
    objective = MaskedSection() if isinstance(section, BERTSection) else CausalSection()
    folder.create(PretrainConfig(model=section, tokenizer=BytesSection(), objective=objective))
    BytesTokenizer().save(folder.tokenizer)
    torch.manual_seed(0)
    model = build_model(section, BytesTokenizer.vocab_size)
    tensors = ((f"model/weight/{name}", p.detach()) for name, p in model.named_parameters())
    CheckpointStore(folder.checkpoints).save(7, tensors, {"identity": {"tokenizer": BytesTokenizer.fingerprint}})
    return path
