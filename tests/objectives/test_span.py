import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cairn.config.data import SpanSection
from cairn.config.model import Seq2SeqSection
from cairn.data.batches import IGNORE, Item, Loader, collate
from cairn.data.huggingface import load_huggingface
from cairn.data.tokenizer import BytesTokenizer
from cairn.errors import UserError
from cairn.models.build import build_model
from cairn.objectives.build import build_objective
from cairn.objectives.span import SpanSamples, hidden, lengths, start_of, window_of
from tests.objectives.corpus import EOS, MASK, PAD, SEP, VOCAB, Corpus, Words, counting_documents, stream

SENTINELS = tuple(range(VOCAB - 1, VOCAB - 101, -1))  # the last ids, downwards, as T5 has them
LENGTHS = [60, 300, 8, 1, 0, 2, 90]


def make(
    folder: Path,
    split: str = "train",
    seed: int = 0,
    seq_len: int = 64,
    sentinels: tuple[int, ...] = SENTINELS,
    **section: object,
) -> SpanSamples:
    tokens = stream(folder / "corpus", counting_documents(LENGTHS))
    corpus = Corpus([(tokens, 1.0)], [(tokens, 1.0)])
    objective = build_objective(SpanSection(**section), Words(sentinel_ids=sentinels))  # type: ignore[arg-type]
    samples = objective.samples(corpus, split, seq_len, seed)  # type: ignore[arg-type]
    assert isinstance(samples, SpanSamples)
    return samples


def rebuilt(item: Item, marks: tuple[int, ...]) -> tuple[list[int], list[list[int]]]:
    """The text of a sample, by a reader that knows the format alone, and the spans."""
    source, target = item["source_ids"].tolist(), item["labels"][item["labels"] != IGNORE].tolist()
    if "source_padding" in item:
        source = [i for i, real in zip(source, item["source_padding"], strict=True) if real]
    assert (source[-1], target[-1]) == (EOS, EOS)
    spans: list[list[int]] = []
    for token in target[:-1]:
        if token in marks:
            assert token == marks[len(spans) % len(marks)]
            spans.append([])
        else:
            spans[-1].append(token)
    text: list[int] = []
    number = 0
    for token in source[:-1]:
        if token in marks:
            assert token == marks[number % len(marks)]
            text += spans[number]
            number += 1
        else:
            text.append(token)
    assert number == len(spans)
    return text, spans


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("marks", [SENTINELS, (MASK,)])
def test_source_and_target_rebuild_the_text(tmp_path: Path, split: str, marks: tuple[int, ...]) -> None:
    samples = make(tmp_path, split, sentinels=marks if len(marks) > 1 else ())
    section = SpanSection()
    for k in range(3 * len(samples) if split == "train" else len(samples)):
        item = samples.item(k)
        tokens = samples.windows.read(samples.spans(k)[0]).tolist()
        text, spans = rebuilt(item, marks)
        assert text == tokens
        assert (sum(map(len, spans)), len(spans)) == hidden(section, len(tokens))
        assert all(spans)
        assert item["input_ids"][0] == PAD
        real = item["labels"] != IGNORE
        assert item["input_ids"][1:][real[1:]].tolist() == item["labels"][real][:-1].tolist()
        shapes = {key: value.shape for key, value in item.items()}
        assert shapes == {key: value.shape for key, value in samples.item(0).items()}
        assert ("source_padding" in item) == (split == "valid")


def test_every_held_out_token_is_in_one_sample(tmp_path: Path) -> None:
    samples = make(tmp_path, "valid")
    text = [token for k in range(len(samples)) for token in rebuilt(samples.item(k), SENTINELS)[0]]
    assert text == [token for document in counting_documents(LENGTHS) for token in (*document, EOS)]


@pytest.mark.parametrize("seq_len", [4, 5, 17, 64, 512])
@pytest.mark.parametrize("section", [{}, {"mask_prob": 0.5, "mean_span": 8.0}, {"mask_prob": 0.9, "mean_span": 1.0}])
def test_a_window_is_the_longest_that_fits(seq_len: int, section: dict[str, float]) -> None:
    spans = SpanSection(**section)  # type: ignore[arg-type]
    n = window_of(spans, seq_len)
    assert max(lengths(spans, n)[:2]) <= seq_len < max(lengths(spans, n + 1)[:2])


def test_t5s_lengths() -> None:
    assert window_of(SpanSection(), 512) == 568  # as T5's own random_spans_helper
    assert lengths(SpanSection(), 568) == (512, 114, 28)


