"""What others train with, timed step by step: the Trainer of `transformers`."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.rounds import Measured

WARMUP = 3
"""Steps that every system makes before it is timed."""


def trainer_steps(
    model: Any, data: Sequence[Any], collate: Callable[[Any], Any] | None, config: Any, steps: int, compiled: bool
) -> Measured:
    """`transformers.Trainer` over `data`, whose batches `collate` makes (None: its own way): seconds of a step, loss.

    Precision, batch, learning rate and clipping are the config's; fused AdamW, nothing saved.
    """
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from cairn.cluster import Cluster
    from cairn.ops.precision import DTYPES
    from cairn.train.peak import matmul_peak

    device = Cluster().device

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter() - self.start)

    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, k: int) -> Any:
            return data[k]

    peak, clock = matmul_peak(device, DTYPES[config.engine.precision]), Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps + WARMUP,
            per_device_train_batch_size=config.train.micro_batch_size,
            bf16=config.engine.precision == "bf16",
            gradient_accumulation_steps=config.train.global_batch_size // config.train.micro_batch_size,
            use_cpu=device.type == "cpu",
            optim="adamw_torch_fused",
            learning_rate=config.optim.lr,
            weight_decay=config.optim.weight_decay,
            max_grad_norm=config.optim.grad_clip,
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            logging_strategy="steps",
            logging_steps=1,
            disable_tqdm=True,
            remove_unused_columns=False,
            torch_compile=compiled,
        )
        trainer = Trainer(model, arguments, train_dataset=Rows(), data_collator=collate, callbacks=[clock])
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    times = clock.times[WARMUP:]
    return {
        "seconds": statistics.median(times),
        "total": sum(times),
        "peak": peak,
        "first": losses[0],
        "loss": losses[-1],
    }
