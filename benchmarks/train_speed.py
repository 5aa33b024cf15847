"""Tokens/s of a GPT through our trainer, two bare loops, and the Trainer of `transformers`, compiled and not.

    python -m benchmarks.train_speed [--shape 8x512] [--rounds 3] [--steps 8] [--systems cairn,plain-compiled]

Each measurement is a process of its own; a round runs every system once, in turn, so that a machine that changes its
speed changes it for all. A reference matrix product is timed in every process: `peak` is the best product of the same
process and `of peak` the model's FLOP/s over it. Every side gets the same shapes, GELU, data, fused AdamW and allocator
settings, and computes in bf16, or in fp32 on a CPU that emulates bf16. Their losses stand beside, first to last. On a
GPU, which shapes 1.3b and 124m-gpu are for, ours is compiled too.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.ours import Shape, opened, summary, trained
from benchmarks.peers import WARMUP, trainer_steps
from benchmarks.rounds import Measured, median_range, run_rounds
from cairn.cluster import Cluster

if TYPE_CHECKING:
    from cairn.data.batches import Batch

CONFIG = "configs/pretrain/bench-8x512.yaml"


SHAPES = {
    "8x512": Shape(8, 8, 512, 512, 8192, 8),
    "124m": Shape(12, 12, 768, 1024, 50304, 2),
    "124m-gpu": Shape(12, 12, 768, 1024, 50304, 32, 8),
    "1.3b": Shape(24, 16, 2048, 2048, 50304, 8, 8),
}


def run_cairn(shape: Shape, steps: int, *overrides: str) -> Measured:
    """Our trainer, as a user runs it; per-step times from its own metrics."""
    return summary(trained(CONFIG, [*shape.overrides(), *overrides], steps + WARMUP), WARMUP)


def _samples(shape: Shape) -> tuple[Any, Any]:
    from cairn.train.language_model import LanguageModel

    config, prepared = opened(CONFIG, shape.overrides())
    return config, LanguageModel(config, prepared)


def _timed(shape: Shape, config: Any, task: Any, steps: int, step: "Callable[[list[Batch]], float]") -> Measured:
    """Median seconds of `step`, which trains on micro-batches and returns their loss, after the warmup."""
    from cairn.data.batches import Loader
    from cairn.ops.precision import DTYPES
    from cairn.train.peak import matmul_peak

    loader, where = Loader(task.samples("train"), shape.batch, shape.micro_batch_size), Cluster().device
    peak, times, losses = matmul_peak(where, DTYPES[config.engine.precision]), [], []
    for number in range(steps + WARMUP):
        start = time.perf_counter()
        batches = [{key: value.to(where) for key, value in batch.items()} for batch in loader.step(number)]
        losses.append(step(batches))
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times[WARMUP:]), "peak": peak, "first": losses[0], "loss": losses[-1]}


def run_bare(shape: Shape, steps: int) -> Measured:
    """The same model and optimizer in the shortest loop: fp32 masters of its weights, clipping, fused AdamW."""
    import torch

    from cairn.ops.precision import DTYPES

    config, task = _samples(shape)
    torch.manual_seed(config.seed)
    model = task.models()["model"].to(Cluster().device)
    masters = [p.detach().clone() for p in model.parameters()]
    model.to(DTYPES[config.engine.precision]).train()
    optim = config.optim
    optimizer = torch.optim.AdamW(
        masters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )

    def step(batches: "list[Batch]") -> float:
        weight, total = shape.batch * shape.seq_len, 0.0
        for batch in batches:
            loss = task.loss_sums(model, batch)["loss"] / weight
            loss.backward()
            total = total + loss.detach()
        for master, p in zip(masters, model.parameters(), strict=True):
            master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, optim.grad_clip)
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, model.parameters(), strict=True):
                p.copy_(master)
        return float(total)

    return _timed(shape, config, task, steps, step)


def run_transformers(shape: Shape, steps: int, compiled: bool = False) -> Measured:
    """GPT2LMHeadModel under `transformers.Trainer`, autocast, fused AdamW, sdpa attention."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config, task = _samples(shape)
    samples = task.samples("train")

    def row(k: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(samples.item(k)["input_ids"].astype("int64"))
        return {"input_ids": ids, "labels": ids}

    torch.manual_seed(config.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            n_embd=shape.d_model,
            n_positions=shape.seq_len,
            vocab_size=shape.vocab_size,
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="sdpa",
        )
    )
    rows = [row(k) for k in range(shape.batch * (steps + WARMUP))]
    return trainer_steps(model, rows, None, config, steps, compiled)


