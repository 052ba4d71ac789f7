"""Filters over what an index keeps beside a vector: a small tree that each adapter compiles to its own language.

A name is a field of the item, or `id` or `modality`. Strings, numbers and booleans are different kinds and never equal:
`Eq("n", 1)` matches 1 and 1.0, but neither "1" nor True. A missing field is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from traceir.errors import InputError

Scalar = str | int | float | bool | None
Kind = Literal["text", "number", "boolean", "none"]
OWN_NAMES: Final = ("id", "modality")
MAX_IN_VALUES: Final = 10_000
MAX_NAME_BYTES: Final = 128
_INT64: Final = 2**63


@dataclass(frozen=True, slots=True)
class Eq:
    """The field equals the value; `Eq(name, None)` matches items whose field is None or missing."""

    name: str
    value: Scalar

    def __post_init__(self) -> None:
        check_name(self.name)
        check_value(self.name, self.value)


@dataclass(frozen=True, slots=True)
class In:
    """The field equals one of the values; no values match nothing."""

    name: str
    values: tuple[Scalar, ...]

    def __post_init__(self) -> None:
        check_name(self.name)
        if isinstance(self.values, str):
            raise InputError(f"filter In({self.name!r}, {self.values!r}) needs several values; give a tuple, or use Eq")
        object.__setattr__(self, "values", tuple(self.values))
        if len(self.values) > MAX_IN_VALUES:
            raise InputError(f"filter In on {self.name!r} has {len(self.values)} values; give at most {MAX_IN_VALUES}")
        for value in self.values:
            check_value(self.name, value)


@dataclass(frozen=True, slots=True)
class Range:
    """`low <= field <= high`, ends included, one may be left out; numbers, or texts in order of code points."""

    name: str
    low: str | float | None = None
    high: str | float | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        kinds = {kind_of(bound) for bound in (self.low, self.high) if bound is not None}
        if len(kinds) != 1 or not kinds <= {"text", "number"}:
            raise InputError(
                f"filter Range on {self.name!r} has the bounds {self.low!r} and {self.high!r}; "
                "give one or two numbers, or one or two texts"
            )
        for bound in (self.low, self.high):
            check_value(self.name, bound)


@dataclass(frozen=True, slots=True)
class And:
    """Every part matches; no parts match everything."""

    parts: tuple[Filter, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))


Filter = Eq | In | Range | And


def kind_of(value: Scalar) -> Kind:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "boolean"
    return "text" if isinstance(value, str) else "number"


def matches(where: Filter, id: str, modality: str, fields: Mapping[str, Scalar]) -> bool:
    """What a filter means, in plain Python; adapters must agree with it."""
    if isinstance(where, And):
        return all(matches(part, id, modality, fields) for part in where.parts)
    own = {"id": id, "modality": modality}
    found = own[where.name] if where.name in own else fields.get(where.name)
    if isinstance(where, Eq):
        return _equal(found, where.value)
    if isinstance(where, In):
        return any(_equal(found, value) for value in where.values)
    return _within(found, where.low, where.high)


def check_name(name: str) -> None:
    """Raise InputError where a field name is empty, not UTF-8 text, or longer than MAX_NAME_BYTES."""
    if not isinstance(name, str) or not name:
        raise InputError(f"field name {name!r} is not a text; give a name of 1 to {MAX_NAME_BYTES} bytes")
    if "\0" in name or not _encodable(name) or len(name.encode()) > MAX_NAME_BYTES:
        raise InputError(f"field name {name[:80]!r} is unusable; give plain text of 1 to {MAX_NAME_BYTES} bytes")


def check_value(name: str, value: Scalar) -> None:
    """Raise InputError where a value is no text, finite number, 64-bit integer, boolean or None."""
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, int) and -_INT64 <= value < _INT64:
        return
    if isinstance(value, float) and math.isfinite(value):
        return
    if isinstance(value, str) and "\0" not in value and _encodable(value):
        return
    raise InputError(
        f"field {name!r} has the value {repr(value)[:80]} ({type(value).__name__}); "
        "use text, a finite number, a 64-bit integer, true, false or null"
    )


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _equal(found: Scalar, wanted: Scalar) -> bool:
    return kind_of(found) == kind_of(wanted) and found == wanted


def _within(found: Scalar, low: Scalar, high: Scalar) -> bool:
    bound = low if low is not None else high
    if kind_of(found) != kind_of(bound):
        return False
    # kind_of has shown that both sides are of one ordered kind, which mypy cannot follow.
    return (low is None or low <= found) and (high is None or found <= high)  # type: ignore[operator]
