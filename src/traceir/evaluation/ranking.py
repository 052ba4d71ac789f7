"""Exact search over candidates that need not fit into memory: ranks of all positives, the best k, union pools, run files.

Candidates come as blocks of vectors, in order; the place of a candidate is its number in that order, from 0. Each slice of a
block is multiplied with one chunk of queries after the other, so that all candidates are read from disk once, whatever the number
of queries.

Ranks follow metrics.py: pessimistic ties within TIE. Scores are float32 matrix products. Two products of different shapes may
add up in a different order, and differ by about 1e-7; the scores of positives, which are computed first, from the very same
vectors, and the scores of equal candidates in other blocks are therefore equal only to within rounding. TIE is several times
that, so equal candidates always tie. A candidate whose score is below a positive's by TIE to within rounding may fall on either
side, here as in metrics.rank_positives itself.

Shapes: Q queries, N candidates, D width, K best, L levels. Within a search, Q and N are those of one chunk and one slice, and
`scores` are [N, Q].
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from traceir.errors import InputError, StoreError
from traceir.evaluation.metrics import TIE, Ranks
from traceir.items import Vector

Matrix = npt.NDArray[np.floating[Any]]
Scores = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Cells = tuple[Places, Places]

CHUNK: Final = 256
SLICE: Final = 512
"""Candidates multiplied at once: the scores of a slice and a chunk stay in the processor's cache while they are read again."""
_FOLD: Final = 16
NO_PLACE: Final = -1
"""Where a pool holds fewer than k candidates."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """What a search found for each query, in order.

    `ranks` holds the pessimistic ranks of the positives in the query's pool, ascending; empty where there are none. `scores`
    and `places`, [Q, K], are the best k, best first, equal scores by place; -inf and NO_PLACE where the pool holds fewer. `size`
    is N.
    """

    ranks: tuple[Ranks, ...]
    scores: Scores
    places: Places
    size: int

    @property
    def best(self) -> Ranks:
        """Rank of the best positive of each query, N + 1 where there is none: as metrics.rank_positives."""
        return np.array([int(own[0]) if len(own) else self.size + 1 for own in self.ranks], dtype=np.int64)


def rank_queries(
    queries_QD: Vector,
    blocks: Iterable[Matrix],
    relevant: Sequence[Iterable[int]],
    *,
    top_k: int = 50,
    allowed: Sequence[Iterable[int] | None] | None = None,
    excluded: Sequence[Iterable[int]] | None = None,
    chunk: int = CHUNK,
    progress: bool = False,
) -> Ranking:
    """Ranks the positives of each query among all candidates of its pool, and finds the best k.

    `relevant` are places of positives. Of each query, `allowed` are the places of its pool (None: all), `excluded` those left out
    of it; a positive outside the pool is as if it were not there. `blocks` is iterated twice, once for the rows of positives,
    once for all, so it must not be a generator. Memory: the queries twice, one slice of candidates and its scores, Q x K
    results, a few numbers for each positive.
    """
    _check(queries_QD, blocks, relevant, top_k, allowed, excluded, chunk)
    search = _Search(queries_QD, relevant, allowed, excluded, top_k, chunk)
    seen: int | None = None
    if len(search.positives):
        seen = 0
        for block_ND in blocks:
            search.score_positives(block_ND, seen)
            seen += len(block_ND)
    search.start_counting(seen)
    size = 0
    with tqdm(total=seen, desc="searching", unit=" candidates", unit_scale=True, disable=not progress, mininterval=2.0) as bar:
        for block_ND in blocks:
            search.count(block_ND, size)
            size += len(block_ND)
            bar.update(len(block_ND))
    if seen not in (None, size):
        raise StoreError(f"the blocks held {seen} vectors when first read and {size} then; is something writing them?")
    return search.result(size)


class Pool:
    """The candidates of one local pool, or of several one after the other; a did that occurs again is left out.

    Each part is its dids, in order, and blocks of their vectors. Memory: the dids as bytes of fixed width, twice.
    """

    def __init__(self, parts: Iterable[tuple[Iterable[str], Iterable[Matrix]]]) -> None:
        columns: list[npt.NDArray[np.bytes_]] = []
        self._blocks: list[tuple[Iterable[Matrix], int]] = []
        for dids, blocks in parts:
            column = _column(dids)
            columns.append(column)
            self._blocks.append((blocks, len(column)))
        every = np.concatenate(columns) if columns else np.empty(0, dtype="S1")
        order = np.argsort(every, kind="stable")  # of equal dids the first stays first
        again = np.zeros(len(every), dtype=np.bool_)
        again[1:] = every[order][1:] == every[order][:-1]
        self._keep = np.ones(len(every), dtype=np.bool_)
        self._keep[order[again]] = False
        self._dids = every[self._keep]
        self._places = (np.cumsum(self._keep) - 1)[order[~again]]
        self._sorted = every[order[~again]]

    def __len__(self) -> int:
        return len(self._dids)

    def __iter__(self) -> Iterator[Matrix]:
        """Blocks of vectors without repeated candidates. Raises StoreError where vectors and dids are not equally many."""
        first = 0
        for blocks, size in self._blocks:
            end = first + size
            for block_ND in blocks:
                keep = self._keep[first : min(first + len(block_ND), end)]
                if len(keep) != len(block_ND):
                    raise StoreError(f"a pool of {size} candidates has more vectors than that; encode it again")
                yield block_ND if keep.all() else block_ND[keep]
                first += len(block_ND)
            if first != end:
                raise StoreError(f"a pool of {size} candidates has {size - end + first} vectors; encode it again")

    def places(self, dids: Iterable[str]) -> Places:
        """Places of those dids that the pool holds; M-BEIR's qrels name candidates of other pools too, which are dropped."""
        width = self._sorted.dtype.itemsize
        known = [did for did in (did.encode() for did in dids) if len(did) <= width]
        if not known or not len(self):
            return np.empty(0, dtype=np.int64)
        wanted = np.array(known, dtype=self._sorted.dtype)
        at = np.minimum(np.searchsorted(self._sorted, wanted), len(self) - 1)
        found: Places = self._places[at[self._sorted[at] == wanted]]
        return found

    def did(self, place: int) -> str:
        return bytes(self._dids[place]).decode()


