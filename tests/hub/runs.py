"""Run folders of small untrained models, pretrained or fine-tuned."""

from pathlib import Path

import torch
from torch import nn

from cairn.config.data import BytesSection, CausalSection, MaskedSection, SpanSection
from cairn.config.finetune import ExamplesSection, FullSection, TaskSection, TuneSection
from cairn.config.model import BERTSection, GPTSection, ModelSection, Seq2SeqSection
from cairn.config.schema import FinetuneConfig, PretrainConfig
from cairn.data.tokenizer import BytesTokenizer, Tokenizer, load_tokenizer
from cairn.train.checkpoint import CheckpointStore
from cairn.train.folder import RunFolder
from cairn.train.run import build_network

SMALL = {"n_layer": 2, "n_head": 4, "d_model": 32, "max_seq_len": 48, "init_std": 0.2}
LLAMA = {"norm": "rmsnorm", "position": "rope", "activation": "swiglu", "bias": False, "tie_embeddings": False}
BODIES = {
    "GPT2": GPTSection(**SMALL),
    "Llama": GPTSection(**SMALL, **LLAMA, n_kv_head=2),
    "Bert": BERTSection(**SMALL),
}
OBJECTIVES = {"causal": CausalSection, "masked": MaskedSection, "span": SpanSection}


def make_pretrained(path: Path, section: ModelSection, tokenizer: Path | None = None) -> Path:
    """A language model at step 7."""
    objective = OBJECTIVES[section.objective]()
    return _make(path, PretrainConfig(model=section, tokenizer=BytesSection(), objective=objective), tokenizer)


def make_finetuned(
    path: Path,
    section: BERTSection | GPTSection | Seq2SeqSection,
    task: TaskSection,
    tune: TuneSection | None = None,
    tokenizer: Path | None = None,
) -> Path:
    """A model with the head of a task, at step 7."""
    config = FinetuneConfig(
        model=section,
        tokenizer=BytesSection(),
        data=ExamplesSection(train="examples.jsonl"),
        task=task,
        tune=tune or FullSection(),
    )
    return _make(path, config, tokenizer)


def _make(path: Path, config: PretrainConfig | FinetuneConfig, tokenizer: Path | None) -> Path:
    folder = RunFolder(path)
    folder.create(config)
    source: Tokenizer = load_tokenizer(tokenizer) if tokenizer else BytesTokenizer()
    source.save(folder.tokenizer)
    torch.manual_seed(0)
    model = build_network(config, source.vocab_size)
    stir(model)
    tensors = ((f"model/weight/{name}", p.detach()) for name, p in model.named_parameters())
    with CheckpointStore(folder.checkpoints) as store:
        store.save(7, tensors, {"identity": {"tokenizer": source.fingerprint}})
    return path


def stir(model: nn.Module) -> None:
    """Zeros and ones would hide mistakes."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
