"""Pydantic's findings as plain lines: where it was written, which key, what was expected, what it got."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from cairn.config.base import Section
from cairn.config.fields import dotted, expected, name_of, nested, sections


def explain(error: ValidationError, schema: type[Section], origins: Mapping[str, str], default: str) -> list[str]:
    """One line per mistake.

    origins: dotted key -> where it was written. default: the file to name for a key that nobody wrote.
    """
    found: dict[str, str] = {}  # by key: the arms of a union report one mistake several times
    for item in error.errors():
        path, info, owner = _locate(schema, item["loc"], item["type"] == "extra_forbidden")
        kind, message = item["type"], ""
        if kind == "extra_forbidden":
            message = "unknown key" + _did_you_mean(path, schema, owner, item["loc"])
        elif kind == "missing":
            message = f"missing; expected {expected(info)}" if info else "missing"
        elif kind == "value_error":
            message = str(item["ctx"]["error"])
        elif kind in ("union_tag_invalid", "union_tag_not_found") and info is not None:
            given = item["input"].get("name") if isinstance(item["input"], dict) else None
            path += ".name"
            message = _mismatch(info, given)
        elif info is not None:
            message = _mismatch(info, item["input"])
        else:
            message = f"{item['msg']}; got {_got(item['input'])}"
        found[path] = message
    # `str | list[Section]`: where an element of the list is wrong, that the list is no text is noise.
    noise = {path for path in found if any(other.startswith(f"{path}[") for other in found)}
    return [
        f"{_origin(path, message, origins, default)}: {f'{path}: ' if path else ''}{message}"
        for path, message in found.items()
        if path not in noise
    ]


def close(word: str, words: Sequence[str]) -> str:
    """`; did you mean X?`, or nothing."""
    match = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {match[0]}?" if match else ""


def _locate(
    schema: type[Section], loc: Sequence[int | str], unknown: bool
) -> tuple[str, FieldInfo | None, type[Section] | None]:
    """Pydantic's location without its names of union arms: the dotted key, its field, the section it is in."""
    path, info = "", None
    owner: type[Section] | None = schema
    inside = owner
    options: list[type[Section]] = []
    for depth, item in enumerate(loc):
        tagged = [option for option in options if len(options) > 1 and name_of(option) == item]
        if owner is not None and item in owner.model_fields:
            info, inside = owner.model_fields[str(item)], owner
            path = f"{path}.{item}" if path else str(item)
            options = nested(info.annotation)
            owner = options[0] if len(options) == 1 else None
        elif tagged:
            owner = inside = tagged[0]
        elif isinstance(item, int):
            path += f"[{item}]"
        elif unknown and depth == len(loc) - 1:
            path, info, inside = (f"{path}.{item}" if path else item), None, owner
    return path, info, inside


def _mismatch(info: FieldInfo, got: Any) -> str:
    hint = ""
    words = [str(arg) for arg in getattr(info.annotation, "__args__", ())]
    if isinstance(got, str):
        kinds = [name_of(kind) for kind in sections(info)]
        hint = f"; write {{name: {got}}}" if got in kinds else close(got, kinds or words)
    elif isinstance(got, float) and info.annotation in (int, int | None) and got.is_integer():
        hint = f"; write {int(got)}"
    elif info.annotation in (str, str | None) and isinstance(got, int | float | bool):
        hint = "; put it in quotes (on the command line: '\"...\"')"
    return f"expected {expected(info)}, got {_got(got)}{hint}"


def _got(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, float):
        return f"the fractional number {value!r}" if value.is_integer() else repr(value)
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _did_you_mean(path: str, schema: type[Section], owner: type[Section] | None, loc: Sequence[int | str]) -> str:
    section, _, last = path.rpartition(".")
    if owner is not None:
        match = difflib.get_close_matches(last, owner.model_fields, n=1)
        if match:
            return f"; did you mean {section + '.' if section else ''}{match[0]}?"
        if "name" in owner.model_fields and section:
            _, info, _ = _locate(schema, section.split("."), False)
            others = [k for k in sections(info) if last in k.model_fields] if info else []
            if others:
                return f" of {section}.name {name_of(owner)}; {', '.join(map(name_of, others))} has it"
    # Written in another section, or in none.
    everywhere = list(dict.fromkeys(dotted([schema])))
    by_last = {key.rpartition(".")[2]: key for key in reversed(everywhere)}
    match = difflib.get_close_matches(last, by_last, n=1, cutoff=0.8)
    return f"; did you mean {by_last[match[0]]}?" if match else ""


def _origin(path: str, message: str, origins: Mapping[str, str], default: str) -> str:
    """Where the key was written; for a section as a whole, where the keys that the message names were."""
    written = {key: origin for key, origin in origins.items() if origin != "default"}
    key = path.partition("[")[0]
    inside = [k for k in written if k.startswith(f"{key}.")]
    while key and key not in written and not inside:
        key = key.rpartition(".")[0]
        inside = [k for k in written if k.startswith(f"{key}.")]
    if key in written:
        return written[key]
    inside = inside if key else list(written)
    named = [k for k in inside if k in message]
    named = named or [k for k in inside if re.search(rf"\b{re.escape(k.rpartition('.')[2])}\b", message)]
    places = list(dict.fromkeys(written[k] for k in named or inside))
    return ", ".join(places) if 0 < len(places) < 4 else default
