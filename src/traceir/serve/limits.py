"""Token buckets: how often something may happen, for one name or for many in bounded memory."""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Final

MAX_BUCKETS: Final = 10_000
_REST: Final = "\0rest"  # the bucket that newcomers share where all others are in use; no principal or address is called so


@dataclass(frozen=True, slots=True)
class Rate:
    """So many a minute on average, `burst` at once (default: a minute's worth at most 60, or two seconds' worth if more)."""

    per_minute: float
    burst: float | None = None

    @property
    def size(self) -> float:
        return self.burst if self.burst is not None else max(1.0, min(60.0, self.per_minute), self.per_minute / 30)


class Bucket:
    """Tokens that come back at a rate, `rate.size` at most. An amount above that waits for a full bucket and leaves a debt."""

    __slots__ = ("_at", "rate", "tokens")

    def __init__(self, rate: Rate, now: float) -> None:
        self.rate, self.tokens, self._at = rate, rate.size, now

    def delay(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be taken."""
        self.take(0.0, now)
        return max(0.0, (min(amount, self.rate.size) - self.tokens) * 60.0 / self.rate.per_minute)

    def take(self, amount: float, now: float) -> None:
        """Takes `amount`, also below zero; a negative one gives back."""
        refilled = min(self.rate.size, self.tokens + max(0.0, now - self._at) * self.rate.per_minute / 60.0)
        self.tokens, self._at = min(self.rate.size, refilled - amount), now


class Buckets:
    """Token buckets by name; without a rate nothing is limited. Thread-safe; at most `most` of them, whoever asks.

    Where all are in use, full buckets go first, which forgets nothing; where none is full, newcomers share one bucket.
    """

    def __init__(self, rate: Rate | None, *, most: int = MAX_BUCKETS, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._most, self._clock = rate, max(2, most), clock
        self._lock = Lock()
        self._buckets: dict[str, Bucket] = {}
        self._pruned = -math.inf

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, who: str, cost: float = 1.0, rate: Rate | None = None, *, on_debt: bool = False) -> float:
        """0.0 where `cost` was taken; else the seconds until it can be, and nothing was taken, unless `on_debt`.

        `rate` is that of this name alone, where it has one.
        """
        if self._rate is None:
            return 0.0
        with self._lock:
            now = self._clock()
            bucket = self._bucket_of(who, rate or self._rate, now)
            wait = bucket.delay(cost, now)
            if on_debt or not wait:
                bucket.take(cost, now)
            return wait

    def _bucket_of(self, who: str, rate: Rate, now: float) -> Bucket:
        if who not in self._buckets and len(self._buckets) >= self._most - 1:
            if now >= self._pruned + 1.0:  # a look at all of them, so not for every stranger
                self._buckets = {name: used for name, used in self._buckets.items() if used.delay(used.rate.size, now) > 0}
                self._pruned = now
            if len(self._buckets) >= self._most - 1 and self._rate is not None:
                who, rate = _REST, self._rate
        bucket = self._buckets.setdefault(who, Bucket(rate, now))
        bucket.rate = rate
        return bucket


def retry_after(seconds: float) -> str:
    """The value of a Retry-After header: whole seconds, at least 1, at most a day."""
    return str(max(1, min(86_400, math.ceil(seconds))))


def network_of(address: str) -> str:
    """What counts as one sender: an IPv4 address, an IPv6 network of 64 bits, which is what one household or machine gets."""
    try:
        read = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(read, ipaddress.IPv6Address) and read.ipv4_mapped is None:
        return str(ipaddress.ip_network((read, 64), strict=False))
    return str(getattr(read, "ipv4_mapped", None) or read)
