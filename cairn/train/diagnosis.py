"""What went bad in a step whose loss or gradient is not finite, and what text it was made of."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cairn.train.engine import Engine
from cairn.train.task import Task


def first_documents(task: Task, samples: range, most: int = 3) -> str:
    """Where the first few documents of training samples come from."""
    found: dict[str, None] = {}
    for sample in samples:
        found |= dict.fromkeys(task.origin(sample))
        if len(found) > most:
            return ", ".join([*found][:most]) + ", ..."
    return ", ".join(found)


def first_bad(engines: Mapping[str, Engine], step: Callable[[], Mapping[str, Tensor]]) -> str:
    """COLLECTIVE: what is not finite first while `step` runs once more, in words.

    On each rank the first module, in forward order, whose output (or already input, or weight) is not finite, and the
    first parameter, in backward order, whose gradient is not; of all ranks the lowest that has any.
    """
    forward: list[str] = []
    backward: list[str] = []
    with ExitStack() as hooks, torch.compiler.set_stance("force_eager"):  # compiled code may know nothing of new hooks
        for name, engine in engines.items():
            prefix = f"{name}." if len(engines) > 1 else ""
            for path, module in engine.module.named_modules():
                label = f"{prefix}{path}".rstrip(".") or name
                # before DeepSpeed's own, which take the weights away at stage 3
                handle = module.register_forward_hook(_forward_hook(label, forward), prepend=True)
                hooks.callback(handle.remove)
            for path, p in engine.module.named_parameters():
                if p.requires_grad:
                    handle = p.register_hook(_gradient_hook(f"{prefix}{path}", backward))  # type: ignore[no-untyped-call]
                    hooks.callback(handle.remove)
        loss = step()["loss"]
    found = forward[:1]
    if not found and not _finite(loss):
        found = ["the loss, though no module's output"]
    found += [f"the gradient of {name}" for name in backward[:1]]
    said: list[str] = [", then ".join(found)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, said[0])
        said = [f"on rank {rank} {text}" for rank, text in enumerate(ranks) if text]
    if not any(said):
        return "all was finite when it ran once more (is the hardware sound?)"
    return f"the first that was not finite: {said[0]}"


def _forward_hook(label: str, found: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if found or _finite(output):
            return
        bad = [name for name, p in module.named_parameters(recurse=False) if not _finite(p)]
        if bad:
            found.append(f"the weight {label}.{bad[0]} itself")
        else:
            found.append(f"the {'output' if _finite(args) else 'input'} of {label} ({type(module).__name__})")

    return hook


def _gradient_hook(label: str, found: list[str]) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        if not found and not _finite(gradient):
            found.append(label)

    return hook


def _finite(value: Any) -> bool:
    """Whether all numbers in a tensor, or in tensors in tuples, lists and dicts, are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.detach().isfinite().all())
    if isinstance(value, Mapping):
        return all(_finite(item) for item in value.values())
    return not isinstance(value, tuple | list) or all(_finite(item) for item in value)
