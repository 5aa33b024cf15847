"""What the schema says of a key: the sections it may hold, its type in words, its doc."""

from collections.abc import Iterable, Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from cairn.config.base import Section

_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", NoneType: "empty"}


def nested(annotation: Any) -> list[type[Section]]:
    """Section classes anywhere in a type."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for arg in get_args(annotation) for found in nested(arg)]


def sections(info: FieldInfo) -> list[type[Section]]:
    """Section classes the key itself may hold: none for a plain value, several for a choice by `name`."""
    return [arm for arm in _arms(info.annotation) if isinstance(arm, type) and issubclass(arm, Section)]


def optional(info: FieldInfo | None) -> bool:
    """Whether the key may be empty."""
    return info is not None and NoneType in _arms(info.annotation)


def field_of(kinds: Sequence[type[Section]], key: str) -> FieldInfo | None:
    """The field of that name in the first of the kinds that has it."""
    return next((kind.model_fields[key] for kind in kinds if key in kind.model_fields), None)


def name_of(kind: type[Section]) -> str:
    """What `name` a kind of section of a choice goes by."""
    return str(get_args(kind.model_fields["name"].annotation)[0])


def expected(info: FieldInfo) -> str:
    """The type in words: `an integer >= 1 or empty`."""
    kinds = sections(info)
    if len(kinds) == 1:
        return "a section with keys below it"
    if kinds:
        return "one of " + ", ".join(name_of(kind) for kind in kinds)
    limits = _limits(info)
    pattern = [f"matching {m.pattern}" for m in info.metadata if getattr(m, "pattern", None)]
    words = _words(info.annotation)
    first, *rest = words.split(" or ") if limits and words.endswith(" or empty") else [words]
    return " or ".join([" ".join([first, limits, *pattern]).rstrip().replace("  ", " "), *rest])


def doc(kind: type[Section], key: str) -> str:
    """The key's docstring, in one line; a key given another default by a subclass keeps its base's."""
    for base in kind.__mro__:
        if issubclass(base, Section) and key in base.model_fields and base.model_fields[key].description:
            return " ".join(str(base.model_fields[key].description).split())
    if key == "name":
        return "Which of the choices this is."
    below = sections(kind.model_fields[key])
    return " ".join((below[0].__doc__ or "").split()) if len(below) == 1 else ""


def dotted(kinds: Iterable[type[Section]], prefix: str = "") -> Iterator[str]:
    """Every key there is, in every choice."""
    for kind in kinds:
        for key, info in kind.model_fields.items():
            yield prefix + key
            yield from dotted(sections(info), f"{prefix}{key}.")


def _arms(annotation: Any) -> list[Any]:
    """The types of a union, however it is written."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _arms(args[0])
    return [arm for arg in args for arm in _arms(arg)] if origin in (Union, UnionType) else [annotation]


def _words(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in _WORDS:
        return _WORDS[annotation]
    if origin is Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if origin is tuple:
        return f"a list of {len(args)} numbers {_limits(get_args(args[0])[1])}"
    if origin is list:
        return "a list of sections" if nested(annotation) else "a list"
    if origin is dict:
        return "keys and values"
    return " or ".join(_words(arg) for arg in args) if args else str(annotation)


def _limits(info: FieldInfo) -> str:
    signs = ((Gt, ">", "gt"), (Ge, ">=", "ge"), (Lt, "<", "lt"), (Le, "<=", "le"))
    return " and ".join(
        f"{sign} {_short(getattr(m, key))}" for m in info.metadata for cls, sign, key in signs if isinstance(m, cls)
    )


def _short(limit: Any) -> str:
    power = limit.bit_length() - 1 if isinstance(limit, int) and limit > 0 else 0
    return f"2**{power}" if power > 16 and limit == 2**power else str(limit)
