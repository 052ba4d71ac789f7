"""What the scheduler and its workers share: an input on its way, what is told of it, and what a worker is."""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from traceir.errors import TraceError
from traceir.items import Encoding, Item, Query, Route
from traceir.prompts import Role

FAILURES: Final = 8  # failures of a worker, one after the other, from which on the server no longer calls itself ready
AGAIN_S: Final = 15.0
"""Seconds after the last failure from which it calls itself ready again: only requests can tell that an engine is back."""
PATIENT: Final = 4.0
"""How many times the time of long work counts, so that it has the smaller part of a model that others want too."""


class BusyError(TraceError):
    """Too many inputs are waiting, `of_caller` of them this caller's; `retry_after_s` says when to come back."""

    def __init__(self, waiting: int, retry_after_s: float, *, of_caller: int = 0) -> None:
        shown = f"{waiting} inputs are waiting, {of_caller} of them yours, and the server takes no more of you now"
        super().__init__(f"{shown}; try again in {retry_after_s:g} s")
        self.retry_after_s = retry_after_s


class LateError(TraceError):
    """The deadline of a request has passed."""


class UnavailableError(TraceError):
    """The engine that computes for this server cannot be reached, or fails."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What is known of a query before it is encoded: its road, P(`<|emb|>`) at the first step, and its reasoning so far."""

    route: str
    emb_probability: float
    reasoning: str


Listener = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Served:
    """An encoding, with the seconds from arrival to its prefill (`queue`) and from there to the end (`encode`), and its prompt's
    tokens, `cut` of the text's beyond."""

    encoding: Encoding
    queue: float
    encode: float
    prompt_tokens: int
    cut: int
    cached: bool = False


@dataclass(slots=True, eq=False)
class Job:
    """One input on its way to `done`; the same input asked for twice at a time is one job with two waiters.

    `who`: whose share of the server it takes; `patient`: part of long work, which waits while others ask for little. The worker
    notes when its prefill began (`prefilled`) and its prompt's tokens. Its methods are for the event loop.
    """

    content: Query | Item
    route: Route
    done: asyncio.Future[Served]
    who: str = ""
    patient: bool = False
    arrived: float = field(default_factory=time.monotonic)
    waiters: int = 0
    listeners: list[Listener] = field(default_factory=list)
    prefilled: float = 0.0
    prompt_tokens: int = 0
    cut: int = 0

    @property
    def wanted(self) -> bool:
        return not self.done.done()

    def finish(self, encoding: Encoding, now: float) -> None:
        if self.wanted:
            queue, encode = self.prefilled - self.arrived, now - self.prefilled
            self.done.set_result(Served(encoding, queue, encode, self.prompt_tokens, self.cut))

    def fail(self, error: BaseException) -> None:
        if self.wanted:
            self.done.set_exception(error)
            self.done.exception()  # seen, also where every waiter has gone

    def tell(self, progress: Progress) -> None:
        for listener in list(self.listeners):
            listener(progress)


class Worker(ABC):
    """What encodes. Each job it takes ends by `finish_all` or `fail_all`; one that is no longer `wanted` may be dropped."""

    def __init__(self) -> None:
        self._failures, self._failed = 0, 0.0

    @property
    def alive(self) -> bool:
        """Whether what was done last did not all fail, or that was a while ago."""
        return self._failures < FAILURES or time.monotonic() - self._failed > AGAIN_S

    def start(self, loop: asyncio.AbstractEventLoop, pool: ThreadPoolExecutor) -> None:
        """Begins to work for jobs of this event loop; `pool` is for short work beside it."""
        self.loop, self.pool = loop, pool

    @abstractmethod
    def route(self, role: Role, route: Route) -> Route:
        """The route that an input takes where this one is asked for; raises InputError where it cannot be had."""

    @abstractmethod
    def take(self, job: Job) -> None:
        """Begins a job, in the event loop."""

    @abstractmethod
    async def close(self) -> None:
        """Frees what it holds, once nothing is wanted any more."""

    def finish_all(self, finished: Sequence[tuple[Job, Encoding]], now: float) -> None:
        """Hands in results, in the event loop; `now` is a moment of `time.monotonic`."""
        self._failures = 0
        for job, encoding in finished:
            job.finish(encoding, now)

    def fail_all(self, jobs: Sequence[Job], error: BaseException, *, own: bool = True) -> None:
        """What cannot be done, in the event loop. `own`: by a fault of the worker's, not of the input's."""
        if own:
            self._failures, self._failed = self._failures + 1, time.monotonic()
        for job in jobs:
            job.fail(error)

    def call(self, work: Callable[..., None], *given: object) -> None:
        """Runs something in the event loop, from a thread; where that has ended there is nobody left to tell."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(work, *given)
