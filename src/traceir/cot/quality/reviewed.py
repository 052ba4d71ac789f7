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


@dataclass(frozen=True, slots=True)
class Stratum:
    """Kept samples of one task, and of those that were reviewed at random: how many, and how many of these were wrong."""

    kept: int
    reviewed: int
    wrong: int


def judge(votes: Iterable[Decision]) -> dict[str, bool]:
    """What the decisions on one kept sample say of it; where there are several, half of them are enough against it."""
    drawn = [vote for vote in votes if vote.how == "random"]
    hallucinated = sum(vote.decision == "drop" and vote.why == HALLUCINATION for vote in drawn)
    faulty = sum(vote.decision in ("drop", "edit") for vote in drawn)
    reviewed = bool(drawn)
    return {
        "reviewed": reviewed,
        "hallucinated": reviewed and 2 * hallucinated >= len(drawn),
        "faulty": reviewed and 2 * faulty >= len(drawn),
    }


def estimate_share(strata: Mapping[str, Stratum]) -> dict[str, Any]:
    """The share of kept samples that are wrong, with its 95 % interval, as plain data.

    Stratified by task: each stratum's share weighs as much as its kept samples. The interval is Wilson's for the stratified share
    and Kish's effective number of reviews, 1 / sum(weight^2 / reviews). Tasks without reviews are left out; `covered` is the
    share of kept samples in the others. `share`, `low` and `high` are null where nothing was reviewed.
    """
    asked = [stratum for stratum in strata.values() if stratum.reviewed]
    reached, kept = sum(stratum.kept for stratum in asked), sum(stratum.kept for stratum in strata.values())
    share = sum(stratum.kept / reached * stratum.wrong / stratum.reviewed for stratum in asked)
    effective = 1 / sum((stratum.kept / reached) ** 2 / stratum.reviewed for stratum in asked) if asked else 0.0
    return {
        "reviewed": sum(stratum.reviewed for stratum in asked),
        "wrong": sum(stratum.wrong for stratum in asked),
        **_with_interval(share, effective),
        "covered": round(reached / kept, 4) if kept else 0.0,
        "effective": round(effective, 2),
        "tasks": {
            name: {"kept": own.kept, "reviewed": own.reviewed, "wrong": own.wrong}
            | _with_interval(own.wrong / max(own.reviewed, 1), own.reviewed)
            for name, own in strata.items()
        },
    }


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share seen in `count` trials, which need not be a whole number as scipy asks."""
    scale = 1 + Z * Z / count
    centre = (share + Z * Z / (2 * count)) / scale
    reach = Z / scale * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def _with_interval(share: float, count: float) -> dict[str, float | None]:
    if not count:
        return {"share": None, "low": None, "high": None}
    low, high = wilson(share, count)
    return {"share": round(share, 4), "low": round(low, 4), "high": round(high, 4)}
