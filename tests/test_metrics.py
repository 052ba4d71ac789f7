"""Metrics against trec_eval and hand-made oracles; intervals and tests against scipy, report.py and enumeration."""

from __future__ import annotations

import importlib
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traceir.errors import InputError
from traceir.evaluation import metrics
from traceir.evaluation.metrics import TIE, positive_ranks, rank_positives

# The references: trec_eval's own code, which brings scipy along.
pytrec_eval: Any = importlib.import_module("pytrec_eval")
binomtest: Any = importlib.import_module("scipy.stats").binomtest

DEPTHS = (1, 3, 5, 10, 50)


def documents(relevant_N: npt.NDArray[np.bool_]) -> list[str]:
    """trec_eval orders equal scores by document name, the greater name first: wrong ones start with z and so come first."""
    return [f"{'a' if right else 'z'}{number:03d}" for number, right in enumerate(relevant_N)]


def naive_ranks(scores: list[float], relevant: list[bool], allowed: list[bool]) -> list[int]:
    """One positive after the other, one candidate after the other."""
    pool = [place for place in range(len(scores)) if allowed[place]]
    own = sorted((scores[place] for place in pool if relevant[place]), reverse=True)
    wrong = [scores[place] for place in pool if not relevant[place]]
    return [number + sum(not score < best - TIE for score in wrong) for number, best in enumerate(own, start=1)]


def test_metrics_equal_trec_eval_on_1500_random_queries() -> None:
    """Quantised scores tie exactly; some queries have masks, some no positive, some positives outside the pool."""
    draw = np.random.default_rng(5)
    qrels, run, ours, ties = {}, {}, {}, 0
    for number in range(1500):
        size = int(draw.integers(1, 60))
        scores = draw.integers(0, 8, size) / 8.0 if number % 2 else draw.permutation(size) / 64.0
        ties += len(np.unique(scores)) < size
        relevant = draw.random(size) < draw.choice([0.0, 0.1, 0.5])
        allowed = draw.random(size) < draw.choice([0.6, 1.0])
        outside = int(draw.choice([0, 0, 3]))
        names = documents(relevant)
        query = f"q{number}"
        right = {name: 1 for name, yes, there in zip(names, relevant, allowed, strict=True) if yes and there}
        qrels[query] = {**right, **{f"elsewhere{n}": 1 for n in range(outside)}, "judged-wrong": 0}
        run[query] = {name: float(score) for name, score, there in zip(names, scores, allowed, strict=True) if there}
        run[query] = run[query] or {"zzz": 0.0}
        (ranks,) = positive_ranks(scores[None], relevant[None], allowed[None])
        assert len(ranks) == len(right)
        ours[query] = (ranks, len(ranks) + outside)
    depths = ",".join(map(str, DEPTHS))
    wanted = {f"{name}.{depths}" for name in ("success", "recall", "map_cut", "ndcg_cut")} | {"recip_rank"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, wanted).evaluate(run)
    assert ties > 700 and len(theirs) == 1500
    for query, (ranks, positives) in ours.items():
        reference = theirs[query]
        assert metrics.reciprocal_rank(ranks) == pytest.approx(reference["recip_rank"]), query
        for k in DEPTHS:
            hit = metrics.hit_at(ranks[:1], k).sum()
            assert hit == reference[f"success_{k}"], query
            assert metrics.recall_at(ranks, k, positives) == pytest.approx(reference[f"recall_{k}"]), query
            assert metrics.ndcg_at(ranks, k, positives) == pytest.approx(reference[f"ndcg_cut_{k}"]), query
            # trec_eval divides by all positives, CIRCO by min(positives, k).
            precision = metrics.average_precision_at(ranks, k, positives) * min(positives, k) / max(1, positives)
            assert precision == pytest.approx(reference[f"map_cut_{k}"]), query


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_ranks_equal_a_naive_oracle_also_near_ties(data: st.DataObject) -> None:
    """Scores lie on a grid of half the tolerance, so that ties within it, at its edge and beyond it all occur."""
    size = data.draw(st.integers(1, 12))
    steps = data.draw(st.lists(st.integers(0, 6), min_size=size, max_size=size))
    scores = [0.5 + 0.45 * TIE * step for step in steps]
    relevant, allowed = (data.draw(st.lists(st.booleans(), min_size=size, max_size=size)) for _ in range(2))
    expected = naive_ranks(scores, relevant, allowed)
    arrays = np.array([scores]), np.array([relevant]), np.array([allowed])
    assert positive_ranks(*arrays)[0].tolist() == expected
    assert rank_positives(*arrays).tolist() == (expected[:1] or [size + 1])
    if all(allowed):
        assert rank_positives(arrays[0], arrays[1]).tolist() == (expected[:1] or [size + 1])


def test_ranks_by_hand() -> None:
    scores = np.array([[0.9, 0.5, 0.5, 0.1], [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4], [0.7, 0.7, 0.7, 0.7]], dtype=np.float32)
    relevant = np.array([[0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 0]], dtype=bool)
    assert rank_positives(scores, relevant).tolist() == [3, 2, 5, 4]
    assert [ranks.tolist() for ranks in positive_ranks(scores, relevant)] == [[3], [2, 4], [], [4]]
    allowed = np.ones((4, 4), dtype=bool)
    allowed[0, 2] = allowed[1, 2] = allowed[3, 2] = False
    assert rank_positives(scores, relevant, allowed).tolist() == [2, 3, 5, 5]
    assert [ranks.tolist() for ranks in positive_ranks(scores, relevant, allowed)] == [[2], [3], [], []]


