"""Limits of speed: a bucket of tokens for each principal or address, in bounded memory."""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Final

MAX_BUCKETS: Final = 10_000
_REST: Final = "\0rest"
"""The one bucket that newcomers share where all others are in use; no principal or address is called so."""


@dataclass(frozen=True, slots=True)
class Rate:
    """So many a minute on average, `burst` at once (default: a minute's worth at most 60, or two seconds' worth if more)."""

    per_minute: float
    burst: float | None = None

    @property
    def size(self) -> float:
        return self.burst if self.burst is not None else max(1.0, min(60.0, self.per_minute), self.per_minute / 30)


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class Buckets:
    """Token buckets by name. Thread-safe; at most `most` of them, whoever asks.

    Where all are in use, full buckets go first, which forgets nothing; where none is full, newcomers share one bucket: an
    attacker with many addresses slows other strangers down, but never gets a fresh bucket and never takes more memory.
    """

    def __init__(self, rate: Rate, *, most: int = MAX_BUCKETS, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._most, self._clock = rate, max(2, most), clock
        self._lock = Lock()
        self._buckets: dict[str, tuple[_Bucket, Rate]] = {}
        self._swept = -math.inf

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, who: str, cost: float = 1.0, rate: Rate | None = None) -> float:
        """0.0 where `cost` was taken; else the seconds after which it can be, and nothing was taken.

        What costs more than a whole bucket is let through by a full one, which then owes the rest.
        """
        with self._lock:
            bucket, rate = self._bucket_of(who, rate or self._rate)
            needed = min(cost, rate.size)
            if bucket.tokens >= needed:
                bucket.tokens -= cost
                return 0.0
            return (needed - bucket.tokens) * 60.0 / rate.per_minute

    def _bucket_of(self, who: str, rate: Rate) -> tuple[_Bucket, Rate]:
        now = self._clock()
        if who not in self._buckets and len(self._buckets) >= self._most - 1:
            if now >= self._swept + 1.0:  # a look at all of them, so not for every stranger
                self._drop_full(now)
                self._swept = now
            if len(self._buckets) >= self._most - 1:
                who, rate = _REST, self._rate
        bucket, _ = self._buckets.get(who) or (_Bucket(rate.size, now), rate)
        _refill(bucket, rate, now)
        self._buckets[who] = bucket, rate
        return bucket, rate

    def _drop_full(self, now: float) -> None:
        for who, (bucket, rate) in list(self._buckets.items()):
            _refill(bucket, rate, now)
            if bucket.tokens >= rate.size:
                del self._buckets[who]


def _refill(bucket: _Bucket, rate: Rate, now: float) -> None:
    bucket.tokens = min(rate.size, bucket.tokens + max(0.0, now - bucket.at) * rate.per_minute / 60.0)
    bucket.at = now


def retry_after(seconds: float) -> str:
    """The value of a Retry-After header: whole seconds, at least 1, at most a day."""
    return str(max(1, min(86_400, math.ceil(seconds))))


def network_of(address: str) -> str:
    """What counts as one sender: an IPv4 address, an IPv6 network of 64 bits, which is what one household or machine gets."""
    try:
        read = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(read, ipaddress.IPv4Address):
        return str(read)
    if read.ipv4_mapped is not None:
        return str(read.ipv4_mapped)
    return str(ipaddress.ip_network((read, 64), strict=False))
