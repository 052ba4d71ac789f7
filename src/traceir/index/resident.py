"""What an open SQLite index holds in memory: the rows of each modality, cells, and which rows pass the last filters."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from traceir.errors import StoreError
from traceir.index.filters import Filter
from traceir.index.matrix import NO_CELL, Growing, Matrix, Rows, Shard
from traceir.index.passing import Passing
from traceir.index.sql import CHUNK, compile_filter, read_counter, read_number, read_numbers
from traceir.index.store import StoredType, Vectors
from traceir.items import Modality


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

    def __init__(self, connection: sqlite3.Connection, folder: Path, dim: int, dtype: StoredType) -> None:
        self._connection, self._folder, self._dim, self._dtype = connection, folder, dim, dtype
        self.forget()

    def forget(self) -> None:
        self._shards: dict[Modality, Growing] = {}
        self._centroids: tuple[int, dict[Modality, Vectors]] = (0, {})  # of which build, and they
        self._probes = 0
        self._passing = Passing()
        self._removed: list[Rows] = []  # numbers, one part for each count of `deletions` since `_seen` that was ours
        self._seen = (0, 0, 0)  # highest number, count of deletions, count of builds

    def snapshot(self, where: Filter | None) -> Snapshot:
        """The rows of now, the numbers of those that pass `where`, and the cells."""
        clause, values = compile_filter(where)

        def above(number: int) -> Rows:
            condition, _ = compile_filter(where, row_by_row=number > 0)
            statement = f"SELECT i.n FROM items i WHERE i.n > ? AND ({condition}) ORDER BY i.n"
            return read_numbers(self._connection, statement, [number, *values])

        self._refresh()
        passing = None if where is None else self._passing.numbers((clause, *values), self._seen[0], above)
        shards = {modality: growing.view() for modality, growing in self._shards.items()}
        return Snapshot(shards, passing, self._centroids_of(self._seen[2]), self._probes)

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
            if had_rows and deletions != seen_deletions:
                self._let_die(deletions - seen_deletions)
            if built != seen_built:
                self._probes = read_counter(self._connection, "probes")
                pairs = self._connection.execute("SELECT n, cell FROM cells ORDER BY n").fetchall()
                table = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
                for growing in self._shards.values():
                    growing.place(table[:, 0], table[:, 1].astype(np.int32))
        except BaseException:
            self.forget()
            raise
        self._seen = (max(top, seen_top), deletions, built)

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
            "SELECT i.n, i.id, i.modality, v.vector, coalesce(c.cell, ?) FROM items i "
            "LEFT JOIN vectors v ON v.n = i.n LEFT JOIN cells c ON c.n = i.n WHERE i.n > ? ORDER BY i.n",
            (NO_CELL, after),
        )
        while rows := cursor.fetchmany(CHUNK):
            for modality, growing in self._shards.items():
                own = [row for row in rows if row[2] == modality]
                if own:
                    numbers, ids, _, blobs, cells = zip(*own, strict=True)
                    growing.append(numbers, ids, self.vectors_of(ids, blobs), cells)

    def vectors_of(self, ids: Sequence[str], blobs: Sequence[bytes | None]) -> Matrix:
        """[N, D] from stored bytes; StoreError naming the first item whose vector is missing or of the wrong length."""
        dtype = np.dtype("<f2" if self._dtype == "float16" else "<f4")
        for id, blob in zip(ids, blobs, strict=True):
            if blob is None or len(blob) != self._dim * dtype.itemsize:
                raise StoreError(f"index {self._folder} is damaged: item {id!r} has no whole vector; remove and add it")
        return np.frombuffer(b"".join(blob or b"" for blob in blobs), dtype=dtype).reshape(-1, self._dim)

    def _centroids_of(self, built: int) -> dict[Modality, Vectors]:
        """Those of the current build, read once."""
        if self._centroids[0] != built:
            parts: dict[Modality, list[bytes]] = {}
            rows = self._connection.execute("SELECT modality, vector FROM centroids ORDER BY modality, cell")
            for modality, blob in rows:
                parts.setdefault(modality, []).append(blob)
            read: dict[Modality, Vectors] = {
                modality: np.frombuffer(b"".join(blobs), dtype="<f4").reshape(-1, self._dim) for modality, blobs in parts.items()
            }
            self._centroids = built, read
        return self._centroids[1]
