"""From a config's `data` and `tokenizer` sections to a folder of shards, once; and what trains from that folder.

    data/NAME-HASH/manifest.json       written last: a folder that has it is whole
    data/NAME-HASH/tokenizer/          what load_tokenizer reads
    data/NAME-HASH/S-UNIT.train.bin    Megatron shards of source S, .idx beside; likewise .valid
    data/NAME-HASH/S-UNIT.valid.jsonl.zst   held-out text;   S-UNIT.json   what the unit holds
    data/NAME-HASH/S-UNIT.origin.npz   file and line of each document

HASH covers what decides the content: sources (with size and time of every file), text fields, tokenizer section and
held-out share. Shards do not depend on the number of workers. A lock makes a second run wait for the first; where the
file system has no locks both do the same work and rename the same bytes into place.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from cairn.config.data import DataSection, SourceSection, TokenizerFileSection, TokenizerSection
from cairn.data import baselines, megatron
from cairn.data.corpus import Listing, Part, divide, documents, list_source, megatron_prefix
from cairn.data.encode import Job, Split, check_unit, decide_split, read_held_out, shard_prefix
from cairn.data.manifest import FORMAT, Manifest, SourceInfo, SplitName, TokenizerInfo, UnitInfo, read_manifest
from cairn.data.origin import origin
from cairn.data.pool import encode_all, say
from cairn.data.shards import Shard, TokenStream, Window, allow_many_files
from cairn.data.tokenizer import BytesTokenizer, Tokenizer, load_tokenizer
from cairn.data.train_tokenizer import train_on_sample
from cairn.errors import UserError


@dataclass(frozen=True)
class Text:
    """A source of text, listed, cut into units and split."""

    section: SourceSection
    listing: Listing
    units: list[list[Part]]
    split: Split


def prepare(data: DataSection, tokenizer: TokenizerSection) -> Path:
    """The prepared folder of these sections; made, gone on with, or mended where it is not whole.

    Safe when several runs call it at once. Raises UserError naming the file and line of what cannot be used.
    """
    sources, listed, folder = _named(data, tokenizer)
    manifest = _whole(folder)
    if manifest is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(folder):
                manifest = _whole(folder, tell=True) or _build(data, tokenizer, sources, listed, folder)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise
            raise UserError(f"data.dir {folder}: {error.strerror}; make room there, or set data.dir") from error
    return _weighted(folder, manifest, [section.weight for section in sources])


def find_prepared(data: DataSection, tokenizer: TokenizerSection) -> Path | None:
    """The folder that `prepare` would return, if it is there and whole; makes nothing.

    Raises UserError for a source that cannot be found.
    """
    sources, _, folder = _named(data, tokenizer)
    manifest = _whole(folder)
    if manifest is None:
        return None
    view = _view(folder, manifest, [section.weight for section in sources])
    return view if read_manifest(view) else None


def prepared_path(data: DataSection, tokenizer: TokenizerSection) -> Path:
    """Where the shards of these sections are, or would be. Raises UserError for a source that cannot be found."""
    return _named(data, tokenizer)[2]


def _named(data: DataSection, tokenizer: TokenizerSection) -> tuple[list[SourceSection], list[Listing | Path], Path]:
    """The sources, what each of them is, and the folder of their shards."""
    sources = (
        [SourceSection(source=data.source, text_field=data.text_field)] if isinstance(data.source, str) else data.source
    )
    if not sources:
        raise UserError("data.source: the list is empty")
    listed = [_listed(section, tokenizer) for section in sources]
    return sources, listed, Path(data.dir) / f"{_name(listed)}-{_key(data, tokenizer, sources, listed)}"


def _listed(section: SourceSection, tokenizer: TokenizerSection) -> Listing | Path:
    """The files of a text source, or the prefix of a tokenised one."""
    prefix = megatron_prefix(section.source)
    if prefix is None:
        return list_source(section.source)
    if not isinstance(tokenizer, TokenizerFileSection):
        raise UserError(
            f"data.source {section.source} is tokenised already: set tokenizer.name=file and tokenizer.path"
        )
    return prefix


def _name(listed: Sequence[Listing | Path]) -> str:
    name = listed[0].name if len(listed) == 1 else "blend"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:40] or "corpus"


def _key(
    data: DataSection,
    tokenizer: TokenizerSection,
    sources: Sequence[SourceSection],
    listed: Sequence[Listing | Path],
) -> str:
    """Hash of what decides the content of a folder."""
    states = [megatron.state(found) if isinstance(found, Path) else found.state for found in listed]
    fields = [section.text_field for section in sources]
    if isinstance(tokenizer, TokenizerFileSection):
        made_by = load_tokenizer(Path(tokenizer.path).expanduser()).fingerprint
    else:
        made_by = tokenizer.model_dump_json()
    text = json.dumps([FORMAT, states, fields, made_by, data.held_out])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _whole(folder: Path, tell: bool = False) -> Manifest | None:
    """The manifest, if there is one and every shard it names is as long as it says; can tell which is not."""
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    for unit in chain.from_iterable(source.units for source in manifest.sources):
        try:
            check_unit(folder / unit.name, unit)
        except UserError as error:
            if tell:
                say(f"mending {str(error).partition(';')[0]}")
            return None
    return manifest


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder."""
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            say(f"waiting for the run that prepares {folder} ({file.read().strip() or 'unknown'})")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield  # no locks here: the same work twice does no harm
            return
        # Only of this host: some file systems keep locks to one node, and another may be writing its own.
        for leftover in folder.glob(f".*.{socket.gethostname()}-*.tmp"):
            leftover.unlink(missing_ok=True)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _build(
    data: DataSection,
    tokenizer: TokenizerSection,
    sources: Sequence[SourceSection],
    listed: Sequence[Listing | Path],
    folder: Path,
) -> Manifest:
    """Tokenizer, shards and manifest, each only where it is missing."""
    started = time.perf_counter()
    texts = {
        number: _split(section, found, data.held_out)
        for number, (section, found) in enumerate(zip(sources, listed, strict=True))
        if isinstance(found, Listing)
    }
    loaded = _tokenizer(tokenizer, list(texts.values()), folder / "tokenizer")
    jobs = [
        Job(tuple(parts), text.section.text_field, text.split, folder / "tokenizer", folder / f"{number}-{unit:05d}")
        for number, text in texts.items()
        for unit, parts in enumerate(text.units)
    ]
    units = iter(encode_all(jobs, data.workers))
    infos = []
    for number, (section, found) in enumerate(zip(sources, listed, strict=True)):
        if isinstance(found, Path):
            infos.append(megatron.describe(section, found, data.held_out, loaded.vocab_size))
        else:
            infos.append(_describe(texts[number], [next(units) for _ in texts[number].units]))
    held_out = chain.from_iterable(read_held_out(folder / unit.name) for info in infos for unit in info.units)
    manifest = Manifest(
        format=FORMAT,
        held_out=data.held_out,
        tokenizer=TokenizerInfo(name=tokenizer.name, vocab_size=loaded.vocab_size, fingerprint=loaded.fingerprint),
        sources=infos,
        baselines=baselines.bits_per_byte(held_out),
        seconds=round(time.perf_counter() - started, 3),
    )
    manifest.write(folder)
    tokens, size = (manifest.total(count) for count in (lambda s: _both(s.tokens), lambda s: _both(s.bytes)))
    say(f"prepared {folder}: {tokens:,} tokens from {size / 1e6:,.1f} MB in {manifest.seconds:.1f} s")
    return manifest