def test_about_as_much_is_hidden_everywhere(tmp_path: Path) -> None:
    samples = make(tmp_path, sentinels=())
    n = samples.windows.stride
    count, spans = hidden(SpanSection(), n)
    assert abs(count / n - 0.15) < 0.01
    assert abs(count / spans - 3) < 0.5
    at, draws, sizes = np.zeros(n), 2000, []
    for k in range(draws):
        rng = np.random.default_rng(k)
        _, target = samples._hide(np.arange(100, 100 + n), rng)
        at[target[target >= 100] - 100] += 1
        sizes += np.diff(np.flatnonzero(np.append(target[:-1], MASK) == MASK)).tolist()
    # The ends of a window are where spans end, so a little less of them is hidden.
    inner = at[5:-5]
    assert abs(inner - inner.mean()).max() < 5 * math.sqrt(draws * 0.15 * 0.85)
    assert at.min() > 0.25 * inner.mean()
    assert {1, 2, 3, 4, 5} <= {size - 1 for size in sizes}


def test_samples_are_pure_in_seed_and_number(tmp_path: Path) -> None:
    first, second, other = (make(tmp_path / str(i), seed=seed) for i, seed in enumerate((1, 1, 2)))
    items = [first.item(k) for k in range(30)]
    for k in reversed(range(30)):
        again = second.item(k)
        assert all(np.array_equal(items[k][key], again[key]) for key in again)
    assert any(not np.array_equal(items[k]["source_ids"], other.item(k)["source_ids"]) for k in range(30))


def test_what_it_needs_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"objective\.name span needs <extra_id_0> \.\.\. or \[MASK\].*Words, 1000 tokens"
    ):
        build_objective(SpanSection(), Words(mask_id=None))
    with pytest.raises(UserError, match=r"span needs </s> or \[SEP\]"):
        build_objective(SpanSection(), Words(eos_id=None, sep_id=None))
    with pytest.raises(UserError, match=r"data\.seq_len 64 has 3 hidden spans, and the tokenizer 2 sentinels"):
        make(tmp_path, sentinels=SENTINELS[:2])
    with pytest.raises(UserError, match=r"data\.seq_len 2 leaves no room"):
        make(tmp_path, seq_len=2)
    assert build_objective(SpanSection(), Words(eos_id=None)).end_id == SEP  # type: ignore[attr-defined]
    assert start_of(Words()) == PAD
    assert start_of(Words(pad_id=None)) == EOS


def test_sentinels_of_a_t5_folder_are_found(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models

    assert BytesTokenizer().sentinel_ids == ()
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3}, unk_token="<unk>"))
    backend.add_special_tokens([AddedToken(f"<extra_id_{i}>", special=True) for i in (2, 1, 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_huggingface(tmp_path)
    assert loaded.sentinel_ids == (6, 5, 4)
    assert set(loaded.sentinel_ids) <= loaded.special_ids()
    build_objective(SpanSection(), loaded)


def test_the_loss_is_the_models_and_it_falls(tmp_path: Path) -> None:
    torch.manual_seed(0)
    samples = make(tmp_path, "train", seq_len=32)
    objective = build_objective(SpanSection(), Words(sentinel_ids=SENTINELS))
    model = build_model(Seq2SeqSection(n_layer=1, n_head=2, d_model=32, max_seq_len=32, dropout=0.0), VOCAB)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        batch = collate([samples.item(8 * step + i) for i in range(8)])
        loss = objective.loss_sums(model, batch)["loss"] / objective.weights(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(1024)) < 0.5
    assert np.mean(losses[-10:]) < 0.7 * losses[0]


def test_held_out_losses_do_not_hang_on_padding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    samples = make(tmp_path, "valid")
    objective = build_objective(SpanSection(), Words(sentinel_ids=SENTINELS))
    model = build_model(Seq2SeqSection(n_layer=1, n_head=2, d_model=32, max_seq_len=64, init_std=0.3), VOCAB).eval()
    short = samples.item(len(samples) - 1)
    n = int(short["source_padding"].sum())
    assert n < samples.n_source

    def loss(item: Item) -> Tensor:
        return objective.loss_sums(model, collate([item]))["loss"]

    cut = {"source_ids": short["source_ids"][:n], "input_ids": short["input_ids"], "labels": short["labels"]}
    torch.testing.assert_close(loss(short), loss(cut))
    for batch in Loader(samples, 1, 1).evaluation(4):
        assert objective.weights(batch)["loss"] == float((batch["labels"] != IGNORE).sum())
        assert objective.loss_sums(model, batch)["loss"].isfinite()
