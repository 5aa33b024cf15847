import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cairn.config.data import MaskedSection
from cairn.data.batches import IGNORE, Item, blank, collate
from cairn.errors import UserError
from cairn.objectives.build import build_objective
from cairn.objectives.masked import Masked, MaskedSamples
from tests.objectives.corpus import (
    CLS,
    EOS,
    MASK,
    PAD,
    SEP,
    VOCAB,
    Corpus,
    Words,
    counting_documents,
    random_documents,
    stream,
)

LENGTHS = [60, 300, 8, 1, 0, 2, 150, 90, 40, 120]


def make(
    folder: Path, documents: list[list[int]], split: str = "train", seed: int = 0, seq_len: int = 64, **section: object
) -> MaskedSamples:
    corpus = Corpus(*([(stream(folder / str(i), documents), 1.0)] for i in range(2)))
    samples = build_objective(MaskedSection(**section), Words()).samples(corpus, split, seq_len, seed)
    assert isinstance(samples, MaskedSamples)
    return samples


def original(item: Item) -> list[int]:
    """The tokens before masking, without padding."""
    tokens = np.where(item["labels"] != IGNORE, item["labels"], item["input_ids"])
    return tokens[item["attention_mask"] == 1].tolist()


def spans(item: Item) -> tuple[list[int], list[int]]:
    tokens = original(item)
    assert tokens[0] == CLS
    assert tokens[-1] == SEP
    middle = tokens.index(SEP)
    return tokens[1:middle], tokens[middle + 1 : -1]


def test_the_layout_of_pairs(tmp_path: Path) -> None:
    samples = make(tmp_path, random_documents(LENGTHS))
    lengths = set()
    for k in range(200):
        item = samples.item(k)
        assert all(item[key].shape == (64,) for key in ("input_ids", "segment_ids", "attention_mask", "labels"))
        assert item["next_sentence_label"].shape == ()
        a, b = spans(item)
        assert a
        assert b
        real = len(a) + len(b) + 3
        lengths.add(real)
        assert item["attention_mask"].tolist() == [1] * real + [0] * (64 - real)
        assert item["segment_ids"].tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1) + [0] * (64 - real)
        assert item["input_ids"][real:].tolist() == [PAD] * (64 - real)
        assert not {EOS, CLS, SEP, PAD} & {*a, *b}
    assert max(lengths) == 64
    assert len(lengths) > 5, "some are cut short"


def test_chosen_tokens_and_their_fate(tmp_path: Path) -> None:
    samples = make(tmp_path, random_documents([5000]), next_sentence=False, short_prob=0.1)
    chosen = masked = random = kept = 0
    for k in range(600):
        item = samples.item(k)
        clean = np.array(original(item))
        labels = item["labels"][: len(clean)]
        hidden = item["input_ids"][: len(clean)]
        at = labels != IGNORE
        assert at.sum() == max(1, round(0.15 * (clean > SEP).sum()))
        assert (clean[at] > SEP).all(), "special tokens are never targets"
        assert (hidden[~at] == clean[~at]).all()
        assert (hidden[at][hidden[at] != MASK] > SEP).all(), "a random token is never special"
        chosen += at.sum()
        masked += (hidden[at] == MASK).sum()
        kept += (hidden[at] == clean[at]).sum()
        random += ((hidden[at] != MASK) & (hidden[at] != clean[at])).sum()
    assert masked + random + kept == chosen
    for count, share in ((masked, 0.8), (random, 0.1 * (1 - 1 / VOCAB)), (kept, 0.1)):
        assert abs(count - share * chosen) < 5 * math.sqrt(share * (1 - share) * chosen)


def test_chosen_places_are_uniform(tmp_path: Path) -> None:
    samples = make(tmp_path, random_documents([5000]), next_sentence=False, short_prob=0.0)
    counts = sum((samples.item(k)["labels"][1:63] != IGNORE).astype(int) for k in range(1000))
    assert abs(counts - 1000 * 9 / 62).max() < 5 * math.sqrt(1000 * 0.15 * 0.85)


def test_next_sentence_labels_are_half_and_true(tmp_path: Path) -> None:
    documents = counting_documents(LENGTHS)
    home = {token: number for number, document in enumerate(documents) for token in document}
    samples = make(tmp_path, documents)
    labels = []
    for k in range(1000):
        item = samples.item(k)
        a, b = spans(item)
        assert {*np.diff(a), *np.diff(b)} <= {1}
        label = int(item["next_sentence_label"])
        if label == 0:
            assert b[0] == a[-1] + 1
            assert home[a[0]] == home[b[-1]]
        else:
            assert home[a[0]] != home[b[0]]
            assert home[b[0]] == home[b[-1]]
        labels.append(label)
    assert abs(sum(labels) - 500) < 5 * math.sqrt(250)


def test_all_text_of_long_and_short_documents_is_used(tmp_path: Path) -> None:
    documents = counting_documents(LENGTHS)
    samples = make(tmp_path, documents, short_prob=0.0)
    seen = {token for k in range(2000) for span in spans(samples.item(k)) for token in span}
    # A document of one token makes no pair, and is only ever a B.
    assert seen | set(documents[3]) == {token for document in documents for token in document}


def test_a_corpus_of_one_document_has_truthful_pairs(tmp_path: Path) -> None:
    samples = make(tmp_path, counting_documents([400]))
    labels = []
    for k in range(200):
        a, b = spans(samples.item(k))
        labels.append(int(samples.item(k)["next_sentence_label"]))
        assert labels[-1] == int(b[0] != a[-1] + 1)
    assert 60 < sum(labels) < 140


