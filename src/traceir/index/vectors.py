"""The vectors of an open SQLite index in memory, and the search over them.

A look at the file before every search brings the rows up to it: rows above the highest number seen are read, those that were
deleted become tombstones. A row is never changed once read, so a `VectorView` stays as it is while writers go on.

All rows are scored in float32, a single query by FAISS's kernels, a batch by matrix products; the rows that can be among the best
k whatever was rounded are then scored again in float64 in one fixed order (`rescore`). The IVF lists of an approximate search
group the rows around centroids by spherical k-means; each modality has its own, since queries and candidates of different
modalities lie apart, and shared lists lose neighbours across that gap.
Shapes: N rows, D width, B bytes or components of a row in memory, Q queries, C centroids.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import sqlite3
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from traceir.index.filters import Filter
from traceir.index.sql import AMONG, CHUNK, Rows, compile_filter, read_counter, read_number, read_numbers
from traceir.index.store import DamageError, StoredType, Vectors, rows_not_unit, unusable
from traceir.items import MODALITIES, Modality, Vector

Mask = npt.NDArray[np.bool_]
Lists = npt.NDArray[np.int32]
Codes = npt.NDArray[Any]
Scores = npt.NDArray[np.float32]
NO_LIST: Final = -1
_SPARE: Final = 16
"""How many more rows than k are looked for at first, so that rounding costs no second look."""
_FEW: Final = 3
"""So many queries are scored one after the other: up to here a matrix product is slower."""
_BLOCK_ROWS: Final = 1 << 16
_BLOCK_SCORES: Final = 1 << 22
_STRIP: Final = 1024
"""Rows gathered at a time, so that they are still in the processor's cache when they are scored."""
_SAMPLE_PER_LIST: Final = 64
_ROUNDS: Final = 10
_ASSIGNED: Final = 16_384
_TINY: Final = 1e-6
_COMPACT_ABOVE: Final = 0.25
_FILTERS: Final = 256
_FILTER_ROWS: Final = 1 << 22
_VIEW_FILTERS: Final = 8
_RETRAIN_ABOVE: Final = 4
_LIST: Final = f"CASE WHEN typeof(c.cell) = 'integer' THEN c.cell ELSE {NO_LIST} END"


@cache
def _faiss() -> Any:
    return importlib.import_module("faiss")  # when the first index is searched, not before


class Codec:
    """How rows are kept in memory: as stored (float32, float16), or for int8 as one byte a component, by ranges that a sample
    [n, D] of the rows has. `exact`: whether scores of codes differ from those of the vectors by rounding alone."""

    def __init__(self, dim: int, dtype: StoredType, sample: Vectors) -> None:
        self.dim, self.exact = dim, dtype != "int8"
        # More than twice the worst rounding error of a float32 product of two unit vectors of this width.
        self.slack = np.float32(2.1 * dim * 2.0**-24 + 1e-6)
        self.dtype = {"float32": np.float32, "float16": np.float16, "int8": np.uint8}[dtype]
        self._quantizer: Any = None
        if dtype != "float32":
            kind = _faiss().ScalarQuantizer
            self._quantizer = kind(dim, kind.QT_fp16 if self.exact else kind.QT_8bit)
            self._quantizer.rangestat_arg = 0.25  # by which the ranges are wider than those of the sample
            if len(sample):  # otherwise there is no row yet
                self._quantizer.train(sample)

    def encode(self, vectors_ND: Codes) -> Codes:
        return vectors_ND if self.exact else self._quantizer.compute_codes(vectors_ND)

    def decode(self, codes_ND: Codes) -> Vectors:
        return codes_ND if self._quantizer is None else self._quantizer.decode(codes_ND.view(np.uint8))

    def scan(self, codes_ND: Codes, query_D: Vector, rows: Rows | None, count: int) -> tuple[Scores, Rows]:
        """Scores and rows of the best `count` of these rows (None: of all), in any order."""
        faiss = _faiss()
        at = faiss.swig_ptr
        scores, best_rows = np.full(count, -np.inf, dtype=np.float32), np.full(count, -1, dtype=np.int64)
        if self._quantizer is None:
            chosen = None if rows is None else faiss.IDSelectorArray(len(rows), at(rows))
            faiss.knn_inner_product(
                at(query_D), at(codes_ND), self.dim, 1, len(codes_ND), count, at(scores), at(best_rows), chosen
            )
            return scores, best_rows
        scanner = self._quantizer.select_InvertedListScanner(faiss.METRIC_INNER_PRODUCT, None, rows is None, None)
        scanner.set_query(at(query_D))
        scanner.list_no = 0
        codes_ND = codes_ND.view(np.uint8)
        if rows is None:
            scanner.scan_codes(len(codes_ND), at(codes_ND), None, at(scores), at(best_rows), count)
            return scores, best_rows
        for strip in (rows[start : start + _STRIP] for start in range(0, len(rows), _STRIP)):
            gathered = codes_ND.take(strip, axis=0)
            scanner.scan_codes(len(strip), at(gathered), at(strip), at(scores), at(best_rows), count)
        return scores, best_rows


