"""Ranks, the metrics that follow from them, and how sure they are: pure functions on numpy arrays.

Ties are pessimistic: a wrong candidate that scores the same as a right one, to within TIE, counts as ranked above it. Among
themselves the positives of a query keep the order of their scores. Positives outside a query's pool are never counted (M-BEIR's
qrels name documents of other pools).

Shapes: Q queries, N candidates, P positives of one query within its pool. Ranks of one query are int64 [P], ascending; values to
be averaged are float64 [Q].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from traceir.errors import InputError

Scores = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]
Ranks = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]

# Cosines closer than this are one score: equal candidates encoded in different batches differ by rounding.
TIE: Final = 1e-6

RESAMPLES: Final = 10_000
SEED: Final = 20_240
_FEW: Final = 100
_CELLS: Final = 1 << 22


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % percentile bootstrap interval over queries."""

    mean: float
    low: float
    high: float


def rank_positives(scores_QN: Scores, relevant_QN: Mask, allowed_QN: Mask | None = None) -> Ranks:
    """Rank (from 1) of the best positive of each query [Q]; N + 1 where its pool, `allowed_QN`, holds none."""
    absent = scores_QN.shape[1] + 1
    return np.array(
        [own[0] if len(own) else absent for own in positive_ranks(scores_QN, relevant_QN, allowed_QN)], dtype=np.int64
    )


def positive_ranks(scores_QN: Scores, relevant_QN: Mask, allowed_QN: Mask | None = None) -> list[Ranks]:
    """Ranks (from 1) of all positives of each query, ascending, each [P]; empty where its pool holds none.

    The n-th best positive has rank n plus the wrong candidates not below it. A score that is not a number counts as above where
    it is a wrong candidate's, and sends the query to the end where it is a positive's.
    """
    ranks: list[Ranks] = []
    for query, (scores_N, relevant_N) in enumerate(zip(scores_QN, relevant_QN, strict=True)):
        allowed_N = allowed_QN[query] if allowed_QN is not None else np.ones(len(scores_N), dtype=np.bool_)
        own = np.sort(scores_N[relevant_N & allowed_N])[::-1]
        wrong = np.sort(scores_N[~relevant_N & allowed_N])  # not-a-number comes last, hence above
        above = len(wrong) - np.searchsorted(wrong, own - TIE, side="left")
        if np.isnan(own).any():
            above[:] = len(wrong)
        ranks.append(above.astype(np.int64) + np.arange(1, len(own) + 1))
    return ranks


def hit_at(ranks: Ranks, k: int, pool: int | None = None) -> Values:
    """1.0 where the best positive is among the first k, else 0.0, [Q]: the recall of M-BEIR's tables.

    Where k may exceed the size of the pool, give `pool` (N), so that N + 1, the rank of a query without positives, is no hit.
    """
    depth = _depth(k) if pool is None else min(_depth(k), pool)
    return (np.asarray(ranks) <= depth).astype(np.float64)


def recall_at(ranks: Ranks, k: int, positives: int | None = None) -> float:
    """The share of a query's positives among the first k; 0 where it has none.

    `positives` replaces P as the denominator, here and below: for references that also count positives outside the pool.
    """
    count = _positives(ranks, positives)
    return float(np.count_nonzero(ranks <= _depth(k)) / count) if count else 0.0


def average_precision_at(ranks: Ranks, k: int, positives: int | None = None) -> float:
    """Precision at each positive among the first k, added up and divided by min(P, k), as CIRCO defines it; 0 where P is 0.

    Where P exceeds k, trec_eval's `map_cut` divides by P instead and is smaller.
    """
    count = _positives(ranks, positives)
    within = ranks[ranks <= _depth(k)]
    return float((np.arange(1, len(within) + 1) / within).sum() / min(count, k)) if count else 0.0


def reciprocal_rank(ranks: Ranks, k: int | None = None) -> float:
    """1 / rank of the best positive; 0 where there is none, or none among the first k."""
    if not len(ranks) or (k is not None and ranks[0] > _depth(k)):
        return 0.0
    return float(1.0 / ranks[0])


