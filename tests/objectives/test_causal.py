from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cairn.config.data import CausalSection
from cairn.data.batches import IGNORE, Loader, collate
from cairn.errors import UserError
from cairn.objectives.build import build_objective
from cairn.objectives.causal import Causal
from tests.objectives.corpus import EOS, Corpus, Words, counting_documents, stream


@pytest.mark.parametrize("total", [2, 9, 10, 64, 65, 66, 100])
def test_every_held_out_token_but_the_first_is_predicted_once(tmp_path: Path, total: int) -> None:
    valid = stream(tmp_path, counting_documents([total // 2, total - total // 2 - 2] if total > 3 else [total - 1]), 2)
    assert valid.n_tokens == total
    samples = Causal().samples(Corpus([], [(valid, 1.0)]), "valid", 8, 0)
    items = [samples.item(k) for k in range(len(samples))]
    found = np.concatenate([item["labels"] for item in items])
    assert found[found != IGNORE].tolist() == valid.read(1, total).tolist()
    inputs = np.concatenate([item["input_ids"] for item in items])
    assert inputs[found != IGNORE].tolist() == valid.read(0, total - 1).tolist()
    assert all(item["input_ids"].shape == item["labels"].shape == (8,) for item in items)


def test_held_out_streams_follow_one_another(tmp_path: Path) -> None:
    streams = [(stream(tmp_path / str(n), counting_documents([n])), 1.0) for n in (20, 1, 33)]
    samples = Causal().samples(Corpus([], streams), "valid", 8, 0)
    labels = np.concatenate([samples.item(k)["labels"] for k in range(len(samples))])
    expected = np.concatenate([s.read(1, s.n_tokens) for s, _ in streams])
    assert labels[labels != IGNORE].tolist() == expected.tolist()
    with pytest.raises(IndexError):
        samples.item(len(samples))


def test_an_epoch_of_training_sees_every_window_once_and_each_epoch_cuts_elsewhere(tmp_path: Path) -> None:
    train = stream(tmp_path, counting_documents([50, 48]))
    samples = Causal().samples(Corpus([(train, 1.0)]), "train", 10, seed=3)
    assert len(samples) == 10
    epochs = [[samples.item(k)["labels"] for k in range(e * 10, e * 10 + 10)] for e in range(3)]
    expected = Counter(train.read(0, 100).tolist())
    for epoch in epochs:
        assert Counter(np.concatenate(epoch).tolist()) == expected
    assert len({tuple(sorted(int(labels[0]) for labels in epoch)) for epoch in epochs}) > 1
    # Labels are the inputs one on, round the end of the stream too.
    following = dict(zip(train.read(0, 100).tolist(), np.roll(train.read(0, 100), -1).tolist(), strict=True))
    for k in range(30):
        item = samples.item(k)
        for a, b in zip(item["input_ids"].tolist(), item["labels"].tolist(), strict=True):
            assert a == EOS or following[a] == b


def test_samples_are_pure_in_seed_and_number(tmp_path: Path) -> None:
    corpus = Corpus([(stream(tmp_path, counting_documents([90] * 10)), 1.0)])
    first, second, other = (Causal().samples(corpus, "train", 16, seed) for seed in (1, 1, 2))
    forward = [first.item(k)["input_ids"] for k in range(40)]
    backward = [second.item(k)["input_ids"] for k in reversed(range(40))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert any(not np.array_equal(a, other.item(k)["input_ids"]) for k, a in enumerate(forward))


def test_sources_are_blended_by_weight(tmp_path: Path) -> None:
    low = stream(tmp_path / "low", [[7] * 499])
    high = stream(tmp_path / "high", [[8] * 99])
    samples = Causal().samples(Corpus([(low, 0.25), (high, 0.75)]), "train", 16, 0)
    kinds = Counter(int(samples.item(k)["input_ids"].max()) for k in range(1024))
    assert kinds == {7: 256, 8: 768}


def test_document_mask_numbers_documents_and_hides_their_first_tokens(tmp_path: Path) -> None:
    lengths = [5, 0, 1, 30, 2, 7]
    for split in ("train", "valid"):
        tokens = stream(tmp_path / split, counting_documents(lengths), 2)
        corpus = Corpus([(tokens, 1.0)], [(tokens, 1.0)])
        samples = Causal().samples(corpus, split, 12, 0, document_mask=True)
        for k in range(len(samples)):
            item = samples.item(k)
            ids, labels, documents = item["input_ids"], item["labels"], item["document_ids"]
            assert documents.dtype == np.int64
            assert documents.shape == (12,)
            assert documents[0] == 0
            real = int((ids != 0).sum())
            assert np.diff(documents[:real]).tolist() == (ids[: real - 1] == EOS).astype(int).tolist()
            assert set(labels[ids == EOS].tolist()) <= {IGNORE}
            assert (labels[:real][ids[:real] != EOS] != IGNORE).all()


def test_a_corpus_shorter_than_a_sequence_is_named(tmp_path: Path) -> None:
    short = stream(tmp_path, counting_documents([15]))
    assert Causal().samples(Corpus([(short, 1.0)]), "train", 15, 0).item(0)["labels"].shape == (15,)
    with pytest.raises(UserError, match=r"source 0 has 16 training tokens.*17"):
        Causal().samples(Corpus([(short, 1.0)]), "train", 16, 0)


def test_the_loss_is_the_models_over_the_counted_targets(tmp_path: Path) -> None:
    valid = stream(tmp_path, counting_documents([20]))
    objective = build_objective(CausalSection(), Words())
    samples = objective.samples(Corpus([], [(valid, 1.0)]), "valid", 8, 0, True)

    def model(input_ids: Tensor, labels: Tensor, document_ids: Tensor | None) -> Tensor:
        assert document_ids is not None
        return (labels != IGNORE).sum() * 2.0

    for batch in Loader(samples, 1, 1).evaluation(2):
        weight = objective.weights(batch)["loss"]
        assert weight == float((batch["labels"] != IGNORE).sum())
        assert objective.loss_sums(model, batch)["loss"] == torch.tensor(2 * weight)
    assert collate([samples.item(0)])["input_ids"].dtype == torch.int64
