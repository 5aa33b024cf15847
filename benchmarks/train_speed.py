"""Tokens/s of an 8-layer, 512-wide GPT through our trainer, two bare loops, and the Trainer of `transformers`.

    python -m benchmarks.train_speed [--rounds 3] [--steps 8] [--systems cairn,bare,plain-compiled,transformers]

Each measurement is a process of its own; a round runs every system once, in turn, so that a machine that changes its
speed changes it for all. A reference matrix product is timed in every process: `peak` is the best product of the same
process and `of peak` the model's FLOP/s over it. Every side gets the same shapes, data, fused AdamW and allocator
settings, and computes in bf16, or in fp32 on a CPU that emulates bf16.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cairn.data.batches import Batch

SHAPE = {"n_layer": 8, "n_head": 8, "d_model": 512, "max_seq_len": 512, "vocab_size": 8192}
BATCH, WARMUP = 8, 3
CONFIG = "configs/pretrain/bench-8x512.yaml"


def overrides(steps: int, folder: str) -> list[str]:
    """Config overrides of a measured run."""
    return [f"train.steps={steps + WARMUP}", f"run.dir={folder}", "track.progress=false"]


def run_cairn(steps: int) -> dict[str, float]:
    """Our trainer, as a user runs it; per-step times from its own metrics."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pretrain", CONFIG, *overrides(steps, folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in next(Path(folder).glob("*/metrics.jsonl")).read_text().splitlines()]
    rows = [row for row in rows if "tokens_per_s" in row][WARMUP:]
    return {
        "seconds": statistics.median(row["step_seconds"] for row in rows),
        "peak": rows[-1]["flops_per_s"] / rows[-1]["mfu"],
        "loss": rows[-1]["loss"],
    }


def _samples() -> tuple[Any, Any]:
    from cairn.config.load import load
    from cairn.config.schema import PretrainConfig
    from cairn.data.prepare import open_prepared, prepare
    from cairn.plan.hardware import settled_for
    from cairn.train.language_model import LanguageModel

    config = settled_for("cpu", load(PretrainConfig, Path(CONFIG), []))
    return config, LanguageModel(config, open_prepared(prepare(config.data, config.tokenizer)))


def _timed(config: Any, task: Any, steps: int, step: "Callable[[Batch], float]") -> dict[str, float]:
    """Median seconds of `step`, which trains on a batch and returns its loss, after the warmup."""
    import torch

    from cairn.data.batches import Loader
    from cairn.train.engine import DTYPES
    from cairn.train.peak import matmul_peak

    loader = Loader(task.samples("train"), BATCH, BATCH)
    peak, times, loss = matmul_peak(torch.device("cpu"), DTYPES[config.engine.precision]), [], 0.0
    for number in range(steps + WARMUP):
        start = time.perf_counter()
        (batch,) = loader.step(number)
        loss = step(batch)
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times[WARMUP:]), "peak": peak, "loss": loss}


def run_bare(steps: int) -> dict[str, float]:
    """The same model and optimizer in the shortest loop: fp32 masters of its weights, clipping, fused AdamW."""
    import torch

    from cairn.train.engine import DTYPES

    config, task = _samples()
    torch.manual_seed(config.seed)
    model = task.models()["model"]
    masters = [p.detach().clone() for p in model.parameters()]
    model.to(DTYPES[config.engine.precision]).train()
    optim = config.optim
    optimizer = torch.optim.AdamW(
        masters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )

    def step(batch: "Batch") -> float:
        total = task.loss_sums(model, batch)["loss"] / task.weights(batch)["loss"]
        total.backward()
        for master, p in zip(masters, model.parameters(), strict=True):
            master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, optim.grad_clip)
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, model.parameters(), strict=True):
                p.copy_(master)
        return float(total)

    return _timed(config, task, steps, step)


