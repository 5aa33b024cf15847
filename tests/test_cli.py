"""The front door answers at once, without torch, and hands over to `python -m`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cairn.config.main import Parser, read_args, read_options, run_main
from cairn.config.schema import PretrainConfig
from cairn.errors import QuietError, UserError
from launch import cli

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs/pretrain/gpt-tiny.yaml")


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--help"], 0, "cairn pretrain CONFIG"),
        (["pretrain", "--help"], 0, "optim.name=muon"),
        (["gan", "--help"], 0, "model.d_latent"),
        (["--help"], 0, "cairn launch [where] VERB CONFIG"),
        (["launch", "--help"], 0, "cairn launch --procs 2 pretrain CONFIG"),
        (["launch", "--help-cluster"], 0, "signal_seconds = 180"),
        (["launch", "--gpsu", "4", "pretrain", TINY], 2, "error: --gpsu: unknown option; did you mean --gpus?"),
        (["launch", "--slurm", "--dry-run", "pretrain", TINY], 0, "#SBATCH --requeue"),
        (["lunch", TINY], 2, "did you mean launch?"),
        (["config", TINY, "train.steps=7"], 0, "steps: 7"),
        (["config", str(ROOT / "configs/vision/vit-digits.yaml")], 0, "name: vit"),
        (
            ["pretrain", TINY, "train.stps=7"],
            2,
            "error: command line: train.stps: unknown key; did you mean train.steps?",
        ),
        (["config", TINY, "oops"], 2, "error: command line: 'oops': expected section.key=value"),
        (["pretran", TINY], 2, "error: pretran: unknown verb; did you mean pretrain?"),
        (["pretrain", "train.steps=2"], 2, "no such file"),
    ],
)
def test_it_answers_without_torch(args, code, says):
    program = """
import atexit, sys
atexit.register(lambda: sys.modules.keys() & {"torch", "numpy", "deepspeed"} and print("HEAVY"))
sys.argv[0] = "cairn"
from launch.cli import main
main()"""
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr
    assert "HEAVY" not in done.stdout
    assert "Traceback" not in done.stderr


@pytest.fixture
def started(monkeypatch):
    """What would have been executed."""
    calls = []
    monkeypatch.setattr(os, "execve", lambda path, args, env: calls.append((args, env)))
    for name in cli.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    ("args", "becomes"),
    [
        (["pretrain", TINY, "train.steps=3"], ["pretrain", TINY, "train.steps=3"]),
        (["prepare", TINY], ["pretrain.prepare", TINY]),
        (["verify-resume", TINY, "--world-size", "2"], ["pretrain.verify_resume", TINY, "--world-size", "2"]),
        (["generate", "runs/x", "--prompt", "a=b"], ["cairn.decode", "runs/x", "--prompt", "a=b"]),
        (["export", "runs/x", "out"], ["cairn.hub", "export", "runs/x", "out"]),
        (["import", "in", "runs/x"], ["cairn.hub", "import", "in", "runs/x"]),
    ],
)
def test_it_becomes_the_module(started, args, becomes):
    cli.cairn(args)
    ((command, env),) = started
    assert command == [sys.executable, "-m", *becomes]
    assert env.items() >= cli.ALLOCATOR.items()


def test_the_users_allocator_stays(started, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    cli.cairn(["pretrain", TINY])
    assert started[0][1]["MALLOC_MMAP_MAX_"] == "7"


def test_no_second_process_where_the_environment_is_set(started, monkeypatch, tmp_path, capfd):
    for name, value in cli.ALLOCATOR.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "stand_in.py").write_text("import sys\nprint(__name__, sys.argv[1:])")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cairn"])
    cli.start("stand_in", ["a", "b=c"])
    assert started == []
    assert capfd.readouterr().out == "__main__ ['a', 'b=c']\n"


def test_a_config_error_comes_before_anything_starts(started):
    with pytest.raises(UserError):
        cli.cairn(["pretrain", TINY, "train.steps=x"])
    assert started == []


def test_read_args():
    assert read_args(PretrainConfig, [TINY, "train.steps=3"]).train.steps == 3


def test_read_options():
    parser = Parser(prog="x")
    parser.add_argument("--kill-at", type=int, default=0)
    config, options = read_options(PretrainConfig, ["--kill-at", "4", TINY, "train.steps=3"], parser)
    assert (config.train.steps, options.kill_at) == (3, 4)


def test_bad_arguments_are_user_errors():
    with pytest.raises(UserError, match="CONFIG"):
        read_args(PretrainConfig, [])
    with pytest.raises(UserError, match="--bogus"):
        read_args(PretrainConfig, [TINY, "--bogus"])


def test_other_ranks_stay_quiet(monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(QuietError):
        read_args(PretrainConfig, [TINY, "train.stps=3"])


@pytest.mark.parametrize(
    ("raised", "code", "err"),
    [
        (UserError("a.yaml: b\nc.yaml: d"), 2, "error: a.yaml: b\nerror: c.yaml: d\n"),
        (QuietError("a"), 2, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_run_main(raised, code, err, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def fail() -> int:
        raise raised

    with pytest.raises(SystemExit) as exit_:
        run_main(fail)
    assert exit_.value.code == code
    assert capsys.readouterr().err == err


def test_run_main_passes_the_status_on():
    with pytest.raises(SystemExit) as exit_:
        run_main(lambda: 3)
    assert exit_.value.code == 3
