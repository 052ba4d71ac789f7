"""Between requests and a worker: what is asked is admitted, encoded once however many ask for it, remembered, or given up."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from traceir.encoder import Encoder
from traceir.engines.sglang import SGLangEncoder
from traceir.errors import InputError
from traceir.items import Encoding, Item, Query, Route, check_route
from traceir.search import EncoderLike
from traceir.serve.batch_worker import BatchWorker
from traceir.serve.engine_worker import EngineWorker
from traceir.serve.fair import FairExecutor, Places, caller, patient
from traceir.serve.jobs import BusyError, Job, LateError, Listener, Served, Worker
from traceir.serve.model_thread import ModelThread


def _worker(encoder: EncoderLike, writing: int) -> Worker:
    """The worker that makes most of an encoder: a model whose steps can be had, an engine that takes prompts, or any other."""
    if isinstance(encoder, Encoder):
        return ModelThread(encoder, writing)
    return EngineWorker(encoder) if isinstance(encoder, SGLangEncoder) else BatchWorker(encoder)


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
        self._places = Places(capacity)
        self._worker = _worker(encoder, writing)
        self._caches: dict[str, OrderedDict[tuple[str, str, str], Served]] = {}
        self._kept = 0  # encodings in all of them
        self._jobs: dict[tuple[str, str, str], Job] = {}
        self._closing = False
        self._busy_since = self._answered = self._rate = 0.0

    @property
    def under_way(self) -> int:
        """Inputs that have come and are not encoded yet."""
        return len(self._jobs)

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._worker.start(self)

    @property
    def reasons(self) -> bool:
        """Whether a query may be reasoned about."""
        return self._worker.route("query", "auto") != "direct"

    @property
    def alive(self) -> bool:
        """Whether the worker does not fail at everything."""
        return self._worker.alive

    async def close(self, seconds: float | None = None) -> None:
        """Takes nothing new, lets what is under way end, closes the worker; what is not done in so many seconds is dropped."""
        self._closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._jobs:
                    await asyncio.wait([job.done for job in self._jobs.values()])
                    await asyncio.sleep(0)
        for job in list(self._jobs.values()):
            self._end(job, BusyError(len(self._jobs), 1.0))
        await self._worker.close()
        self.pool.shutdown()

    async def encode_query(
        self,
        query: Query,
        route: Route = "auto",
        *,
        listener: Listener | None = None,
        seconds: float | None = None,
        tenant: str | None = None,
    ) -> Served:
        """A query by a route. `listener` is told of its progress, in the event loop; `seconds` is its deadline.
        What is remembered or under way for one tenant is nothing to another, so that nobody learns what others ask.

        Raises BusyError, LateError, InputError. Cancelling ends the work, unless others wait for the same query.
        """
        check_route(route)
        return await self._encode(query, "query", self._worker.route("query", route), listener, seconds, tenant)

    async def encode_item(self, item: Item, *, seconds: float | None = None, tenant: str | None = None) -> Served:
        """A candidate: one prefill, never any reasoning, unless a profile lets candidates write."""
        return await self._encode(item, "item", self._worker.route("candidate", "auto"), None, seconds, tenant)

    async def _encode(
        self,
        content: Query | Item,
        role: str,
        route: Route,
        listener: Listener | None,
        seconds: float | None,
        tenant: str | None,
    ) -> Served:
        who = caller.get()
        await self._enter(who)
        kept = False
        try:
            content_hash = await self.loop.run_in_executor(self.pool, content.content_hash)
            key = role, route, f"{who}:{tenant or ''}:{content_hash}"
            if (known := self._remembered(who, key)) is not None:
                return replace(known, queue=0.0, encode=0.0, cached=True)
            job = self._jobs.get(key)
            if job is None:
                job, kept = self._begin(key, route, who), True
                self._worker.take(job, content)
        finally:
            if not kept:
                self._places.give(who)
        if listener is not None:
            job.listeners.append(listener)
        job.waiters += 1
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(job.done)
        except TimeoutError as error:
            raise LateError(f"not encoded within {seconds:g} s; give it more time, or ask for the direct route") from error
        finally:
            job.waiters -= 1
            if listener is not None and listener in job.listeners:
                job.listeners.remove(listener)
            if job.waiters == 0 and not job.done.done():
                self._forget(job)

    async def _enter(self, who: str) -> None:
        """Takes a place of the caller's share, which a job then keeps to its end."""
        if not self._closing and patient.get():
            await self._places.wait(who)
        elif self._closing or not self._places.take(who):
            raise BusyError(self._places.held, self._wait_s(), of_caller=self._places.of(who))

    def _begin(self, key: tuple[str, str, str], route: Route, who: str) -> Job:
        if self._closing:
            raise BusyError(len(self._jobs), 1.0)
        if not self._jobs:
            self._busy_since, self._answered = time.monotonic(), 0.0
        job = self._jobs[key] = Job(key, route, time.monotonic(), self.loop.create_future(), who, patient.get())
        return job

    def _wait_s(self) -> float:
        """Seconds until what is under way should be done, by the answers of the last minute; at least 1."""
        if self._answered >= 8:
            self._rate = self._answered / max(time.monotonic() - self._busy_since, 0.1)
        return max(1.0, round(len(self._jobs) / self._rate, 1)) if self._rate else 1.0

    def deliver(self, finished: Sequence[tuple[Job, Encoding]], now: float) -> None:
        """The worker's results; see `jobs.Desk`."""
        self._answered += len(finished)
        if now - self._busy_since > 60:
            self._busy_since, self._answered = (now + self._busy_since) / 2, self._answered / 2
        for job, encoding in finished:
            self._end(job, Served(encoding, job.prefilled - job.arrived, now - job.prefilled, job.prompt_tokens, job.cut))

    def fail(self, jobs: Sequence[Job], error: BaseException) -> None:
        """What the worker could not do."""
        for job in jobs:
            self._end(job, error)

    def _remembered(self, who: str, key: tuple[str, str, str]) -> Served | None:
        cache = self._caches.get(who)
        if cache is None or key not in cache:
            return None
        cache.move_to_end(key)
        return cache[key]

    def _remember(self, who: str, key: tuple[str, str, str], served: Served) -> None:
        """Keeps an encoding; where there are too many, the caller with most loses its oldest, so none can push out another's."""
        own = self._caches.setdefault(who, OrderedDict())
        self._kept += key not in own
        own[key] = served
        if self._kept > self.remembered:
            self._kept -= 1
            most = max(self._caches, key=lambda one: len(self._caches[one]))
            self._caches[most].popitem(last=False)
            if not self._caches[most]:
                del self._caches[most]

    def _end(self, job: Job, result: Served | BaseException) -> None:
        """Tells all waiters, and remembers the encoding."""
        self._leave(job)
        if isinstance(result, Served) and self.remembered:
            self._remember(job.who, job.key, result)
        if job.done.done():
            return
        if isinstance(result, BaseException):
            job.done.set_exception(result)
            job.done.exception()  # seen, also where every waiter has gone
        else:
            job.done.set_result(result)

    def _forget(self, job: Job) -> None:
        """Nobody waits any more: the worker drops it."""
        self._leave(job)
        job.done.cancel()

    def _leave(self, job: Job) -> None:
        if self._jobs.get(job.key) is job:
            del self._jobs[job.key]
            self._places.give(job.who)
