"""Streamed search against brute force: ranks of all positives, the best k, masks, ties, union pools, run files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from traceir.errors import InputError, StoreError
from traceir.evaluation import ranking
from traceir.evaluation.metrics import TIE, positive_ranks, rank_positives
from traceir.evaluation.ranking import NO_PLACE, Pool, rank_queries, write_run

Array = npt.NDArray[Any]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools of tests are small; slices too, so that blocks consist of several."""
    monkeypatch.setattr(ranking, "SLICE", 24)


def grid(draw: np.random.Generator, rows: int, width: int = 8) -> Array:
    """Unit vectors of four equal components: their products are multiples of 1/4 without rounding, so that ties abound."""
    vectors = np.zeros((rows, width), dtype=np.float32)
    for vector in vectors:
        vector[draw.choice(width, 4, replace=False)] = draw.choice([-0.5, 0.5], 4)
    return vectors


def unit(draw: np.random.Generator, rows: int, width: int = 32) -> Array:
    vectors: Array = draw.normal(size=(rows, width))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32)


def cut(vectors: Array, *edges: int) -> list[Array]:
    return np.split(vectors, edges)


def places_of(mask: Array) -> list[Array]:
    return [np.flatnonzero(row) for row in mask]


def best_k(scores: Array, allowed: Array, k: int) -> tuple[Array, Array]:
    """One query after the other: by score, then by place."""
    found, places = np.full((len(scores), k), -np.inf, np.float32), np.full((len(scores), k), NO_PLACE)
    for row in range(len(scores)):
        own = sorted(np.flatnonzero(allowed[row] & ~np.isnan(scores[row])), key=lambda place: (-scores[row, place], place))[:k]
        found[row, : len(own)], places[row, : len(own)] = scores[row, own], own
    return found, places


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", [grid, unit])
def test_streaming_equals_brute_force(kind: Any, seed: int) -> None:
    draw = np.random.default_rng(seed)
    size, count, k = int(draw.integers(3, 300)), int(draw.integers(1, 40)), int(draw.integers(1, 60))
    pool, queries = kind(draw, size), kind(draw, count)
    pool[draw.integers(0, size, size // 4)] = pool[0]  # the same vector in many blocks
    relevant = draw.random((count, size)) < draw.choice([0.0, 2 / size, 0.2], count)[:, None]
    limited, excluded = draw.random(count) < 0.3, draw.random((count, size)) < draw.choice([0.0, 0.3])
    listed = np.where(limited[:, None], draw.random((count, size)) < 0.3, True)
    allowed, scores = listed & ~excluded, queries @ pool.T
    blocks = cut(pool, *sorted(draw.integers(0, size + 1, 5)))
    found = rank_queries(
        queries, blocks, places_of(relevant), top_k=k, chunk=int(draw.integers(1, 20)), excluded=places_of(excluded),
        allowed=[own if few else None for own, few in zip(places_of(listed), limited, strict=True)],
    )  # fmt: skip
    assert found.size == size and found.best.tolist() == rank_positives(scores, relevant, allowed).tolist()
    expected = positive_ranks(scores, relevant, allowed)
    assert [own.tolist() for own in found.ranks] == [own.tolist() for own in expected]
    best_scores, best_places = best_k(scores, allowed, k)
    np.testing.assert_allclose(found.scores, best_scores, atol=2e-7)
    if kind is grid:  # no rounding, hence the very order
        assert found.places.tolist() == best_places.tolist()
    plain = rank_queries(queries, blocks, places_of(relevant), top_k=k)
    assert plain.best.tolist() == rank_positives(scores, relevant).tolist()


def test_candidates_just_within_and_beyond_the_tolerance() -> None:
    """Cosines 1 - e of one query; 0.3 TIE apart is one score, 3 TIE apart is not, in whichever block."""
    apart = np.array([0.0, 0.3, -0.3, 3.0, -3.0]) * TIE
    scores = 0.5 + apart
    pool = np.stack([scores, np.sqrt(1 - scores**2)], axis=1).astype(np.float32)
    query = np.array([[1.0, 0.0]], dtype=np.float32)
    for edges in ((), (1,), (1, 2, 3, 4), (3,)):
        assert rank_queries(query, cut(pool, *edges), [[0]]).best.tolist() == [4]  # all but the last are not below
        assert rank_queries(query, cut(pool, *edges), [[3]]).best.tolist() == [1]
        assert rank_queries(query, cut(pool, *edges), [[4, 0]]).ranks[0].tolist() == [4, 5]


@pytest.mark.parametrize("rows", [24, 600])
def test_ascending_scores_and_many_ties_keep_the_first_places(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst orders for a running threshold: every candidate better than all before, and all alike."""
    monkeypatch.setattr(ranking, "SLICE", rows)
    angles = np.linspace(1.5, 0.0, 700)
    pool = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    query = np.array([[1.0, 0.0]], dtype=np.float32)
    found = rank_queries(query, [pool], [[699, 0]], top_k=5)
    assert found.places.tolist() == [[699, 698, 697, 696, 695]] and found.ranks[0].tolist() == [1, 700]
    alike = np.tile(query, (700, 1))
    found = rank_queries(query, cut(alike, 3, 400), [[650]], top_k=5)
    assert found.places.tolist() == [[0, 1, 2, 3, 4]] and found.best.tolist() == [700]


def test_values_that_are_no_number_rank_as_in_the_metrics() -> None:
    draw = np.random.default_rng(4)
    pool, queries = grid(draw, 90), grid(draw, 4)
    pool[[1, 2, 3, 7, 60]], queries[3] = np.nan, np.nan
    relevant = np.zeros((4, 90), dtype=bool)
    relevant[0, [7, 20, 80]] = relevant[1, [20, 80]] = relevant[3, [5, 6]] = True
    allowed = np.ones((4, 90), dtype=bool)
    allowed[:, 10:20] = False
    with np.errstate(invalid="ignore"):
        scores = queries @ pool.T
        found = rank_queries(queries, cut(pool, 50), places_of(relevant), excluded=places_of(~allowed), top_k=3)
    assert [own.tolist() for own in found.ranks] == [own.tolist() for own in positive_ranks(scores, relevant, allowed)]
    assert found.places.tolist() == best_k(scores, allowed, 3)[1].tolist()


def test_half_precision_blocks_are_searched_as_what_they_hold() -> None:
    draw = np.random.default_rng(2)
    pool, queries = unit(draw, 200).astype(np.float16), unit(draw, 5)
    relevant = draw.random((5, 200)) < 0.05
    found = rank_queries(queries, cut(pool, 90), places_of(relevant), top_k=4)
    scores = queries @ pool.astype(np.float32).T
    assert found.best.tolist() == rank_positives(scores, relevant).tolist()
    np.testing.assert_allclose(found.scores, np.sort(scores, axis=1)[:, :-5:-1], atol=2e-7)


def named(first: int, last: int) -> list[str]:
    return [f"9:{number}" for number in range(first, last)]


def test_a_union_of_pools_is_one_pool_where_a_candidate_stands_once() -> None:
    draw = np.random.default_rng(9)
    vectors, queries = unit(draw, 70), unit(draw, 6)
    first, second, third = named(0, 40), named(30, 70)[::-1], ["a much longer name", *named(5, 8)]
    blocks = [vectors[:40], vectors[30:70][::-1], np.concatenate([vectors[:1], vectors[5:8]])]
    parts: list[tuple[Sequence[str], list[Array]]] = [
        (first, cut(blocks[0], 13)),
        (second, cut(blocks[1], 29, 33)),
        (third, [blocks[2]]),
    ]
    pool = Pool(parts)
    expected = first + second[:30] + third[:1]
    assert len(pool) == 71 and [pool.did(place) for place in range(71)] == expected
    whole = np.concatenate([*blocks[:2], blocks[2]])[[*range(40), *range(40, 70), 80]]
    np.testing.assert_array_equal(np.concatenate(list(pool)), whole)
    wanted = pool.places(["9:69", "9:3", "8:3", "9:35", "9:350", "a much longer name than any"])
    assert sorted(wanted.tolist()) == sorted([expected.index("9:69"), 3, 35])
    relevant = np.zeros((6, 71), dtype=bool)
    relevant[:, wanted] = True
    found = rank_queries(queries, pool, [wanted] * 6, top_k=7)
    assert found.best.tolist() == rank_positives(queries @ whole.T, relevant).tolist()
    assert Pool([]).places(["9:1"]).tolist() == [] and len(Pool([])) == 0


@pytest.mark.parametrize("rows", [8, 12])
def test_a_pool_whose_vectors_do_not_fit_its_dids_is_refused(rows: int) -> None:
    pool = Pool([(named(0, 10), [np.zeros((rows, 2), np.float32)]), (named(10, 12), [np.zeros((2, 2), np.float32)])])
    with pytest.raises(StoreError, match="a pool of 10 candidates has"):
        list(pool)


def test_run_files_name_what_was_found(tmp_path: Path) -> None:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8]], dtype=np.float32)
    pool = Pool([(["3:1", "3:2", "3:3"], [vectors])])
    found = rank_queries(vectors[:2], pool, [[], []], top_k=2, excluded=[[], [0, 2]])
    file = write_run(tmp_path / "runs" / "edis.txt", ["3:10", "3:11"], found, pool, run_id="trial", task_ids=2)
    lines = [line.split(" ") for line in file.read_text(encoding="utf-8").splitlines()]
    assert [line[:4] + line[5:] for line in lines] == [
        ["3:10", "Q0", "3:1", "1", "trial", "2"],
        ["3:10", "Q0", "3:3", "2", "trial", "2"],
        ["3:11", "Q0", "3:2", "1", "trial", "2"],
    ]
    assert np.float32(lines[1][4]) == np.float32(0.6) and [path.name for path in file.parent.iterdir()] == ["edis.txt"]
    with pytest.raises(InputError, match="not one word"):
        write_run(file, ["3:10", "3:11"], found, pool, run_id="my trial", task_ids=2)
    with pytest.raises(InputError, match="one for each"):
        write_run(file, ["3:10"], found, pool, run_id="trial", task_ids=2)
    assert len(file.read_text(encoding="utf-8").splitlines()) == 3


def test_what_cannot_be_searched_is_refused() -> None:
    vectors = np.eye(4, dtype=np.float32)
    with pytest.raises(InputError, match="read once only"):
        rank_queries(vectors, iter([vectors]), [[]] * 4)
    with pytest.raises(InputError, match="relevant has 3 entries for 4 queries"):
        rank_queries(vectors, [vectors], [[]] * 3)
    with pytest.raises(InputError, match="relevant place 4 does not exist"):
        rank_queries(vectors, [vectors], [[0], [4], [], []])
    with pytest.raises(InputError, match="excluded place -1 does not exist"):
        rank_queries(vectors, [vectors], [[]] * 4, excluded=[[-1], [], [], []])
    with pytest.raises(InputError, match="float64"):
        rank_queries(vectors.astype(np.float64), [vectors], [[]] * 4)
    assert rank_queries(vectors[:0], [vectors], []).places.shape == (0, 50)
    assert rank_queries(vectors, [vectors[:0]], [[]] * 4, top_k=2).best.tolist() == [1] * 4
