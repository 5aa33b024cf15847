"""A run as a SLURM job: the script, and handing it in.

The script is plain bash around one `srun`, which starts one launcher a node. Whatever comes from a config, a profile or
a path stands in it quoted, as one word.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cairn.config.cluster import ClusterProfile
from cairn.errors import UserError

WAIT = 300
"""Seconds that launchers on other nodes have once the first has ended: a report drawn by rank 0 may take as long."""


@dataclass(frozen=True)
class Batch:
    """What a job runs."""

    name: str
    folder: Path
    """The run folder; of a sweep, the one that its script and logs lie in."""
    options: tuple[str, ...]
    """Of `cairn launch` on each node."""
    run: tuple[str, ...]
    """VERB CONFIG and the overrides."""
    ends: tuple[Path, ...]
    """What is there once a run is whole, for each point of a sweep: its last checkpoint."""
    array: bool = False
    """Whether each point of the sweep is a task of an array."""
    restarts: int = 0
    """How often the job goes back into the queue after a lost or hung rank."""


def script(profile: ClusterProfile, batch: Batch, cwd: Path) -> str:
    """The sbatch script. Raises UserError for a folder that it cannot name."""
    logs = batch.folder / "logs" / ("slurm-%A_%a.log" if batch.array else "slurm-%j.log")
    for path in (cwd, logs):
        if re.search(r"[\x00-\x1f\x7f\\]", str(path)):
            raise UserError(f"{str(path)!r}: a job's folder has no line break, control character or backslash")
    output = str(cwd / logs.parent).replace("%", "%%") + f"/{logs.name}"
    parts = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in _options(profile, batch, output)),
        "# Written by `cairn launch --slurm`: one launcher a node, told to save and stop before the time is up.",
        "",
        f"cd -- {shlex.quote(str(cwd))} || exit",
        *(f"module load {shlex.quote(module)} || exit" for module in profile.modules),
        *(f"export {key}={shlex.quote(value)}" for key, value in profile.env.items()),
        "command=(",
        *(f"  {line}" for line in _command(profile, batch, cwd)),
        ")",
        "",
        _FOLLOW.rstrip(),
    ]
    if profile.requeue:
        ends = "".join(f"\n  {shlex.quote(str(path))}" for path in batch.ends)
        retries = shlex.quote(str(batch.folder / "launch" / "retries"))
        index = "${SLURM_ARRAY_TASK_ID:-0}"
        parts += [
            "",
            "# What is there once the run is whole.",
            f"ends=({ends}\n)",
            f'end=${{ends[{index}]}} retries={retries}"-$SLURM_JOB_ID" restarts={batch.restarts}',
            _REQUEUE.rstrip(),
        ]
    return "\n".join([*parts, 'exit "$status"', ""])


def submit(text: str, batch: Batch) -> str:
    """Write the script into the run folder, hand it to sbatch; the job's id. Raises UserError."""
    path = batch.folder / "launch" / "sbatch.sh"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (batch.folder / "logs").mkdir(exist_ok=True)  # SLURM makes no folders, and without one the job has no log
        path.write_text(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; set run.dir to a folder that can be written") from error
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(
            "sbatch is not on this machine: run this on the cluster's login node; --dry-run shows the script anywhere"
        ) from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise UserError(f"sbatch refused {path}: {said}")
    return done.stdout.strip().partition(";")[0]  # `id;cluster` where there are several


def told(profile: ClusterProfile, batch: Batch, job: str) -> str:
    """What to say of a job that is in the queue."""
    log = batch.folder / "logs" / (f"slurm-{job}_0.log" if batch.array else f"slurm-{job}.log")
    what = f"{len(batch.ends)} runs, each on " if batch.array else ""
    nodes = f"{profile.nodes} node{'s' if profile.nodes > 1 else ''}"
    gpus = f" of {profile.gpus_per_node} GPUs" if profile.gpus_per_node else ""
    return "\n".join(
        [
            f"job {job}: {what}{nodes}{gpus}",
            f"script  {batch.folder / 'launch' / 'sbatch.sh'}",
            f"log     {log}",
            f"watch   tail -F {shlex.quote(str(log))}",
            f"queue   squeue -j {job}",
        ]
    )


def _options(profile: ClusterProfile, batch: Batch, output: str) -> list[str]:
    """Options of sbatch, which reads quotes as a shell does and expands nothing."""
    kind = f"{profile.gpu_type}:" if profile.gpu_type else ""
    requests = {"gpus-per-node": f"{kind}{profile.gpus_per_node}", "gres": f"gpu:{kind}{profile.gpus_per_node}"}
    values: dict[str, object] = {
        "job-name": batch.name,
        "output": output,
        "open-mode": "append",
        "array": f"0-{len(batch.ends) - 1}" if batch.array else None,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "reservation": profile.reservation,
        "time": profile.time,
        "nodes": profile.nodes,
        "ntasks-per-node": 1,
        profile.gpu_request: requests.get(profile.gpu_request) if profile.gpus_per_node else None,
        "cpus-per-task": profile.cpus_per_task,
        "mem": profile.mem,
        "exclusive": profile.exclusive or None,
        "signal": f"B:USR1@{profile.signal_seconds}",
        "requeue" if profile.requeue else "no-requeue": True,
        **profile.sbatch,
    }
    return [
        f"--{key}" if value is True else f"--{key}={shlex.quote(str(value))}"
        for key, value in values.items()
        if value is not None
    ]


def _command(profile: ClusterProfile, batch: Batch, cwd: Path) -> list[str]:
    """Lines of the command, each word quoted."""
    container = profile.container
    srun = ["srun", f"--nodes={profile.nodes}", f"--ntasks={profile.nodes}", "--ntasks-per-node=1"]
    srun += ["--kill-on-bad-exit=0", f"--wait={WAIT}"]
    if profile.cpus_per_task:  # srun does not take it from sbatch any more
        srun.append(f"--cpus-per-task={profile.cpus_per_task}")
    mounts = [*container.mounts, f"{cwd}:{cwd}"]
    if container.runtime != "none" and re.search("[:,]", str(cwd)):
        raise UserError(f"{cwd}: a folder with : or , in its name cannot be mounted into a container")
    inside = []
    if container.runtime == "pyxis":
        srun += [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"]
        srun.append(f"--container-workdir={cwd}")
    elif container.runtime == "apptainer":
        inside = ["apptainer", "exec", *(["--nv"] if profile.gpus_per_node else []), "--pwd", str(cwd)]
        inside += [word for mount in mounts for word in ("--bind", mount)] + [container.image]
    python = profile.python or (sys.executable if container.runtime == "none" else "python")
    lines = [srun, *([inside] if inside else []), [python, "-m", "launch.cli", "launch", *batch.options]]
    shown = [_quoted(line) for line in lines]
    if batch.array:
        shown.append('--point "$SLURM_ARRAY_TASK_ID"')
    return [*shown, _quoted(batch.run)]


def _quoted(words: Sequence[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)


_FOLLOW = """\
warned= stopped= step=
trap 'warned=1 again=1; [[ -z $step ]] || kill -USR1 "$step"' USR1  # srun passes it on to all launchers
# By scancel, as srun itself would answer with SIGKILL.
trap 'stopped=1 again=1; scancel --quiet --signal=TERM "$SLURM_JOB_ID"' TERM
"${command[@]}" &
step=$!
[[ -z $warned ]] || kill -USR1 "$step"
again=1
while [[ -n $again ]]; do  # a signal interrupts wait
  again=
  wait "$step"
  status=$?
done
"""

_REQUEUE = """\
preempted() {  # in the grace time SLURM tells the ranks alone (TERM), and takes a job that then ends for done
  [[ $(scontrol show job "$SLURM_JOB_ID") == *JobState=RUNNING*PreemptTime=[0-9]* ]]
}
if [[ -n $warned && ! -e $end ]] && (( status == 0 || status == 138 )); then  # 138: USR1 came before all had started
  echo "saved before the time was up: back into the queue"
elif [[ ! -e $end ]] && (( status == 0 || status == 143 )) && preempted; then
  echo "saved before it is preempted: back into the queue"
elif [[ -z $stopped && $status =~ ^(75|134|135|137|139)$ ]] &&  # 128 + the signal: ABRT, BUS, KILL, SEGV
  (( $(cat -- "$retries" 2>/dev/null | wc -l) < restarts )); then
  echo "a rank was lost, hung or killed: back into the queue"
  date >> "$retries" || exit "$status"  # what cannot be counted would have no end
else
  exit "$status"
fi
scontrol requeue "$SLURM_JOB_ID" && exit 0
echo "scontrol could not put the job back into the queue: submit it again, and it goes on" >&2
"""
