"""`srun python -m pretrain CONFIG` in a job of one's own: nothing but SLURM's variables says who is who."""

import sys

import pytest

from cairn.train.folder import RunFolder
from tests.cluster.conftest import ROOT, Lab

pytestmark = pytest.mark.cluster
SCRIPT = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --output={log}
export OMP_NUM_THREADS=1
srun {command}
"""


def test_two_nodes_are_as_good_as_two_ranks(lab: Lab, undisturbed: RunFolder) -> None:
    script = lab.here / "srun.sh"
    command = " ".join([sys.executable, "-m", "pretrain", *lab.pretrain("srun")])
    script.write_text(SCRIPT.format(log=lab.here / "srun.log", command=command))
    job = lab.cluster.submit(script, cwd=ROOT)
    nodes = lab.cluster.wait(job, "COMPLETED", 120)["NodeList"]
    assert nodes == "n[1-2]"
    lab.identical("srun", undisturbed)
