"""Vectors of one modality in memory, and exact search over them.

Shapes: N rows, D width, Q queries. A row is never changed once written; it dies when its item goes or is replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Final, TypeVar, cast

import numpy as np
import numpy.typing as npt

from traceir.index.store import StoredType, Vectors
from traceir.items import Vector

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Cells = npt.NDArray[np.int32]
Scores = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.floating[Any]]
Array = TypeVar("Array", bound=npt.NDArray[Any])
NO_CELL: Final = -1
_BLOCK_SCORES: Final = 1 << 22
_BLOCK_ROWS: Final = 1 << 16
_GATHER_BELOW: Final = 0.4
_STRIP: Final = 1024
"""Rows gathered or widened at a time, so that they are still in the processor's cache when they are multiplied."""
_FEW: Final = 12
"""So many queries are multiplied with a strip one after the other: up to here a matrix product is slower."""
_MASKS: Final = 8
_COMPACT_ABOVE: Final = 0.25


@dataclass(frozen=True)
class Shard:
    """A fixed view of one modality's rows; later writes make a new Shard and leave this one as it was."""

    vectors_ND: Matrix
    numbers_N: Rows
    ids: Sequence[str]  # may be longer than N
    alive_N: Mask
    cells_N: Cells  # NO_CELL where the approximate search has not placed the row
    ascending_N: Rows  # the numbers in order, and
    rows_by_number_N: Rows  # the row of each of them

    @cached_property
    def by_cell(self) -> tuple[Rows, Rows]:
        """Row indexes sorted by cell, and where each cell starts among them; unplaced rows come first."""
        order = np.argsort(self.cells_N, kind="stable").astype(np.int64)
        top = int(self.cells_N.max(initial=NO_CELL))
        starts = np.searchsorted(self.cells_N[order], np.arange(NO_CELL, top + 2)).astype(np.int64)
        return order, starts

    def rows_of(self, numbers: Rows) -> Rows:
        """The rows that carry one of these numbers."""
        at = np.searchsorted(self.ascending_N, numbers)
        there = np.flatnonzero(at < len(self.ascending_N))
        at = at[there[self.ascending_N[at[there]] == numbers[there]]]
        rows: Rows = self.rows_by_number_N[at]
        return rows

    def mask_of(self, numbers: Rows) -> Mask:
        """Which rows carry one of these numbers; the same array, asked again, has the same answer at once."""
        for known, mask in self._masks[:]:
            if known is numbers:
                return mask
        mask = np.zeros(len(self.numbers_N), dtype=np.bool_)
        mask[self.rows_of(numbers)] = True
        mask.flags.writeable = False
        self._masks.append((numbers, mask))
        del self._masks[:-_MASKS]
        return mask

    @cached_property
    def _masks(self) -> list[tuple[Rows, Mask]]:
        """The last ones asked for. Threads share it, by single steps of a list, none of which another can interrupt."""
        return []


