"""The house keeps its floors and seams: read from the imports, not from promises."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "cairn": 0,
    "cairn.errors": 0,
    "cairn.config": 0,
    "cairn.cluster": 0,
    "cairn.ops": 1,
    "cairn.models": 2,
    "cairn.data": 2,
    "cairn.objectives": 3,
    "cairn.optim": 3,
    "cairn.train": 4,
    "cairn.hub": 4,
    "cairn.decode": 4,
    "cairn.look": 4,
    "cairn.evaluate": 4,
    "cairn.plan": 4,
    "pretrain": 5,
    "finetune": 5,
    "recipes": 5,
}
TOP = ("pretrain", "finetune", "recipes")
OURS = ("cairn", "launch", *TOP, "benchmarks")
FILES = sorted(p for top in OURS for p in (ROOT / top).rglob("*.py"))
SEAMS = {
    "deepspeed": r"cairn/train/engine\w*\.py",
    "wandb": r"cairn/train/track\.py",
    "flash_attn": r"cairn/ops/\w+\.py",
    "triton": r"cairn/ops/\w+\.py",
    "xformers": r"cairn/ops/\w+\.py",
    "torch.nn.attention": r"cairn/ops/\w+\.py",
    "pickle": "nobody",
    "dill": "nobody",
}
RANK_VARIABLES = r"(LOCAL_)?(RANK|WORLD_SIZE)|SLURM_\w+"
RANK_READER = "cairn/cluster.py"


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module named by an import at any depth; `from a import b` as both a and a.b, as b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import(tree: ast.Module) -> Iterator[str]:
    """What importing the module imports: not what functions do, nor what only type checkers see."""
    body = [n for n in tree.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))]
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from imports(node)


def floor(module: str) -> int | None:
    """Of the package it is in; None for what is not ours."""
    parts = module.split(".")
    known = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((FLOORS[name] for name in known if name in FLOORS), None)


def violations(path: str, source: str) -> list[str]:
    """What a file does that the house forbids."""
    tree = ast.parse(source)
    here, top = floor(path.removesuffix(".py").replace("/", ".")), path.split("/")[0]
    found = []
    for name in imports(tree):
        there = floor(name)
        if there is not None and here is not None and there > here:
            found.append(f"imports {name} from floor {there}, being on floor {here}")
        if there is not None and top == "launch" and there > 0:
            found.append(f"launch imports {name}")
        if top in TOP and name.split(".")[0] in TOP and name.split(".")[0] != top:
            found.append(f"{top} imports {name}")
        if top != "benchmarks":
            for library, where in SEAMS.items():
                if (name == library or name.startswith(f"{library}.")) and not re.fullmatch(where, path):
                    found.append(f"imports {name}, which is for {where}")
    if (here == 0 or top == "launch") and "torch" in {name.split(".")[0] for name in at_import(tree)}:
        found.append("loads torch when it is imported")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and path != RANK_READER:
            if re.fullmatch(RANK_VARIABLES, node.value):
                found.append(f"line {node.lineno}: names {node.value}, which is for {RANK_READER}")
        elif isinstance(node, ast.keyword) and node.arg == "shell":
            found.append("passes shell=")
    if len(source.splitlines()) > 320:
        found.append(f"has {len(source.splitlines())} lines")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_house_rules(path):
    assert violations(path.relative_to(ROOT).as_posix(), path.read_text("utf-8")) == []


def test_every_package_has_a_floor():
    packages = {name_of(p) for p in (ROOT / "cairn").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert packages - {"cairn"} <= FLOORS.keys()


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cairn/ops/x.py", "from cairn.models import gpt"),
        ("cairn/ops/x.py", "from cairn import train"),
        ("cairn/data/x.py", "def f():\n    import cairn.train.trainer"),
        ("launch/x.py", "from cairn.models import gpt"),
        ("launch/x.py", "import pretrain"),
        ("pretrain/x.py", "from recipes import gan"),
        ("cairn/train/trainer.py", "import deepspeed.comm"),
        ("cairn/train/trainer.py", "from deepspeed import zero"),
        ("cairn/models/x.py", "from torch.nn.attention import flex_attention"),
        ("cairn/data/x.py", "import pickle"),
        ("cairn/config/x.py", "import torch.nn"),
        ("cairn/data/x.py", "import os\nos.environ['RANK']"),
        ("recipes/x.py", "import os\nos.getenv('SLURM_PROCID')"),
        ("pretrain/x.py", "import subprocess\nsubprocess.run('ls', shell=True)"),
        ("cairn/data/x.py", "\n" * 321),
    ],
)
def test_what_is_forbidden_is_found(path, source):
    assert len(violations(path, source)) > 0


def test_what_is_allowed_is_not():
    assert violations("cairn/train/engine_x.py", "import deepspeed\nfrom cairn.optim import muon") == []
    assert violations("cairn/config/x.py", "def f():\n    import torch") == []
    assert violations("cairn/cluster.py", "import os\nos.environ['RANK']") == []
