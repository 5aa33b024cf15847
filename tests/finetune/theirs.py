"""Models of `transformers` as bases, to be held against."""

from pathlib import Path
from typing import Any

import torch
import transformers

from cairn.cluster import Cluster
from cairn.models.headed import Headed
from finetune.build import make_task
from finetune.task import Finetune
from tests.finetune.conftest import config_of

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,?"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), "the", "oslo"]


def save(kind: type[Any], folder: Path, **keys: Any) -> Any:
    """A small BERT of theirs with random weights, whose dropout is off, written as FOLDER/theirs."""
    size = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=len(PIECES), max_position_embeddings=64, **size, **keys)
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + ("norm" in name.lower() and name.endswith("weight")))
    model.save_pretrained(folder / "theirs")
    (folder / "theirs/vocab.txt").write_text("\n".join(PIECES) + "\n")
    return model.eval()


def same_model(theirs: Any, head: str, folder: Path, cluster: Cluster, *overrides: str) -> tuple[Finetune, Headed]:
    """A task that begins from their folder, and its model with their head."""
    task = make_task(config_of(folder, f"base.path={folder / 'theirs'}", *overrides), cluster)
    model = task.models()["model"]
    assert isinstance(model, Headed)
    model.head.load_state_dict(getattr(theirs, head).state_dict())
    return task, model.eval()