def ndcg_at(ranks: Ranks, k: int, positives: int | None = None) -> float:
    """Normalised discounted cumulative gain at k with gain 1 and discount log2(rank + 1); 0 where there is no positive."""
    count = _positives(ranks, positives)
    if not count:
        return 0.0
    ideal = 1.0 / np.log2(np.arange(2, min(count, _depth(k)) + 2))
    return float((1.0 / np.log2(ranks[ranks <= k] + 1.0)).sum() / ideal.sum())


def bootstrap_mean(values: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = SEED) -> Interval:
    """Mean of one value a query, with a 95 % percentile bootstrap interval; the same input gives the same interval.

    Resampling with replacement is a multinomial draw over the distinct values, which is a thousand times as fast where these are
    few (hits). Memory is bounded whatever Q is.
    """
    from scipy import stats  # half a second that ranking does not need

    values = _values(values)
    draw = np.random.default_rng(seed)
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= _FEW:
        means = draw.multinomial(len(values), counts / len(values), _checked(resamples)) @ distinct / len(values)
        low, high = np.percentile(means, (2.5, 97.5))
    else:
        low, high = stats.bootstrap(
            (values,), np.mean, n_resamples=_checked(resamples), batch=_batch(values), method="percentile", rng=draw
        ).confidence_interval
    return Interval(float(values.mean()), float(low), float(high))


def bootstrap_difference(
    first: npt.ArrayLike, second: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval:
    """Mean of first minus second, paired: both are resampled by the same queries."""
    return bootstrap_mean(_differences(first, second), resamples=resamples, seed=seed)


def mcnemar_test(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Two-sided p-value of McNemar's exact test on paired hits (0 or 1): could both hit equally often?

    Of the queries that only one of the two hits, either is as likely to be that one: a binomial test with probability 1/2.
    """
    from scipy import stats

    for hits in (first, second):
        if not np.isin(_values(hits), (0.0, 1.0)).all():
            raise InputError("McNemar's test compares hits; give 0 or 1 for each query, or use randomisation_test")
    differences = _differences(first, second)
    total = np.count_nonzero(differences)
    return float(stats.binomtest(np.count_nonzero(differences > 0), total).pvalue) if total else 1.0


def randomisation_test(first: npt.ArrayLike, second: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = SEED) -> float:
    """Two-sided p-value of the paired randomisation test: how often is the mean difference as large if labels are swapped?

    Each query's pair is swapped with probability 1/2, `resamples` times; the arrangement observed is counted as one of them, so
    the smallest p-value is 1 / (resamples + 1). For any metric, not for hits alone.
    """
    differences = _differences(first, second)
    draw = np.random.default_rng(seed)
    sizes, counts = np.unique(np.abs(differences[differences != 0.0]), return_counts=True)
    observed = abs(float(differences.sum())) * (1.0 - 1e-12) - 1e-12  # a sum that differs by rounding alone is as large
    extreme, batch = 0, _batch(differences)
    for start in range(0, _checked(resamples), batch):
        swapped = draw.binomial(counts, 0.5, (min(batch, resamples - start), len(sizes)))
        extreme += int(np.count_nonzero(np.abs((2 * swapped - counts) @ sizes) >= observed))
    return (extreme + 1) / (resamples + 1)


def _batch(values: Values) -> int:
    """Resamples that are in memory together."""
    return max(1, _CELLS // len(values))


def _checked(resamples: int) -> int:
    if resamples < 1:
        raise InputError(f"resamples is {resamples}; draw at least 1, better {RESAMPLES}")
    return resamples


def _depth(k: int) -> int:
    if k < 1:
        raise InputError(f"k is {k}; give a depth of at least 1")
    return k


def _positives(ranks: Ranks, positives: int | None) -> int:
    if positives is not None and positives < len(ranks):
        raise InputError(f"{len(ranks)} ranks of {positives} positives; count those outside the pool in addition")
    return len(ranks) if positives is None else positives


def _values(values: npt.ArrayLike) -> Values:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise InputError(f"values of shape {list(values.shape)}; give one finite number for each of at least one query")
    return values


def _differences(first: npt.ArrayLike, second: npt.ArrayLike) -> Values:
    first, second = _values(first), _values(second)
    if len(first) != len(second):
        raise InputError(f"{len(first)} and {len(second)} values; a paired comparison needs the same queries in the same order")
    return first - second
