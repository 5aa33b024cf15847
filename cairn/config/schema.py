"""One typed, frozen schema per verb. A YAML file, its `extends:` and dotted overrides fill it (see load.py)."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from cairn.config.base import Section
from cairn.config.data import (
    CausalSection,
    DataSection,
    MaskedSection,
    ObjectiveSection,
    SentencePieceSection,
    TokenizerSection,
)
from cairn.config.finetune import (
    BaseSection,
    ClassifySection,
    ExamplesSection,
    FullSection,
    TaskSection,
    TuneSection,
)
from cairn.config.model import BERTSection, GPTSection, ModelSection
from cairn.config.recipes import DCGANSection, DigitsSection, ViTSection
from cairn.config.train import (
    AdamWSection,
    CheckpointSection,
    EngineSection,
    FinetuneOptim,
    FinetuneOptimSection,
    FinetuneScheduleSection,
    FinetuneTrainSection,
    GuardSection,
    OptimSection,
    RunSection,
    ScheduleSection,
    SelectSection,
    TrackSection,
    TrainSection,
)


class RunConfig(Section):
    """What every verb that trains shares."""

    verb: ClassVar[str] = ""
    """Whose config it is: `cairn VERB`."""
    seed: int = Field(1234, ge=0, lt=2**32)
    """Decides initial weights, order, masks and dropout."""
    run: RunSection = RunSection()
    optim: OptimSection = AdamWSection()
    schedule: ScheduleSection = ScheduleSection()
    engine: EngineSection = EngineSection()
    train: TrainSection = TrainSection()
    guard: GuardSection = GuardSection()
    checkpoint: CheckpointSection = CheckpointSection()
    select: SelectSection = SelectSection()
    track: TrackSection = TrackSection()


class PretrainConfig(RunConfig):
    """`cairn pretrain`: a language model from scratch."""

    verb = "pretrain"
    data: DataSection = DataSection()
    tokenizer: TokenizerSection = SentencePieceSection()
    model: ModelSection = GPTSection()
    objective: ObjectiveSection = CausalSection()

    @property
    def seq_len(self) -> int:
        """Tokens in a training sequence."""
        return self.data.seq_len or self.model.max_seq_len

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.seq_len > self.model.max_seq_len:
            raise ValueError(f"data.seq_len {self.seq_len} is longer than model.max_seq_len {self.model.max_seq_len}")
        pairs = isinstance(self.objective, MaskedSection) and self.objective.next_sentence
        if pairs and isinstance(self.model, BERTSection) and self.model.n_segment < 2:
            raise ValueError("objective.next_sentence needs model.n_segment of at least 2")
        if self.data.document_mask and self.objective.name != "causal":
            raise ValueError(f"data.document_mask is for objective.name causal, not {self.objective.name}")
        if self.objective.name != self.model.objective:
            raise ValueError(
                f"model.name {self.model.name} trains with objective.name {self.model.objective}, "
                f"not {self.objective.name}"
            )
        return self


class FinetuneConfig(RunConfig):
    """`cairn finetune`: a trained language model on a task of its own, or one from scratch to compare with."""

    verb = "finetune"
    base: BaseSection = BaseSection()
    data: ExamplesSection
    task: TaskSection = ClassifySection()
    tune: TuneSection = FullSection()
    model: ModelSection | None = None
    """The model, where there is no base.path; a run folder's config has that of its base."""
    tokenizer: TokenizerSection | None = None
    """Its tokenizer, where there is no base.path."""
    optim: FinetuneOptim = FinetuneOptimSection()
    schedule: FinetuneScheduleSection = FinetuneScheduleSection()
    train: FinetuneTrainSection = FinetuneTrainSection()

    @model_validator(mode="after")
    def _begins_somewhere(self) -> Self:
        if self.base.path is None and (self.model is None or self.tokenizer is None):
            lacking = "model" if self.model is None else "tokenizer"
            raise ValueError(f"give base.path, a run or a transformers folder; or, from scratch, a {lacking} section")
        if self.base.path is not None and self.tokenizer is not None:
            raise ValueError(
                "base.path brings its own tokenizer and model: leave both sections out (tokenizer= model=)"
            )
        if self.model is not None:
            check_kind(self.task, self.model)
        return self


def check_kind(task: TaskSection, model: ModelSection) -> None:
    """Raise ValueError where a model of this kind cannot do the task."""
    fitting = {"instruct": ("gpt",), "translate": ("seq2seq",), "text": ("gpt", "bert", "seq2seq")}
    kinds = fitting.get(task.name, ("bert", "gpt"))
    if model.name not in kinds:
        raise ValueError(f"task.name {task.name} needs a model of kind {' or '.join(kinds)}, and this is {model.name}")


class VisionConfig(RunConfig):
    """`cairn vision`: an image classifier."""

    verb = "vision"
    data: DigitsSection = DigitsSection()
    model: ViTSection = ViTSection()


class GANConfig(RunConfig):
    """`cairn gan`: a generator against a discriminator."""

    verb = "gan"
    data: DigitsSection = DigitsSection()
    model: DCGANSection = DCGANSection()
