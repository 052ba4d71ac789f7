"""Approximate search by cells: rows are grouped around centroids, and a query looks into the nearest cells only.

This is the inverted file of the literature with spherical k-means. Each modality has cells of its own: queries and
candidates of different modalities lie apart, and a shared partition loses neighbours across that gap.
Shapes: N rows, D width, C cells; centroids are [C, D].
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from traceir.errors import InputError
from traceir.index.matrix import Cells, Mask, Matrix, Rows, Shard
from traceir.index.store import Vectors
from traceir.items import Vector

_ROUNDS: Final = 10
_SAMPLE_PER_CELL: Final = 64
_BLOCK: Final = 16_384


def default_cells(rows: int) -> int:
    return max(1, round(2 * math.sqrt(rows)))


def default_probes(cells: int) -> int:
    return max(8, round(cells / 16))


def fit_centroids(vectors_ND: Matrix, rows: Rows, cells: int, seed: int) -> Vectors:
    """Unit-length centroids by spherical k-means on a sample of `rows`, 64 a cell; equal seeds give equal centroids."""
    if not 1 <= cells <= len(rows):
        raise InputError(f"{cells} cells asked for {len(rows)} items; choose 1 to {len(rows)}")
    generator = np.random.default_rng(seed)
    size = min(len(rows), _SAMPLE_PER_CELL * cells)
    sample = np.sort(generator.choice(rows, size=size, replace=False))
    points = vectors_ND[sample].astype(np.float32)
    centroids: Vectors = points[generator.choice(size, size=cells, replace=False)]
    for _ in range(_ROUNDS):
        nearest = assign_cells(points, centroids)
        order = np.argsort(nearest, kind="stable")
        present, starts = np.unique(nearest[order], return_index=True)
        sums = np.zeros((cells, points.shape[1]), dtype=np.float64)
        sums[present] = np.add.reduceat(points[order], starts, axis=0, dtype=np.float64)
        norms = np.linalg.norm(sums, axis=1)
        empty = norms < 1e-9
        moved = (sums / np.where(empty, 1.0, norms)[:, None]).astype(np.float32)
        moved[empty] = points[generator.choice(size, size=int(empty.sum()))]
        centroids = moved
    return centroids


def assign_cells(vectors_ND: Matrix, centroids: Vectors) -> Cells:
    """The nearest centroid of each row."""
    cells = np.empty(len(vectors_ND), dtype=np.int32)
    for start in range(0, len(vectors_ND), _BLOCK):
        block = vectors_ND[start : start + _BLOCK].astype(np.float32, copy=False)
        cells[start : start + _BLOCK] = np.argmax(block @ centroids.T, axis=1)
    return cells


def exact_is_cheaper(queries: int, cells: int, probes: int) -> bool:
    """Whether a batch would visit four times as many rows as there are; from about there comparing all in blocks is faster."""
    return queries * probes >= 4 * cells


def rows_of_nearest_cells(shard: Shard, centroids: Vectors, query_D: Vector, k: int, allowed_N: Mask | None, probes: int) -> Rows:
    """The usable rows of the nearest `probes` cells, of more cells while there are fewer than k, and unplaced rows.

    Where a filter leaves no more rows than the probes would visit, all of them: exact search is then the cheaper one.
    """
    usable_N = shard.alive_N if allowed_N is None else shard.alive_N & allowed_N
    if allowed_N is not None:
        visited = len(usable_N) * min(1.0, probes / len(centroids))
        if np.count_nonzero(usable_N) <= max(k, visited):
            return np.flatnonzero(usable_N)
    order, starts = shard.by_cell
    unplaced = order[: starts[1]]
    parts = [unplaced[usable_N[unplaced]]]
    gathered = len(parts[0])
    for visits, cell in enumerate(np.argsort(-(centroids @ query_D), kind="stable")):
        if visits >= probes and gathered >= k:
            break
        if cell + 2 < len(starts):
            rows = order[starts[cell + 1] : starts[cell + 2]]
            rows = rows[usable_N[rows]]
            parts.append(rows)
            gathered += len(rows)
    return np.concatenate(parts)
