"""YAML files and overrides as trees whose every leaf knows where it was written."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from cairn.config.base import Section
from cairn.config.fields import field_of, optional, sections
from cairn.errors import UserError

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Value:
    """A leaf: what was written and where (`file:line` or `command line`)."""

    value: Any
    origin: str


Tree: TypeAlias = dict[str, "Tree | Value"]

# YAML 1.2's scalars, and 6e-4: YAML 1.1 reads `6e-4` as text, `off` as false, `1:30` as 90 and `010` as 8.
_SCALARS = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)|[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
]


class Loader(yaml.SafeLoader):
    """Reads scalars as above."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


class Dumper(yaml.SafeDumper):
    """Writes what Loader reads."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, _regex, _first in _SCALARS:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_regex})\Z"), _first)


def read_chain(path: Path, problems: list[str]) -> list[Tree]:
    """The file's tree, after those it extends. Appends what is wrong to `problems`; raises UserError for a file
    that cannot be read at all."""
    chain: list[Tree] = []
    seen: list[Path] = []
    file: Path | None = path
    while file is not None:
        if file.resolve() in seen:
            cycle = " -> ".join(shown(p) for p in [*seen, file.resolve()])
            raise UserError(f"{shown(path)}: extends goes round in a circle: {cycle}")
        seen.append(file.resolve())
        tree = _read(file, problems)
        base = tree.pop("extends", None)
        chain.insert(0, tree)
        if base is None:
            break
        if not isinstance(base, Value) or not isinstance(base.value, str):
            problems.append(f"{shown(file)}: extends: expected the path of one YAML file")
            break
        file = file.parent / base.value
        if not file.is_file():
            raise UserError(f"{base.origin}: extends: {missing(file)}")
    return chain


def parse_overrides(overrides: Sequence[str], problems: list[str]) -> Tree:
    """One tree of all `section.key=value`; a later one wins."""
    layer: Tree = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[^.\s]+(\.[^.\s]+)*", key):
            problems.append(f"{COMMAND_LINE}: {text!r}: expected section.key=value")
            continue
        if key == "extends":
            problems.append(f"{COMMAND_LINE}: extends: belongs in a YAML file")
            continue
        tree = _parse_value(key, value, problems)
        if tree is None:
            continue
        for part in reversed(key.split(".")):
            tree = {part: tree}
        assert isinstance(tree, dict)
        layer = merge(layer, tree, [])
    return layer


def merge(base: Tree, over: Tree, kinds: Sequence[type[Section]]) -> Tree:
    """`over` on top of `base`. A choice among several `kinds` of section whose name changes replaces the whole."""
    if len(kinds) > 1 and _name(over) is not None and _name(base) is not None and _name(over) != _name(base):
        return over
    merged = dict(base)
    for key, new in over.items():
        old = merged.get(key)
        info = field_of(kinds, key)
        below = sections(info) if info else []
        if isinstance(old, dict) and isinstance(new, dict):
            merged[key] = merge(old, new, below)
        elif isinstance(old, dict) and isinstance(new, Value) and new.value is None and below and not optional(info):
            continue  # a heading with nothing under it
        else:
            merged[key] = new
    return merged


def plain(tree: Tree | Value) -> Any:
    """The values alone."""
    return tree.value if isinstance(tree, Value) else {key: plain(sub) for key, sub in tree.items()}


def origins(tree: Tree | Value, prefix: str = "") -> dict[str, str]:
    """Dotted key of each leaf -> its origin."""
    if isinstance(tree, Value):
        return {prefix: tree.origin}
    found: dict[str, str] = {}
    for key, sub in tree.items():
        found |= origins(sub, f"{prefix}.{key}" if prefix else key)
    return found


def shown(path: Path) -> str:
    """A path as the user would write it here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def missing(path: Path) -> str:
    """Says that a file is not there, and which are."""
    import difflib

    here = path.parent
    while not here.is_dir():
        here = here.parent
    near = sorted(here.glob("*.yaml")) or sorted(here.glob("*/*.yaml")) or sorted(here.glob("configs/*/*.yaml"))
    names = {p.stem: shown(p) for p in near}
    close = difflib.get_close_matches(path.stem, names, n=1)
    hint = f"did you mean {names[close[0]]}? " if close else ""
    listing = f"there is {', '.join(shown(p) for p in near)}" if near else f"{shown(here)} has no .yaml file"
    return f"{shown(path)}: no such file; {hint}{'(' + listing + ')' if hint else listing}"


def _read(path: Path, problems: list[str]) -> Tree:
    try:
        root = yaml.compose(path.read_text("utf-8"), Loader)
        tree = _tree(root, path, problems, "") if root is not None else {}
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{shown(path)}{line}: not YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{shown(path)}: not YAML: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise UserError(f"{shown(path)}: {error.strerror}") from error
    if isinstance(tree, Value):
        raise UserError(f"{shown(path)}: expected `section:` headings with keys below them")
    return tree


def _parse_value(key: str, text: str, problems: list[str]) -> Tree | Value | None:
    try:
        node = yaml.compose(text, Loader)
        return Value(None, COMMAND_LINE) if node is None else _tree(node, None, problems, key)
    except yaml.YAMLError as error:
        if text[0] not in "[{\"'":
            return Value(text, COMMAND_LINE)  # such as *.txt, which YAML takes for an alias
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
        problems.append(f"{COMMAND_LINE}: {key}: {text!r} is not YAML: {problem}")
        return None


def _tree(node: yaml.Node, file: Path | None, problems: list[str], prefix: str) -> Tree | Value:
    origin = f"{shown(file)}:{node.start_mark.line + 1}" if file else COMMAND_LINE
    if isinstance(node, yaml.SequenceNode):
        return Value([plain(_tree(item, file, problems, prefix)) for item in node.value], origin)
    if not isinstance(node, yaml.MappingNode):
        return Value(_scalar(node), origin)
    tree: Tree = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        where = f"{shown(file)}:{line}" if file else COMMAND_LINE
        key = _scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            problems.append(f"{where}: {prefix or 'top level'}: expected a key, got {key_node.value!r}")
            continue
        path = f"{prefix}.{key}" if prefix else key
        if key in tree:
            problems.append(f"{where}: {path}: given twice; first on line {lines[key]}")
        lines[key] = line
        tree[key] = _tree(value_node, file, problems, path)
    return tree


def _scalar(node: yaml.Node) -> Any:
    loader = Loader("")
    try:
        return loader.construct_object(node)
    finally:
        loader.dispose()


def _name(tree: Tree) -> Any:
    name = tree.get("name")
    return name.value if isinstance(name, Value) else None
