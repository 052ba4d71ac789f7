"""Pages of the SQLite file in order of a field, by walking the index of fields from where the last page ended.

The primary key of the table `fields` is (name, kind, value, n), so items lie there in the order wanted, but for equal values. A
walk takes them from there group by group of equal values, orders a group by id and drops what the filter does not pass, until
the page is full. A large group is walked by id instead, and so are items without a value. A filter that lets few items pass is
not walked through: all that pass are gathered by it and sorted. Few is the square root of page times items, where a walk and a
gathering look at equally many rows; a walk that has looked at more gives up and gathers.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Final

from traceir.index.filters import (
    OWN_NAMES,
    And,
    Filter,
    Glob,
    Kind,
    Not,
    Or,
    Range,
    Scalar,
    after_all,
    kind_of,
    merge_ranges,
    ranges_of,
)
from traceir.index.pages import ORDERED_KINDS, Page
from traceir.index.sql import compile_filter, leaf_tests, read_number
from traceir.items import MODALITIES

_MOST_ROWS: Final = 8_192
"""At a time."""
_PATIENCE: Final = 1
_OF_ROW: Final = "SELECT 1 FROM fields f INDEXED BY fields_n WHERE f.n = i.n AND f.name = ?"
Condition = tuple[str, Sequence[Scalar]]
Bounds = Sequence[tuple[Scalar, str]]


def page_numbers(connection: sqlite3.Connection, where: Filter | None, page: Page) -> list[int]:
    """The numbers of the items on a page, in its order; within a transaction."""
    where = merge_ranges(where)
    few = page.limit + math.isqrt(page.limit * read_number(connection, "SELECT max(n) FROM items"))
    if where is not None and _count_up_to(connection, where, few) <= few:
        return _gather(connection, where, page)
    walk = _Walk(connection, where, page, few)
    for rows in walk.rows():
        walk.numbers += rows
        if len(walk.numbers) >= page.limit:
            return walk.numbers[: page.limit]
        if walk.looked_at > _PATIENCE * few:
            return _gather(connection, where, page)
    return walk.numbers


def _count_up_to(connection: sqlite3.Connection, where: Filter, most: int) -> int:
    """How many items may pass at most, by looking at few; above `most` where they are more, or counting is not cheap."""
    if isinstance(where, And | Or):
        counts = [_count_up_to(connection, part, most) for part in where.parts]
        return sum(counts) if isinstance(where, Or) else min(counts, default=most + 1)
    if isinstance(where, Glob) and where.prefix:
        where = Range(where.name, low=where.prefix, below=after_all(where.prefix))
    if isinstance(where, Not | Glob) or where.name == "modality":
        return most + 1
    count = 0
    for kind, test, values in leaf_tests(where):
        if kind == "none":
            return most + 1
        if where.name == "id":
            table, names = f"items WHERE {test.replace('value', 'id')}", list[Scalar]()
        else:
            table, names = f"fields WHERE name = ? AND kind = ? AND {test}", [where.name, kind]
        if kind == "text" or where.name != "id":
            statement = f"SELECT count(*) FROM (SELECT 1 FROM {table} LIMIT ?)"
            count += read_number(connection, statement, [*names, *values, most + 1])
    return count


class _Walk:
    """One walk; `looked_at` counts the rows that it has read."""

    def __init__(self, connection: sqlite3.Connection, where: Filter | None, page: Page, few: int) -> None:
        self._connection, self._page, self._few = connection, page, few
        self._filter = compile_filter(where, row_by_row=True)
        self._bounds = _bounds_on(where, page.name)
        self._no_list = _no_list(connection, page.name)
        self._most_rows = max(page.limit + 2, min(few, _MOST_ROWS))
        self.numbers: list[int] = []
        self.looked_at = 0

    def rows(self) -> Iterator[list[int]]:
        """All that passes behind `after`, in order, in parts of any size."""
        page, after = self._page, self._page.after
        if page.name == "id":
            yield from self._by_id(("1", ()), after and after[1], page.descending)
        elif page.name == "modality":
            for name in sorted(MODALITIES, reverse=page.descending):
                if after is None or self._is_from(name, after[0]):
                    yield from self._by_id(("i.modality = ?", [name]), after[1] if after and name == after[0] else None)
        else:
            kinds = ORDERED_KINDS[::-1] if page.descending else ORDERED_KINDS
            for kind in kinds if self._bounds is None else [kind for kind in kinds if kind in self._bounds]:
                if after is None or (after[0] is not None and self._is_from(kind, kind_of(after[0]))):
                    yield from self._by_value(kind)
            if self._bounds is None:
                yield from self._without_value()

    def _is_from(self, own: object, first: object) -> bool:
        return str(own) <= str(first) if self._page.descending else str(own) >= str(first)

    def _by_value(self, kind: Kind) -> Iterator[list[int]]:
        """The items with a value of this kind, in order of it."""
        page, rows = self._page, self._page.limit + 2
        last, last_id = page.after if page.after and kind_of(page.after[0]) == kind else (None, "")
        first: Bounds = [] if last is None else [(last, "<=" if page.descending else ">=")]
        while True:
            part = self._values(kind, first, rows)
            groups: dict[Scalar, list[tuple[str, int]]] = {}
            for value, id, n, passes in part:
                groups.setdefault(value, []).extend([(id, n)] if passes else [])
            is_end = len(part) < rows
            if not is_end:  # the last group may go on
                value = part[-1][0]
                if len(groups) == 1 and (rows := self._count(kind, value) + 1) > self._few:
                    no_list, names = self._no_list
                    own = "EXISTS (SELECT 1 FROM fields f WHERE f.name = ? AND f.kind = ? AND f.value = ? AND f.n = i.n)"
                    condition = f"{own} AND {no_list}", [page.name, kind, value, *names]
                    yield from self._by_id(condition, last_id if value == last else None)
                    first, rows = [(value, "<" if page.descending else ">")], page.limit + 2
                    continue
                first = [(value, "<=" if page.descending else ">=")]
                if len(groups) > 1:
                    del groups[value]
                    rows = min(4 * rows, self._most_rows)
                else:
                    continue
            for value, members in groups.items():
                yield [n for id, n in sorted(members) if value != last or id > last_id]
            if is_end:
                return

    def _values(self, kind: Kind, first: Bounds, rows: int) -> list[tuple[Scalar, str, int, int]]:
        """The next values of this kind; id and number of their items, and whether these pass."""
        order = "DESC" if self._page.descending else ""
        bounds = [*((self._bounds or {}).get(kind, ())), *first]
        test = "".join(f" AND value {own} ?" for _, own in bounds)
        (no_list, names), (condition, values) = self._no_list, self._filter
        statement = (
            f"SELECT v.value, i.id, v.n, ({no_list}) AND ({condition}) FROM (SELECT value, n FROM fields "
            f"WHERE name = ? AND kind = ?{test} ORDER BY value {order} LIMIT ?) v "
            f"CROSS JOIN items i ON i.n = v.n ORDER BY v.value {order}"
        )
        bound = [*names, *values, self._page.name, kind, *(value for value, _ in bounds), rows]
        self.looked_at += rows
        return self._connection.execute(statement, bound).fetchall()

    def _count(self, kind: Kind, value: Scalar) -> int:
        """How many have this value; hardly more than `few`."""
        statement = "SELECT count(*) FROM (SELECT 1 FROM fields WHERE name = ? AND kind = ? AND value = ? LIMIT ?)"
        return read_number(self._connection, statement, [self._page.name, kind, value, self._few + 1])

    def _without_value(self) -> Iterator[list[int]]:
        page, has_lists = self._page, _has_lists(self._connection, self._page.name)
        if not has_lists:
            count = read_number(self._connection, "SELECT count(*) FROM fields WHERE name = ?", [page.name])
            if count == read_number(self._connection, "SELECT count(*) FROM items"):
                return
        condition, values = f"NOT EXISTS ({_OF_ROW})", [page.name]
        if has_lists:
            condition, values = f"({condition} OR EXISTS ({_OF_ROW} AND f.kind = 'list'))", 2 * values
        yield from self._by_id((condition, values), page.after[1] if page.after and page.after[0] is None else None)

    def _by_id(self, condition: Condition, after: str | None, descending: bool = False) -> Iterator[list[int]]:
        """The items that a condition holds for, in order of id."""
        rows, sign, order = self._page.limit + 2, *(("<", "DESC") if descending else (">", ""))
        while True:
            test, values = (f"WHERE id {sign} ?", [after]) if after is not None else ("", [])
            part = self._connection.execute(
                f"SELECT i.n, i.id, ({condition[0]}) AND ({self._filter[0]}) FROM (SELECT id, n FROM items {test} "
                f"ORDER BY id {order} LIMIT ?) v CROSS JOIN items i ON i.n = v.n ORDER BY v.id {order}",
                [*condition[1], *self._filter[1], *values, rows],
            ).fetchall()
            self.looked_at += rows
            yield [n for n, _, passes in part if passes]
            if len(part) < rows:
                return
            after, rows = part[-1][1], min(4 * rows, self._most_rows)


def _no_list(connection: sqlite3.Connection, name: str) -> Condition:
    """That the field is no list, which has no place in an order."""
    return (f"NOT EXISTS ({_OF_ROW} AND f.kind = 'list')", [name]) if _has_lists(connection, name) else ("1", ())


def _has_lists(connection: sqlite3.Connection, name: str) -> bool:
    statement = "SELECT EXISTS (SELECT 1 FROM fields WHERE name = ? AND kind = 'list')"
    return bool(read_number(connection, statement, [name]))


def _bounds_on(where: Filter | None, name: str) -> dict[Kind, Bounds] | None:
    """The bounds by kind that a filter sets for a field as a whole; None where it sets none."""
    for part in where.parts if isinstance(where, And) else [where] if where else []:
        if (bounded := ranges_of(part)) and bounded[0] == name:
            return {kind: own.bounds() for kind, own in bounded[1].items()}
    return None


def _gather(connection: sqlite3.Connection, where: Filter | None, page: Page) -> list[int]:
    """A page by looking at all that pass the filter."""
    sign, order = ("<", "DESC") if page.descending else (">", "")
    condition, values = compile_filter(where)
    join, kind, value, names = "", "'text'", f"i.{page.name}", list[Scalar]()
    if page.name not in OWN_NAMES:
        no_list, own = _no_list(connection, page.name)
        join = f"LEFT JOIN fields v INDEXED BY fields_n ON v.n = i.n AND v.name = ? AND v.kind <> 'list' AND {no_list}"
        kind, value, names = "v.kind", "v.value", [page.name, *own]
    behind, position = "1", list[Scalar]()
    if page.after is not None and page.after[0] is None:
        behind, position = f"{kind} IS NULL AND i.id > ?", [page.after[1]]
    elif page.after is not None:
        last, id = page.after
        behind = f"{kind} IS NULL OR {kind} {sign} ? OR ({kind} = ? AND ({value} {sign} ? OR ({value} = ? AND i.id > ?)))"
        position = [kind_of(last), kind_of(last), last, last, id]
    rows = connection.execute(
        f"SELECT i.n FROM items i {join} WHERE ({condition}) AND ({behind}) "
        f"ORDER BY {kind} IS NULL, {kind} {order}, {value} {order}, i.id LIMIT ?",
        [*names, *values, *position, page.limit],
    )
    return [n for (n,) in rows.fetchall()]
