"""Tokenising and packing beside `transformers` with `datasets.map`: megabytes a second of one core, peak memory, ids.

    python -m benchmarks.tokenize [--tokenizer FOLDER ...] [--source SOURCE] [--copies 1 4] [--rounds 3]

Both read the same JSON lines: the source's documents, once or several times over (copies get a line of their own). The
peer is a fast tokenizer in `load_dataset("json").map(tokenize, batched=True)` and the usual second `map` that cuts all
ids into rows; ours is `cairn prepare`, which reads, splits, hashes, writes and syncs. Its gzip and xz of the held-out
text, of which there are 16 MiB at most, is told apart, in a row of its own. One thread each, in turn, each in a process
of its own, whose processor time without imports is what counts. It is checked that the ids of every document are the
same. Copies are for memory and measured once: a word of theirs is not new, so of speed they would say too much.
"""

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rounds import median_range, peak_kib, run_rounds
from cairn.config.data import DataSection, TokenizerFileSection, WordPieceSection
from cairn.data import baselines
from cairn.data.corpus import documents, list_source
from cairn.data.prepare import open_prepared, prepare
from cairn.data.tokenizer import load_tokenizer

SYSTEMS = ("transformers", "cairn")
ROW = 1024
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def write_corpus(source: str, folder: Path, copies: int) -> int:
    """The documents as JSON lines, in as many files as there are copies; bytes of text in one of them."""
    size = 0
    files = [(folder / f"{copy}.jsonl").open("w") for copy in range(copies)]
    for text in chain.from_iterable(documents(part, "text") for part in list_source(source).files):
        for copy, file in enumerate(files):
            file.write(json.dumps({"text": f"{text}\n# {copy}\n"}) + "\n")
        size += len(text.encode())
    for file in files:
        file.close()
    return size


def digest(documents: Iterable[Sequence[int]]) -> str:
    """Of the ids of documents, in whatever order."""
    found = (hashlib.sha256(np.asarray(ids, np.int32).tobytes()).digest() for ids in documents)
    return f"{sum(int.from_bytes(one[:8], 'big') for one in found) % 2**64:016x}"


def peer(files: list[str], tokenizer: Path, work: Path) -> tuple[Callable[[], Any], Callable[[Any], str]]:
    """What is timed, and the digest of what it gives."""
    from datasets import load_dataset
    from transformers import PreTrainedTokenizerFast

    def run() -> Any:
        fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"))
        texts = load_dataset("json", data_files=files, split="train", cache_dir=str(work))
        tokens = texts.map(
            lambda batch: fast(batch["text"], add_special_tokens=False, verbose=False),
            batched=True,
            remove_columns=texts.column_names,
        )
        tokens.map(rows, batched=True)
        return tokens

    def rows(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(chain.from_iterable(lists)) for name, lists in batch.items()}
        end = len(joined["input_ids"]) // ROW * ROW
        cut = {name: [ids[at : at + ROW] for at in range(0, end, ROW)] for name, ids in joined.items()}
        return {**cut, "labels": cut["input_ids"].copy()}

    return run, lambda tokens: digest(row["input_ids"] for row in tokens)


def ours(files: list[str], tokenizer: Path, work: Path) -> tuple[Callable[[], Path], Callable[[Path], str]]:
    """What is timed, and the digest of what it gives."""
    blend = [{"source": file} for file in files]
    data = DataSection.model_validate({"source": blend, "dir": str(work), "workers": 1})

    def of_shards(folder: Path) -> str:
        prepared = open_prepared(folder)
        ended = int(prepared.tokenizer.eos_id is not None or prepared.tokenizer.sep_id is not None)
        streams = [stream for split in ("train", "valid") for stream, _ in prepared.streams(split)]
        bounds = ((stream, *stream.document_bounds(i)) for stream in streams for i in range(stream.n_documents))
        return digest(stream.read(start, stop - ended) for stream, start, stop in bounds)

    return lambda: prepare(data, TokenizerFileSection(path=str(tokenizer))), of_shards


def measure(system: str, files: list[str], tokenizer: Path) -> None:
    """In a fresh process: print seconds of a processor, those of them for baselines, peak MB, the digest of the ids."""
    compressing, compress = 0.0, baselines.bits_per_byte

    def timed(texts: Iterable[str]) -> dict[str, float]:
        nonlocal compressing
        started = time.process_time()
        found = compress(texts)
        compressing = time.process_time() - started
        return found

    baselines.bits_per_byte = timed
    with tempfile.TemporaryDirectory() as work:
        run, of = (peer if system == "transformers" else ours)(files, tokenizer, Path(work))
        before = os.times()
        made = run()
        seconds = sum(os.times()[:4]) - sum(before[:4])
        print(json.dumps([seconds, compressing, peak_kib() / 1000, of(made)]))


def main() -> None:
    """Measure and print the table. Exits where the two do not give the same ids."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--tokenizer", nargs="+", type=Path, help="what tokenizer.path may be; default: WordPiece, made"
    )
    parser.add_argument("--source", default="stdlib", help="what data.source may be; default: stdlib")
    parser.add_argument("--copies", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print("| tokenizer | system | corpus, MB | MB/s per core, median (range) | times the peer | peak memory, MB |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_corpus(options.source, folder, max(options.copies))
        if not options.tokenizer:
            made = prepare(DataSection(source=options.source, dir=str(folder / "data")), WordPieceSection())
            options.tokenizer = [(made / "tokenizer").rename(folder / "WordPiece")]
        for path in options.tokenizer:
            load_tokenizer(path).save(folder / path.stem)
            for copies in options.copies:
                files = [str(folder / f"{copy}.jsonl") for copy in range(copies)]
                rounds = options.rounds if copies == 1 else 1
                compare(path.stem, folder / path.stem, files, copies * size / 1e6, rounds, timed=copies == 1)


def compare(label: str, tokenizer: Path, files: list[str], size: float, rounds: int, timed: bool) -> None:
    """Both systems on one corpus, in turn: three rows of the table, with speeds if `timed`."""
    found = run_rounds("benchmarks.tokenize", SYSTEMS, rounds, [str(tokenizer), *files], ONE_THREAD)
    if len({ids for runs in found.values() for *_, ids in runs}) > 1:
        sys.exit(f"error: {label}: the two do not give the same ids")
    theirs, ours = (found[system] for system in SYSTEMS)
    base = statistics.median(seconds for seconds, *_ in theirs)
    for system, runs, spent in (
        ("transformers, datasets.map", theirs, [seconds for seconds, *_ in theirs]),
        ("cairn", ours, [seconds - compressing for seconds, compressing, *_ in ours]),
        ("cairn with its baselines", ours, [seconds for seconds, *_ in ours]),
    ):
        peak = statistics.median(peak for *_, peak, _ in runs)
        speed = median_range([size / seconds for seconds in spent], ".2f")
        speed += f" | {base / statistics.median(spent):.1f}"
        print(f"| {label} | {system} | {size:.1f} | {speed if timed else '|'} | {peak:,.0f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        measure(sys.argv[2], sys.argv[4:], Path(sys.argv[3]))
    else:
        main()
