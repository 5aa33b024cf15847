"""Muon (Jordan and others 2024, kellerjordan.github.io/posts/muon): orthogonalised momentum for hidden matrices."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw

from cairn.ops import native
from cairn.ops.precision import fast_bf16
from cairn.optim.fused import Fused
from cairn.optim.layout import FlatLayout, Piece


@dataclass(frozen=True)
class _Matrix:
    """A matrix of which this rank holds a part."""

    shape: tuple[int, ...]
    sources: list[tuple[int, int, int, int]]
    """Every rank's pieces of it: rank, full_offset, local_offset, length."""
    own: list[Piece]


@dataclass(frozen=True)
class _Flat:
    """A flat tensor: the ranks that share its matrices, the longest flat tensor among them, and the matrices here."""

    group: dist.ProcessGroup | None
    longest: int
    matrices: list[_Matrix]


def hidden_matrices(model: nn.Module) -> set[int]:
    """Ids of the 2-D parameters in the blocks of a model (its ModuleLists), embeddings in them excepted."""
    blocks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    owners = {owner for block in blocks for owner in block.modules() if not isinstance(owner, nn.Embedding)}
    found = {id(param) for owner in owners for param in owner.parameters(recurse=False) if param.ndim == 2}
    # A matrix tied to an embedding is an embedding.
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return found - embeddings


def orthogonalise(update: Tensor, steps: int) -> Tensor:
    """The matrix (R, C) with its singular values brought to about 1, in fp32.

    Newton-Schulz iteration with the quintic of Jordan and others, whose slope at 0 is the steepest that stays near 1;
    in bf16 where that is fast: it forgives the error, and takes half to a quarter of the time.
    """
    update = update.contiguous()
    if update.device.type == "cpu" and update.dtype == torch.float32 and native.available():
        result = torch.empty_like(update)
        native.call("cairn_orthogonalise", *update.shape, steps, update, result, torch.get_num_threads())
        return result
    x = update / (update.norm() + 1e-7)
    x = x.bfloat16() if fast_bf16(x.device.type) else x
    wide = x.size(0) <= x.size(1)
    x = x if wide else x.T
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    # Tall matrices, whose outputs outnumber their inputs, take larger steps.
    scale = math.sqrt(max(1.0, update.size(0) / update.size(1)))
    scaled: Tensor = (x if wide else x.T).float().mul_(scale)
    return scaled


