"""Checks of a config on this machine: batch, corpus, vocabulary, disk, run folder, export. None starts a run."""

import shutil
import tempfile
from functools import partial
from pathlib import Path

import torch

from cairn.config.data import SentencePieceSection, TokenizerFileSection, WordPieceSection
from cairn.config.model import ModelSection, TransformerSection
from cairn.config.schema import PretrainConfig
from cairn.data.encode import check_unit
from cairn.data.manifest import Manifest, read_manifest
from cairn.data.prepare import find_prepared, prepared_path
from cairn.data.tokenizer import BytesTokenizer, Tokenizer, load_tokenizer
from cairn.errors import UserError
from cairn.models.build import build_model, count_parameters, padded_vocab
from cairn.objectives.build import build_objective
from cairn.train.checkpoint import steps_in
from cairn.train.folder import RunFolder
from cairn.train.lock import FILE, RunLock
from pretrain.doctor.finding import Check, Finding, error, gib, ok, warning
from pretrain.doctor.machine import nearest

STATE_BYTES = 12  # a parameter of a checkpoint: the fp32 weight and AdamW's two moments
PREPARE = "cairn prepare CONFIG makes it now, else the run does when it starts"


def checks(config: PretrainConfig, world_size: int, quick: bool) -> list[Check]:
    """All of them, those of estimate.py left out."""
    listed: list[Check] = [
        ("batch", partial(batch, config, world_size)),
        ("corpus", partial(corpus, config)),
        ("vocabulary", partial(vocabulary, config)),
        ("disk", partial(disk, config)),
        ("run folder", partial(run_folder, config)),
        ("wandb key", partial(wandb_key, config)),
        ("export", partial(export, config.model)),
    ]
    if not quick:
        listed.insert(2, ("checksums", partial(checksums, config)))
    return listed


def batch(config: PretrainConfig, world_size: int) -> Finding:
    """Whether the global batch divides into micro-batches of the ranks."""
    size, micro = config.train.global_batch_size, config.train.micro_batch_size
    found = f"train.global_batch_size {size}, train.micro_batch_size {micro}, {world_size} ranks"
    fitting = config.train.fitting_micro_batch_size(world_size)
    if fitting != micro:
        remedy = f"train.micro_batch_size={fitting} divides" if fitting else "give a multiple of the ranks"
        return error(f"{found} does not divide", remedy)
    return ok(f"{found}: grad_accum {size // (micro * world_size)}")


def corpus(config: PretrainConfig) -> Finding:
    """Whether the sources are there, and prepared."""
    folder = find_prepared(config.data, config.tokenizer)
    manifest = read_manifest(folder) if folder else None
    if manifest is None:
        path = prepared_path(config.data, config.tokenizer)
        return warning(f"{path} is {'damaged' if read_manifest(path) else 'not prepared'}", PREPARE)
    tokens = manifest.total(lambda source: source.tokens("train"))
    asked = config.train.steps * config.train.global_batch_size * config.seq_len
    return ok(f"{folder}: {tokens:,} training tokens, {asked / max(tokens, 1):,.1f} epochs of them")


def checksums(config: PretrainConfig) -> Finding:
    """Reads every shard."""
    found = shards(config)
    if found is None:
        return ok("no shards yet: nothing to check")
    folder, manifest = found
    wrong, count = [], 0
    for unit in (unit for source in manifest.sources for unit in source.units):
        count += 1
        try:
            check_unit(folder / unit.name, unit, thorough=True)
        except UserError as failure:
            wrong.append(str(failure))
    if wrong:
        more = f" (and {len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
        return Finding("error", f"{wrong[0]}{more}")
    return ok(f"{count} units as they were written")


def shards(config: PretrainConfig) -> tuple[Path, Manifest] | None:
    """The folder of a config's shards and what is in it, damaged or not; None before they are made."""
    try:
        folder = prepared_path(config.data, config.tokenizer)
    except UserError:  # a source is not there, which `corpus` says
        return None
    manifest = read_manifest(folder)
    return None if manifest is None else (folder, manifest)


def tokenizer_of(config: PretrainConfig) -> Tokenizer | None:
    """The tokenizer of a config; None where it is to be trained."""
    if found := shards(config):
        return load_tokenizer(found[0] / "tokenizer")
    if isinstance(config.tokenizer, TokenizerFileSection):
        return load_tokenizer(Path(config.tokenizer.path).expanduser())
    return BytesTokenizer() if config.tokenizer.name == "bytes" else None


