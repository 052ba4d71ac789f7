"""Which rows pass a filter, remembered between searches by the filter's digest: what a client sent is not kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from traceir.index.matrix import Rows

_MOST: Final = 1 << 22
_MOST_FILTERS: Final = 256
_SPARE: Final = 1024


@dataclass(slots=True)
class _Known:
    numbers: Rows
    top: int  # the highest number of any row when it was asked
    whole: int  # how many passed when all rows were asked for


class Passing:
    """The numbers of the rows that pass each of the last filters; the database is asked for all rows once, then for new ones.

    Sound because a row is never changed once written: it passes for ever or never does. Numbers of rows that are gone may be
    among them, at most about as many as of rows that are there. Kept are the 256 filters used last, of them no more than come to
    `most` numbers in all (8 bytes each), but always the last one.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._kept: OrderedDict[bytes | str, _Known] = OrderedDict()

    def numbers(self, condition: bytes | str, top: int, ask: Callable[[int], Rows]) -> Rows:
        """Ascending numbers [M]; `top` is the highest of any row, and `ask(after)` finds those above `after`, ascending."""
        known = self._kept.pop(condition, None)
        if known is not None and known.top < top:
            added = ask(known.top)
            grown = np.concatenate([known.numbers, added]) if len(added) else known.numbers
            known = _Known(grown, top, known.whole) if len(grown) <= 2 * known.whole + _SPARE else None
        if known is None:
            found = ask(0)
            known = _Known(found, top, len(found))
        self._kept[condition] = known
        total = sum(len(one.numbers) for one in self._kept.values())
        while len(self._kept) > 1 and (total > self._most or len(self._kept) > _MOST_FILTERS):
            _, oldest = self._kept.popitem(last=False)
            total -= len(oldest.numbers)
        return known.numbers
