"""`python -m pretrain.verify_resume CONFIG [k=v ...]`: prove on your own config that kill and resume change nothing.

Trains a few steps straight; trains them again in processes that are killed (signal 9) past a checkpoint, then resumes,
on another world size or ZeRO stage if asked; compares every metric of every step and every tensor of the last
checkpoint. The same topology must agree to the bit, another one within the order of floating-point reductions.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cairn.cluster import Cluster, environment
from cairn.config.main import Parser, read_options, run_main
from cairn.config.schema import PretrainConfig
from cairn.errors import UserError
from cairn.ops.precision import fast_bf16, settled
from cairn.train.checkpoint import steps_in
from cairn.train.folder import RunFolder, parse_rows
from pretrain.compare import Result, first_differences, relative_differences

LIMIT_S = 3600.0  # seconds that one of the three trainings may take
TOLERANCE = {"fp32": 5e-4, "bf16": 1e-2, "fp16": 1e-2}
"""Largest relative difference in the loss and in all weights together that reduction order explains in so few steps."""
JUDGED = ("loss", "weight")


class Ranks:
    """The processes of one training, started here rather than by torchrun so that each can be killed at once."""

    def __init__(self, command: Sequence[str], world_size: int, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = log
        self._deadline = time.monotonic() + LIMIT_S
        self._processes = []
        with log.open("ab") as output:
            for rank in range(world_size):
                env = environment(Cluster(rank, world_size, rank, world_size, master_port=port))
                self._processes.append(subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT))

    def running(self) -> bool:
        """Whether they run; False when all have ended well. Raises UserError with the log's end if one has failed."""
        codes = [process.poll() for process in self._processes]
        late = time.monotonic() > self._deadline
        if late or any(codes):
            self.kill()
            tail = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            said = f"did not end in {LIMIT_S:.0f} s" if late else f"ended with status {next(c for c in codes if c)}"
            raise UserError(f"the training {said}; the end of its output:\n{tail}")
        return None in codes

    def wait(self) -> None:
        """Wait until all have ended well."""
        try:
            while self.running():
                time.sleep(0.05)
        finally:
            self.kill()  # after Ctrl-C none may go on

    def kill(self) -> None:
        """kill -9."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


def main() -> int:
    """The command: 0 when the runs agree, 1 when they do not."""
    parser = Parser(prog="cairn verify-resume", description="Prove that kill -9 and resume change nothing.")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps to train (20)")
    parser.add_argument("--kill-at", type=int, metavar="K", help="step at which to kill (two thirds of N)")
    parser.add_argument("--world", type=int, default=1, metavar="W", help="processes (1)")
    parser.add_argument("--resume-world", type=int, metavar="W", help="processes after the kill (as before)")
    parser.add_argument("--resume-zero", type=int, choices=range(4), help="ZeRO stage after the kill (as before)")
    config, args = read_options(PretrainConfig, sys.argv[1:], parser)
    args.kill_at = args.kill_at or max(2, 2 * args.steps // 3)
    args.resume_world = args.resume_world or args.world
    if not 2 <= args.kill_at < args.steps:
        raise UserError(f"--kill-at {args.kill_at} has to lie between 2 and --steps {args.steps}")
    folder = Path(tempfile.mkdtemp(prefix="verify-resume-"))
    try:
        agree = verify(config, args, folder)
    except KeyboardInterrupt:
        shutil.rmtree(folder)
        raise
    if agree:
        shutil.rmtree(folder)
    else:
        print(f"both runs are kept in {folder}")
    return 0 if agree else 1


def verify(config: PretrainConfig, args: argparse.Namespace, folder: Path) -> bool:
    """Train straight, train with a kill and a resume, compare and say so."""
    console = Console()
    zero = config.engine.zero_stage if args.resume_zero is None else args.resume_zero
    same = args.resume_world == args.world and zero == config.engine.zero_stage
    common = [sys.executable, "-m", "pretrain", str(args.config)]
    if torch.cuda.is_available():
        common += ["engine.deterministic=true"]  # kernels that add in any order would differ without a kill
    common += [*args.overrides, *_overrides(config, args, folder)]
    dropouts = [key for key in ("dropout", "attention_dropout") if getattr(config.model, key, 0.0)]
    if not same and dropouts:
        console.print("dropout is drawn by rank, so it is switched off to compare topologies")
        common += [f"model.{key}=0.0" for key in dropouts]

    def start(name: str, world_size: int, *more: str) -> Ranks:
        micro = _micro_batch_size(config, world_size)
        own = [f"run.name={name}", f"train.micro_batch_size={micro}", *more]
        return Ranks([*common, *own], world_size, folder / f"{name}.log")

    straight, killed = RunFolder(folder, "straight"), RunFolder(folder, "killed")
    with console.status(f"training {args.steps} steps straight"):
        start("straight", args.world).wait()
    with console.status(f"training again, to be killed at step {args.kill_at}"):
        at = _kill(start("killed", args.world), killed, args.kill_at)
    before = steps_in(killed.checkpoints)[-1]
    kept = _lines(killed, before)
    console.print(f"killed -9 at step {at}; resuming from the checkpoint of step {before}", highlight=False)
    with console.status(f"resuming with {args.resume_world} process(es) at ZeRO stage {zero}"):
        start("killed", args.resume_world, f"engine.zero_stage={zero}").wait()
    if _lines(killed, before) != kept:
        console.print(f"the resumed run did not go on from step {before}: it wrote earlier steps anew")
        return False
    a, b = Result.of(straight), Result.of(killed)
    if same:
        return _judge_identity(console, a, b)
    device_type = Cluster().device.type
    # Muon orthogonalises in bf16 where that is fast, whatever the precision of the rest.
    bf16 = config.optim.name == "muon" and fast_bf16(device_type)
    coarsest = "bf16" if bf16 else settled(config.engine, device_type).precision
    return _judge_tolerance(console, a, b, TOLERANCE[coarsest])


def _overrides(config: PretrainConfig, args: argparse.Namespace, folder: Path) -> list[str]:
    """What makes a short run of any config: rows at every step, checkpoints before the kill, nothing sent anywhere."""
    return [
        f"run.dir={folder}",
        f"train.steps={args.steps}",
        "train.log_every=1",
        "train.eval_every=0",
        f"train.eval_samples={config.train.global_batch_size}",
        f"schedule.warmup_steps={min(config.schedule.warmup_steps, args.steps // 4)}",
        f"checkpoint.every={max(1, args.kill_at // 2)}",
        "checkpoint.resume=true",
        "track.wandb=off",
        "track.tensorboard=false",
    ]


def _micro_batch_size(config: PretrainConfig, world_size: int) -> int:
    """The config's, or the largest below it that divides a rank's share of the global batch."""
    fitting = config.train.fitting_micro_batch_size(world_size)
    if fitting is None:
        raise UserError(
            f"train.global_batch_size {config.train.global_batch_size} does not divide by {world_size} ranks"
        )
    return fitting


def _kill(ranks: Ranks, folder: RunFolder, step: int) -> int:
    """Kill the ranks once a row of `step` is written and there is a checkpoint; returns the last row's step."""
    try:
        while ranks.running():
            last: int = max((row["step"] for row in parse_rows(folder.metrics)), default=0)
            if last >= step and steps_in(folder.checkpoints):
                return last
            time.sleep(0.01)
    finally:
        ranks.kill()
    raise UserError("the run ended before it could be killed: give a larger --steps, or a smaller --kill-at")


