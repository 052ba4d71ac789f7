"""The distributed index: Milvus, as a server or a cluster (http://HOST:19530/NAME) or as a local file (milvus-lite:./FILE.db).

One collection holds the items and is searched exactly (a FLAT index); the scores of its best are computed again here, in float64,
so hits, scores and ties are those of the embedded index. `build_approximate` adds one collection a modality with an HNSW graph:
queries and candidates of different modalities lie apart, and a shared graph loses neighbours across that gap. A graph only
proposes ids. What is returned comes from the first collection, so a graph that lags behind costs recall, never truth.

Durability: Milvus Lite is flushed to disk before a call returns; a server answers once the call is in its log.
Processes: a file belongs to one process until it ends; a server takes any number of readers, Milvus Lite's one writer.
Threads: safe; writes of one handle take turns.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any, Final, Self, cast

import numpy as np

from traceir.errors import InputError, StoreError
from traceir.index.filters import Filter, matches
from traceir.index.matrix import margin, rescore
from traceir.index.milvus_rows import (
    compile_filter,
    filter_columns,
    graph_row,
    id_of,
    join_filters,
    key_of,
    row_bytes,
    row_of,
    stored_of,
)
from traceir.index.milvus_server import EFFORT, MOST_HITS, PAGE, Collections, Place, Row, describe_new
from traceir.index.store import (
    Background,
    IndexInfo,
    Stored,
    StoredType,
    Vectors,
    check_background,
    check_ids,
    check_items,
    check_maker,
    check_search,
    check_vectors,
    rows_not_unit,
    size_of,
    unusable,
)
from traceir.items import MODALITIES, Hit, Item, Modality, Vector

MAX_REQUEST_BYTES: Final = 60 * 2**20  # Milvus takes 64 MB
_TRIES: Final = 5
_Found = list[tuple[float, Stored]]


class MilvusIndex:
    """An `Index` in a Milvus collection; made by `open_index`."""

    def __init__(
        self,
        place: Place,
        *,
        fingerprint: str | None,
        prompt_version: str | None,
        dim: int | None = None,
        create: bool = False,
        dtype: StoredType = "float32",
        timeout: float = 10.0,
    ) -> None:
        self._place = place
        self._has_maker = fingerprint is not None
        self._writing = RLock()
        self._writes = 0
        new = (lambda: describe_new(place, fingerprint, prompt_version, dim, dtype)) if create else None
        self._collections = Collections(place, create=new, timeout=timeout)
        self._maker = self._collections.maker
        try:
            check_maker(place.shown, "model", self._maker.fingerprint, fingerprint)
            check_maker(place.shown, "prompt version", self._maker.prompt_version, prompt_version)
            if dim is not None and dim != self._maker.dim:
                raise StoreError(f"index {place.shown} holds vectors of width {self._maker.dim}, not {dim}; use the same encoder")
        except BaseException:
            self._collections.close()
            raise

    def check(self, items: Sequence[Item]) -> None:
        check_items(items)
        blank = np.zeros(self._maker.dim, dtype=np.float32)
        for item in items:
            row_of(item, blank)

    def upsert(self, items: Sequence[Item], vectors: Vectors) -> set[str]:
        """As `Index.upsert`; one request holds all items, so a call of more than MAX_REQUEST_BYTES is refused (InputError).

        Which ids were new is exact among the writes of this handle; another process may write between the look and the write.
        """
        self._need_maker("add to")
        check_items(items)
        unit = check_vectors(vectors, len(items), self._maker.dim, [item.id for item in items])
        rows = [row_of(item, vector) for item, vector in zip(items, unit, strict=True)]
        _check_size(rows)
        if not rows:
            return set()
        keys = [row["key"] for row in rows]
        with self._writing, self._collections.explained("add to it"):
            new = set(keys).difference(self._collections.keys_of(keys))
            blank = self._collections.blank_columns(keys)
            rows = [{**blank.get(row["key"], {}), **row} for row in rows]
            for modality, name in self._collections.graphs().items():
                if own := [graph_row(row) for row in rows if row["modality"] == modality]:
                    self._collections.upsert(name, own)
            self._collections.upsert(self._place.name, rows)
            self._collections.flush()
            self._writes += 1
        return {id_of(key) for key in new}

    def delete(self, which: Sequence[str] | Filter) -> int:
        """As `Index.delete`; more than 1000 items go in several requests."""
        if isinstance(which, Sequence):
            wanted = [key_of(id) for id in dict.fromkeys(check_ids(which))]
            find = partial(self._collections.keys_of, wanted)
        else:
            find = partial(self._collections.keys, compile_filter(which))
        with self._writing, self._collections.explained("delete from it"):
            keys = find()
            if keys:
                self._collections.delete(keys)
                self._collections.flush()
                self._writes += 1
        return len(keys)

    def build_approximate(self) -> None:
        """Make a graph of each modality, so that `search(exact=False)` works; returns when they are built.

        Earlier graphs are dropped first. Later items are placed as they come.
        What other processes write meanwhile may be missing from the graphs: let none.
        """
        with self._writing, self._collections.explained("build its graphs"):
            self._collections.drop_graphs()
            for modality in MODALITIES:
                if self._collections.count(_of_modality(modality)):
                    self._collections.build_graph(modality, self._graph_pages(modality))

    def search(
        self,
        vectors: Vectors,
        k: int,
        *,
        where: Filter | None = None,
        modality: Modality | None = None,
        exact: bool = True,
    ) -> list[list[Hit]]:
        """As `Index.search`; where the graphs find few rows, as under a filter that few pass, a query is searched exactly."""
        self._need_maker("search")
        check_search(k, modality)
        queries = check_vectors(vectors, None, self._maker.dim)
        asked = _Asked(k, where, modality)
        with self._collections.explained("search it"):
            if exact:
                found = self._search_exactly(queries, asked)
            else:
                found, few = self._search_graphs(queries, asked)
                for row, best in zip(few, self._search_exactly(queries[few], asked), strict=True):
                    found[row] = best
        return [[_hit(stored, score, rank) for rank, (score, stored) in enumerate(best, start=1)] for best in found]

    def get(self, ids: Sequence[str], *, with_vectors: bool = False) -> dict[str, Stored]:
        keys = [key_of(id) for id in dict.fromkeys(check_ids(ids))]
        with self._collections.explained("read it"):
            rows = self._collections.fetch(keys, with_vectors)
            return {id_of(key): stored_of(rows[key].columns, rows[key].vector) for key in keys if key in rows}

    def count(self, where: Filter | None = None) -> int:
        expression = compile_filter(where)
        with self._collections.explained("count in it"):
            return self._collections.count(expression)

    def scan(self, where: Filter | None = None, *, with_vectors: bool = False) -> Iterator[Stored]:
        expression = compile_filter(where)
        with self._collections.explained("read it"):
            for row in self._collections.iterate(expression, with_vectors):
                yield stored_of(row.columns, row.vector)

    def info(self) -> IndexInfo:
        """As `Index.info`; `cells` is the number of graphs, `probes` their effort; `bytes` is 0 on a server."""
        with self._collections.explained("describe it"):
            counts = {modality: self._collections.count(_of_modality(modality)) for modality in MODALITIES}
            graphs = len(self._collections.graphs())
            source, _, background = self._collections.describe_background()
        file = self._place.file
        return IndexInfo(
            **asdict(self._maker),
            uri=self._place.shown,
            counts={modality: count for modality, count in counts.items() if count},
            cells=graphs,
            probes=EFFORT if graphs else 0,
            bytes=0 if file is None else size_of(Path(folder, name) for folder, _, names in os.walk(file) for name in names),
            background=background,
            background_source=source,
        )

    def keep_background(self, background: Background) -> None:
        """As `Index.keep_background`, in a collection of its own; where it is cut off the index is not calibrated any more."""
        checked = check_background(background, self._maker.dim)
        with self._writing, self._collections.explained("keep a background in it"):
            self._collections.write_background(checked)
            self._writes += 1

    def background(self) -> Background | None:
        with self._collections.explained("read its background"):
            return self._collections.read_background()

    def version(self) -> str:
        """As `Index.version`; what other processes replace is noticed once the number of items changes."""
        with self._collections.explained("count in it"):
            _, created, _ = self._collections.describe_background()
            return f"{self._collections.count('')}.{self._writes}.{created}"

    def close(self) -> None:
        """Close the connection. Milvus Lite keeps its file to this process until the process ends."""
        with self._writing:
            self._collections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # Steps of a search

    def _search_exactly(self, queries: Vectors, asked: _Asked) -> list[_Found]:
        best: list[_Found] = []
        for _ in range(_TRIES if len(queries) else 0):
            best, lost = self._try_exactly(queries, asked)
            if not lost:
                break  # otherwise a hit was replaced or deleted meanwhile: look again
        return best

    def _try_exactly(self, queries: Vectors, asked: _Asked) -> tuple[list[_Found], bool]:
        """The best of each query, and whether a row had gone between being found and being fetched."""
        keys: dict[int, list[str]] = {}
        rows: dict[str, Row] = {}
        limit = max(2 * asked.k, asked.k + 16) if asked.k >= MOST_HITS else min(MOST_HITS, max(2 * asked.k, asked.k + 16))
        todo = list(range(len(queries)))
        while todo and limit <= MOST_HITS:
            answers, read = self._collections.ask(self._place.name, queries[todo], limit, asked.expression)
            rows |= read
            for row, answer in zip(todo, answers, strict=True):
                promising = _promising(answer, asked.k, limit, self._slack())
                if promising is not None:
                    keys[row] = promising
            todo = [row for row in todo if row not in keys]
            limit = 8 * limit if limit == MOST_HITS else min(8 * limit, MOST_HITS)
        wanted = {key for own in keys.values() for key in own}
        rows |= self._collections.fetch(sorted(wanted - rows.keys()), True)
        usable = {key: rows[key] for key in wanted & rows.keys() if asked.takes(rows[key])}
        best = [
            _rank(query, [usable[key] for key in keys.get(row, ()) if key in usable], asked.k)
            for row, query in enumerate(queries)
        ]
        for row in todo:
            best[row] = self._compare_all(queries[row], asked)
        return best, len(usable) < len(wanted)

    def _search_graphs(self, queries: Vectors, asked: _Asked) -> tuple[list[_Found], list[int]]:
        """The best of each query that the graphs propose, and the queries for which they ran out of rows."""
        graphs = self._collections.graphs()
        if not graphs:
            raise StoreError(
                f"index {self._place.shown} has no graph for approximate search; "
                "call build_approximate() once, or search with exact=True"
            )
        keys: list[set[str]] = [set() for _ in queries]
        limit = min(MOST_HITS, max(2 * asked.k, asked.k + 16))
        for modality, name in graphs.items():
            if asked.modality in (None, modality) and len(queries):
                answers, _ = self._collections.ask(name, queries, limit, compile_filter(asked.where))
                for own, answer in zip(keys, answers, strict=True):
                    own |= {key for key, _ in answer}
        rows = self._collections.fetch(sorted({key for own in keys for key in own}), True)
        usable = {key: row for key, row in rows.items() if asked.takes(row)}
        own_rows = [[usable[key] for key in own & usable.keys()] for own in keys]
        found = [_rank(query, own, asked.k) for query, own in zip(queries, own_rows, strict=True)]
        return found, [row for row, own in enumerate(own_rows) if len(keys[row]) < limit or len(own) < asked.k]

    def _compare_all(self, query: Vector, asked: _Asked) -> _Found:
        """The best of a query by reading every vector: for a larger k, or more equal scores, than Milvus returns."""
        best: _Found = []
        rows = self._collections.iterate(asked.expression, True)
        while page := list(islice(rows, PAGE)):
            best = _first(best + _rank(query, page, asked.k), asked.k)
        return best

    def _slack(self) -> float:
        """More than twice what the server's scores and ours can differ by; float16 also rounds the query it compares with."""
        return margin(self._maker.dim) + (2.0**-9 if self._maker.dtype == "float16" else 0.0)

    def _graph_pages(self, modality: Modality) -> Iterator[list[dict[str, Any]]]:
        rows = self._collections.iterate(_of_modality(modality), True)
        while page := list(islice(rows, PAGE)):
            kept = [(row, stored_of(row.columns, None).fields) for row in page]
            yield [{"key": row.columns["key"], **filter_columns(fields), "vector": row.vector} for row, fields in kept]

    def _need_maker(self, action: str) -> None:
        if not self._has_maker:
            raise StoreError(
                f"index {self._place.shown} was opened without a model, only to look at it; "
                f"to {action} it, open it with the fingerprint of the model in use"
            )


