"""The embedded index: one SQLite file, whose vectors are loaded into memory when it is first searched.

Durability: write-ahead log with `synchronous=FULL`, so what a call wrote is on disk when it returns.
Processes: any number read while one writes; a second writer waits `timeout` seconds, then gets StoreError.
Threads: safe; database calls are serialised, the matrix products of searches run in parallel.
Consistency: an answer is what the index held at one moment, however often its items are replaced meanwhile.
Precision: `float32` storage is exact; `float16` halves file and memory and moves scores by up to about 0.001; `int8` stores
float32, keeps a quarter of it in memory, and scores what its codes propose exactly.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from threading import RLock
from typing import Final, Unpack

import numpy as np

from traceir.errors import InputError, StoreError
from traceir.index import sql, store
from traceir.index.facets import SAMPLE, Facet, facets_of, ordered
from traceir.index.filter_text import as_filter
from traceir.index.filters import Filter, Scalar, Where
from traceir.index.keywords import KeywordTable
from traceir.index.pages import Page
from traceir.index.sql import AMONG, FAULTS, Rows, compile_filter, read_counter, read_number, read_numbers, write_background
from traceir.index.store import Background, CheckedIndex, IndexInfo, Opening, OpenOptions, Stored, Vectors
from traceir.index.vectors import Lists, ResidentVectors, Snapshot, assign_lists, fit_lists, rescore, search_view
from traceir.index.walk import page_numbers
from traceir.index.words import KeywordQuery
from traceir.items import Hit, Item, Modality

FILE_NAME: Final = "index.sqlite"
COUNTED: Final = 200_000
"""Items whose facets are counted one by one."""
_TRIES: Final = 3
_PAUSE_S: Final = 0.001
"""Between two parts of a long write: a lock let go and taken at once would pass by those that wait for it."""
_Found = tuple[float, str, int]  # score, id, number
_IDS: Final = f"i.id {AMONG}"
_NOTE: Final = "note:"
_LOG: Final = logging.getLogger(__name__)


class SqliteIndex(CheckedIndex):
    """An `Index` in DIR/index.sqlite; made by `open_index`."""

    def __init__(self, folder: Path, **options: Unpack[OpenOptions]) -> None:
        self._shown, self._path, self._opening = str(folder), folder / FILE_NAME, Opening(**options)
        self._lock = RLock()
        self._closed = False
        with self._explained():
            self._connection = sql.connect(self._path, self._opening)
        try:
            with self._explained():
                if self._opening.create:
                    sql.create_tables(self._connection, self._path, self._opening)
                self._meta = sql.read_meta(self._connection, self._path)
            self._meta.check(self._shown, self._opening)
        except BaseException:
            self._connection.close()
            raise
        self._resident = ResidentVectors(self._connection, self._meta.dim, self._meta.dtype)
        self._keywords = KeywordTable(self._connection)

    def _write(self, items: Sequence[Item], unit: Vectors) -> set[str]:
        rows = [sql.row_of(item) for item in items]  # reads images, so before the lock
        ids = [row[0] for row in rows]
        stored = unit.astype("<f2" if self._meta.dtype == "float16" else "<f4")
        with self._transaction(write=True):
            there = dict(self._connection.execute(f"SELECT id, n FROM items WHERE id {AMONG}", [json.dumps(ids)]))
            self._remove(list(there.values()))
            first = 1 + read_number(self._connection, "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'items'")
            insert = self._connection.executemany
            insert(
                "INSERT INTO items (n, id, modality, text, image, fields, content_hash) VALUES (?, ?, ?, ?, ?, ?, ?)",
                ((n, *row) for n, row in enumerate(rows, start=first)),
            )
            insert("INSERT INTO vectors VALUES (?, ?)", ((n, v.tobytes()) for n, v in enumerate(stored, start=first)))
            insert("INSERT INTO fields (n, name, kind, value) VALUES (?, ?, ?, ?)", sql.field_rows(items, first))
            for modality, centroids in self._resident.centroids(read_counter(self._connection, "built")).items():
                own = np.flatnonzero([item.modality == modality for item in items])
                if len(own):
                    self._insert_lists(own + first, assign_lists(stored[own], centroids))
        return set(ids) - there.keys()

    def delete(self, which: Sequence[str] | Filter) -> int:
        if isinstance(which, Sequence):
            clause, values = _IDS, list[Scalar]([json.dumps(store.check_ids(which))])
        else:
            clause, values = compile_filter(as_filter(which))
        with self._transaction(write=True):
            numbers = read_numbers(self._connection, f"SELECT i.n FROM items i WHERE {clause}", values)
            return self._remove(numbers.tolist())

    def build_ann(self, cells: int | None = None, probes: int | None = None, seed: int = 0) -> None:
        """Group the vectors of each modality into IVF lists (`cells`), so that `search(exact=False)` works; earlier ones go.

        Defaults: 2 sqrt(N) lists, of which a search visits one in 16, at least 8 (`probes`). Later items are placed as they come;
        build again once an index has grown severalfold. Deterministic for equal contents and seed.
        """
        for name, value in (("cells", cells), ("probes", probes)):
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; give at least 1, or leave it out")
        views = {modality: view for modality, view in self._snapshot(None, False).views.items() if view.alive_N.any()}
        fitted = {modality: fit_lists(view, cells, seed) for modality, view in views.items()}
        most = max((len(centroids) for centroids, _ in fitted.values()), default=1)
        visits = probes or max(8, round(most / 16))
        with self._transaction(write=True):
            self._connection.execute("DELETE FROM cells")
            self._connection.execute("DELETE FROM centroids")
            for modality, (centroids, lists) in fitted.items():
                rows = ((modality, number, part.astype("<f4").tobytes()) for number, part in enumerate(centroids))
                self._connection.executemany("INSERT INTO centroids VALUES (?, ?, ?)", rows)
                self._insert_lists(views[modality].numbers_N, lists)
            self._connection.execute("DELETE FROM cells WHERE n NOT IN (SELECT n FROM items)")
            self._connection.execute("INSERT OR REPLACE INTO meta VALUES ('probes', ?)", (str(visits),))
            self._bump("built")

    def _find(self, queries: Vectors, k: int, where: Filter | None, modality: Modality | None, exact: bool) -> list[list[Hit]]:
        """Searched exactly all the same: a modality that had no items at `build_ann`, and a batch for which that is faster."""

        def look() -> list[list[Hit]] | None:
            best = self._best(self._snapshot(where, not exact), queries, k, modality, exact)
            return None if best is None else self._read_hits(best)

        for _ in range(_TRIES):
            if (hits := look()) is not None:
                return hits
        with self._transaction():  # writers came between every time: make them wait, and search and read in one transaction
            hits = look()
        if hits is None:
            raise StoreError(f"items of index {self._shown} were removed by another program than TraceIR; open the index again")
        return hits

    def get(self, ids: Sequence[str], *, with_vectors: bool = False) -> dict[str, Stored]:
        rows = self._select(_IDS, [json.dumps(store.check_ids(ids))], with_vectors)
        kept = {stored.id: stored for _, stored in rows}
        return {id: kept[id] for id in ids if id in kept}

    def _find_words(self, words: KeywordQuery, k: int, where: Filter | None, modality: Modality | None) -> list[Hit]:
        self._catch_up()
        with self._transaction():
            best = self._keywords.search(words, k, where, modality)
            rows = dict(self._select(f"i.n {AMONG}", [json.dumps([n for _, n in best])], False))
            return [rows[n].hit(score, rank) for rank, (score, n) in enumerate(best, start=1)]

    def _catch_up(self) -> None:
        """Bring the keyword table up to the items. Where another process is writing, what was there before is searched."""
        while True:
            with self._transaction():
                if not self._keywords.is_behind():
                    return
                usable = self._keywords.state().whole
            try:
                with self._transaction(write=True):
                    self._keywords.catch_up()
            except StoreError as error:
                if not usable or not isinstance(error.__cause__, sqlite3.OperationalError):
                    raise
                _LOG.warning("keyword search leaves out what was added to index %s last: %s", self._shown, error)
                return
            time.sleep(_PAUSE_S)

    def _page_of(self, where: Filter | None, page: Page) -> list[Stored]:
        with self._transaction():
            numbers = page_numbers(self._connection, where, page)
            rows = dict(self._select(f"i.n {AMONG}", [json.dumps(numbers)], False))
            return [rows[n] for n in numbers]

    def count(self, where: Where = None) -> int:
        clause, values = compile_filter(as_filter(where))
        with self._transaction():
            return read_number(self._connection, f"SELECT count(*) FROM items i WHERE {clause}", values)

    def scan(self, where: Where = None, *, with_vectors: bool = False) -> Iterator[Stored]:
        clause, values = compile_filter(as_filter(where))
        after = ""
        while page := self._select(f"i.id > ? AND ({clause}) ORDER BY i.id LIMIT {sql.CHUNK}", [after, *values], with_vectors):
            yield from (stored for _, stored in page)
            after = page[-1][1].id

    def facets(self, where: Where = None, *, limit: int) -> list[Facet]:
        """Exact up to COUNTED items; of more, by items spread evenly over the order in which they came."""
        if (total := self.count(read := as_filter(where))) > COUNTED:
            clause, values = compile_filter(read)
            with self._transaction():
                last = read_number(self._connection, "SELECT max(n) FROM items")
            spread = json.dumps(list(range(last, 0, -max(1, last // SAMPLE))))
            rows = self._select(f"i.n {AMONG} AND ({clause})", [spread, *values], False)
            return facets_of(((item.id, item.fields) for _, item in rows), limit, total)
        counted, facets = sql.count_facets(self._connection, read, limit), list[Facet]()
        while True:  # others may search between two fields
            with self._transaction():
                if (facet := next(counted, None)) is None:
                    return ordered(facets)
            facets.append(facet)

    def info(self) -> IndexInfo:
        with self._transaction():
            counts = self._connection.execute("SELECT modality, count(*) FROM items GROUP BY modality").fetchall()
            source, _, background = sql.describe_background(self._connection)
            return IndexInfo(
                **asdict(self._meta),
                uri=self._shown,
                counts=dict(counts),
                cells=read_number(self._connection, "SELECT count(*) FROM centroids"),
                probes=read_counter(self._connection, "probes"),
                bytes=store.size_of(self._path.with_name(FILE_NAME + ending) for ending in ("", "-wal")),
                background=background,
                background_source=source,
            )

    def keep_background(self, background: Background) -> None:
        checked = store.check_background(background, self._meta.dim)
        with self._transaction(write=True):
            write_background(self._connection, checked)
            self._bump("calibrated")

    def background(self) -> Background | None:
        with self._transaction():
            return sql.read_background(self._connection, self._meta.dim)

    def _keep_note(self, name: str, value: str) -> None:
        with self._transaction(write=True):
            self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"{_NOTE}{name}", value))

    def note(self, name: str) -> str | None:
        with self._transaction():
            row = self._connection.execute("SELECT value FROM meta WHERE name = ?", (_NOTE + store.check_note(name),)).fetchone()
            return None if row is None else str(row[0])

    def version(self) -> str:
        with self._transaction():
            counters = (read_counter(self._connection, name) for name in ("deletions", "calibrated"))
            return ".".join(map(str, (read_number(self._connection, "SELECT max(n) FROM items"), *counters)))

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._resident.forget()
                self._connection.close()

    # Steps of a search

    def _snapshot(self, where: Filter | None, centroids: bool) -> Snapshot:
        with self._transaction():
            return self._resident.snapshot(where, centroids)

    def _best(
        self, snapshot: Snapshot, queries: Vectors, k: int, modality: Modality | None, exact: bool
    ) -> list[list[_Found]] | None:
        """For each query its best k, best first, equal scores in order of id; None where a row has been removed meanwhile."""
        if not exact and not snapshot.probes:
            what = f"index {self._shown} has no IVF lists for approximate search"
            raise StoreError(f"{what}; call build_ann() once, or search with exact=True")
        ranked: list[list[_Found]] = [[] for _ in queries]
        for name, view in snapshot.views.items():
            if not len(view) or modality not in (None, name):
                continue
            most = min(k, len(view))
            rows_of = search_view(view, queries, most, snapshot.passing, snapshot.centroids.get(name), snapshot.probes)
            for query, rows, best in zip(queries, rows_of, ranked, strict=True):
                with self._transaction() if not view.codec.exact else nullcontext():
                    vectors = self._resident.exact_vectors(view, rows)
                if vectors is None:
                    return None
                scores = rescore(vectors, query)
                if len(rows) > most:  # ties beyond k are kept, to be ordered by id
                    kept = np.flatnonzero(scores >= np.partition(scores, -most)[-most])
                    rows, scores = rows[kept], scores[kept]
                best += zip(scores.tolist(), [view.ids[row] for row in rows], view.numbers_N[rows].tolist(), strict=True)
        return [sorted(best, key=lambda hit: (-hit[0], hit[1]))[:k] for best in ranked]

    def _read_hits(self, best: list[list[_Found]]) -> list[list[Hit]] | None:
        """What was found with its texts and fields; None where any of it was replaced or deleted meanwhile."""
        wanted = {number for own in best for _, _, number in own}
        rows = dict(self._select(f"i.n {AMONG}", [json.dumps(sorted(wanted))], False))
        if len(rows) < len(wanted):
            return None
        return [[rows[number].hit(score, rank) for rank, (score, _, number) in enumerate(own, start=1)] for own in best]

    # Steps of a write

    def _remove(self, numbers: Sequence[int]) -> int:
        for table in ("items", "vectors", "fields", "cells"):
            self._connection.executemany(f"DELETE FROM {table} WHERE n = ?", ((n,) for n in numbers))
        if numbers:
            self._bump("deletions")
            self._resident.note_removal(np.asarray(numbers, dtype=np.int64))
        return len(numbers)

    def _insert_lists(self, numbers: Rows, lists: Lists) -> None:
        pairs = zip(numbers.tolist(), lists.tolist(), strict=True)
        self._connection.executemany("INSERT INTO cells VALUES (?, ?)", pairs)

    # The database

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except FAULTS as error:
            raise sql.explain_error(error, self._path, self._opening.timeout) from error

    @contextmanager
    def _transaction(self, write: bool = False) -> Iterator[None]:
        """The lock, and a transaction; within one of the same thread, that one goes on."""
        with self._lock:
            if self._closed:
                raise StoreError(f"index {self._shown} is closed; open it again")
            if self._connection.in_transaction:
                yield
                return
            try:
                with self._explained():
                    self._connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                    yield
                    self._connection.execute("COMMIT")
            except BaseException:
                self._resident.removed = []  # it is there again
                raise
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    def _select(self, clause: str, values: Sequence[Scalar], with_vectors: bool) -> list[tuple[int, Stored]]:
        column, join = ("v.vector", "LEFT JOIN vectors v ON v.n = i.n") if with_vectors else ("NULL", "")
        with self._transaction():
            rows = self._connection.execute(
                f"SELECT {sql.COLUMNS}, {column} FROM items i {join} WHERE {clause}", values
            ).fetchall()
            vectors = self._resident.vectors_of([row[1] for row in rows], [row[7] for row in rows]) if with_vectors else None
            return [
                (row[0], store.stored_of(*row[1:7], vector=None if vectors is None else vectors[at]))
                for at, row in enumerate(rows)
            ]

    def _bump(self, name: str) -> None:
        raised = str(read_counter(self._connection, name) + 1)
        self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, raised))
