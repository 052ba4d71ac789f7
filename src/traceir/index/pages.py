"""Pages of an index in order of a field: what order means, and where a page ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from traceir.errors import InputError
from traceir.index.filters import Kind, is_value, kind_of, shown
from traceir.items import Modality, Scalar, Value

Position = tuple[Scalar, str]
"""Where a page ended: the value that its last item is sorted by (None: it has none), and that item's id."""
ORDERED_KINDS: Final[tuple[Kind, ...]] = ("boolean", "number", "text")


@dataclass(frozen=True, slots=True)
class Page:
    """The items behind `after` in order of a field, `id` or `modality`."""

    name: str
    descending: bool
    after: Position | None
    limit: int


class Placed(Protocol):
    """What an index keeps of an item, as far as its place goes."""

    @property
    def id(self) -> str: ...
    @property
    def modality(self) -> Modality: ...
    @property
    def fields(self) -> Mapping[str, Value]: ...


def check_page(sort: str, after: Position | None, limit: int) -> Page:
    """The page asked for; InputError for an order, position or size that there is not."""
    name = sort[1:] if isinstance(sort, str) and sort.startswith("-") else sort
    if not isinstance(name, str) or not name or not is_value(name):
        raise InputError(f"sort {shown(sort)} is not the name of a field; write for instance date, or -date for the last first")
    if isinstance(limit, bool) or not isinstance(limit, int | np.integer) or limit < 1:
        raise InputError(f"limit is {shown(limit)}; ask for at least 1 item")
    if after is not None:
        read = tuple(after) if isinstance(after, tuple | list) else ()
        if len(read) != 2 or not is_value(read[0]) or not isinstance(read[1], str) or not is_value(read[1]):
            raise InputError(f"position {shown(after)} is none; give (value or None, id) of the last item shown")
        after = (read[1] if name == "id" else read[0], read[1])
    return Page(name, sort != name, after, min(int(limit), 2**62))


def position_of(item: Placed, sort: str) -> Position:
    """Where this item stands in an order; with it as `after`, a page begins behind the item."""
    name = sort.removeprefix("-")
    value = item.id if name == "id" else item.modality if name == "modality" else item.fields.get(name)
    return value if isinstance(value, str | int | float) else None, item.id


def order_page(positions: Iterable[Position], page: Page) -> list[Position]:
    """Those on the page, in its order: the meaning of `browse`, in plain Python."""
    ordered = sorted(positions, key=lambda position: position[1])
    valued = sorted((own for own in ordered if own[0] is not None), key=lambda own: _rank(own[0]), reverse=page.descending)
    ordered = valued + [own for own in ordered if own[0] is None]
    return [own for own in ordered if is_behind(own, page)][: page.limit]


def is_behind(position: Position, page: Page) -> bool:
    """Whether this position comes after `page.after`, where there is one."""
    if page.after is None:
        return True
    (value, id), (last_value, last_id) = position, page.after
    if value is None or last_value is None:
        return value is None and (last_value is not None or id > last_id)
    own, last = _rank(value), _rank(last_value)
    if own == last:
        return id > last_id
    return own < last if page.descending else own > last


def _rank(value: Scalar) -> tuple[Any, ...]:
    return (ORDERED_KINDS.index(kind_of(value)), value)
