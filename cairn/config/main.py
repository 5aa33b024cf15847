"""What every `python -m X CONFIG [section.key=value ...]` begins with, and how its errors are told."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from cairn.cluster import Cluster
from cairn.config.base import Section
from cairn.config.help import print_help
from cairn.config.load import load
from cairn.errors import QuietError, UserError, exit_status

T = TypeVar("T", bound=Section)


class Parser(argparse.ArgumentParser):
    """Raises UserError for bad arguments."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def run_main(fn: Callable[[], int | None]) -> NoReturn:
    """Run `fn` and exit: with its status, 2 after printing a UserError (75: a TryAgain), 130 after Ctrl-C."""
    try:
        status = fn() or 0
    except QuietError as error:
        # Rank 0 says it. Launchers kill all ranks once one has gone: leave it the time to.
        time.sleep(2)
        sys.exit(exit_status(error))
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(exit_status(error))
    except KeyboardInterrupt as error:
        sys.exit(exit_status(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has gone: nothing to flush to
        sys.exit(0)
    sys.exit(status)


def read_args(schema: type[T], argv: Sequence[str], prog: str = "") -> T:
    """The config that `CONFIG [section.key=value ...]` gives; `--help` prints every key and exits.

    Raises UserError on rank 0, QuietError on the others.
    """
    spec = sys.modules["__main__"].__spec__
    module = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
    return read_options(schema, argv, Parser(prog=prog or f"python -m {module}"))[0]


def read_options(schema: type[T], argv: Sequence[str], parser: argparse.ArgumentParser) -> tuple[T, argparse.Namespace]:
    """As read_args, with the options that `parser` has already been given beside CONFIG and the overrides."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file, or a run folder")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="overrides a key of CONFIG")
    main = Cluster.from_env().is_main
    if "-h" in argv or "--help" in argv:
        if main:
            print_help(schema, parser.format_help())
        sys.exit(0)
    try:
        args = parser.parse_intermixed_args(argv)
        return load(schema, args.config, args.overrides), args
    except UserError as error:
        if main:
            raise
        raise QuietError(str(error)) from error
