"""A task's outputs of many examples, by a model alone: no engine, one process."""

from collections.abc import Sequence

import torch
from torch import nn

from cairn.train.task import to_device
from finetune.task import Example, Examples, Finetune, Output, numbered


@torch.inference_mode()
def outputs_of(task: Finetune, model: nn.Module, examples: Sequence[Example], batch_size: int) -> list[Output]:
    """Outputs in the order of the examples; those of one length go through the model together."""
    samples = Examples(examples, task.collate, None)
    keys = [next(iter(stream.fill)) for stream in task.streams]
    order = sorted(range(len(examples)), key=lambda n: sum(len(examples[n].item[key]) for key in keys))
    device = next(model.parameters()).device
    found: dict[int, Output] = {}
    model.eval()
    for start in range(0, len(order), batch_size):
        items = [samples.item(n) for n in order[start : start + batch_size]]
        batch = to_device(samples.collate(items), device)
        found |= numbered(task.outputs(model, batch), batch)
    return [found[n] for n in range(len(examples))]
