"""Filters over what an index keeps beside a vector: a small tree that each adapter compiles to its own language.

A name is a field of the item, or `id` or `modality`. Strings, numbers and booleans are different kinds and never equal:
`Eq("n", 1)` matches 1 and 1.0, but neither "1" nor True. A missing field is None. Of a field that is a list, Eq, In and Glob
match where one of its values does, Range never does; a list without values is None. `Not` is plain logic: what lacks the field
passes `Not(Range("date", low="2024"))`.

How large a filter may be is the same for every adapter and checked when it is built: MAX_IN_VALUES in one `In`; in all
MAX_CONDITIONS, MAX_VALUES in their `In`s and MAX_TEXT_BYTES of text; And, Or and Not nested MAX_DEPTH deep. SQLite and Milvus
both take what is within.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from traceir.errors import InputError
from traceir.items import Scalar as Scalar
from traceir.items import Value as Value

Kind = Literal["text", "number", "boolean", "none"]
OWN_NAMES: Final = ("id", "modality")
MAX_IN_VALUES: Final = 10_000
MAX_CONDITIONS: Final = 256
MAX_PATTERN: Final = 4_096
MAX_DEPTH: Final = 16  # SQLite's parser has a stack of 100
MAX_VALUES: Final = 30_000  # SQLite is built for 32,766 variables, and a condition needs up to 7 beside its values
MAX_TEXT_BYTES: Final = 4 * 2**20
MAX_LIST_VALUES: Final = 1_000
MAX_NAME_BYTES: Final = 128
_INT64: Final = 2**63
_SINGLE: Final = "text, a finite number, a 64-bit integer, true, false or null"
_KINDS: Final = "Eq, In, Range, Glob, And, Or and Not"
_SIGNS: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


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
    """`low <= field <= high`, and `above < field < below`; at least one is given, all that are must hold.

    Numbers, or texts in order of code points.
    """

    name: str
    low: str | float | None = None
    high: str | float | None = None
    above: str | float | None = None
    below: str | float | None = None

    def __post_init__(self) -> None:
        if {kind_of(bound) for bound, _ in self.bounds()} not in ({"text"}, {"number"}):
            bounds = " and ".join(shown(bound) for bound, _ in self.bounds()) or "None"
            raise InputError(
                f"filter Range on {shown(self.name)} has the bounds {bounds}; give one or two numbers, or one or two texts"
            )
        _check(self)

    def bounds(self) -> list[tuple[str | float, str]]:
        """Each bound with the sign that a value has towards it."""
        signed = ((self.low, ">="), (self.high, "<="), (self.above, ">"), (self.below, "<"))
        return [(bound, sign) for bound, sign in signed if bound is not None]


@dataclass(frozen=True, slots=True)
class Glob:
    """The whole text matches the pattern: `*` is any characters, `?` is one, all others are themselves; case counts."""

    name: str
    pattern: str

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise InputError(f"filter Glob on {shown(self.name)} has the pattern {shown(self.pattern)}; give a text")
        object.__setattr__(self, "pattern", re.sub(r"\*+", "*", self.pattern))
        if len(self.pattern) > MAX_PATTERN:
            raise InputError(
                f"filter Glob on {shown(self.name)} has a pattern of {len(self.pattern)} characters; give {MAX_PATTERN}"
            )
        _check(self)

    @property
    def prefix(self) -> str:
        """What every match begins with."""
        return re.split("[*?]", self.pattern, maxsplit=1)[0]


@dataclass(frozen=True, slots=True)
class And:
    """Every part matches; no parts match everything. The parts of an `And` among them are taken in their place."""

    parts: tuple[Filter, ...]

    def __init__(self, parts: Iterable[Filter]) -> None:
        object.__setattr__(self, "parts", _flat(type(self), parts))
        _check_tree(self)


@dataclass(frozen=True, slots=True)
class Or:
    """At least one part matches; no parts match nothing. The parts of an `Or` among them are taken in their place."""

    parts: tuple[Filter, ...]

    def __init__(self, parts: Iterable[Filter]) -> None:
        object.__setattr__(self, "parts", _flat(type(self), parts))
        _check_tree(self)


@dataclass(frozen=True, slots=True)
class Not:
    """The part does not match; so what lacks its field passes."""

    part: Filter

    def __post_init__(self) -> None:
        _check_tree(self)


Leaf = Eq | In | Range | Glob
Filter = Leaf | And | Or | Not
Where = Filter | str | None
"""A filter, or one in the language of `filter_text`, or none."""


def leaves(where: Filter | None) -> Sequence[Leaf]:
    """The conditions of a filter at any depth; InputError for what is none."""
    if isinstance(where, Leaf):
        return (where,)
    return [leaf for part in parts_of(where) for leaf in leaves(part)]


def parts_of(where: Filter | None) -> Sequence[Filter]:
    """What a filter joins: the parts of an And, Or or Not; InputError for what is no filter."""
    if where is None or isinstance(where, Leaf):
        return ()
    if isinstance(where, Not):
        return (where.part,)
    if not isinstance(where, And | Or):
        raise InputError(f"{shown(where)} is not a filter; build one from {_KINDS}")
    return where.parts


def map_leaves(where: Filter, change: Callable[[Leaf], Filter]) -> Filter:
    """The same filter with every condition replaced by what `change` makes of it."""
    if isinstance(where, Leaf):
        return change(where)
    parts = [map_leaves(part, change) for part in parts_of(where)]
    return Not(parts[0]) if isinstance(where, Not) else And(parts) if isinstance(where, And) else Or(parts)


def ranges_of(where: Filter) -> tuple[str, dict[Kind, Range]] | None:
    """The field and, by kind, the bounds of a filter that is a Range, or an Or of one for each of several kinds; or None."""
    parts = where.parts if isinstance(where, Or) else (where,)
    ranges = [part for part in parts if isinstance(part, Range)]
    by_kind = {kind_of(own.bounds()[0][0]): own for own in ranges}
    is_one = ranges and len({own.name for own in ranges}) == 1 and len(by_kind) == len(parts)
    return (ranges[0].name, by_kind) if is_one else None


def merge_ranges(where: Filter | None) -> Filter | None:
    """The same; parts of an And that bound one field are one part, as in `date>=2024-05 and date<2024-08`."""
    if not isinstance(where, And):
        return where
    merged: dict[str, dict[Kind, Range]] = {}
    others: list[Filter] = []
    for part in where.parts:
        if (bounded := ranges_of(part)) is None:
            others.append(part)
        else:
            name, ranges = bounded
            there = merged.get(name, ranges)
            merged[name] = {kind: _both(own, there[kind]) for kind, own in ranges.items() if kind in there}
    return And(
        [*(Or(ranges.values()) if len(ranges) != 1 else next(iter(ranges.values())) for ranges in merged.values()), *others]
    )


def _both(first: Range, second: Range) -> Range:
    """What both let pass; their bounds are of one kind."""
    names = (("low", max), ("high", min), ("above", max), ("below", min))
    pairs = {name: [own for side in (first, second) if (own := getattr(side, name)) is not None] for name, _ in names}
    return Range(first.name, **{name: choose(pairs[name]) for name, choose in names if pairs[name]})


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
    return _holds(where, {**fields, "id": id, "modality": modality})


def after_all(prefix: str) -> str | None:
    """The least text above all that begin with `prefix`; None where there is none."""
    for end in range(len(prefix), 0, -1):
        if (code := ord(prefix[end - 1])) < 0x10FFFF:
            return prefix[: end - 1] + chr(0xE000 if code == 0xD7FF else code + 1)  # between them are no characters
    return None


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


def _flat(kind: type[And | Or], parts: Iterable[Filter]) -> tuple[Filter, ...]:
    """The parts, with those of a part of the same kind in its place."""
    if isinstance(parts, str | bytes) or not isinstance(parts, Iterable):
        raise InputError(f"filter {kind.__name__} has the part {shown(parts)}; give a tuple of {_KINDS}")
    parts = tuple(parts)
    if None in parts:  # which as a whole filter lets everything pass
        raise InputError(f"filter {kind.__name__} has the part None; leave it out, or give {_KINDS}")
    return tuple(own for part in parts for own in (parts_of(part) if isinstance(part, kind) else (part,)))


def _check_tree(where: And | Or | Not) -> None:
    if isinstance(where, Not) and where.part is None:
        raise InputError(f"filter Not has the part None; give {_KINDS}")
    _check_size(leaves(where))
    if _depth(where) > MAX_DEPTH:
        raise InputError(f"the filter is nested more than {MAX_DEPTH} deep; write it flatter, or ask several times")


def _depth(where: Filter) -> int:
    return 0 if isinstance(where, Leaf) else 1 + max((_depth(part) for part in parts_of(where)), default=0)


def _check(leaf: Leaf) -> None:
    _check_values(leaf.name, _values(leaf), _SINGLE)
    _check_size([leaf])


def _check_size(leaves: Sequence[Leaf]) -> None:
    values = sum(len(leaf.values) for leaf in leaves if isinstance(leaf, In))
    text = sum(len(value.encode()) for leaf in leaves for value in _values(leaf) if isinstance(value, str))
    for size, most, what in (
        (len(leaves), MAX_CONDITIONS, "conditions"),
        (values, MAX_VALUES, "values to be one of"),
        (text, MAX_TEXT_BYTES, "bytes of text"),
    ):
        if size > most:
            raise InputError(f"the filter has {size} {what} in all; give at most {most}, or ask several times")


def _values(leaf: Leaf) -> Sequence[Scalar]:
    if isinstance(leaf, In):
        return leaf.values
    if isinstance(leaf, Range):
        return (leaf.low, leaf.high, leaf.above, leaf.below)
    return (leaf.value,) if isinstance(leaf, Eq) else (leaf.pattern,)


def _holds(where: Filter, kept: Mapping[str, Value]) -> bool:
    if isinstance(where, Leaf):
        return _matches(where, kept.get(where.name))
    held = (_holds(part, kept) for part in parts_of(where))
    return not any(held) if isinstance(where, Not) else any(held) if isinstance(where, Or) else all(held)


def _matches(leaf: Leaf, value: Value) -> bool:
    values = values_of(value) or [None]
    if isinstance(leaf, Range):
        bounds = leaf.bounds()
        if is_list(value) or kind_of(values[0]) != kind_of(bounds[0][0]):
            return False
        return all(_SIGNS[sign](values[0], bound) for bound, sign in bounds)
    if isinstance(leaf, Glob):
        return any(isinstance(part, str) and globs(leaf.pattern, part) for part in values)
    wanted = wanted_by_kind(leaf)
    return any(part in wanted.get(kind_of(part), ()) for part in values)


def globs(pattern: str, text: str) -> bool:
    """Whether all of a text matches a pattern of `Glob`, in time of at most their product."""
    at, here, star, resumed = 0, 0, -1, 0
    while here < len(text):
        if pattern[at : at + 1] == "*":
            star, resumed, at = at, here, at + 1
        elif at < len(pattern) and pattern[at] in ("?", text[here]):
            at, here = at + 1, here + 1
        elif star >= 0:  # let the last star take one character more
            resumed += 1
            at, here = star + 1, resumed
        else:
            return False
    return not pattern[at:].strip("*")
