"""Near-duplicates and bursts: hits that show the same as a better one, put under it.

Two hits are alike where their contents are equal, or where they are of one modality and the cosine of their vectors is at least a
threshold: a lower one where the same camera took both within BURST_S seconds. Thresholds: docs/results/find.md.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from traceir.index.store import Stored, Vectors
from traceir.items import Hit, Value

SAME: Final = 0.98
"""Cosine from which on two items are near-duplicates."""
BURST: Final = 0.8
BURST_S: Final = 10.0


Moment = tuple[str, datetime.datetime]
"""A camera, and its local time."""


@dataclass(slots=True)
class _Group:
    """A hit that stays, and the ids of those like it."""

    hit: Hit
    moment: Moment | None
    ids: list[str] = field(default_factory=list)

    def holds(self, hit: Hit, moment: Moment | None, cosine: float, same: float) -> bool:
        if hit.modality != self.hit.modality:
            return False
        return cosine >= same or (cosine >= BURST and _of_one_burst(moment, self.moment))


def fold(hits: Sequence[Hit], kept: Mapping[str, Stored], same: float = SAME) -> list[Hit]:
    """The hits that are like no better one, in their order, each with the ids of those like it as `similar`.

    `kept` is what the index has of them, with vectors; hits that are no longer there are left out.
    """
    there = [(hit, vector) for hit in hits if hit.id in kept and (vector := kept[hit.id].vector) is not None]
    groups: list[_Group] = []
    by_content: dict[str, _Group] = {}
    vectors_ND: Vectors = np.stack([vector for _, vector in there]) if there else np.empty((0, 0), dtype=np.float32)
    for row, (hit, _) in enumerate(there):
        moment, content = _moment(hit.fields), kept[hit.id].content_hash
        group = by_content.get(content)
        if group is None:
            cosines = vectors_ND[: len(groups)] @ vectors_ND[row]
            near = np.flatnonzero(cosines >= min(same, BURST)).tolist()
            group = next((groups[at] for at in near if groups[at].holds(hit, moment, cosines[at], same)), None)
        if group is None:
            vectors_ND[len(groups)] = vectors_ND[row]  # the first rows are those of the groups
            groups.append(group := _Group(hit, moment))
        else:
            group.ids.append(hit.id)
        by_content.setdefault(content, group)
    return [replace(group.hit, similar=tuple(group.ids)) for group in groups]


def _of_one_burst(first: Moment | None, second: Moment | None) -> bool:
    if first is None or second is None or first[0] != second[0]:
        return False
    return abs((first[1] - second[1]).total_seconds()) <= BURST_S


def _moment(fields: Mapping[str, Value]) -> Moment | None:
    """When a photograph was taken by what; None where either is not known, or the time not to the second."""
    camera, date = fields.get("camera"), fields.get("date")
    if not (isinstance(camera, str) and camera and isinstance(date, str) and len(date) >= len("2024-05-01T12:30:00")):
        return None
    try:
        return camera, datetime.datetime.fromisoformat(date).replace(tzinfo=None)
    except ValueError:
        return None
