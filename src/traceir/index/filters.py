"""Filters over what an index keeps beside a vector: a small tree that each adapter compiles to its own language.

A name is a field of the item, or `id` or `modality`. Strings, numbers and booleans are different kinds and never equal:
`Eq("n", 1)` matches 1 and 1.0, but neither "1" nor True. A missing field is None. Of a field that is a list, Eq and In match
where one of its values does, Range never does; a list without values is None.

How large a filter may be is the same for every adapter and checked when it is built: MAX_IN_VALUES in one `In`; in all
MAX_CONDITIONS, MAX_VALUES in their `In`s and MAX_TEXT_BYTES of text. SQLite and Milvus both take what is within.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from traceir.errors import InputError
from traceir.items import Scalar as Scalar
from traceir.items import Value as Value

Kind = Literal["text", "number", "boolean", "none"]
OWN_NAMES: Final = ("id", "modality")
MAX_IN_VALUES: Final = 10_000
MAX_CONDITIONS: Final = 256
MAX_VALUES: Final = 30_000  # SQLite is built for 32,766 variables, and a condition needs up to 7 beside its values
MAX_TEXT_BYTES: Final = 4 * 2**20
MAX_LIST_VALUES: Final = 1_000
MAX_NAME_BYTES: Final = 128
_INT64: Final = 2**63
_REMEDY: Final = "use text, a finite number, a 64-bit integer, true, false or null"


@dataclass(frozen=True, slots=True)
class Eq:
    """The field equals the value; `Eq(name, None)` matches items whose field is None or missing."""

    name: str
    value: Scalar

    def __post_init__(self) -> None:
        check_name(self.name)
        check_value(self.name, self.value)
        _check_size([self])


@dataclass(frozen=True, slots=True)
class In:
    """The field equals one of the values; no values match nothing."""

    name: str
    values: tuple[Scalar, ...]
    _known: frozenset[tuple[Kind, Scalar]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_name(self.name)
        if isinstance(self.values, str | bytes) or not isinstance(self.values, Iterable):
            raise InputError(f"filter In on {self.name!r} has the value {shown(self.values)}; give a tuple of several, or use Eq")
        object.__setattr__(self, "values", tuple(self.values))
        if len(self.values) > MAX_IN_VALUES:
            raise InputError(f"filter In on {self.name!r} has {len(self.values)} values; give at most {MAX_IN_VALUES}")
        for value in self.values:
            check_value(self.name, value)
        _check_size([self])
        object.__setattr__(self, "_known", frozenset((kind_of(value), value) for value in self.values))

    def has(self, value: Scalar) -> bool:
        return (kind_of(value), value) in self._known


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
                f"filter Range on {self.name!r} has the bounds {shown(self.low)} and {shown(self.high)}; "
                "give one or two numbers, or one or two texts"
            )
        for bound in (self.low, self.high):
            check_value(self.name, bound)
        _check_size([self])


@dataclass(frozen=True, slots=True)
class And:
    """Every part matches; no parts match everything. The parts of an `And` among them are taken in their place."""

    parts: tuple[Eq | In | Range, ...]

    def __init__(self, parts: Iterable[Filter]) -> None:
        if not isinstance(parts, Iterable):
            raise InputError(f"filter And has the part {shown(parts)}; give a tuple of Eq, In, Range and And")
        flat: list[Eq | In | Range] = []
        for part in parts:
            if not isinstance(part, Filter):
                raise not_a_filter(part)
            flat += part.parts if isinstance(part, And) else [part]
        _check_size(flat)
        object.__setattr__(self, "parts", tuple(flat))


Filter = Eq | In | Range | And


def kind_of(value: Scalar) -> Kind:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "boolean"
    return "text" if isinstance(value, str) else "number"


def values_of(value: Value) -> list[Scalar]:
    """The values of a field that is a list, without None and those equal to earlier ones."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [] if value is None else [value]
    return list({(kind_of(one), one): one for one in value if one is not None}.values())


def is_list(value: Value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def matches(where: Filter, id: str, modality: str, fields: Mapping[str, Value]) -> bool:
    """What a filter means, in plain Python; adapters must agree with it."""
    if isinstance(where, And):
        return all(matches(part, id, modality, fields) for part in where.parts)
    own = {"id": id, "modality": modality}
    kept = own[where.name] if where.name in own else fields.get(where.name)
    found: list[Scalar] = values_of(kept) or [None]
    if isinstance(where, Range):
        return not is_list(kept) and _within(found[0], where.low, where.high)
    return any(where.has(one) if isinstance(where, In) else _equal(one, where.value) for one in found)


def key_of_filter(where: Filter) -> bytes:
    """32 bytes that no other filter has, whatever its size."""
    return hashlib.sha256(repr(where).encode()).digest()


def not_a_filter(found: object) -> InputError:
    return InputError(f"{shown(found)} is not a filter; build one from Eq, In, Range and And")


def shown(value: object) -> str:
    """A value that may be of any size and kind, for a message."""
    try:
        return repr(value)[:80]
    except ValueError:  # an integer of more digits than Python prints
        return f"a {type(value).__name__} of too many digits"


def check_name(name: str) -> None:
    """Raise InputError where a field name is empty, not UTF-8 text, or longer than MAX_NAME_BYTES."""
    if not isinstance(name, str) or not name:
        raise InputError(f"field name {shown(name)} is not a text; give a name of 1 to {MAX_NAME_BYTES} bytes")
    if "\0" in name or not _encodable(name) or len(name.encode()) > MAX_NAME_BYTES:
        raise InputError(f"field name {name[:80]!r} is unusable; give plain text of 1 to {MAX_NAME_BYTES} bytes")


def check_field(name: str, value: Value) -> None:
    """Raise InputError where a name or a value of a field cannot be kept."""
    check_name(name)
    values: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
    if len(values) > MAX_LIST_VALUES:
        raise InputError(f"field {name!r} is a list of {len(values)} values; give at most {MAX_LIST_VALUES}")
    for one in values:
        check_value(name, one, remedy="use text, a finite number, a 64-bit integer, true, false, null, or a list of these")


def same_fields(one: Mapping[str, Value], other: Mapping[str, Value]) -> bool:
    """Whether fields are equal, also in the kinds of their values: 1, 1.0 and true differ."""
    return json.dumps(dict(one), sort_keys=True) == json.dumps(dict(other), sort_keys=True)


def check_value(name: str, value: Scalar, *, remedy: str = _REMEDY) -> None:
    """Raise InputError where a value is no text, finite number, 64-bit integer, boolean or None."""
    if not is_value(value):
        raise InputError(f"field {name!r} has the value {shown(value)} ({type(value).__name__}); {remedy}")


def is_value(value: object) -> bool:
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, int):
        return -_INT64 <= value < _INT64
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str) and "\0" not in value and _encodable(value)


def _check_size(parts: Sequence[Eq | In | Range]) -> None:
    values = sum(len(part.values) for part in parts if isinstance(part, In))
    text = sum(len(value.encode()) for part in parts for value in _values(part) if isinstance(value, str))
    for found, most, what in (
        (len(parts), MAX_CONDITIONS, "conditions"),
        (values, MAX_VALUES, "values to be one of"),
        (text, MAX_TEXT_BYTES, "bytes of text"),
    ):
        if found > most:
            raise InputError(f"the filter has {found} {what} in all; give at most {most}, or ask several times")


def _values(part: Eq | In | Range) -> Sequence[Scalar]:
    if isinstance(part, In):
        return part.values
    return (part.value,) if isinstance(part, Eq) else (part.low, part.high)


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