class Growing:
    """The rows of one modality, appended to in place; `view` hands out what is there now."""

    def __init__(self, dim: int, dtype: StoredType) -> None:
        self._ids: list[str] = []
        # Of these the first len(self) rows are in use; a row that a view can see is never written again.
        self._vectors: Matrix = np.empty((0, dim), dtype=np.float16 if dtype == "float16" else np.float32)
        self._numbers: Rows = np.empty(0, dtype=np.int64)
        self._alive: Mask = np.empty(0, dtype=np.bool_)
        self._cells: Cells = np.empty(0, dtype=np.int32)
        self._ascending: Rows = np.empty(0, dtype=np.int64)
        self._rows_by_number: Rows = np.empty(0, dtype=np.int64)
        self._view: Shard | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def reserve(self, rows: int) -> None:
        """Make room for this many rows in all, so that a load does not copy its rows over and over."""
        if rows > len(self._vectors):
            used = len(self)
            self._vectors = _longer(self._vectors, used, rows)
            self._numbers = _longer(self._numbers, used, rows)
            self._alive = _longer(self._alive, used, rows)
            self._cells = _longer(self._cells, used, rows)
            self._ascending = _longer(self._ascending, used, rows)
            self._rows_by_number = _longer(self._rows_by_number, used, rows)

    def append(self, numbers: Sequence[int], ids: Sequence[str], vectors_ND: Matrix, cells: Sequence[int] | Cells) -> None:
        """Rows whose numbers ascend and are above all that were ever here."""
        self._view = None
        start, end = len(self), len(self) + len(ids)
        if end > len(self._vectors):
            self.reserve(max(end, 2 * start))
        self._vectors[start:end] = vectors_ND
        self._numbers[start:end] = self._ascending[start:end] = numbers
        self._rows_by_number[start:end] = np.arange(start, end)
        self._alive[start:end] = True
        self._cells[start:end] = cells
        self._ids.extend(ids)

    def keep_only(self, live: Rows) -> None:
        """Let every row die whose number is not among `live`."""
        self._let_live(np.isin(self._numbers[: len(self)], live))

    def let_die(self, dead: Rows) -> None:
        """Let the rows with these numbers die, those that are here."""
        self._let_live(self._alive[: len(self)] & ~self.view().mask_of(dead))

    def _let_live(self, alive_N: Mask) -> None:
        """Copies the survivors together once a quarter is dead."""
        self._view = None
        self._alive = _longer(alive_N, len(self), len(self._vectors))
        if np.count_nonzero(~alive_N) > _COMPACT_ABOVE * len(self):
            self._take(np.flatnonzero(alive_N))

    def place(self, numbers: Rows, cells: Cells) -> None:
        """Set the cells of the rows with these numbers (ascending) and lay the rows of a cell side by side, for which all are
        copied; every other row becomes unplaced."""
        self._view = None
        self._cells = np.full(len(self._vectors), NO_CELL, dtype=np.int32)
        if len(numbers) and len(self):
            at = np.minimum(np.searchsorted(numbers, self._numbers[: len(self)]), len(numbers) - 1)
            found = numbers[at] == self._numbers[: len(self)]
            self._cells[: len(self)][found] = cells[at[found]]
            self._take(np.argsort(self._cells[: len(self)], kind="stable"))

    def _take(self, rows: Rows) -> None:
        """Keep these rows, in this order, in new arrays: views of the old ones stay as they are."""
        self._vectors, self._numbers = self._vectors[rows], self._numbers[rows]
        self._alive, self._cells = self._alive[rows], self._cells[rows]
        self._ids = [self._ids[row] for row in rows]
        self._rows_by_number = np.argsort(self._numbers)
        self._ascending = self._numbers[self._rows_by_number]

    def view(self) -> Shard:
        if self._view is None:
            used = slice(len(self))
            self._view = Shard(
                vectors_ND=self._vectors[used],
                numbers_N=self._numbers[used],
                ids=self._ids,
                alive_N=self._alive[used],
                cells_N=self._cells[used],
                ascending_N=self._ascending[used],
                rows_by_number_N=self._rows_by_number[used],
            )
        return self._view


def _longer(array: Array, used: int, rows: int) -> Array:
    """A copy with room for `rows`, of which the first `used` are those of `array`."""
    longer = np.empty((rows, *array.shape[1:]), dtype=array.dtype)
    longer[:used] = array[:used]
    return cast(Array, longer)


def margin(dim: int) -> float:
    """More than twice the worst rounding error of a float32 product of two unit vectors of this width."""
    return 2.1 * dim * 2.0**-24 + 1e-6


