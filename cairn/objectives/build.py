"""From the `objective` section to an objective."""

from cairn.config.data import MaskedSection, ObjectiveSection, SpanSection
from cairn.data.tokenizer import Tokenizer
from cairn.objectives.base import Objective
from cairn.objectives.causal import Causal
from cairn.objectives.masked import Masked
from cairn.objectives.span import Span


def build_objective(section: ObjectiveSection, tokenizer: Tokenizer) -> Objective:
    """The objective a section names.

    Raises UserError when the tokenizer lacks a token that it needs.
    """
    if isinstance(section, MaskedSection):
        return Masked(section, tokenizer)
    return Span(section, tokenizer) if isinstance(section, SpanSection) else Causal()
