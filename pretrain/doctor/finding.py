"""What a check says, and running checks so that none hides another."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from cairn.errors import UserError

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line: what was found, and the remedy where that is not well."""

    level: Level
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return " ".join(f"{self.found}; {self.remedy}".split() if self.remedy else self.found.split())


def ok(found: str) -> Finding:
    """All is well, or there is nothing to check."""
    return Finding("ok", found)


def warning(found: str, remedy: str) -> Finding:
    """A run would start, and may come to grief or be slow."""
    return Finding("warning", found, remedy)


def error(found: str, remedy: str) -> Finding:
    """A run would fail."""
    return Finding("error", found, remedy)


Check = tuple[str, Callable[[], Finding]]
"""What is checked, in a word or two, and how."""


def examine(checks: Iterable[Check]) -> Iterator[tuple[str, Finding]]:
    """The finding of each check under its name, as it is made."""
    for name, check in checks:
        try:
            finding = check()
        except UserError as failure:
            finding = Finding("error", str(failure))
        except Exception as failure:  # noqa: BLE001  whatever a broken machine raises is what is looked for here
            text = str(failure).strip().partition("\n")[0]
            finding = Finding("error", f"{type(failure).__name__}: {text or 'no message'} (the check itself failed)")
        yield name, finding


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
