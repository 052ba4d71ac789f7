"""Dynamic batching: requests share prefills and write together, and join and leave as they come and go.

One thread owns the model. Each of its turns prefills what has come in, at most one batch, and then writes for all rows that
reason: as long as `PACE` allows beside that prefill, and one token at least. So a query that bypasses waits for a prefill and a
bounded time of writing, never for a stranger's whole reasoning, and those who reason get a fixed share of a busy model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Final

from traceir.batch import Layout
from traceir.decoding import Decoder, Finished, Wave, keep_rows, merge_waves, trim
from traceir.encoder import Encoder
from traceir.errors import InputError, TraceError
from traceir.items import ROUTES, Encoding, Item, Query, Route

log = logging.getLogger(__name__)

FAILURES: Final = 8
"""Batches that fail one after the other before the server no longer calls itself ready."""
PACE: Final = 0.5
"""Seconds of writing for each second of prefill while both are wanted."""
PROGRESS_S: Final = 0.02
"""Seconds between two reports on a row that writes."""


class BusyError(TraceError):
    """Too many requests are waiting; `retry_after_s` says when to come back."""

    def __init__(self, waiting: int, retry_after_s: float) -> None:
        super().__init__(f"{waiting} inputs are waiting, which is all that this server takes; try again in {retry_after_s:g} s")
        self.retry_after_s = retry_after_s


class LateError(TraceError):
    """The deadline of a request has passed."""


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
    """One input on its way; the same input asked for twice at a time is one job with two waiters."""

    key: tuple[str, str, str]
    route: Route
    arrived: float
    done: asyncio.Future[Served]
    layout: Layout | None = None
    probability: bool = False
    waiters: int = 0
    listeners: list[Listener] = field(default_factory=list)
    prefilled: float = 0.0
    told: float = 0.0


class Scheduler:
    """Encodes queries and items from any number of tasks of one event loop.

    `capacity` bounds the inputs that are under way; beyond it `BusyError` is raised at once. `writing` rows write together; those
    beyond give their cache back, wait, and are prefilled again. `remembered` encodings are kept by content. Equal to the
    encoder's own results up to floating-point rounding. Start it within the loop, and `close` it there: what is under way ends,
    nothing new is taken.
    """

    def __init__(self, encoder: Encoder, *, capacity: int = 512, writing: int = 64, remembered: int = 8192) -> None:
        for name, value, least in (("capacity", capacity, 1), ("writing", writing, 1), ("remembered", remembered, 0)):
            if value < least:
                raise InputError(f"{name} is {value}; give at least {least}")
        self.encoder, self.capacity, self.writing, self.remembered = encoder, capacity, writing, remembered
        self.hits = self.misses = 0
        self._decoder: Decoder = encoder.decoder()
        self._cache: OrderedDict[tuple[str, str, str], Served] = OrderedDict()
        self._jobs: dict[tuple[str, str, str], Job] = {}
        self._arrived: deque[Job] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._busy_since = self._answered = self._rate = 0.0
        self._postponed: deque[Job] = deque()
        self._failures = 0
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._pool = ThreadPoolExecutor(2, "layout")

    @property
    def under_way(self) -> int:
        """Inputs that have come and are not encoded yet."""
        return len(self._jobs)

    @property
    def full(self) -> bool:
        """Whether one more input would be refused."""
        return len(self._jobs) >= self.capacity

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the model's thread runs, and its last batches did not all fail."""
        return self._thread.is_alive() and self._failures < FAILURES

    async def close(self, seconds: float | None = None) -> None:
        """Takes nothing new, lets what is under way end, and frees the thread; what is not done in so many seconds is dropped."""
        self._closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._jobs:
                    await asyncio.wait([job.done for job in self._jobs.values()])
                    await asyncio.sleep(0)
        for job in list(self._jobs.values()):
            self._end(job, BusyError(len(self._jobs), 1.0))
        with self._wake:
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)
        self._pool.shutdown()

    async def encode_query(
        self, query: Query, route: Route = "auto", *, listener: Listener | None = None, seconds: float | None = None
    ) -> Served:
        """A query by a route. `listener` is told of its progress, in the event loop; `seconds` is its deadline.

        Raises BusyError, LateError, InputError. Cancelling ends the work, unless others wait for the same query.
        """
        if route not in ROUTES:
            raise InputError(f"route {route!r} is unknown; choose one of {', '.join(ROUTES)}")
        taken: Route = route if self.encoder.model.writes("query") else "direct"
        return await self._encode(query, "query", taken, listener, seconds)

    async def encode_item(self, item: Item, *, seconds: float | None = None) -> Served:
        """A candidate: one prefill, never any reasoning, unless a profile lets candidates write."""
        route: Route = "auto" if self.encoder.model.writes("candidate") else "direct"
        return await self._encode(item, "item", route, None, seconds)

    async def _encode(
        self, content: Query | Item, role: str, route: Route, listener: Listener | None, seconds: float | None
    ) -> Served:
        if self._closing:
            raise BusyError(len(self._jobs), 1.0)
        key = role, route, await self._loop.run_in_executor(self._pool, content.content_hash)
        if (known := self._remembered(key)) is not None:
            return replace(known, queue=0.0, encode=0.0, cached=True)
        job = self._jobs.get(key)
        if job is None:
            job = self._admit(key, route)
            lay_out = asyncio.ensure_future(self._prepare(job, content))
            lay_out.add_done_callback(lambda done: self._laid_out(job, done))
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

    def _admit(self, key: tuple[str, str, str], route: Route) -> Job:
        if len(self._jobs) >= self.capacity or self._closing:
            raise BusyError(len(self._jobs), self._wait_s())
        if not self._jobs:
            self._busy_since, self._answered = time.monotonic(), 0.0
        self.misses += 1
        job = self._jobs[key] = Job(key, route, time.monotonic(), self._loop.create_future())
        return job

    def _wait_s(self) -> float:
        """Seconds until what is under way should be done, by the answers of the last minute; at least 1."""
        if self._answered >= 8:
            self._rate = self._answered / max(time.monotonic() - self._busy_since, 0.1)
        return max(1.0, round(len(self._jobs) / self._rate, 1)) if self._rate else 1.0

    async def _prepare(self, job: Job, content: Query | Item) -> None:
        job.layout, job.probability = await self._loop.run_in_executor(self._pool, self._lay_out, content, job.route)

    def _lay_out(self, content: Query | Item, route: Route) -> tuple[Layout, bool]:
        processor = self.encoder.model.processor
        prompt = self.encoder.model.prompt(content, direct=route == "direct")
        layout = processor.forced(prompt) if route == "direct" else processor.lay_out(prompt)
        return layout, isinstance(content, Query) and not prompt.closed

    def _laid_out(self, job: Job, done: asyncio.Task[None]) -> None:
        if job.done.done():
            return
        if (error := done.exception()) is not None:
            self._end(job, error)
            return
        with self._wake:
            self._arrived.append(job)
            self._wake.notify()

    def _remembered(self, key: tuple[str, str, str]) -> Served | None:
        known = self._cache.get(key)
        if known is not None:
            self.hits += 1
            self._cache.move_to_end(key)
        return known

    def _end(self, job: Job, result: Served | BaseException) -> None:
        """In the event loop: tells all waiters, and remembers the encoding."""
        if self._jobs.get(job.key) is job:
            del self._jobs[job.key]
        if isinstance(result, Served) and self.remembered:
            self._cache[job.key] = result
            while len(self._cache) > self.remembered:
                self._cache.popitem(last=False)
        if job.done.done():
            return
        if isinstance(result, BaseException):
            job.done.set_exception(result)
            job.done.exception()  # seen, also where every waiter has gone
        else:
            job.done.set_result(result)

    def _forget(self, job: Job) -> None:
        """Nobody waits any more: the model's thread drops the row at its next turn."""
        if self._jobs.get(job.key) is job:
            del self._jobs[job.key]
        job.done.cancel()

    # In the model's thread

    def _work(self) -> None:
        writing: dict[int, Job] = {}
        wave: Wave | None = None
        numbers = 0
        while (jobs := self._take(self.writing - len(writing), wait=not writing)) is not None:
            numbered = dict(enumerate(jobs, numbers))
            numbers += len(jobs)
            writing |= numbered
            started = time.monotonic()
            fresh = self._prefilled(numbered, writing)
            now = time.monotonic()
            try:
                wave = self._write([*([wave] if wave else []), *fresh], writing, now + PACE * (now - started))
            except Exception as error:
                log.exception("%d inputs that were being written failed", len(writing))
                self._failures += 1
                self._call(self._fail, list(writing.values()), error)
                wave, writing = None, {}

    def _take(self, room: int, *, wait: bool) -> list[Job] | None:
        """What has come in and is still wanted, at most one batch of one route; None once all is done and closed.

        What was postponed comes first, and alone, where there is room to write a good part of it.
        """
        most = min(self.encoder.batch_rows, self.writing)
        if room >= min(most, len(self._postponed)) and self._postponed:
            return self._fitting(self._postponed, most)
        with self._wake:
            while wait and not self._arrived and not (self._closing and not self._jobs):
                self._wake.wait(0.5)
            if wait and not self._arrived:
                return None
            return self._fitting(self._arrived, self.encoder.batch_rows)

    def _fitting(self, waiting: deque[Job], most: int) -> list[Job]:
        """The first of those that wait and are wanted, of one route, as many as a batch holds; the others keep their places."""
        taken: list[Job] = []
        later: list[Job] = []
        longest = 0
        while waiting and len(taken) < most and len(later) <= self.encoder.batch_rows:
            job = waiting.popleft()
            if job.done.done() or job.layout is None:
                continue
            size = max(longest, len(job.layout))
            if taken and (job.route != taken[0].route or (len(taken) + 1) * size > self.encoder.token_budget):
                later.append(job)
                continue
            longest = size
            taken.append(job)
        waiting.extendleft(reversed(later))
        return taken

    def _prefilled(self, jobs: dict[int, Job], writing: dict[int, Job]) -> list[Wave]:
        """Prefills one batch; where that fails, each input alone, so that a bad one fails by itself."""
        try:
            return self._prefill(jobs, writing)
        except Exception as error:
            left = {number: job for number, job in jobs.items() if number in writing}
            if len(left) > 1:
                return [wave for number, job in left.items() for wave in self._prefilled({number: job}, writing)]
            log.exception("an input failed")
            self._failures += 1
            self._call(self._fail, [writing.pop(number) for number in left], error)
            return []

    def _prefill(self, jobs: dict[int, Job], writing: dict[int, Job]) -> list[Wave]:
        """Prefills one batch: what bypasses is handed out, what writes is given back."""
        if not jobs:
            return []
        now = time.monotonic()
        for job in jobs.values():
            job.prefilled = now
        layouts = [job.layout for job in jobs.values() if job.layout is not None]
        route = next(iter(jobs.values())).route
        if route == "direct":
            probability = [job.probability for job in jobs.values()]
            self._hand_out(self._decoder.prefill_direct(list(jobs), layouts, probability=probability), writing)
            return []
        finished, wave = self._decoder.prefill(list(jobs), layouts, route)
        self._hand_out(finished, writing)
        for row in wave.rows if wave else ():
            if listeners := jobs[row.number].listeners:
                self._call(_tell_all, list(listeners), Progress("reason", row.probability, ""))
        if wave is not None:
            self._postpone(wave, jobs, writing)
        return [wave] if wave is not None and wave.rows else []

    def _postpone(self, wave: Wave, jobs: dict[int, Job], writing: dict[int, Job]) -> None:
        """Rows beyond those that may write give their cache back and wait for their turn; memory is bounded so."""
        if self.encoder.model.settings.read_out == "at_token":
            return  # rows that bypass are among them
        room = max(0, self.writing - (len(writing) - len(wave.rows)))
        for row in wave.rows[room:]:
            job = writing.pop(row.number)
            job.route = "reason"  # known now, and the prompt is that of the automatic route
            self._postponed.append(job)
        if room < len(wave.rows):
            keep_rows(wave, range(room))

    def _write(self, waves: list[Wave], writing: dict[int, Job], until: float) -> Wave | None:
        """Writes one token for every row, and more until a moment of the clock; the rows that are not done."""
        wave = self._joined(waves, writing)
        while wave is not None:
            self._hand_out(self._decoder.step(wave), writing)
            self._tell(wave, writing)
            if not wave.rows:
                return None
            if time.monotonic() >= until:
                break
        return wave

    def _hand_out(self, finished: Finished, writing: dict[int, Job]) -> None:
        if ended := [(writing.pop(number), encoding) for number, encoding in finished if number in writing]:
            self._failures = 0
            self._call(self._deliver, ended, time.monotonic())

    def _joined(self, waves: list[Wave], writing: dict[int, Job]) -> Wave | None:
        """The rows that write next, as one wave: those whose waiters have gone leave."""
        for one in waves:
            live = [place for place, row in enumerate(one.rows) if not writing[row.number].done.cancelled()]
            if len(live) < len(one.rows):
                for place in set(range(len(one.rows))) - set(live):
                    del writing[one.rows[place].number]
                keep_rows(one, live)
        joining = [one for one in waves if one.rows]
        if not joining:
            return None
        joined = merge_waves(joining)
        trim(joined)
        return joined

    def _tell(self, wave: Wave, writing: dict[int, Job]) -> None:
        """Tells those who listen what their rows have written so far."""
        now = time.monotonic()
        for row in wave.rows:
            job = writing[row.number]
            if job.listeners and now - job.told >= PROGRESS_S:
                job.told = now
                self._call(_tell_all, list(job.listeners), Progress("reason", row.probability, self._decoder.text_of(row)))

    def _deliver(self, finished: Sequence[tuple[Job, Encoding]], now: float) -> None:
        self._answered += len(finished)
        if now - self._busy_since > 60:
            self._busy_since, self._answered = (now + self._busy_since) / 2, self._answered / 2
        for job, encoding in finished:
            tokens, cut = (len(job.layout), job.layout.cut) if job.layout is not None else (0, 0)
            self._end(job, Served(encoding, job.prefilled - job.arrived, now - job.prefilled, tokens, cut))

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        for job in jobs:
            self._end(job, error)

    def _call(self, what: Callable[..., None], *told: object) -> None:
        """Runs something in the event loop; where that has ended there is nobody left to tell."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(what, *told)


def _tell_all(listeners: Sequence[Listener], progress: Progress) -> None:
    for listener in listeners:
        listener(progress)
