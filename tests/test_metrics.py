"""Metrics against trec_eval and hand-made oracles; intervals and tests against scipy."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from traceir.errors import InputError
from traceir.evaluation.metrics import (
    TIE,
    average_precision_at,
    bootstrap_difference,
    bootstrap_mean,
    mcnemar_test,
    positive_ranks,
    rank_positives,
)

pytrec_eval: Any = importlib.import_module("pytrec_eval")  # trec_eval's own code

DEPTHS = (1, 3, 5, 10, 50)


def test_ranks_and_average_precision_equal_trec_eval_on_random_queries() -> None:
    """Quantised scores tie exactly; some queries have masks, some no positive.

    trec_eval orders equal scores by document name, the greater name first: wrong ones start with z and so come first.
    """
    draw = np.random.default_rng(5)
    qrels, run, ours = {}, {}, {}
    for number in range(200):
        size, query = int(draw.integers(1, 60)), f"q{number}"
        scores = draw.integers(0, 8, size) / 8.0 if number % 2 else draw.permutation(size) / 64.0
        relevant, allowed = draw.random(size) < draw.choice([0.0, 0.1, 0.5]), draw.random(size) < draw.choice([0.6, 1.0])
        names = [f"{'a' if right else 'z'}{number:03d}" for number, right in enumerate(relevant)]
        right = {name: 1 for name, yes, there in zip(names, relevant, allowed, strict=True) if yes and there}
        qrels[query] = {**right, "judged-wrong": 0}
        pool = {name: float(score) for name, score, there in zip(names, scores, allowed, strict=True) if there}
        run[query] = pool or {"zzz": 0.0}
        (ours[query],) = positive_ranks(scores[None], relevant[None], allowed[None])
    depths = ",".join(map(str, DEPTHS))
    reference = pytrec_eval.RelevanceEvaluator(qrels, {f"recall.{depths}", f"map_cut.{depths}"}).evaluate(run)
    for query, ranks in ours.items():
        for k in DEPTHS:
            recall = np.count_nonzero(ranks <= k) / max(1, len(ranks))
            # trec_eval divides by all positives, CIRCO by min(positives, k).
            precision = average_precision_at(ranks, k) * min(len(ranks), k) / max(1, len(ranks))
            theirs = reference[query][f"recall_{k}"], reference[query][f"map_cut_{k}"]
            assert (recall, precision) == pytest.approx(theirs), (query, k)


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


@pytest.mark.parametrize(("bad", "ranks"), [([0], [3, 4]), ([1], [2, 3]), ([3], [2, 4]), ([0, 1, 2, 3], [3, 4])])
def test_scores_that_are_no_number_count_against_the_query(bad: list[int], ranks: list[int]) -> None:
    scores, relevant = np.array([[0.9, 0.5, 0.4, 0.1]]), np.array([[True, False, True, False]])
    scores[0, bad] = np.nan
    assert positive_ranks(scores, relevant)[0].tolist() == ranks


def test_bootstrap_intervals_are_the_normal_ones_and_the_same_again() -> None:
    draw = np.random.default_rng(3)
    for values in ((draw.random(500) < 0.3).astype(float), draw.normal(0.4, 0.2, 500)):
        interval = bootstrap_mean(values)
        half = 1.96 * values.std() / np.sqrt(len(values))
        assert interval == bootstrap_mean(values) and interval.mean == values.mean()
        assert (interval.low, interval.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    paired = bootstrap_difference(values + 0.01, values)
    assert (paired.low, paired.high) == pytest.approx((0.01, 0.01))


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (5, 5), (3, 12), (900, 1_000), (60_000, 61_000)])
def test_mcnemar_is_the_exact_binomial_test(only_first: int, only_second: int) -> None:
    first = np.repeat([1.0, 0.0, 1.0, 0.0], [only_first, only_second, 10, 10])
    second = np.repeat([0.0, 1.0, 1.0, 0.0], [only_first, only_second, 10, 10])
    least, total = min(only_first, only_second), only_first + only_second
    assert mcnemar_test(first, second) == pytest.approx(min(1.0, 2 * stats.binom.cdf(least, total, 0.5)), rel=1e-9)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InputError, match="3 and 2 values"):
        bootstrap_difference([1, 0, 1], [1, 0])
    for values, message in (([], "at least one query"), ([0.1, float("nan")], "finite")):
        with pytest.raises(InputError, match=message):
            bootstrap_mean(values)
    with pytest.raises(InputError, match="McNemar"):
        mcnemar_test([0.5, 1], [1, 1])