def _lines(folder: RunFolder, step: int) -> list[dict[str, Any]]:
    """Rows up to a step, their timings included: no two trainings write the same ones."""
    return [row for row in parse_rows(folder.metrics) if row["step"] <= step]


def _judge_identity(console: Console, a: Result, b: Result) -> bool:
    differences = first_differences(a, b)
    for line in differences:
        console.print(f"differs: {line}", markup=False, highlight=False, soft_wrap=True)
    if not differences:
        console.print(f"identical: {a.steps()} steps, {len(a.checkpoint.names())} tensors", style="bold green")
    return not differences


def _judge_tolerance(console: Console, a: Result, b: Result, tolerance: float) -> bool:
    table = Table(title="relative difference, straight against resumed")
    for heading in ("", "largest", "where", "tolerance"):
        table.add_column(heading, overflow="fold")
    agree = True
    for name, (difference, where) in relative_differences(a, b).items():
        judged = name.split()[-1] in JUDGED
        good = not judged or difference <= tolerance
        agree = agree and good
        limit = f"{tolerance:g}{'' if good else ' EXCEEDED'}" if judged else ""
        table.add_row(name, f"{difference:.2e}", where, limit, style=None if good else "bold red")
    console.print(table)
    verdict = "within reduction order" if agree else "different"
    console.print(
        f"{verdict}: {a.steps()} steps, {len(a.checkpoint.names())} tensors",
        style="bold green" if agree else "bold red",
    )
    return agree


if __name__ == "__main__":
    run_main(main)