@pytest.mark.parametrize("bad", [[0], [1], [3], [0, 1, 2, 3]])
def test_scores_that_are_no_number_count_against_the_query(bad: list[int]) -> None:
    scores, relevant = np.array([[0.9, 0.5, 0.4, 0.1]]), np.array([[True, False, True, False]])
    scores[0, bad] = np.nan
    expected = 3 if 0 in bad else 2  # both wrong ones are above where a positive's score is unknown
    assert rank_positives(scores, relevant).tolist() == [expected]
    assert positive_ranks(scores, relevant)[0].tolist() == ([3, 4] if 0 in bad else [2, 4] if bad == [3] else [2, 3])


def test_edges_of_the_metrics() -> None:
    none, some = np.array([], dtype=np.int64), np.array([1, 3, 8])
    for name in ("recall_at", "average_precision_at", "ndcg_at", "reciprocal_rank"):
        assert getattr(metrics, name)(none, 5) == 0.0
    assert metrics.average_precision_at(some, 2) == pytest.approx(1 / 2)  # min(3, 2), not 3
    assert metrics.average_precision_at(some, 10) == pytest.approx((1 + 2 / 3 + 3 / 8) / 3)
    assert metrics.reciprocal_rank(np.array([4]), 3) == 0.0
    ranks = np.array([1, 4, 5])  # 5 = N + 1: a pool of 4 without positives
    assert metrics.hit_at(ranks, 5).tolist() == [1, 1, 1] and metrics.hit_at(ranks, 5, pool=4).tolist() == [1, 1, 0]
    with pytest.raises(InputError, match="k is 0"):
        metrics.recall_at(some, 0)
    with pytest.raises(InputError, match="3 ranks of 2 positives"):
        metrics.ndcg_at(some, 5, positives=2)


def test_bootstrap_intervals_cover_the_normal_ones_and_replace_those_of_the_reports() -> None:
    from traceir.lab.report import interval

    draw = np.random.default_rng(3)
    hits = (draw.random(2_000) < 0.3).astype(float)
    found = metrics.bootstrap_mean(hits)
    assert (found.low, found.high) == interval(hits) and found.mean == hits.mean()
    smooth = draw.normal(0.4, 0.2, 3_000)
    found = metrics.bootstrap_mean(smooth, resamples=2_000)
    half = 1.96 * smooth.std() / np.sqrt(len(smooth))
    assert found == metrics.bootstrap_mean(smooth, resamples=2_000)
    assert found.low == pytest.approx(smooth.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(smooth.mean() + half, abs=0.1 * half)
    paired = metrics.bootstrap_difference(smooth + 0.01, smooth, resamples=200)
    assert paired.low == pytest.approx(0.01) and paired.high == pytest.approx(0.01)


def test_memory_of_the_resamples_is_bounded_and_does_not_change_them(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = np.arange(50.0) % 7, np.random.default_rng(0).random(300)
    whole = [metrics.bootstrap_mean(values, resamples=500) for values in (few, many)]
    p_values = [metrics.randomisation_test(values, values[::-1], resamples=500) for values in (few, many)]
    monkeypatch.setattr(metrics, "_CELLS", 700)
    assert [metrics.bootstrap_mean(values, resamples=500) for values in (few, many)] == whole
    assert metrics.randomisation_test(few, few[::-1], resamples=500) == p_values[0]
    assert metrics.randomisation_test(many, many[::-1], resamples=500) == pytest.approx(p_values[1], abs=0.1)


@pytest.mark.parametrize(
    ("only_first", "only_second"), [(0, 0), (1, 0), (5, 5), (3, 12), (40, 90), (900, 1_000), (60_000, 61_000)]
)
def test_mcnemar_is_the_exact_binomial_test(only_first: int, only_second: int) -> None:
    first = np.concatenate([np.ones(only_first), np.zeros(only_second), np.ones(10), np.zeros(10)])
    second = np.concatenate([np.zeros(only_first), np.ones(only_second), np.ones(10), np.zeros(10)])
    total = only_first + only_second
    expected = binomtest(only_first, total, 0.5).pvalue if total else 1.0
    assert metrics.mcnemar_test(first, second) == pytest.approx(expected, rel=1e-9)


def test_randomisation_test_approaches_the_enumeration_of_all_swaps() -> None:
    draw = np.random.default_rng(8)
    first, second = draw.random(11), draw.random(11) + 0.1
    apart = first - second
    sums = np.array([abs(np.dot(signs, apart)) for signs in product((-1, 1), repeat=11)])
    exact = float((sums >= abs(apart.sum()) - 1e-12).mean())
    assert metrics.randomisation_test(first, second, resamples=20_000) == pytest.approx(exact, abs=0.015)
    hits = (first > 0.5).astype(float), (second > 0.5).astype(float)
    assert metrics.randomisation_test(*hits, resamples=20_000) == pytest.approx(metrics.mcnemar_test(*hits), abs=0.015)
    smooth = draw.random(400)
    assert metrics.randomisation_test(smooth, smooth) == 1.0
    assert metrics.randomisation_test(smooth, smooth - draw.random(400), resamples=99) == 1 / 100


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InputError, match="3 and 2 values"):
        metrics.bootstrap_difference([1, 0, 1], [1, 0])
    with pytest.raises(InputError, match="at least one query"):
        metrics.bootstrap_mean([])
    with pytest.raises(InputError, match="finite"):
        metrics.bootstrap_mean([0.1, float("nan")])
    with pytest.raises(InputError, match="McNemar"):
        metrics.mcnemar_test([0.5, 1], [1, 1])
