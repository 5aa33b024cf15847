"""The `data`, `tokenizer` and `objective` sections."""

from typing import Annotated, Literal

from pydantic import Field

from cairn.config.base import Section


class SourceSection(Section):
    """One corpus of a blend."""

    source: str
    """As `data.source`."""
    weight: float = Field(1.0, gt=0)
    """Share of the samples drawn from it, relative to the other weights."""
    text_field: str = "text"
    """Column or key that holds the text of JSON lines, CSV, Parquet and `datasets` sources."""


class DataSection(Section):
    """Which text, how it is split and packed."""

    source: str | list[SourceSection] = "stdlib"
    """`stdlib` (this Python's standard library), a file, folder or glob (text, .jsonl, .csv, .parquet, also as .gz or
    .zst), a Megatron .bin/.idx prefix, or `datasets:NAME`; a list of sections blends several by weight."""
    text_field: str = "text"
    """Column or key that holds the text of JSON lines, CSV, Parquet and `datasets` sources."""
    dir: str = "data"
    """Folder under which prepared corpora are kept."""
    held_out: float = Field(0.05, gt=0, lt=1)
    """Share of the documents kept for validation, chosen by document."""
    workers: int | None = Field(None, ge=1)
    """Processes that prepare the corpus; empty: one a core."""
    seq_len: int | None = Field(None, ge=2)
    """Tokens in a training sequence; empty: model.max_seq_len."""
    document_mask: bool = False
    """Whether tokens packed into one sequence see only their own document."""


class SentencePieceSection(Section):
    """A SentencePiece model trained on the corpus."""

    name: Literal["sentencepiece"] = "sentencepiece"
    vocab_size: int = Field(8192, ge=300)
    """Pieces, the special ones and the 256 bytes included."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """Algorithm."""
    sample_mb: float = Field(10.0, gt=0)
    """Megabytes of training text it is trained on, drawn evenly over the documents."""


class WordPieceSection(Section):
    """BERT's tokenizer (arXiv 1609.08144), trained on the corpus: words, then their pieces."""

    name: Literal["wordpiece"] = "wordpiece"
    vocab_size: int = Field(8192, ge=300)
    """Most pieces, the special ones included."""
    lowercase: bool = True
    """Whether capitals and accents are dropped; text comes back without them then."""
    sample_mb: float = Field(10.0, gt=0)
    """Megabytes of training text it is trained on, drawn evenly over the documents."""


class TokenizerFileSection(Section):
    """An existing tokenizer."""

    name: Literal["file"] = "file"
    path: str
    """A SentencePiece .model, a `tokenizers` tokenizer.json, a WordPiece vocab.txt, or a `transformers` folder."""


class BytesSection(Section):
    """The 256 byte values and the special tokens; needs no training."""

    name: Literal["bytes"] = "bytes"


TokenizerSection = Annotated[
    SentencePieceSection | WordPieceSection | TokenizerFileSection | BytesSection, Field(discriminator="name")
]


class CausalSection(Section):
    """Predict each token from those left of it."""

    name: Literal["causal"] = "causal"


class MaskedSection(Section):
    """Predict masked tokens (BERT, arXiv 1810.04805), with next-sentence prediction as an option."""

    name: Literal["masked"] = "masked"
    mask_prob: float = Field(0.15, gt=0, lt=1)
    """Share of tokens to predict; of these 80 % become [MASK], 10 % a random token, 10 % stay."""
    whole_word: bool = False
    """Choose whole words instead of single tokens."""
    next_sentence: bool = True
    """Train on pairs of segments, half of them consecutive, and predict which."""
    short_prob: float = Field(0.1, ge=0, le=1)
    """Share of samples cut to a random shorter length, so that all positions and lengths are seen."""


class SpanSection(Section):
    """Write down spans of tokens that are hidden in the source (T5, arXiv 1910.10683)."""

    name: Literal["span"] = "span"
    mask_prob: float = Field(0.15, gt=0, le=0.9)
    """Share of tokens to hide."""
    mean_span: float = Field(3.0, ge=1)
    """Tokens in a span, on average."""


ObjectiveSection = Annotated[CausalSection | MaskedSection | SpanSection, Field(discriminator="name")]