def run_plain(shape: Shape, steps: int) -> Measured:
    """A GPT-2 in forty lines as in public minimal trainers, at its best here: autocast, sdpa, fused AdamW, compiled."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    d, heads = shape.d_model, shape.n_head

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
            return x + self.down(F.gelu(self.up(self.n2(x))))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.place = nn.Embedding(shape.vocab_size, d), nn.Embedding(shape.seq_len, d)
            self.blocks = nn.Sequential(*(Block() for _ in range(shape.n_layer)))
            self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, shape.vocab_size, bias=False)
            nn.init.normal_(self.token.weight, std=0.02)
            self.head.weight = self.token.weight

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            x = self.blocks(self.token(ids) + self.place(torch.arange(ids.shape[1], device=ids.device)))
            return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())

    config, task = _samples(shape)
    torch.manual_seed(config.seed)
    model, optim = GPT().to(Cluster().device), config.optim
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )

    def step(batches: "list[Batch]") -> float:
        total = 0.0
        for batch in batches:
            with torch.autocast(Cluster().device.type, torch.bfloat16, enabled=config.engine.precision == "bf16"):
                loss = compiled(batch["input_ids"], batch["labels"]) / len(batches)
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    return _timed(shape, config, task, steps, step)


SYSTEMS = {
    "cairn": run_cairn,
    "cairn-pytorch": lambda shape, steps: run_cairn(shape, steps, "engine.kernels=pytorch"),
    "cairn-fp8": lambda shape, steps: run_cairn(shape, steps, "engine.fp8=true"),
    "bare": run_bare,
    "plain-compiled": run_plain,
    "transformers": run_transformers,
    "transformers-compiled": lambda shape, steps: run_transformers(shape, steps, compiled=True),
}


def main() -> None:
    """Rounds of all systems, then a table of medians with their range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8x512")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--systems", default="cairn,bare,plain-compiled,transformers")
    parser.add_argument("--worker", choices=SYSTEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    if args.worker:
        print(json.dumps(SYSTEMS[args.worker](shape, args.steps)))
        return
    arguments = ["--shape", args.shape, "--steps", str(args.steps)]
    _print(shape, run_rounds("benchmarks.train_speed", args.systems.split(","), args.rounds, arguments))


def _print(shape: Shape, results: dict[str, list[Measured]]) -> None:
    from cairn.config.model import GPTSection
    from cairn.models.build import flops_per_token

    tokens = shape.batch * shape.seq_len
    section = GPTSection(n_layer=shape.n_layer, n_head=shape.n_head, d_model=shape.d_model, max_seq_len=shape.seq_len)
    flops = tokens * flops_per_token(section, shape.vocab_size, shape.seq_len)
    base = statistics.median(row["seconds"] for row in next(iter(results.values())))
    print("| system | tokens/s, median (range) | s/step | of peak | GFLOP/s peak | time vs first | losses |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, rows in results.items():
        median = statistics.median(row["seconds"] for row in rows)
        peak = statistics.median(row["peak"] for row in rows)
        print(
            f"| {name} | {median_range([tokens / row['seconds'] for row in rows])} | {median:.3f} "
            f"| {flops / median / peak:.1%} | {peak / 1e9:,.0f} | {median / base:.2f} "
            f"| {rows[-1]['first']:.3f} to {rows[-1]['loss']:.3f} |"
        )
    if ours := results.get("cairn"):
        print(f"\ncairn waits for data {max(row['wait'] for row in ours):.4%} of a step at most.")


if __name__ == "__main__":
    main()
