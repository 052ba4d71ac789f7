"""What the server's callers see of an index: its own fields are hidden, and tenants kept apart.

An item of tenant `acme` called `cup` is stored as `_tenant:acme:cup` with the field `_tenant` = `acme`: the prefix separates
get and delete by id, the field all that filters. Results are checked again, so that a wrong filter can only show too little.
BM25 goes by how rare a word is, which in the whole index would tell of the words of others: a tenant's matches are scored anew by
its own items alone (of more than MATCHES, those that are best in the whole index).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from traceir.collection.sources import FILE_FIELD, STAT_FIELD
from traceir.errors import InputError
from traceir.index.facets import Facet
from traceir.index.filter_text import as_filter
from traceir.index.filters import And, Eq, Filter, Glob, In, Leaf, Range, Where, map_leaves
from traceir.index.pages import Position, check_page
from traceir.index.store import MAX_ID_BYTES, Index, IndexInfo, Stored, Vectors, check_id, check_ids, check_items, check_search
from traceir.index.words import WEIGHTS, SearchTerm, columns_of, parse_words
from traceir.items import MODALITIES, Hit, Item, Modality

FIELD: Final = "_tenant"
OWN_FIELDS: Final = frozenset({FIELD, FILE_FIELD, STAT_FIELD})  # that no caller may set, ask for, or see
PREFIX: Final = "_tenant:"  # what ids of tenants begin with; no other id may
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
MATCHES: Final = 2_000
_K1: Final = 1.2
_B: Final = 0.75
T = TypeVar("T")
K = TypeVar("K", Stored, Hit)


def check_tenant(name: str) -> str:
    """The name of a tenant, or InputError where it is unusable."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"tenant {str(name)[:80]!r} is unusable; give 1 to 63 small letters, digits, dashes or underscores")
    return name


def check_name(name: str) -> None:
    """Raises InputError for a field that the server keeps for itself."""
    if name in OWN_FIELDS:
        raise InputError(f"{name!r} is no field of an item; the server keeps it for itself")


@dataclass(slots=True)
class TenantPresence:
    """Whether an index holds items of any tenant, as far as this server knows; where not, those without one need no filter."""

    index: Index
    known: bool | None = None

    def any(self) -> bool:
        if self.known is None:
            self.known = self.index.count(Range(FIELD, low="")) > 0
        return self.known