def write_run(
    file: Path, qids: Sequence[str], ranking: Ranking, pool: Pool, *, run_id: str, task_ids: int | Sequence[int]
) -> Path:
    """The best k of each query as M-BEIR's run file: `qid Q0 did rank score run_id task_id`, separated by blanks.

    `task_ids` is that of all queries, or one for each. Scores have nine digits, which name a float32 exactly. The file is
    written beside its place and renamed.
    """
    tasks = [task_ids] * len(qids) if isinstance(task_ids, int) else list(task_ids)
    if not len(qids) == len(tasks) == len(ranking.places):
        raise InputError(f"{len(qids)} qids and {len(tasks)} task ids for {len(ranking.places)} queries; give one for each")
    for name in (run_id, *qids):
        if name.split() != [name]:
            raise InputError(f"{name!r} is not one word; run files are separated by blanks")
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with fresh.open("w", encoding="utf-8", newline="\n") as stream:
        for qid, task, scores, places in zip(qids, tasks, ranking.scores, ranking.places, strict=True):
            found = zip(places[places != NO_PLACE].tolist(), scores.tolist(), strict=False)
            for rank, (place, score) in enumerate(found, start=1):
                stream.write(f"{qid} Q0 {pool.did(place)} {rank} {score:.9g} {run_id} {task}\n")
    os.replace(fresh, file)
    return file


