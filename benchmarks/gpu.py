"""What one GPU does, in a call of under ten minutes: `python -m benchmarks.gpu [--minutes 9.5] [--only 1.3b,profile]`.

Parts, in order, each a process of its own that is stopped when the time is over: tokens/s of gpt-1.3b, in 8 bits too,
and of a GPT of 124 M, each beside the compiled loops of others; between them a profile of gpt-1.3b's step: kernels by
time, waits for the device within it, and peak memory beside what `cairn plan` says; BERT-base on rows of 128 and 512
tokens, packed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launch.job import ALLOCATOR

SPEED = ["benchmarks.train_speed", "--rounds", "1", "--steps", "6", "--shape"]
MASKED = ["benchmarks.masked_speed", "--rounds", "1", "--steps", "20", "--shape", "base", "--systems"]
PARTS = {
    "1.3b": [*SPEED, "1.3b", "--systems", "cairn,cairn-fp8,plain-compiled,transformers-compiled"],
    "profile": ["benchmarks.gpu", "--profile"],
    "124m": [*SPEED, "124m-gpu", "--systems", "cairn,plain-compiled,transformers-compiled"],
    "bert-128": [*MASKED, "cairn,transformers-compiled", "--rows", "256", "--seq-len", "128"],
    "bert-512": [*MASKED, "cairn", "--lengths", "full", "--rows", "64", "--seq-len", "512"],
}


def profile() -> None:
    """A step of gpt-1.3b in this process: kernels, waits, memory."""
    import torch
    from torch.profiler import ProfilerActivity

    from benchmarks.train_speed import CONFIG, SHAPES
    from cairn.cluster import Cluster
    from cairn.config.load import load
    from cairn.config.schema import PretrainConfig
    from cairn.data.prepare import open_prepared, prepare
    from cairn.train.language_model import LanguageModel
    from cairn.train.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        keys = [*SHAPES["1.3b"].overrides(), "train.steps=8", f"run.dir={folder}"]
        config, cluster = load(PretrainConfig, Path(CONFIG), keys), Cluster.from_env()
        with cluster.init():
            task = LanguageModel(config, open_prepared(prepare(config.data, config.tokenizer)))
            activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as seen:
                Trainer(task, config, cluster).run()
        averages = seen.key_averages()
        print(averages.table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=70))
        waits = {row.key: row.count for row in averages if "ynchronize" in row.key or "_local_scalar_dense" in row.key}
        print(f"waits for the device in 8 steps and their set-up: {waits}")
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    sys.stdout.flush()
    command = [sys.executable, "-m", "cairn.plan", "configs/pretrain/gpt-1.3b.yaml", "--gpus-per-node", "1"]
    subprocess.run([*command, "engine.compile=true", "train.micro_batch_size=8"], check=True)


def main() -> None:
    """The parts that there is time for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.profile:
        profile()
        return
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("error: benchmarks.gpu needs a GPU, and torch sees none")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    end = time.monotonic() + 60 * args.minutes
    for name in args.only.split(","):
        print(f"\n## {name}: python -m {' '.join(PARTS[name])}\n", flush=True)
        try:
            subprocess.run(
                [sys.executable, "-m", *PARTS[name]],
                env=os.environ | ALLOCATOR,
                timeout=max(end - time.monotonic(), 1),
                check=False,
            )
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped, {args.minutes:g} minutes were over", flush=True)


if __name__ == "__main__":
    main()