class TenantIndex:
    """The part of an index that belongs to one tenant, as an `Index` of its own; None: what belongs to no tenant.

    Closing it does not close the index; background and approximate search are those of the whole index.
    """

    def __init__(self, index: Index, tenant: str | None, presence: TenantPresence | None = None) -> None:
        self._index, self._presence = index, presence or TenantPresence(index)
        self.tenant = None if tenant is None else check_tenant(tenant)
        self._prefix = "" if tenant is None else f"{PREFIX}{tenant}:"
        self.keep_background, self.background = index.keep_background, index.background
        self.version, self.build_ann = index.version, index.build_ann

    def check(self, items: Sequence[Item]) -> None:
        self._index.check(self._marked(items))

    def upsert(self, items: Sequence[Item], vectors: Vectors) -> set[str]:
        marked = self._marked(items)
        if self.tenant is not None:
            self._presence.known = True
        return {id.removeprefix(self._prefix) for id in self._index.upsert(marked, vectors)}

    def delete(self, which: Sequence[str] | Filter) -> int:
        return self._index.delete(self._inner_ids(which) if isinstance(which, Sequence) else self._only_ours(which))

    def search(
        self,
        vectors: Vectors,
        k: int,
        *,
        where: Where = None,
        modality: Modality | None = None,
        exact: bool = True,
    ) -> list[list[Hit]]:
        rows = self._index.search(vectors, k, where=self._narrow(where), modality=modality, exact=exact)
        return [[replace(hit, rank=rank) for rank, hit in enumerate(self._shown(hits), start=1)] for hits in rows]

    def search_keywords(self, text: str, k: int, *, where: Where = None, modality: Modality | None = None) -> list[Hit]:
        check_search(k, modality)
        alone = self.tenant is None and not self._presence.any()
        depth = k if alone else max(k, MATCHES)
        hits = list(self._shown(self._index.search_keywords(text, depth, where=self._narrow(where), modality=modality)))
        if not alone and hits:
            words = parse_words(text)
            hits = score_alone(hits, (*words.required, *words.wanted), self.count())[:k]
        return [replace(hit, rank=rank) for rank, hit in enumerate(hits, start=1)]

    def browse(self, where: Where = None, *, sort: str = "id", after: Position | None = None, limit: int) -> list[Stored]:
        page = check_page(sort, after, limit)
        check_name(page.name)
        last = None if page.after is None else (page.after[0], self._prefix + page.after[1])
        return list(self._shown(self._index.browse(self._narrow(where), sort=sort, after=last, limit=limit)))

    def get(self, ids: Sequence[str], *, with_vectors: bool = False) -> dict[str, Stored]:
        stored = self._index.get(self._inner_ids(ids), with_vectors=with_vectors).values()
        return {item.id: item for item in self._shown(stored)}

    def count(self, where: Where = None) -> int:
        return self._index.count(self._narrow(where))

    def scan(self, where: Where = None, *, with_vectors: bool = False) -> Iterator[Stored]:
        return self._shown(self._index.scan(self._narrow(where), with_vectors=with_vectors))

    def facets(self, where: Where = None, *, limit: int) -> list[Facet]:
        """As the index's, without the server's own fields and as the tenant knows its folders."""
        facets = [facet for facet in self._index.facets(self._narrow(where), limit=limit) if facet.name not in OWN_FIELDS]
        return [facet if facet.kind != "folder" else self._own_folders(facet) for facet in facets]

    def _own_folders(self, facet: Facet) -> Facet:
        low, high, *names = (str(name).removeprefix(self._prefix) for name in (facet.low, facet.high, *dict(facet.values)))
        return replace(facet, low=low, high=high, values=tuple(zip(names, dict(facet.values).values(), strict=True)))

    def keep_note(self, name: str, value: str) -> None:
        raise InputError(f"note {name!r} cannot be kept here; notes are of the whole index")

    def note(self, name: str) -> str | None:
        """None: notes are of the whole index."""

    def info(self) -> IndexInfo:
        """As the index's, with the tenant's own counts; the size in bytes, which is everybody's, is 0."""
        info = replace(self._index.info(), bytes=0)
        if self.tenant is None and not self._presence.any():
            return info
        counts = {modality: self.count(Eq("modality", modality)) for modality in MODALITIES}
        return replace(info, counts={name: count for name, count in counts.items() if count})

    def close(self) -> None:
        """Nothing: the index is shared."""

    __enter__, __exit__ = Index.__enter__, Index.__exit__

    # On the way in

    def _marked(self, items: Sequence[Item]) -> list[Item]:
        check_items(items)
        own = {} if self.tenant is None else {FIELD: self.tenant}
        for item in items:
            for name in OWN_FIELDS.intersection(item.fields):
                raise InputError(f"item {item.id!r} has a field called {name!r}, which the server keeps itself; rename it")
            if not self._may_be_ours(check_id(item.id)):
                raise InputError(f"id {str(item.id)[:80]!r} begins with {PREFIX!r}, which the server keeps for itself; rename it")
        return [replace(item, id=self._inner(check_id(item.id)), fields={**item.fields, **own}) for item in items]

    def _inner_ids(self, ids: Sequence[str]) -> list[str]:
        return [self._inner(id) for id in check_ids(ids) if self._may_be_ours(id)]

    def _inner(self, id: str) -> str:
        most = MAX_ID_BYTES - len(self._prefix)
        if len(id.encode()) > most:
            raise InputError(f"id {id[:80]!r}... has {len(id.encode())} bytes, more than {most}; give a shorter one")
        return self._prefix + id

    def _may_be_ours(self, id: str) -> bool:
        """False for ids that would reach into a tenant from outside all tenants."""
        return self.tenant is not None or not id.startswith(PREFIX)

    def _narrow(self, where: Where) -> Filter | None:
        """As `_only_ours`; no filter of our own, which is fastest, outside all tenants where the index knows of none."""
        if self.tenant is None and not self._presence.any():
            read = as_filter(where)
            return None if read is None else map_leaves(read, self._translate)
        return self._only_ours(where)

    def _only_ours(self, where: Where) -> Filter:
        ours, read = Eq(FIELD, self.tenant), as_filter(where)
        return ours if read is None else And((ours, map_leaves(read, self._translate)))

    def _translate(self, leaf: Leaf) -> Leaf:
        """The client's condition in terms of what is stored: ids prefixed, the server's own fields refused."""
        check_name(leaf.name)
        if leaf.name != "id":
            return leaf
        if isinstance(leaf, Eq):
            return Eq("id", self._prefixed(leaf.value))
        if isinstance(leaf, In):
            return In("id", tuple(self._prefixed(value) for value in leaf.values))
        if isinstance(leaf, Glob):
            return Glob("id", self._prefix + leaf.pattern)
        return Range("id", *map(self._prefixed, (leaf.low, leaf.high, leaf.above, leaf.below)))

    def _prefixed(self, value: T) -> T | str:
        return self._prefix + value if isinstance(value, str) else value

    # On the way out

    def _shown(self, stored: Iterable[K]) -> Iterator[K]:
        """What of it is this tenant's, as the tenant knows it."""
        for item in stored:
            outside = FIELD not in item.fields and not item.id.startswith(PREFIX)
            if outside if self.tenant is None else item.fields.get(FIELD) == self.tenant and item.id.startswith(self._prefix):
                fields = {name: value for name, value in item.fields.items() if name not in OWN_FIELDS}
                yield replace(item, id=item.id[len(self._prefix) :], fields=fields)


def score_alone(hits: Sequence[Hit], terms: Sequence[SearchTerm], count: int) -> list[Hit]:
    """The hits by BM25, best first, as if an index held nothing but `count` items, of which these are all that match."""
    columns = [columns_of(hit.id, hit.text, hit.fields) for hit in hits]
    counts = [
        [sum(weight * occurrences(term, words) for weight, words in zip(WEIGHTS, own, strict=True)) for term in terms]
        for own in columns
    ]
    lengths = [sum(map(len, own)) for own in columns]
    mean = sum(lengths) / len(lengths)
    rare = [
        max(1e-6, math.log((count - having + 0.5) / (having + 0.5))) if count >= having else 1e-6
        for having in (sum(1 for own in counts if own[at]) for at in range(len(terms)))
    ]
    scored = []
    for hit, own, length in zip(hits, counts, lengths, strict=True):
        norm = _K1 * (1 - _B + _B * length / (mean or 1.0))
        scored.append(replace(hit, score=sum(idf * tf * (_K1 + 1) / (tf + norm) for idf, tf in zip(rare, own, strict=True))))
    return sorted(scored, key=lambda hit: (-hit.score, hit.id))


def occurrences(term: SearchTerm, words: Sequence[str]) -> int:
    size = len(term.words)
    return sum(term.is_in(words[start : start + size]) for start in range(len(words) - size + 1))
