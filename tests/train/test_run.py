from pathlib import Path

import pytest
import torch

from cairn.config.model import GPTSection
from cairn.config.schema import PretrainConfig
from cairn.data.tokenizer import BytesTokenizer
from cairn.errors import UserError
from cairn.models.build import build_model
from cairn.train.checkpoint import CheckpointStore
from cairn.train.folder import RunFolder
from cairn.train.run import load_model

CPU = torch.device("cpu")
SECTION = GPTSection(n_layer=1, n_head=2, d_model=16, max_seq_len=32)


def save(folder: RunFolder, step: int, width: int = 16) -> None:
    torch.manual_seed(step)
    model = build_model(SECTION.model_copy(update={"d_model": width}), BytesTokenizer.vocab_size)
    tensors = ((f"model/weight/{name}", p.detach()) for name, p in model.named_parameters())
    CheckpointStore(folder.checkpoints).save(step, tensors, {})


def test_a_run_is_opened_at_its_newest_checkpoint_or_says_what_is_missing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        load_model(folder.path, CPU)
    folder.create(PretrainConfig(model=SECTION))
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load_model(folder.path, CPU)
    BytesTokenizer().save(folder.tokenizer)
    save(folder, 1)
    save(folder, 2)
    run = load_model(folder.path, CPU)
    assert (run.step, run.tokenizer.vocab_size, run.model.training) == (2, 263, False)
    torch.manual_seed(2)
    expected = build_model(SECTION, 263).eval()
    ids = torch.arange(20)[None]
    assert torch.equal(run.model(ids), expected(ids))
    save(folder, 3, width=32)
    with pytest.raises(UserError, match=r"embed\.token\.weight is \(384, 32\), and config\.yaml makes it \(384, 16\)"):
        load_model(folder.path, CPU)
