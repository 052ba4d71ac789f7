"""What an open SQLite index holds in memory: the rows of each modality, cells, and which rows pass the last filters."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from traceir.index.filters import Filter, key_of_filter, shown
from traceir.index.matrix import NO_CELL, Cells, Growing, Matrix, Rows, Shard, widen
from traceir.index.passing import Passing
from traceir.index.sql import CHUNK, compile_filter, read_counter, read_number, read_numbers
from traceir.index.store import DamageError, StoredType, Vectors, rows_not_unit, unusable
from traceir.items import MODALITIES, Modality

_CELL: Final = f"CASE WHEN typeof(c.cell) = 'integer' THEN c.cell ELSE {NO_CELL} END"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The rows of each modality at one moment, the numbers of those that pass a filter, and the cells."""

    shards: dict[Modality, Shard]
    passing: Rows | None
    centroids: dict[Modality, Vectors]
    probes: int


class Resident:
    """What is in memory of an index, brought up to the database by each `snapshot`.

    Every call runs within a transaction, or at least under the lock, of the index it belongs to.
    """

    def __init__(self, connection: sqlite3.Connection, dim: int, dtype: StoredType) -> None:
        self._connection, self._dim, self._dtype = connection, dim, dtype
        self.forget()

    def forget(self) -> None:
        self._shards: dict[Modality, Growing] = {}
        self._centroids: tuple[int, dict[Modality, Vectors]] = (0, {})  # of which build, and they
        self._probes = 0
        self._passing = Passing()
        self._removed: list[Rows] = []  # numbers, one part for each count of `deletions` since `_seen` that was ours
        self._seen = (0, 0, 0)  # highest number, count of deletions, count of builds

    def snapshot(self, where: Filter | None, centroids: bool = True) -> Snapshot:
        """The rows of now, the numbers of those that pass `where`, and the cells, where they are asked for."""

        def above(number: int) -> Rows:
            condition, values = compile_filter(where, row_by_row=number > 0)
            statement = f"SELECT i.n FROM items i WHERE i.n > ? AND ({condition}) ORDER BY i.n"
            return read_numbers(self._connection, statement, [number, *values])

        self._refresh()
        passing = None if where is None else self._passing.numbers(key_of_filter(where), self._seen[0], above)
        shards = {modality: growing.view() for modality, growing in self._shards.items()}
        return Snapshot(shards, passing, self._centroids_of(self._seen[2]) if centroids else {}, self._probes)

    def centroids(self) -> dict[Modality, Vectors]:
        """The centroids [C, D] of each modality that has any."""
        return self._centroids_of(read_counter(self._connection, "built"))

    def note_removal(self, numbers: Rows) -> None:
        """Rows that were removed here, with one count of `deletions`; spares the next look a comparison with what is left."""
        if self._shards:
            self._removed.append(numbers)

    def forget_removals(self) -> None:
        """After a transaction that did not end well: what it removed is there again."""
        self._removed = []

    def _refresh(self) -> None:
        """Bring the rows in memory up to the transaction this runs in; three look-ups where nothing has changed."""
        top, deletions, built = (
            read_number(self._connection, "SELECT max(n) FROM items"),
            read_counter(self._connection, "deletions"),
            read_counter(self._connection, "built"),
        )
        seen_top, seen_deletions, seen_built = self._seen
        had_rows = bool(self._shards)
        try:
            if top > seen_top:
                self._load_rows(seen_top)
            if not had_rows:
                self._check_count()
            if had_rows and deletions != seen_deletions:
                self._let_die(deletions - seen_deletions)
            if built != seen_built:
                self._probes = read_counter(self._connection, "probes")
                pairs = self._connection.execute(f"SELECT n, {_CELL} FROM cells c ORDER BY n").fetchall()
                table, cells = np.asarray(pairs, dtype=np.int64).reshape(-1, 2), self._cells()
                for modality, growing in self._shards.items():
                    growing.place(table[:, 0], _known_cells(table[:, 1], cells.get(modality, 0)))
        except BaseException:
            self.forget()
            raise
        self._seen = (max(top, seen_top), deletions, built)

    def _check_count(self) -> None:
        """Rows of a page that was overwritten may seem never to have been; the index of modalities, on other pages, has them."""
        known = read_number(self._connection, "SELECT count(*) FROM items INDEXED BY items_modality")
        found = sum(len(growing) for growing in self._shards.values())
        if found != known:
            raise DamageError(f"{found} of {known} items can be read; restore it from a copy, or remove it and fill it again")

    def _let_die(self, deletions: int) -> None:
        """Follow so many deletions: our own by their numbers, those of other processes by comparing with what is left."""
        if deletions == len(self._removed):
            for growing in self._shards.values():
                growing.let_die(np.concatenate(self._removed))
        else:
            live = read_numbers(self._connection, "SELECT n FROM items")
            for growing in self._shards.values():
                growing.keep_only(live)
        self._removed = []

    def _load_rows(self, after: int) -> None:
        counts = self._connection.execute("SELECT modality, count(*) FROM items NOT INDEXED WHERE n > ? GROUP BY 1", (after,))
        for modality, count in counts.fetchall():
            growing = self._shards.setdefault(modality, Growing(self._dim, self._dtype))
            if not len(growing):
                growing.reserve(count)
        cursor = self._connection.execute(
            f"SELECT i.n, i.id, i.modality, v.vector, {_CELL} FROM items i "
            "LEFT JOIN vectors v ON v.n = i.n LEFT JOIN cells c ON c.n = i.n WHERE i.n > ? ORDER BY i.n",
            (after,),
        )
        placed, broken = self._cells(), list[object]()
        while rows := cursor.fetchmany(CHUNK):
            broken += [row[1] for row in rows if row[2] not in MODALITIES or not isinstance(row[1], str)]
            for modality, growing in self._shards.items():
                own = [row for row in rows if row[2] == modality]
                if own:
                    numbers, ids, _, blobs, cells = zip(*own, strict=True)
                    vectors = self.stored_vectors(blobs)
                    broken += [ids[row] for row in rows_not_unit(_wide(vectors))]
                    growing.append(numbers, ids, vectors, _known_cells(np.asarray(cells), placed.get(modality, 0)))
        if broken:
            raise unusable(broken)

    def vectors_of(self, ids: Sequence[str], blobs: Sequence[object]) -> Vectors:
        """[N, D] from stored bytes; DamageError naming the items whose vector is missing, cut, or not of unit length."""
        vectors = self.stored_vectors(blobs).astype(np.float32, copy=False)
        if broken := rows_not_unit(vectors):
            raise unusable([ids[row] for row in broken])
        return vectors

    def stored_vectors(self, blobs: Sequence[object]) -> Matrix:
        """[N, D] as stored; zeros where the bytes are not those of a vector."""
        dtype = np.dtype("<f2" if self._dtype == "float16" else "<f4")
        size = self._dim * dtype.itemsize
        whole = (blob if isinstance(blob, bytes) and len(blob) == size else bytes(size) for blob in blobs)
        return np.frombuffer(bytearray().join(whole), dtype=dtype).reshape(-1, self._dim)

    def _cells(self) -> dict[Modality, int]:
        """How many cells each modality has."""
        return dict(self._connection.execute("SELECT modality, count(*) FROM centroids GROUP BY modality").fetchall())

    def _centroids_of(self, built: int) -> dict[Modality, Vectors]:
        """Those of the current build, read once."""
        if self._centroids[0] != built:
            parts: dict[Modality, list[bytes]] = {}
            rows = self._connection.execute("SELECT modality, cell, vector FROM centroids ORDER BY modality, cell")
            for modality, cell, blob in rows:
                own = parts.setdefault(modality, [])
                if modality not in MODALITIES or cell != len(own) or not isinstance(blob, bytes) or len(blob) != 4 * self._dim:
                    raise _no_cell(modality, cell)
                own.append(blob)
            read: dict[Modality, Vectors] = {
                modality: np.frombuffer(b"".join(blobs), dtype="<f4").reshape(-1, self._dim) for modality, blobs in parts.items()
            }
            for modality, centroids in read.items():
                if broken := rows_not_unit(centroids):
                    raise _no_cell(modality, broken[0])
            self._centroids = built, read
        return self._centroids[1]


def _known_cells(cells: Rows, count: int) -> Cells:
    """Of rows of a modality with so many cells; one in none of these is unplaced, and so looked at by every search."""
    return np.where((cells >= 0) & (cells < count), cells, NO_CELL).astype(np.int32)


def _wide(vectors_ND: Matrix) -> Vectors:
    return vectors_ND if vectors_ND.dtype == np.float32 else widen(vectors_ND, np.empty(vectors_ND.shape, dtype=np.float32))


def _no_cell(modality: object, cell: object) -> DamageError:
    return DamageError(f"cell {shown(cell)} of {shown(modality)} cannot be read; make all anew with `traceir index optimise`")
