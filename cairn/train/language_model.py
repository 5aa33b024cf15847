"""Training a language model on text, as a Task: samples and losses of an objective, the network of a model section."""

import math
from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from cairn.config.schema import PretrainConfig, RunConfig
from cairn.data.batches import Batch, Samples
from cairn.data.prepare import Prepared
from cairn.models.build import build_model, flops_per_token, padded_vocab
from cairn.objectives.base import Piece, Split, TextSamples
from cairn.objectives.build import build_objective
from cairn.train.engine import Engine
from cairn.train.task import Engines, LossTask


class LanguageModel(LossTask):
    """GPT with causal LM, BERT with masked LM and next-sentence prediction, T5 with span denoising."""

    def __init__(self, config: PretrainConfig, prepared: Prepared) -> None:
        self.config: RunConfig = config
        self.pretraining, self.prepared = config, prepared
        self.vocab_size = padded_vocab(config.model, prepared.tokenizer.vocab_size)
        self.objective = build_objective(config.objective, prepared.tokenizer)

    def models(self) -> dict[str, nn.Module]:
        """The one network."""
        return {"model": build_model(self.pretraining.model, self.vocab_size)}

    def samples(self, split: str) -> Samples:
        """Sequences of `data.seq_len` tokens."""
        return self.training_samples if split == "train" else self._samples("valid")

    @cached_property
    def training_samples(self) -> TextSamples:
        """Of "train". Kept: opening the shards again for each `origin` would be slow."""
        return self._samples("train")

    def _samples(self, split: Split) -> TextSamples:
        return self.objective.samples(
            self.prepared, split, self.pretraining.seq_len, self.pretraining.seed, self.pretraining.data.document_mask
        )

    def origin(self, index: int) -> list[str]:
        """`file:line` (or `file row N` and such) of each document in training sample `index`, in order, each once."""
        return list(dict.fromkeys(where for where, _, _ in self.documents(index)))

    def documents(self, index: int) -> Iterator[tuple[str, Piece, NDArray[np.int32]]]:
        """Where each document in training sample `index` comes from, which part of it the sample holds, and that
        part's tokens, none of them masked."""
        samples = self.training_samples
        for span in samples.spans(index):
            stream, tokens = samples.windows.streams[span.stream], samples.windows.read(span)
            for piece in samples.windows.pieces(span):
                where = self.prepared.origin(span.stream, stream, piece.document)
                yield where, piece, tokens[piece.start - span.at : piece.stop - span.at]

    def weights(self, batch: Batch) -> dict[str, float]:
        """Targets of each loss term."""
        return self.objective.weights(batch)

    def loss_sums(self, model: nn.Module | Engine, batch: Batch) -> dict[str, Tensor]:
        """Negative log likelihood of each term, in nats, summed over its targets."""
        return self.objective.loss_sums(model, batch)

    def evaluate(self, engines: Engines, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean losses; for causal LM also bits per byte of the held-out text."""
        metrics = super().evaluate(engines, batches)
        streams = [stream for stream, _ in self.prepared.streams("valid")]
        tokens, size = sum(s.n_tokens for s in streams), sum(s.n_bytes for s in streams)
        known = all(s.n_bytes for s in streams if s.n_tokens)  # of a corpus that came tokenised they are not
        if self.pretraining.objective.name == "causal" and known:
            metrics["bits_per_byte"] = metrics["loss"] / math.log(2) * tokens / size
        return metrics

    def identity(self) -> dict[str, str]:
        """Fingerprints of the corpus and its tokenizer."""
        return {"corpus": self.prepared.manifest.fingerprint, "tokenizer": self.prepared.tokenizer.fingerprint}

    @property
    def tokens_per_sample(self) -> int:
        """Sequence length."""
        return self.pretraining.seq_len

    @cached_property
    def flops_per_sample(self) -> float:
        """Of a sequence, forward and backward. Kept: counting builds the model on no device, a tenth of a second."""
        return self.pretraining.seq_len * flops_per_token(
            self.pretraining.model, self.vocab_size, self.pretraining.seq_len
        )
