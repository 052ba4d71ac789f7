"""What the server's callers see of an index: its own fields are hidden, and tenants kept apart: every id is prefixed, every item
marked, every filter narrowed.

An item of tenant `acme` called `cup` is stored as `_tenant:acme:cup` with the field `_tenant` = `acme`. The prefix keeps equal
ids of two tenants apart and makes get, delete and overwriting by id safe; the field keeps search, scan, count and delete by
filter apart. What comes back is checked once more before it is shown, so that an index that filters wrongly shows too little.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Final, Self, TypeVar

from traceir.errors import InputError
from traceir.index.filters import And, Eq, Filter, In, Range
from traceir.index.store import MAX_ID_BYTES, Background, Index, IndexInfo, Stored, Vectors, check_id, check_ids, check_items
from traceir.items import MODALITIES, Hit, Item, Modality
from traceir.sources import FILE_FIELD

FIELD: Final = "_tenant"
OWN_FIELDS: Final = frozenset({FIELD, FILE_FIELD})
"""Fields that no caller may set or ask for, and none is shown."""
PREFIX: Final = "_tenant:"
"""What ids of tenants begin with; no other id may."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
T = TypeVar("T")
K = TypeVar("K", Stored, Hit)


def check_tenant(name: str) -> str:
    """The name of a tenant, or InputError where it is unusable."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"tenant {str(name)[:80]!r} is unusable; give 1 to 63 small letters, digits, dashes or underscores")
    return name


class Census:
    """Whether an index holds items of any tenant: counted at the first question, noted when this server adds one.

    It only spares a filter over the whole index to those who have no tenant: items that another process adds for a tenant
    meanwhile are left out of what they see all the same.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._known: bool | None = None

    def any(self) -> bool:
        if self._known is None:
            self._known = self._index.count(Range(FIELD, low="")) > 0
        return self._known

    def note(self) -> None:
        self._known = True


