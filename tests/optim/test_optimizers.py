import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cairn.config.train import AdamWSection, MuonSection
from cairn.optim.build import build_optimizer
from cairn.optim.layout import FlatLayout, Piece
from cairn.optim.muon import MuonAdamW, orthogonalise
from tests.train.dist import run_distributed


class Tiny(nn.Module):
    """The shape of a language model, with a tied head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(8), "up": nn.Linear(8, 24), "down": nn.Linear(24, 8, bias=False)})
            for _ in range(2)
        )
        self.blocks[0]["bias"] = nn.Embedding(4, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.pooler = nn.Linear(8, 8)


def names(model: nn.Module, optimizer: torch.optim.Optimizer, **wanted: object) -> set[str]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return {
        by_id[id(p)]
        for group in optimizer.param_groups
        for p in group["params"]
        if all(group[key] == value for key, value in wanted.items())
    }


def fill_gradients(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn_like(param)


def test_only_matrices_decay() -> None:
    model = Tiny()
    optimizer = build_optimizer(model.named_parameters(), model, AdamWSection(weight_decay=0.3))
    everything = dict(model.named_parameters())
    assert names(model, optimizer, weight_decay=0.3) == {n for n, p in everything.items() if p.ndim == 2}
    assert names(model, optimizer) == set(everything)
    assert {group["base_lr"] for group in optimizer.param_groups} == {6e-4}


def test_muon_takes_the_matrices_of_blocks_alone() -> None:
    model = Tiny()
    optimizer = build_optimizer(model.named_parameters(), model, MuonSection())
    assert names(model, optimizer, kind="muon") == {f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("up", "down")}
    assert names(model, optimizer) == set(dict(model.named_parameters()))
    rates = {group["kind"]: group["base_lr"] for group in optimizer.param_groups}
    assert rates == {"muon": 0.02, "adamw": 3e-3}


@pytest.mark.parametrize(
    "section", [AdamWSection(lr=0.01, layer_decay=0.5), MuonSection(lr=0.01, adam_lr=0.01, layer_decay=0.5)]
)
def test_lower_layers_move_less(section: AdamWSection | MuonSection) -> None:
    model = nn.Module()
    model.embed, model.head = nn.Embedding(5, 4), nn.Linear(4, 2)
    model.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(2))
    optimizer = build_optimizer(model.named_parameters(), model, section)
    rates = {"head": 0.01, "blocks.1": 0.005, "blocks.0": 0.0025, "embed": 0.00125}
    for where, rate in rates.items():
        expected = {name for name, _ in model.named_parameters() if name.startswith(where)}
        assert names(model, optimizer, base_lr=rate) == expected


def test_frozen_parameters_are_left_out() -> None:
    model = Tiny()
    model.embedding.weight.requires_grad_(False)
    optimizer = build_optimizer(model.named_parameters(), model, MuonSection())
    assert "embedding.weight" not in names(model, optimizer)


def test_the_adamw_part_is_torch_adamw_to_the_bit() -> None:
    ours, theirs = Tiny(), Tiny()
    groups = build_optimizer(ours.named_parameters(), ours, AdamWSection(lr=0.01)).param_groups
    mine = MuonAdamW([dict(group) for group in groups])
    reference = build_optimizer(theirs.named_parameters(), theirs, AdamWSection(lr=0.01))
    for step in range(4):
        for model, optimizer in ((ours, mine), (theirs, reference)):
            fill_gradients(model, step)
            optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(mine.state[a][key], reference.state[b][key])


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32)])
def test_updates_are_orthogonal(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    update = u @ torch.diag(torch.linspace(1.0, 20.0, min(shape))) @ v
    values = torch.linalg.svdvals(orthogonalise(update, 5)) / max(1.0, shape[0] / shape[1]) ** 0.5
    assert values.min() > 0.65
    assert values.max() < 1.25
    # It points the way the gradient does, matrix by matrix.
    assert (orthogonalise(update, 5) * (u @ v)).sum() > 0.8 * min(shape)


def test_muon_steps_by_hand() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    group = {"params": [weight], "kind": "muon", "lr": 0.1, "weight_decay": 0.5, "momentum": 0.9, "ns_steps": 5}
    optimizer = MuonAdamW([group])
    torch.manual_seed(0)
    momentum, expected = torch.zeros(4, 4), torch.ones(4, 4)
    for _ in range(3):
        weight.grad = torch.randn(4, 4)
        momentum = 0.9 * momentum + 0.1 * weight.grad
        nesterov = 0.1 * weight.grad + 0.9 * momentum
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * orthogonalise(nesterov, 5)
        optimizer.step()
        # bf16 iterations amplify the last bit of their input
        torch.testing.assert_close(weight.detach(), expected, atol=2e-3, rtol=0)


def test_muon_learns() -> None:
    torch.manual_seed(0)
    target = torch.randn(16, 16)
    x = torch.randn(64, 16)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(16, 16)])})
    optimizer = build_optimizer(model.named_parameters(), model, MuonSection(lr=0.1, adam_lr=0.1))
    losses = []
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * (1 - step / 150)
        loss = ((model["blocks"][0](x) - x @ target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 100


SHAPES = {"a": (6, 10), "b": (12, 4), "c": (4, 4), "d": (5, 20)}
TOTAL = sum(r * c for r, c in SHAPES.values())


def whole(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def muon_group(params: list[Tensor]) -> dict[str, object]:
    return {"params": params, "kind": "muon", "lr": 0.05, "weight_decay": 0.1, "momentum": 0.95, "ns_steps": 5}


def plain_run() -> dict[str, Tensor]:
    params = {name: nn.Parameter(value) for name, value in whole(0).items()}
    optimizer = MuonAdamW([muon_group(list(params.values()))])
    for step in range(3):
        for name, grad in whole(step + 1).items():
            params[name].grad = grad
        optimizer.step()
    return {name: param.detach() for name, param in params.items()}


def one_buffer(rank: int, world: int) -> list[Piece]:
    """ZeRO 1 and 2: all matrices in a row, cut into equal lengths."""
    share = -(-TOTAL // world)
    pieces, offset = [], 0
    for name, shape in SHAPES.items():
        size = shape[0] * shape[1]
        start, stop = max(offset, rank * share), min(offset + size, (rank + 1) * share)
        if start < stop:
            pieces.append(Piece(name, shape, start - offset, start - rank * share, stop - start))
        offset += size
    return pieces


def each_matrix(rank: int, world: int) -> list[Piece]:
    """ZeRO 3: each matrix cut into equal lengths, this rank's cuts in a row; the last rank's are shorter."""
    pieces, local = [], 0
    for name, shape in SHAPES.items():
        size = shape[0] * shape[1]
        share = -(-size // world)
        length = min(share, size - rank * share)
        pieces.append(Piece(name, shape, rank * share, local, length))
        local += share
    return pieces


def flat(values: dict[str, Tensor], pieces: list[Piece], size: int) -> Tensor:
    out = torch.zeros(size)
    for p in pieces:
        part = values[p.name].reshape(-1)[p.full_offset : p.full_offset + p.length]
        out[p.local_offset : p.local_offset + p.length] = part
    return out


def flat_run(rank: int, world: int, cut: str) -> Tensor:
    pieces = {"one_buffer": one_buffer, "each_matrix": each_matrix}[cut](rank, world)
    size = max(p.local_offset + p.length for p in pieces) + rank  # lengths may differ
    param = nn.Parameter(flat(whole(0), pieces, size))
    optimizer = MuonAdamW([muon_group([param])])
    optimizer.attach({id(param): FlatLayout(pieces, dist.group.WORLD if world > 1 else None)})
    for step in range(3):
        param.grad = flat(whole(step + 1), pieces, size)
        optimizer.step()
    assert set(optimizer.state[param]) == {"momentum"}
    return param.detach()


def check_flat(results: list[Tensor], cut: str) -> None:
    expected = plain_run()
    for rank, result in enumerate(results):
        pieces = {"one_buffer": one_buffer, "each_matrix": each_matrix}[cut](rank, len(results))
        assert torch.equal(result, flat(expected, pieces, result.numel()))


@pytest.mark.parametrize("cut", ["one_buffer", "each_matrix"])
def test_flat_pieces_on_one_rank_equal_whole_matrices(cut: str) -> None:
    check_flat([flat_run(0, 1, cut)], cut)


def both_cuts(rank: int, world: int) -> list[Tensor]:
    return [flat_run(rank, world, "one_buffer"), flat_run(rank, world, "each_matrix")]


@pytest.mark.slow
def test_flat_pieces_on_several_ranks_equal_whole_matrices() -> None:
    results = run_distributed(both_cuts, 2, 2)
    check_flat([one for one, _ in results], "one_buffer")
    check_flat([each for _, each in results], "each_matrix")


def test_pieces_that_leave_a_hole_are_refused() -> None:
    param = nn.Parameter(torch.zeros(16))
    optimizer = MuonAdamW([muon_group([param])])
    with pytest.raises(ValueError, match="pieces of a"):
        optimizer.attach({id(param): FlatLayout([Piece("a", (4, 4), 0, 0, 12)], None)})
