"""What the items of an index have in common: their fields, with ranges and commonest values, to choose filters from."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Literal

from traceir.index.filters import Scalar, kind_of, values_of
from traceir.items import Value

FacetKind = Literal["text", "number", "boolean", "date", "folder"]
SAMPLE: Final = 5000
"""Items that are looked at where counting all would take long."""
LONGEST: Final = 100  # characters of a value that is one to choose
MOST_FIELDS: Final = 64
_DATE: Final = re.compile(r"\d{4}(-\d\d){1,2}(T[\d:.]+.*)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Facet:
    """A field that `count` items have. `values`: the commonest, each with how many have it; of dates the years (as texts), of
    `id` (kind `folder`) the first folders, each with its slash. `low` and `high` are the ends of all values of this kind."""

    name: str
    kind: FacetKind
    count: int
    low: Scalar = None
    high: Scalar = None
    values: Sequence[tuple[Scalar, int]] = ()


def is_date(low: Scalar, high: Scalar) -> bool:
    """Whether texts between these are taken for dates: both are in ISO 8601."""
    return all(isinstance(end, str) and _DATE.fullmatch(end) is not None for end in (low, high))


@dataclass(slots=True)
class _Tally:
    count: int = 0
    values: Counter[Scalar] = field(default_factory=Counter)

    def facet(self, name: str, kind: FacetKind, limit: int, scale: float) -> Facet:
        low, high = min(self.values, key=_order), max(self.values, key=_order)
        if kind == "text" and is_date(low, high):
            kind, counted = "date", Counter[Scalar]()
            for value, count in self.values.items():
                counted[str(value)[:4]] += count
        else:
            counted = Counter({value: count for value, count in self.values.items() if len(str(value)) <= LONGEST})
        values = tuple((value, round(count * scale)) for value, count in commonest(counted.items(), limit))
        return Facet(name, kind, round(self.count * scale), low, high, values)


def facets_of(items: Iterable[tuple[str, Mapping[str, Value]]], limit: int, total: int) -> list[Facet]:
    """The facets of `total` items by the first SAMPLE of them, each an id and fields; counts are estimates if there are more."""
    tallies: defaultdict[tuple[str, FacetKind], _Tally] = defaultdict(_Tally)
    sampled = list(islice(items, SAMPLE))
    for id, fields in sampled:
        for name, value in fields.items():
            for part in values_of(value):
                if (kind := kind_of(part)) != "none":
                    _add(tallies[name, kind], part)
        if "/" in id:
            _add(tallies["id", "folder"], id.partition("/")[0] + "/")
    scale = max(1.0, total / max(1, len(sampled)))
    return ordered(tally.facet(name, kind, limit, scale) for (name, kind), tally in tallies.items())


def ordered(facets: Iterable[Facet]) -> list[Facet]:
    """Those that most items have first, MOST_FIELDS at most."""
    return sorted(facets, key=lambda facet: (-facet.count, facet.name, facet.kind))[:MOST_FIELDS]


def commonest(counted: Iterable[tuple[Scalar, int]], limit: int) -> tuple[tuple[Scalar, int], ...]:
    """The `limit` values that most items have, equal counts in the order of the values."""
    return tuple(sorted(counted, key=lambda pair: (-pair[1], _order(pair[0])))[:limit])


def _add(tally: _Tally, value: Scalar) -> None:
    tally.count += 1
    tally.values[value] += 1


def _order(value: Scalar) -> tuple[str, float]:
    """Values of one kind in order."""
    return (value, 0.0) if isinstance(value, str) else ("", float(value or 0))
