"""The embedded index: one SQLite file, loaded into one matrix a modality when it is first searched.

Durability: write-ahead log with `synchronous=FULL`, so what a call wrote is on disk when it returns.
Processes: any number read while one writes; a second writer waits `timeout` seconds, then gets StoreError.
Threads: safe; database calls take turns, the products of a search run beside others.
Moments: an answer is what the index held at one moment, however often its items are replaced meanwhile.
Precision: `float32` storage is exact; `float16` halves file and memory and moves scores by up to about 0.001.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Final, Self, TypeVar, cast

import numpy as np

from traceir.errors import InputError, StoreError
from traceir.index.cells import (
    assign_cells,
    default_cells,
    default_probes,
    exact_is_cheaper,
    fit_centroids,
    rows_of_nearest_cells,
)
from traceir.index.filters import Filter, Scalar
from traceir.index.matrix import Cells, Matrix, Rows, Shard, exact_rows, promising_rows, rescore
from traceir.index.resident import Resident, Snapshot
from traceir.index.sql import (
    CHUNK,
    COLUMNS,
    FAULTS,
    FORMAT,
    compile_filter,
    connect,
    create_tables,
    describe_background,
    explain_error,
    field_rows,
    marks,
    read_background,
    read_counter,
    read_meta,
    read_number,
    read_numbers,
    row_of,
    write_background,
)
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
    size_of,
    stored_of,
)
from traceir.items import Hit, Item, Modality, Vector

FILE_NAME: Final = "index.sqlite"
_TRIES: Final = 3
_Found = tuple[float, str, int]  # score, id, number
T = TypeVar("T")


class SqliteIndex:
    """An `Index` in DIR/index.sqlite; made by `open_index`."""

    def __init__(
        self,
        folder: Path,
        *,
        fingerprint: str | None,
        prompt_version: str | None,
        dim: int | None = None,
        create: bool = False,
        dtype: StoredType = "float32",
        timeout: float = 10.0,
    ) -> None:
        self._folder, self._path, self._timeout = folder, folder / FILE_NAME, timeout
        self._lock = RLock()
        self._closed = False
        self._has_maker = fingerprint is not None
        _check_place(self._path, create)
        self._connection = connect(self._path, timeout, create)
        try:
            if create:
                create_tables(
                    self._connection,
                    self._path,
                    fingerprint=fingerprint,
                    prompt_version=prompt_version,
                    dim=dim,
                    dtype=dtype,
                    timeout=timeout,
                )
            self._meta = read_meta(self._connection, self._path)
            self._dim = int(self._meta["dim"])
            self._dtype = cast(StoredType, self._meta["dtype"])
            check_maker(str(folder), "model", self._meta["fingerprint"], fingerprint)
            check_maker(str(folder), "prompt version", self._meta["prompt_version"], prompt_version)
            if dim is not None and dim != self._dim:
                raise StoreError(f"index {folder} holds vectors of width {self._dim}, not {dim}; use the same encoder")
            self._resident = Resident(self._connection, self._dim, self._dtype)
        except FAULTS as error:
            self._connection.close()
            raise explain_error(error, self._path, timeout) from error
        except BaseException:
            self._connection.close()
            raise

    def check(self, items: Sequence[Item]) -> None:
        check_items(items)

    def upsert(self, items: Sequence[Item], vectors: Vectors) -> set[str]:
        self._need_maker("add to")
        check_items(items)
        ids = [cast(str, item.id) for item in items]
        unit = check_vectors(vectors, len(items), self._dim, ids)
        rows = [row_of(item) for item in items]  # reads pictures, so before the lock
        stored: Matrix = unit.astype("<f2" if self._dtype == "float16" else "<f4")
        if not items:
            return set()
        with self._transaction(write=True):
            new = set(ids) - self._known(ids)
            self._remove_ids(ids)
            first = 1 + read_number(self._connection, "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'items'")
            insert = self._connection.executemany
            insert(
                "INSERT INTO items (n, id, modality, text, image, fields, content_hash) VALUES (?, ?, ?, ?, ?, ?, ?)",
                ((n, *row) for n, row in enumerate(rows, start=first)),
            )
            insert("INSERT INTO vectors VALUES (?, ?)", ((n, v.tobytes()) for n, v in enumerate(stored, start=first)))
            insert("INSERT INTO fields (n, name, kind, value) VALUES (?, ?, ?, ?)", field_rows(items, first))
            self._place_new(items, first, stored)
        return new

    def delete(self, which: Sequence[str] | Filter) -> int:
        if isinstance(which, Sequence):
            ids = check_ids(which)
            with self._transaction(write=True):
                return self._remove_ids(ids)
        clause, values = compile_filter(which)
        with self._transaction(write=True):
            return self._remove_numbers(read_numbers(self._connection, f"SELECT i.n FROM items i WHERE {clause}", values))

    def build_approximate(self, cells: int | None = None, probes: int | None = None, seed: int = 0) -> None:
        """Group the vectors of each modality into cells, so that `search(exact=False)` works; replaces earlier cells.

        Defaults: 2 sqrt(N) cells, of which a search visits one in 16, at least 8. Later items are placed as they come;
        build again once an index has grown severalfold. Deterministic for equal contents and seed.
        """
        for name, value in (("cells", cells), ("probes", probes)):
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; give at least 1, or leave it out")
        shards = self._snapshot(None, centroids=False).shards
        fitted: dict[Modality, tuple[Vectors, Cells]] = {}
        for modality, shard in shards.items():
            live = np.flatnonzero(shard.alive_N)
            if len(live):
                wanted = min(cells or default_cells(len(live)), len(live))
                centroids = fit_centroids(shard.vectors_ND, live, wanted, seed)
                fitted[modality] = centroids, assign_cells(shard.vectors_ND, centroids)
        visits = probes or default_probes(max((len(part) for part, _ in fitted.values()), default=1))
        with self._transaction(write=True):
            self._connection.execute("DELETE FROM cells")
            self._connection.execute("DELETE FROM centroids")
            for modality, (centroids, placed) in fitted.items():
                self._write_cells(modality, centroids, shards[modality].numbers_N, placed)
            self._connection.execute("INSERT OR REPLACE INTO meta VALUES ('probes', ?)", (str(visits),))
            self._bump("built")

    def search(
        self,
        vectors: Vectors,
        k: int,
        *,
        where: Filter | None = None,
        modality: Modality | None = None,
        exact: bool = True,
    ) -> list[list[Hit]]:
        """As `Index.search`. Searched exactly all the same: a modality that had no items at `build_approximate`, and a batch for
        which that is faster (`exact_is_cheaper`)."""
        self._need_maker("search")
        check_search(k, modality)
        queries = check_vectors(vectors, None, self._dim)

        def look() -> list[list[Hit]] | None:
            return self._read_hits(self._best(self._snapshot(where, not exact), queries, k, modality, exact))

        for _ in range(_TRIES):
            hits = look()
            if hits is not None:
                return hits
        with self._transaction():  # writers were quicker every time: let them wait, and find and read at one moment
            hits = look()
        if hits is None:
            raise StoreError(f"items of index {self._folder} were removed by another program than TraceIR; open the index again")
        return hits

    def get(self, ids: Sequence[str], *, with_vectors: bool = False) -> dict[str, Stored]:
        found: dict[str, Stored] = {}
        for part in _chunks(check_ids(ids)):
            rows = self._select(f"i.id IN ({marks(part)})", part, with_vectors)
            found |= {stored.id: stored for _, stored in rows}
        return {id: found[id] for id in ids if id in found}

    def count(self, where: Filter | None = None) -> int:
        clause, values = compile_filter(where)
        with self._transaction():
            return read_number(self._connection, f"SELECT count(*) FROM items i WHERE {clause}", values)

    def scan(self, where: Filter | None = None, *, with_vectors: bool = False) -> Iterator[Stored]:
        clause, values = compile_filter(where)
        after = ""
        while page := self._select(f"i.id > ? AND ({clause}) ORDER BY i.id LIMIT {CHUNK}", [after, *values], with_vectors):
            yield from (stored for _, stored in page)
            after = page[-1][1].id

    def info(self) -> IndexInfo:
        with self._transaction():
            counts = self._connection.execute("SELECT modality, count(*) FROM items GROUP BY modality").fetchall()
            cells = read_number(self._connection, "SELECT count(*) FROM centroids")
            probes = read_counter(self._connection, "probes")
            source, _, background = describe_background(self._connection)
        files = (self._folder / (FILE_NAME + ending) for ending in ("", "-wal"))
        return IndexInfo(
            uri=str(self._folder),
            format=FORMAT,
            dim=self._dim,
            dtype=self._dtype,
            fingerprint=self._meta["fingerprint"],
            prompt_version=self._meta["prompt_version"],
            created=self._meta["created"],
            counts=dict(counts),
            cells=cells,
            probes=probes,
            bytes=size_of(files),
            background=background,
            background_source=source,
        )

    def keep_background(self, background: Background) -> None:
        checked = check_background(background, self._dim)
        with self._transaction(write=True):
            write_background(self._connection, checked)
            self._bump("calibrated")

    def background(self) -> Background | None:
        with self._transaction():
            return read_background(self._connection, self._dim)

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # Steps of a search

    def _snapshot(self, where: Filter | None, centroids: bool = True) -> Snapshot:
        with self._transaction():
            return self._resident.snapshot(where, centroids)

    def _best(self, snapshot: Snapshot, queries: Vectors, k: int, modality: Modality | None, exact: bool) -> list[list[_Found]]:
        """For each query its best k, best first, equal scores in order of id."""
        if not exact and not snapshot.probes:
            raise StoreError(
                f"index {self._folder} has no cells for approximate search; "
                "call build_approximate() once, or search with exact=True"
            )
        found: list[list[_Found]] = [[] for _ in queries]
        for name, shard in snapshot.shards.items():
            if modality is not None and name != modality:
                continue
            allowed = None if snapshot.passing is None else shard.mask_of(snapshot.passing)
            near, probes = snapshot.centroids.get(name), snapshot.probes
            most = max(1, min(k, len(shard.numbers_N)))
            if exact or near is None or exact_is_cheaper(len(queries), len(near), probes):
                rows_of = exact_rows(shard, queries, most, allowed)
            else:
                rows_of = [
                    promising_rows(shard, rows_of_nearest_cells(shard, near, query, most, allowed, probes), query, most)
                    for query in queries
                ]
            for query, rows, best in zip(queries, rows_of, found, strict=True):
                best += _score_rows(shard, rows, query, most)
        return [sorted(best, key=lambda one: (-one[0], one[1]))[:k] for best in found]

    def _read_hits(self, best: list[list[_Found]]) -> list[list[Hit]] | None:
        """What was found with its texts and fields; None where any of it was replaced or deleted meanwhile."""
        wanted = {number for found in best for _, _, number in found}
        rows: dict[int, Stored] = {}
        for part in _chunks(sorted(wanted)):
            rows |= dict(self._select(f"i.n IN ({marks(part)})", part, False))
        if len(rows) < len(wanted):
            return None
        return [[_hit(rows[number], score, rank) for rank, (score, _, number) in enumerate(found, start=1)] for found in best]

    # Steps of a write

    def _known(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids that are there."""
        return {
            row[0]
            for part in _chunks(ids)
            for row in self._connection.execute(f"SELECT id FROM items WHERE id IN ({marks(part)})", part)
        }

    def _remove_ids(self, ids: Sequence[str]) -> int:
        return sum(
            self._remove_numbers(read_numbers(self._connection, f"SELECT n FROM items WHERE id IN ({marks(part)})", part))
            for part in _chunks(ids)
        )

    def _remove_numbers(self, numbers: Rows) -> int:
        for table in ("items", "vectors", "fields", "cells"):
            self._connection.executemany(f"DELETE FROM {table} WHERE n = ?", ((n,) for n in numbers.tolist()))
        if len(numbers):
            self._bump("deletions")
            self._resident.note_removal(numbers)
        return len(numbers)

    def _place_new(self, items: Sequence[Item], first: int, vectors: Matrix) -> None:
        """Put rows that are being written into the nearest cells, where their modality has any."""
        for modality, centroids in self._resident.centroids().items():
            at = np.asarray([row for row, item in enumerate(items) if item.modality == modality], dtype=np.int64)
            if len(at):
                self._insert_cells(at + first, assign_cells(vectors[at], centroids))

    def _write_cells(self, modality: Modality, centroids: Vectors, numbers: Rows, cells: Cells) -> None:
        """Store centroids and the cells of the rows still there; place rows added since `numbers` were read."""
        self._connection.executemany(
            "INSERT INTO centroids VALUES (?, ?, ?)",
            ((modality, cell, part.astype("<f4").tobytes()) for cell, part in enumerate(centroids)),
        )
        live = read_numbers(self._connection, "SELECT n FROM items WHERE modality = ?", [modality])
        known = np.isin(numbers, live)
        self._insert_cells(numbers[known], cells[known])
        for part in _chunks(np.setdiff1d(live, numbers).tolist()):
            rows = self._connection.execute(f"SELECT n, vector FROM vectors WHERE n IN ({marks(part)})", part).fetchall()
            added = np.asarray([row[0] for row in rows], dtype=np.int64)
            vectors = self._resident.vectors_of([f"number {row[0]}" for row in rows], [row[1] for row in rows])
            self._insert_cells(added, assign_cells(vectors, centroids))

    def _insert_cells(self, numbers: Rows, cells: Cells) -> None:
        pairs = zip(numbers.tolist(), cells.tolist(), strict=True)
        self._connection.executemany("INSERT INTO cells VALUES (?, ?)", pairs)

    # The database

    @contextmanager
    def _transaction(self, write: bool = False) -> Iterator[None]:
        """The lock, and a transaction; within one of the same thread, that one goes on."""
        with self._lock:
            if self._closed:
                raise StoreError(f"index {self._folder} is closed; open it again")
            if self._connection.in_transaction:
                yield
                return
            try:
                self._connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                yield
                self._connection.execute("COMMIT")
            except BaseException as error:
                self._resident.forget_removals()
                if isinstance(error, FAULTS):
                    raise explain_error(error, self._path, self._timeout) from error
                raise
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    def _select(self, clause: str, values: Sequence[Scalar], with_vectors: bool) -> list[tuple[int, Stored]]:
        column, join = ("v.vector", "LEFT JOIN vectors v ON v.n = i.n") if with_vectors else ("NULL", "")
        with self._transaction():
            rows = self._connection.execute(f"SELECT {COLUMNS}, {column} FROM items i {join} WHERE {clause}", values).fetchall()
            if not with_vectors:
                return [(row[0], stored_of(*row[1:7], vector=None)) for row in rows]
            vectors = self._resident.vectors_of([row[1] for row in rows], [row[7] for row in rows])
            return [(row[0], stored_of(*row[1:7], vector=vector)) for row, vector in zip(rows, vectors, strict=True)]

    def _bump(self, name: str) -> None:
        self._connection.execute(
            "INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, str(read_counter(self._connection, name) + 1))
        )

    def _need_maker(self, action: str) -> None:
        if not self._has_maker:
            raise StoreError(
                f"index {self._folder} was opened without a model, only to look at it; "
                f"to {action} it, open it with the fingerprint of the model in use"
            )


def _check_place(path: Path, create: bool) -> None:
    try:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        elif not path.is_file():
            raise StoreError(f"there is no index at {path.parent}; check the path, or fill one with `traceir index add`")
    except (OSError, ValueError) as error:
        what = "be made" if create else "be looked into"
        why = getattr(error, "strerror", None) or error
        raise StoreError(f"folder {path.parent} of an index cannot {what}: {why}; choose another") from error


def _chunks(values: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), CHUNK):
        yield values[start : start + CHUNK]


def _score_rows(shard: Shard, rows: Rows, query: Vector, k: int) -> list[_Found]:
    """The rows that score at least as high as the k-th best of them; ties beyond k are kept for the caller to order."""
    scores = rescore(shard.vectors_ND[rows], query)
    if len(rows) > k:
        best = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
        rows, scores = rows[best], scores[best]
    return [(float(score), shard.ids[row], int(shard.numbers_N[row])) for row, score in zip(rows, scores, strict=True)]


def _hit(stored: Stored, score: float, rank: int) -> Hit:
    return Hit(stored.id, score, rank, stored.modality, stored.text, stored.image, stored.fields)