def vocabulary(config: PretrainConfig) -> Finding:
    """Whether the model has a row for each of the tokenizer's ids, and the tokenizer what the objective needs."""
    tokenizer = tokenizer_of(config)
    size = vocab_size(config)
    rows = padded_vocab(config.model, size)
    if tokenizer is not None:
        build_objective(config.objective, tokenizer)
    found = f"{size:,} ids in {rows:,} rows"
    if rows > 2 * size:
        return warning(found, f"most rows are never used: model.vocab_size={padded_size(config, size)} would do")
    return ok(found)


def padded_size(config: PretrainConfig, size: int) -> int:
    """Rows that model.vocab_size= (empty) would give."""
    return padded_vocab(config.model.model_copy(update={"vocab_size": None}), size)


def vocab_size(config: PretrainConfig) -> int:
    """Ids of the tokenizer, also of one that is yet to be trained. Raises UserError as loading it does."""
    tokenizer = tokenizer_of(config)
    if tokenizer is not None:
        return tokenizer.vocab_size
    assert isinstance(config.tokenizer, SentencePieceSection | WordPieceSection)
    return config.tokenizer.vocab_size


def model_rows(config: PretrainConfig) -> int:
    """Rows of the embedding as the config has them, be they too few: to count parameters by."""
    return config.model.vocab_size or vocab_size(config)


def disk(config: PretrainConfig) -> Finding:
    """Whether the checkpoints fit: keep_last, one that is being written, and those kept for good."""
    section = config.checkpoint
    folder = RunFolder(config.run.dir, config.run.name)
    size = STATE_BYTES * count_parameters(config.model, model_rows(config))
    kept = config.train.steps // section.keep_every if section.keep_every else 0
    there = len(steps_in(folder.checkpoints))
    needed = size * max(1, section.keep_last + 1 + kept - there)
    place = nearest(folder.path)
    free = shutil.disk_usage(place).free
    found = f"{gib(free)} free in {place}, {gib(needed)} for checkpoints of {gib(size)}"
    remedy = "set run.dir, or lower checkpoint.keep_last"
    if needed > free:
        return error(found, remedy)
    return warning(found, remedy) if needed > 0.8 * free else ok(found)


def run_folder(config: PretrainConfig) -> Finding:
    """Whether another run has the folder, and whether this config may go on in it."""
    folder = RunFolder(config.run.dir, config.run.name)
    if not folder.path.exists():
        return ok(f"{folder.path} will be made")
    if (folder.path / FILE).exists():
        with RunLock(folder.path):
            pass
    if folder.config.exists() and (changes := folder.changes(config)):
        return error(f"{folder.path} holds a run with another config ({'; '.join(changes)})", "choose another run.name")
    steps = steps_in(folder.checkpoints)
    return ok(f"{folder.path} exists and is free: {f'goes on from step {steps[-1]}' if steps else 'no checkpoint yet'}")


def wandb_key(config: PretrainConfig) -> Finding:
    """Whether wandb can be told."""
    from cairn.train.track import has_wandb_key

    if config.track.wandb != "online":
        return ok(f"track.wandb is {config.track.wandb}: none is needed")
    if not has_wandb_key():
        return error("track.wandb is online and there is no API key", "wandb login, or track.wandb=offline")
    return ok("there is one")


@torch.no_grad()
def export(section: ModelSection) -> Finding:
    """A small model of this architecture with random weights, written for `transformers`, loaded there and compared."""
    import transformers

    from cairn.hub.compare import TOLERANCE, compare
    from cairn.hub.convert import to_hub
    from cairn.hub.export_run import counterpart, write_model

    transformers.utils.logging.disable_progress_bar()
    small = reduced(section)
    try:
        architecture, arguments, table = counterpart(small, padded_vocab(small, 128))
    except UserError as failure:
        return warning(str(failure), "the run can be trained and used here all the same")
    with tempfile.TemporaryDirectory() as name, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(small, 128)
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)  # zeros would hide a mistake
        arguments |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        write_model(Path(name), architecture, arguments, to_hub(dict(model.named_parameters()), table))
        difference = compare(model, Path(name), architecture)
    if not difference <= TOLERANCE:
        remedy = f"{TOLERANCE:.0e} is allowed; transformers computes something else: try its version of constraints.txt"
        return error(f"{architecture}: logits differ by {difference:.1e} of the largest", remedy)
    return ok(f"{architecture}: logits of random weights differ by {difference:.1e} of the largest")


def reduced(section: ModelSection) -> ModelSection:
    """The same architecture at a size that takes no time."""
    values: dict[str, object] = {"vocab_size": 128}
    if isinstance(section, TransformerSection):
        kv_heads = None if section.n_kv_head is None else 4 if section.kv_heads == section.n_head else 2
        values |= {"n_layer": 2, "n_head": 4, "n_kv_head": kv_heads, "d_model": 64, "max_seq_len": 64}
        values |= {"d_ff": section.d_ff and 96}
    return section.model_validate(section.model_dump() | values)
