"""Streamed search against brute force: ranks of all positives, the best k, ties, union pools, run files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from traceir.errors import StoreError
from traceir.evaluation import ranking
from traceir.evaluation.metrics import TIE, positive_ranks, rank_positives
from traceir.evaluation.ranking import NO_POSITION, Pool, rank_queries, write_run

Array = npt.NDArray[Any]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools of tests are small; slices too, so that blocks consist of several."""
    monkeypatch.setattr(ranking, "SLICE", 24)


def grid(draw: np.random.Generator, rows: int) -> Array:
    """Unit vectors of four equal components: their products are multiples of 1/4 without rounding, so that ties abound."""
    vectors = np.zeros((rows, 8), dtype=np.float32)
    for vector in vectors:
        vector[draw.choice(8, 4, replace=False)] = draw.choice([-0.5, 0.5], 4)
    return vectors


def unit(draw: np.random.Generator, rows: int) -> Array:
    vectors: Array = draw.normal(size=(rows, 32))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def half(draw: np.random.Generator, rows: int) -> Array:
    return unit(draw, rows).astype(np.float16)


def holed(draw: np.random.Generator, rows: int) -> Array:
    vectors = grid(draw, rows)
    vectors[draw.random(rows) < 0.05] = np.nan
    return vectors


def positions_of(mask: Array) -> list[Array]:
    return [np.flatnonzero(row) for row in mask]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [grid, unit, half, holed])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_streaming_equals_brute_force(kind: Any, seed: int) -> None:
    draw = np.random.default_rng(seed)
    size, count, k = int(draw.integers(3, 300)), int(draw.integers(1, 40)), int(draw.integers(1, 60))
    pool, queries = kind(draw, size), kind(draw, count).astype(np.float32)
    pool[draw.integers(0, size, size // 4)] = pool[0]  # the same vector in many blocks
    relevant = draw.random((count, size)) < draw.choice([0.0, 2 / size, 0.2], count)[:, None]
    excluded = draw.random((count, size)) < draw.choice([0.0, 0.3])
    scores = queries @ pool.astype(np.float32).T
    blocks = np.split(pool, sorted(draw.integers(0, size + 1, 5)))
    options = {"top_k": k, "chunk": int(draw.integers(1, 20)), "excluded": positions_of(excluded)}
    ranked = rank_queries(queries, blocks, positions_of(relevant), **options)
    assert ranked.size == size and ranked.best.tolist() == rank_positives(scores, relevant, ~excluded).tolist()
    expected = positive_ranks(scores, relevant, ~excluded)
    assert [own.tolist() for own in ranked.ranks] == [own.tolist() for own in expected]
    allowed = np.where(excluded | np.isnan(scores), -np.inf, scores)
    best = np.argsort(-allowed, axis=1, kind="stable")[:, :k]  # by score, then by place
    best_scores = np.take_along_axis(allowed, best, axis=1)
    np.testing.assert_allclose(ranked.scores[:, : best.shape[1]], best_scores, atol=2e-7)
    assert (ranked.positions[:, best.shape[1] :] == NO_POSITION).all()
    if kind in (grid, holed):  # no rounding, hence the very order
        assert ranked.positions[:, : best.shape[1]].tolist() == np.where(np.isinf(best_scores), NO_POSITION, best).tolist()


def test_candidates_just_within_and_beyond_the_tolerance() -> None:
    """Cosines 1 - e of one query; 0.3 TIE apart is one score, 3 TIE apart is not, in whichever block."""
    scores = 0.5 + np.array([0.0, 0.3, -0.3, 3.0, -3.0]) * TIE
    pool = np.stack([scores, np.sqrt(1 - scores**2)], axis=1).astype(np.float32)
    query = np.array([[1.0, 0.0]], dtype=np.float32)
    for edges in ((), (1,), (1, 2, 3, 4), (3,)):
        ranks = [rank_queries(query, np.split(pool, edges), [right]).ranks[0].tolist() for right in ([0], [3], [4, 0])]
        assert ranks == [[4], [1], [4, 5]]  # all but the last are not below the first


@pytest.mark.parametrize("rows", [24, 600])
def test_ascending_scores_and_many_ties_keep_the_first_places(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst orders for a running threshold: every candidate better than all before, and all alike."""
    monkeypatch.setattr(ranking, "SLICE", rows)
    angles = np.linspace(1.5, 0.0, 700)
    pool = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    query = np.array([[1.0, 0.0]], dtype=np.float32)
    ranked = rank_queries(query, [pool], [[699, 0]], top_k=5)
    assert ranked.positions.tolist() == [[699, 698, 697, 696, 695]] and ranked.ranks[0].tolist() == [1, 700]
    ranked = rank_queries(query, np.split(np.tile(query, (700, 1)), [3, 400]), [[650]], top_k=5)
    assert ranked.positions.tolist() == [[0, 1, 2, 3, 4]] and ranked.best.tolist() == [700]


def named(first: int, last: int) -> list[str]:
    return [f"9:{number}" for number in range(first, last)]


def test_a_union_of_pools_is_one_pool_where_a_candidate_stands_once() -> None:
    vectors = unit(np.random.default_rng(9), 70)
    second, third = named(30, 70)[::-1], ["a much longer name", *named(5, 8)]
    last = np.concatenate([vectors[:1], vectors[5:8]])
    parts = [(named(0, 40), np.split(vectors[:40], [13])), (second, np.split(vectors[30:][::-1], [29, 33])), (third, [last])]
    pool = Pool(parts)
    expected = named(0, 40) + second[:30] + third[:1]
    assert [pool.did(position) for position in range(len(pool))] == expected
    whole = np.concatenate([vectors[:40], vectors[40:][::-1], vectors[:1]])
    np.testing.assert_array_equal(np.concatenate(list(pool)), whole)
    wanted = pool.positions(["9:69", "9:3", "8:3", "9:35", "9:350", "a much longer name than any"])
    assert sorted(wanted.tolist()) == sorted([expected.index("9:69"), 3, 35])
    assert Pool([]).positions(["9:1"]).tolist() == [] and len(Pool([])) == 0
    for rows in (8, 12):
        with pytest.raises(StoreError, match="a pool of 10 candidates has"):
            list(Pool([(named(0, 10), [np.zeros((rows, 2), np.float32)]), (named(10, 12), [np.zeros((2, 2), np.float32)])]))


def test_run_files_name_what_was_ranked(tmp_path: Path) -> None:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8]], dtype=np.float32)
    pool = Pool([(["3:1", "3:2", "3:3"], [vectors])])
    ranked = rank_queries(vectors[:2], pool, [[], []], top_k=2, excluded=[[], [0, 2]])
    file = tmp_path / "runs" / "edis.txt"
    write_run(file, ["3:10", "3:11"], ranked, pool, run_id="trial", task_id=2)
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines == ["3:10 Q0 3:1 1 1 trial 2", "3:10 Q0 3:3 2 0.600000024 trial 2", "3:11 Q0 3:2 1 1 trial 2"]
    assert [path.name for path in file.parent.iterdir()] == ["edis.txt"]


def test_no_queries_and_no_candidates() -> None:
    vectors = np.eye(4, dtype=np.float32)
    assert rank_queries(vectors[:0], [vectors], []).positions.shape == (0, 50)
    assert rank_queries(vectors, [vectors[:0]], [[]] * 4, top_k=2).best.tolist() == [1] * 4
