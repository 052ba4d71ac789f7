"""Counters that stay small however many samples they see: lengths, most frequent items, a sample chosen by hash."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

LONGEST: Final = 10_000
"""Lengths above are counted as this one."""
QUANTILES: Final = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
BINS: Final = 40

Entry = TypeVar("Entry")


@dataclass(slots=True)
class Lengths:
    """How often each length occurs; at most LONGEST + 1 counts."""

    counts: Counter[int] = field(default_factory=Counter)

    def add(self, length: int) -> None:
        self.counts[min(length, LONGEST)] += 1

    def absorb(self, other: Lengths) -> None:
        self.counts.update(other.counts)

    def quantile(self, share: float) -> int:
        """The least length that at least `share` of the samples do not exceed; 0 where there are none."""
        total, below = self.counts.total(), 0
        for length in sorted(self.counts):
            below += self.counts[length]
            if below >= share * total:
                return length
        return 0

    def summary(self) -> dict[str, Any]:
        """Samples, mean, least, most, quantiles, and a histogram of `[first length, last length, samples]`."""
        total = self.counts.total()
        if not total:
            return {"samples": 0, "mean": 0.0, "least": 0, "most": 0, "quantiles": {}, "histogram": []}
        return {
            "samples": total,
            "mean": round(sum(length * count for length, count in self.counts.items()) / total, 3),
            "least": min(self.counts),
            "most": max(self.counts),
            "quantiles": {f"{share:.2f}": self.quantile(share) for share in QUANTILES},
            "histogram": self.histogram(),
        }

    def histogram(self) -> list[list[int]]:
        """At most BINS + 1 bins of equal width (1, 2, 5, 10, ...) that begin at its multiples, empty ones in between counted."""
        widths = (digit * 10**power for power in range(6) for digit in (1, 2, 5))
        least, most = min(self.counts), max(self.counts)
        width = next(width for width in widths if (most - least) // width < BINS)
        binned = Counter(dict.fromkeys(range(least // width, most // width + 1), 0))
        for length, count in self.counts.items():
            binned[length // width] += count
        return [[place * width, (place + 1) * width - 1, binned[place]] for place in sorted(binned)]


@dataclass(slots=True)
class Frequent:
    """The most frequent items of a stream, by Misra and Gries (1982): exact while at most `size` items differ.

    Else each count is too low by at most `error`, which is at most the stream's length / `size`.
    """

    size: int
    total: int = 0
    error: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, item: str) -> None:
        self.total += 1
        self.counts[item] += 1
        if len(self.counts) > self.size:
            self.error += 1
            self.counts = Counter({known: count - 1 for known, count in self.counts.items() if count > 1})

    def absorb(self, other: Frequent) -> None:
        """Adds another stream; afterwards there may be as many counts as both had."""
        self.total += other.total
        self.error += other.error
        self.counts.update(other.counts)

    def top(self, count: int) -> list[tuple[str, int]]:
        """The most frequent, equal ones in the order of their names."""
        return sorted(self.counts.items(), key=lambda pair: (-pair[1], pair[0]))[:count]


class HashSample(Generic[Entry]):
    """At most `size` entries, those whose keys have the least hashes: the same ones in whatever order they come."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.seen = 0
        self._heap: list[tuple[int, int, Entry]] = []

    def add(self, key: str, entry: Entry) -> None:
        self.seen += 1
        place = -int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest())
        if len(self._heap) < self.size:
            heapq.heappush(self._heap, (place, self.seen, entry))
        elif place > self._heap[0][0]:
            heapq.heapreplace(self._heap, (place, self.seen, entry))

    def entries(self) -> list[Entry]:
        """In the order of their hashes."""
        return [entry for _, _, entry in sorted(self._heap, key=lambda one: (-one[0], one[1]))]
