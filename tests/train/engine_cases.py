"""What the tests of the engine train: a small model with every kind of parameter, on samples of uneven weight."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cairn.cluster import Cluster
from cairn.config.train import AdamWSection, EngineSection, MuonSection
from cairn.train.engine import Engine

SAMPLES = 8
OPTIM = AdamWSection(lr=1e-2, grad_clip=0.5)


class Head(nn.Module):
    """Frozen weights, as under an adapter, and two buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 7), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Net(nn.Module):
    """Sizes that no world size divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 7), nn.Linear(7, 7, bias=False)])
        self.norm = nn.LayerNorm(7)
        self.head = Head()
        self.scale = nn.Linear(1, 1, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (N,) -> (N,): a loss for each sample."""
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        x = self.head(self.norm(x))
        return self.scale(x.float().pow(2).mean(-1, keepdim=True).to(x.dtype)).float().squeeze(-1)


def here() -> Cluster:
    """This process's cluster; the group is there already."""
    if not dist.is_initialized():
        Cluster().init()
    return Cluster(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.get_world_size())


def build(
    stage: int, precision: str = "fp32", optim: AdamWSection | MuonSection = OPTIM, offload: str = "none", **more: Any
) -> Engine:
    """An engine around a fresh Net."""
    if precision == "fp16":
        import deepspeed.accelerator

        # Not fast everywhere, but torch can compute it on every CPU.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    section = EngineSection(zero_stage=stage, precision=precision, offload=offload, **more)  # type: ignore[arg-type]
    return Engine(Net(), section, optim, 1, here())


def train(engine: Engine, steps: range, accumulation: int = 1) -> list[float]:
    """Steps on SAMPLES samples split over ranks and `accumulation` micro-batches; the loss of each step."""
    cluster, losses = here(), []
    for step in steps:
        g = torch.Generator().manual_seed(step)
        ids, weights = torch.randint(0, 11, (SAMPLES,), generator=g), torch.rand(SAMPLES, generator=g)
        mine = torch.arange(SAMPLES).chunk(cluster.world_size)[cluster.rank].chunk(accumulation)
        total = torch.zeros(())
        for i, rows in enumerate(mine):
            loss = (engine(ids[rows]) * weights[rows]).sum()
            engine.backward(loss, last=i == len(mine) - 1)
            total += loss.detach()
        engine.step(1.0)
        dist.all_reduce(total)
        losses.append(total.item())
    return losses


def everything(engine: Engine) -> dict[str, Tensor]:
    """All named tensors, on every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, dict(engine.tensors()))
    merged: dict[str, Tensor] = {}
    for part in found:
        assert not merged.keys() & part.keys(), "two ranks own a tensor"
        merged |= part
    return merged


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names whose tensors differ in any bit, or that only one has."""
    return sorted(
        {n for n in a.keys() & b.keys() if a[n].dtype != b[n].dtype or not torch.equal(bits(a[n]), bits(b[n]))}
        | (a.keys() ^ b.keys())
    )


def bits(tensor: Tensor) -> Tensor:
    """As integers, so that -0.0 is not 0.0."""
    return tensor.contiguous().view(torch.int32) if tensor.dtype == torch.float32 else tensor


def reader(tensors: dict[str, Tensor]) -> Callable[[str], Tensor | None]:
    """What `Engine.load` takes."""
    return tensors.get


def noise(tensors: dict[str, Tensor], seed: int = 7) -> dict[str, Tensor]:
    """Tensors of the same names and shapes, with -0.0, a subnormal and a huge number among them."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point():
            made[name] = torch.full_like(tensor, 3)
            continue
        made[name] = torch.rand(tensor.shape, generator=g) + 0.5
        flat = made[name].view(-1)
        for at, value in enumerate((-0.0, 1e-40, 3e38)[: flat.numel()]):
            flat[at] = value
        if name.startswith("weight/head"):  # frozen: kept in compute precision
            made[name] = torch.full(tensor.shape, -0.0)
    return made
