"""The `cairn` command: checks the config at once, without loading torch, then becomes `python -m MODULE ...`."""

import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cairn import __version__
from cairn.cluster import Cluster
from cairn.config.base import Section
from cairn.config.errors import close
from cairn.config.help import print_help
from cairn.config.load import Resolved, dump, load, resolve
from cairn.config.main import run_main
from cairn.config.schema import FinetuneConfig, GANConfig, PretrainConfig, VisionConfig
from cairn.errors import UserError
from launch.job import ALLOCATOR


@dataclass(frozen=True)
class Verb:
    """One verb: the module that does it, the schema of its CONFIG (None: it takes none), its usage and help."""

    module: str
    schema: type[Section] | None
    usage: str
    help: str
    processes: Literal["", "one", "many"] = ""
    """How many of it `cairn launch` starts; "": it is not for it."""


CONFIG = "CONFIG [section.key=value ...]"
VERBS = {
    "pretrain": Verb("pretrain", PretrainConfig, CONFIG, "train a language model from scratch", "many"),
    "prepare": Verb("pretrain.prepare", PretrainConfig, CONFIG, "tokenize the corpus and stop", "one"),
    "finetune": Verb(
        "finetune", FinetuneConfig, f"{CONFIG} [--seeds 1,2,3]", "train a model on a task of your own", "many"
    ),
    "predict": Verb("finetune.predict", None, "RUN FILE", "write a fine-tuned model's predictions beside the inputs"),
    "generate": Verb("cairn.decode", None, "RUN --prompt TEXT [options]", "write text with a trained model"),
    "eval": Verb("cairn.evaluate", None, "RUN --tasks FILE,... [options]", "score a trained model on tasks"),
    "attention": Verb("cairn.look.attention", None, "RUN --text TEXT [options]", "draw which token looks at which"),
    "probe": Verb(
        "cairn.look.probe", None, "RUN FILE --text COLUMN --label COLUMN", "tell classes apart by frozen features"
    ),
    "report": Verb("cairn.train.report", None, "RUN ...", "one HTML page of curves, config and throughput"),
    "verify-resume": Verb(
        "pretrain.verify_resume", PretrainConfig, f"{CONFIG} [options]", "prove that kill and resume change nothing"
    ),
    "export": Verb("cairn.hub", None, "RUN DIR", "write a run as a `transformers` folder"),
    "import": Verb("cairn.hub", None, "DIR RUN", "make a run of a `transformers` folder"),
    "plan": Verb("cairn.plan", PretrainConfig, f"{CONFIG} [options]", "memory, speed, time and cost before a run"),
    "doctor": Verb("pretrain.doctor", None, "[CONFIG ...]", "check the machine, and a config on it"),
    "batch": Verb("pretrain.batch", None, "RUN STEP", "the documents that a step was trained on"),
    "vision": Verb("recipes.vision", VisionConfig, CONFIG, "train an image classifier", "many"),
    "gan": Verb("recipes.gan", GANConfig, CONFIG, "train a generative adversarial network", "many"),
}
TOLD_THE_VERB = ("export", "import")  # cairn.hub does both
SCHEMAS = tuple(dict.fromkeys(verb.schema for verb in VERBS.values() if verb.schema is not None))


def main() -> None:
    """The `cairn` command."""
    run_main(lambda: cairn(sys.argv[1:]))


def cairn(argv: Sequence[str]) -> int:
    """Dispatch one command line. Raises UserError."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0
    if argv[0] == "--version":
        print(f"cairn {__version__}")
        return 0
    name, rest = argv[0], list(argv[1:])
    if name == "config":
        return show_config(rest)
    if name == "launch":
        from launch.launch import launch

        return launch(rest, VERBS)
    if name not in VERBS:
        raise UserError(f"{name}: unknown verb{close(name, [*VERBS, 'launch', 'config']) or '; see cairn --help'}")
    verb = VERBS[name]
    if verb.schema is not None:
        usage = f"usage: cairn {name} {verb.usage}\n\n{verb.help}"
        wants_help = not rest or "-h" in rest or "--help" in rest
        if wants_help and "options" not in verb.usage:
            print_help(verb.schema, usage)
            return 0
        if not wants_help and Cluster.from_env().is_main:
            config, overrides = split(rest)
            load(verb.schema, config, overrides)
    start(verb.module, [name, *rest] if name in TOLD_THE_VERB else rest)
    return 0


def split(args: Sequence[str]) -> tuple[Path, list[str]]:
    """CONFIG and the overrides; what begins with a dash, and a bare word after CONFIG, is an option's."""
    words = [arg for arg in args if not arg.startswith("-")]
    if not words:
        raise UserError("CONFIG is missing: give a YAML file or a run folder")
    return Path(words[0]), [word for word in words[1:] if "=" in word]


def start(module: str, args: Sequence[str]) -> None:
    """Become `python -m module args`, in an environment with the allocator set."""
    if ALLOCATOR.keys() <= os.environ.keys() or sys.platform != "linux":
        sys.argv = [module, *args]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", module, *args], ALLOCATOR | dict(os.environ))


def show_config(args: Sequence[str]) -> int:
    """Print every value of a config and where it came from."""
    if not args or "-h" in args or "--help" in args:
        print(f"usage: cairn config {CONFIG}\n\nPrint every value, and the file and line or default it came from.")
        return 0
    path, overrides = split(args)
    overrides = overrides + [word for word in args[1:] if "=" not in word]  # told as an error
    failures: list[UserError] = []
    for schema in SCHEMAS:
        try:
            found: Resolved[Section] = resolve(schema, path, overrides)
        except UserError as error:
            failures.append(error)
        else:
            print(dump(found.config, found.origins), end="")
            return 0
    raise min(failures, key=lambda error: len(str(error).splitlines()))  # the schema that it fits best


def overview() -> str:
    """The text of `cairn --help`."""
    rows = [(f"cairn {name} {verb.usage}", verb.help) for name, verb in VERBS.items()]
    rows.append(("cairn launch [where] VERB CONFIG ...", "start it on many GPUs or machines, or as a SLURM job"))
    rows.append((f"cairn config {CONFIG}", "print every value and where it came from"))
    width = max(len(left) for left, _ in rows)
    lines = [f"  {left:{width}}  {right}" for left, right in rows]
    return "\n".join(
        [
            "cairn pretrains language models with DeepSpeed, on one CPU or many GPU nodes.",
            "",
            *lines,
            "",
            "CONFIG is a YAML file such as configs/pretrain/gpt-tiny.yaml, or the folder of a run.",
            "`cairn VERB --help` lists every key. On several processes: `cairn launch`, torchrun or srun.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
