"""Tokens/s of masked-LM pretraining, on texts of full and of mixed lengths, beside the Trainer of `transformers`.

    python -m benchmarks.masked_speed [--lengths mixed|full] [--shape 8x512|base] [--seq-len 128] [--rows 32]

A step has `--rows` rows of at most `--seq-len` tokens. `mixed`: texts of 3 to 44 words of the standard library, about
as many of each length. Ours packs them into rows without padding; the Trainer gets one a row, padded to the longest of
its batch (`transformers`) or all to the most (`transformers-compiled`, whose shapes must not change). `full`: every row
is full on both sides. Padding is no token here. Ours scores the vocabulary at the masked positions alone;
BertForMaskedLM scores all. The rest as in benchmarks/train_speed.py.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.ours import opened, summary, trained
from benchmarks.peers import WARMUP, trainer_steps
from benchmarks.rounds import Measured, median_range, run_rounds
from cairn.cluster import Cluster

CONFIG = "configs/pretrain/bench-bert-8x512.yaml"
SPECIAL = 2
"""[CLS] and [SEP]."""
SHAPES = {"8x512": (8, 8, 512), "base": (12, 12, 768)}
"""Layers, heads, width."""


def cut_corpus(folder: Path) -> Path:
    """JSON lines of texts of 3 to 44 words, from the standard library."""
    import numpy as np

    from cairn.data.corpus import list_source

    rng, path = np.random.default_rng(0), folder / "texts.jsonl"
    with path.open("w", encoding="utf-8") as out:
        for part in list_source("stdlib").files[:600]:
            words = Path(part.path).read_text("utf-8", "ignore").split()
            start = 0
            while start < len(words):
                size = int(rng.integers(3, 45))
                out.write(json.dumps({"text": " ".join(words[start : start + size])}) + "\n")
                start += size
    return path


def overrides(args: argparse.Namespace) -> list[str]:
    """Of CONFIG."""
    layers, heads, width = SHAPES[args.shape]
    keys = [f"model.n_layer={layers}", f"model.n_head={heads}", f"model.d_model={width}"]
    keys += [f"model.max_seq_len={args.seq_len}", f"train.global_batch_size={args.rows}"]
    keys += [f"train.micro_batch_size={args.rows}"]
    keys += ["engine.compile=true"] if Cluster().device.type == "cuda" else []
    return keys + ([f"data.source={args.corpus}", f"data.dir={Path(args.corpus).parent}"] if args.corpus else [])


def run_cairn(args: argparse.Namespace) -> Measured:
    """Our trainer, as a user runs it."""
    found = summary(trained(CONFIG, overrides(args), args.steps + WARMUP), WARMUP)
    return found | {"speed": args.rows * (args.seq_len - SPECIAL) / found["seconds"]}


def run_transformers(args: argparse.Namespace, compiled: bool = False) -> Measured:
    """BertForMaskedLM under `transformers.Trainer`, a text a row."""
    import numpy as np
    import torch
    from transformers import BertConfig, BertForMaskedLM

    from cairn.objectives.masked import Masker

    config, prepared = opened(CONFIG, overrides(args))
    tokenizer = prepared.tokenizer
    ((stream, _),) = prepared.streams("train")
    rng, count, room = np.random.default_rng(0), args.rows * (args.steps + WARMUP), args.seq_len - SPECIAL
    if args.lengths == "mixed":
        bounds = [stream.document_bounds(int(k)) for k in rng.choice(stream.n_documents, count, replace=False)]
        texts = [stream.read(first, min(last - 1, first + room)) for first, last in bounds]
    else:
        texts = [stream.read(int(k), int(k) + room) for k in rng.integers(0, stream.n_tokens - room, count)]
    masker = Masker(config.objective, tokenizer)

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        width = args.seq_len if compiled else max(len(row) for row in rows) + SPECIAL
        out = {key: np.full((len(rows), width), fill) for key, fill in (("input_ids", 0), ("labels", -100))}
        for place, row in enumerate(rows):
            framed = np.concatenate([[tokenizer.cls_id], row, [tokenizer.sep_id]]).astype(np.int64)
            out["input_ids"][place, : len(framed)], out["labels"][place, : len(framed)] = masker(framed, rng)
        sizes = np.array([len(row) + SPECIAL for row in rows])
        mask = (np.arange(width) < sizes[:, None]).astype(np.int64)
        return {key: torch.from_numpy(value) for key, value in (out | {"attention_mask": mask}).items()}

    model = config.model
    torch.manual_seed(config.seed)
    peer = BertForMaskedLM(
        BertConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.d_model,
            num_hidden_layers=model.n_layer,
            num_attention_heads=model.n_head,
            intermediate_size=4 * model.d_model,
            max_position_embeddings=args.seq_len,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
        )
    )
    found = trainer_steps(peer, texts, collate, config, args.steps, compiled)
    tokens = statistics.mean(len(text) for text in texts[args.rows * WARMUP :]) * args.rows
    return found | {"speed": tokens * args.steps / found["total"]}


SYSTEMS = {
    "cairn": run_cairn,
    "transformers": run_transformers,
    "transformers-compiled": lambda args: run_transformers(args, compiled=True),
}


def main() -> None:
    """Rounds of all systems, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", choices=("mixed", "full"), default="mixed")
    parser.add_argument("--shape", choices=SHAPES, default="8x512")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--corpus", default="", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=SYSTEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(SYSTEMS[args.worker](args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--lengths", args.lengths, "--shape", args.shape, "--seq-len", str(args.seq_len)]
        arguments += ["--rows", str(args.rows), "--steps", str(args.steps)]
        if args.lengths == "mixed":
            arguments += ["--corpus", str(cut_corpus(Path(folder)))]
        results = run_rounds("benchmarks.masked_speed", args.systems.split(","), args.rounds, arguments)
    base = statistics.median(row["speed"] for row in next(iter(results.values())))
    print(f"| system, {args.lengths} lengths | tokens/s, median (range) | the first's over its | loss, first to last |")
    print("| --- | --- | ---: | --- |")
    for name, rows in results.items():
        speeds = [row["speed"] for row in rows]
        ratio = base / statistics.median(speeds)
        print(f"| {name} | {median_range(speeds)} | {ratio:.2f} | {rows[-1]['first']:.3f} to {rows[-1]['loss']:.3f} |")


if __name__ == "__main__":
    main()
