"""What is wrong with a request, in words: which element, what it is, what is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

MOST: Final = 500  # characters of a message


class Doubled:
    """Stands for the values of a name that occurs twice in one object; no schema takes it."""


_KINDS: Final[Mapping[type, str]] = {
    str: "a text", dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number",
    type(None): "null", Doubled: "the name occurs twice",
}  # fmt: skip
_WANTED: Final = {
    "string_type": "a text", "list_type": "a list", "dict_type": "an object", "model_type": "an object",
    "model_attributes_type": "an object", "int_type": "a whole number", "int_from_float": "a whole number",
    "float_type": "a number", "bool_type": "true or false",
}  # fmt: skip
SAID: Final = {
    "missing": "it is missing",
    "extra_forbidden": "there is no such field; leave it out",
    "string_too_short": "it is empty",
    "string_pattern_mismatch": "it holds a zero character; remove it",
    "string_unicode": "it holds half of a surrogate pair; send whole characters",
}


def fault_of(errors: Sequence[Mapping[str, Any]], skipped: int = 0) -> tuple[str, str]:
    """Location and reason of the first of pydantic's errors; `skipped` parts of its location are not the caller's."""
    if not errors:
        return "", "it cannot be read"
    return location_of(errors[0]["loc"][skipped:]), plain(_reason(errors[0]))[:MOST]


def location_of(parts: Sequence[str | int]) -> str:
    """A location in JSON: `input[3].text`. Branches of a union (`<text>`) are left out."""
    named = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts if not str(part).startswith("<")]
    return plain("".join(named).removeprefix("."))[:200]


def plain(text: str) -> str:
    """The text with halves of surrogate pairs spelt out, so that it can be sent."""
    return text.encode("utf-8", "backslashreplace").decode()


def location_of_half(value: object, path: tuple[str | int, ...] = ()) -> str | None:
    """Where a value of JSON holds half of a surrogate pair; None where it does not."""
    if isinstance(value, str):
        return None if plain(value) == value else location_of(path) or "the text"
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in pairs:
        inner = (*path, name)
        half = (location_of_half(name, inner) if isinstance(name, str) else None) or location_of_half(part, inner)
        if half is not None:
            return half
    return None


def kind_in_json(value: object) -> str:
    """What a value of JSON is, in words."""
    return _KINDS.get(type(value), type(value).__name__)


def _reason(error: Mapping[str, Any]) -> str:
    kind, value, about = error["type"], error.get("input"), error.get("ctx", {})
    if kind in SAID:
        return SAID[kind]
    if kind in _WANTED:
        return f"{kind_in_json(value)}, where {_WANTED[kind]} is wanted"
    if kind == "kind":
        named = f" of type {str(value['type'])[:40]!r}" if isinstance(value, dict) and "type" in value else ""
        return f"{kind_in_json(value)}{named}, where {error['msg']}"
    if kind in ("too_long", "too_short", "string_too_long") and isinstance(value, str | list | dict):
        counted = "characters" if isinstance(value, str) else "entries"
        bound = f"at least {about['min_length']}" if kind == "too_short" else f"at most {about['max_length']}"
        return f"{len(value)} {counted}, {bound}"
    if kind in ("greater_than_equal", "less_than_equal"):
        return f"it is {value}, at {'least' if kind[0] == 'g' else 'most'} {about.get('ge', about.get('le'))} is wanted"
    if kind in ("int_parsing", "literal_error"):
        return f"it is {repr(value)[:80]}; {about.get('expected', 'a whole number')} is wanted"
    return str(about["error"] if kind == "value_error" else error["msg"])
