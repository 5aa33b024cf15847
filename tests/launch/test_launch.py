"""`cairn launch`: what a command line starts, and what it refuses before anything is started."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cairn.errors import QuietError, UserError
from launch import launch as module
from launch import slurm, ssh
from launch.cli import VERBS
from launch.launch import count_gpus, profile_of
from launch.options import parser, read
from tests.launch.launchers import train_two

ROOT = Path(__file__).parents[2]
VIT = str(ROOT / "configs/vision/vit-digits.yaml")  # 64 samples, micro-batch 64
SMALL = "train.micro_batch_size=4"


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No launcher around us, no GPU, no profile of the user's."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(module, "count_gpus", lambda: 0)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def started(monkeypatch):
    """What the node's launcher would have been given."""
    calls = []
    monkeypatch.setattr("launch.node.run", lambda *args: calls.append(args) or 0)
    return calls


def launch(*argv: str) -> int:
    return module.launch(argv, VERBS)


def test_one_process_where_there_is_no_gpu(started):
    assert launch("vision", VIT, "run.dir=/x", "run.name=y") == 0
    ((job, *where),) = started
    assert (job.module, job.args, job.ranks) == ("recipes.vision", (VIT, "run.dir=/x", "run.name=y"), 1)
    assert (job.folder, job.restarts) == (Path("/x/y"), 0)
    assert where == [1, None, None, False]


def test_every_gpu_there_is(started, monkeypatch):
    monkeypatch.setattr(module, "count_gpus", lambda: 4)
    launch("vision", VIT, SMALL)
    launch("--gpus", "2", "--restarts", "3", "vision", VIT, SMALL)
    launch("--procs", "8", "vision", VIT, SMALL)
    assert [call[0].ranks for call in started] == [4, 2, 8]
    assert started[1][0].restarts == 3
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # --procs: no rank may take a GPU


def test_prepare_is_one_process(started, monkeypatch):
    monkeypatch.setattr(module, "count_gpus", lambda: 4)
    launch("prepare", str(ROOT / "configs/pretrain/gpt-tiny.yaml"))
    assert (started[0][0].module, started[0][0].ranks) == ("pretrain.prepare", 1)
    with pytest.raises(UserError, match="prepare is one process"):
        launch("--nodes", "2", "--rdzv", "a", "prepare", str(ROOT / "configs/pretrain/gpt-tiny.yaml"))


def test_several_nodes(started):
    launch("--nodes", "2", "--rdzv", "a:5", "--node-rank", "1", "--until-eof", "vision", VIT, SMALL)
    assert started[0][1:] == (2, "a:5", 1, True)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--gpu", "4", "vision", VIT], "--gpu: unknown option; did you mean --gpus?"),
        (["--qqq", "vision", VIT], "--qqq: unknown option; see cairn launch --help"),
        (["vision", VIT, "--procs", "2"], "--procs: comes before VERB: cairn launch --procs ... vision CONFIG"),
        (["vision", VIT, "--proc=2"], "--proc: unknown option; did you mean --procs?"),
        (["--gpus", "2", "vision", VIT], "--gpus 2: this machine has no GPU; --procs N starts N processes on the CPU"),
        (["--gpus", "0", "vision", VIT], "--gpus: expected an integer of at least 1, got '0'"),
        (["--gpus", "1", "--procs", "1", "vision", VIT], "not allowed with"),
        (["visoin", VIT], "visoin: no verb; did you mean vision?"),
        (["generate", "x"], "generate: runs as `cairn generate` alone; launch starts pretrain, prepare, finetune"),
        (["--procs", "2"], "VERB is missing"),
        (["vision"], "CONFIG is missing"),
        (["vision", "no.yaml"], "no.yaml: no such file"),
        (["vision", VIT, "train.stps=1"], "train.stps: unknown key; did you mean train.steps?"),
        (["vision", VIT, "oops"], "'oops': expected section.key=value"),
        (["--nodes", "2", "vision", VIT, SMALL], "--nodes 2 needs --rdzv HOST"),
        (["--rdzv", "a", "vision", VIT], "--rdzv needs --nodes N"),
        (["--nodes", "2", "--rdzv", "a", "--node-rank", "2", "vision", VIT], "the first is 0"),
        (["--node-rank", "0", "vision", VIT], "--node-rank is for use with --rdzv"),
        (["--cluster", "cpu", "vision", VIT], "--cluster is for use with --slurm"),
        (["--time", "9", "vision", VIT], "--time is for use with --slurm"),
        (["--point", "0", "vision", VIT], "--point is for use with --sweep"),
        (["--dry-run", "vision", VIT], "--dry-run is for use with --slurm or --hosts"),
        (["--slurm", "--hosts", "x", "vision", VIT], "leave --hosts and --rdzv out"),
        (["--hosts", "x", "--nodes", "2", "vision", VIT], "leave --nodes out"),
        (["--hosts", "none", "vision", VIT], "none: No such file"),
        (["--slurm", "--cluster", "slrm", "vision", VIT], "did you mean"),
        (["--slurm", "--time", "soon", "vision", VIT], "command line: time: expected MINUTES"),
        (["--slurm", "--partition", "a b", "vision", VIT], "command line: partition: expected text"),
        (["--sweep", "seed=1,2", "--point", "2", "vision", VIT], "--point 2: the sweep has 2 runs, 0 to 1"),
        (["--sweep", "optim.lr=1,x", "--sweep", "seed=1,2", "vision", VIT], "optim.lr: expected a number > 0, got 'x'"),
    ],
)
def test_what_is_refused(started, argv, says):
    with pytest.raises(UserError, match=re.escape(says)) as error:
        launch(*argv)
    assert len(str(error.value).splitlines()) == 1
    assert started == []


