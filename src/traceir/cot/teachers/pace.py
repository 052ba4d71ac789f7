"""How fast a teacher may be asked: so many requests at a time, fewer when it is overloaded, and so many a minute."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from traceir.errors import InputError

LONGEST_HOLD_S: Final = 600.0
"""A teacher that asks to wait longer is asked again after this."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The permission for one request: its number, and the tokens it was estimated to take."""

    number: int
    tokens: int


class Bucket:
    """A rate of so many a minute, with what one second brings (at least 1) as the most that may come at once."""

    def __init__(self, per_minute: float, now: float) -> None:
        self.rate = per_minute / 60
        self.most = max(1.0, self.rate)
        self.level, self._at = self.most, now

    def delay(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be taken; an amount above `most` waits for a full bucket and leaves a debt."""
        self._fill(now)
        return max(0.0, (min(amount, self.most) - self.level) / self.rate)

    def take(self, amount: float, now: float) -> None:
        """Takes `amount`; a negative one gives back."""
        self._fill(now)
        self.level = min(self.most, self.level - amount)

    def _fill(self, now: float) -> None:
        self.level = min(self.most, self.level + (now - self._at) * self.rate)
        self._at = now


class Limits:
    """Whether a request may start now. Pure: whoever calls it waits.

    Additive increase, multiplicative decrease: an answer adds 1 / `permitted`, up to `concurrency`; an overload halves it, but
    only once for the requests that were in flight together, down to 1. Starts are held while the teacher asks to wait, and by
    the rates; tokens are taken by estimate and put right after the answer. All times are in seconds of `clock`.
    """

    def __init__(
        self,
        concurrency: int,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        rates = (requests_per_minute, tokens_per_minute)
        if concurrency < 1 or any(rate is not None and not rate > 0 for rate in rates):
            shown = f"{concurrency} at a time, {rates[0]} requests and {rates[1]} tokens a minute"
            raise InputError(f"{shown}: give at least 1 request at a time, and rates above 0 or none")
        self.concurrency = concurrency
        self.permitted = float(concurrency)
        self.in_flight = 0
        self._clock, self._number, self._cut_at, self._held_until = clock, 0, 0, -math.inf
        now = clock()
        self._requests, self._tokens = [Bucket(rate, now) if rate is not None else None for rate in rates]

    def delay(self, tokens: int) -> float:
        """Seconds until a request of so many tokens may start; infinite where one in flight has to end first."""
        if self.in_flight >= int(self.permitted):
            return math.inf
        now = self._clock()
        wait = max(0.0, self._held_until - now)
        if self._requests is not None:
            wait = max(wait, self._requests.delay(1.0, now))
        return max(wait, self._tokens.delay(tokens, now)) if self._tokens is not None else wait

    def start(self, tokens: int) -> Slot:
        self._take(1, tokens)
        self.in_flight += 1
        self._number += 1
        return Slot(self._number, tokens)

    def unstart(self, slot: Slot) -> None:
        """Takes back a start whose request was not sent."""
        self._take(-1, -slot.tokens)
        self.in_flight -= 1

    def end(self, slot: Slot, *, tokens: int | None = None, overloaded: bool = False, retry_after: float | None = None) -> None:
        """A request is over. `tokens`: what an answer took, None where there was no answer."""
        self.in_flight -= 1
        if retry_after is not None:
            self._held_until = max(self._held_until, self._clock() + min(retry_after, LONGEST_HOLD_S))
        if overloaded and slot.number > self._cut_at:
            self.permitted = max(1.0, self.permitted / 2)
            self._cut_at = self._number
        elif tokens is not None:
            self.permitted = min(float(self.concurrency), self.permitted + 1 / self.permitted)
            if tokens != slot.tokens:
                self._take(0, tokens - slot.tokens)

    def _take(self, requests: int, tokens: int) -> None:
        if self._requests is None and self._tokens is None:
            return
        now = self._clock()
        if self._requests is not None and requests:
            self._requests.take(requests, now)
        if self._tokens is not None:
            self._tokens.take(tokens, now)


class Pace:
    """Lets requests start, first come, first served, as `Limits` allow. For one event loop."""

    def __init__(
        self,
        concurrency: int,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = Limits(concurrency, requests_per_minute, tokens_per_minute, clock=clock)
        self._waiting: deque[tuple[asyncio.Future[Slot], int]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def start(self, tokens: int = 0) -> Slot:
        """Waits until a request of about so many tokens may start. Each slot must be handed to `end` or `unstart`."""
        if not self._waiting and self.limits.delay(tokens) <= 0:
            return self.limits.start(tokens)
        waiter: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._waiting.append((waiter, tokens))
        self._admit()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.unstart(waiter.result())
            raise

    def end(self, slot: Slot, *, tokens: int | None = None, overloaded: bool = False, retry_after: float | None = None) -> None:
        """See `Limits.end`."""
        self.limits.end(slot, tokens=tokens, overloaded=overloaded, retry_after=retry_after)
        self._admit()

    def unstart(self, slot: Slot) -> None:
        """See `Limits.unstart`."""
        self.limits.unstart(slot)
        self._admit()

    def _admit(self) -> None:
        """Starts whoever waits and may; sets the timer for the next one where only time is missing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            waiter, tokens = self._waiting[0]
            if not waiter.done():
                wait = self.limits.delay(tokens)
                if wait > 0:
                    if wait < math.inf:
                        self._timer = asyncio.get_running_loop().call_later(wait, self._admit)
                    return
                waiter.set_result(self.limits.start(tokens))
            self._waiting.popleft()
