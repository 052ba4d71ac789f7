"""Between requests and the model: admission, one encoding for equal inputs, a cache, deadlines and cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from traceir.batch import Layout
from traceir.decoding import DecodeBatch, Finished, keep_rows, merge_batches, trim
from traceir.encoder import Encoder
from traceir.engines.sglang import SGLangEncoder
from traceir.errors import InputError
from traceir.items import Item, Query, Route
from traceir.prompts import Role
from traceir.retrieval.search import EncoderLike
from traceir.serve.fair import FairExecutor, Places, Rounds, Usage, caller, patient
from traceir.serve.jobs import FAILURES, BatchWorker, BusyError, EngineWorker, Job, LateError, Listener, Progress, Served, Worker

log = logging.getLogger(__name__)
PACE: Final = 0.5  # seconds of writing for each second of prefill while both are wanted
SHARED_S: Final = 0.03  # seconds of a prefill while there are several callers, of FEW_ROWS rows at least
FEW_ROWS: Final = 4
PROGRESS_S: Final = 0.02  # seconds between two reports on a row that writes
Key = tuple[str, str, str, str, str]  # caller, tenant, role, route and hash of an input: the same work for the same people


class Scheduler:
    """Encodes queries and items from any number of tasks of one event loop, by a model in this process or by an engine.

    `capacity` bounds the inputs that are under way, and each caller has a share of it (`fair.Places`); beyond it `BusyError` is
    raised at once, or the input waits where the task is `fair.patient`. `writing` rows write together, where the model is in this
    process. `remembered` encodings are kept by content. Equal to the encoder's own results up to floating-point rounding. Start
    it within the loop, and `close` it there: what is under way ends, nothing new is taken.
    """

    loop: asyncio.AbstractEventLoop
    _worker: Worker

    def __init__(self, encoder: EncoderLike, *, capacity: int = 512, writing: int = 64, remembered: int = 8192) -> None:
        for name, value, least in (("capacity", capacity, 1), ("writing", writing, 1), ("remembered", remembered, 0)):
            if value < least:
                raise InputError(f"{name} is {value}; give at least {least}")
        self.encoder, self.capacity, self.writing, self.remembered = encoder, capacity, writing, remembered
        self.pool = FairExecutor(2, "layout")
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
        if isinstance(self.encoder, Encoder):
            self._worker = ModelThread(self.encoder, self.writing, self.pool)
        elif isinstance(self.encoder, SGLangEncoder):
            self._worker = EngineWorker(self.encoder, self.pool)
        else:
            self._worker = BatchWorker(self.encoder, self.pool)

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
        """Takes a place of the caller's share, which a job of its own then keeps to its end."""
        who, own = caller.get(), None
        if not self._closing and patient.get():
            await self._places.wait(who)
        elif self._closing or not self._places.take(who):
            wait = max(1.0, round(len(self._jobs) * self._seconds_each, 1))
            raise BusyError(self._places.held, wait, of_caller=self._places.of(who))
        try:
            content_hash = await self.loop.run_in_executor(self.pool, content.content_hash)
            key: Key = who, tenant or "", role, route, content_hash
            if (known := self._caches.get(who, OrderedDict()).get(key)) is not None:
                self._caches[who].move_to_end(key)
                return replace(known, queue=0.0, encode=0.0, cached=True)
            job = self._jobs.get(key)
            if job is None or not job.wanted:
                job = own = self._begin(key, content, route)
        finally:
            if own is None:
                self._places.give(who)
        return await self._wait(job, listener, seconds)

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
        """Gives the job's place back, remembers the encoding, and how long jobs take. Where too many are remembered, the caller
        with most loses its oldest, so none can push out another's."""
        self._places.give(job.who)
        if self._jobs.get(key) is job:
            del self._jobs[key]
        if done.cancelled() or done.exception() is not None:
            return
        self._ends.append(time.monotonic())
        if len(self._ends) >= 8:
            self._seconds_each = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        if self.remembered:
            self._caches.setdefault(job.who, OrderedDict())[key] = done.result()
        if sum(map(len, self._caches.values())) > self.remembered:
            most = max(self._caches, key=lambda who: len(self._caches[who]))
            self._caches[most].popitem(last=False)
            if not self._caches[most]:
                del self._caches[most]


@dataclass(slots=True, eq=False)
class _Input:
    """A job that is laid out: what the model reads, by which route, and when its waiters last heard of it."""

    job: Job
    route: Route
    layout: Layout
    probability: bool
    reported: float = 0.0


