"""Exact search over candidates that need not fit into memory: ranks of all positives, the best k, union pools, run files.

Candidates come as blocks of vectors, in order; the position of a candidate is its number in that order, from 0. Each slice of a
block is multiplied with one chunk of queries after the other, so that all candidates are read from disk once, whatever the number
of queries. Ranks follow metrics.py: pessimistic ties within TIE, which is several times the rounding of a float32 product, so
that equal candidates tie in whichever blocks they lie.

Shapes: Q queries, N candidates, D width, K best, L levels (a query's L-th best positive), P pairs of query and position. Within a
search, Q and N are those of one chunk and one slice, and `scores` are [N, Q].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from traceir.errors import StoreError
from traceir.evaluation.metrics import TIE, Ranks
from traceir.files import replacing
from traceir.items import Vector

Matrix = npt.NDArray[np.floating[Any]]
Scores = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

CHUNK: Final = 256
SLICE: Final = 512
"""Candidates multiplied at once: the scores of a slice and a chunk stay in the processor's cache while they are read again."""
NO_POSITION: Final = -1
"""Where a pool holds fewer than k candidates."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """What a search found for each query, in order.

    `ranks` holds the pessimistic ranks of the positives in the pool, ascending; empty where there are none. `scores` and
    `positions`, [Q, K], hold the best k, best first, ties by position; -inf and NO_POSITION where there are fewer. `size` is N.
    """

    ranks: tuple[Ranks, ...]
    scores: Scores
    positions: Positions
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
    excluded: Sequence[Iterable[int]] | None = None,
    chunk: int = CHUNK,
    progress: bool = False,
) -> Ranking:
    """Ranks the positives of each query among all candidates, and finds the best k.

    `relevant` are positions of positives, `excluded` of candidates that are as if they were not there for a query. `blocks` is
    iterated twice, once for the rows of positives, once for all, so it must not be a generator. Memory: the queries twice, one
    slice of candidates and its scores, Q x K results, a few numbers for each positive.
    """
    count = len(queries_QD)
    hidden, right = _pairs(excluded or ()), _pairs(relevant)
    right = right[:, ~np.isin(right[1] * count + right[0], hidden[1] * count + hidden[0])]
    # Queries with most positives first: neighbours are counted in as many passes, whatever others need.
    order = np.argsort(-np.bincount(right[0], minlength=count), kind="stable")
    right[0], hidden[0] = (np.argsort(order)[pairs[0]] for pairs in (right, hidden))
    sorted_QD = queries_QD[order]
    scores, seen = _score_pairs(sorted_QD, blocks, right)
    chunks = [_Chunk(sorted_QD[first : first + chunk], first, right, scores, top_k) for first in range(0, count, chunk)]
    size, entries = 0, SLICE * min(chunk, count)
    buffers = np.empty(entries, dtype=np.float32), np.empty(entries, dtype=np.bool_)  # fresh memory for each slice costs time
    with tqdm(total=seen, desc="searching", unit=" candidates", unit_scale=True, disable=not progress, mininterval=2.0) as bar:
        for block_ND in blocks:
            for start in range(0, len(block_ND), SLICE):
                values_ND = np.ascontiguousarray(block_ND[start : start + SLICE], dtype=np.float32)
                near = [_between(pairs, size + start, len(values_ND)) for pairs in (right, hidden)]
                for part in chunks:
                    part.add(values_ND, size + start, near[0], near[1], buffers)
            size += len(block_ND)
            bar.update(len(block_ND))
    if seen not in (None, size):
        raise StoreError(f"the blocks held {seen} vectors when first read and {size} then; is something writing them?")
    best_scores, best_positions = np.empty((count, top_k), dtype=np.float32), np.empty((count, top_k), dtype=np.int64)
    ranks: list[Ranks] = [np.empty(0, dtype=np.int64)] * count
    for part in chunks:
        rows = order[part.first : part.first + part.count]
        best_scores[rows], best_positions[rows] = part.best()
        for row, own in zip(rows, part.ranks(), strict=True):
            ranks[row] = own
    return Ranking(tuple(ranks), best_scores, best_positions, size)


def _score_pairs(queries_QD: Vector, blocks: Iterable[Matrix], pairs: Positions) -> tuple[Scores, int | None]:
    """The scores of pairs [P], and how many candidates there are; None where nothing had to be read."""
    scores, seen = np.full(pairs.shape[1], np.nan, dtype=np.float32), 0
    if not len(scores):
        return scores, None
    for block_ND in blocks:
        own = _between(pairs, seen, len(block_ND))
        first = int(np.searchsorted(pairs[1], seen))
        for start in range(0, own.shape[1], SLICE):
            queries, chosen = own[:, start : start + SLICE]
            rows = block_ND[chosen - seen].astype(np.float32, copy=False)
            scores[first + start : first + start + len(rows)] = np.einsum("pd,pd->p", rows, queries_QD[queries])
        seen += len(block_ND)
    return scores, seen


class _Chunk:
    """Some queries, side by side: counts of what is above their positives, and their best k.

    What may be among the best waits until it is worth a merge. It is one number, its position x Q + the number of its query.
    """

    def __init__(self, queries_QD: Vector, first: int, right: Positions, scores: Scores, top_k: int) -> None:
        self.first, self.count, self.k, self.waiting = first, len(queries_QD), top_k, 0
        self.columns_DQ = np.ascontiguousarray(queries_QD.T)
        self.best_floor = np.full(self.count, -np.inf, dtype=np.float32)
        self.entries, self.scores = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.float32)]
        own = (right[0] >= first) & (right[0] < first + self.count)
        query, score = right[0][own] - first, scores[own]
        by_score = np.lexsort((-score, query))  # a score that is not a number comes last
        query, score = query[by_score], score[by_score]
        level = _number_in_group(query, self.count)
        self.widths = np.bincount(level)  # queries with a positive at each level: always the first ones
        # The least number is above -inf, which stands for what is excluded, and not above what is no number.
        unknown = np.isin(query, query[np.isnan(score)])
        self.floors_LQ = np.zeros((len(self.widths), self.count), dtype=np.float32)
        self.floors_LQ[level, query] = np.where(unknown, np.finfo(np.float32).min, score - TIE)
        self.above_LQ = np.zeros(self.floors_LQ.shape, dtype=np.int64)

    def add(self, values_ND: Vector, begin: int, right: Positions, hidden: Positions, buffers: tuple[Scores, Mask]) -> None:
        """Takes one slice of candidates, the first of which is at `begin`. Slices come in order."""
        shape = len(values_ND), self.count
        scores = buffers[0][: shape[0] * shape[1]].reshape(shape)
        mask = buffers[1][: shape[0] * shape[1]].reshape(shape)
        np.matmul(values_ND, self.columns_DQ, out=scores)
        self._hide(scores, begin, hidden)
        # Strictly above: of equal scores the earlier position is kept, and it is already there.
        entries = np.flatnonzero(np.greater(scores, self.best_floor, out=mask))
        if len(entries):
            self.entries.append(entries + begin * self.count)
            self.scores.append(scores.reshape(-1)[entries])
            self.waiting += len(entries)
            if self.waiting >= self.count * self.k:
                self._merge()
        self._hide(scores, begin, right)  # positives never push each other down
        for floors, above, width in zip(self.floors_LQ, self.above_LQ, self.widths.tolist(), strict=True):
            below = buffers[1][: shape[0] * width].reshape(shape[0], width)
            np.less(scores[:, :width], floors[:width], out=below)  # what is not a number is not below
            above[:width] += shape[0]
            for start in range(0, shape[0], 255):  # as many ones as a byte can count, which is several times as fast
                above[:width] -= np.add.reduce(below.view(np.uint8)[start : start + 255], axis=0, dtype=np.uint8)

    def ranks(self) -> Iterator[Ranks]:
        """Of each query, ascending."""
        for column in range(self.count):
            own = self.above_LQ[: np.count_nonzero(self.widths > column), column]
            yield own + np.arange(1, len(own) + 1)

    def best(self) -> tuple[Scores, Positions]:
        """Scores and positions [Q, K], best first, equal scores by position."""
        self._merge()
        query = self.entries[0] % self.count
        order = np.lexsort((-self.scores[0], query))
        number = _number_in_group(query[order], self.count)
        order, number = order[number < self.k], number[number < self.k]
        scores = np.full((self.count, self.k), -np.inf, dtype=np.float32)
        positions = np.full((self.count, self.k), NO_POSITION, dtype=np.int64)
        scores[query[order], number] = self.scores[0][order]
        positions[query[order], number] = self.entries[0][order] // self.count
        return scores, positions

    def _merge(self) -> None:
        """Drops what is below each query's k-th best score; what equals it is kept until the end."""
        entries, scores = np.concatenate(self.entries), np.concatenate(self.scores)
        query = (entries % self.count).astype(np.min_scalar_type(self.count))  # small numbers are sorted faster
        order = np.argsort(query, kind="stable")
        number = _number_in_group(query[order], self.count)
        table_QN = np.full((self.count, max(self.k, int(number.max(initial=0)) + 1)), -np.inf, dtype=np.float32)
        table_QN[query[order], number] = scores[order]
        self.best_floor = np.partition(table_QN, -self.k, axis=1)[:, -self.k]
        keep = scores >= self.best_floor[query]
        self.entries, self.scores, self.waiting = [entries[keep]], [scores[keep]], 0

    def _hide(self, scores: Scores, start: int, pairs: Positions) -> None:
        if pairs.shape[1]:
            queries, positions = pairs[:, (pairs[0] >= self.first) & (pairs[0] < self.first + self.count)]
            scores[positions - start, queries - self.first] = -np.inf