class _Search:
    """One call of rank_queries: what has been counted and found so far. Queries are sorted by their number of positives."""

    def __init__(
        self,
        queries_QD: Vector,
        relevant: Sequence[Iterable[int]],
        allowed: Sequence[Iterable[int] | None] | None,
        excluded: Sequence[Iterable[int]] | None,
        top_k: int,
        chunk: int,
    ) -> None:
        count = len(queries_QD)
        limited = np.array([own is not None for own in allowed or [None] * count], dtype=np.bool_)
        pairs = _Pairs.of([() if own is None else own for own in allowed or ()])
        left_out = _Pairs.of(excluded or ())
        positives = _Pairs.of(relevant)
        inside = ~limited[positives.queries] | positives.within(pairs)
        positives = positives.keep(inside & ~positives.within(left_out))
        # Neighbours with equally many positives are counted in as many passes, whatever others need.
        self.order = np.argsort(-np.bincount(positives.queries, minlength=count), kind="stable")
        column = np.empty(count, dtype=np.int64)
        column[self.order] = np.arange(count)
        self.positives, self.allowed, self.excluded = (one.renamed(column) for one in (positives, pairs, left_out))
        self.scores: Scores = np.full(len(positives), np.nan, dtype=np.float32)
        self.chunks: list[_Chunk] = []
        for first in range(0, count, chunk):
            rows = self.order[first : first + chunk]
            self.chunks.append(_Chunk(first, np.ascontiguousarray(queries_QD[rows].T), limited[rows], _Top(len(rows), top_k)))
        self.values_ND: Vector = np.empty((SLICE, queries_QD.shape[1]), dtype=np.float32)
        cells = SLICE * (len(self.chunks[0]) if self.chunks else 0)
        self.scores_buffer: Scores = np.empty(cells, dtype=np.float32)
        self.mask_buffer: Mask = np.empty(cells, dtype=np.bool_)
        self.top_k = top_k

    def score_positives(self, block_ND: Matrix, first: int) -> None:
        """Scores of the positives within one block, by the same product as all scores, over their rows alone."""
        own = self.positives.between(first, first + len(block_ND))
        if not len(own):
            return
        rows, row_at = np.unique(own.places, return_inverse=True)
        values_ND = block_ND[rows - first].astype(np.float32, copy=False)
        for chunk in self.chunks:
            span = own.of_queries(chunk.first, chunk.first + len(chunk))
            if span.start < span.stop:
                used, used_at = np.unique(row_at[span], return_inverse=True)
                scores = values_ND[used] @ chunk.columns
                self.scores[own.numbers[span]] = scores[used_at, own.queries[span] - chunk.first]

    def start_counting(self, size: int | None) -> None:
        """Sorts each query's positives, best first, and sets below which score a candidate is below each of them."""
        if size is not None:
            self._check_places(size)
        order = np.lexsort((-self.scores, self.positives.queries))  # a score that is not a number comes last
        queries, scores = self.positives.queries[order], self.scores[order]
        unknown = np.isin(queries, queries[np.isnan(scores)])
        # The least number is above -inf, which stands for what is outside a pool, and not above what is no number.
        floors = np.where(unknown, np.finfo(np.float32).min, scores - TIE).astype(np.float32)
        level = _number_in_group(queries, len(self.order))
        bounds = np.searchsorted(queries, [chunk.first for chunk in self.chunks] + [len(self.order)])
        for chunk, start, stop in zip(self.chunks, bounds[:-1], bounds[1:], strict=True):
            chunk.start_counting(level[start:stop], queries[start:stop] - chunk.first, floors[start:stop])

    def count(self, block_ND: Matrix, first: int) -> None:
        """Counts what is above each positive in one block, and takes what may be among the best k."""
        block_ND = np.asarray(block_ND)
        for start in range(0, len(block_ND), SLICE):
            place, rows = first + start, min(SLICE, len(block_ND) - start)
            values_ND = self.values_ND[:rows]
            np.copyto(values_ND, block_ND[start : start + rows])  # a product of what is in the cache is faster
            own = [pairs.between(place, place + rows) for pairs in (self.positives, self.allowed, self.excluded)]
            for chunk in self.chunks:
                cells, shape = rows * len(chunk), (rows, len(chunk))
                scores = self.scores_buffer[:cells].reshape(shape)
                np.matmul(values_ND, chunk.columns, out=scores)
                positives, allowed, excluded = [_cells(pairs, place, chunk) for pairs in own]
                chunk.leave_out(scores, allowed, excluded)
                chunk.top.add(scores, place, self.mask_buffer[:cells].reshape(shape))
                if positives is not None:
                    scores[positives] = -np.inf  # positives never push each other down
                chunk.count_above(scores, self.mask_buffer)

    def result(self, size: int) -> Ranking:
        self._check_places(size)
        scores = np.empty((len(self.order), self.top_k), dtype=np.float32)
        places = np.empty((len(self.order), self.top_k), dtype=np.int64)
        ranks: list[Ranks] = [np.empty(0, dtype=np.int64)] * len(self.order)
        for chunk in self.chunks:
            rows = self.order[chunk.first : chunk.first + len(chunk)]
            scores[rows], places[rows] = chunk.top.finish()
            for column, row in enumerate(rows):
                own = chunk.above_LQ[: np.count_nonzero(chunk.widths > column), column]
                ranks[row] = own + np.arange(1, len(own) + 1)
        return Ranking(tuple(ranks), scores, places, size)

    def _check_places(self, size: int) -> None:
        for pairs, name in ((self.positives, "relevant"), (self.allowed, "allowed"), (self.excluded, "excluded")):
            if len(pairs) and not 0 <= int(pairs.places.min()) <= int(pairs.places.max()) < size:
                wrong = pairs.places[(pairs.places < 0) | (pairs.places >= size)][0]
                raise InputError(f"{name} place {wrong} does not exist; the pool has places 0 to {size - 1}")