class ModelThread(Worker):
    """Encodes jobs on the encoder's model, in a thread of its own: requests share prefills and write together, and join and leave
    as they come and go. Equal to the encoder's own results up to floating-point rounding.

    Each round prefills what has come in, at most one batch, and then writes for all rows that reason: as long as `PACE` allows
    beside that prefill, and one token at least. So a query that bypasses waits for a prefill and a bounded time of writing, never
    for the whole reasoning of others, and queries that reason get a fixed share of a busy model. `writing` rows write together;
    those beyond give their cache back, wait, and are prefilled again.
    """

    def __init__(self, encoder: Encoder, writing: int, pool: ThreadPoolExecutor) -> None:
        super().__init__(pool)
        self.encoder, self.writing, self.decoder = encoder, writing, encoder.decoder()
        self._own_rows = max(1, writing - writing // 4)  # that one caller may have written, so that others find some free
        self._arrived: Rounds[_Input] = Rounds()
        self._postponed: Rounds[_Input] = Rounds()
        self._company, self._usage = Usage(), Usage()
        self._rate = 0.0  # tokens a second of the last prefills
        self._wake, self._closing = threading.Condition(), False
        self._rows: dict[int, _Input] = {}  # by number: what is being prefilled or written, for the thread alone
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs, and its last batches did not all fail."""
        return self._thread.is_alive() and self._failures < FAILURES

    def route(self, role: Role, route: Route) -> Route:
        return route if self.encoder.model.writes(role) else "direct"

    def take(self, job: Job) -> None:
        self._company.note(job.who)
        self.loop.run_in_executor(self.pool, self._lay_out, job).add_done_callback(partial(self._laid_out, job))

    async def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _lay_out(self, job: Job) -> _Input:
        model, direct = self.encoder.model, job.route == "direct"
        prompt = model.prompt(job.content, direct=direct)
        layout = model.processor.forced(prompt) if direct else model.processor.lay_out(prompt)
        job.prompt_tokens, job.cut = len(layout), layout.cut
        return _Input(job, job.route, layout, isinstance(job.content, Query) and not prompt.closed)

    def _laid_out(self, job: Job, done: asyncio.Future[_Input]) -> None:
        """In the event loop, so that the thread wakes to several inputs at a time."""
        if (error := done.exception()) is not None:
            self.fail_all([job], error, own=False)
            return
        with self._wake:
            self._arrived.put(job.who, done.result())
            self._wake.notify()

    # In the thread

    def _work(self) -> None:
        numbers = itertools.count()
        batches: list[DecodeBatch] = []
        while (taken := self._take(self.writing - len(self._rows), wait=not self._rows)) is not None:
            fresh = dict(zip(numbers, taken, strict=False))
            self._rows |= fresh
            started = time.monotonic()
            batches += self._prefill_or_split(fresh)
            now = time.monotonic()
            try:
                batches = self._write(batches, now + PACE * (now - started))
            except Exception as error:  # the thread goes on, whatever became of these rows
                log.exception("%d inputs that were being written failed", len(self._rows))
                self.call(self.fail_all, [row.job for row in self._rows.values()], error)
                batches, self._rows = [], {}

    def _take(self, free: int, *, wait: bool) -> list[_Input] | None:
        """What has come in and is still wanted, at most one batch of one route; None once all is done and closed.

        Postponed inputs come first, and alone, once most of a batch of them may write.
        """
        most = min(self.encoder.batch_rows, self._own_rows)
        if free >= min(most, len(self._postponed)) and self._postponed:
            return self._fitting(self._postponed, most)
        with self._wake:
            while wait and not self._arrived and not self._closing:
                self._wake.wait(0.5)
            return None if wait and not self._arrived else self._fitting(self._arrived, self.encoder.batch_rows)

    def _fitting(self, waiting: Rounds[_Input], most: int) -> list[_Input]:
        """Those that come next and are wanted, one of each caller in turn, of one route, as many as a batch holds."""
        taken: list[_Input] = []
        later: list[_Input] = []
        longest, few = 0, self._company.crowded
        if few and waiting:
            waiting.first(min(waiting.callers(), key=self._usage.of))
        for entry in waiting:
            if entry.job.wanted:
                size = max(longest, len(entry.layout))
                tokens = (len(taken) + 1) * size
                apart = few and bool(taken) and entry.job.patient != taken[0].job.patient
                slow = few and len(taken) >= FEW_ROWS and tokens > self._rate * SHARED_S
                if taken and (apart or slow or entry.route != taken[0].route or tokens > self.encoder.token_budget):
                    later.append(entry)
                else:
                    longest = size
                    taken.append(entry)
            if len(taken) >= most or len(later) > (FEW_ROWS if few else self.encoder.batch_rows):
                break
        for entry in reversed(later):
            waiting.put_back(entry.job.who, entry)
        return taken

    def _prefill_or_split(self, inputs: dict[int, _Input]) -> list[DecodeBatch]:
        """Prefills one batch; where that fails, each input alone, so that a bad one fails by itself."""
        if not inputs:
            return []
        started = time.monotonic()
        try:
            batches = self._prefill(inputs, started)
        except Exception as error:  # of torch or a device; the input at fault alone shall fail
            left = {number: entry for number, entry in inputs.items() if number in self._rows}
            if len(left) > 1:
                return [batch for number, entry in left.items() for batch in self._prefill_or_split({number: entry})]
            log.exception("an input failed")
            self.call(self.fail_all, [self._rows.pop(number).job for number in left], error)
            return []
        seconds = time.monotonic() - started
        tokens = len(inputs) * max(len(entry.layout) for entry in inputs.values())
        self._rate += 0.2 * (tokens / max(seconds, 1e-6) - self._rate)
        self._charge([entry.job for entry in inputs.values()], seconds)
        return batches

    def _prefill(self, inputs: dict[int, _Input], now: float) -> list[DecodeBatch]:
        """Prefills one batch: what bypasses is handed out, what writes is given back."""
        for entry in inputs.values():
            entry.job.prefilled = now
        layouts = [entry.layout for entry in inputs.values()]
        route = next(iter(inputs.values())).route
        if route == "direct":
            probability = [entry.probability for entry in inputs.values()]
            self._hand_out(self.decoder.prefill_direct(list(inputs), layouts, probability=probability))
            return []
        finished, batch = self.decoder.prefill(list(inputs), layouts, route)
        self._hand_out(finished)
        if batch is None:
            return []
        for row in batch.rows:
            if inputs[row.number].job.listeners:
                self.call(inputs[row.number].job.tell, Progress("reason", row.probability, ""))
        if self.encoder.model.settings.pooling_position != "at_token":  # there, rows that bypass are among them
            self._postpone(batch)
        return [batch] if batch.rows else []

    def _postpone(self, batch: DecodeBatch) -> None:
        """Rows beyond those that may write give their cache back and wait, which bounds memory."""
        fresh = {row.number for row in batch.rows}
        by = Counter(entry.job.who for number, entry in self._rows.items() if number not in fresh)
        kept: list[int] = []
        for position, row in enumerate(batch.rows):
            entry = self._rows[row.number]
            if by.total() < self.writing and (not entry.job.who or by[entry.job.who] < self._own_rows):
                by[entry.job.who] += 1
                kept.append(position)
            else:
                del self._rows[row.number]
                entry.route = "reason"  # known now, and the prompt is that of the automatic route
                self._postponed.put(entry.job.who, entry)
        if len(kept) < len(batch.rows):
            keep_rows(batch, kept)

    def _write(self, batches: list[DecodeBatch], until: float) -> list[DecodeBatch]:
        """Writes one token for every row, and more until a moment of the clock; the rows that are not done.

        Rows of long work are a batch of their own, which waits while the callers of the other have had less of the model.
        """
        batches = self._joined(batches)
        while batches:
            batch = min(batches, key=lambda batch: self._least_used([batch]))
            started, jobs = time.monotonic(), [self._rows[row.number].job for row in batch.rows]
            self._hand_out(self.decoder.step(batch))
            now = time.monotonic()
            self._charge(jobs, now - started)
            for row in batch.rows:
                entry = self._rows[row.number]
                if entry.job.listeners and now - entry.reported >= PROGRESS_S:
                    entry.reported = now
                    self.call(entry.job.tell, Progress("reason", row.probability, self.decoder.text_of(row)))
            batches = [batch for batch in batches if batch.rows]
            if now >= until and not self._goes_on(batches):
                break
        return batches

    def _least_used(self, batches: Sequence[DecodeBatch]) -> float:
        """The model's time that the caller who has used least has had."""
        return min(map(self._usage.of, {self._rows[row.number].job.who for batch in batches for row in batch.rows}))

    def _goes_on(self, batches: Sequence[DecodeBatch]) -> bool:
        """Whether a caller who writes has had less of the model's time than all who wait for a prefill."""
        with self._wake:
            waiting = self._arrived.callers() if self._company.crowded else []
        return bool(waiting and batches) and self._least_used(batches) < min(map(self._usage.of, waiting))

    def _joined(self, batches: list[DecodeBatch]) -> list[DecodeBatch]:
        """The rows that write next, long work as one batch and the others as one; those whose waiters have gone leave."""
        joining: dict[bool, list[DecodeBatch]] = {}
        for batch in batches:
            live = [position for position, row in enumerate(batch.rows) if self._rows[row.number].job.wanted]
            for position in set(range(len(batch.rows))) - set(live):
                del self._rows[batch.rows[position].number]
            if len(live) < len(batch.rows):
                keep_rows(batch, live)
            if live:
                joining.setdefault(self._rows[batch.rows[0].number].job.patient, []).append(batch)
        joined = [merge_batches(parts) for parts in joining.values()]
        for batch in joined:
            trim(batch)
        return joined

    def _charge(self, jobs: Sequence[Job], seconds: float) -> None:
        for job in jobs:
            self._usage.add(job.who, seconds / len(jobs) * job.weight)

    def _hand_out(self, finished: Finished) -> None:
        if ended := [(self._rows.pop(number).job, encoding) for number, encoding in finished if number in self._rows]:
            self.call(self.finish_all, ended, time.monotonic())
