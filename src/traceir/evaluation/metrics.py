"""Ranks, the metrics that follow from them, and how sure they are: pure functions on numpy arrays.

Ties are pessimistic: a candidate that is not right and scores the same as a right one, to within TIE, counts as ranked above it.
Among themselves the positives of a query keep the order of their scores. A pool is what a query may find: positives outside of
it are never counted, neither as found nor in a denominator (M-BEIR's qrels name documents of other pools).

Shapes: Q queries, N candidates, P positives of one query within its pool. Ranks of one query are int64 of shape [P], ascending;
values to be averaged are float64 of shape [Q].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
    """Rank (from 1) of the best positive of each query [Q]; N + 1 where its pool holds none. Ties count against the query.

    `allowed_QN` is each query's pool: all other candidates, positives too, are as if they were not there. A score that is not a
    number counts as above where it is a wrong candidate's, and sends the query to the end where it is a positive's.
    """
    if allowed_QN is not None:
        relevant_QN = relevant_QN & allowed_QN
    best = np.where(relevant_QN, scores_QN, -np.inf).max(axis=1)
    above_QN = ~(scores_QN < best[:, None] - TIE) & ~relevant_QN
    if allowed_QN is not None:
        above_QN &= allowed_QN
    ranks: Ranks = np.where(relevant_QN.any(axis=1), above_QN.sum(axis=1) + 1, scores_QN.shape[1] + 1)
    return ranks


def positive_ranks(scores_QN: Scores, relevant_QN: Mask, allowed_QN: Mask | None = None) -> list[Ranks]:
    """Ranks (from 1) of all positives of each query, ascending, each [P]; empty where its pool holds none.

    The n-th best positive has rank n plus the wrong candidates not below it, so that the first rank is `rank_positives`.
    """
    found: list[Ranks] = []
    for query, (scores_N, relevant_N) in enumerate(zip(scores_QN, relevant_QN, strict=True)):
        allowed_N = allowed_QN[query] if allowed_QN is not None else np.ones(len(scores_N), dtype=np.bool_)
        own = np.sort(scores_N[relevant_N & allowed_N])[::-1]
        wrong = np.sort(scores_N[~relevant_N & allowed_N])  # not-a-number comes last, hence above
        above = len(wrong) - np.searchsorted(wrong, own - TIE, side="left")
        if np.isnan(own).any():
            above[:] = len(wrong)
        found.append(above.astype(np.int64) + np.arange(1, len(own) + 1))
    return found


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

    Resampling n values with replacement is a multinomial draw over the distinct ones, which is what is drawn where these are few.
    Memory is bounded whatever Q is. An interval without width (all queries alike) says nothing about queries not asked.
    """
    values = _values(values)
    draw = np.random.default_rng(seed)
    distinct, counts = np.unique(values, return_counts=True)
    means: list[Values] = []
    if len(distinct) <= _FEW:
        for rows in _chunks(resamples, len(distinct)):
            means.append(draw.multinomial(len(values), counts / len(values), rows) @ distinct / len(values))
    else:
        for rows in _chunks(resamples, len(values)):
            means.append(values[draw.integers(0, len(values), (rows, len(values)))].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return Interval(float(values.mean()), float(low), float(high))


def bootstrap_difference(
    first: npt.ArrayLike, second: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval:
    """Mean of first minus second, paired: both are resampled by the same queries."""
    return bootstrap_mean(_apart(first, second), resamples=resamples, seed=seed)


def mcnemar_test(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Two-sided p-value of McNemar's exact test on paired hits (0 or 1): could both hit equally often?

    Of the queries that only one of the two hits, either is as likely to be that one: a binomial test with probability 1/2.
    """
    for given in (first, second):
        if not np.isin(_values(given), (0.0, 1.0)).all():
            raise InputError("McNemar's test compares hits; give 0 or 1 for each query, or use randomisation_test")
    apart = _apart(first, second)
    total, least = int(np.count_nonzero(apart)), int(min(np.count_nonzero(apart > 0), np.count_nonzero(apart < 0)))
    # P(X <= least) from its greatest term downwards: P(X = i - 1) = P(X = i) * i / (total - i + 1)
    log_top = math.lgamma(total + 1) - math.lgamma(least + 1) - math.lgamma(total - least + 1) - total * math.log(2.0)
    downwards = np.arange(least, 0, -1, dtype=np.float64)
    tail = 1.0 + float(np.cumprod(downwards / (total - downwards + 1.0)).sum())
    return min(1.0, 2.0 * math.exp(log_top) * tail)


def randomisation_test(first: npt.ArrayLike, second: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = SEED) -> float:
    """Two-sided p-value of the paired randomisation test: how often is the mean difference as large if labels are swapped?

    Each query's pair is swapped with probability 1/2, `resamples` times; the arrangement observed is counted as one of them, so
    the smallest p-value is 1 / (resamples + 1). For any metric, not for hits alone.
    """
    apart = _apart(first, second)
    draw = np.random.default_rng(seed)
    sizes, counts = np.unique(np.abs(apart[apart != 0.0]), return_counts=True)
    observed = abs(float(apart.sum())) * (1.0 - 1e-12) - 1e-12  # a sum that differs by rounding alone is as large
    extreme = 0
    if len(sizes) <= _FEW:
        for rows in _chunks(resamples, max(1, len(sizes))):
            sums = (2 * draw.binomial(counts, 0.5, (rows, len(sizes))) - counts) @ sizes
            extreme += int(np.count_nonzero(np.abs(sums) >= observed))
    else:
        nonzero = apart[apart != 0.0]
        for rows in _chunks(resamples, len(nonzero)):
            signs = 2.0 * draw.integers(0, 2, (rows, len(nonzero)), dtype=np.int8) - 1.0
            extreme += int(np.count_nonzero(np.abs(signs @ nonzero) >= observed))
    return (extreme + 1) / (resamples + 1)


def _chunks(rows: int, width: int) -> Iterator[int]:
    """Numbers of rows that add up to `rows`, each so that rows x width stays within a fixed number of cells."""
    if rows < 1:
        raise InputError(f"resamples is {rows}; draw at least 1, better {RESAMPLES}")
    step = max(1, _CELLS // width)
    for first in range(0, rows, step):
        yield min(step, rows - first)


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


def _apart(first: npt.ArrayLike, second: npt.ArrayLike) -> Values:
    first, second = _values(first), _values(second)
    if len(first) != len(second):
        raise InputError(f"{len(first)} and {len(second)} values; a paired comparison needs the same queries in the same order")
    return first - second