class _Asked:
    """What a search asks for beside its vectors."""

    def __init__(self, k: int, where: Filter | None, modality: Modality | None) -> None:
        self.k, self.where, self.modality = k, where, modality
        self.expression = join_filters(compile_filter(where), _of_modality(modality) if modality else "")

    def takes(self, row: Row) -> bool:
        """Whether a row, which may have changed since it was found, still passes."""
        stored = stored_of(row.columns, None)
        if self.modality not in (None, stored.modality):
            return False
        return self.where is None or matches(self.where, stored.id, stored.modality, stored.fields)


def _check_size(rows: Sequence[dict[str, Any]]) -> None:
    total = sum(row_bytes(row) for row in rows)
    if total > MAX_REQUEST_BYTES:
        raise InputError(
            f"{len(rows)} items make a request of {total / 2**20:.0f} MB, more than {MAX_REQUEST_BYTES / 2**20:.0f}; nothing was "
            f"written: give at most {max(1, int(0.9 * len(rows) * MAX_REQUEST_BYTES / total))} such items a call"
        )


def _of_modality(modality: Modality) -> str:
    return f'modality in ["{modality}"]'


def _promising(answer: Sequence[tuple[str, float]], k: int, limit: int, slack: float) -> list[str] | None:
    """The keys that can be among the best k; None where rows that the limit cut off could be."""
    if len(answer) <= k and len(answer) < limit:
        return [key for key, _ in answer]
    scores = sorted((score for _, score in answer), reverse=True)
    floor = scores[k - 1] - slack
    if len(answer) >= limit and scores[-1] >= floor:
        return None
    return [key for key, score in answer if not score < floor]  # NaN too, which is then found out


def _rank(query: Vector, rows: Sequence[Row], k: int) -> _Found:
    if not rows:
        return []
    vectors = np.stack([cast(Vector, row.vector) for row in rows])
    if broken := rows_not_unit(vectors):
        raise unusable([id_of(rows[row].columns["key"]) for row in broken])
    scores = rescore(vectors, query)
    return _first([(float(score), stored_of(row.columns, None)) for score, row in zip(scores, rows, strict=True)], k)


def _first(found: _Found, k: int) -> _Found:
    return sorted(found, key=lambda pair: (-pair[0], pair[1].id))[:k]


def _hit(stored: Stored, score: float, rank: int) -> Hit:
    return Hit(stored.id, score, rank, stored.modality, stored.text, stored.image, stored.fields)