def run_transformers(steps: int, compiled: bool = False) -> dict[str, float]:
    """GPT2LMHeadModel under `transformers.Trainer`, autocast, fused AdamW, sdpa attention."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    from cairn.train.engine import DTYPES
    from cairn.train.peak import matmul_peak

    config, task = _samples()
    samples = task.samples("train")

    class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return BATCH * (steps + WARMUP)

        def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
            ids = torch.from_numpy(samples.item(k)["input_ids"].astype("int64"))
            return {"input_ids": ids, "labels": ids}

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter() - self.start)

    torch.manual_seed(config.seed)
    shape = GPT2Config(
        n_layer=SHAPE["n_layer"],
        n_head=SHAPE["n_head"],
        n_embd=SHAPE["d_model"],
        n_positions=SHAPE["max_seq_len"],
        vocab_size=SHAPE["vocab_size"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="sdpa",
    )
    peak, clock = matmul_peak(torch.device("cpu"), DTYPES[config.engine.precision]), Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps + WARMUP,
            per_device_train_batch_size=BATCH,
            bf16=config.engine.precision == "bf16",
            use_cpu=True,
            optim="adamw_torch_fused",
            learning_rate=config.optim.lr,
            weight_decay=config.optim.weight_decay,
            max_grad_norm=config.optim.grad_clip,
            report_to=[],
            save_strategy="no",
            logging_strategy="steps",
            logging_steps=1,
            disable_tqdm=True,
            torch_compile=compiled,
        )
        trainer = Trainer(GPT2LMHeadModel(shape), arguments, train_dataset=Windows(), callbacks=[clock])
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"seconds": statistics.median(clock.times[WARMUP:]), "peak": peak, "loss": losses[-1]}


def run_plain(steps: int) -> dict[str, float]:
    """A GPT-2 in forty lines as in public minimal trainers, at its best here: autocast, sdpa, fused AdamW, compiled."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    d, heads = SHAPE["d_model"], SHAPE["n_head"]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
            self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
            self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.n1(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).flatten(2))
            return x + self.down(F.gelu(self.up(self.n2(x)), approximate="tanh"))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.place = nn.Embedding(SHAPE["vocab_size"], d), nn.Embedding(SHAPE["max_seq_len"], d)
            self.blocks = nn.Sequential(*(Block() for _ in range(SHAPE["n_layer"])))
            self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, SHAPE["vocab_size"], bias=False)
            nn.init.normal_(self.token.weight, std=0.02)
            self.head.weight = self.token.weight

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            x = self.blocks(self.token(ids) + self.place(torch.arange(ids.shape[1])))
            return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())

    config, task = _samples()
    torch.manual_seed(config.seed)
    model, optim = GPT(), config.optim
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )

    def step(batch: "Batch") -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.engine.precision == "bf16"):
            total = compiled(batch["input_ids"], batch["labels"])
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    return _timed(config, task, steps, step)


SYSTEMS = {
    "cairn": run_cairn,
    "bare": run_bare,
    "plain-compiled": run_plain,
    "transformers": run_transformers,
    "transformers-compiled": lambda steps: run_transformers(steps, compiled=True),
}


def main() -> None:
    """Rounds of all systems, then a table of medians with their range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--systems", default="cairn,bare,plain-compiled,transformers")
    parser.add_argument("--worker", choices=SYSTEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(SYSTEMS[args.worker](args.steps)))
        return
    env = os.environ | {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in args.systems.split(",")}
    for _ in range(args.rounds):
        for name, rows in results.items():
            command = [sys.executable, "-m", "benchmarks.train_speed", "--worker", name, "--steps", str(args.steps)]
            done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    _print(results)


def _print(results: dict[str, list[dict[str, float]]]) -> None:
    from cairn.config.model import GPTSection
    from cairn.models.build import flops_per_token

    tokens = BATCH * SHAPE["max_seq_len"]
    flops = tokens * flops_per_token(GPTSection(**SHAPE), SHAPE["vocab_size"], SHAPE["max_seq_len"])
    base = statistics.median(row["seconds"] for row in next(iter(results.values())))
    print("| system | tokens/s, median (range) | s/step | of peak | GFLOP/s peak | time vs first | last loss |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, rows in results.items():
        seconds = [row["seconds"] for row in rows]
        median, peak = statistics.median(seconds), statistics.median(row["peak"] for row in rows)
        print(
            f"| {name} | {tokens / median:,.0f} ({tokens / max(seconds):,.0f} to {tokens / min(seconds):,.0f}) "
            f"| {median:.3f} | {flops / median / peak:.1%} | {peak / 1e9:,.0f} | {median / base:.2f} "
            f"| {rows[-1]['loss']:.3f} |"
        )


if __name__ == "__main__":
    main()