class TenantIndex:
    """The part of an index that belongs to one tenant, as an `Index` of its own; None: what belongs to no tenant.

    Closing it does not close the index. The ids of a tenant may be a little shorter than MAX_ID_BYTES, for the prefix.
    """

    def __init__(self, index: Index, tenant: str | None, census: Census | None = None) -> None:
        self._index, self._census = index, census or Census(index)
        self._tenant = None if tenant is None else check_tenant(tenant)
        self._prefix = "" if tenant is None else f"{PREFIX}{tenant}:"

    @property
    def tenant(self) -> str | None:
        return self._tenant

    def check(self, items: Sequence[Item]) -> None:
        check_items(items)
        self._index.check([self._mark(item) for item in items])

    def upsert(self, items: Sequence[Item], vectors: Vectors) -> set[str]:
        check_items(items)
        if self._tenant is not None:
            self._census.note()
        new = self._index.upsert([self._mark(item) for item in items], vectors)
        return {id.removeprefix(self._prefix) for id in new}

    def delete(self, which: Sequence[str] | Filter) -> int:
        if isinstance(which, Sequence):
            return self._index.delete([self._inner(id) for id in check_ids(which) if self._may_be_ours(id)])
        return self._index.delete(self._only_ours(which))

    def search(
        self,
        vectors: Vectors,
        k: int,
        *,
        where: Filter | None = None,
        modality: Modality | None = None,
        exact: bool = True,
    ) -> list[list[Hit]]:
        found = self._index.search(vectors, k, where=self._narrow(where), modality=modality, exact=exact)
        return [self._own_hits(hits) for hits in found]

    def get(self, ids: Sequence[str], *, with_vectors: bool = False) -> dict[str, Stored]:
        wanted = [self._inner(id) for id in check_ids(ids) if self._may_be_ours(id)]
        found = self._index.get(wanted, with_vectors=with_vectors)
        own = (self._unmark(stored) for stored in found.values() if self._is_ours(stored))
        return {stored.id: stored for stored in own}

    def count(self, where: Filter | None = None) -> int:
        return self._index.count(self._narrow(where))

    def scan(self, where: Filter | None = None, *, with_vectors: bool = False) -> Iterator[Stored]:
        for stored in self._index.scan(self._narrow(where), with_vectors=with_vectors):
            if self._is_ours(stored):
                yield self._unmark(stored)

    def info(self) -> IndexInfo:
        """As the index's, with the tenant's own counts; the size in bytes, which is everybody's, is 0."""
        info = self._index.info()
        if self._tenant is None and not self._census.any():
            return replace(info, bytes=0)
        counts = {modality: self.count(Eq("modality", modality)) for modality in MODALITIES}
        return replace(info, counts={name: count for name, count in counts.items() if count}, bytes=0)

    def keep_background(self, background: Background) -> None:
        """Of the whole index: there is one for all tenants. What it scores in this view comes from this tenant's items alone."""
        self._index.keep_background(background)

    def background(self) -> Background | None:
        return self._index.background()

    def version(self) -> str:
        return self._index.version()

    def build_approximate(self) -> None:
        """Of the whole index: there is one for all tenants."""
        self._index.build_approximate()

    def close(self) -> None:
        """Nothing: the index is shared."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # On the way in

    def _mark(self, item: Item) -> Item:
        for name in OWN_FIELDS.intersection(item.fields):
            raise InputError(f"item {item.id!r} has a field called {name!r}, which the server keeps itself; rename it")
        id = check_id(item.id)
        if not self._may_be_ours(id):
            raise InputError(f"id {id[:80]!r} begins with {PREFIX!r}, which the server keeps for itself; rename it")
        fields = item.fields if self._tenant is None else {**item.fields, FIELD: self._tenant}
        return replace(item, id=self._inner(id), fields=fields)

    def _inner(self, id: str) -> str:
        most = MAX_ID_BYTES - len(self._prefix)
        if len(id.encode()) > most:
            raise InputError(f"id {id[:80]!r}... has {len(id.encode())} bytes, more than {most}; give a shorter one")
        return self._prefix + id

    def _may_be_ours(self, id: str) -> bool:
        """False for ids that would reach into a tenant from outside all tenants."""
        return self._tenant is not None or not id.startswith(PREFIX)

    def _only_ours(self, where: Filter | None) -> Filter:
        ours = Eq(FIELD, self._tenant)
        return ours if where is None else And((ours, self._translate(where)))

    def _narrow(self, where: Filter | None) -> Filter | None:
        """As `_only_ours`; no filter of our own, which is fastest, outside all tenants where the index knows of none."""
        if self._tenant is None and not self._census.any():
            return None if where is None else self._translate(where)
        return self._only_ours(where)

    def _translate(self, where: Filter) -> Filter:
        """The client's filter in terms of what is stored: ids prefixed, the server's own fields refused."""
        if isinstance(where, And):
            return And(tuple(self._translate(part) for part in where.parts))
        if where.name in OWN_FIELDS:
            raise InputError(f"{where.name!r} is no field of an item; the server keeps it for itself")
        if where.name != "id":
            return where
        if isinstance(where, Eq):
            return Eq("id", self._prefixed(where.value))
        if isinstance(where, In):
            return In("id", tuple(self._prefixed(value) for value in where.values))
        return Range("id", self._prefixed(where.low), self._prefixed(where.high))

    def _prefixed(self, value: T) -> T | str:
        return self._prefix + value if isinstance(value, str) else value

    # On the way out

    def _own_hits(self, hits: Sequence[Hit]) -> list[Hit]:
        own = [hit for hit in hits if self._is_ours(hit)]
        return [replace(self._unmark(hit), rank=rank) for rank, hit in enumerate(own, start=1)]

    def _is_ours(self, one: Stored | Hit) -> bool:
        if self._tenant is None:
            return FIELD not in one.fields and not one.id.startswith(PREFIX)
        return one.fields.get(FIELD) == self._tenant and one.id.startswith(self._prefix)

    def _unmark(self, one: K) -> K:
        fields = {name: value for name, value in one.fields.items() if name not in OWN_FIELDS}
        return replace(one, id=one.id[len(self._prefix) :], fields=fields)
