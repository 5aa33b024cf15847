"""`python -m pretrain.prepare CONFIG [section.key=value ...]`: only make the shards that pretraining reads."""

import sys
import time

from cairn.config.main import read_args, run_main
from cairn.config.schema import PretrainConfig


def main() -> None:
    """Prepare the corpus of a config and print what there is."""
    config = read_args(PretrainConfig, sys.argv[1:])

    from rich.console import Console
    from rich.table import Table

    from cairn.data.prepare import open_prepared, prepare

    started = time.perf_counter()
    folder = prepare(config.data, config.tokenizer)
    seconds = time.perf_counter() - started
    manifest = open_prepared(folder).manifest
    table = Table(title=str(folder))
    for column in ("source", "split", "documents", "tokens", "bytes", "bytes/token", "empty"):
        table.add_column(column, justify="left" if column in ("source", "split") else "right", overflow="fold")
    for source in manifest.sources:
        for split in ("train", "valid"):
            tokens, size = source.tokens(split), source.bytes(split)
            ratio = f"{size / tokens:.3f}" if size and tokens else ""
            counts = (f"{source.documents(split):,}", f"{tokens:,}", f"{size:,}" if size else "unknown", ratio)
            table.add_row(source.source, split, *counts, f"{source.empty:,}" if split == "train" else "")
    console = Console()
    console.print(table)
    size = manifest.total(lambda source: source.bytes("train") + source.bytes("valid"))
    if seconds > 0.9 * manifest.seconds:
        print(f"prepared {size / 1e6:,.1f} MB in {seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s")
    else:
        print(f"was prepared already, in {manifest.seconds:.1f} s; checked in {seconds:.2f} s")
    if manifest.baselines:
        reached = ", ".join(f"{name} -9 {value:.3f}" for name, value in manifest.baselines.items())
        print(f"bits per byte of the held-out text: {reached}")


if __name__ == "__main__":
    run_main(main)
