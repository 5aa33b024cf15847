import json
import os
from pathlib import Path

import pytest
import torch
import transformers

from cairn.config.data import BytesSection, CausalSection, MaskedSection, SentencePieceSection
from cairn.config.load import load
from cairn.config.model import BERTSection, GPTSection
from cairn.config.schema import PretrainConfig
from cairn.data.sentencepiece import train_sentencepiece
from cairn.data.tokenizer import BytesTokenizer, load_tokenizer
from cairn.errors import UserError
from cairn.hub import export_run as export_module
from cairn.hub.export_run import export_run, write_model
from cairn.hub.import_run import import_run
from cairn.models.build import build_model
from cairn.train.checkpoint import CheckpointStore, newest
from cairn.train.folder import RunFolder
from cairn.train.run import load_model

SMALL = {"n_layer": 2, "n_head": 4, "d_model": 32, "max_seq_len": 48, "init_std": 0.2}
LLAMA = {"norm": "rmsnorm", "position": "rope", "activation": "swiglu", "bias": False, "tie_embeddings": False}
SECTIONS = {
    "GPT2LMHeadModel": GPTSection(**SMALL),
    "LlamaForCausalLM": GPTSection(**SMALL, **LLAMA, n_kv_head=2),
    "BertForPreTraining": BERTSection(**SMALL),
}
TEXT = Path(os.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind in ("bpe", "unigram"):
        made[kind] = tmp_path_factory.mktemp(kind)
        train_sentencepiece([TEXT[:20_000]], SentencePieceSection(vocab_size=600, model_type=kind), made[kind])
    return made


def make_run(path: Path, section: GPTSection | BERTSection, tokenizer: Path | None = None) -> Path:
    """A run folder of an untrained model."""
    folder = RunFolder(path)
    bert = isinstance(section, BERTSection)
    config = PretrainConfig(
        model=section, tokenizer=BytesSection(), objective=MaskedSection() if bert else CausalSection()
    )
    folder.create(config)
    source = load_tokenizer(tokenizer) if tokenizer else BytesTokenizer()
    source.save(folder.tokenizer)
    torch.manual_seed(0)
    model = build_model(section, source.vocab_size)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    tensors = ((f"model/weight/{name}", p.detach()) for name, p in model.named_parameters())
    CheckpointStore(folder.checkpoints).save(7, tensors, {"identity": {"tokenizer": source.fingerprint}})
    return path


@pytest.mark.parametrize("architecture", SECTIONS)
def test_export_loads_in_transformers_and_comes_back_the_same(architecture: str, tmp_path: Path) -> None:
    run, out, back = make_run(tmp_path / "run", SECTIONS[architecture]), tmp_path / "out", tmp_path / "runs" / "back"
    lines = export_run(run, out)
    assert f"{architecture}, step 7" in lines[0]
    assert json.loads((out / "config.json").read_text())["architectures"] == [architecture]
    auto = transformers.BertForPreTraining if "Bert" in architecture else transformers.AutoModelForCausalLM
    hf = auto.from_pretrained(out, local_files_only=True)
    tokens = transformers.AutoTokenizer.from_pretrained(out, local_files_only=True)
    ours = load_model(run, torch.device("cpu"))
    text = "def f(x):\n    return 'é'"
    ids = torch.tensor([ours.tokenizer.encode(text)])
    assert tokens(text, add_special_tokens=False, return_tensors="pt")["input_ids"].tolist() == ids.tolist()
    with torch.no_grad():
        theirs = hf(input_ids=ids)
        logits = ours.model(ids) if "Bert" not in architecture else ours.model(ids)["logits"]
    expected = theirs.prediction_logits if "Bert" in architecture else theirs.logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    import_run(out, back, ["optim.lr=1e-5", "data.held_out=0.1"])
    again = load_model(back, torch.device("cpu"))
    assert again.step == 0
    assert again.config.optim.lr == 1e-5
    assert again.tokenizer.encode(text) == ids[0].tolist()
    for name, p in ours.model.named_parameters():
        assert torch.equal(p, dict(again.model.named_parameters())[name]), name


def test_imported_checkpoint_has_zero_moments_for_the_configured_optimizer(tmp_path: Path) -> None:
    export_run(make_run(tmp_path / "run", SECTIONS["GPT2LMHeadModel"]), tmp_path / "out")
    import_run(tmp_path / "out", tmp_path / "back", ["optim.name=muon"])
    checkpoint, _ = newest(tmp_path / "back" / "checkpoints")
    assert checkpoint is not None
    moments = {name.split("/")[1] for name in checkpoint.names() if name.endswith("/blocks.0.mlp.up.weight")}
    assert moments == {"weight", "momentum"}
    assert "model/exp_avg_sq/embed.token.weight" in checkpoint.names()
    assert not checkpoint.read("model/momentum/blocks.0.mlp.up.weight").any()  # type: ignore[union-attr]
    assert load(PretrainConfig, tmp_path / "back" / "config.yaml", []).tokenizer.name == "file"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_becomes_a_tokenizer_with_the_same_ids(
    kind: str, pieces: dict[str, Path], tmp_path: Path
) -> None:
    export_run(make_run(tmp_path / "run", SECTIONS["BertForPreTraining"], pieces[kind]), tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    ours = load_tokenizer(pieces[kind])
    text = TEXT[20_000:]
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    expected = ours.encode(text)
    assert len(ids) == len(expected)
    # Unigram paths of exactly the same score ("\n\n" + "\n") may be told apart differently.
    assert sum(a != b for a, b in zip(ids, expected, strict=True)) <= (0 if kind == "bpe" else 0.001 * len(ids))
    assert theirs.decode(ids) == text
    pair = theirs("a b", "c")
    a, b = ours.encode("a b"), ours.encode("c")
    assert pair["input_ids"] == [ours.cls_id, *a, ours.sep_id, *b, ours.sep_id]
    assert pair["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert theirs.mask_token_id == ours.mask_id


@pytest.mark.parametrize(
    ("section", "key"),
    [
        (GPTSection(**SMALL, **(LLAMA | {"activation": "relu2"}), qk_norm=True), "activation relu2, model.qk_norm"),
        (GPTSection(**SMALL, position="alibi"), "model.position alibi"),
        (GPTSection(**SMALL, logit_softcap=10.0), "model.logit_softcap 10.0"),
        (BERTSection(**SMALL, norm_position="pre"), "model.norm_position pre"),
    ],
)  # fmt: skip
def test_what_transformers_cannot_express_is_refused_by_key(
    section: GPTSection | BERTSection, key: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", section)
    with pytest.raises(UserError, match="no counterpart for") as error:
        export_run(run, tmp_path / "out")
    for part in key.split(", "):
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_export_removes_what_does_not_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(folder: Path, architecture: str, arguments: dict, weights: dict, size: str) -> None:  # type: ignore[type-arg]
        spoilt = weights | {"model.norm.weight": weights["model.norm.weight"] * 1.01}
        write_model(folder, architecture, arguments, spoilt, size)

    monkeypatch.setattr(export_module, "write_model", spoiled)
    run = make_run(tmp_path / "run", SECTIONS["LlamaForCausalLM"])
    with pytest.raises(UserError, match="logits differ from ours by"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_import_refuses_a_name_that_no_run_can_have(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a b: a run's name"):
        import_run(tmp_path, tmp_path / "a b")
    assert list(tmp_path.iterdir()) == []


def test_import_refuses_what_it_cannot_represent(tmp_path: Path) -> None:
    out, run = tmp_path / "out", tmp_path / "back"
    with pytest.raises(UserError, match=r"config\.json"):
        import_run(out, run)
    export_run(make_run(tmp_path / "run", SECTIONS["LlamaForCausalLM"]), out)
    path = out / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(UserError, match="model_type mamba is none of gpt2, llama, bert, t5"):
        import_run(out, run)
    path.write_text(json.dumps(config | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}))
    with pytest.raises(UserError, match="rope_type linear"):
        import_run(out, run)
    path.write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"lacks 9 tensors of LlamaForCausalLM, such as model\.layers\.2"):
        import_run(out, run)
    assert not run.exists()
