"""Preparing: once, the same on any number of workers, gone on with after a kill, mended when damaged."""

import gzip
import json
import lzma
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cairn.config.data import (
    BytesSection,
    DataSection,
    SentencePieceSection,
    SourceSection,
    TokenizerFileSection,
    TokenizerSection,
)
from cairn.data import corpus, encode, pool
from cairn.data import prepare as module
from cairn.data.encode import decide_split, digest_of
from cairn.data.prepare import Prepared, open_prepared, prepare
from cairn.data.shards import ShardWriter
from cairn.errors import UserError

BYTES = BytesSection()


def lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def documents_of(prepared: Prepared, split: str) -> list[str]:
    """Decoded, in order; every document ends with the end of text."""
    found = []
    for stream, _ in prepared.streams(split):  # type: ignore[arg-type]
        for number in range(stream.n_documents):
            *ids, end = stream.read(*stream.document_bounds(number)).tolist()
            assert end == prepared.tokenizer.eos_id
            found.append(prepared.tokenizer.decode(ids))
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    """All but what differs by time."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".bin", ".idx", ".zst")}


def many(count: int = 300) -> list[str]:
    return [f"document {i}: " + f"word{i} é\n" * (i % 50) for i in range(count)]


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SMALLEST_UNIT", 5000)


@pytest.fixture
def section(tmp_path: Path, small_units: None) -> DataSection:
    return DataSection(source=lines(tmp_path / "a.jsonl", [*many(), "", ""]), dir=str(tmp_path / "data"))


def test_every_document_is_on_one_side_in_order(section: DataSection) -> None:
    prepared = open_prepared(prepare(section, BYTES))
    train, valid = documents_of(prepared, "train"), documents_of(prepared, "valid")
    texts = many()
    chosen = [text for text in texts if int.from_bytes(digest_of(text)[:6], "big") / 2**48 < 0.05]
    assert valid == chosen == list(prepared.held_out_text())
    assert train == [text for text in texts if text not in chosen]
    assert 5 < len(valid) < 30
    source = prepared.manifest.sources[0]
    assert (source.documents("train"), source.documents("valid"), source.empty) == (len(train), len(valid), 2)
    assert len(source.units) > 5
    for split, found in (("train", train), ("valid", valid)):
        stream, weight = prepared.streams(split)[0]  # type: ignore[arg-type]
        assert (stream.n_tokens, stream.n_documents, weight) == (source.tokens(split), len(found), 1.0)  # type: ignore[arg-type]
        assert stream.n_bytes == source.bytes(split) == sum(len(text.encode()) for text in found)  # type: ignore[arg-type]
    joined = "".join(valid).encode()
    assert prepared.manifest.baselines == {
        "gzip": 8 * len(gzip.compress(joined, 9)) / len(joined),
        "xz": 8 * len(lzma.compress(joined, preset=9)) / len(joined),
    }


def test_the_second_time_nothing_is_done(section: DataSection, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(section, BYTES)
    monkeypatch.setattr(module, "_build", None)
    assert prepare(section, BYTES) == folder


def test_what_decides_the_content_decides_the_folder(section: DataSection, tmp_path: Path) -> None:
    folders = [
        prepare(section, BYTES),
        prepare(section.model_copy(update={"held_out": 0.1}), BYTES),
        prepare(section, SentencePieceSection(vocab_size=400)),
    ]
    assert prepare(section.model_copy(update={"seq_len": 7, "document_mask": True, "workers": 1}), BYTES) == folders[0]
    lines(tmp_path / "a.jsonl", many(301))
    folders.append(prepare(section, BYTES))
    assert len(set(folders)) == 4
    prints = [open_prepared(folder).manifest.fingerprint for folder in folders]
    assert len(set(prints)) == 4
    # the same text elsewhere is another folder with the same fingerprint
    moved = section.model_copy(update={"source": lines(tmp_path / "b.jsonl", many(301))})
    assert prepare(moved, BYTES) not in folders
    assert open_prepared(prepare(moved, BYTES)).manifest.fingerprint == prints[3]


@pytest.mark.slow
def test_a_corpus_of_more_shards_than_open_files(section: DataSection) -> None:
    folder = prepare(section, BYTES)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
    try:
        ((stream, _),) = open_prepared(folder).streams("train")
        assert len(stream._windows) > 8
        assert len(stream.read(0, stream.n_tokens)) == stream.n_tokens
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_workers_do_not_change_a_byte(tmp_path: Path, section: DataSection) -> None:
    sections = [section.model_copy(update={"dir": str(tmp_path / f"w{n}"), "workers": n}) for n in (1, 3)]
    one, three = (prepare(section, SentencePieceSection(vocab_size=400)) for section in sections)
    assert one.name == three.name
    assert files_of(one) == files_of(three)
    assert open_prepared(one).manifest.fingerprint == open_prepared(three).manifest.fingerprint


KILLED = """
import sys
from cairn.config.data import BytesSection, DataSection
from cairn.data import corpus, prepare
corpus.SMALLEST_UNIT = 5000
if __name__ == "__main__":
    prepare.prepare(DataSection(source=sys.argv[1], dir=sys.argv[2], workers=2), BytesSection())