@dataclass(frozen=True)
class VectorView:
    """A fixed view of one modality's rows; later writes make a new one and leave this one as it was."""

    codec: Codec
    ids: Sequence[str]  # may be longer than N
    codes_ND: Codes
    numbers_N: Rows
    alive_N: Mask  # False: a tombstone
    lists_N: Lists  # NO_LIST where a row is in none, and so looked at by every search
    # Answers of `usable`. Threads share them, by single steps of a list, none of which another can interrupt.
    _usable: list[tuple[Rows | None, tuple[Mask, Rows | None]]] = field(init=False, default_factory=list)

    def __len__(self) -> int:
        return len(self.numbers_N)

    @cached_property
    def by_list(self) -> tuple[Rows, Rows]:
        """Row indexes sorted by list, and where each list starts among them; those in none come first."""
        order = np.argsort(self.lists_N, kind="stable").astype(np.int64)
        top = int(self.lists_N.max(initial=NO_LIST))
        return order, np.searchsorted(self.lists_N[order], np.arange(NO_LIST, top + 2)).astype(np.int64)

    def usable(self, passing: Rows | None) -> tuple[Mask, Rows | None]:
        """Which rows are alive and have one of these numbers, as a mask and by their indexes (None: all are).

        The same array, asked again, has the same answer at once.
        """
        for known, usable in self._usable[:]:
            if known is passing:
                return usable
        mask_N = self.alive_N if passing is None else self.alive_N & np.isin(self.numbers_N, passing)
        rows = None if mask_N.all() else np.flatnonzero(mask_N)
        self._usable.append((passing, (mask_N, rows)))
        del self._usable[:-_VIEW_FILTERS]
        return mask_N, rows


