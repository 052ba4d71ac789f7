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
_ENTRIES: Final = 1 << 22


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


def average_precision_at(ranks: Ranks, k: int) -> float:
    """Precision at each positive among the first k, added up and divided by min(P, k), as CIRCO defines it; 0 where P is 0.

    Where P exceeds k, trec_eval's `map_cut` divides by P instead and is smaller.
    """
    within = ranks[ranks <= k]
    return float((np.arange(1, len(within) + 1) / within).sum() / min(len(ranks), k)) if len(ranks) else 0.0


def bootstrap_mean(values: npt.ArrayLike) -> Interval:
    """Mean of one value a query, with a 95 % percentile bootstrap interval; the same input gives the same interval.

    Resampling with replacement is a multinomial draw over the distinct values, which is a thousand times as fast where these are
    few (hits). Memory is bounded whatever Q is.
    """
    values = _values(values)
    draw = np.random.default_rng(SEED)
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= _FEW:
        means = draw.multinomial(len(values), counts / len(values), RESAMPLES) @ distinct / len(values)
        low, high = np.percentile(means, (2.5, 97.5))
    else:
        from scipy import stats  # half a second that hits do not need

        batch = max(1, _ENTRIES // len(values))  # resamples that are in memory together
        resampled = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, batch=batch, method="percentile", rng=draw)
        low, high = resampled.confidence_interval
    return Interval(float(values.mean()), float(low), float(high))


def bootstrap_difference(first: npt.ArrayLike, second: npt.ArrayLike) -> Interval:
    """Mean of first minus second, paired: both are resampled by the same queries."""
    return bootstrap_mean(_differences(first, second))


def mcnemar_test(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Two-sided p-value of McNemar's exact test on paired hits (0 or 1): could both hit equally often?

    Of the queries that only one of the two hits, either is as likely to be that one: a binomial test with probability 1/2.
    """
    from scipy import stats

    for hits in (first, second):
        if not np.isin(_values(hits), (0.0, 1.0)).all():
            raise InputError("McNemar's test compares hits; give 0 or 1 for each query")
    differences = _differences(first, second)
    total = np.count_nonzero(differences)
    return float(stats.binomtest(np.count_nonzero(differences > 0), total).pvalue) if total else 1.0


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
