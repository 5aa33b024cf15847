"""One cluster for all tests, a corpus that its nodes see, and one run that nothing disturbs."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cairn.train.folder import RunFolder, parse_rows
from pretrain.compare import Result, first_differences
from tests.cluster.slurm import ENDED, SlurmCluster, missing, wait_for

ROOT = Path(__file__).parents[2]
STEPS = 200
# Long enough to be disturbed in its middle, with dropout, which is drawn by rank and step.
CONFIG = f"""
tokenizer: {{{{name: bytes}}}}
data: {{{{source: {{here}}/corpus, dir: {{here}}/data, workers: 1, held_out: 0.1}}}}
model: {{{{name: gpt, n_layer: 2, n_head: 2, d_model: 64, max_seq_len: 64, dropout: 0.1}}}}
optim: {{{{name: adamw, lr: 0.003}}}}
schedule: {{{{warmup_steps: 20}}}}
train: {{{{steps: {STEPS}, global_batch_size: 24, micro_batch_size: 4, log_every: 1, eval_samples: 8}}}}
checkpoint: {{{{every: 40}}}}
run: {{{{dir: {{here}}/runs}}}}
track: {{{{progress: false}}}}
"""


@dataclass(frozen=True)
class Lab:
    """The cluster, and where the runs on it lie."""

    cluster: SlurmCluster
    here: Path

    @property
    def config(self) -> Path:
        return self.here / "gpt.yaml"

    def folder(self, name: str) -> RunFolder:
        return RunFolder(self.here, "runs", name)

    def pretrain(self, name: str, *overrides: str) -> list[str]:
        """CONFIG and the overrides that give a run its name, and more."""
        return [str(self.config), f"run.name={name}", *overrides]

    def reaches(self, name: str, step: int, job: int, timeout: float = 120.0) -> None:
        """Wait until the run that a job trains has done a step. Raises AssertionError if the job ends before."""
        folder = self.folder(name)

        def there() -> bool:
            state = self.cluster.job(job)
            assert done(folder) >= step or state["JobState"] not in ENDED, self.cluster.story(state)
            return done(folder) >= step

        wait_for(
            there, timeout, lambda: f"step {done(folder)}, not yet {step}\n{self.cluster.story(self.cluster.job(job))}"
        )

    def identical(self, name: str, other: RunFolder) -> None:
        """Assert that two runs have all steps, and that all metrics, weights and moments are the same to the bit."""
        result = Result.of(self.folder(name))
        assert result.steps() == STEPS
        assert first_differences(result, Result.of(other)) == []


def done(folder: RunFolder) -> int:
    """Steps of a run that have their row."""
    return max((row["step"] for row in parse_rows(folder.metrics)), default=0) if folder.metrics.exists() else 0


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Three nodes of two cores."""
    if why := missing():
        pytest.skip(why)
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), nodes=3) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def place(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The same for all tests; `lab` is what each takes."""
    here = tmp_path_factory.mktemp("lab")
    (here / "corpus").mkdir()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-f]*.py"))[:25]:
        (here / "corpus" / path.name).write_bytes(path.read_bytes()[:8000])
    (here / "gpt.yaml").write_text(CONFIG.format(here=here))
    return Lab(cluster, here)


@pytest.fixture
def lab(place: Lab) -> Iterator[Lab]:
    """The lab, in which a test leaves no job and no node down to the next."""
    yield place
    place.cluster.run(["scancel", "--user=root"])
    place.cluster.boot()
    place.cluster.idle()


@pytest.fixture(scope="session")
def undisturbed(place: Lab) -> RunFolder:
    """Two ranks on one machine, started by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = {key: os.environ[key] for key in ("PATH", "HOME")} | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*torchrun, "-m", "pretrain", *place.pretrain("undisturbed")], cwd=ROOT, env=env, check=True, timeout=240
    )
    return place.folder("undisturbed")
