"""The profile of a cluster, `configs/cluster/NAME.yaml`: how its users ask SLURM for nodes, what a job finds there."""

import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cairn.config.base import Section

WORD = r"^\S+$"
RESERVED = {
    **dict.fromkeys(("job-name", "output", "error", "open-mode", "array", "wrap"), "cairn launch sets it"),
    **dict.fromkeys(("ntasks", "ntasks-per-node", "cpus-per-gpu"), "cairn launch starts one task a node"),
    **dict.fromkeys(("partition", "account", "qos", "constraint", "reservation", "time", "nodes", "mem"), ""),
    **dict.fromkeys(("exclusive", "requeue"), ""),
    "signal": "signal_seconds",
    "no-requeue": "requeue",
    "cpus-per-task": "cpus_per_task",
    **dict.fromkeys(("gpus", "gpus-per-node", "gpus-per-task", "gres"), "gpus_per_node and gpu_request"),
}
"""Options of sbatch that do not belong under `sbatch`: the key that stands for it, "" where it has its own name."""
SECRET = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|PASS|PASSWD|PASSWORD|PASSPHRASE|SECRET|CREDENTIALS?)(_|$)")


class Plain(Section):
    """A section whose values end up in a script: no line break or control character in any."""

    @field_validator("*")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return one_line(value)


class ContainerSection(Plain):
    """The container that a job runs in."""

    runtime: Literal["none", "pyxis", "apptainer"] = "none"
    """What starts it: nothing, srun's pyxis plugin (enroot), or apptainer."""
    image: str = Field("", pattern=r"^\S*$")
    """Image: a file, or what the runtime takes for a name."""
    mounts: list[str] = []
    """Host folders to mount, each `FROM:TO`; the working directory always is."""

    @field_validator("mounts")
    @classmethod
    def _pairs(cls, mounts: list[str]) -> list[str]:
        wrong = [mount for mount in mounts if not re.fullmatch(r"/[^:,\s]*:/[^:,\s]*(:[a-z+]+)?", mount)]
        if wrong:
            raise ValueError(f"expected /FROM:/TO, got {', '.join(map(repr, wrong))}")
        return mounts

    @model_validator(mode="after")
    def _image_fits(self) -> Self:
        if self.runtime != "none" and not self.image:
            raise ValueError(f"runtime {self.runtime} needs an image")
        if self.runtime == "none" and self.image:
            raise ValueError("image is given, but runtime is none: expected runtime pyxis or apptainer")
        return self


