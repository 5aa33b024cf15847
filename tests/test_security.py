"""What a run leaves behind follows the user's umask and holds no secret; nothing in the house runs what it reads."""

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pretrain import runs
from tests.test_floors import FILES, ROOT, name_of

CONFIG = """
tokenizer: {{name: sentencepiece, vocab_size: 300}}
data: {{source: {here}/corpus, dir: {here}/data, workers: 1, held_out: 0.2, seq_len: 16}}
model: {{name: gpt, n_layer: 1, n_head: 1, d_model: 8, max_seq_len: 16}}
objective: {{name: causal}}
engine: {{precision: fp32}}
train: {{steps: 2, global_batch_size: 2, micro_batch_size: 2, log_every: 1, eval_samples: 2}}
checkpoint: {{every: 1}}
run: {{dir: {here}/runs, name: x}}
track: {{progress: false, wandb: offline, tensorboard: true}}
"""
MARKER = "mark3r-0f-a-s3cret-00000000000000000000000"  # as long as wandb wants a key to be
SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "FOO_PASSWORD")

SERVICE = "WANDB_SERVICE"  # names wandb's process of another test, which would write the files of this run too


def prepared(here: Path) -> Path:
    """A config and its corpus."""
    (here / "corpus").mkdir()
    for number in range(12):
        words = " ".join(f"word{(number * 7 + k * k) % 97} {chr(97 + k % 26)}" for k in range(300))
        (here / "corpus" / f"{number}.txt").write_text(words)
    path = here / "config.yaml"
    path.write_text(CONFIG.format(here=here))
    return path


def everything(*tops: Path) -> Iterator[Path]:
    for top in tops:
        yield top
        yield from top.rglob("*")


@pytest.mark.parametrize("umask", [0o027, 0o077, 0o002], ids=oct)
def test_files_and_folders_follow_the_umask(tmp_path: Path, umask: int) -> None:
    config = prepared(tmp_path)
    runs.run(config, folder=tmp_path, before=Umask(umask))
    found = [path for path in everything(tmp_path / "runs", tmp_path / "data") if not path.is_symlink()]
    names = {path.name for path in found}
    assert {"config.yaml", "metrics.jsonl", "state.json", "manifest.json", ".lock", "wandb", "tensorboard"} <= names
    wrong = [
        f"{oct(path.stat().st_mode & 0o777)} {path.relative_to(tmp_path)}"
        for path in found
        if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~umask
    ]
    assert wrong == []


class Umask:
    """Set the umask in the run's own process."""

    def __init__(self, umask: int) -> None:
        self.umask = umask

    def __call__(self, rank: int) -> None:
        os.umask(self.umask)
        os.environ.pop(SERVICE, None)


class Secrets:
    """Put secrets into the environment of a run, and one where git keeps its remote."""

    def __call__(self, rank: int) -> None:
        os.environ |= dict.fromkeys(SECRETS, MARKER)
        os.environ.pop(SERVICE, None)


def test_no_secret_is_written_or_said(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    done = runs.run(config, folder=tmp_path, before=Secrets())
    assert "wandb: offline in" in done.text
    assert MARKER not in done.text
    files = [path for path in everything(tmp_path) if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if MARKER.encode() in path.read_bytes()] == []
    # nor what may hold one: the command line and the code
    recorded = b"".join(path.read_bytes() for path in files if "wandb" in path.parts)
    assert str(config).encode() not in recorded
    assert not list(tmp_path.rglob("wandb-metadata.json"))
    assert not list(tmp_path.rglob("diff.patch"))


FORBIDDEN = {
    "torch.load": "a pickle unless weights_only",
    "eval": "runs what it reads",
    "exec": "runs what it reads",
    "os.system": "a shell",
    "os.popen": "a shell",
    "subprocess.getoutput": "a shell",
    "subprocess.getstatusoutput": "a shell",
    "yaml.load": "makes any object",
    "yaml.unsafe_load": "makes any object",
    "tempfile.mktemp": "another may take the name",
}
UNPICKLERS = {"pickle", "dill", "cPickle", "cloudpickle", "joblib", "marshal", "shelve"}


def unsafe(source: str) -> list[str]:
    """What a file does that might run what a user's file, variable or name says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN:
                found.append(f"line {node.lineno}: {name}: {FORBIDDEN[name]}")
            for keyword in node.keywords:
                if keyword.arg in ("shell", "allow_pickle") and ast.unparse(keyword.value) != "False":
                    found.append(f"line {node.lineno}: {keyword.arg}")
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        modules = [*names, *([str(node.module)] if isinstance(node, ast.ImportFrom) else [])]
        found += [f"line {node.lineno}: imports {name}" for name in modules if name.split(".")[0] in UNPICKLERS]
    return found


@pytest.mark.parametrize("path", [p for p in FILES if p.relative_to(ROOT).parts[0] != "benchmarks"], ids=name_of)
def test_nothing_runs_what_it_reads(path: Path) -> None:
    assert unsafe(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "from pickle import loads",
        "eval('1')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import os\nos.system('ls')",
        "import yaml\nyaml.load('x', Loader=yaml.Loader)",
    ],
)
def test_the_rule_can_fail(source: str) -> None:
    assert unsafe(source)
