"""From the `objective` section to an objective."""

from cairn.config.data import CausalSection, MaskedSection
from cairn.data.tokenizer import Tokenizer
from cairn.objectives.base import Objective
from cairn.objectives.causal import Causal
from cairn.objectives.masked import Masked


def build_objective(section: CausalSection | MaskedSection, tokenizer: Tokenizer) -> Objective:
    """The objective a section names.

    Raises UserError when the tokenizer lacks a token that it needs.
    """
    return Masked(section, tokenizer) if isinstance(section, MaskedSection) else Causal()
