"""Encoder-decoders and T5ForConditionalGeneration."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cairn.config.finetune import TranslateSection
from cairn.config.model import Seq2SeqSection
from cairn.decode.translate import encode_source, translate
from cairn.errors import UserError
from cairn.hub.body import load_body
from cairn.hub.export_run import export_run
from cairn.hub.import_run import import_run
from cairn.models.build import build_model
from cairn.models.seq2seq import Seq2Seq
from cairn.objectives.span import start_of
from cairn.train.run import LoadedRun, load_model
from tests.hub.runs import SMALL, make_finetuned, make_pretrained, stir

WIDE = SMALL | {"n_layer": 3, "n_decoder_layer": 2, "d_ff": 48}


def their_model(**keys: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2, "vocab_size": 263}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes | keys)).eval()
    stir(model)
    return model


def save(model: Any, folder: Path) -> Path:
    """Their model with a tokenizer of bytes."""
    model.save_pretrained(folder)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "bytes.txt").touch()
    return folder


def opened(run: Path) -> LoadedRun:
    return load_model(run, torch.device("cpu"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["relu", "geglu"])
def test_export_computes_the_same_and_comes_back(activation: str, tied: bool, tmp_path: Path) -> None:
    section = Seq2SeqSection(**WIDE, activation=activation, tie_embeddings=tied)
    run, out = make_pretrained(tmp_path / "run", section), tmp_path / "out"
    assert "T5ForConditionalGeneration, step 7" in export_run(run, out)[0]
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(out, local_files_only=True).eval()
    ours = opened(run)
    assert isinstance(ours.model, Seq2Seq)
    source, target = torch.randint(7, 263, (2, 20)), torch.randint(7, 263, (2, 9))
    text = torch.arange(20) < torch.tensor([[20], [11]])
    with torch.no_grad():
        expected = theirs(input_ids=source, attention_mask=text.long(), decoder_input_ids=target).logits
        logits = ours.model(source, target, source_padding=text)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    import_run(out, tmp_path / "runs" / "back", ["objective.mean_span=2"])
    again = opened(tmp_path / "runs" / "back")
    assert again.config.objective.model_dump() == {"name": "span", "mask_prob": 0.15, "mean_span": 2.0}
    unsaid = {"vocab_size": None, "attention_dropout": 0.0, "init_std": section.init_std}
    assert again.section.model_dump() | unsaid == section.model_dump()
    weights = dict(again.model.named_parameters())
    for name, p in ours.model.named_parameters():  # a factor that is no power of two rounds
        torch.testing.assert_close(weights[name], p, rtol=1e-6, atol=0)


def test_a_fine_tuned_translator_writes_the_same_there(tmp_path: Path) -> None:
    run, out = make_finetuned(tmp_path / "run", Seq2SeqSection(**WIDE), TranslateSection()), tmp_path / "out"
    assert "T5ForConditionalGeneration" in export_run(run, out)[0]
    ours, text = opened(run), "un café, s'il vous plaît"
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, local_files_only=True)
    source = tokenizer(text, return_tensors="pt")
    ids = encode_source(ours.tokenizer, text)
    assert source["input_ids"].tolist() == [ids]
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(out, local_files_only=True).eval()
    assert isinstance(ours.model, Seq2Seq)
    start, eos = start_of(ours.tokenizer), ours.tokenizer.eos_id
    assert theirs.generation_config.decoder_start_token_id == start
    (written,) = translate(ours.model, [ids], start, eos, max_new_tokens=12)
    assert len(set(written)) > 1
    expected = theirs.generate(**source, max_new_tokens=12, do_sample=False, num_beams=1)[0].tolist()
    assert [i for i in expected[1:] if i != eos] == written


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
@pytest.mark.parametrize("tied", [True, False])
def test_their_weights_compute_the_same_here(kind: str, tied: bool, tmp_path: Path) -> None:
    theirs = their_model(feed_forward_proj=kind, tie_word_embeddings=tied)
    if not tied:  # as T5 1.1, which has a head of its own and no factor before it
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(263, 32))
    body = load_body(save(theirs, tmp_path / "t5"), whole=True)
    assert body.section.tie_embeddings is tied
    model = build_model(body.section, body.tokenizer.vocab_size).eval()
    model.load_state_dict(body.weights)
    source, target = torch.randint(263, (2, 20)), torch.randint(263, (2, 9))
    with torch.no_grad():
        expected = theirs(input_ids=source, decoder_input_ids=target).logits
        torch.testing.assert_close(model(source, target), expected, rtol=1e-4, atol=1e-4)
    assert "logits differ by" in import_run(tmp_path / "t5", tmp_path / "back")[0]


def test_embeddings_that_are_saved_under_another_name(tmp_path: Path) -> None:
    folder = save(their_model(), tmp_path / "t5")
    weights = dict(load_body(folder).weights)
    file = folder / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors["decoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    assert torch.equal(load_body(folder).weights["embed.token.weight"], weights["embed.token.weight"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"d_kv": 16}, r"t5/config\.json has 4 heads of d_kv 16, and here they make up d_model, 32"),
        ({"relative_attention_num_buckets": 16}, "relative_attention_num_buckets 16"),
        ({"feed_forward_proj": "gated-relu"}, "feed_forward_proj gated-relu"),
    ],
)
def test_a_t5_without_a_counterpart_is_refused_by_key(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(their_model(**keys), tmp_path / "t5")
    with pytest.raises(UserError, match=message):
        import_run(tmp_path / "t5", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_an_encoder_decoder_that_is_no_t5_is_refused_by_key(tmp_path: Path) -> None:
    run = make_pretrained(tmp_path / "run", Seq2SeqSection(**WIDE, position="rope", norm="layernorm"))
    with pytest.raises(UserError, match=r"T5For\w+ has no counterpart for model\.norm layernorm, model\.position rope"):
        export_run(run, tmp_path / "out")


def test_an_encoder_alone_lacks_the_decoder(tmp_path: Path) -> None:
    folder = save(their_model(), tmp_path / "t5")
    config = json.loads((folder / "config.json").read_text())
    transformers.T5EncoderModel(transformers.T5Config(**config)).save_pretrained(folder)
    with pytest.raises(UserError, match=r"lacks \d+ tensors of T5ForConditionalGeneration, such as decoder\.block\.0"):
        load_body(folder)
