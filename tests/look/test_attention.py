"""`cairn attention`: the numbers are those of `transformers`, and the picture shows all of them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from matplotlib.figure import Figure

from cairn.config.model import Seq2SeqSection
from cairn.data.tokenizer import BytesTokenizer
from cairn.errors import UserError
from cairn.hub.export_run import export_run
from cairn.look.attention import chosen, main
from cairn.look.heatmap import draw
from cairn.look.maps import Maps, attention_maps
from cairn.look.text import tokenize
from cairn.models.bert import BERT as BERTModel
from cairn.models.build import build_model
from cairn.objectives.span import start_of
from cairn.train.run import load_model
from tests.look.runs import BERT, GPT, SMALL, make_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {section.name: make_run(folder / section.name, section) for section in (BERT, GPT)}


@pytest.mark.parametrize(("name", "pair"), [("gpt", None), ("bert", None), ("bert", "and nuts")])
def test_maps_are_those_of_transformers(name: str, pair: str | None, runs: dict[str, Path], tmp_path: Path) -> None:
    export_run(runs[name], tmp_path / "out")
    auto = transformers.AutoModel if name == "gpt" else transformers.BertModel
    theirs = auto.from_pretrained(tmp_path / "out", attn_implementation="eager", local_files_only=True).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    read = tokens("a bolt", pair, return_tensors="pt")
    with torch.no_grad():
        expected = torch.cat(theirs(**read, output_attentions=True).attentions)
    maps = attention_maps(load_model(runs[name], CPU), "a bolt", pair)
    assert maps.values.shape == (2, 4, *read["input_ids"].shape[1:] * 2)
    np.testing.assert_allclose(maps.values, expected.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(maps.values.sum(-1), 1, rtol=0, atol=1e-5)
    assert maps.values.std() > 0.05  # these weights do tell tokens apart
    if name == "gpt":
        assert not np.triu(maps.values, 1).any()
    else:
        assert np.triu(maps.values, 1).any()


def test_labels_are_what_people_read(runs: dict[str, Path]) -> None:
    maps = attention_maps(load_model(runs["bert"], CPU), "a b\n\t", "é")
    assert maps.queries == ["[CLS]", "a", "␣", "b", "↵", "⇥", "[SEP]", "\ufffd", "\ufffd", "[SEP]"]
    assert attention_maps(load_model(runs["gpt"], CPU), "a b").keys == ["a", "␣", "b"]


def test_an_encoder_decoder_shows_what_each_written_token_took_from_the_source() -> None:
    torch.manual_seed(0)
    section = Seq2SeqSection(**SMALL, n_decoder_layer=3)
    tokenizer, model = BytesTokenizer(), build_model(section, BytesTokenizer.vocab_size).eval()
    run = type("Run", (), {"model": model, "tokenizer": tokenizer})
    maps = attention_maps(run, "source", target="tar")  # type: ignore[arg-type]
    assert (maps.queries, maps.keys) == (["t", "a", "r", "</s>"], [*"source", "</s>"])
    assert maps.values.shape == (3, 4, 4, 7)
    np.testing.assert_allclose(maps.values.sum(-1), 1, rtol=0, atol=1e-5)
    # Its first row belongs to the token that stands before all targets.
    record: list[torch.Tensor] = []
    memory = model.encode(torch.tensor([[*tokenizer.encode("source"), 3]]))
    model.decode(torch.tensor([[start_of(tokenizer)]]), memory, cross_record=record)
    np.testing.assert_allclose(maps.values[:, :, :1], torch.cat(record).detach().numpy(), rtol=0, atol=1e-5)
    panels, columns = chosen(maps, None, None)
    titles = [panel and panel.title for panel in panels]
    assert (titles[1:5], len(panels), columns) == (
        ["layer 2, mean", "layer 3, mean", None, "layer 3, head 1"], 8, 4
    )  # fmt: skip
    np.testing.assert_allclose(panels[1].values, maps.values[1].mean(0))  # type: ignore[union-attr]
    figure = draw(panels, columns, maps, "run")
    assert [axes.get_title() for axes in figure.axes[:-1]] == [title for title in titles if title]
    alone = attention_maps(run, "source")  # type: ignore[arg-type]
    assert alone.queries[-1] == "</s>"
    assert len(alone.queries) <= section.max_seq_len
    with pytest.raises(UserError, match="see --target"):
        attention_maps(run, "source", pair="b")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--target has 60 tokens"):
        attention_maps(run, "source", target="b" * 59)  # type: ignore[arg-type]


def texts(figure: Figure) -> list[str]:
    return [label.get_text() for axes in figure.axes for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]


def test_the_picture_has_every_map_and_the_labels_at_its_edges() -> None:
    values = np.random.default_rng(0).dirichlet(np.ones(3), (2, 4, 3)).astype(np.float32)
    maps = Maps(values, ["q$1", "q$2", "q3"], ["k1", "k2", "a very long key indeed"])
    panels, columns = chosen(maps, None, None)
    figure = draw(panels, columns, maps, "run")
    assert [axes.get_title() for axes in figure.axes[:8]] == [
        f"layer {i}, head {j}" for i in (1, 2) for j in (1, 2, 3, 4)
    ]
    for axes, expected in zip(figure.axes, values.reshape(8, 3, 3), strict=False):
        np.testing.assert_array_equal(axes.images[0].get_array(), expected)
    assert texts(figure).count("q$2") == 2
    assert texts(figure).count("a very long k…") == 4
    panels, columns = chosen(maps, 2, 3)
    figure = draw(panels, columns, maps, "run")
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), values[1, 2])
    numbers = [text.get_text() for text in figure.axes[0].texts]
    assert numbers == ["1" if v >= 0.995 else f"{v:.2f}"[1:] for v in values[1, 2].ravel() if v >= 0.005]


def test_labels_of_a_long_text_never_lie_upon_each_other() -> None:
    n = 400
    maps = Maps(np.full((1, 2, n, n), 1 / n, np.float32), ["word"] * n, ["word"] * n)
    panels, columns = chosen(maps, None, None)
    figure = draw(panels, columns, maps, "run")
    axes = figure.axes[0]
    shown = [label for label in axes.get_yticklabels() if label.get_text()]
    height = axes.get_position().height * figure.get_figheight() * 72
    assert 10 < len(shown) <= height / shown[0].get_fontsize()


def test_the_command_writes_picture_and_numbers(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "maps.png"
    command = [str(runs["gpt"]), "--text", "ab\u6771", "--layer", "1", "--out", str(out), "--numbers"]
    monkeypatch.setattr(sys, "argv", ["attention", *command])
    main()
    assert out.read_bytes().startswith(b"\x89PNG")
    with np.load(out.with_suffix(".npz"), allow_pickle=False) as numbers:
        assert numbers["attention"].shape == (2, 4, 5, 5)
        assert numbers["keys"].tolist()[:2] == ["a", "b"]
    assert capsys.readouterr().out.startswith(f"attention: {out}\n")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("gpt", ["--text", "x" * 49], "--text has 49 tokens, and model.max_seq_len is 48"),
        ("bert", ["--text", "x" * 47], "--text has 49 tokens"),
        ("gpt", ["--text", " "], "--text is empty"),
        ("bert", ["--text", "a", "--text-pair", ""], "--text-pair is empty"),
        ("gpt", ["--text", "a", "--target", "b"], "--target is for an encoder-decoder"),
        ("gpt", ["--text", "a", "--layer", "3"], "--layer 3: the model has 2, counted from 1"),
        ("gpt", ["--text", "a", "--head", "0"], "--head 0: the model has 4, counted from 1"),
        ("gpt", ["--text", "a", "--out", "x.jpg"], "--out x.jpg: expected a file that ends with .png, .svg, .pdf"),
        ("gpt", ["--text", "a", "--out", "/dev/null/x.png"], "give --out FILE where one can be written"),
    ],
)
def test_mistakes_are_told_in_one_line(
    name: str, options: list[str], says: str, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["attention", str(runs[name]), *options])
    with pytest.raises(UserError) as error:
        main()
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_pairs_need_segments_and_special_tokens() -> None:
    one = BERTModel(BERT.model_copy(update={"n_segment": 1}), 263)
    with pytest.raises(UserError, match="reads no pairs"):
        tokenize(one, BytesTokenizer(), ["a"], ["b"])
    tokenizer = BytesTokenizer()
    tokenizer.cls_id = None
    with pytest.raises(UserError, match=r"has no \[CLS\] and \[SEP\]"):
        tokenize(one, tokenizer, ["a"])
