"""What a plan must know of the corpus, without preparing it."""

from pathlib import Path

from cairn.config.data import BytesSection, TokenizerFileSection
from cairn.config.schema import PretrainConfig
from cairn.data.manifest import Manifest, read_manifest
from cairn.data.prepare import find_prepared
from cairn.data.tokenizer import BytesTokenizer, load_tokenizer
from cairn.errors import UserError


def vocabulary(config: PretrainConfig) -> int:
    """Size of the tokenizer's vocabulary: the prepared one's, or what the tokenizer section says.

    Raises UserError where tokenizer.path cannot be read.
    """
    section = config.tokenizer
    if isinstance(section, BytesSection):
        return BytesTokenizer().vocab_size
    if isinstance(section, TokenizerFileSection):
        return load_tokenizer(Path(section.path).expanduser()).vocab_size
    prepared = _prepared(config)
    return section.vocab_size if prepared is None else prepared.tokenizer.vocab_size


def held_out(config: PretrainConfig) -> int:
    """Held-out samples, 0 where the corpus is not prepared."""
    prepared = _prepared(config)
    return 0 if prepared is None else -(-prepared.total(lambda source: source.tokens("valid")) // config.seq_len)


def _prepared(config: PretrainConfig) -> Manifest | None:
    try:
        folder = find_prepared(config.data, config.tokenizer)
    except UserError:  # its source is not here: a plan may be made elsewhere
        return None
    return None if folder is None else read_manifest(folder)
