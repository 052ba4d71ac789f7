"""An input that is being encoded, its progress, and the workers around encoders that run as a whole: batches for a
library's model, single requests for an engine's. The worker on a model in this process is in scheduler.py."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from traceir.engines.sglang import SGLangEncoder
from traceir.errors import InputError, ModelError, TraceError
from traceir.items import Encoding, Item, Query, Route
from traceir.prompts import Role
from traceir.retrieval.search import EncoderLike
from traceir.serve.fair import Rounds, Usage

log = logging.getLogger(__name__)
ROWS: Final = 32  # inputs of a batch, where the encoder does not say how many (`batch_rows`)
FAILURES: Final = 8  # consecutive failures of a worker after which the server reports that it is not ready
AGAIN_S: Final = (
    15.0  # seconds after the last failure until it reports ready again: only requests can show that an engine is back
)
PATIENT: Final = 4.0  # weight of the time of long work, so that it gets the smaller share of a busy model


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
    """What is known of a query before it is encoded: its route, P(`<|emb|>`) at the first step, and its reasoning so far."""

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

    @property
    def weight(self) -> float:
        """The weight of a second of the model's time."""
        return PATIENT if self.patient else 1.0

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
    """Encodes jobs; made and called in the event loop. Each job it takes ends by `finish_all` or `fail_all`, or is no longer
    `wanted`; `pool` is for short work beside it."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.loop, self.pool = asyncio.get_running_loop(), pool
        self._failures, self._failed = 0, 0.0

    @property
    def alive(self) -> bool:
        """False after too many consecutive failures, until some time has passed."""
        return self._failures < FAILURES or time.monotonic() - self._failed > AGAIN_S

    @abstractmethod
    def route(self, role: Role, route: Route) -> Route:
        """The route that an input takes where this one is asked for; raises InputError where it cannot be had."""

    @abstractmethod
    def take(self, job: Job) -> None:
        """Begins a job."""

    @abstractmethod
    async def close(self) -> None:
        """Frees what it holds, once nothing is wanted any more."""

    def finish_all(self, finished: Sequence[tuple[Job, Encoding]], now: float) -> None:
        """Hands in results; `now` is a moment of `time.monotonic`."""
        self._failures = 0
        for job, encoding in finished:
            job.finish(encoding, now)

    def fail_all(self, jobs: Sequence[Job], error: BaseException, *, own: bool = True) -> None:
        """What cannot be done. `own`: by a fault of the worker's, not of the input's."""
        if own:
            self._failures, self._failed = self._failures + 1, time.monotonic()
        for job in jobs:
            job.fail(error)

    def call(self, work: Callable[..., None], *arguments: object) -> None:
        """Runs something in the event loop, from a thread; where that has ended, nothing."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(work, *arguments)