class Pool:
    """The candidates of one local pool, or of several one after the other; a did that occurs again is left out.

    Each part is its dids, in order, and blocks of their vectors. Memory: the dids as bytes of fixed width, twice.
    """

    def __init__(self, parts: Iterable[tuple[Iterable[str], Iterable[Matrix]]]) -> None:
        columns: list[npt.NDArray[np.bytes_]] = [np.empty(0, dtype="S1")]
        self._blocks: list[tuple[Iterable[Matrix], int]] = []
        for dids, blocks in parts:
            encoded = [did.encode() for did in dids]
            columns.append(np.array(encoded, dtype=None if encoded else "S1"))
            self._blocks.append((blocks, len(columns[-1])))
        every = np.concatenate(columns)
        self._sorted, first = np.unique(every, return_index=True)
        self._keep = np.zeros(len(every), dtype=np.bool_)
        self._keep[first] = True
        self._dids = every[self._keep]
        self._positions = (np.cumsum(self._keep) - 1)[first]

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

    def positions(self, dids: Iterable[str]) -> Positions:
        """Positions of those dids that the pool holds; M-BEIR's qrels name candidates of other pools too, which are dropped."""
        width = self._sorted.dtype.itemsize
        known = [did for did in (did.encode() for did in dids) if len(did) <= width]
        if not known or not len(self):
            return np.empty(0, dtype=np.int64)
        wanted = np.array(known, dtype=self._sorted.dtype)
        at = np.minimum(np.searchsorted(self._sorted, wanted), len(self) - 1)
        positions: Positions = self._positions[at[self._sorted[at] == wanted]]
        return positions

    def did(self, position: int) -> str:
        return bytes(self._dids[position]).decode()


