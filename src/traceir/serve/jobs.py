"""What the scheduler and those who encode for it have in common: an input on its way, and what is told of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Protocol

from traceir.errors import TraceError
from traceir.items import Encoding, Item, Query, Route
from traceir.prompts import Role

FAILURES: Final = 8
"""Failures of a worker, one after the other, from which on the server no longer calls itself ready."""
AGAIN_S: Final = 15.0
"""Seconds after the last failure from which it calls itself ready again: only requests can tell that an engine is back."""


@dataclass(slots=True)
class Health:
    """Whether what a worker did last did not all fail, or that was a while ago."""

    failures: int = 0
    failed: float = 0.0

    @property
    def good(self) -> bool:
        return self.failures < FAILURES or time.monotonic() - self.failed > AGAIN_S

    def succeed(self) -> None:
        self.failures = 0

    def fail(self) -> None:
        self.failures, self.failed = self.failures + 1, time.monotonic()


class BusyError(TraceError):
    """Too many inputs are waiting, `of_caller` of them this caller's; `retry_after_s` says when to come back."""

    def __init__(self, waiting: int, retry_after_s: float, *, of_caller: int = 0) -> None:
        told = f"{waiting} inputs are waiting, {of_caller} of them yours, and the server takes no more of you now"
        super().__init__(f"{told}; try again in {retry_after_s:g} s")
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


Listener = Callable[[Progress], None]


@dataclass(slots=True, eq=False)
class Job:
    """One input on its way; the same input asked for twice at a time is one job with two waiters.

    Who encodes it notes when its prefill began (`prefilled`), and its prompt's tokens.
    """

    key: tuple[str, str, str]
    route: Route
    arrived: float
    done: asyncio.Future[Served]
    who: str = ""
    """Whose share of the server it takes."""
    patient: bool = False
    """Whether it is part of a long work, which waits while others ask for little."""
    waiters: int = 0
    listeners: list[Listener] = field(default_factory=list)
    prefilled: float = 0.0
    prompt_tokens: int = 0
    cut: int = 0


class Desk(Protocol):
    """Where a worker hands its results in. All of it is called in the event loop `loop`; `pool` is for short work beside it."""

    loop: asyncio.AbstractEventLoop
    pool: ThreadPoolExecutor

    def deliver(self, finished: Sequence[tuple[Job, Encoding]], now: float) -> None:
        """Jobs that are done, at a moment of `time.monotonic`."""

    def fail(self, jobs: Sequence[Job], error: BaseException) -> None:
        """Jobs that cannot be done."""


class Worker(Protocol):
    """What encodes. A job whose `done` is over is no longer wanted."""

    def route(self, role: Role, route: Route) -> Route:
        """The route that an input takes where this one is asked for; raises InputError where it cannot be had."""

    def start(self, desk: Desk) -> None: ...

    def take(self, job: Job, content: Query | Item) -> None:
        """Begins a job, in the event loop; its end is handed in at the desk."""

    @property
    def alive(self) -> bool:
        """Whether its last jobs did not all fail."""

    async def close(self) -> None:
        """Frees what it holds, once nothing is wanted any more."""


def tell_all(listeners: Sequence[Listener], progress: Progress) -> None:
    for listener in listeners:
        listener(progress)
