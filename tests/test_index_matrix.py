"""Exact search over blocks of rows: nothing that belongs to the best k is lost, whatever the order of the rows."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from traceir.index import matrix
from traceir.index.matrix import Growing, exact_rows, promising_rows, widen

DIM, ROWS, K = 8, 5000, 7
Order = Literal["drawn", "rising", "falling", "equal"]


@pytest.mark.parametrize("order", ["drawn", "rising", "falling", "equal"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("dead", [0.0, 0.5, 0.9])
def test_the_best_are_among_the_rows(
    order: Order, dtype: Literal["float32", "float16"], dead: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "_BLOCK_SCORES", 1)  # blocks of 1,024 rows, the least
    draw = np.random.default_rng(5)
    vectors = draw.standard_normal((ROWS, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = vectors[draw.choice(ROWS, 6)]
    if order == "equal":
        vectors[:] = vectors[0]
    elif order != "drawn":
        rank = np.argsort(vectors @ queries[0])
        vectors = vectors[rank if order == "rising" else rank[::-1]]
    growing = Growing(DIM, dtype)
    growing.append(range(ROWS), [f"{row:05d}" for row in range(ROWS)], vectors, [-1] * ROWS)
    allowed = draw.random(ROWS) >= dead
    found = exact_rows(growing.view(), queries, K, allowed if dead else None)
    kept = growing.view().vectors_ND.astype(np.float64)
    for query, rows in zip(queries, found, strict=True):
        scores = np.where(allowed, kept @ query.astype(np.float64), -np.inf)
        wanted = set(np.flatnonzero(scores >= np.sort(scores)[-K]).tolist())
        assert wanted <= set(rows.tolist()), (order, dtype, dead)
        assert allowed[rows].all() and len(np.unique(rows)) == len(rows)
        assert len(rows) < 3 * K or order == "equal"


def test_every_finite_half_is_widened_exactly() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(2, -1)
    out = np.empty(halves.shape, dtype=np.float32)
    assert np.array_equal(widen(halves, out).view(np.uint32), halves.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_best_of_some_rows_are_kept(dtype: Literal["float32", "float16"]) -> None:
    draw = np.random.default_rng(6)
    vectors = draw.standard_normal((ROWS, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    growing = Growing(DIM, dtype)
    growing.append(range(ROWS), [f"{row:05d}" for row in range(ROWS)], vectors, [-1] * ROWS)
    rows = np.sort(draw.choice(ROWS, 3000, replace=False))
    query = vectors[rows[-1]]
    scores = growing.view().vectors_ND[rows].astype(np.float64) @ query.astype(np.float64)
    kept = promising_rows(growing.view(), rows, query, K)
    assert set(rows[np.argsort(-scores)[:K]]) <= set(kept) <= set(rows) and len(kept) < 2 * K


def test_masks_are_remembered_for_the_arrays_they_were_made_of() -> None:
    growing = Growing(DIM, "float32")
    growing.append(range(1, 5), list("abcd"), np.eye(4, DIM, dtype=np.float32), [1, 0, 1, 0])
    growing.place(np.arange(1, 5), np.asarray([1, 0, 1, 0], dtype=np.int32))  # the rows are now 2, 4, 1, 3
    shard = growing.view()
    asked = [np.asarray(numbers, dtype=np.int64) for numbers in ([], [1, 2], [4, 9], [3], *([number] for number in range(8)))]
    wanted = [[number in part for number in (2, 4, 1, 3)] for part in asked]
    for _ in range(2):
        assert [shard.mask_of(part).tolist() for part in asked] == wanted
    assert shard.mask_of(asked[-1]) is shard.mask_of(asked[-1])
    growing.append([9], ["e"], np.eye(1, DIM, dtype=np.float32), [-1])
    assert growing.view().mask_of(asked[2]).tolist() == [False, True, False, False, True]