class _TaskWorker(Worker):
    """A worker whose jobs are done by tasks of the event loop; it closes the encoder where that can be closed."""

    encoder: EncoderLike

    def __init__(self, encoder: EncoderLike, pool: ThreadPoolExecutor) -> None:
        super().__init__(pool)
        self.encoder = encoder
        self._tasks: set[asyncio.Task[None]] = set()

    def _begin(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(getattr(self.encoder, "close", lambda: None))

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        """An InputError is the input's fault; any other is the encoder's, and an UnavailableError to those who wait."""
        if isinstance(error, InputError):
            self.fail_all(jobs, error, own=False)
            return
        if not isinstance(error, ModelError):
            log.error("an input failed", exc_info=error)
        self.fail_all(jobs, UnavailableError(f"{type(error).__name__}: {error}"))


class EngineWorker(_TaskWorker):
    """Every input is one request to the engine behind `encoder`, which batches as it sees fit; those that nobody waits for are
    given up there too. Reasoning is told at its end, not while it is written."""

    encoder: SGLangEncoder

    def route(self, role: Role, route: Route) -> Route:
        return route if self.encoder.model.writes(role) else "direct"

    def take(self, job: Job) -> None:
        task = self._begin(self._encode(job))
        job.done.add_done_callback(lambda _: task.cancel())

    async def _encode(self, job: Job) -> None:
        try:
            prepared = await self.loop.run_in_executor(self.pool, self.encoder.prepare, job.content, job.route)
            job.prefilled, job.prompt_tokens, job.cut = time.monotonic(), len(prepared.read), prepared.cut
            encoding = await asyncio.wrap_future(self.encoder.start(prepared))
        except Exception as error:  # whatever becomes of one input, the worker goes on
            self._fail([job], error)
        else:
            self.finish_all([(job, encoding)], time.monotonic())


class BatchWorker(_TaskWorker):
    """Collects jobs into batches, queries and candidates apart, and runs them in threads: `in_flight` batches at a time where the
    encoder says so, else one. A batch that fails is halved until the input at fault fails by itself; an encoder's own failure
    (ModelError) is that of the whole batch. Tokens of prompts are not counted.
    """

    def __init__(self, encoder: EncoderLike, pool: ThreadPoolExecutor) -> None:
        super().__init__(encoder, pool)
        self.rows: int = getattr(encoder, "batch_rows", ROWS)
        self._free: int = getattr(encoder, "in_flight", 1)
        self._threads = ThreadPoolExecutor(self._free, "encoder")
        self._waiting: dict[str, Rounds[Job]] = {}  # by kind
        self._usage = Usage()

    def route(self, role: Role, route: Route) -> Route:
        if route == "reason":
            self.encoder.encode_queries([], route=route)  # says why it cannot
        return "direct"

    def take(self, job: Job) -> None:
        self._waiting.setdefault(_kind(job), Rounds()).put(job.who, job)
        self._run()

    async def close(self) -> None:
        await super().close()
        self._threads.shutdown()

    def _run(self) -> None:
        """Starts batches while there are free threads and something waits."""
        while self._free and (batch := self._next()):
            self._free -= 1
            self._begin(self._work(batch))

    def _next(self) -> list[Job]:
        """The next batch: of the kind of work that has had least of the encoder, one input of each caller in turn."""
        for kind in sorted(self._waiting, key=self._usage.of):
            if batch := list(islice((job for job in self._waiting[kind] if job.wanted), self.rows)):
                return batch
        return []

    async def _work(self, batch: Sequence[Job]) -> None:
        started = time.monotonic()
        for job in batch:
            job.prefilled = started
        await self._encode(batch)
        self._usage.add(_kind(batch[0]), (time.monotonic() - started) * batch[0].weight)
        self._free += 1
        self._run()

    async def _encode(self, batch: Sequence[Job]) -> None:
        half = len(batch) // 2
        try:
            encodings = await self.loop.run_in_executor(self._threads, self._encodings, batch)
        except Exception as error:
            if half and not isinstance(error, ModelError):
                await self._encode(batch[:half])
                await self._encode(batch[half:])
            else:
                self._fail(batch, error)
        else:
            for job, encoding in zip(batch, encodings, strict=True):
                job.cut = encoding.cut
            self.finish_all(list(zip(batch, encodings, strict=True)), time.monotonic())

    def _encodings(self, batch: Sequence[Job]) -> list[Encoding]:
        """In a thread."""
        if queries := [job.content for job in batch if isinstance(job.content, Query)]:
            encodings = self.encoder.encode_queries(queries, route="direct")
        else:
            encodings = self.encoder.encode_items([job.content for job in batch if isinstance(job.content, Item)])
        if len(encodings) != len(batch):
            raise ModelError(f"the encoder returned {len(encodings)} encodings for {len(batch)} inputs; report it")
        return encodings


def _kind(job: Job) -> str:
    """What is encoded together: queries or items, of long work or not."""
    return f"{type(job.content).__name__} {job.patient}"
