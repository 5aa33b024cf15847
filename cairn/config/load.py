"""From a YAML file, what it `extends` and dotted overrides to a typed config, with every mistake told at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import ValidationError

from cairn.config.base import Section
from cairn.config.errors import explain
from cairn.config.tree import Dumper, Tree, Value, merge, missing, origins, parse_overrides, plain, read_chain, shown
from cairn.errors import UserError

T = TypeVar("T", bound=Section)
FOREIGN = {"extra_forbidden", "missing", "union_tag_invalid"}
"""What pydantic finds in a config of another kind of run."""


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """A config, and where each of its values came from."""

    config: T
    origins: Mapping[str, str]
    """Dotted key -> `file:line`, `command line` or `default`."""


def load(schema: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """The config that `path` (a YAML file, or a run folder with its config.yaml) and `section.key=value` give.

    Raises UserError with one line per mistake.
    """
    return resolve(schema, path, overrides).config


def resolve(schema: type[T], path: Path, overrides: Sequence[str] = ()) -> Resolved[T]:
    """As load, with the origin of each value. The order: defaults, the extended files, the file, overrides."""
    file = path / "config.yaml" if path.is_dir() else path
    if not file.is_file():
        raise UserError(missing(file))
    problems: list[str] = []
    layers = [*read_chain(file, problems), parse_overrides(overrides, problems)]
    tree = _merged(schema, layers)
    written = origins(tree)
    try:
        config = schema.model_validate(plain(tree))
    except ValidationError as error:
        strange = FOREIGN & {found["type"] for found in error.errors()}
        if strange and not problems and (other := _fitting(schema, layers)):
            wanted = f"`cairn {schema.verb}`"  # type: ignore[attr-defined]
            raise UserError(f"{shown(file)} is a config of `cairn {other}`; one of {wanted} is wanted here") from error
        problems += explain(error, schema, written, shown(file))
    if problems:
        raise UserError("\n".join(problems))
    return Resolved(config, {key: written.get(key, "default") for key in _leaves(config.model_dump())})


def _merged(schema: type[Section], layers: Sequence[Tree]) -> Tree:
    tree = _defaults(schema)
    for layer in layers:
        tree = merge(tree, layer, [schema])
    return tree


def _fitting(schema: type[Section], layers: Sequence[Tree]) -> str | None:
    """The verb of another kind of run whose config this is."""
    kin: list[Any] = schema.__bases__[0].__subclasses__() if getattr(schema, "verb", "") else []
    for other in kin:
        try:
            other.model_validate(plain(_merged(other, layers)))
        except ValidationError:
            continue
        return str(other.verb)
    return None


def has_section(path: Path, name: str) -> bool:
    """Whether a YAML file, or one that it extends, has a top-level key of that name. Raises UserError as load does."""
    return any(name in tree for tree in read_chain(path, []))


def dump(config: Section, origins: Mapping[str, str] | None = None) -> str:
    """The config as YAML that `load` reads back to an equal one; with `origins`, as a comment after each value."""
    lines = list(_lines(config.model_dump(mode="json"), ""))
    if origins is None:
        return "".join(f"{text}\n" for text, _ in lines)
    width = min(48, max(len(text) for text, _ in lines))
    return "".join(f"{text:{width}}  # {origins[key]}\n" if key in origins else f"{text}\n" for text, key in lines)


def _defaults(schema: type[Section]) -> Tree:
    """The schema's defaults as the lowest layer, so that a choice given without its name keeps the default one."""
    tree: Tree = {}
    for key, info in schema.model_fields.items():
        if not info.is_required():
            tree[key] = _default_tree(info.get_default(call_default_factory=True))
    return tree


def _default_tree(value: Any) -> "Tree | Value":
    if isinstance(value, Section):
        return {key: _default_tree(getattr(value, key)) for key in type(value).model_fields}
    if isinstance(value, dict):
        return {key: _default_tree(sub) for key, sub in value.items()}
    return Value(value, "default")


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in values.items():
        keys += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [prefix + key]
    return keys


def _lines(values: Mapping[str, Any], prefix: str) -> "list[tuple[str, str]]":
    """Each line of the YAML and the dotted key it gives."""
    lines: list[tuple[str, str]] = []
    indent = "  " * prefix.count(".")
    if "name" in values:
        values = {"name": values["name"], **values}  # what a section is comes first
    for key, value in values.items():
        head = f"{indent}{_inline(key)}:"
        if isinstance(value, dict) and value:
            lines += [(head, ""), *_lines(value, f"{prefix}{key}.")]
        else:
            lines.append((f"{head} {_inline(value)}", prefix + key))
    return lines


def _inline(value: Any) -> str:
    text: str = yaml.dump(value, Dumper=Dumper, default_flow_style=True, sort_keys=False, width=1 << 20)
    return text.removesuffix("\n").removesuffix("\n...")
