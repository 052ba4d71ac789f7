"""Filters over what an index keeps beside a vector: a small tree that each adapter compiles to its own language.

A name is a field of the item, or `id` or `modality`. Strings, numbers and booleans are different kinds and never equal:
`Eq("n", 1)` matches 1 and 1.0, but neither "1" nor True. A missing field is None. Of a field that is a list, Eq and In match
where one of its values does, Range never does; a list without values is None.

How large a filter may be is the same for every adapter and checked when it is built: MAX_IN_VALUES in one `In`; in all
MAX_CONDITIONS, MAX_VALUES in their `In`s and MAX_TEXT_BYTES of text. SQLite and Milvus both take what is within.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
_SINGLE: Final = "text, a finite number, a 64-bit integer, true, false or null"


@dataclass(frozen=True, slots=True)
class Eq:
    """The field equals the value; `Eq(name, None)` matches items whose field is None or missing."""

    name: str
    value: Scalar

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class In:
    """The field equals one of the values; no values match nothing."""

    name: str
    values: tuple[Scalar, ...]

    def __post_init__(self) -> None:
        if isinstance(self.values, str | bytes) or not isinstance(self.values, Iterable):
            raise InputError(
                f"filter In on {shown(self.name)} has the value {shown(self.values)}; give a tuple of several, or use Eq"
            )
        object.__setattr__(self, "values", tuple(self.values))
        if len(self.values) > MAX_IN_VALUES:
            raise InputError(f"filter In on {shown(self.name)} has {len(self.values)} values; give at most {MAX_IN_VALUES}")
        _check(self)


@dataclass(frozen=True, slots=True)
class Range:
    """`low <= field <= high`, ends included, one may be left out; numbers, or texts in order of code points."""

    name: str
    low: str | float | None = None
    high: str | float | None = None

    def __post_init__(self) -> None:
        if {kind_of(bound) for bound, _ in self.bounds()} not in ({"text"}, {"number"}):
            raise InputError(
                f"filter Range on {shown(self.name)} has the bounds {shown(self.low)} and {shown(self.high)}; "
                "give one or two numbers, or one or two texts"
            )
        _check(self)

    def bounds(self) -> list[tuple[str | float, str]]:
        """Each bound with the sign that a value has towards it."""
        return [(bound, sign) for bound, sign in ((self.low, ">="), (self.high, "<=")) if bound is not None]


@dataclass(frozen=True, slots=True)
class And:
    """Every part matches; no parts match everything. The parts of an `And` among them are taken in their place."""

    parts: tuple[Eq | In | Range, ...]

    def __init__(self, parts: Iterable[Filter]) -> None:
        if not isinstance(parts, Iterable):
            raise InputError(f"filter And has the part {shown(parts)}; give a tuple of Eq, In, Range and And")
        parts = tuple(parts)
        if None in parts:  # which as a whole filter lets everything pass
            raise InputError("filter And has the part None; leave it out, or give Eq, In, Range or And")
        flat = [leaf for part in parts for leaf in leaves(part)]
        _check_size(flat)
        object.__setattr__(self, "parts", tuple(flat))


Filter = Eq | In | Range | And


def leaves(where: Filter | None) -> tuple[Eq | In | Range, ...]:
    """The conditions of a filter, all of which must hold; InputError for what is none."""
    if where is None or isinstance(where, And):
        return () if where is None else where.parts
    if not isinstance(where, Filter):
        raise InputError(f"{shown(where)} is not a filter; build one from Eq, In, Range and And")
    return (where,)


def wanted_by_kind(leaf: Eq | In) -> dict[Kind, list[Scalar]]:
    """The values that match, by their kind."""
    wanted: dict[Kind, list[Scalar]] = {}
    for value in _values(leaf):
        wanted.setdefault(kind_of(value), []).append(value)
    return wanted


def kind_of(value: Scalar) -> Kind:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "boolean"
    return "text" if isinstance(value, str) else "number"


def values_of(value: Value) -> list[Scalar]:
    """The values of a field that is a list, without None and those equal to earlier ones."""
    values: Any = value if is_list(value) else (value,)
    return list({(kind_of(part), part): part for part in values if part is not None}.values())


def is_list(value: Value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def matches(where: Filter, id: str, modality: str, fields: Mapping[str, Value]) -> bool:
    """What a filter means, in plain Python; adapters must agree with it."""
    kept = {**fields, "id": id, "modality": modality}
    return all(_matches(leaf, kept.get(leaf.name)) for leaf in leaves(where))


def shown(value: object) -> str:
    """A value that may be of any size and kind, for a message."""
    try:
        return repr(value)[:80]
    except ValueError:  # an integer of more digits than Python prints
        return f"a {type(value).__name__} of too many digits"


def check_field(name: str, value: Value) -> None:
    """Raise InputError where a name or a value of a field cannot be kept."""
    values: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
    if len(values) > MAX_LIST_VALUES:
        raise InputError(f"field {shown(name)} is a list of {len(values)} values; give at most {MAX_LIST_VALUES}")
    _check_values(name, values, f"{_SINGLE}, or a list of these")


def _check_values(name: str, values: Iterable[Scalar], allowed: str) -> None:
    if not isinstance(name, str) or not name or not is_value(name) or len(name.encode()) > MAX_NAME_BYTES:
        raise InputError(f"field name {shown(name)} is unusable; give plain text of 1 to {MAX_NAME_BYTES} bytes")
    for value in values:
        if not is_value(value):
            raise InputError(f"field {name!r} has the value {shown(value)} ({type(value).__name__}); use {allowed}")


def is_value(value: object) -> bool:
    """Whether this is a text, a number of 64 bits, a boolean or None. It runs for every row that is read."""
    if isinstance(value, str):
        return "\0" not in value and (value.isascii() or _encodable(value))
    if isinstance(value, int):  # booleans too
        return -_INT64 <= value < _INT64
    return value is None or (isinstance(value, float) and math.isfinite(value))


def _encodable(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def same_fields(first: Mapping[str, Value], second: Mapping[str, Value]) -> bool:
    """Whether fields are equal, also in the kinds of their values: 1, 1.0 and true differ."""
    return json.dumps(dict(first), sort_keys=True) == json.dumps(dict(second), sort_keys=True)


def _check(leaf: Eq | In | Range) -> None:
    _check_values(leaf.name, _values(leaf), _SINGLE)
    _check_size([leaf])


def _check_size(leaves: Sequence[Eq | In | Range]) -> None:
    values = sum(len(leaf.values) for leaf in leaves if isinstance(leaf, In))
    text = sum(len(value.encode()) for leaf in leaves for value in _values(leaf) if isinstance(value, str))
    for size, most, what in (
        (len(leaves), MAX_CONDITIONS, "conditions"),
        (values, MAX_VALUES, "values to be one of"),
        (text, MAX_TEXT_BYTES, "bytes of text"),
    ):
        if size > most:
            raise InputError(f"the filter has {size} {what} in all; give at most {most}, or ask several times")


def _values(leaf: Eq | In | Range) -> Sequence[Scalar]:
    if isinstance(leaf, In):
        return leaf.values
    return (leaf.value,) if isinstance(leaf, Eq) else (leaf.low, leaf.high)


def _matches(leaf: Eq | In | Range, value: Value) -> bool:
    values = values_of(value) or [None]
    if isinstance(leaf, Range):
        bounds = leaf.bounds()
        if is_list(value) or kind_of(values[0]) != kind_of(bounds[0][0]):
            return False
        # kind_of has shown that both sides are of one ordered kind, which mypy cannot follow.
        return all(values[0] >= bound if sign == ">=" else values[0] <= bound for bound, sign in bounds)  # type: ignore[operator]
    wanted = wanted_by_kind(leaf)
    return any(part in wanted.get(kind_of(part), ()) for part in values)