@pytest.mark.parametrize(
    "where",
    [
        ["--procs", "3"],
        ["--nodes", "3", "--rdzv", "a", "--procs", "1"],
        ["--slurm", "--nodes", "3", "--dry-run"],
        ["--slurm", "--gpus", "3", "--dry-run"],
        ["--slurm", "--sweep", "seed=1,2", "--procs", "3", "--dry-run"],
        ["--hosts", "HOSTS", "--dry-run"],
    ],
    ids=" ".join,
)
def test_a_batch_that_does_not_divide_is_told_before(started, tmp_path, where):
    (tmp_path / "HOSTS").write_text("a procs=1\nb procs=2\n")
    words = [str(tmp_path / word) if word == "HOSTS" else word for word in where]
    with pytest.raises(UserError, match=r"64 is not a multiple of .* 4 x 3 processes: set train.global_batch_size=72"):
        launch(*words, "vision", VIT, SMALL)
    assert started == []


def test_the_remedy_of_a_batch_works(started):
    with pytest.raises(UserError) as error:
        launch("--procs", "2", "vision", VIT, "train.micro_batch_size=64")
    for remedy in re.search("set (.*)", str(error.value))[1].split(" or "):
        launch("--procs", "2", "vision", VIT, "train.micro_batch_size=64", remedy)
    assert len(started) == 2


