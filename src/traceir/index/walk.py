"""Pages of the SQLite file in order of a field, by walking the index of fields from where the last page ended.

The primary key of the table `fields` is (name, kind, value, n), so items lie there in the order wanted, but for equal values. A
walk takes them from there group by group of equal values, orders a group by id and drops what the filter does not pass, until the
page is full. A large group is walked by id instead, and so are items without a value. Where a filter lets so little pass that a
walk would look at too many rows, all that pass are gathered by the filter and sorted.
"""

from __future__ import annotations

import itertools
import json
import math
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Final

from traceir.index.filters import OWN_NAMES, And, Filter, Kind, Or, Range, Scalar, kind_of
from traceir.index.pages import ORDERED_KINDS, Page
from traceir.index.sql import AMONG, compile_filter, read_number
from traceir.items import MODALITIES

_MOST_LOOKED_AT: Final = 20_000
_FIRST_ROWS: Final = 512
_MOST_ROWS: Final = 8_192
_OF_ROW: Final = "SELECT 1 FROM fields f INDEXED BY fields_n WHERE f.n = i.n AND f.name = ?"
Condition = tuple[str, Sequence[Scalar]]


def page_numbers(connection: sqlite3.Connection, where: Filter | None, page: Page) -> list[int]:
    """The numbers of the items on a page, in its order; within a transaction."""
    walk = _Walk(connection, where, page)
    for rows in walk.rows():
        walk.found += rows
        if len(walk.found) >= page.limit:
            return walk.found[: page.limit]
        if walk.looked_at > _MOST_LOOKED_AT + 4 * page.limit:
            return _gather(connection, where, page)
    return walk.found


class _Walk:
    """One walk; `looked_at` counts the rows that it has read."""

    def __init__(self, connection: sqlite3.Connection, where: Filter | None, page: Page) -> None:
        self._connection, self._page = connection, page
        self._filter = compile_filter(where, row_by_row=True)
        self._bounds = _bounds_on(where, page.name)
        self.found: list[int] = []
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
        page, rows = self._page, _FIRST_ROWS
        largest = max(_FIRST_ROWS, math.isqrt(page.limit * read_number(self._connection, "SELECT max(n) FROM items")))
        first, sign = None, ">="
        if page.after is not None and kind_of(page.after[0]) == kind:
            first = page.after[0]
        while True:
            part = self._values(kind, first, sign, rows)
            self.looked_at += len(part)
            groups = {value: [n for _, n in own] for value, own in itertools.groupby(part, lambda row: row[0])}
            is_last = len(part) < rows
            if not is_last and len(groups) == 1 and rows <= largest:
                rows *= 4  # more of this group
                continue
            if not is_last and len(groups) > 1:
                first, sign = groups.popitem()[0], ">="  # which may go on
            for value, numbers in groups.items():
                after_id = page.after[1] if page.after and page.after[0] == value and kind_of(page.after[0]) == kind else None
                if len(numbers) >= rows:
                    condition = "EXISTS (SELECT 1 FROM fields f WHERE f.name = ? AND f.kind = ? AND f.value = ? AND f.n = i.n)"
                    yield from self._by_id((condition, [page.name, kind, value]), after_id)
                    first, sign = value, ">"
                else:
                    kept = sorted((id, n) for n, id in self._passing(numbers, self._no_list()))
                    yield [n for id, n in kept if after_id is None or id > after_id]
            if is_last:
                return
            rows = min(2 * rows, max(_MOST_ROWS, page.limit))

    def _values(self, kind: Kind, first: Scalar, sign: str, rows: int) -> list[tuple[Scalar, int]]:
        """The next values of this kind with the numbers of their items."""
        order, sign = ("DESC", sign.replace(">", "<")) if self._page.descending else ("", sign)
        bounds = [*((self._bounds or {}).get(kind, ())), *([(first, sign)] if first is not None else [])]
        test = "".join(f" AND value {own} ?" for _, own in bounds)
        statement = f"SELECT value, n FROM fields WHERE name = ? AND kind = ?{test} ORDER BY value {order} LIMIT ?"
        values = [self._page.name, kind, *(bound for bound, _ in bounds), rows]
        return self._connection.execute(statement, values).fetchall()

    def _without_value(self) -> Iterator[list[int]]:
        page, has_lists = self._page, self._has_lists()
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
        rows, sign, order = max(_FIRST_ROWS, self._page.limit), *(("<", "DESC") if descending else (">", ""))
        while True:
            test, values = (f"WHERE i.id {sign} ?", [after]) if after is not None else ("", [])
            part = self._connection.execute(
                f"SELECT i.n, i.id FROM items i {test} ORDER BY i.id {order} LIMIT ?", [*values, rows]
            ).fetchall()
            self.looked_at += len(part)
            passing = {n for n, _ in self._passing([n for n, _ in part], condition)}
            yield [n for n, _ in part if n in passing]
            if len(part) < rows:
                return
            after, rows = part[-1][1], min(2 * rows, max(_MOST_ROWS, self._page.limit))

    def _passing(self, numbers: list[int], condition: Condition) -> list[tuple[int, str]]:
        """Number and id of those that the filter and a condition let pass."""
        statement = f"SELECT i.n, i.id FROM items i WHERE i.n {AMONG} AND ({condition[0]}) AND ({self._filter[0]})"
        return self._connection.execute(statement, [json.dumps(numbers), *condition[1], *self._filter[1]]).fetchall()

    def _no_list(self) -> Condition:
        return (f"NOT EXISTS ({_OF_ROW} AND f.kind = 'list')", [self._page.name]) if self._has_lists() else ("1", ())

    def _has_lists(self) -> bool:
        statement = "SELECT EXISTS (SELECT 1 FROM fields WHERE name = ? AND kind = 'list')"
        return bool(read_number(self._connection, statement, [self._page.name]))


def _bounds_on(where: Filter | None, name: str) -> dict[Kind, list[tuple[Scalar, str]]] | None:
    """The bounds by kind that a filter sets for a field as a whole; None where it sets none."""
    if isinstance(where, Or) and where.parts and all(isinstance(part, Range) and part.name == name for part in where.parts):
        by_kind = [(kind_of(part.bounds()[0][0]), part.bounds()) for part in where.parts if isinstance(part, Range)]
        return {kind: list(bounds) for kind, bounds in by_kind} if len(dict(by_kind)) == len(by_kind) else None
    if isinstance(where, Range) and where.name == name and name not in OWN_NAMES:
        return {kind_of(where.bounds()[0][0]): list(where.bounds())}
    if not isinstance(where, And):
        return None
    joined: dict[Kind, list[tuple[Scalar, str]]] | None = None
    for own in filter(None, (_bounds_on(part, name) for part in where.parts)):
        joined = own if joined is None else {kind: joined[kind] + own[kind] for kind in joined if kind in own}
    return joined


def _gather(connection: sqlite3.Connection, where: Filter | None, page: Page) -> list[int]:
    """A page by looking at all that pass the filter."""
    sign, order = ("<", "DESC") if page.descending else (">", "")
    condition, values = compile_filter(where)
    join, kind, value, names = "", "'text'", f"i.{page.name}", list[Scalar]()
    if page.name not in OWN_NAMES:
        join = (
            "LEFT JOIN fields f INDEXED BY fields_n ON f.n = i.n AND f.name = ? AND f.kind <> 'list' AND NOT EXISTS "
            "(SELECT 1 FROM fields l INDEXED BY fields_n WHERE l.n = i.n AND l.name = ? AND l.kind = 'list')"
        )
        kind, value, names = "f.kind", "f.value", [page.name, page.name]
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
