"""The options of `cairn launch`, which come before VERB, and the runs that a command line means."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cairn.config.base import Section
from cairn.config.errors import close
from cairn.config.load import load
from cairn.config.main import Parser
from cairn.config.schema import RunConfig
from cairn.errors import UserError
from launch import sweep

if TYPE_CHECKING:
    from launch.cli import Verb

EXAMPLES = """\
examples:
  cairn launch pretrain CONFIG                           every GPU of this machine, or one process without any
  cairn launch --procs 2 pretrain CONFIG                 two processes on the CPU
  cairn launch --nodes 2 --rdzv node0 pretrain CONFIG    the same on two machines: type it on both
  cairn launch --hosts hosts.txt pretrain CONFIG         machines of a file, a host on each line, started from here
  cairn launch --slurm --cluster slurm --nodes 4 --dry-run pretrain CONFIG
                                                         show the sbatch script; without --dry-run, submit it
  cairn launch --sweep optim.lr=1e-3,2e-3 --sweep seed=1,2 pretrain CONFIG
                                                         four runs, one after another; with --slurm an array

Inside an srun step of one task a node, `cairn launch pretrain CONFIG` finds the other nodes by itself.
`cairn launch --help-cluster` lists the keys of a cluster's profile, `cairn pretrain --help` those of CONFIG.
"""


@dataclass(frozen=True)
class Point:
    """One run: what is overridden in CONFIG, and the config that this gives."""

    overrides: tuple[str, ...]
    config: RunConfig

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(self.config.run.dir, self.config.run.name)


def parser(verbs: Sequence[str]) -> Parser:
    """Of the options and the VERB CONFIG behind them. `verbs`: those that can be launched."""
    made = Parser(
        prog="cairn launch",
        usage="cairn launch [options] VERB CONFIG [section.key=value ...]",
        description=f"Start VERB ({', '.join(verbs)}) here, on several machines, or as a SLURM job.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    here = made.add_argument_group("processes")
    count = here.add_mutually_exclusive_group()
    count.add_argument("--gpus", type=_positive, metavar="N", help="processes a node, one a GPU; default: all GPUs")
    count.add_argument("--procs", type=_positive, metavar="N", help="processes a node, on the CPU")
    here.add_argument("--restarts", type=_natural, default=0, metavar="N", help="go on so often after a rank failed")
    nodes = made.add_argument_group("several machines")
    nodes.add_argument("--nodes", type=_positive, metavar="N", help="how many; with --rdzv or --slurm")
    nodes.add_argument("--rdzv", metavar="HOST[:PORT]", help="the first of them, where all meet")
    nodes.add_argument("--node-rank", type=_natural, metavar="K", help="which of them this is; default: as they come")
    nodes.add_argument("--hosts", type=Path, metavar="FILE", help="start on the hosts of a file, by ssh")
    nodes.add_argument("--ssh", metavar="COMMAND", help='with --hosts: another ssh, such as "ssh -p 2222"')
    job = made.add_argument_group("SLURM")
    job.add_argument("--slurm", action="store_true", help="submit a job")
    job.add_argument("--cluster", metavar="NAME|FILE", help="profile; default: ~/.config/cairn/cluster.yaml, if any")
    job.add_argument("--dry-run", action="store_true", help="show the script, or ssh's commands, and do nothing")
    job.add_argument("--partition", metavar="NAME", help="instead of the profile's, as the next two")
    job.add_argument("--account", metavar="NAME")
    job.add_argument("--time", metavar="LIMIT")
    grid = made.add_argument_group("sweeps")
    grid.add_argument("--sweep", action="append", default=[], metavar="KEY=V1,V2", help="a run for each value")
    grid.add_argument("--point", type=_natural, metavar="K", help="only run K of them, from 0")
    made.add_argument("--until-eof", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("verb", nargs="?", help=argparse.SUPPRESS)
    made.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return made


def read(made: Parser, argv: Sequence[str], verbs: "Mapping[str, Verb]") -> argparse.Namespace:
    """The command line, with `config` and `overrides` beside the options. Raises UserError for what does not fit."""
    options, unknown = made.parse_known_args(argv)
    known = [f"--{name.replace('_', '-')}" for name in vars(options) if name not in ("verb", "rest")]
    if wrong := [word for word in unknown if word.startswith("-")]:
        raise UserError(f"{wrong[0]}: unknown option{_like(wrong[0], known)}")
    able = [name for name, verb in verbs.items() if verb.processes]
    if options.verb is None:
        raise UserError(f"VERB is missing: one of {', '.join(able)}; see cairn launch --help")
    if options.verb not in able:
        known_verb = f"runs as `cairn {options.verb}` alone; launch starts {', '.join(able)}"
        raise UserError(
            f"{options.verb}: {known_verb if options.verb in verbs else 'no verb' + _like(options.verb, able)}"
        )
    if late := [word for word in options.rest if word.startswith("-")]:
        option = late[0].partition("=")[0]
        hint = f"comes before VERB: cairn launch {option} ... {options.verb} CONFIG"
        raise UserError(f"{option}: {hint if option in known else 'unknown option' + _like(option, known)}")
    if not options.rest:
        raise UserError("CONFIG is missing: give a YAML file or a run folder")
    options.config, options.overrides = options.rest[0], options.rest[1:]
    _fit(options)
    return options


def runs(options: argparse.Namespace, schema: type[Section]) -> tuple[str, list[Point]]:
    """The run.name before a sweep gives each its own, and the runs that are meant, their configs checked: one, or all
    of a sweep, or its --point. Raises UserError with the mistakes of all."""

    def at(overrides: Sequence[str]) -> Point:
        config = load(schema, Path(options.config), overrides)
        assert isinstance(config, RunConfig)
        return Point(tuple(overrides), config)

    if not options.sweep:
        point = at(options.overrides)
        return point.config.run.name, [point]
    axes = sweep.parse(options.sweep)
    grid = [(*options.overrides, *values) for values in sweep.points(axes)]
    if options.point is not None and options.point >= len(grid):
        raise UserError(f"--point {options.point}: the sweep has {len(grid)} runs, 0 to {len(grid) - 1}")
    base, found, problems = "", list[Point](), dict[str, None]()  # each problem once, in order
    for k, overrides in enumerate(grid):
        try:
            base = base or at(overrides).config.run.name
            if options.point in (None, k):
                found.append(at((*overrides, f"run.name={sweep.names(base, axes)[k]}")))
        except UserError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    if problems:
        raise UserError("\n".join(problems))
    return base, found


def check_batch(config: RunConfig, world_size: int) -> None:
    """Raise UserError, with what to set, where the global batch does not divide over so many processes."""
    section = config.train
    batch, micro = section.global_batch_size, section.micro_batch_size
    fitting = section.fitting_micro_batch_size(world_size)
    if fitting == micro:
        return
    grown = -(-batch // (micro * world_size)) * micro * world_size
    ways = ([f"train.micro_batch_size={fitting}"] if fitting else []) + [f"train.global_batch_size={grown}"]
    raise UserError(
        f"train.global_batch_size {batch} is not a multiple of train.micro_batch_size {micro} x {world_size} "
        f"process{'es' if world_size > 1 else ''}: set {' or '.join(ways)}"
    )


def _fit(options: argparse.Namespace) -> None:
    """Raise UserError for options that contradict each other or say nothing without another."""
    if options.slurm and (options.hosts or options.rdzv):
        raise UserError("--slurm asks for nodes itself: leave --hosts and --rdzv out")
    if options.hosts and options.nodes:
        raise UserError("--hosts says how many machines there are: leave --nodes out")
    for name, needs in (
        ("cluster", "slurm"),
        ("partition", "slurm"),
        ("account", "slurm"),
        ("time", "slurm"),
        ("ssh", "hosts"),
        ("point", "sweep"),
        ("node_rank", "rdzv"),
    ):
        if getattr(options, name) is not None and not getattr(options, needs):
            raise UserError(f"--{name.replace('_', '-')} is for use with --{needs}")
    if options.dry_run and not (options.slurm or options.hosts):
        raise UserError("--dry-run is for use with --slurm or --hosts")
    if options.rdzv and not (options.nodes or options.hosts):
        raise UserError("--rdzv needs --nodes N: how many machines meet there")
    if options.node_rank is not None and options.nodes and options.node_rank >= options.nodes:
        raise UserError(f"--node-rank {options.node_rank}: of --nodes {options.nodes} the first is 0")


def _like(word: str, words: Sequence[str]) -> str:
    return close(word.partition("=")[0], words) or "; see cairn launch --help"


def _positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def _natural(text: str) -> int:
    if not re.fullmatch(r"\d{1,6}", text):
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text!r}")
    return int(text)
