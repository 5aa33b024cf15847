"""Every key of a schema: type, default and doc; in colour on a terminal, plain elsewhere."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cairn.config.base import Section
from cairn.config.fields import doc, expected, name_of, nested, sections


@dataclass(frozen=True)
class Entry:
    """A key, or a heading when `kind` is empty."""

    key: str
    kind: str
    default: str
    doc: str


def entries(schema: type[Section]) -> Iterator[Entry]:
    """The schema's keys in order, each section under a heading; a choice has one heading for each of its names."""
    yield Entry("top level", "", "", "")
    for key, info in schema.model_fields.items():
        if not sections(info):
            yield _entry(schema, key, info, "")
    for key, info in schema.model_fields.items():
        if kinds := sections(info):
            yield from _choice(key, kinds, info)


def print_help(schema: type[Section], usage: str) -> None:
    """Print the usage and all keys."""
    if not sys.stdout.isatty():
        print(usage.rstrip())
        for e in entries(schema):
            if e.kind:
                print(f"  {e.key} = {e.default}   ({e.kind})" + (f"\n      {e.doc}" if e.doc else ""))
            else:
                print(f"\n{e.key}" + (f": {e.doc}" if e.doc else ""))
        return
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(usage.rstrip()))
    for e in entries(schema):
        if e.kind:
            console.print(
                Text.assemble("  ", (e.key, "bold cyan"), " = ", (e.default, "green"), (f"   {e.kind}", "dim"))
            )
            if e.doc:
                console.print(Padding(Text(e.doc), (0, 0, 0, 6)))
        else:
            console.print(Text.assemble("\n", (e.key, "bold"), f": {e.doc}" if e.doc else ""))


def _choice(key: str, kinds: list[type[Section]], info: FieldInfo) -> Iterator[Entry]:
    first: dict[str, Entry] = {}
    chosen = name_of(type(info.default)) if len(kinds) > 1 and isinstance(info.default, Section) else ""
    for kind in sorted(kinds, key=lambda k: len(kinds) > 1 and name_of(k) != chosen):
        mine = {k: _entry(kind, k, f, f"{key}.") for k, f in kind.model_fields.items()}
        about = " ".join((kind.__doc__ or "").split())
        heading = key
        if len(kinds) > 1:
            name = name_of(kind)
            del mine["name"]
            heading = f"{key}.name={name}" + (" (default)" if name == chosen else "")
            if first and first.keys() <= mine.keys():
                mine = {k: e for k, e in mine.items() if first.get(k) != e}
                about += f" As {chosen}, but:" if mine else f" As {chosen}."
        first = first or mine
        yield Entry(heading, "", "", about)
        for k, e in mine.items():
            yield e
            for item in [] if sections(kind.model_fields[k]) else nested(kind.model_fields[k].annotation):
                for sub, field in item.model_fields.items():
                    yield _entry(item, sub, field, f"{key}.{k}[].")


def _entry(kind: type[Section], key: str, info: FieldInfo, prefix: str) -> Entry:
    return Entry(prefix + key, expected(info), _default(info), doc(kind, key))


def _default(info: FieldInfo) -> str:
    value: Any = info.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "REQUIRED"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    return "" if value is None else str(value)
