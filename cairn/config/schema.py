"""One typed, frozen schema per verb. A YAML file, its `extends:` and dotted overrides fill it (see load.py)."""

from typing import Self

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
from cairn.config.model import BERTSection, GPTSection, ModelSection
from cairn.config.recipes import DCGANSection, DigitsSection, ViTSection
from cairn.config.train import (
    AdamWSection,
    CheckpointSection,
    EngineSection,
    GuardSection,
    OptimSection,
    RunSection,
    ScheduleSection,
    TrackSection,
    TrainSection,
)


class RunConfig(Section):
    """What every verb that trains shares."""

    seed: int = Field(1234, ge=0, lt=2**32)
    """Decides initial weights, order, masks and dropout."""
    run: RunSection = RunSection()
    optim: OptimSection = AdamWSection()
    schedule: ScheduleSection = ScheduleSection()
    engine: EngineSection = EngineSection()
    train: TrainSection = TrainSection()
    guard: GuardSection = GuardSection()
    checkpoint: CheckpointSection = CheckpointSection()
    track: TrackSection = TrackSection()


class PretrainConfig(RunConfig):
    """`cairn pretrain`: a language model from scratch."""

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
        if self.data.document_mask and isinstance(self.objective, MaskedSection):
            raise ValueError("data.document_mask is for objective.name causal, not masked")
        if self.objective.name != self.model.objective:
            raise ValueError(
                f"model.name {self.model.name} trains with objective.name {self.model.objective}, "
                f"not {self.objective.name}"
            )
        return self


class VisionConfig(RunConfig):
    """`cairn vision`: an image classifier."""

    data: DigitsSection = DigitsSection()
    model: ViTSection = ViTSection()


class GANConfig(RunConfig):
    """`cairn gan`: a generator against a discriminator."""

    data: DigitsSection = DigitsSection()
    model: DCGANSection = DCGANSection()