def exact_rows(shard: Shard, queries_QD: Vectors, k: int, allowed_N: Mask | None) -> list[Rows]:
    """For each query the rows that can be among its best k: a superset, whatever the order of float32 additions."""
    usable_N = shard.alive_N if allowed_N is None else shard.alive_N & allowed_N
    usable = int(np.count_nonzero(usable_N))
    gathered = np.flatnonzero(usable_N) if usable < _GATHER_BELOW * len(usable_N) else None
    total = len(usable_N) if gathered is None else len(gathered)
    lost_N = np.where(usable_N, np.float32(0), np.float32(-np.inf)) if gathered is None and usable < total else None
    step = max(1024, min(_BLOCK_ROWS, _BLOCK_SCORES // max(1, len(queries_QD))))
    slack = np.float32(margin(queries_QD.shape[1]))
    best = np.full((len(queries_QD), k), -np.inf, dtype=np.float32)
    found: list[tuple[Rows, Rows, Scores]] = []
    for start in range(0, total, step):
        rows = slice(start, min(start + step, total)) if gathered is None else gathered[start : start + step]
        scores_QN = _scores(shard.vectors_ND, rows, queries_QD)
        if lost_N is not None:
            scores_QN += lost_N[rows]
        query_at, place_at, scores = _promising(scores_QN, best, slack)
        found.append((query_at, start + place_at if gathered is None else gathered[start + place_at], scores))
    return _narrow(found, len(queries_QD), k, slack)


def _scores(vectors_ND: Matrix, rows: slice | Rows, queries_QD: Vectors) -> Scores:
    """Products of queries and rows in float32; strip by strip where rows are gathered or widened first, or queries are few."""
    if isinstance(rows, slice):
        vectors_ND = vectors_ND[rows]
        if vectors_ND.dtype == np.float32 and len(queries_QD) > _FEW:
            return np.asarray(queries_QD @ vectors_ND.T, dtype=np.float32)
    count = len(vectors_ND) if isinstance(rows, slice) else len(rows)
    scores_QN = np.empty((len(queries_QD), count), dtype=np.float32)
    gathered = np.empty((_STRIP, vectors_ND.shape[1]), dtype=vectors_ND.dtype)
    wide = np.empty((_STRIP, vectors_ND.shape[1]), dtype=np.float32)
    for start in range(0, count, _STRIP):
        end = min(start + _STRIP, count)
        if isinstance(rows, slice):
            strip = vectors_ND[start:end]
        else:
            strip = gathered[: end - start]
            np.take(vectors_ND, rows[start:end], axis=0, out=strip, mode="clip")
        if strip.dtype != np.float32:
            strip = widen(strip, wide[: end - start])
        if len(queries_QD) > _FEW:
            np.matmul(queries_QD, strip.T, out=scores_QN[:, start:end])
        else:
            np.vecdot(strip, queries_QD[:, None], out=scores_QN[:, start:end])
    return scores_QN


def widen(halves: npt.NDArray[np.float16], out: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """float16 as float32, into `out` of the same shape; by torch, whose cast is many times as fast as numpy's."""
    import torch  # here, since an index of float32 does without

    torch.from_numpy(out).copy_(torch.from_numpy(halves))
    return out


def _promising(scores_QN: Scores, best: Scores, slack: np.float32) -> tuple[Rows, Rows, Scores]:
    """Query, place and score of what comes within `slack` of the k-th best so far; `best` [Q, k] keeps the scores of all blocks.

    One comparison of all scores a block: after the first block next to nothing passes it.
    """
    rows, k = scores_QN.shape[1], best.shape[1]
    first = rows >= k and bool(np.isneginf(best).all())
    if first:
        best[:] = np.partition(scores_QN, -k, axis=1)[:, -k:]
    lowest = np.finfo(np.float32).min  # leaves out the rows that are gone
    bounds = np.maximum(best.min(axis=1) - slack, lowest)
    flat = np.flatnonzero(scores_QN >= bounds[:, None])
    query_at, place_at = np.divmod(flat, rows)
    scores: Scores = scores_QN.ravel()[flat]
    ends = np.searchsorted(query_at, np.arange(len(best) + 1))
    for query in () if first else np.unique(query_at):
        own = np.concatenate([best[query], scores[ends[query] : ends[query + 1]]])
        best[query] = np.partition(own, -k)[-k:]
    return query_at, place_at, scores


def _narrow(found: list[tuple[Rows, Rows, Scores]], queries: int, k: int, slack: np.float32) -> list[Rows]:
    """Drop what later blocks have overtaken, query by query."""
    if not found:
        return [np.empty(0, dtype=np.int64) for _ in range(queries)]
    query_at = np.concatenate([part[0] for part in found])
    rows = np.concatenate([part[1] for part in found])
    scores = np.concatenate([part[2] for part in found])
    order = np.argsort(query_at, kind="stable")
    rows, scores = rows[order], scores[order]
    ends = np.searchsorted(query_at[order], np.arange(queries + 1))
    kept: list[Rows] = []
    for start, end in pairwise(ends):
        own_rows, own_scores = rows[start:end], scores[start:end]
        if len(own_rows) > k:
            own_rows = own_rows[own_scores >= np.partition(own_scores, -k)[-k] - slack]
        kept.append(own_rows)
    return kept


def promising_rows(shard: Shard, rows: Rows, query_D: Vector, k: int) -> Rows:
    """Those of `rows` that can be among the best k of them; cheaper than to rescore them all."""
    if len(rows) <= 2 * k:
        return rows
    scores = _scores(shard.vectors_ND, rows, query_D[None])[0]
    kept: Rows = rows[scores >= np.partition(scores, -k)[-k] - np.float32(margin(len(query_D)))]
    return kept


def rescore(vectors_ND: Matrix, query_D: Vector) -> Scores:
    """Cosines added up in float64 in one fixed order, so that equal vectors score equally wherever they are stored."""
    products = vectors_ND.astype(np.float64) * query_D.astype(np.float64)
    scores: Scores = np.clip(products.sum(axis=1), -1.0, 1.0).astype(np.float32)
    return scores