def _split(section: SourceSection, listing: Listing, held_out: float) -> Text:
    units = divide(listing)
    texts = (text for part in chain.from_iterable(units) for text in documents(part, section.text_field))
    return Text(section, listing, units, decide_split(texts, held_out, section.source))


def _tokenizer(section: TokenizerSection, texts: Sequence[Text], folder: Path) -> Tokenizer:
    """The tokenizer in `folder`, put there first if it is not."""
    if not folder.is_dir() or not any(file for file in folder.iterdir() if not file.name.startswith(".")):
        if isinstance(section, TokenizerFileSection):
            load_tokenizer(Path(section.path).expanduser()).save(folder)
        elif section.name == "bytes":
            BytesTokenizer().save(folder)
        else:
            corpus = [(text.units, text.section.text_field, text.split) for text in texts]
            train_on_sample(corpus, section, folder)
    return load_tokenizer(folder)


def _describe(text: Text, units: list[UnitInfo]) -> SourceInfo:
    return SourceInfo(
        source=text.section.source,
        weight=text.section.weight,
        files=len(text.listing.files),
        split="position" if text.split.tail else "document",
        sha256=hashlib.sha256("".join(unit.sha256 for unit in units).encode()).hexdigest(),
        units=units,
    )


def _view(folder: Path, manifest: Manifest, weights: list[float]) -> Path:
    if [source.weight for source in manifest.sources] == weights:
        return folder
    name = hashlib.sha256(json.dumps(weights).encode()).hexdigest()[:6]
    return folder.with_name(f"{folder.name}-{name}")