class ClusterProfile(Plain):
    """A cluster's habits; every key may be left out, and SLURM's own default then holds."""

    partition: str | None = Field(None, pattern=WORD)
    """Partition, or several with commas."""
    account: str | None = Field(None, pattern=WORD)
    """Account that is charged."""
    qos: str | None = Field(None, pattern=WORD)
    """Quality of service."""
    constraint: str | None = Field(None, pattern=WORD)
    """Features of the nodes."""
    reservation: str | None = Field(None, pattern=WORD)
    """Reservation to run in."""
    time: str | None = None
    """Limit on the time: MINUTES, HOURS:MINUTES:SECONDS, DAYS-HOURS and SLURM's other forms, in quotes."""
    nodes: int = Field(1, ge=1)
    """Nodes of a job."""
    gpus_per_node: int = Field(0, ge=0)
    """GPUs of a node, one process each; 0: a job on CPUs."""
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are asked for; none: a node is given with its GPUs."""
    gpu_type: str | None = Field(None, pattern=r"^[A-Za-z0-9_.-]+$")
    """Kind of GPU, where the cluster wants it named."""
    cpus_per_task: int | None = Field(None, ge=1)
    """Cores of a node's one task, which all its ranks share; SLURM gives 1 where it is empty and nodes are shared."""
    mem: str | None = Field(None, pattern=r"^[0-9]+[KMGT]?$")
    """Memory of a node, such as 64G; "0": all there is."""
    exclusive: bool = False
    """Share nodes with no other job."""
    container: ContainerSection = ContainerSection()
    modules: list[str] = []
    """Environment modules to load."""
    env: dict[str, Any] = {}
    """Environment variables, such as NCCL's."""
    signal_seconds: int = Field(180, ge=30, le=65535)
    """Seconds before the time limit at which the run is told to save and stop."""
    requeue: bool = True
    """Go on in the queue when the time was up, a node failed or the job was preempted."""
    python: str | None = Field(None, pattern=r"^[^-]")
    """Interpreter on the nodes; empty: the one that `cairn launch` runs in, or a container's `python`."""
    sbatch: dict[str, Any] = {}
    """Further options of sbatch, without dashes; true for one that takes no value."""

    @field_validator("time")
    @classmethod
    def _time(cls, time: str | None) -> str | None:
        if time is not None:
            time_limit(time)
        return time

    @field_validator("modules")
    @classmethod
    def _modules(cls, modules: list[str]) -> list[str]:
        wrong = [name for name in modules if not re.fullmatch(r"[\w@%+][\w.@%+/=-]*", name)]
        if wrong:
            raise ValueError(f"expected names such as cuda/12.4, got {', '.join(map(repr, wrong))}")
        return modules

    @field_validator("env")
    @classmethod
    def _env(cls, env: dict[str, Any]) -> dict[str, str]:
        problems = []
        for key, value in env.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", key, re.ASCII):
                problems.append(f"{key!r} is no name of a variable")
            elif is_secret(key):
                problems.append(f"{key} looks like a secret: put it into your environment; sbatch passes it on")
            elif isinstance(value, bool) or not isinstance(value, str | int):
                problems.append(f"{key}: expected text or an integer; put the value in quotes")
        if problems:
            raise ValueError("; ".join(problems))
        return {key: str(value) for key, value in env.items()}

    @field_validator("sbatch")
    @classmethod
    def _sbatch(cls, options: dict[str, Any]) -> dict[str, Any]:
        problems = []
        for key, value in options.items():
            if key in RESERVED:
                own = RESERVED[key]
                problems.append(f"{key}: {own if own.startswith('cairn') else f'set {own or key} of the profile'}")
            elif not re.fullmatch(r"[a-z][a-z0-9-]*", key):
                problems.append(f"{key!r} is no long option of sbatch without its dashes")
            elif value is not True and (isinstance(value, bool) or not isinstance(value, str | int)):
                problems.append(f"{key}: expected text, an integer or true")
        if problems:
            raise ValueError("; ".join(problems))
        return options

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        limit = time_limit(self.time) if self.time is not None else None
        if limit is not None and limit <= self.signal_seconds:
            raise ValueError(f"time {self.time} is not more than signal_seconds {self.signal_seconds}")
        if self.gpu_type is not None and (not self.gpus_per_node or self.gpu_request == "none"):
            raise ValueError("gpu_type is given, but no GPUs are asked for: set gpus_per_node and gpu_request")
        return self


def time_limit(text: str) -> int | None:
    """Seconds of a time limit in one of SLURM's forms; None: without limit. Raises ValueError."""
    if text.lower() in ("infinite", "unlimited"):
        return None
    days, dash, rest = text.rpartition("-")
    units = [3600, 60, 1] if dash else [[60], [60, 1], [3600, 60, 1]][min(rest.count(":"), 2)]
    parts = rest.split(":")
    if not all(re.fullmatch(r"[0-9]{1,6}", part) for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        raise ValueError(f"expected MINUTES, HH:MM:SS, DAYS-HH or DAYS-HH:MM:SS in quotes, got {text!r}")
    seconds = int(days or 0) * 86400 + sum(int(part) * unit for part, unit in zip(parts, units, strict=False))
    if not seconds:
        raise ValueError("expected a time above 0")
    return seconds


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds what no file and no command line should."""
    return SECRET.search(name.upper()) is not None


def one_line(value: Any) -> Any:
    """The value of a key. Raises ValueError where a text in it has a control character: scripts are made of lines."""
    texts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
    for text in texts:
        if isinstance(text, str) and re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", text):
            raise ValueError(f"{text!r} has a line break or another control character")
    return value