class _Chunk:
    """Some queries, side by side, and the counts of their positives: level L is a query's L-th best positive."""

    def __init__(self, first: int, columns: Vector, limited: Mask, top: _Top) -> None:
        self.first, self.columns, self.top = first, columns, top
        self.limited = np.flatnonzero(limited)

    def __len__(self) -> int:
        return int(self.columns.shape[1])

    def start_counting(self, level: Places, column: Places, floors: Scores) -> None:
        levels = int(level.max(initial=-1)) + 1
        self.floors_LQ = np.zeros((levels, len(self)), dtype=np.float32)
        self.floors_LQ[level, column] = floors
        self.widths = np.bincount(level, minlength=levels)  # queries with a positive at each level: always the first ones
        self.above_LQ = np.zeros((levels, len(self)), dtype=np.int64)

    def leave_out(self, scores: Scores, allowed: Cells | None, excluded: Cells | None) -> None:
        """-inf for what is outside a query's pool."""
        if len(self.limited):
            kept = scores[allowed] if allowed is not None else None
            scores[:, self.limited] = -np.inf
            if allowed is not None:
                scores[allowed] = kept
        if excluded is not None:
            scores[excluded] = -np.inf

    def count_above(self, scores: Scores, buffer: Mask) -> None:
        """Adds the candidates that are not below each positive; what is not a number is not below."""
        rows = len(scores)
        for floors, above, width in zip(self.floors_LQ, self.above_LQ, self.widths.tolist(), strict=True):
            below = buffer[: rows * width].reshape(rows, width)
            np.less(scores[:, :width], floors[:width], out=below)
            ones = below.view(np.uint8)
            above[:width] += rows
            for start in range(0, rows, 255):  # as many ones as a byte can count, which is several times as fast
                above[:width] -= np.add.reduce(ones[start : start + 255], axis=0, dtype=np.uint8)