def _weighted(folder: Path, manifest: Manifest, weights: list[float]) -> Path:
    """The folder, or one beside it that differs in the weights alone and has no shards of its own."""
    view = _view(folder, manifest, weights)
    if view == folder:
        return folder
    view.mkdir(exist_ok=True)
    sources = [
        source.model_copy(update={"weight": weight}) for source, weight in zip(manifest.sources, weights, strict=True)
    ]
    manifest.model_copy(update={"base": f"../{folder.name}", "sources": sources}).write(view)
    return view


def _both(count: Callable[[SplitName], int]) -> int:
    return count("train") + count("valid")


class Prepared:
    """A prepared folder, opened."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._base = folder / manifest.base
        self.tokenizer: Tokenizer = load_tokenizer(self._base / "tokenizer")
        if self.tokenizer.fingerprint != manifest.tokenizer.fingerprint:
            raise UserError(
                f"{self._base / 'tokenizer'}: not the tokenizer of these shards; remove {self._base}, prepare again"
            )

    def streams(self, split: SplitName) -> list[tuple[TokenStream, float]]:
        """The tokens of each source, and its weight. Raises UserError naming a shard that is missing or damaged."""
        return [(self._stream(source, split), source.weight) for source in self.manifest.sources]

    def _stream(self, source: SourceInfo, split: SplitName) -> TokenStream:
        if source.megatron:
            return megatron.stream(source.megatron, split)
        windows = []
        for unit in source.units:
            check_unit(self._base / unit.name, unit)
            shard = Shard(shard_prefix(self._base / unit.name, split))
            windows.append(Window(shard, 0, shard.n_documents))
        return TokenStream(windows, source.bytes(split))

    def origin(self, number: int, stream: TokenStream, document: int) -> str:
        """Where a document of source `number` came from: `file:line`, `file row N`, or `prefix document N`."""
        shard, inside = stream.shard_of(document)
        if self.manifest.sources[number].megatron:
            return f"{shard.prefix} document {inside}"
        units = [self._base / unit.name for unit in self.manifest.sources[number].units]
        name, _, split = shard.prefix.name.rpartition(".")
        return origin(units, units.index(self._base / name), "train" if split == "train" else "valid", inside)

    def held_out_text(self) -> Iterator[str]:
        """The held-out documents as they were in the sources; none of Megatron prefixes, whose text is not known."""
        units = chain.from_iterable(source.units for source in self.manifest.sources)
        return chain.from_iterable(read_held_out(self._base / unit.name) for unit in units)


def open_prepared(path: Path) -> Prepared:
    """Open a folder that `prepare` returned. Raises UserError when it is not whole."""
    manifest = read_manifest(path)
    if manifest is None:
        raise UserError(f"{path}: no prepared corpus (no manifest.json); run cairn prepare CONFIG")
    allow_many_files()
    return Prepared(path, manifest)