"""


@pytest.mark.slow
def test_workers_of_a_killed_run_go(section: DataSection, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(KILLED)
    lines(Path(str(section.source)), many(20_000))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    arguments = [sys.executable, str(script), str(section.source), section.dir]
    with subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE) as run:
        while not list(tmp_path.glob("data/*/*.train.bin")):
            assert run.poll() is None
            time.sleep(0.05)
        run.kill()
        # all hold the other end of this pipe: it closes when the last of them is gone
        assert run.stderr is not None
        closed = threading.Thread(target=run.stderr.read, daemon=True)
        closed.start()
        closed.join(20)
        assert not closed.is_alive()


@pytest.mark.slow
def test_errors_of_workers_reach_the_user(tmp_path: Path, small_units: None) -> None:
    path = tmp_path / "a.jsonl"
    lines(path, many())
    with path.open("a") as file:
        file.write("oops\n")
    with pytest.raises(UserError, match="line 301 is not JSON"):
        prepare(DataSection(source=str(path), dir=str(tmp_path / "data"), workers=2), BYTES)


def test_an_interrupted_run_goes_on(section: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = files_of(prepare(section.model_copy(update={"dir": str(tmp_path / "whole")}), BYTES))
    calls: list[Path] = []

    def stop_at_fifth(job: encode.Job) -> encode.UnitInfo:
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(job.prefix)
        return encode.encode_unit(job)

    monkeypatch.setattr(pool, "encode_unit", stop_at_fifth)
    with pytest.raises(KeyboardInterrupt):
        prepare(section, BYTES)
    monkeypatch.undo()
    (folder,) = (tmp_path / "data").iterdir()
    with pytest.raises(UserError, match="no prepared corpus"):
        open_prepared(folder)
    monkeypatch.setattr(corpus, "SMALLEST_UNIT", 5000)
    kept = calls[0].with_name(calls[0].name + ".train.bin")
    altered = calls[1].with_name(calls[1].name + ".train.bin")
    altered.write_bytes(altered.read_bytes()[:-1] + b"\x00")
    leftover = folder / f".0-00009.train.bin.{socket.gethostname()}-1.tmp"
    of_another_host = folder / ".0-00009.train.bin.elsewhere-1.tmp"  # which may be at work, and its lock not seen here
    for file in (leftover, of_another_host):
        file.write_bytes(b"half")
    before = kept.stat().st_mtime_ns
    assert prepare(section, BYTES) == folder
    assert kept.stat().st_mtime_ns == before, "a finished unit is not made again"
    assert of_another_host.exists()
    of_another_host.unlink()
    assert files_of(folder) == whole
    assert not leftover.exists()


@pytest.mark.parametrize("damage", ["truncated", "missing", "stale", "text"])
def test_damage_is_named_and_mended(section: DataSection, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepare(section, BYTES)
    whole = files_of(folder)
    file = folder / ("0-00002.valid.jsonl.zst" if damage == "text" else "0-00002.train.bin")
    untouched = (folder / "0-00001.train.bin").stat().st_mtime_ns
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-2])
    elif damage == "stale":
        with ShardWriter(folder / "0-00002.train", 300) as writer:
            writer.add([7, 8, 9])
    else:
        file.unlink()
    with pytest.raises(UserError, match=rf"{file.name}.*prepare"):
        open_prepared(folder).streams("train")
    capsys.readouterr()
    assert prepare(section, BYTES) == folder
    assert capsys.readouterr().err.count(file.name) == 1
    assert files_of(folder) == whole
    assert (folder / "0-00001.train.bin").stat().st_mtime_ns == untouched, "only the damaged unit is made again"


def prepare_elsewhere(section: DataSection, started: "multiprocessing.synchronize.Barrier", out: str) -> None:
    corpus.SMALLEST_UNIT = 5000
    started.wait()
    folder = prepare(section, SentencePieceSection(vocab_size=400))
    Path(out).write_text(str(folder))


@pytest.mark.slow
def test_two_runs_at_once(section: DataSection, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started = context.Barrier(2)
    outs = [tmp_path / f"out{i}" for i in range(2)]
    runs = [context.Process(target=prepare_elsewhere, args=(section, started, str(out))) for out in outs]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
        assert run.exitcode == 0
    folders = {out.read_text() for out in outs}
    assert len(folders) == 1
    assert len(documents_of(open_prepared(Path(folders.pop())), "train")) > 250


def test_a_folder_without_locks(section: DataSection, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*args: object) -> None:
        raise OSError("No locks available")

    monkeypatch.setattr(module.fcntl, "flock", no_locks)
    assert open_prepared(prepare(section, BYTES)).manifest.sources


@pytest.mark.parametrize("tokenizer", [BYTES, SentencePieceSection(vocab_size=300)])
@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_documents(tmp_path: Path, texts: list[str], tokenizer: TokenizerSection) -> None:
    section = DataSection(source=lines(tmp_path / "a.jsonl", texts), dir=str(tmp_path / "data"))
    with pytest.raises(UserError, match=r"a\.jsonl: no documents, or empty ones only"):
        prepare(section, tokenizer)


def test_a_single_document_is_split_by_position(tmp_path: Path) -> None:
    """Shorter than one batch, and the longest there is."""
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(100)))
    prepared = open_prepared(prepare(DataSection(source=str(tmp_path / "a.txt"), dir=str(tmp_path / "data")), BYTES))
    (train,), (valid,) = documents_of(prepared, "train"), documents_of(prepared, "valid")
    assert train + valid == (tmp_path / "a.txt").read_text()
    assert train.endswith("\n")
    assert 0.02 < len(valid) / len(train + valid) < 0.08
    assert prepared.manifest.sources[0].split == "position"


@pytest.mark.parametrize("count", [2, 3, 20])
@pytest.mark.parametrize("held_out", [1e-9, 0.5, 1 - 1e-9])
def test_both_sides_have_a_document(count: int, held_out: float) -> None:
    texts = [f"{held_out}-{i}" for i in range(count)]
    split = decide_split(texts, held_out, "x")
    sides = {bool(split.parts(text, digest_of(text))[0]) for text in texts}
    assert sides == {True, False}


def test_copies_of_one_document(tmp_path: Path) -> None:
    section = DataSection(source=lines(tmp_path / "a.jsonl", ["0123456789" * 4] * 3), dir=str(tmp_path / "data"))
    prepared = open_prepared(prepare(section, BYTES))
    assert documents_of(prepared, "train") == ["0123456789" * 3 + "01234567"] * 3
    assert documents_of(prepared, "valid") == ["89"] * 3
    with pytest.raises(UserError, match="single document of one character"):
        prepare(section.model_copy(update={"source": lines(tmp_path / "b.jsonl", ["x"])}), BYTES)


def test_a_document_longer_than_everything(tmp_path: Path) -> None:
    texts = ["short", "x y\n" * 600_000, "other", *many(50)]
    section = DataSection(source=lines(tmp_path / "a.jsonl", texts), dir=str(tmp_path / "data"))
    prepared = open_prepared(prepare(section, SentencePieceSection(vocab_size=300, sample_mb=0.2)))
    assert sorted(documents_of(prepared, "train") + documents_of(prepared, "valid")) == sorted(texts)


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("fine\n")
    (tmp_path / "in" / "b.txt").write_bytes("schön\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"b\.txt: line 1 \(byte 3\) is not UTF-8"):
        prepare(DataSection(source=str(tmp_path / "in"), dir=str(tmp_path / "data")), BYTES)


def test_a_vocabulary_over_65536(tmp_path: Path) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(70_000))]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    section = DataSection(
        source=lines(tmp_path / "a.jsonl", ["w69999 w1", "w3", "w68000"] * 9), dir=str(tmp_path / "data")
    )
    prepared = open_prepared(prepare(section, TokenizerFileSection(path=str(tmp_path / "vocab.txt"))))
    ids = np.concatenate([s.read(0, s.n_tokens) for name in ("train", "valid") for s, _ in prepared.streams(name)])  # type: ignore[arg-type]
    assert set(ids.tolist()) == {3, 5 + 69_999, 6, 8, 5 + 68_000}, "[SEP] ends documents where there is no end of text"
    assert next(prepared.folder.glob("*.train.bin")).stat().st_size % 4 == 0


def test_a_blend(tmp_path: Path) -> None:
    first = SourceSection(source=lines(tmp_path / "a.jsonl", many(40)), weight=3.0)
    (tmp_path / "b.csv").write_text("body\n" + "".join(f"row {i} {'z' * i}\n" for i in range(60)))
    second = SourceSection(source=str(tmp_path / "b.csv"), text_field="body")
    section = DataSection(source=[first, second], dir=str(tmp_path / "data"))
    prepared = open_prepared(prepare(section, BYTES))
    streams = prepared.streams("train")
    assert [weight for _, weight in streams] == [3.0, 1.0]
    assert sum(s.n_documents for s, _ in [*streams, *prepared.streams("valid")]) == 100
    # other weights: the same shards, another fingerprint
    other = section.model_copy(update={"source": [first, second.model_copy(update={"weight": 2.0})]})
    again = open_prepared(prepare(other, BYTES))
    assert [weight for _, weight in again.streams("train")] == [3.0, 2.0]
    assert documents_of(again, "train") == documents_of(prepared, "train")
    assert list(again.held_out_text()) == list(prepared.held_out_text())
    assert again.manifest.fingerprint != prepared.manifest.fingerprint
    assert not list(again.folder.glob("*.bin"))
    assert [weight for _, weight in open_prepared(prepare(section, BYTES)).streams("train")] == [3.0, 1.0]


def test_megatron_files_are_used_where_they_lie(tmp_path: Path) -> None:
    prefix = tmp_path / "theirs_text_document"
    with ShardWriter(prefix, 263) as writer:
        for i in range(40):
            writer.add([7 + i, 8, 3])
    module.BytesTokenizer().save(tmp_path / "tokenizer")
    section = DataSection(source=str(prefix), dir=str(tmp_path / "data"))
    with pytest.raises(UserError, match=r"tokenizer\.name=file"):
        prepare(section, BYTES)
    prepared = open_prepared(prepare(section, TokenizerFileSection(path=str(tmp_path / "tokenizer"))))
    (train, _), (valid, _) = prepared.streams("train")[0], prepared.streams("valid")[0]
    assert (train.n_documents, valid.n_documents, train.n_bytes) == (38, 2, 0)
    assert valid.read(0, 3).tolist() == [7 + 38, 8, 3]
    assert list(prepared.held_out_text()) == []
    assert prepared.manifest.baselines == {}
    with ShardWriter(prefix, 1000) as writer:
        writer.add([7])
        writer.add([8, 263])
    with pytest.raises(UserError, match="changed since it was prepared"):
        prepared.streams("train")
    with pytest.raises(UserError, match="token 2 is 263, and the tokenizer has 263"):
        prepare(section, TokenizerFileSection(path=str(tmp_path / "tokenizer")))


def test_the_tokenizer_never_sees_held_out_text(section: DataSection, monkeypatch: pytest.MonkeyPatch) -> None:
    from cairn.data import train_tokenizer

    seen: list[str] = []
    real = train_tokenizer.train_sentencepiece
    monkeypatch.setattr(
        train_tokenizer,
        "train_sentencepiece",
        lambda texts, *rest: real([t for t in texts if not seen.append(t)], *rest),
    )
    prepared = open_prepared(prepare(section, SentencePieceSection(vocab_size=400)))
    assert sorted(seen) == sorted(documents_of(prepared, "train"))


def test_the_sample_is_spread_and_near_its_size(section: DataSection) -> None:
    from cairn.data.train_tokenizer import sample

    listing = corpus.list_source(str(section.source))
    units = corpus.divide(listing)
    split = decide_split(many(), 0.05, "x")
    taken = list(sample((units, "text", split), listing.size / 3))
    assert 0.2 < sum(len(text.encode()) for text in taken) / listing.size < 0.5
    numbers = [int(text.split()[1].rstrip(":")) for text in taken]
    assert numbers == sorted(numbers)
    assert numbers[0] < 30
    assert numbers[-1] > 270
    assert taken == list(sample((units, "text", split), listing.size / 3))


def test_a_place_that_cannot_be_written(tmp_path: Path, section: DataSection) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "data").mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"data\.dir"):
        prepare(section, BYTES)
