"""The cut-off: which hits score above chance, judged by background queries that nothing in the index answers.

For each of n background queries the best score among the items of one modality is taken. A hit counts if it scores more than the
k-th highest of these, k = floor(rate (n + 1)): then of queries without an answer that are like those of the background, at most
this rate still finds something (split conformal prediction; Vovk, Gammerman and Shafer 2005, section 4.1). Each pair of query
and item modality has a threshold of its own, since their scores are not comparable; a search over several modalities divides the
rate among them. Why the raw best score: docs/results/cutoff.md.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from traceir.errors import InputError
from traceir.index.store import Background, Index, Vectors
from traceir.items import MODALITIES, Modality

PATIENCE: Final = 20.0
"""Thresholds are kept for at least this many times as long as computing them took, however often the contents change."""
_TENANTS: Final = 256
_KINDS: Final[dict[Modality, str]] = {"text": "texts", "image": "images", "image,text": "images with words"}
Scores = Mapping[Modality, npt.NDArray[np.float32]]
"""By the modality of items: the best score of each background query among them."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What a cut-off did to one answer. `below` counts, among the k best of each modality that was looked at, those that do not
    score more than its threshold; `best` is the best score of all that was found, None where nothing was."""

    rate: float
    thresholds: Mapping[Modality, float]
    below: int
    best: float | None


def check_rate(rate: float) -> float:
    """The rate, or InputError where it is none."""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0.0 < rate < 1.0:
        raise InputError(f"cutoff is {str(rate)[:80]}; give a rate of false alarms between 0 and 1, for instance 0.01")
    return float(rate)


def thresholds(scores: Scores, rate: float) -> dict[Modality, float]:
    """By modality what a hit must score more than, so that at most `rate` of background queries find anything in any of them.

    Raises InputError where there are too few background queries for the rate.
    """
    if not scores:
        return {}
    ordered = {modality: np.sort(own) for modality, own in scores.items()}
    count = len(next(iter(ordered.values())))
    # The rank of a query: how many score as high or higher, in the modality where these are fewest; 1 is the best.
    ranks = np.sort(np.min([count - np.searchsorted(ordered[name], own) for name, own in scores.items()], axis=0))
    alarms = math.floor(rate * (count + 1) + 1e-9)
    rank = int(ranks[alarms]) - 1 if alarms < count else count
    if not rank:
        least = int(np.searchsorted(ranks, 1, side="right"))
        raise InputError(
            f"cutoff {rate:g} is less than {count} background queries can tell, which is 1 in {(count + 1) // least}; give a "
            f"higher rate, or calibrate with --count {math.ceil(least / rate)} or a larger --background"
        )
    return {modality: float(own[count - rank]) for modality, own in ordered.items()}


class Calibration:
    """The thresholds of one index, by a search of all its background queries, kept until its contents change. Thread-safe."""

    def __init__(self, index: Index, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._index, self._clock = index, clock
        self._lock = threading.Lock()
        self._version, self._until = "", -math.inf
        self._background: Background | None = None
        self._known: dict[Modality, Scores] = {}

    def thresholds(self, query: Modality, target: Modality | None, rate: float) -> dict[Modality, float]:
        """By the modality of hits, for queries of one modality that look for `target` (None: anything).

        A modality of which the index holds nothing has none. Raises InputError for a rate that is none or too low for the
        background, and where the index is not calibrated for such queries.
        """
        check_rate(rate)
        with self._lock:
            if self._clock() >= self._until and (version := self._index.version()) != self._version:
                self._version, self._background, self._known = version, self._index.background(), {}
                self._until = -math.inf
            if query not in self._known:
                started = self._clock()
                self._known[query] = _best_scores(self._index, _background_of(self._background, query))
                ended = self._clock()
                self._until = max(self._until, ended + PATIENCE * (ended - started))
            scores = self._known[query]
        return thresholds({name: own for name, own in scores.items() if target in (None, name)}, rate)


class Calibrations:
    """The Calibration of each tenant's view of an index; those asked for last are kept. Thread-safe."""

    def __init__(self) -> None:
        self._known: OrderedDict[str | None, Calibration] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, tenant: str | None, index: Index) -> Calibration:
        with self._lock:
            calibration = self._known.setdefault(tenant, Calibration(index))
            self._known.move_to_end(tenant)
            if len(self._known) > _TENANTS:
                self._known.popitem(last=False)
            return calibration


def _background_of(background: Background | None, query: Modality) -> Vectors:
    if background is None:
        raise InputError("the index is not calibrated, so there is no cut-off; run `traceir index calibrate` on it once")
    if query not in background.vectors:
        kinds = ", ".join(_KINDS[modality] for modality in background.vectors)
        raise InputError(
            f"the index is calibrated for queries that are {kinds}, not {_KINDS[query]}; leave out the cut-off, or run `traceir "
            "index calibrate` with --background FOLDER, a folder of images of which it has none"
        )
    return background.vectors[query]


def _best_scores(index: Index, vectors: Vectors) -> Scores:
    """The best score of each of these queries among the items of each modality that the index has."""
    hits = {modality: index.search(vectors, 1, modality=modality) for modality in MODALITIES}
    return {
        modality: np.array([best[0].score if best else -1.0 for best in of_queries], dtype=np.float32)
        for modality, of_queries in hits.items()
        if any(of_queries)
    }
