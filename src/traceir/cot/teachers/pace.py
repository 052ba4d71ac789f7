"""How fast a teacher may be asked: so many requests at a time, fewer when it is overloaded, and so many a minute."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from traceir.errors import InputError

LONGEST_HOLD_S: Final = 600.0
"""A teacher that asks to wait longer is asked again after this."""
Clock = Callable[[], float]


class TokenBucket:
    """So many a minute, None for any number; what one second brings (at least 1) is the most that may come at once."""

    def __init__(self, per_minute: float | None, clock: Clock = time.monotonic) -> None:
        if per_minute is not None and not per_minute > 0:
            raise InputError(f"a rate of {per_minute} a minute; give rates above 0, or none")
        self._rate, self._clock, self._at = (per_minute or 0.0) / 60, clock, clock()
        self._level = self._most = max(1.0, self._rate)

    def delay(self, amount: float) -> float:
        """Seconds until `amount` may be taken; more than one second's worth waits for a full bucket and leaves a debt."""
        self.take(0.0)
        return max(0.0, (min(amount, self._most) - self._level) / self._rate) if self._rate else 0.0

    def take(self, amount: float) -> None:
        """Takes `amount`; a negative one gives back."""
        now = self._clock()
        self._level = min(self._most, self._level + (now - self._at) * self._rate) - amount * bool(self._rate)
        self._at = now


class Pacer:
    """Lets requests start, first come, first served. For one event loop.

    Additive increase, multiplicative decrease: an answer adds 1 / `permitted`, up to `concurrency`; an overload halves it, once
    for the requests that were in flight together, down to 1. Starts are held while the teacher asks to wait, and by the rates;
    tokens are taken by estimate and put right after the answer. Times are in seconds of `clock`.
    """

    def __init__(
        self,
        concurrency: int,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        if concurrency < 1:
            raise InputError(f"{concurrency} at a time; give at least 1 request at a time")
        self.concurrency, self.permitted, self.in_flight = concurrency, float(concurrency), 0
        self._requests, self._tokens = TokenBucket(requests_per_minute, clock), TokenBucket(tokens_per_minute, clock)
        self._clock, self._number, self._halved_at, self._held_until = clock, 0, 0, -math.inf
        self._turn, self._freed = asyncio.Lock(), asyncio.Event()

    def delay(self, tokens: int) -> float:
        """Seconds until a request of so many tokens may start; infinite where one in flight has to end first."""
        if self.in_flight >= int(self.permitted):
            return math.inf
        return max(0.0, self._held_until - self._clock(), self._requests.delay(1.0), self._tokens.delay(tokens))

    async def start(self, tokens: int = 0) -> int:
        """Waits until a request of about so many tokens may start, and numbers it; each number must be handed to `end`."""
        async with self._turn:
            while (wait := self.delay(tokens)) > 0:
                self._freed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if wait == math.inf else wait):
                        await self._freed.wait()
        return self.take(tokens)

    def take(self, tokens: int) -> int:
        """Starts a request now, and returns its number."""
        self._requests.take(1.0)
        self._tokens.take(tokens)
        self.in_flight += 1
        self._number += 1
        return self._number

    def end(
        self, number: int, more_tokens: int | None = None, *, overloaded: bool = False, retry_after: float | None = None
    ) -> None:
        """A request is over. `more_tokens`: those an answer took beyond the estimate, None where there was no answer."""
        self.in_flight -= 1
        if retry_after is not None:
            self._held_until = max(self._held_until, self._clock() + min(retry_after, LONGEST_HOLD_S))
        if overloaded and number > self._halved_at:
            self.permitted, self._halved_at = max(1.0, self.permitted / 2), self._number
        elif more_tokens is not None:
            self.permitted = min(float(self.concurrency), self.permitted + 1 / self.permitted)
            self._tokens.take(more_tokens)
        self._freed.set()