class VectorTable:
    """The rows of one modality, appended to in place; `view` hands out what is there now."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._ids: list[str] = []
        # Of these the first len(self) rows are in use; a row that a view can see is never written again.
        self._columns: dict[str, npt.NDArray[Any]] = {
            "codes_ND": np.empty((0, codec.dim), dtype=codec.dtype),
            "numbers_N": np.empty(0, dtype=np.int64),
            "alive_N": np.empty(0, dtype=np.bool_),
            "lists_N": np.empty(0, dtype=np.int32),
        }
        self._view: VectorView | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def reserve(self, rows: int) -> None:
        """Allocate for this many rows in all, so that a load does not copy its rows again and again."""
        for name, column in self._columns.items():
            if rows > len(column):
                self._columns[name] = np.empty((rows, *column.shape[1:]), dtype=column.dtype)
                self._columns[name][: len(self)] = column[: len(self)]

    def append(self, numbers: Sequence[int], ids: Sequence[str], vectors_ND: Codes, lists: Lists) -> None:
        """Rows whose numbers ascend and are above all that were ever here."""
        start, end = len(self), len(self) + len(ids)
        if end > len(self._columns["alive_N"]):
            self.reserve(max(end, 2 * start))
        for column, values in zip(self._columns.values(), (self._codec.encode(vectors_ND), numbers, True, lists), strict=True):
            column[start:end] = values
        self._ids.extend(ids)
        self._view = None

    def mark_removed(self, numbers: Rows, *, invert: bool) -> None:
        """Make tombstones of the rows with these numbers, or of all others (`invert`); copies the rest together once a quarter of
        all are tombstones."""
        numbers_N, alive_N = self._columns["numbers_N"][: len(self)], self._columns["alive_N"].copy()
        alive_N[: len(self)] &= np.isin(numbers_N, numbers, invert=not invert)
        self._columns["alive_N"], self._view = alive_N, None
        rows = np.flatnonzero(alive_N[: len(self)])
        if len(rows) < (1 - _COMPACT_ABOVE) * len(self):
            self._take(rows)

    def lay_out(self) -> None:
        """Sort the rows by list into new arrays, so that those of a list are contiguous."""
        lists_N = self._columns["lists_N"][: len(self)]
        if len(self) and lists_N.max() > NO_LIST:
            self._take(np.argsort(lists_N, kind="stable"))

    def _take(self, rows: Rows) -> None:
        """Keep these rows, in this order, in new arrays: views of the old ones stay as they are."""
        self._columns = {name: column[rows] for name, column in self._columns.items()}
        self._ids = [self._ids[row] for row in rows]
        self._view = None

    def view(self) -> VectorView:
        if self._view is None:
            used = {name: column[: len(self)] for name, column in self._columns.items()}
            self._view = VectorView(self._codec, self._ids, **used)
        return self._view


def search_view(
    view: VectorView, queries_QD: Vectors, k: int, passing: Rows | None, centroids: Vectors | None, probes: int
) -> list[Rows]:
    """For each query the rows that can be among its best k; with centroids [C, D] only of the `probes` nearest lists.

    All rows are looked at where that is cheaper: for a batch, and under a filter that leaves fewer than the probes would visit.
    """
    mask_N, rows = view.usable(passing)
    count = len(view) if rows is None else len(rows)
    if centroids is None or (len(queries_QD) > _FEW and 8 * probes >= len(centroids)):
        return candidates(view, queries_QD, k, rows)
    if count <= max(k, len(view) * probes / len(centroids)):
        return candidates(view, queries_QD, k, rows)
    nearest = (_nearest_rows(view, centroids, query, k, mask_N, probes) for query in queries_QD)
    return [candidates(view, query[None], k, own)[0] for query, own in zip(queries_QD, nearest, strict=True)]


def candidates(view: VectorView, queries_QD: Vectors, k: int, rows: Rows | None) -> list[Rows]:
    """For each query those of `rows` (None: all) that can be among its best k: a superset, whatever the order of float32
    additions. Of int8 codes the best 2 k + 16, which nearly always is one."""
    codec, total = view.codec, len(view) if rows is None else len(rows)
    if total <= (8 * k if codec.exact and len(queries_QD) <= _FEW else k):
        return [np.arange(total) if rows is None else rows for _ in queries_QD]
    count = min(total, k + max(_SPARE, k // 4) if codec.exact else 2 * k + _SPARE)
    look = _scan_each if len(queries_QD) <= _FEW else _multiply
    best, rows_of = look(view, queries_QD, rows, count)
    lowest, kth = best.min(axis=1), np.partition(best, -k)[:, -k]
    bounds = (kth if codec.exact else lowest) - codec.slack
    best_rows = [own[scores >= bound] for own, scores, bound in zip(rows_of, best, bounds, strict=True)]
    # More rows than were asked for may score alike. In int8 those are equal rows, of which none may be cut at random.
    cut = kth - codec.slack if codec.exact else np.partition(best, 1)[:, 1] - _TINY
    for query in np.flatnonzero(lowest >= cut) if count < total else ():
        blocks = _blocks(view, rows)
        best_rows[query] = np.concatenate([at[block @ queries_QD[query] >= bounds[query]] for at, block in blocks])
    return best_rows


def rescore(vectors_ND: Codes, query_D: Vector) -> Scores:
    """Cosines added up in float64 in one fixed order, so that equal vectors score equally wherever they are stored."""
    products = vectors_ND.astype(np.float64) * query_D.astype(np.float64)
    scores: Scores = np.clip(products.sum(axis=1), -1.0, 1.0).astype(np.float32)
    return scores


def fit_lists(view: VectorView, lists: int | None, seed: int) -> tuple[Vectors, Lists]:
    """Centroids [C, D] by spherical k-means on a sample of the living rows, and the list of every row; equal for equal seeds."""
    generator, live = np.random.default_rng(seed), np.flatnonzero(view.alive_N)
    wanted = min(lists or max(1, round(2 * math.sqrt(len(live)))), len(live))
    sample = generator.choice(live, size=min(len(live), _SAMPLE_PER_LIST * wanted), replace=False)
    points = view.codec.decode(view.codes_ND[np.sort(sample)]).astype(np.float32)
    centroids: Vectors = points[generator.choice(len(points), size=wanted, replace=False)]
    for _ in range(_ROUNDS):
        nearest = assign_lists(points, centroids)
        order = np.argsort(nearest, kind="stable")
        present, starts = np.unique(nearest[order], return_index=True)
        sums = np.add.reduceat(points[order], starts, axis=0, dtype=np.float64)
        norms = np.linalg.norm(sums, axis=1)
        centroids = points[generator.choice(len(points), size=wanted)]  # for lists that are empty
        centroids[present[norms > _TINY]] = sums[norms > _TINY] / norms[norms > _TINY, None]
    return centroids, np.concatenate([assign_lists(block, centroids) for _, block in _blocks(view, None)])


def assign_lists(vectors_ND: Codes, centroids: Vectors) -> Lists:
    """The list of each row: that of the nearest centroid."""
    lists = np.empty(len(vectors_ND), dtype=np.int32)
    for start in range(0, len(vectors_ND), _ASSIGNED):
        block = vectors_ND[start : start + _ASSIGNED].astype(np.float32, copy=False)
        lists[start : start + _ASSIGNED] = np.argmax(block @ centroids.T, axis=1)
    return lists


def _nearest_rows(view: VectorView, centroids: Vectors, query_D: Vector, k: int, mask_N: Mask, probes: int) -> Rows:
    """The usable rows of the nearest `probes` lists, of more lists while there are fewer than k, and those in no list."""
    order, starts = view.by_list
    nearest = np.argsort(-(centroids @ query_D), kind="stable")
    while True:
        visited = [0, *(nearest[:probes] + 1)]
        rows: Rows = np.concatenate([order[starts[at] : starts[at + 1]] for at in visited if at + 1 < len(starts)])
        rows = rows[mask_N[rows]]
        if len(rows) >= k or probes >= len(nearest):
            return rows
        probes *= 4


def _scan_each(view: VectorView, queries_QD: Vectors, rows: Rows | None, count: int) -> tuple[Scores, Rows]:
    """Scores and rows [Q, count] of the best of each query, in any order, a query at a time."""
    pairs = [view.codec.scan(view.codes_ND, query, rows, count) for query in queries_QD]
    return np.stack([scores for scores, _ in pairs]), np.stack([best_rows for _, best_rows in pairs])


def _multiply(view: VectorView, queries_QD: Vectors, rows: Rows | None, count: int) -> tuple[Scores, Rows]:
    """The same by products of all queries with blocks of rows."""
    best, best_rows = np.empty((0, count), dtype=np.float32), np.empty((0, count), dtype=np.int64)
    for at, block in _blocks(view, rows, count, len(queries_QD)):
        scores_QN = queries_QD @ block.T
        if not len(best):
            top_QN = np.argpartition(scores_QN, -count, axis=1)[:, -count:]
            best, best_rows = np.take_along_axis(scores_QN, top_QN, axis=1), at[top_QN]
            continue
        floors = best.min(axis=1)
        for query in np.flatnonzero(scores_QN.max(axis=1) > floors):
            higher = np.flatnonzero(scores_QN[query] > floors[query])
            scores = np.concatenate([best[query], scores_QN[query, higher]])
            top = np.argpartition(scores, -count)[-count:]
            best[query], best_rows[query] = scores[top], np.concatenate([best_rows[query], at[higher]])[top]
    return best, best_rows


def _blocks(view: VectorView, rows: Rows | None, first: int = 0, queries: int = 1) -> Iterator[tuple[Rows, Vectors]]:
    """Row indexes and vectors of these rows (None: of all), a block at a time; the first is small, for a bound to begin with."""
    start, end, total = 0, max(first, 1024), len(view) if rows is None else len(rows)
    while start < total:
        at = np.arange(start, min(end, total)) if rows is None else rows[start:end]
        yield at, view.codec.decode(view.codes_ND[start:end] if rows is None else view.codes_ND.take(at, axis=0))
        start, end = end, end + min(8 * end, max(1024, min(_BLOCK_ROWS, _BLOCK_SCORES // queries)))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The rows of each modality at one moment, the numbers of those that pass a filter, and the centroids of the IVF lists."""

    views: dict[Modality, VectorView]
    passing: Rows | None
    centroids: dict[Modality, Vectors]
    probes: int


