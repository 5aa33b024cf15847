"""What every section of a config is made of."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A typed, frozen part of a config: unknown keys are errors, and `true` is not an int."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
