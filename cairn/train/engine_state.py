"""Where DeepSpeed keeps each parameter's fp32 weight and moments, and how to read and write them by name.

Every optimizer tensor on this rank is described by a FlatLayout: the runs of named parameters in it. Reading gathers
the runs of all ranks, writing copies the runs that are here; neither knows the ZeRO stage, so what one stage and world
size wrote any other reads, to the bit.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cairn.errors import UserError
from cairn.train.engine_layout import Groups, Slot, shard

BUCKET = 1 << 24
"""Elements gathered at once (64 MiB), or one parameter where that is larger."""


@dataclass(frozen=True)
class Entry:
    """One named tensor of a checkpoint and what of it lies on this rank."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[int, Tensor], ...]
    """(first element in the flattened whole, flat run of elements)."""
    replicated: bool
    """Whole on every rank, so nothing needs gathering."""
    owner: int
    """The rank that yields it."""

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


class NamedState:
    """The weights and moments of one engine by name: "weight/PARAM", "exp_avg/PARAM", ... and "buffer/NAME".

    Args:
        module: the model, as DeepSpeed left it.
        groups: what the optimizer trains.
        slots: the optimizer tensors of this rank.
        stage: the ZeRO stage DeepSpeed runs.
        device: where tensors are gathered.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Groups,
        slots: list[Slot],
        optimizer: torch.optim.Optimizer,
        stage: int,
        device: torch.device,
    ) -> None:
        self.module, self.slots, self.optimizer, self.stage, self.device = module, slots, optimizer, stage, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}
        self.group_of = {name: index for index, group in enumerate(groups) for name, _ in group}

    def check(self, initial: dict[str, Tensor], dtype: torch.dtype, version: str) -> None:
        """COLLECTIVE: hold the layout against DeepSpeed's own masters, which are `initial` rounded to `dtype`.

        Raises UserError when a piece is not where it should be, or the ranks' pieces are not each parameter once.
        """
        order = {name: i for i, name in enumerate(self.group_of)}
        counts = torch.zeros(len(order) + 1, dtype=torch.int64)
        for slot in self.slots:
            held = slot.tensor.detach().view(-1).cpu()
            for piece in slot.layout.pieces:
                expected = _run(initial[piece.name], piece.full_offset, piece.length).to(dtype).float()
                counts[-1] += not torch.equal(_run(held, piece.local_offset, piece.length), expected)
                counts[order[piece.name]] += piece.length
        counts = counts.to(self.device)
        dist.all_reduce(counts)
        copies = 1 if self.stage else self.world_size
        wrong = [name for name, i in order.items() if counts[i] != copies * math.prod(self.shapes[name])]
        if wrong or counts[-1]:
            raise UserError(
                f"DeepSpeed {version} does not hold {', '.join(wrong[:3]) or 'the weights'} where cairn looks for it: "
                "build the model with the same seed on every rank, or install deepspeed==0.19.8"
            )

    def prime(self) -> None:
        """COLLECTIVE: tell the optimizer what its flat tensors hold, if it asks, and let it create its state, all zero.

        So the names are the same before the first step as after it.
        """
        groups = self.optimizer.param_groups
        if self.stage and hasattr(self.optimizer, "attach"):
            # ZeRO-3 shows the optimizer its tensors only during a step.
            self.optimizer.param_groups = [
                {**group, "params": [slot.tensor for slot in self.slots if slot.group == index]}
                for index, group in enumerate(groups)
            ]
            self.optimizer.attach({id(slot.tensor): slot.layout for slot in self.slots})
        for slot in self.slots:
            kept, slot.tensor.grad = slot.tensor.grad, torch.zeros_like(slot.tensor)
            self.optimizer.param_groups = [
                {**groups[slot.group], "params": [slot.tensor], "lr": 0.0, "weight_decay": 0.0}
            ]
            self.optimizer.step()
            slot.tensor.grad = kept
        self.optimizer.param_groups = groups
        self.set_step(0)
        for slot in self.slots:
            for key in self._moments(slot):
                self.optimizer.state[slot.tensor][key].zero_()

    def step(self) -> int:
        """Updates the optimizer has made (fewer than the trainer's steps when fp16 skipped some)."""
        states = [self.optimizer.state[slot.tensor] for slot in self.slots]
        return max((int(state["step"]) for state in states if "step" in state), default=0)

    def set_step(self, step: int) -> None:
        """Set the update count of every optimizer tensor."""
        for slot in self.slots:
            state = self.optimizer.state[slot.tensor]
            if isinstance(state.get("step"), Tensor):
                state["step"].fill_(step)
            elif "step" in state:
                state["step"] = step

    def tensors(self, copy: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> Iterator[tuple[str, Tensor]]:
        """COLLECTIVE, every rank to the end: each tensor whole, on the CPU, fp32, at the one rank that owns it.

        Copies, which training does not touch; some share memory with each other. Runs are added as integers into zeros,
        which keeps every bit (the sum -0.0 + 0.0 would not). `copy(to, run)` makes those that need no other rank; it
        may do so later.
        """
        for bucket in self._buckets(self._entries()):
            owner = bucket[0].owner
            if self.rank != owner and bucket[0].replicated:
                continue
            whole = bucket[0].replicated  # here already: nothing is added
            device, make = (torch.device("cpu"), torch.empty) if whole else (self.device, torch.zeros)
            *begins, size = accumulate((e.numel for e in bucket), initial=0)
            gathered = make(size, dtype=torch.float32, device=device)
            parts = [(at + start, run) for at, e in zip(begins, bucket, strict=True) for start, run in e.parts]
            for start, run in _joined(parts):
                (copy if whole else Tensor.copy_)(_run(gathered, start, run.numel()), run)
            if not whole:
                dist.reduce(gathered.view(torch.int32), dst=owner)
            if self.rank == owner:
                runs = torch.split(gathered.cpu(), [e.numel for e in bucket])
                yield from ((e.name, run.view(e.shape)) for e, run in zip(bucket, runs, strict=True))
        if self.rank == 0:
            yield from ((f"buffer/{name}", value.detach().cpu().clone()) for name, value in self.buffers().items())

    def write(self, read: Callable[[str], Tensor | None], trained_weights_only: bool = False) -> None:
        """Copy in what `read` gives for each name; only this rank's runs are touched.

        Raises UserError naming the first tensor that is missing or of another shape.
        """
        wanted: list[tuple[str, tuple[int, ...], tuple[tuple[int, Tensor], ...]]]
        if trained_weights_only:
            wanted = [(e.name, e.shape, e.parts) for e in self._weights() if e.name[len("weight/") :] in self.group_of]
        else:
            wanted = [(e.name, e.shape, e.parts) for e in self._entries()]
            wanted += [(f"buffer/{n}", tuple(b.shape), ((0, b.view(-1)),)) for n, b in self.buffers().items()]
        for name, shape, parts in wanted:
            value = read(name)
            if value is None:
                raise UserError(f"checkpoint: {name} is missing; it was written by another model or optimizer")
            if tuple(value.shape) != shape:
                raise UserError(f"checkpoint: {name} has shape {tuple(value.shape)}, but this model needs {shape}")
            for start, run in parts:
                run.copy_(_run(value, start, run.numel()))

    def held(self) -> Iterator[Tensor]:
        """The fp32 weights and moments on this rank, flat, none of them empty; not the padding, which nobody sets."""
        for key in ("", *sorted({key for slot in self.slots for key in self._moments(slot)})):
            for runs in self._runs(key).values():
                yield from (run for _, run in runs if run.numel())

    def buffers(self) -> dict[str, Tensor]:
        """The buffers that belong to the model's state (batch-norm statistics, not tables that can be recomputed)."""
        return {
            f"{prefix}.{name}" if prefix else name: buffer
            for prefix, module in self.module.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }

    def _entries(self) -> list[Entry]:
        keys = {slot.group: self._moments(slot) for slot in self.slots}
        entries = self._weights()
        for key in sorted({key for names in keys.values() for key in names}):
            runs = self._runs(key)
            entries += [
                self._entry(f"{key}/{name}", self.shapes[name], runs.get(name, []), not self.stage)
                for name, group in self.group_of.items()
                if key in keys[group]
            ]
        return self._owned(entries)

    def _weights(self) -> list[Entry]:
        runs = self._runs("")
        entries = []
        for name, p in cast(Iterator[tuple[str, Any]], self.module.named_parameters()):
            parts, replicated = runs.get(name, []), not self.stage
            if name not in self.group_of:  # frozen: outside the optimizer, in compute precision
                replicated = not hasattr(p, "ds_tensor")
                start, length = (0, p.numel()) if replicated else shard(p, self.rank)
                held = p.data if replicated else p.ds_tensor
                parts = [(start, held.view(-1)[:length])] if length else []
            entries.append(self._entry(f"weight/{name}", self.shapes[name], parts, replicated))
        return entries

    def _runs(self, key: str) -> dict[str, list[tuple[int, Tensor]]]:
        runs: dict[str, list[tuple[int, Tensor]]] = {}
        for slot in self.slots:
            if key and key not in self.optimizer.state[slot.tensor]:
                continue
            flat = (self.optimizer.state[slot.tensor][key] if key else slot.tensor).detach().view(-1)
            for piece in slot.layout.pieces:
                run = _run(flat, piece.local_offset, piece.length)
                runs.setdefault(piece.name, []).append((piece.full_offset, run))
        return runs

    def _moments(self, slot: Slot) -> list[str]:
        state = self.optimizer.state[slot.tensor]
        return [
            key for key, value in state.items() if key != "step" and getattr(value, "shape", 0) == slot.tensor.shape
        ]

    def _entry(self, name: str, shape: tuple[int, ...], parts: list[tuple[int, Tensor]], replicated: bool) -> Entry:
        return Entry(name, shape, tuple(parts), replicated or self.world_size == 1, 0)

    def _owned(self, entries: list[Entry]) -> list[Entry]:
        """Give each entry, largest first, to the rank that has least."""
        load = [0] * self.world_size
        owner = {}
        for e in sorted(entries, key=lambda e: (-e.numel, e.name)):
            owner[e.name] = load.index(min(load))
            load[owner[e.name]] += e.numel
        return [replace(e, owner=owner[e.name]) for e in entries]

    def _buckets(self, entries: list[Entry]) -> list[list[Entry]]:
        """Entries of one owner and kind, at most BUCKET elements; owners take turns, so that all can write at once."""
        chains: dict[tuple[bool, int], list[list[Entry]]] = {}
        filled: dict[tuple[bool, int], int] = {}
        for e in entries:
            kind = e.replicated, e.owner
            chain = chains.setdefault(kind, [])
            if not chain or filled[kind] + e.numel > BUCKET:
                chain.append([])
                filled[kind] = 0
            chain[-1].append(e)
            filled[kind] += e.numel
        turns = [(turn, *key) for key, chain in chains.items() for turn in range(len(chain))]
        return [chains[replicated, owner][turn] for turn, replicated, owner in sorted(turns)]


def _joined(parts: Iterable[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
    """(place, run) of runs, where those that follow upon each other in memory and in their places are one.

    A copy of many small runs spends as long on waking threads as on copying.
    """
    joined: list[tuple[int, Tensor]] = []
    for start, run in parts:
        if joined:
            place, before = joined[-1]
            length = before.numel()
            follows = before.data_ptr() + before.nbytes == run.data_ptr() and place + length == start
            if follows and before.dtype == run.dtype and _storage(before) == _storage(run):
                joined[-1] = place, before.as_strided((length + run.numel(),), (1,))
                continue
        joined.append((start, run))
    return joined


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _run(tensor: Tensor, start: int, length: int) -> Tensor:
    return tensor.reshape(-1).narrow(0, start, length)