def test_other_launchers_of_a_step_stay_quiet(started, monkeypatch):
    for name, value in (("PROCID", "1"), ("STEP_NUM_TASKS", "2"), ("LOCALID", "0"), ("STEP_TASKS_PER_NODE", "1(x2)")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NODEID", "1")
    with pytest.raises(QuietError, match="unknown key"):
        launch("vision", VIT, "train.stps=1")
    with pytest.raises(QuietError, match="4 x 6 processes"):
        launch("--procs", "3", "vision", VIT, SMALL)


@pytest.mark.parametrize(
    ("files", "env", "count"),
    [
        ([], {}, 0),
        (["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"], {}, 2),
        (["nvidia0", "nvidia1"], {"CUDA_VISIBLE_DEVICES": "1"}, 1),
        (["nvidia0", "nvidia1"], {"CUDA_VISIBLE_DEVICES": ""}, 0),
        (["nvidia0", "nvidia1"], {"CUDA_VISIBLE_DEVICES": "0,-1,1"}, 1),
        (["nvidia0"], {"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b"}, 2),
        ([], {"CUDA_VISIBLE_DEVICES": "0,1"}, 0),
    ],
)
def test_counting_gpus(tmp_path, files, env, count):
    for name in files:
        (tmp_path / name).touch()
    assert count_gpus(tmp_path, env) == count


def options(*argv: str):
    return read(parser(["vision"]), [*argv, "vision", VIT], VERBS)


def test_which_profile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert profile_of(options("--slurm")).partition is None
    (tmp_path / ".config/cairn").mkdir(parents=True)
    (tmp_path / ".config/cairn/cluster.yaml").write_text("partition: mine\ngpus_per_node: 4\ngpu_type: a100\n")
    assert profile_of(options("--slurm")).partition == "mine"
    assert profile_of(options("--slurm", "--cluster", "cpu")).cpus_per_task == 16  # shipped
    (tmp_path / "configs/cluster").mkdir(parents=True)
    (tmp_path / "configs/cluster/cpu.yaml").write_text("partition: here\n")
    assert profile_of(options("--slurm", "--cluster", "cpu")).partition == "here"
    (tmp_path / "my.yaml").write_text("partition: file\n")
    assert profile_of(options("--slurm", "--cluster", "my.yaml")).partition == "file"
    given = ("--partition", "p", "--account", "1", "--time", "9:00", "--nodes", "3", "--gpus", "2")
    changed = profile_of(options("--slurm", *given))
    assert (changed.partition, changed.account, changed.time) == ("p", "1", "9:00")
    assert (changed.nodes, changed.gpus_per_node, changed.gpu_type) == (3, 2, "a100")
    assert profile_of(options("--slurm", "--procs", "2")).gpus_per_node == 0
    (tmp_path / "my.yaml").write_text("partiton: p\nnodes: 0\n")
    with pytest.raises(UserError, match=r"my.yaml:2: nodes: .*\nmy.yaml:1: partiton: unknown key; did you mean"):
        launch("--slurm", "--cluster", "my.yaml", "--dry-run", "vision", VIT)


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm, "submit", lambda *_: pytest.fail("submitted"))
    where = ["--slurm", "--cluster", "slurm", "--nodes", "2", "--gpus", "4", "--restarts", "2", "--dry-run"]
    assert launch(*where, "vision", VIT, SMALL, "run.name=x") == 0
    script = capsys.readouterr().out
    assert "\n#SBATCH --nodes=2\n" in script
    assert "-m launch.cli launch --gpus 4 --restarts 2\n" in script
    assert f"\n  vision {VIT} {SMALL} run.name=x\n" in script
    assert "\n  runs/x/checkpoints/step-00000400\n" in script
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_is_an_array(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = []
    monkeypatch.setattr(slurm, "submit", lambda text, batch: given.append((text, batch)) or "5")
    sweep = ["--sweep", "optim.lr=1e-3,2e-3", "--sweep", "train.steps=5,6"]
    launch("--slurm", *sweep, "vision", VIT, "run.name=x")
    ((text, batch),) = given
    assert batch.folder == Path("runs/x")
    assert [str(end) for end in batch.ends] == [
        f"runs/x-lr_{lr}-steps_{steps}/checkpoints/step-0000000{steps}" for lr in ("1e-3", "2e-3") for steps in (5, 6)
    ]
    assert "--array=0-3" in text
    assert "job 5: 4 runs, each on 1 node" in capsys.readouterr().out


def test_a_point_of_a_sweep(started):
    launch("--sweep", "optim.lr=1e-3,2e-3", "--sweep", "seed=1,2", "--point", "2", "vision", VIT, "run.name=x")
    assert started[0][0].args == (VIT, "run.name=x", "optim.lr=2e-3", "seed=1", "run.name=x-lr_2e-3-seed_1")
    assert started[0][0].folder.name == "x-lr_2e-3-seed_1"


def test_hosts(tmp_path, monkeypatch, capsys):
    (tmp_path / "hosts").write_text("me@a procs=1\nb\n")
    given = []
    monkeypatch.setattr(ssh, "run", lambda commands: given.extend(commands) or 7)
    assert launch("--hosts", str(tmp_path / "hosts"), "--procs", "3", "vision", VIT, SMALL) == 7
    (first, a), (second, b) = given
    assert (first.name, second.name) == ("me@a", "b")
    assert a[:-1] == [*ssh.SSH, "-o", "BatchMode=yes", "me@a", "--"]
    assert f"launch --until-eof --nodes 2 --rdzv a --node-rank 0 --procs 1 vision {VIT} {SMALL}" in a[-1]
    assert "--node-rank 1 --procs 3 vision" in b[-1]
    capsys.readouterr()
    assert launch("--hosts", str(tmp_path / "hosts"), "--ssh", "ssh -p 22", "--dry-run", "vision", VIT, SMALL) == 0
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()] == [["ssh", "-p", "22"]] * 2
    with pytest.raises(UserError, match=r"--ssh ssh \"-p: No closing quotation"):
        launch("--hosts", str(tmp_path / "hosts"), "--ssh", 'ssh "-p', "vision", VIT, SMALL)


def environment() -> dict[str, str]:
    return dict(os.environ) | {"OMP_NUM_THREADS": "1"}


STAND_IN = """
import os, signal, sys
from launch import node
def run(job, *where):
    print("started", job.folder.name, flush=True)
    if os.environ.get("WAIT"):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        print("waits", flush=True)
        signal.pause()
    return 3 if job.folder.name.endswith("seed_2") else 0
node.run = run
"""


def sweep(tmp_path: Path, **env: str) -> "subprocess.Popen[str]":
    """`cairn launch --sweep seed=1,2,3`, its runs ended by a stand-in for the node's launcher."""
    (tmp_path / "sitecustomize.py").write_text(STAND_IN)
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "launch", "--sweep", "seed=1,2,3", "vision", VIT, "run.name=x"],
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"} | env,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_sweep_here_goes_on_after_a_failure(tmp_path):
    process = sweep(tmp_path)
    out = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 3
    assert [line for line in out if line.startswith("started")] == [f"started x-seed_{k}" for k in (1, 2, 3)]
    assert out[-4:] == ["sweep:", "  x-seed_1: ended", "  x-seed_2: failed with status 3", "  x-seed_3: ended"]


def test_a_signal_ends_the_sweep(tmp_path):
    process = sweep(tmp_path, WAIT="1")
    for line in process.stdout:
        if line == "waits\n":
            break
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    assert out == ["sweep:", "  x-seed_1: stopped", "  x-seed_2: not started", "  x-seed_3: not started"]


def test_help(capsys):
    assert launch("--help") == 0
    assert "cairn launch --procs 2 pretrain CONFIG" in capsys.readouterr().out
    assert launch("--help-cluster") == 0
    assert "gpu_request = gpus-per-node" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_train(tmp_path):
    train_two(tmp_path, "--procs", "2")
