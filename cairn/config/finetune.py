"""The sections of `cairn finetune`: what is begun from, the examples, the task, which weights train."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from cairn.config.base import Section
from cairn.config.data import ObjectiveSection
from cairn.config.table import TableFormat


@dataclass(frozen=True)
class Head:
    """What is put on a model's hidden states."""

    kind: Literal["sequence", "mean", "token"]
    """One output a text: of its [CLS], or a decoder's last token; of the mean over its tokens; or one a token."""
    n_out: int
    """Numbers in an output."""


class BaseSection(Section):
    """What fine-tuning begins from."""

    path: str | None = None
    """A run folder, or a `transformers` folder; empty: from scratch, by `model` and `tokenizer`."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout after sub-layers and on attention probabilities; empty: the base's own."""


class ExamplesSection(TableFormat):
    """Where the examples are, and how long one may be."""

    train: str
    """File of training examples: .csv, .tsv, .jsonl, .json or .parquet (also .gz, .zst), or `datasets:NAME`; columns of
    tokens and tags (CoNLL) for task.name tag, SQuAD's JSON for task.name answer."""
    valid: str | None = None
    """File of held-out examples; empty: `held_out` of the training ones."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the training examples kept for validation where there is no `valid`."""
    max_len: int | None = Field(None, ge=4)
    """Most tokens of an example, special ones included; empty: model.max_seq_len."""
    too_long: Literal["cut", "error"] = "cut"
    """What is done with a text that is longer: cut it, and say how many are, or refuse it."""
    dir: str = "data"
    """Folder under which tokenizers trained on the examples, and prepared corpora, are kept."""


class LabelledText(Section):
    """Tasks on single texts and pairs."""

    text: str = "text"
    """Column of the text."""
    text_pair: str | None = None
    """Column of a second text; empty: there is none."""
    pooling: Literal["token", "mean"] = "token"
    """What is read: [CLS] or a decoder's last token; or the mean of all, which transformers has no class for."""

    def pooled(self, n_out: int) -> Head:
        """The head, with so many outputs."""
        return Head("mean" if self.pooling == "mean" else "sequence", n_out)


class ClassifySection(LabelledText):
    """One class a text, or pair of texts."""

    name: Literal["classify"] = "classify"
    label: str = "label"
    """Column of the class."""
    labels: list[str] = []
    """The classes, in the order of the outputs; empty: those of the training examples, sorted."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weight of an example in the loss: the same, or the smaller the more examples its class has."""

    @property
    def head(self) -> Head:
        """An output a class."""
        return self.pooled(len(self.labels))


class RegressSection(LabelledText):
    """A number a text, or pair of texts."""

    name: Literal["regress"] = "regress"
    label: str = "label"
    """Column of the number."""

    @property
    def head(self) -> Head:
        """One output."""
        return self.pooled(1)


class MultilabelSection(LabelledText):
    """Any number of classes a text, or pair of texts."""

    name: Literal["multilabel"] = "multilabel"
    label: str = "labels"
    """Column of the classes: a list, or text with `delimiter` between them."""
    delimiter: str = ","
    """What stands between classes where they are text."""
    labels: list[str] = []
    """The classes, in the order of the outputs; empty: those of the training examples, sorted."""
    threshold: float = Field(0.5, gt=0, lt=1)
    """Probability from which on a class is predicted."""

    @property
    def head(self) -> Head:
        """An output a class."""
        return self.pooled(len(self.labels))


class TagSection(Section):
    """One tag a word: entities in BIO, parts of speech."""

    name: Literal["tag"] = "tag"
    tokens: str = "tokens"
    """Column of the words of a JSON or Parquet file, a list; of CoNLL columns it is the first."""
    tags: str = "tags"
    """Column of their tags, a list; of CoNLL columns it is the last."""
    labels: list[str] = []
    """The tags, in the order of the outputs; empty: those of the training examples, sorted."""
    spaces: bool | None = None
    """Whether running text has spaces between words; empty: not where most words of the training examples are single
    Chinese characters."""

    @property
    def head(self) -> Head:
        """An output a tag."""
        return Head("token", len(self.labels))