class ResidentVectors:
    """What is in memory of an index, brought up to the database by each `snapshot`.

    Every call runs within a transaction, or at least under the lock, of the index it belongs to.
    """

    def __init__(self, connection: sqlite3.Connection, dim: int, dtype: StoredType) -> None:
        self._connection, self._dim, self._dtype = connection, dim, dtype
        self._centroids: tuple[int, dict[Modality, Vectors]] = (0, {})  # of which build, and they
        self.forget()

    def forget(self) -> None:
        self._tables: dict[Modality, VectorTable] = {}
        self._probes = 0
        self._trained = 0  # the highest number when the codec was made
        # By filter, last used last: numbers of rows that pass, the highest number then, how many passed when all were asked for.
        self._passing: OrderedDict[bytes, tuple[Rows, int, int]] = OrderedDict()
        self.removed: list[Rows] = []  # numbers, one part for each count of `deletions` since `_seen` that was ours
        self._seen = (0, 0, 0)  # highest number, count of deletions, count of builds

    def snapshot(self, where: Filter | None, centroids: bool = True) -> Snapshot:
        """The rows of now, the numbers of those that pass `where`, and the centroids, where they are asked for."""
        self._refresh()
        passing = None if where is None else self._numbers_passing(where, self._seen[0])
        views = {modality: table.view() for modality, table in self._tables.items()}
        return Snapshot(views, passing, self.centroids(self._seen[2]) if centroids else {}, self._probes)

    def centroids(self, built: int) -> dict[Modality, Vectors]:
        """The centroids [C, D] of each modality that has any, of the current build; read once."""
        if self._centroids[0] != built:
            read: dict[Modality, Vectors] = {}
            for modality in MODALITIES:
                statement = "SELECT cell, vector FROM centroids WHERE modality = ? ORDER BY cell"
                rows = self._connection.execute(statement, [modality]).fetchall()
                vectors = self._from_bytes([blob for _, blob in rows], "<f4")
                if broken := rows_not_unit(vectors) or [at for at, (number, _) in enumerate(rows) if number != at]:
                    what = f"IVF list {broken[0]} of {modality} cannot be read"
                    raise DamageError(f"{what}; make all anew with `traceir index build-ann`")
                if rows:
                    read[modality] = vectors
            self._centroids = built, read
        return self._centroids[1]

    def note_removal(self, numbers: Rows) -> None:
        """Rows that this handle removed in one count of `deletions`; then the next refresh need not compare all numbers."""
        if self._tables:
            self.removed.append(numbers)

    def vectors_of(self, ids: Sequence[object], blobs: Sequence[object]) -> Vectors:
        """[N, D] from stored bytes; DamageError naming the items whose vector is missing, cut, or not of unit length."""
        vectors = self._from_bytes(blobs).astype(np.float32, copy=False)
        if broken := rows_not_unit(vectors):
            raise unusable([ids[row] for row in broken])
        return vectors

    def exact_vectors(self, view: VectorView, rows: Rows) -> Codes | None:
        """The vectors of these rows as stored; None where one of int8, which are read from the file, has been removed since."""
        if view.codec.exact:
            return view.codes_ND[rows]
        numbers = view.numbers_N[rows].tolist()
        blobs = dict(self._connection.execute(f"SELECT n, vector FROM vectors WHERE n {AMONG}", [json.dumps(numbers)]))
        if len(blobs) < len(numbers):
            return None
        return self.vectors_of([view.ids[row] for row in rows], [blobs[number] for number in numbers])

    def _refresh(self) -> None:
        """Bring the rows in memory up to the transaction this runs in; three look-ups where nothing has changed."""
        top, deletions, built = (
            read_number(self._connection, "SELECT max(n) FROM items"),
            read_counter(self._connection, "deletions"),
            read_counter(self._connection, "built"),
        )
        if built != self._seen[2] or (self._dtype == "int8" and top > _RETRAIN_ABOVE * self._trained):
            self.forget()
            self._probes = read_counter(self._connection, "probes")
        seen_top, seen_deletions, _ = self._seen
        try:
            if self._tables and deletions != seen_deletions:
                # Our own by their numbers, those of other processes by comparing with what is left.
                own = deletions - seen_deletions == len(self.removed)
                numbers = np.concatenate(self.removed) if own else read_numbers(self._connection, "SELECT n FROM items")
                for table in self._tables.values():
                    table.mark_removed(numbers, invert=not own)
                self.removed = []
            if top > seen_top or not self._tables:
                self._load_rows(seen_top, top)
        except BaseException:
            self.forget()
            raise
        self._seen = (max(top, seen_top), deletions, built)

    def _load_rows(self, after: int, top: int) -> None:
        if first := not self._tables:
            codec = Codec(self._dim, self._dtype, self._sample())
            self._tables = {modality: VectorTable(codec) for modality in MODALITIES}
            self._trained = top
        counts = self._connection.execute("SELECT modality, count(*) FROM items NOT INDEXED WHERE n > ? GROUP BY 1", (after,))
        for modality, count in counts.fetchall() if first else ():
            if modality in self._tables:
                self._tables[modality].reserve(count)
        cursor = self._connection.execute(
            f"SELECT i.n, i.id, i.modality, v.vector, {_LIST} FROM items i "
            "LEFT JOIN vectors v ON v.n = i.n LEFT JOIN cells c ON c.n = i.n WHERE i.n > ? ORDER BY i.n",
            (after,),
        )
        lists = dict(self._connection.execute("SELECT modality, count(*) FROM centroids GROUP BY modality").fetchall())
        broken = list[object]()
        while rows := cursor.fetchmany(CHUNK):
            broken += [row[1] for row in rows if row[2] not in self._tables or not isinstance(row[1], str)]
            for modality, table in self._tables.items():
                own = [row for row in rows if row[2] == modality]
                if own:
                    numbers, ids, _, blobs, at = zip(*own, strict=True)
                    vectors, at_N = self._from_bytes(blobs), np.asarray(at)
                    broken += [ids[row] for row in rows_not_unit(vectors.astype(np.float32, copy=False))]
                    known = (at_N >= 0) & (at_N < lists.get(modality, 0))
                    table.append(numbers, ids, vectors, np.where(known, at_N, NO_LIST).astype(np.int32))
        if broken:
            raise unusable(broken)
        for table in self._tables.values() if first else ():
            table.lay_out()
        # Rows of an overwritten page may be missing without an error; the index of modalities, on other pages, counts them.
        there = sum(map(len, self._tables.values()))
        if first and there != (kept := read_number(self._connection, "SELECT count(*) FROM items INDEXED BY items_modality")):
            raise DamageError(f"{there} of {kept} items can be read; restore it from a copy, or remove it and fill it again")

    def _sample(self) -> Vectors:
        """Vectors spread evenly over the rows, where the codec learns from them."""
        if self._dtype != "int8":
            return np.empty((0, self._dim), dtype=np.float32)
        numbers = read_numbers(self._connection, "SELECT n FROM items")
        chosen = np.sort(numbers)[:: max(1, len(numbers) // CHUNK)][:CHUNK].tolist()
        rows = self._connection.execute(f"SELECT vector FROM vectors WHERE n {AMONG}", [json.dumps(chosen)]).fetchall()
        vectors = self._from_bytes([blob for (blob,) in rows])
        return np.delete(vectors, rows_not_unit(vectors), axis=0)

    def _from_bytes(self, blobs: Sequence[object], dtype: str = "") -> Codes:
        """[N, D] as stored; zeros where the bytes are not those of a vector."""
        kind = np.dtype(dtype or ("<f2" if self._dtype == "float16" else "<f4"))
        size = self._dim * kind.itemsize
        whole = (blob if isinstance(blob, bytes) and len(blob) == size else bytes(size) for blob in blobs)
        return np.frombuffer(bytearray().join(whole), dtype=kind).reshape(-1, self._dim)

    def _numbers_passing(self, where: Filter, top: int) -> Rows:
        """Ascending numbers [M] of the rows that pass a filter; the database is asked for all once, then for new ones.

        Valid because a row never changes: it passes always or never. Numbers of deleted rows may be among them, at most about as
        many as of rows that are there. Of the filter a client sent only a digest is kept.
        """
        key = hashlib.sha256(repr(where).encode()).digest()
        numbers, seen, whole = self._passing.pop(key, (np.empty(0, dtype=np.int64), 0, 0))
        if len(numbers) > 2 * whole + _STRIP:
            seen = 0
        if seen < top:
            condition, values = compile_filter(where, row_by_row=seen > 0)
            statement = f"SELECT i.n FROM items i WHERE i.n > ? AND ({condition}) ORDER BY i.n"
            added = read_numbers(self._connection, statement, [seen, *values])
            numbers = added if not seen else np.concatenate([numbers, added]) if len(added) else numbers
            whole = whole if seen else len(added)
        self._passing[key] = numbers, top, whole
        total = sum(len(known) for known, _, _ in self._passing.values())
        while len(self._passing) > 1 and (total > _FILTER_ROWS or len(self._passing) > _FILTERS):
            total -= len(self._passing.popitem(last=False)[1][0])
        return numbers
