"""`python -m pretrain.doctor [CONFIG] [section.key=value ...]`: check the machine, and a config on it.

One line a check: ok, warning or error, what was found, and the remedy. The exit status is 1 when there is an error.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cairn.cluster import Cluster
from cairn.config.load import load
from cairn.config.main import Parser, run_main
from cairn.config.schema import PretrainConfig
from cairn.errors import UserError
from pretrain.doctor.finding import Finding, Level, examine

STYLES: dict[Level, str] = {"ok": "green", "warning": "yellow", "error": "bold red"}


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="cairn doctor", description="Check this machine, and with CONFIG that config on it.")
    p.add_argument("config", metavar="CONFIG", nargs="?", type=Path, help="YAML file, or a run folder")
    p.add_argument("overrides", metavar="section.key=value", nargs="*", help="overrides a key of CONFIG")
    p.add_argument("--world", type=int, default=1, metavar="N", help="ranks the run will have (default 1)")
    p.add_argument("--quick", action="store_true", help="read no shard, so that no checksum is checked")
    return p


def main() -> int:
    """Print a line a check, and how many there were of each kind."""
    args = parser().parse_intermixed_args()
    if args.world < 1:
        raise UserError(f"--world {args.world}: expected at least 1")
    config = load(PretrainConfig, args.config, args.overrides) if args.config else None
    console, counts = Console(), Counter[Level]()
    for name, finding in findings(config, args.world, args.quick):
        counts[finding.level] += 1
        line = Text.assemble((f"{finding.level:8}", STYLES[finding.level]), f"{name:14} {finding}")
        console.print(line, soft_wrap=True, highlight=False)
    console.print(", ".join(f"{counts[level]} {level}" for level in STYLES), highlight=False)
    return int(counts["error"] > 0)


def findings(config: PretrainConfig | None, world_size: int, quick: bool) -> Iterator[tuple[str, Finding]]:
    """Of the machine, then of the config."""
    from cairn.train.opening import settled_config
    from pretrain.doctor import machine

    config = config and settled_config(config, Cluster())
    yield from examine(machine.checks(config or PretrainConfig()))
    if config is not None:
        from pretrain.doctor import estimate, run

        yield from examine([*run.checks(config, world_size, quick), *estimate.checks(config, world_size)])


if __name__ == "__main__":
    run_main(main)
