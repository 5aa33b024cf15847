"""Folders of transformers of any class, and in any number of files, as what fine-tuning begins from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cairn.errors import UserError
from cairn.hub.body import load_body
from cairn.hub.export_run import export_run
from cairn.hub.import_run import import_run
from cairn.models.build import build_model
from cairn.train.run import load_model
from tests.hub.runs import BODIES, make_pretrained, stir

SIZES: dict[str, dict[str, Any]] = {
    "GPT2": {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 48},
    "Llama": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
    },
    "Bert": {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48},
}
POOLER = {"pooler.dense.weight", "pooler.dense.bias"}


def their_folder(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Path]:
    """A random model of a class such as BertForMaskedLM, saved by transformers, beside a tokenizer of bytes."""
    family = next(name for name in SIZES if kind.startswith(name))
    make = getattr(transformers, kind)
    torch.manual_seed(0)
    model = make(make.config_class(vocab_size=263, pad_token_id=0, **SIZES[family])).eval()
    stir(model)
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "bytes.txt").touch()
    return model, folder


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("BertModel", POOLER),
        ("BertForMaskedLM", {"masked_head.*"}),
        ("BertForSequenceClassification", POOLER),
        ("BertForTokenClassification", set()),
        ("BertForPreTraining", POOLER | {"masked_head.*", "next_sentence_head.*"}),
        ("GPT2Model", set()),
        ("GPT2LMHeadModel", set()),
        ("GPT2ForSequenceClassification", set()),
        ("LlamaModel", set()),
        ("LlamaForCausalLM", {"head.weight"}),
        ("LlamaForTokenClassification", set()),
        ("LlamaForQuestionAnswering", set()),
    ],
)
def test_bodies_of_any_class_compute_the_same_here(kind: str, more: set[str], tmp_path: Path) -> None:
    theirs, folder = their_folder(kind, tmp_path / kind)
    body = load_body(folder)
    assert body.architecture == kind
    model = build_model(body.section, body.tokenizer.vocab_size).eval()
    left = model.load_state_dict(body.weights, strict=False)
    assert left.unexpected_keys == []
    heads = {name for name in body.weights if name.startswith(("head", "pooler", "masked_head", "next_sentence"))}
    assert {name if name in more else f"{name.partition('.')[0]}.*" for name in heads} == more
    missing = {name.partition(".")[0] for name in left.missing_keys}
    assert missing <= {"head", "pooler", "masked_head", "next_sentence_head"}
    ids = torch.randint(263, (2, 20))
    with torch.no_grad():
        expected = getattr(theirs, theirs.base_model_prefix, theirs)(input_ids=ids).last_hidden_state
        torch.testing.assert_close(model.hidden(ids), expected, rtol=1e-4, atol=1e-4)  # type: ignore[operator]


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a file, or the values of a JSON one."""
    values = json.loads(file.read_text()) if file.suffix == ".json" else load_file(file)
    change(values)
    if file.suffix == ".json":
        file.write_text(json.dumps(values))
    else:
        save_file(values, file, metadata={"format": "pt"})


def test_names_and_buffers_of_old_versions(tmp_path: Path) -> None:
    """gamma and beta of BERT's norms; masks of GPT-2's attention, and a body without prefix in a language model."""
    for kind in ("BertForMaskedLM", "GPT2Model"):
        folder = their_folder(kind, tmp_path / kind)[1]
        expected = load_body(folder).weights

        def age(tensors: dict[str, Any]) -> None:
            for name in list(tensors):
                old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
                tensors[old] = tensors.pop(name)
            for i in range(2 if "wte.weight" in tensors else 0):
                tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 48, 48)

        edit(folder / "model.safetensors", age)
        found = load_body(folder).weights
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_halves_become_fp32(tmp_path: Path) -> None:
    theirs, folder = their_folder("LlamaModel", tmp_path / "llama", torch.bfloat16)
    weights = load_body(folder).weights
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert torch.equal(weights["embed.token.weight"], theirs.embed_tokens.weight.float())


@pytest.mark.parametrize("body", BODIES)
def test_shards_both_ways(body: str, tmp_path: Path) -> None:
    run, out, back = make_pretrained(tmp_path / "run", BODIES[body]), tmp_path / "out", tmp_path / "back"
    export_run(run, out, max_shard_size="50KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert {path.name for path in out.glob("*.safetensors")} == files
    assert len(files) > 1
    assert sum(path.stat().st_size > 80_000 for path in out.glob("*.safetensors")) == 0
    import_run(out, back)
    ours, again = (load_model(path, torch.device("cpu")).model for path in (run, back))
    weights = dict(again.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in ours.named_parameters())
    gone = sorted(files)[-1]
    (out / gone).unlink()
    with pytest.raises(UserError, match=f"out: {gone}, a shard that model.safetensors.index.json names, is missing"):
        load_body(out)


def test_a_size_that_is_none_is_told(tmp_path: Path) -> None:
    run = make_pretrained(tmp_path / "run", BODIES["GPT2"])
    with pytest.raises(UserError, match="--max-shard-size five: no size; give one such as 5GB"):
        export_run(run, tmp_path / "out", max_shard_size="five")
    assert not (tmp_path / "out").exists()


def test_a_body_without_its_heads_is_no_run(tmp_path: Path) -> None:
    folder = their_folder("BertModel", tmp_path / "bert")[1]
    with pytest.raises(UserError, match=r"lacks \d+ tensors of BertForPreTraining, such as cls\.predictions\.bias"):
        import_run(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return their_folder("LlamaForCausalLM", tmp_path_factory.mktemp("made") / "llama")[1]


def no_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def damaged(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no such thing")


def no_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")


def in_config(**keys: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", lambda config: config.update(keys))


def in_tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "model.safetensors", change)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_tokenizer, r"llama has no tokenizer \(tokenizer\.json, tokenizer\.model, .*\): save the model's own there"),
        (pickled, r"llama has no model\.safetensors \(pickled weights are not read\): save it with transformers again"),
        (damaged, r"llama/model\.safetensors: .*: fetch it again"),
        (no_index, r"llama/model\.safetensors\.index\.json: no index of shards"),
        (in_config(vocab_size=200), r"ids up to 262, and the embedding 200 rows: give the folder the tokenizer"),
        (in_config(vocab_size=300), r"embed\.token\.weight is \(263, 32\), and config\.json makes it \(300, 32\)"),
        (in_config(model_type="mamba"), r"config\.json: model_type mamba is none of gpt2, llama, bert, t5"),
        (in_config(num_attention_heads=5), r"llama/config\.json"),
        (in_config(hidden_size="wide"), r"llama/config\.json: "),
        (
            in_config(num_hidden_layers=1),
            r"holds 9 tensors that config\.json has no place for, such as model\.layers\.1",
        ),
        (in_config(tie_word_embeddings=True), r"lm_head\.weight is not the embedding, and config\.json ties them"),
        (
            in_tensors(lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight")),
            r"llama lacks 1 tensors of LlamaForCausalLM, such as model\.layers\.1\.self_attn\.q_proj\.weight",
        ),
        (
            in_tensors(lambda tensors: tensors.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(32)})),
            r"holds 1 tensors that config\.json has no place for, such as model\.layers\.1\.self_attn\.q_proj\.bias",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_told_in_a_line(
    spoil: Callable[[Path], None], message: str, llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(llama, folder)
    load_body(folder)
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        load_body(folder)
    assert "\n" not in str(error.value)
