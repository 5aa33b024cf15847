"""`cairn launch [where] VERB CONFIG`: checks the config; starts the run here, on other machines, or as a SLURM job."""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from pydantic import ValidationError

from cairn.cluster import launchers
from cairn.config.cluster import ClusterProfile
from cairn.config.errors import explain
from cairn.config.help import print_help
from cairn.config.load import load
from cairn.errors import QuietError, UserError
from launch import slurm, ssh
from launch.job import Job
from launch.options import Point, check_batch, parser, read, runs

if TYPE_CHECKING:
    from launch.cli import Verb

PROFILES = (Path("configs/cluster"), Path(__file__).parents[1] / "configs/cluster")
"""Where a profile that is given by its name is looked for."""


def launch(argv: Sequence[str], verbs: "Mapping[str, Verb]") -> int:
    """One command line after `cairn launch`; the exit status. Raises UserError before anything is started."""
    made = parser([name for name, verb in verbs.items() if verb.processes])
    if not argv or argv[0] in ("-h", "--help"):
        print(made.format_help(), end="")
        return 0
    if argv[0] == "--help-cluster":
        print_help(ClusterProfile, "A cluster's profile, configs/cluster/NAME.yaml or ~/.config/cairn/cluster.yaml:")
        return 0
    try:
        options = read(made, argv, verbs)
        verb = verbs[options.verb]
        assert verb.schema is not None
        base, points = runs(options, verb.schema)
        one = verb.processes == "one"
        if options.slurm:
            return _slurm(options, base, points, one)
        if len(points) > 1:
            return _one_after_another(argv, points)
        if options.hosts:
            return _ssh(options, points[0], one)
        return _here(options, points[0], verb.module, one)
    except UserError as error:
        if launchers().is_main:
            raise
        raise QuietError(str(error)) from error


def count_gpus(dev: Path = Path("/dev"), env: Mapping[str, str] = os.environ) -> int:
    """GPUs that a process here may use, without asking CUDA."""
    there = sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in dev.glob("nvidia*"))
    if "CUDA_VISIBLE_DEVICES" not in env or not there:
        return there
    words = [word.strip() for word in env["CUDA_VISIBLE_DEVICES"].split(",")]
    return next((i for i, word in enumerate(words) if word in ("", "-1")), len(words))  # CUDA reads no further


def _here(options: argparse.Namespace, point: Point, module: str, one: bool) -> int:
    nodes, there = options.nodes or launchers().world_size, count_gpus()
    if nodes > 1 and one:
        raise UserError(f"{options.verb} is one process: start it on one machine")
    if options.nodes and options.nodes > 1 and not options.rdzv and launchers().world_size == 1:
        raise UserError(f"--nodes {options.nodes} needs --rdzv HOST, the first of the machines: type the same on all")
    if options.gpus and options.gpus > there:
        has = f"{there} GPU{'s' if there > 1 else ''}" if there else "no GPU"
        raise UserError(f"--gpus {options.gpus}: this machine has {has}; --procs N starts N processes on the CPU")
    ranks = 1 if one else int(options.gpus or options.procs or there or 1)
    if not one and options.node_rank is None and not options.until_eof:  # else machines may differ
        check_batch(point.config, nodes * ranks)
    if options.procs:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a rank takes a GPU where it sees one
    from launch.node import run

    job = Job(module, (options.config, *point.overrides), point.folder, ranks, options.restarts)
    return run(job, options.nodes or 1, options.rdzv, options.node_rank, options.until_eof)


def _ssh(options: argparse.Namespace, point: Point, one: bool) -> int:
    count = ("--gpus", str(options.gpus)) if options.gpus else ("--procs", str(options.procs)) if options.procs else ()
    hosts = ssh.read_hosts(options.hosts, count)
    if one and len(hosts) > 1:
        raise UserError(f"{options.verb} is one process: start it on one machine")
    ranks = [host.ranks for host in hosts]
    if not one and None not in ranks:
        check_batch(point.config, sum(filter(None, ranks)))
    try:
        tool = shlex.split(options.ssh or "") or ssh.SSH
    except ValueError as error:
        raise UserError(f"--ssh {options.ssh}: {error}; quote its words as a shell wants them") from error
    rest = (options.verb, options.config, *point.overrides)
    words = ["--until-eof", *(["--restarts", str(options.restarts)] if options.restarts else [])]
    commands = []
    for k, host in enumerate(hosts):
        where = ["--nodes", str(len(hosts)), "--rdzv", options.rdzv or hosts[0].address, "--node-rank", str(k)]
        text = ssh.command(host, words + (where if len(hosts) > 1 else []), rest, Path.cwd())
        commands.append((host, ssh.start_line(tool, host, text)))
    if options.dry_run:
        print("\n".join(shlex.join(line) for _, line in commands))
        return 0
    return ssh.run(commands)