class MuonAdamW(torch.optim.Optimizer):
    """Groups of kind "muon" follow Muon, groups of kind "adamw" follow AdamW; both decay weights decoupled.

    State: "momentum" of Muon's tensors; "step", "exp_avg", "exp_avg_sq" of AdamW's. Muon's tensors are matrices, or
    the flat pieces of matrices that ZeRO leaves on a rank: then `attach` says which, and a step is collective.
    """

    fused: Fused | None = None
    """What a step takes instead of PyTorch's gradients, where tensors are attached of which this rank holds all."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        self._flats: dict[int, _Flat] = {}

    def attach(self, layout: Mapping[int, FlatLayout]) -> None:
        """Say what the flat tensors hold: layouts by id of tensor.

        Collective: every rank of a group passes its tensors in the same order. Tensors of kind "adamw" are skipped.

        Raises ValueError when the pieces of all ranks do not make up a matrix.
        """
        muon = {id(p): p for group in self.param_groups if group["kind"] == "muon" for p in group["params"]}
        self._flats = {key: _exchange(flat, muon[key]) for key, flat in layout.items() if key in muon}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.fused:
            self._step_fused(self.fused)
            return loss
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if group["kind"] == "muon":
                for param in params:
                    self._muon(param, group)
            elif params:
                self._adamw(params, group)
        return loss

    def _step_fused(self, fused: Fused) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if group["kind"] == "muon":
                    shapes = [matrix.shape for matrix in self._flats[id(param)].matrices]
                    fused.muon(param, self.state[param]["momentum"], shapes, group)
                else:
                    fused.adamw(param, self.state[param], group)

    def _muon(self, param: Tensor, group: dict[str, Any]) -> None:
        assert param.grad is not None
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param)
        momentum: Tensor = state["momentum"]
        momentum.lerp_(param.grad, 1 - group["momentum"])
        update = param.grad.lerp(momentum, group["momentum"])  # Nesterov
        param.mul_(1 - group["lr"] * group["weight_decay"])
        if flat := self._flats.get(id(param)):
            update = _orthogonalise_flat(update, flat, group["ns_steps"])
        else:
            update = orthogonalise(update, group["ns_steps"])
        param.add_(update, alpha=-group["lr"])

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for param in params:
            state = self.state[param]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        states = [self.state[param] for param in params]
        adamw(
            params,
            [param.grad for param in params if param.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _exchange(layout: FlatLayout, tensor: Tensor) -> _Flat:
    """What the group must know of each other's layouts; collective."""
    # Names travel as hashes, in a table of integers: nothing is pickled.
    rows = [[_hash(p.name), p.full_offset, p.local_offset, p.length] for p in layout.pieces]
    own = torch.tensor(rows, dtype=torch.int64, device=tensor.device).view(-1, 4)
    sizes = _gather(torch.tensor([len(own), tensor.numel()], device=tensor.device), layout.group)
    padded = own.new_zeros(int(sizes[:, 0].max()), 4)
    padded[: len(own)] = own
    sources: dict[int, list[tuple[int, int, int, int]]] = {}
    for rank, table in enumerate(_gather(padded, layout.group).tolist()):
        for key, full, local, length in table[: int(sizes[rank, 0])]:
            sources.setdefault(key, []).append((rank, full, local, length))
    pieces: dict[str, list[Piece]] = {}
    for piece in layout.pieces:
        pieces.setdefault(piece.name, []).append(piece)
    matrices = []
    for name, here in pieces.items():
        matrix = _Matrix(here[0].shape, sources[_hash(name)], here)
        if len(matrix.shape) != 2 or sum(length for *_, length in matrix.sources) != math.prod(matrix.shape):
            raise ValueError(f"the pieces of {name} on all ranks do not make up a matrix of {matrix.shape}")
        matrices.append(matrix)
    return _Flat(layout.group, int(sizes[:, 1].max()), matrices)


def _orthogonalise_flat(update: Tensor, flat: _Flat, steps: int) -> Tensor:
    """The flat tensor (N,) with this rank's pieces of the orthogonalised matrices; collective.

    A matrix that lies on several ranks is rebuilt from fp32 and orthogonalised on each of them, so that the result
    is that of one rank to the bit.
    """
    everyone = _gather(_padded(update, flat.longest), flat.group)
    result = torch.zeros_like(update)
    for matrix in flat.matrices:
        whole = _assembled(matrix, everyone).view(matrix.shape)
        whole = orthogonalise(whole, steps).reshape(-1)
        for piece in matrix.own:
            part = whole[piece.full_offset : piece.full_offset + piece.length]
            result[piece.local_offset : piece.local_offset + piece.length] = part
    return result


def _padded(tensor: Tensor, length: int) -> Tensor:
    return tensor if tensor.numel() == length else F.pad(tensor, (0, length - tensor.numel()))


def _assembled(matrix: _Matrix, everyone: Tensor) -> Tensor:
    """The flat matrix, of the ranks' flat tensors (ranks, N)."""
    in_order = sorted(matrix.sources, key=lambda source: source[1])
    parts = [everyone[rank, local : local + length] for rank, _, local, length in in_order]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _gather(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The tensors (...) of one shape of all ranks of the group as one (ranks, ...)."""
    if group is None or dist.get_world_size(group) == 1:
        return tensor[None]
    out = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    dist.all_gather(list(out.unbind()), tensor, group=group)
    return out


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)