class _Top:
    """The best k of the queries of one chunk. What may be among them waits until it is worth a merge.

    A found candidate is one number: its place x Q + the number of its query.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.queries, self.k = queries, k
        self._set_floors(np.full(queries, -np.inf, dtype=np.float32))
        self.found: Places = np.empty(0, dtype=np.int64)
        self.scores: Scores = np.empty(0, dtype=np.float32)
        self.waiting: list[tuple[Places, Scores]] = []
        self.count = 0
        self.fresh = True

    def add(self, scores: Scores, first: int, mask: Mask) -> None:
        """Takes the candidates of one slice, whose first place is `first`. Slices come in order of places."""
        rows = len(scores)
        if self.fresh and rows > self.k:
            known_QN = np.where(np.isnan(scores), np.float32(-np.inf), scores).T.copy()
            best = np.partition(known_QN, rows - self.k, axis=1)[:, rows - self.k]
            self._set_floors(np.nextafter(best, np.float32(-np.inf)))
        self.fresh = False
        # Strictly above: of equal scores the earlier place is kept, and it is already there. Several rows are compared as one.
        fold = math.gcd(rows, _FOLD)
        width = fold * self.queries
        np.greater(scores.reshape(-1, width), self.floors[:width], out=mask.reshape(-1, width))
        cells = np.flatnonzero(mask)
        if not len(cells):
            return
        self.waiting.append((cells + first * self.queries, scores.reshape(-1)[cells]))
        self.count += len(cells)
        if self.count >= self.queries * self.k:
            self._merge()

    def finish(self) -> tuple[Scores, Places]:
        """Scores and places [Q, K], best first."""
        self._merge()
        query = self.found % self.queries
        order = np.lexsort((self.found, -self.scores, query))
        number = _number_in_group(query[order], self.queries)
        best = order[number < self.k]
        at = query[best], number[number < self.k]
        scores = np.full((self.queries, self.k), -np.inf, dtype=np.float32)
        places = np.full((self.queries, self.k), NO_PLACE, dtype=np.int64)
        scores[at], places[at] = self.scores[best], self.found[best] // self.queries
        return scores, places

    def _merge(self) -> None:
        """Drops what is below each query's k-th best score; what equals it is kept until `finish`."""
        found = np.concatenate([self.found, *(part[0] for part in self.waiting)])
        scores = np.concatenate([self.scores, *(part[1] for part in self.waiting)])
        query = found % self.queries
        order = np.argsort(query.astype(np.min_scalar_type(self.queries)), kind="stable")
        number = _number_in_group(query[order], self.queries)
        table_QN = np.full((self.queries, max(self.k, int(number.max(initial=0)) + 1)), -np.inf, dtype=np.float32)
        table_QN[query[order], number] = scores[order]
        self._set_floors(np.partition(table_QN, -self.k, axis=1)[:, -self.k])
        keep = scores >= self.floors[query]
        self.found, self.scores = found[keep], scores[keep]
        self.waiting, self.count = [], 0

    def _set_floors(self, floors: Scores) -> None:
        self.floors: Scores = np.tile(floors, _FOLD)


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Pairs of a query and a place, by place; `numbers` tells where a selection comes from."""

    queries: Places
    places: Places
    numbers: Places

    @classmethod
    def of(cls, places: Sequence[Iterable[int]]) -> _Pairs:
        own = [np.unique(np.asarray(given if isinstance(given, np.ndarray) else list(given), dtype=np.int64)) for given in places]
        queries = np.repeat(np.arange(len(own), dtype=np.int64), np.array([len(one) for one in own], dtype=np.int64))
        every = np.concatenate([np.empty(0, dtype=np.int64), *own])
        order = np.argsort(every, kind="stable")
        return cls(queries[order], every[order], np.arange(len(order), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.places)

    def renamed(self, names: Places) -> _Pairs:
        """The same pairs with other numbers of queries."""
        return _Pairs(names[self.queries], self.places, self.numbers)

    def keep(self, mask: Mask) -> _Pairs:
        """Those of a mask, numbered anew."""
        return _Pairs(self.queries[mask], self.places[mask], np.arange(np.count_nonzero(mask), dtype=np.int64))

    def within(self, other: _Pairs) -> Mask:
        """Which of these pairs are also pairs of the other."""
        if not len(self) or not len(other):
            return np.zeros(len(self), dtype=np.bool_)
        base = 1 + max(int(self.queries.max()), int(other.queries.max()))
        return np.isin(self.places * base + self.queries, other.places * base + other.queries)

    def between(self, first: int, last: int) -> _Pairs:
        """Those with places of one block, by query."""
        if not len(self):
            return self
        start, stop = np.searchsorted(self.places, (first, last))
        order = start + np.argsort(self.queries[start:stop], kind="stable")
        return _Pairs(self.queries[order], self.places[order], self.numbers[order])

    def of_queries(self, first: int, last: int) -> slice:
        """Where the pairs of some queries stand in what `between` returned."""
        start, stop = np.searchsorted(self.queries, [first, last])
        return slice(int(start), int(stop))


def _cells(pairs: _Pairs, first: int, chunk: _Chunk) -> Cells | None:
    """Where the pairs of one slice are in the scores of a chunk; None where there are none, which is usual and quick."""
    if not len(pairs):
        return None
    span = pairs.of_queries(chunk.first, chunk.first + len(chunk))
    return (pairs.places[span] - first, pairs.queries[span] - chunk.first) if span.start < span.stop else None


def _number_in_group(groups: Places, count: int) -> Places:
    """For ascending group numbers, each entry's number within its group, from 0."""
    starts = np.searchsorted(groups, np.arange(count))
    numbers: Places = np.arange(len(groups)) - starts[groups]
    return numbers


def _column(dids: Iterable[str]) -> npt.NDArray[np.bytes_]:
    """Dids as bytes of fixed width."""
    pieces: list[npt.NDArray[np.bytes_]] = []
    piece: list[bytes] = []
    for did in dids:
        if not did or "\0" in did:
            raise InputError(f"did {did!r} is empty or holds a null character")
        piece.append(did.encode())
        if len(piece) == 1 << 16:
            pieces.append(np.array(piece))
            piece = []
    return np.concatenate([*pieces, np.array(piece, dtype=None if piece else "S1")])


def _check(
    queries_QD: Vector,
    blocks: Iterable[Matrix],
    relevant: Sequence[Iterable[int]],
    top_k: int,
    allowed: Sequence[Iterable[int] | None] | None,
    excluded: Sequence[Iterable[int]] | None,
    chunk: int,
) -> None:
    if queries_QD.ndim != 2 or queries_QD.dtype != np.float32:
        raise InputError(f"queries are {queries_QD.dtype} {list(queries_QD.shape)}; give float32 [Q, D]")
    for name, given in (("relevant", relevant), ("allowed", allowed), ("excluded", excluded)):
        if given is not None and len(given) != len(queries_QD):
            raise InputError(f"{name} has {len(given)} entries for {len(queries_QD)} queries; give one for each")
    if top_k < 1 or chunk < 1:
        raise InputError(f"top_k is {top_k} and chunk is {chunk}; both must be at least 1")
    if iter(blocks) is blocks:
        raise InputError("blocks can be read once only; give a list or another object that can be iterated again")
