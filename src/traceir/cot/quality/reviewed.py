"""How often kept reasoning is wrong, estimated from what people said of samples drawn at random."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from traceir.cot.review.decisions import Decision

HALLUCINATION: Final = "hallucination"
"""The reason, of decisions.REASONS, that counts."""
Z: Final = 1.959964


@dataclass(slots=True)
class Stratum:
    """Kept samples of one task, and of those that were reviewed at random: how many were hallucinated, and how many faulty."""

    kept: int = 0
    reviewed: int = 0
    hallucinated: int = 0
    faulty: int = 0

    def add(self, votes: Iterable[Decision]) -> None:
        """Counts one kept sample by the decisions on it; where there are several, half of them are enough against it."""
        drawn = [vote for vote in votes if vote.how == "random"]
        self.kept += 1
        if drawn:
            self.reviewed += 1
            self.hallucinated += 2 * sum(vote.decision == "drop" and vote.why == HALLUCINATION for vote in drawn) >= len(drawn)
            self.faulty += 2 * sum(vote.decision in ("drop", "edit") for vote in drawn) >= len(drawn)


def estimate_share(strata: Mapping[str, Stratum], what: str) -> dict[str, Any]:
    """The share of kept samples that are `hallucinated` or `faulty`, with its 95 % interval, as plain data.

    Stratified by task: each stratum's share weighs as much as its kept samples. The interval is Wilson's for the stratified share
    and Kish's effective number of reviews, 1 / sum(weight^2 / reviews). Tasks without reviews are left out; `covered` is the
    share of kept samples in the others. `share`, `low` and `high` are null where nothing was reviewed.
    """
    asked = {name: one for name, one in strata.items() if one.reviewed}
    reached, kept = sum(one.kept for one in asked.values()), sum(one.kept for one in strata.values())
    weights = {name: one.kept / reached for name, one in asked.items()}
    wrong = {name: int(getattr(one, what)) for name, one in strata.items()}
    share = sum(weights[name] * wrong[name] / one.reviewed for name, one in asked.items())
    effective = 1 / sum(weights[name] ** 2 / one.reviewed for name, one in asked.items()) if asked else 0.0
    return {
        "reviewed": sum(one.reviewed for one in asked.values()),
        "wrong": sum(wrong[name] for name in asked),
        **_with_interval(share, effective),
        "covered": round(reached / kept, 4) if kept else 0.0,
        "effective": round(effective, 2),
        "tasks": {
            name: {"kept": one.kept, "reviewed": one.reviewed, "wrong": wrong[name]}
            | _with_interval(wrong[name] / one.reviewed if one.reviewed else 0.0, one.reviewed)
            for name, one in strata.items()
            if one.kept
        },
    }


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share seen in `count` trials, which need not be a whole number."""
    scale = 1 + Z * Z / count
    centre = (share + Z * Z / (2 * count)) / scale
    reach = Z / scale * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def _with_interval(share: float, count: float) -> dict[str, float | None]:
    if not count:
        return {"share": None, "low": None, "high": None}
    low, high = wilson(share, count)
    return {"share": round(share, 4), "low": round(low, 4), "high": round(high, 4)}
