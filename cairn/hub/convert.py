"""Weights between our names and those of `transformers`: one table per architecture, read in both directions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cairn.config.model import TransformerSection
from cairn.errors import UserError


@dataclass(frozen=True)
class Entry:
    """One of our tensors and the one or several of theirs that hold the same numbers."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...] = ()
    """Rows of each of theirs, where ours is several stacked."""
    transposed: bool = False
    """Whether theirs has inputs first (GPT-2's Conv1D)."""
    scales: tuple[float, ...] = ()
    """How many times each of theirs ours is (T5 leaves factors out that we have); empty: 1."""

    @property
    def factors(self) -> tuple[float, ...]:
        """One for each of theirs."""
        return self.scales or (1.0,) * len(self.theirs)


def to_hub(weights: Mapping[str, Tensor], table: Sequence[Entry]) -> dict[str, Tensor]:
    """Our weights under their names. Raises KeyError for a name the table has and `weights` has not."""
    out: dict[str, Tensor] = {}
    for entry in table:
        tensor = weights[entry.ours]
        parts = torch.split(tensor, list(entry.rows)) if entry.rows else (tensor,)
        for name, part, factor in zip(entry.theirs, parts, entry.factors, strict=True):
            part = part.t() if entry.transposed else part
            out[name] = (part if factor == 1.0 else part / factor).contiguous()
    return out


def from_hub(weights: Mapping[str, Tensor], table: Sequence[Entry]) -> dict[str, Tensor]:
    """Their weights under our names. Raises UserError listing what is missing, or has no place here."""
    wanted = {name for entry in table for name in entry.theirs}
    if missing := sorted(wanted - weights.keys()):
        raise UserError(f"the folder's weights lack {len(missing)} tensors, such as {missing[0]}")
    if extra := sorted(weights.keys() - wanted):
        raise UserError(f"the folder's weights hold {len(extra)} tensors that have no place here, such as {extra[0]}")
    out: dict[str, Tensor] = {}
    for entry in table:
        parts = []
        for name, factor in zip(entry.theirs, entry.factors, strict=True):
            part = weights[name].t() if entry.transposed else weights[name]
            parts.append(part if factor == 1.0 else part * factor)
        out[entry.ours] = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
    return out


def linear(
    ours: str,
    *theirs: str,
    bias: bool,
    rows: tuple[int, ...] = (),
    transposed: bool = False,
    scales: tuple[float, ...] = (),
) -> list[Entry]:
    """Entries of a linear layer's (or a norm's) weight and bias."""
    entries = [Entry(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), rows, transposed, scales)]
    if bias:
        entries.append(Entry(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs), rows))
    return entries


def qkv_rows(section: TransformerSection) -> tuple[int, int, int]:
    """Rows of queries, keys and values in the fused projection."""
    width = section.kv_heads * section.head_dim
    return section.d_model, width, width


def require(values: TransformerSection, architecture: str, **needed: object) -> None:
    """Raise UserError naming every key of `model` whose value the architecture cannot express."""
    wrong = [f"model.{key} {getattr(values, key)}" for key, value in needed.items() if getattr(values, key) != value]
    if wrong:
        raise UserError(
            f"transformers' {architecture} has no counterpart for {', '.join(wrong)}: it cannot be exported"
        )


def require_config(config: Mapping[str, object], **needed: object) -> None:
    """Raise UserError naming every key of their config.json whose value has no counterpart here."""
    wrong = [f"{key} {config[key]}" for key, value in needed.items() if config.get(key, value) != value]
    if wrong:
        raise UserError(f"config.json has {', '.join(wrong)}, which has no counterpart here: it cannot be imported")
