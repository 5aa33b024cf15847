"""`cairn plan`'s memory against real trainings on this CPU: `python -m benchmarks.plan [--quick]`.

Every training is `python -m pretrain` in all but name, three steps, each rank a process of its own whose peak resident
memory the kernel reports. Subtracted is that of the same training of a model of next to nothing. Each is run twice:

- `tensors`: every tensor in a mapping of its own, so that the peak is that of the tensors, as
  `torch.cuda.max_memory_allocated` tells it on a GPU;
- `as launched`: with the allocator settings that `cairn` sets, whose holes between tensors are memory too.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rounds import peak_kib
from cairn.cluster import Cluster, environment
from launch.job import ALLOCATOR

CONFIG = "configs/pretrain/bench-8x512.yaml"
STEPS = "train.steps=3"
MIB = 2.0**20
TENSORS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SHAPE = ("n_layer=8", "n_head=8", "d_model=512", "max_seq_len=512", "vocab_size=8192")
BERT = ("objective.name=masked", "model.name=bert", *(f"model.{key}" for key in SHAPE))
MUON = ("optim.name=muon", "optim.lr=0.02", "optim.weight_decay=0.0")
NOTHING = ("model.n_layer=1", "model.d_model=64", "model.n_head=2")


@dataclass(frozen=True)
class Case:
    """One training: ZeRO stage, ranks, micro-batch size, and what else."""

    stage: int
    world: int
    size: int
    more: tuple[str, ...] = ()
    name: str = "GPT"
    accumulate: int = 1

    def overrides(self) -> list[str]:
        """Of CONFIG."""
        return [
            f"engine.zero_stage={self.stage}",
            f"train.micro_batch_size={self.size}",
            f"train.global_batch_size={self.size * self.world * self.accumulate}",
            *self.more,
        ]


CASES = [
    *(Case(stage, 1, size) for stage in (1, 2, 3) for size in (4, 16)),
    *(Case(stage, 2, 4) for stage in (1, 2, 3)),
    Case(0, 1, 4, ("engine.precision=fp32",), "GPT, fp32"),
    Case(3, 1, 4, ("engine.precision=fp32",), "GPT, fp32"),
    Case(1, 1, 4, (), "GPT, accumulating", 2),
    Case(2, 2, 4, (), "GPT, accumulating", 2),
    Case(1, 1, 16, ("engine.activation_checkpointing=true",), "GPT, recomputing"),
    Case(2, 1, 4, ("engine.offload=optimizer",), "GPT, offloading"),
    Case(1, 1, 4, MUON, "GPT, Muon"),
    Case(2, 2, 4, MUON, "GPT, Muon"),
    *(Case(stage, 1, size, BERT, "BERT") for stage, size in ((1, 4), (1, 16), (2, 4), (3, 4))),
]
WIDE = ("model.d_model=1024", "data.seq_len=256")
CASES += [Case(stage, 1, 8, WIDE, "GPT, 1024 wide") for stage in (1, 2)]
QUICK = [Case(1, 1, 4), Case(2, 2, 4)]


def measured(case: Case, allocator: dict[str, str], more: tuple[str, ...] = ()) -> float:
    """Peak resident bytes of rank 0."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        command = [sys.executable, "-m", "benchmarks.plan", "--one", CONFIG, *case.overrides(), *more]
        command += [STEPS, f"run.dir={folder}"]
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        free.close()
        ranks = []
        for rank in range(case.world):
            env = (
                environment(Cluster(rank, case.world, rank, case.world, master_port=port), clean)
                | {"OMP_NUM_THREADS": "1"}
                | allocator
            )
            ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        said = [rank.communicate() for rank in ranks]
        for rank, (_, errors) in zip(ranks, said, strict=True):
            if rank.returncode:
                raise SystemExit(errors)
        return float(said[0][0].splitlines()[-1])


def one(argv: list[str]) -> None:
    """In a rank's process: train, then print the peak that the kernel saw of this process since it began."""
    from cairn.config.main import read_args
    from cairn.config.schema import PretrainConfig
    from cairn.data.prepare import open_prepared, prepare
    from cairn.train.language_model import LanguageModel
    from cairn.train.trainer import Trainer

    config, cluster = read_args(PretrainConfig, argv), Cluster.from_env()
    with cluster.init():
        folder = cluster.on_main(lambda: prepare(config.data, config.tokenizer))
        trainer = Trainer(LanguageModel(config, open_prepared(folder)), config, cluster)
        trainer.run()
    print(peak_kib() * 1024, flush=True)
    os._exit(0)  # the interpreter's own way out, with gloo's threads about, aborts once in a while


def predicted(case: Case, more: tuple[str, ...] = ()) -> tuple[float, float, str]:
    """Bytes of tensors; all bytes less the process's own; and the moment of the peak."""
    from cairn.config.load import load
    from cairn.config.schema import PretrainConfig
    from cairn.plan.hardware import settled_for
    from cairn.plan.memory import Setting, count, memory
    from cairn.plan.trace import trace_activations

    config = settled_for("cpu", load(PretrainConfig, Path(CONFIG), [*case.overrides(), STEPS, *more]))
    assert config.model.vocab_size is not None
    rows, recompute = config.model.vocab_size, config.engine.activation_checkpointing
    activations = trace_activations(config, rows, case.size, recompute, "cpu")
    setting = Setting(case.stage, case.size, recompute)
    found = memory(config, count(config, rows), activations, setting, case.world, "cpu")
    return found.tensors, found.tensors + found.slack, found.when


def idle(world: int, allocator: dict[str, str], more: tuple[str, ...] = ()) -> float:
    """Bytes of a process that hardly has a model: what to take off the others' peaks."""
    small = Case(1, world, 1, more)
    return measured(small, allocator, NOTHING) - predicted(small, NOTHING)[0]


def main() -> None:
    """The table."""
    if "--one" in sys.argv:
        one(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two cases, tensors alone")
    parser.add_argument("--first", type=int, default=0, help="case to begin with")
    args = parser.parse_args()
    quick: bool = args.quick
    print("| model | ZeRO | ranks | micro-batch | peak at | tensors: predicted, MiB | measured | error | ", end="")
    print("as launched: predicted | measured | error |\n" + "| --- | ---: | ---: | ---: | --- |" + " ---: |" * 6)
    baselines: dict[tuple[str, int, tuple[str, ...]], float] = {}
    for case in QUICK if quick else CASES[args.first :]:
        tensors, launched, when = predicted(case)
        cells = [case.name, f"{case.stage}", f"{case.world}", f"{case.size}", when]
        for label, allocator, guess in (("tensors", TENSORS, tensors), ("launched", ALLOCATOR, launched)):
            if quick and label == "launched":
                continue
            key = (label, case.world, BERT if case.name == "BERT" else ())
            if key not in baselines:
                baselines[key] = idle(case.world, allocator, key[-1])
            peak = measured(case, allocator) - baselines[key]
            cells += [f"{guess / MIB:,.0f}", f"{peak / MIB:,.0f}", f"{guess / peak - 1:+.1%}"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
