"""Who am I: each launcher's variables, and what they must not say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cairn.cluster import Cluster, environment, first_host, job_id, launchers, share_of_cores
from cairn.errors import UserError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "1234",
}
SRUN = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_NTASKS": "7",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08,12]",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
}


def test_alone():
    assert Cluster.from_env({}) == Cluster(0, 1, 0, 1, "127.0.0.1", 29500)


@pytest.mark.parametrize("outer", [TORCHRUN, SRUN])
def test_a_rank_started_from_a_rank_knows_its_own_place(outer):
    outer = {**outer, "HOME": "/home/me"}
    for place in (Cluster(1, 2, 1, 2, "127.0.0.1", 4321), Cluster(5, 7, 1, 3, "gpu07", 29400), Cluster()):
        inner = environment(place, outer)
        assert Cluster.from_env(inner) == place
        assert job_id(inner) == job_id(outer)
    kept = {key: outer[key] for key in ("SLURM_JOB_ID",) if key in outer}
    assert environment(Cluster(), outer) == {"HOME": "/home/me"} | kept


def test_torchrun():
    assert Cluster.from_env(TORCHRUN) == Cluster(5, 8, 1, 4, "node0", 1234)


def test_torchrun_within_srun_wins():
    assert Cluster.from_env(SRUN | TORCHRUN) == Cluster.from_env(TORCHRUN)


def test_srun():
    assert Cluster.from_env(SRUN) == Cluster(5, 7, 1, 3, "gpu07", 15000 + 70003 % 10000)


def test_srun_variables_alone_suffice():
    env = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}
    assert Cluster.from_env(env) == Cluster(1, 2, 1, 2, "127.0.0.1", 15000)


def test_srun_takes_the_users_address():
    cluster = Cluster.from_env(SRUN | {"MASTER_ADDR": "here", "MASTER_PORT": "99"})
    assert (cluster.master_addr, cluster.master_port) == ("here", 99)


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"},  # salloc's shell
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "ENVIRONMENT": "BATCH"},  # sbatch's script
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --pty bash
    ],
)
def test_an_allocation_is_not_a_step(env):
    assert Cluster.from_env(env).world_size == 1


STEP = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1"}
STEP |= {"SLURM_LOCALID": "0"}


def test_launchers_in_a_step_find_each_other():
    assert launchers(STEP) == Cluster(1, 2, 0, 1, "gpu07", 15000 + 70003 % 10000)
    assert launchers({}) == Cluster()
    assert launchers({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"}) == Cluster()
    with pytest.raises(UserError, match="--ntasks-per-node=1"):
        launchers(SRUN)


def test_cores_are_shared_among_the_ranks_of_a_launcher():
    cores = len(os.sched_getaffinity(0))
    assert share_of_cores(1, {}) == cores
    assert share_of_cores(1000, {}) == 1
    assert share_of_cores(1, STEP | {"SLURM_CPUS_PER_TASK": "1"}) == 1
    assert share_of_cores(1, STEP | {"SLURM_CPUS_PER_TASK": "1000"}) == cores
    assert share_of_cores(1, {"SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "1"}) == cores  # salloc's shell


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("a.b-c,d", "a.b-c"),
        ("gpu[003-010,12],login1", "gpu003"),
        ("r[1-2]n[07,09]-ib,x", "r1n07-ib"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("env", "named"),
    [
        (TORCHRUN | {"RANK": "x"}, "RANK is 'x'"),
        (TORCHRUN | {"RANK": "8"}, "RANK is 8, but WORLD_SIZE is 8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK is 4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE is 9"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_ADDR"}, "MASTER_ADDR is not set"),
        ({k: v for k, v in TORCHRUN.items() if k != "LOCAL_WORLD_SIZE"}, "LOCAL_WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE is 1, but this srun step has 7 tasks"),
        (SRUN | {"SLURM_PROCID": "7"}, "SLURM_PROCID is 7"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(3)"}, "SLURM_STEP_TASKS_PER_NODE"),
        (SRUN | {"SLURM_NODEID": "2"}, "SLURM_NODEID is 2"),
        (SRUN | {"SLURM_STEP_NODELIST": "gpu[1"}, "SLURM_STEP_NODELIST"),
    ],
)
def test_contradictions_are_named(env, named):
    with pytest.raises(UserError) as error:
        Cluster.from_env(env)
    assert named in str(error.value)


def test_threads():
    cores = len(os.sched_getaffinity(0))
    four = Cluster(0, 4, 0, 4)
    assert Cluster().threads({}) == cores
    assert four.threads({}) == max(1, cores // 4)
    assert four.threads({"OMP_NUM_THREADS": "3"}) is None
    # torchrun's own default is not the user's word
    assert four.threads({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}) == max(1, cores // 4)
    assert four.threads({"SLURM_CPUS_PER_TASK": "6"}) == 6


def test_deepspeed_is_told_the_one_gpu_that_a_task_sees(monkeypatch):
    import torch
    import torch.distributed as dist

    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    Cluster(3, 4, 3, 4).init()
    assert used == [torch.device("cuda", 0)]
    assert os.environ["LOCAL_RANK"] == "0"
    assert os.environ["RANK"] == "3"


JOB = """
import torch, torch.distributed as dist
from cairn.cluster import Cluster
from cairn.errors import UserError
c = Cluster.from_env()
def fail(): raise UserError("no corpus")
with c.init():
    assert c.device.type == "cuda" or dist.get_backend() == "gloo"
    x = torch.tensor(float(c.rank + 1)); dist.all_reduce(x)
    said = c.on_main(lambda: f"from {c.rank}")
    c.barrier()
    try: c.on_main(fail)
    except UserError as e: error = f"{type(e).__name__} {e}"
    print(c.rank, x.item(), said, error, flush=True)
    print(c.on_all(lambda: c.rank + 5), flush=True)
    try: c.on_all(lambda: fail() if c.rank == c.world_size - 1 else None)
    except UserError as e: print(f"{type(e).__name__} {e}", flush=True)
"""


def _run(script: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD", "LOCAL_", "MASTER_"))}
    return subprocess.Popen(
        [sys.executable, str(script)], env=clean | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_init_alone(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    out, err = _run(tmp_path / "job.py", {}).communicate(timeout=60)
    assert out == "0 1.0 from 0 UserError no corpus\n5\nUserError no corpus\n", err


def test_init_under_srun_variables(tmp_path, free_port):
    (tmp_path / "job.py").write_text(JOB)
    env = {"SLURM_NTASKS": "2", "MASTER_PORT": str(free_port)}
    ranks = [
        _run(tmp_path / "job.py", env | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_ID": "0"})
        for rank in "01"
    ]
    outs = [r.communicate(timeout=120) for r in ranks]
    assert outs[0][0] == "0 3.0 from 0 UserError no corpus\n5\nQuietError no corpus\n", outs[0][1]
    assert outs[1][0] == "1 3.0 from 0 QuietError no corpus\n6\nUserError no corpus\n", outs[1][1]