def test_documents_without_pairs_are_an_error(tmp_path: Path) -> None:
    samples = make(tmp_path, [[9]] * 100)
    with pytest.raises(UserError, match=r"objective\.next_sentence"):
        samples.item(0)


def test_packed_samples_go_over_documents(tmp_path: Path) -> None:
    samples = make(tmp_path, counting_documents(LENGTHS), "valid", next_sentence=False, short_prob=0.0)
    body: list[int] = []
    for k in range(len(samples)):
        item = samples.item(k)
        assert "next_sentence_label" not in item
        assert not item["segment_ids"].any()
        tokens = original(item)
        assert (tokens[0], tokens[-1]) == (CLS, SEP)
        body += tokens[1:-1]
    assert body == [token for document in counting_documents(LENGTHS) for token in (*document, SEP)]


def test_samples_are_pure_in_seed_and_number(tmp_path: Path) -> None:
    documents = random_documents(LENGTHS)
    for section in ({}, {"next_sentence": False}, {"whole_word": True}):
        first, second, other = (make(tmp_path, documents, seed=seed, **section) for seed in (1, 1, 2))
        items = [first.item(k) for k in range(30)]
        for k in reversed(range(30)):
            again = second.item(k)
            assert all(np.array_equal(items[k][key], again[key]) for key in again)
        assert any(not np.array_equal(items[k]["input_ids"], other.item(k)["input_ids"]) for k in range(30))


def test_a_window_has_other_masks_in_the_next_epoch(tmp_path: Path) -> None:
    samples = make(tmp_path, random_documents([61]), next_sentence=False, short_prob=0.0)
    assert len(samples) == 1
    assert len({tuple(samples.item(k)["labels"].tolist()) for k in range(5)}) == 5


def test_held_out_masks_do_not_depend_on_the_seed(tmp_path: Path) -> None:
    documents = random_documents(LENGTHS)
    first, second = (make(tmp_path, documents, "valid", seed) for seed in (1, 2))
    for k in range(len(first)):
        a, b = first.item(k), second.item(k)
        assert all(np.array_equal(a[key], b[key]) for key in a)


def test_whole_words(tmp_path: Path) -> None:
    starts = Words().word_starts()
    samples = make(tmp_path, random_documents(LENGTHS), whole_word=True)
    total = 0
    for k in range(200):
        item = samples.item(k)
        clean = original(item)
        chosen = item["labels"] != IGNORE
        for i in range(1, len(clean)):
            inside = clean[i] > SEP and clean[i - 1] > SEP and not starts[clean[i]]
            assert not inside or chosen[i] == chosen[i - 1], "a word is chosen whole"
        maskable = sum(token > SEP for token in clean)
        assert chosen.sum() >= 1
        assert chosen.sum() <= max(1, round(0.15 * maskable)) or maskable < 25
        total += chosen.sum() / maskable
    assert total / 200 > 0.12


@pytest.mark.parametrize("section", [{}, {"next_sentence": False}, {"whole_word": True}])
def test_target_positions_hold_every_target_once_in_one_shape(tmp_path: Path, section: dict[str, bool]) -> None:
    samples = make(tmp_path, random_documents(LENGTHS), **section)
    for k in range(200):
        item = samples.item(k)
        positions = item["target_positions"]
        assert positions.shape == (9,), "15 % of 61 or 62"
        assert positions[positions > 0].tolist() == np.flatnonzero(item["labels"] != IGNORE).tolist()
    assert item["labels"][0] == IGNORE, "what fills up is no target"


def test_a_word_longer_than_all_targets_is_asked_for_in_part(tmp_path: Path) -> None:
    inside = int(np.flatnonzero(~Words().word_starts())[-1])
    item = make(tmp_path, [[inside] * 500], next_sentence=False, whole_word=True, short_prob=0.0).item(0)
    assert np.flatnonzero(item["labels"] != IGNORE).tolist() == item["target_positions"].tolist() == [*range(1, 10)]


def test_a_tokenizer_without_the_tokens_is_named() -> None:
    with pytest.raises(UserError, match=r"\[MASK\], \[SEP\].*Words.*tokenizer.path"):
        Masked(MaskedSection(), Words(mask_id=None, sep_id=None))


def test_a_sequence_without_room_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.seq_len 4"):
        make(tmp_path, random_documents([100]), seq_len=4)


def test_weights_and_sums_per_term(tmp_path: Path) -> None:
    objective = Masked(MaskedSection(), Words())
    samples = make(tmp_path, random_documents(LENGTHS))
    batch = collate([samples.item(k) for k in range(4)])
    assert objective.weights(batch) == {"masked": float((batch["labels"] != IGNORE).sum()), "next_sentence": 4.0}
    filler = collate([blank(samples.item(0))])
    assert objective.weights(filler) == {"masked": 0.0, "next_sentence": 0.0}

    def model(input_ids: Tensor, **given: Tensor) -> dict[str, Tensor]:
        assert set(given) == {"segment_ids", "attention_mask", "labels", "next_sentence_label", "target_positions"}
        return {"masked": torch.tensor(1.0), "next_sentence": torch.tensor(2.0)}

    assert set(objective.loss_sums(model, batch)) == set(objective.weights(batch))
    packed = collate([make(tmp_path, random_documents(LENGTHS), next_sentence=False).item(0)])
    assert set(objective.weights(packed)) == {"masked"}