class AnswerSection(Section):
    """The span of a context that answers a question (SQuAD 1.1 and 2.0)."""

    name: Literal["answer"] = "answer"
    stride: int = Field(64, ge=1)
    """Tokens that two windows of a long context share."""
    max_answer_len: int = Field(30, ge=1)
    """Most tokens of an answer."""
    max_question_len: int = Field(64, ge=1)
    """Most tokens of a question; a longer one is cut."""
    no_answer: bool | None = None
    """Whether a question may have no answer; empty: whether training examples have such questions."""
    no_answer_bias: float = 0.0
    """Added to the logarithm of the probability of no answer, where a question may have none."""
    n_best: int = Field(5, ge=1)
    """Answers that a prediction lists."""

    @property
    def head(self) -> Head:
        """A score of the first and of the last token."""
        return Head("token", 2)


class ChoiceSection(Section):
    """One of several texts that goes with a first one."""

    name: Literal["choice"] = "choice"
    text: str = "question"
    """Column of the first text."""
    choices: list[str] = ["choices"]
    """Column of the list of choices, or the columns of the choices."""
    label: str = "label"
    """Column of the right one: its number from 0, or its text."""

    @property
    def head(self) -> Head:
        """A score a choice."""
        return Head("sequence", 1)


class InstructSection(Section):
    """Answer as told: the response is trained, the prompt is only read."""

    name: Literal["instruct"] = "instruct"
    prompt: str = "prompt"
    """Column of the prompt."""
    response: str = "response"
    """Column of the response."""
    messages: str | None = None
    """Column of whole conversations, a list of {role, content}, in place of prompt and response."""
    system: str = ""
    """What every conversation that has no system message begins with as one."""
    max_new_tokens: int = Field(256, ge=1)
    """Most tokens of an answer that `cairn predict` writes."""

    @property
    def head(self) -> None:
        """The language model's own."""
        return None


class TextSection(Section):
    """Go on pretraining, on own text; `data.train` is then all that `data.source` of pretraining may be."""

    name: Literal["text"] = "text"
    text: str = "text"
    """Column or key that holds the text of JSON lines, CSV and Parquet."""
    seq_len: int | None = Field(None, ge=2)
    """Tokens in a training sequence; empty: model.max_seq_len."""
    document_mask: bool = False
    """Whether tokens packed into one sequence see only their own document."""
    objective: ObjectiveSection | None = None
    """What is predicted; empty: as the model's kind does by default, but BERT no next sentences."""

    @property
    def head(self) -> None:
        """The language model's own."""
        return None


class TranslateSection(Section):
    """A text into another: translation, summaries. Needs an encoder-decoder."""

    name: Literal["translate"] = "translate"
    source: str = "source"
    """Column of the text that is read; or with `target_train`, data.train holds it, one a line."""
    target: str = "target"
    """Column of the text that is written."""
    target_train: str | None = None
    """File with the targets of data.train, line by line; empty: both are columns of one file."""
    target_valid: str | None = None
    """The same of data.valid."""
    beams: int = Field(1, ge=1)
    """Beams of the translations that are judged in an evaluation."""
    length_penalty: float = 1.0
    """Exponent of the length that a beam's score is divided by."""
    max_new_tokens: int = Field(128, ge=1)
    """Most tokens of a translation."""
    eval_texts: int = Field(200, ge=0)
    """Held-out texts that are translated in an evaluation, spread evenly, for BLEU and chrF; 0: none."""

    @property
    def head(self) -> None:
        """The language model's own."""
        return None


TaskSection = Annotated[
    ClassifySection
    | RegressSection
    | MultilabelSection
    | TagSection
    | AnswerSection
    | ChoiceSection
    | InstructSection
    | TextSection
    | TranslateSection,
    Field(discriminator="name"),
]


class FullSection(Section):
    """Every weight trains."""

    name: Literal["full"] = "full"


class FrozenSection(Section):
    """The body stays as it is; only the head, and the last blocks if asked for, train."""

    name: Literal["frozen"] = "frozen"
    last_blocks: int = Field(0, ge=0)
    """Blocks from the last one down that train too, with the norm after them."""


class LoRASection(Section):
    """Low-rank updates beside frozen matrices (LoRA, arXiv 2106.09685), and the head."""

    name: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1)
    """Rank of an update."""
    alpha: float = Field(16.0, gt=0)
    """An update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on what an update reads."""
    targets: list[Literal["qkv", "out", "up", "gate", "down"]] = ["qkv", "out", "up", "gate", "down"]
    """Which matrices of a block have one."""


TuneSection = Annotated[FullSection | FrozenSection | LoRASection, Field(discriminator="name")]
