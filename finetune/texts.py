"""How texts are put before a model: [CLS] a [SEP] b [SEP] for encoders, a EOS b EOS for decoders."""

from collections.abc import Sequence

import numpy as np

from cairn.config.model import ModelSection
from cairn.data.batches import Item
from cairn.data.tokenizer import Tokenizer
from cairn.errors import UserError


class Frame:
    """Special tokens around one text or two; what a text's output is read from is the first or the last of them.

    Raises UserError when the tokenizer lacks one of them.
    """

    def __init__(self, tokenizer: Tokenizer, section: ModelSection, base: str | None) -> None:
        first = tokenizer.cls_id if section.name == "bert" else None
        end = tokenizer.sep_id if section.name == "bert" or tokenizer.eos_id is None else tokenizer.eos_id
        if end is None or (section.name == "bert" and first is None):
            needed = "[CLS] and [SEP]" if section.name == "bert" else "end-of-text token"
            raise UserError(
                f"{f'{base}: its' if base else 'the'} tokenizer has no {needed}, which texts are framed with: "
                "choose another base or tokenizer"
            )
        self.begin: list[int] = [] if first is None else [first]
        self.end = end
        self.segments = section.name == "bert" and section.n_segment > 1

    def special(self, n_texts: int) -> int:
        """Special tokens around so many texts."""
        return len(self.begin) + n_texts

    def __call__(self, texts: Sequence[Sequence[int]]) -> Item:
        """input_ids and segment_ids (T,) of texts of ids."""
        ids, segments = list(self.begin), [0] * len(self.begin)
        for number, text in enumerate(texts):
            ids += [*text, self.end]
            segments += [number if self.segments else 0] * (len(text) + 1)
        return {"input_ids": np.array(ids, dtype=np.int64), "segment_ids": np.array(segments, dtype=np.int64)}
