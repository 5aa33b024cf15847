"""Megabytes a second that one core turns into shards, and the memory it takes.

    python -m benchmarks.prepare

The standard library, one and four times over (copies get a line of their own, so that no two documents are the same).
Peak memory is that of a fresh process; it grows only with the held-out text that xz compresses, of which it takes
16 MiB at most (about 280 MB in all). The tokenizer is trained before.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.rounds import peak_kib
from cairn.config.data import BytesSection, DataSection, SentencePieceSection, TokenizerFileSection, TokenizerSection
from cairn.data.corpus import list_source
from cairn.data.prepare import open_prepared, prepare

ROUNDS = 3
COPIES = (1, 4)


def copy_corpus(folder: Path, copies: int) -> int:
    """Write the standard library `copies` times as .py files; its bytes."""
    folder.mkdir()
    size = 0
    for number, part in enumerate(list_source("stdlib").files):
        data = Path(part.path).read_bytes()
        for copy in range(copies):
            text = data + b"# %d\n" % copy
            (folder / f"{copy}-{number:05d}.py").write_bytes(text)
            size += len(text)
    return size


def measure(source: str, tokenizer: str) -> None:
    """In a fresh process: prepare, then print seconds of a processor and peak MB."""
    section: TokenizerSection = BytesSection() if tokenizer == "bytes" else TokenizerFileSection(path=tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        prepare(DataSection(source=source, dir=folder, workers=1), section)
        seconds = time.process_time() - started
    print(seconds, peak_kib() / 1000)


def main() -> None:
    """Measure and print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {copies: copy_corpus(folder / str(copies), copies) for copies in COPIES}
        names = {"bytes": "bytes"}
        for vocab_size in (4096, 8192):
            made = prepare(DataSection(dir=str(folder / "data")), SentencePieceSection(vocab_size=vocab_size))
            train, _ = open_prepared(made).streams("train")[0]
            names[f"SentencePiece {vocab_size} ({train.n_bytes / train.n_tokens:.2f} bytes/token)"] = str(
                made / "tokenizer"
            )
        cases = [(label, copies) for copies in COPIES for label in names]
        found: dict[tuple[str, int], list[tuple[float, float]]] = {case: [] for case in cases}
        for _ in range(ROUNDS):
            for label, copies in cases:
                command = [sys.executable, "-m", "benchmarks.prepare", str(folder / str(copies)), names[label]]
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ))
                seconds, peak = map(float, done.stdout.split())
                found[label, copies].append((seconds, peak))
    print("| tokenizer | corpus, MB | MB/s per core | peak memory, MB |")
    print("| --- | ---: | ---: | ---: |")
    for (label, copies), runs in found.items():
        seconds, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"| {label} | {sizes[copies] / 1e6:.1f} | {sizes[copies] / 1e6 / seconds:.1f} | {peak:.0f} |")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(sys.argv[1], sys.argv[2])
    else:
        main()
