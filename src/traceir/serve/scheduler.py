"""Between requests and a worker: what is asked is admitted, encoded once however many ask for it, remembered, or given up."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from traceir.encoder import Encoder
from traceir.engines.sglang import SGLangEncoder
from traceir.errors import InputError
from traceir.items import Item, Query, Route
from traceir.search import EncoderLike
from traceir.serve.fair import FairExecutor, Places, caller, patient
from traceir.serve.jobs import BatchWorker, BusyError, EngineWorker, Job, LateError, Listener, Served, Worker
from traceir.serve.model_thread import ModelThread

Key = tuple[str, str, str, str, str]
"""Caller, tenant, role, route and hash of an input: what is the same work for the same people."""


class Scheduler:
    """Encodes queries and items from any number of tasks of one event loop, by a model in this process or by an engine.

    `capacity` bounds the inputs that are under way, and each caller has a share of it (`fair.Places`); beyond it `BusyError` is
    raised at once, or the input waits where the task is `fair.patient`. `writing` rows write together, where the model is in this
    process. `remembered` encodings are kept by content. Equal to the encoder's own results up to floating-point rounding. Start
    it within the loop, and `close` it there: what is under way ends, nothing new is taken.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(self, encoder: EncoderLike, *, capacity: int = 512, writing: int = 64, remembered: int = 8192) -> None:
        for name, value, least in (("capacity", capacity, 1), ("writing", writing, 1), ("remembered", remembered, 0)):
            if value < least:
                raise InputError(f"{name} is {value}; give at least {least}")
        self.encoder, self.capacity, self.remembered = encoder, capacity, remembered
        self.pool: ThreadPoolExecutor = FairExecutor(2, "layout")
        self._worker: Worker
        if isinstance(encoder, Encoder):
            self._worker = ModelThread(encoder, writing)
        else:
            self._worker = EngineWorker(encoder) if isinstance(encoder, SGLangEncoder) else BatchWorker(encoder)
        self._places = Places(capacity)
        self._caches: dict[str, OrderedDict[Key, Served]] = {}  # by caller
        self._jobs: dict[Key, Job] = {}
        self._ends: deque[float] = deque(maxlen=256)  # of the last jobs since there was nothing to do
        self._seconds_each = 0.0
        self._closing = False

    @property
    def under_way(self) -> int:
        """Inputs that have come and are not encoded yet."""
        return len(self._jobs)

    @property
    def reasons(self) -> bool:
        """Whether a query may be reasoned about."""
        return self._worker.route("query", "auto") != "direct"

    @property
    def alive(self) -> bool:
        """Whether the worker does not fail at everything."""
        return self._worker.alive

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._worker.start(self.loop, self.pool)

    async def close(self, seconds: float | None = None) -> None:
        """Takes nothing new, lets what is under way end, closes the worker; what is not done in so many seconds is dropped."""
        self._closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._jobs:
                    await asyncio.wait([job.done for job in self._jobs.values()])
        for job in self._jobs.values():
            job.fail(BusyError(len(self._jobs), 1.0))
        await self._worker.close()
        self.pool.shutdown()

    async def encode_query(
        self, query: Query, route: Route = "auto", *, listener: Listener | None = None, seconds: float | None = None,
        tenant: str | None = None,
    ) -> Served:  # fmt: skip
        """A query by a route. `listener` is told of its progress, in the event loop; `seconds` is its deadline.
        What is remembered or under way for one tenant is nothing to another, so that nobody learns what others ask.

        Raises BusyError, LateError, InputError. Cancelling ends the work, unless others wait for the same query.
        """
        return await self._encode(query, "query", self._worker.route("query", route), listener, seconds, tenant)

    async def encode_item(self, item: Item, *, seconds: float | None = None, tenant: str | None = None) -> Served:
        """A candidate: one prefill, never any reasoning, unless a profile lets candidates write."""
        return await self._encode(item, "item", self._worker.route("candidate", "auto"), None, seconds, tenant)

    async def _encode(
        self, content: Query | Item, role: str, route: Route, listener: Listener | None, seconds: float | None, tenant: str | None
    ) -> Served:
        who = caller.get()
        await self._enter(who)
        job: Job | None = None
        try:
            content_hash = await self.loop.run_in_executor(self.pool, content.content_hash)
            key: Key = who, tenant or "", role, route, content_hash
            if (known := self._caches.get(who, OrderedDict()).get(key)) is not None:
                self._caches[who].move_to_end(key)
                return replace(known, queue=0.0, encode=0.0, cached=True)
            waited_for = self._jobs.get(key)
            if waited_for is None or not waited_for.wanted:
                waited_for = job = self._begin(key, content, route)
        finally:
            if job is None:
                self._places.give(who)
        return await self._wait(waited_for, listener, seconds)

    async def _enter(self, who: str) -> None:
        """Takes a place of the caller's share, which a job then keeps to its end."""
        if not self._closing and patient.get():
            await self._places.wait(who)
        elif self._closing or not self._places.take(who):
            wait = max(1.0, round(len(self._jobs) * self._seconds_each, 1))
            raise BusyError(self._places.held, wait, of_caller=self._places.of(who))

    def _begin(self, key: Key, content: Query | Item, route: Route) -> Job:
        if self._closing:
            raise BusyError(len(self._jobs), 1.0)
        if not self._jobs:
            self._ends.clear()
        job = self._jobs[key] = Job(content, route, self.loop.create_future(), key[0], patient.get())
        job.done.add_done_callback(partial(self._ended, key, job))
        self._worker.take(job)
        return job

    async def _wait(self, job: Job, listener: Listener | None, seconds: float | None) -> Served:
        job.waiters += 1
        if listener is not None:
            job.listeners.append(listener)
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(job.done)
        except TimeoutError as error:
            raise LateError(f"not encoded within {seconds:g} s; give it more time, or ask for the direct route") from error
        finally:
            job.waiters -= 1
            if listener is not None:
                job.listeners.remove(listener)
            if job.waiters == 0:
                job.done.cancel()  # nothing where it is done

    def _ended(self, key: Key, job: Job, done: asyncio.Future[Served]) -> None:
        """Gives its place back, remembers the encoding, and how long jobs take; the first to hear of a job's end."""
        self._places.give(job.who)
        if self._jobs.get(key) is job:
            del self._jobs[key]
        if done.cancelled() or done.exception() is not None:
            return
        self._ends.append(time.monotonic())
        if len(self._ends) >= 8:
            self._seconds_each = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        if self.remembered:
            self._remember(key, done.result())

    def _remember(self, key: Key, served: Served) -> None:
        """Keeps an encoding; where there are too many, the caller with most loses its oldest, so none can push out another's."""
        self._caches.setdefault(key[0], OrderedDict())[key] = served
        if sum(map(len, self._caches.values())) > self.remembered:
            most = max(self._caches, key=lambda who: len(self._caches[who]))
            self._caches[most].popitem(last=False)
            if not self._caches[most]:
                del self._caches[most]
