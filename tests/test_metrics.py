"""Metrics against trec_eval and hand-made oracles; intervals and tests against scipy and enumeration."""

from __future__ import annotations

import importlib
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from traceir.errors import InputError
from traceir.evaluation import metrics
from traceir.evaluation.metrics import TIE, positive_ranks, rank_positives

pytrec_eval: Any = importlib.import_module("pytrec_eval")  # trec_eval's own code

DEPTHS = (1, 3, 5, 10, 50)


def test_metrics_equal_trec_eval_on_random_queries() -> None:
    """Quantised scores tie exactly; some queries have masks, some no positive, some positives outside the pool.

    trec_eval orders equal scores by document name, the greater name first: wrong ones start with z and so come first.
    """
    draw = np.random.default_rng(5)
    qrels, run, ours = {}, {}, {}
    for number in range(200):
        size, query = int(draw.integers(1, 60)), f"q{number}"
        scores = draw.integers(0, 8, size) / 8.0 if number % 2 else draw.permutation(size) / 64.0
        relevant, allowed = draw.random(size) < draw.choice([0.0, 0.1, 0.5]), draw.random(size) < draw.choice([0.6, 1.0])
        outside = int(draw.choice([0, 0, 3]))
        names = [f"{'a' if right else 'z'}{place:03d}" for place, right in enumerate(relevant)]
        right = {name: 1 for name, yes, there in zip(names, relevant, allowed, strict=True) if yes and there}
        qrels[query] = {**right, **{f"elsewhere{n}": 1 for n in range(outside)}, "judged-wrong": 0}
        pool = {name: float(score) for name, score, there in zip(names, scores, allowed, strict=True) if there}
        run[query] = pool or {"zzz": 0.0}
        (ranks,) = positive_ranks(scores[None], relevant[None], allowed[None])
        ours[query] = (ranks, len(right) + outside)
    depths = ",".join(map(str, DEPTHS))
    wanted = {f"{name}.{depths}" for name in ("success", "recall", "map_cut", "ndcg_cut")} | {"recip_rank"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, wanted).evaluate(run)
    for query, (ranks, positives) in ours.items():
        reference = theirs[query]
        assert metrics.reciprocal_rank(ranks) == pytest.approx(reference["recip_rank"]), query
        for k in DEPTHS:
            # trec_eval divides by all positives, CIRCO by min(positives, k).
            precision = metrics.average_precision_at(ranks, k, positives) * min(positives, k) / max(1, positives)
            values = {
                "success": metrics.hit_at(ranks[:1], k).sum(),
                "recall": metrics.recall_at(ranks, k, positives),
                "ndcg_cut": metrics.ndcg_at(ranks, k, positives),
                "map_cut": precision,
            }
            assert values == pytest.approx({name: reference[f"{name}_{k}"] for name in values}), query


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_ranks_equal_a_naive_oracle_also_near_ties(candidates: list[tuple[int, bool, bool]]) -> None:
    """Scores lie on a grid of half the tolerance, so that ties within it, at its edge and beyond it all occur."""
    scores = [0.5 + 0.45 * TIE * step for step, _, _ in candidates]
    pool = [(score, right) for score, (_, right, allowed) in zip(scores, candidates, strict=True) if allowed]
    own = sorted((score for score, right in pool if right), reverse=True)
    wrong = [score for score, right in pool if not right]
    expected = [number + sum(not score < best - TIE for score in wrong) for number, best in enumerate(own, start=1)]
    arrays = np.array([scores]), np.array([[right for _, right, _ in candidates]]), np.array([[a for _, _, a in candidates]])
    assert positive_ranks(*arrays)[0].tolist() == expected
    assert rank_positives(*arrays).tolist() == (expected[:1] or [len(scores) + 1])


@pytest.mark.parametrize("bad", [[0], [1], [3], [0, 1, 2, 3]])
def test_scores_that_are_no_number_count_against_the_query(bad: list[int]) -> None:
    scores, relevant = np.array([[0.9, 0.5, 0.4, 0.1]]), np.array([[True, False, True, False]])
    scores[0, bad] = np.nan
    assert rank_positives(scores, relevant).tolist() == [3 if 0 in bad else 2]
    assert positive_ranks(scores, relevant)[0].tolist() == ([3, 4] if 0 in bad else [2, 4] if bad == [3] else [2, 3])


def test_edges_of_the_metrics() -> None:
    none, some = np.array([], dtype=np.int64), np.array([1, 3, 8])
    for name in ("recall_at", "average_precision_at", "ndcg_at", "reciprocal_rank"):
        assert getattr(metrics, name)(none, 5) == 0.0
    assert metrics.average_precision_at(some, 2) == pytest.approx(1 / 2)  # min(3, 2), not 3
    assert metrics.reciprocal_rank(np.array([4]), 3) == 0.0
    ranks = np.array([1, 4, 5])  # 5 = N + 1: a pool of 4 without positives
    assert metrics.hit_at(ranks, 5).tolist() == [1, 1, 1] and metrics.hit_at(ranks, 5, pool=4).tolist() == [1, 1, 0]
    with pytest.raises(InputError, match="k is 0"):
        metrics.recall_at(some, 0)
    with pytest.raises(InputError, match="3 ranks of 2 positives"):
        metrics.ndcg_at(some, 5, positives=2)


def test_bootstrap_intervals_are_the_normal_ones_and_the_same_again() -> None:
    draw = np.random.default_rng(3)
    for values in ((draw.random(2_000) < 0.3).astype(float), draw.normal(0.4, 0.2, 2_000)):
        found = metrics.bootstrap_mean(values, resamples=2_000)
        half = 1.96 * values.std() / np.sqrt(len(values))
        assert found == metrics.bootstrap_mean(values, resamples=2_000) and found.mean == values.mean()
        assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    paired = metrics.bootstrap_difference(values + 0.01, values, resamples=200)
    assert (paired.low, paired.high) == pytest.approx((0.01, 0.01))


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (5, 5), (3, 12), (900, 1_000), (60_000, 61_000)])
def test_mcnemar_is_the_exact_binomial_test(only_first: int, only_second: int) -> None:
    first = np.repeat([1.0, 0.0, 1.0, 0.0], [only_first, only_second, 10, 10])
    second = np.repeat([0.0, 1.0, 1.0, 0.0], [only_first, only_second, 10, 10])
    least, total = min(only_first, only_second), only_first + only_second
    assert metrics.mcnemar_test(first, second) == pytest.approx(min(1.0, 2 * stats.binom.cdf(least, total, 0.5)), rel=1e-9)


def test_randomisation_test_approaches_the_enumeration_of_all_swaps() -> None:
    draw = np.random.default_rng(8)
    first, second = draw.random(11), draw.random(11) + 0.1
    sums = np.array([abs(np.dot(signs, first - second)) for signs in product((-1, 1), repeat=11)])
    exact = float((sums >= abs((first - second).sum()) - 1e-12).mean())
    assert metrics.randomisation_test(first, second, resamples=20_000) == pytest.approx(exact, abs=0.015)
    smooth = draw.random(400)
    assert metrics.randomisation_test(smooth, smooth) == 1.0
    assert metrics.randomisation_test(smooth, smooth - draw.random(400), resamples=99) == 1 / 100


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InputError, match="3 and 2 values"):
        metrics.bootstrap_difference([1, 0, 1], [1, 0])
    for values, message in (([], "at least one query"), ([0.1, float("nan")], "finite")):
        with pytest.raises(InputError, match=message):
            metrics.bootstrap_mean(values)
    with pytest.raises(InputError, match="McNemar"):
        metrics.mcnemar_test([0.5, 1], [1, 1])
