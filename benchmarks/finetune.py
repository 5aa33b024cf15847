"""Fine-tuning one BERT by us and by the Trainer of `transformers`: the same weights, data, batches, steps and seeds.

    python -m benchmarks.finetune RUN --train train.tsv --valid dev.tsv [--steps 300] [--seeds 1,2,3]
                                          [--precision bf16]

RUN is a BERT-like run; it is exported once and both sides begin from it. Every measurement is a process of its own, and
all systems run once a seed, in turn. Both get the same learning rate, schedule, fused AdamW, clipping, batch size,
number of threads and allocator settings. `longest` pads a batch to its longest text (the usual collator), `grouped`
draws batches of like lengths too, `fixed` pads all to the longest a text may be, as `transformers`' example scripts do.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.rounds import Measured, median_range, run_rounds

MAX_LEN, LR, WARMUP = 64, 5e-4, 0.06


def run_cairn(args: argparse.Namespace, folder: Path) -> Measured:
    """`python -m finetune` as a user runs it."""
    (folder / "config.yaml").write_text("data: {train: x}\n")
    keys = [f"run.dir={folder}", "run.name=ours", f"base.path={args.model}", f"data.train={args.train}"]
    keys += [f"data.valid={args.valid}", "task.text=sentence", f"data.max_len={MAX_LEN}", f"seed={args.seed}"]
    keys += [
        f"train.steps={args.steps}",
        f"train.global_batch_size={args.batch}",
        f"train.micro_batch_size={args.batch}",
    ]
    keys += [
        f"optim.lr={LR}",
        f"schedule.warmup_ratio={WARMUP}",
        f"engine.precision={args.precision}",
        "track.progress=false",
    ]
    keys += ["checkpoint.every=0", "optim.grad_clip=1.0"]
    start = time.perf_counter()
    command = [sys.executable, "-m", "finetune", str(folder / "config.yaml"), *keys]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    rows = [json.loads(line) for line in (folder / "ours/metrics.jsonl").read_text().splitlines()]
    evaluation = next(row for row in reversed(rows) if "valid/accuracy" in row)
    losses = [row["loss"] for row in rows if "loss" in row]
    step = statistics.median(row["step_seconds"] for row in rows if "step_seconds" in row)
    return _row(step * args.steps, seconds, evaluation["valid/accuracy"], evaluation["valid/loss"], losses)


def run_transformers(args: argparse.Namespace, folder: Path) -> Measured:
    """AutoModelForSequenceClassification under `transformers.Trainer`."""
    start = time.perf_counter()
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
    from transformers import DataCollatorWithPadding as Collator

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2, local_files_only=True)
    fixed = args.worker == "fixed"

    def read(path: str) -> list[dict[str, Any]]:
        texts, labels = zip(*_rows(path), strict=True)
        padding = "max_length" if fixed else False
        encoded = tokenizer(list(texts), truncation=True, max_length=MAX_LEN, padding=padding)
        keys = list(encoded)
        return [
            {key: encoded[key][i] for key in keys} | {"labels": label, "length": len(encoded["input_ids"][i])}
            for i, label in enumerate(labels)
        ]

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        use_cpu=True,
        bf16=args.precision == "bf16",
        optim="adamw_torch_fused",
        learning_rate=LR,
        weight_decay=0.01,
        max_grad_norm=1.0,
        lr_scheduler_type="linear",
        warmup_steps=round(WARMUP * args.steps),
        train_sampling_strategy="group_by_length" if args.worker == "grouped" else "random",
        seed=args.seed,
        report_to=[],
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=read(args.train),
        eval_dataset=read(args.valid),
        data_collator=Collator(tokenizer),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )
    trained = trainer.train().metrics["train_runtime"]
    judged = trainer.evaluate()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return _row(trained, time.perf_counter() - start, judged["eval_accuracy"], judged["eval_loss"], losses)


def _rows(path: str) -> Iterator[tuple[str, int]]:
    for line in Path(path).read_text("utf-8").splitlines()[1:]:
        text, _, label = line.rpartition("\t")
        yield text, int(label)


def _row(training: float, whole: float, accuracy: float, loss: float, losses: list[float]) -> Measured:
    last = statistics.mean(float(value) for value in losses[-len(losses) // 5 :])
    return {"training": training, "whole": whole, "accuracy": accuracy, "valid_loss": loss, "train_loss": last}


SYSTEMS = {"cairn": run_cairn, "longest": run_transformers, "grouped": run_transformers, "fixed": run_transformers}


def main() -> None:
    """Rounds of all systems, one a seed, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a BERT-like run; its export when it is a worker's")
    parser.add_argument("--train", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=SYSTEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.worker:
            print(json.dumps(SYSTEMS[args.worker](args, folder)))
            return
        exported = folder / "model"
        subprocess.run([sys.executable, "-m", "cairn.hub", "export", args.model, str(exported)], check=True)
        _print(measure(args, exported), args)


def measure(args: argparse.Namespace, exported: Path) -> dict[str, list[Measured]]:
    """Every system once a seed, in turn."""
    systems = args.systems.split(",")
    results: dict[str, list[Measured]] = {name: [] for name in systems}
    for seed in args.seeds.split(","):
        arguments = [str(exported), "--seed", seed, "--train", args.train, "--valid", args.valid]
        arguments += ["--steps", str(args.steps), "--batch", str(args.batch), "--precision", args.precision]
        for system, (row,) in run_rounds("benchmarks.finetune", systems, 1, arguments).items():
            results[system].append(row)
            print(f"seed {seed} {system}: {row}", file=sys.stderr, flush=True)
    return results


def _print(results: dict[str, list[Measured]], args: argparse.Namespace) -> None:
    def middle(rows: list[Measured], key: str) -> str:
        return median_range([row[key] for row in rows], ".1f")

    base = statistics.median(row["training"] for row in next(iter(results.values())))
    print(f"\n{args.steps} steps of {args.batch} texts, {args.precision}, seeds {args.seeds}\n")
    print(
        "| system | training, s | time against the first | whole process, s | accuracy, mean (range) | held-out loss |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for name, rows in results.items():
        accuracy, loss = [row["accuracy"] for row in rows], statistics.mean(row["valid_loss"] for row in rows)
        ratio = statistics.median(row["training"] for row in rows) / base
        spread = f"{statistics.mean(accuracy):.4f} ({min(accuracy):.4f} to {max(accuracy):.4f})"
        print(
            f"| {name} | {middle(rows, 'training')} | {ratio:.2f} | {middle(rows, 'whole')} | {spread} | {loss:.4f} |"
        )


if __name__ == "__main__":
    main()