def _slurm(options: argparse.Namespace, base: str, points: list[Point], one: bool) -> int:
    profile = profile_of(options)
    if one:
        profile = profile.model_copy(update={"nodes": 1, "gpus_per_node": 0, "gpu_type": None})
    ranks = profile.gpus_per_node or options.procs or 1
    if not one:
        for point in points:
            check_batch(point.config, profile.nodes * ranks)
    words = ["--gpus" if profile.gpus_per_node else "--procs", str(ranks)]
    words += ["--restarts", str(options.restarts)] if options.restarts else []
    array = len(points) > 1
    if array:
        words += [word for text in options.sweep for word in ("--sweep", text)]
    overrides = options.overrides if array else points[0].overrides
    batch = slurm.Batch(
        name=base if array else points[0].config.run.name,
        folder=points[0].folder.with_name(base) if array else points[0].folder,
        options=tuple(words),
        run=(options.verb, options.config, *overrides),
        ends=tuple(point.folder / "checkpoints" / f"step-{point.config.train.steps:08d}" for point in points),
        array=array,
        restarts=options.restarts,
    )
    text = slurm.script(profile, batch, Path.cwd())
    print(text if options.dry_run else slurm.told(profile, batch, slurm.submit(text, batch)))
    return 0


def profile_of(options: argparse.Namespace) -> ClusterProfile:
    """The profile that --cluster names, or the user's own, or none, with what the other options say instead. Raises
    UserError with every mistake in it."""
    own = Path("~/.config/cairn/cluster.yaml").expanduser()
    if options.cluster:
        profile = load(ClusterProfile, _profile(options.cluster))
    else:
        profile = load(ClusterProfile, own) if own.exists() else ClusterProfile()
    given = {key: getattr(options, key) for key in ("partition", "account", "time", "nodes")}
    given |= {"gpus_per_node": 0 if options.procs else options.gpus}
    given = {key: value for key, value in given.items() if value is not None}
    if options.procs:
        given["gpu_type"] = None
    try:
        return ClusterProfile.model_validate(profile.model_dump() | given)
    except ValidationError as error:
        origins = dict.fromkeys(given, "command line")
        raise UserError("\n".join(explain(error, ClusterProfile, origins, "command line"))) from error


def _profile(name: str) -> Path:
    """The file of a profile: a path, or a name of one that is shipped or lies in configs/cluster/ here."""
    if name.endswith(".yaml") or "/" in name:
        return Path(name)
    places = [folder / f"{name}.yaml" for folder in PROFILES]
    return next((path for path in places if path.exists()), places[-1])


def _one_after_another(argv: Sequence[str], points: list[Point]) -> int:
    """Each point of a sweep as a launch of its own; one that fails does not keep the others from their turn."""
    children: list[subprocess.Popen[bytes]] = []
    stopped: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        if children:
            children[-1].send_signal(number)

    names = [point.config.run.name for point in points]
    told: list[str] = []
    failed = 0
    previous = {number: signal.signal(number, on_signal) for number in ssh.stops()}
    for k, name in enumerate(names):
        print(f"sweep: run {k + 1} of {len(names)}, {name}", flush=True)
        command = [sys.executable, "-m", "launch.cli", "launch", "--point", str(k), *argv]
        # A group of its own: it gets Ctrl-C from us, and only once.
        children.append(subprocess.Popen(command, process_group=0))
        if stopped:  # while it was started
            children[-1].send_signal(stopped[0])
        status = None
        while status is None:
            with suppress(subprocess.TimeoutExpired):  # not for ever: a signal just before it would be heard at its end
                status = children[-1].wait(ssh.TICK)
        failed = failed or status
        told.append(f"  {name}: " + ("stopped" if stopped else f"failed with status {status}" if status else "ended"))
        if stopped:
            told += [f"  {later}: not started" for later in names[k + 1 :]]
            break
    for number, handler in previous.items():
        signal.signal(number, handler)
    print("\n".join(["sweep:", *told]), flush=True)
    return (failed if failed >= 0 else 128 - failed) or (130 if signal.SIGINT in stopped else 0)