def write_run(file: Path, qids: Sequence[str], ranking: Ranking, pool: Pool, *, run_id: str, task_id: int) -> None:
    """The best k of each query as M-BEIR's run file: `qid Q0 did rank score run_id task_id`, separated by blanks.

    Scores have nine digits, which name a float32 exactly. The file is there whole or not at all.
    """
    with replacing(file) as stream:
        for qid, scores, positions in zip(qids, ranking.scores, ranking.positions, strict=True):
            own = zip(positions[positions != NO_POSITION].tolist(), scores.tolist(), strict=False)
            for rank, (position, score) in enumerate(own, start=1):
                stream.write(f"{qid} Q0 {pool.did(position)} {rank} {score:.9g} {run_id} {task_id}\n")


def _pairs(positions: Sequence[Iterable[int]]) -> Positions:
    """Queries and positions [2, P], by position, each pair once."""
    own = [np.unique(np.asarray(those if isinstance(those, np.ndarray) else list(those), dtype=np.int64)) for those in positions]
    every = np.concatenate([np.empty(0, dtype=np.int64), *own])
    queries = np.repeat(np.arange(len(own), dtype=np.int64), np.array(list(map(len, own)), dtype=np.int64))
    return np.stack([queries, every])[:, np.argsort(every, kind="stable")]


def _between(pairs: Positions, first: int, count: int) -> Positions:
    """Those with one of `count` positions from `first`."""
    start, stop = np.searchsorted(pairs[1], (first, first + count))
    return pairs[:, start:stop]


def _number_in_group(groups: Positions, count: int) -> Positions:
    """For ascending group numbers, each entry's number within its group, from 0."""
    numbers: Positions = np.arange(len(groups)) - np.searchsorted(groups, np.arange(count))[groups]
    return numbers
