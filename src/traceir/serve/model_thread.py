"""The model's thread: requests share prefills and write together, and join and leave as they come and go.

Each round prefills what has come in, at most one batch, and then writes for all rows that reason: as long as `PACE` allows beside
that prefill, and one token at least. So a query that bypasses waits for a prefill and a bounded time of writing, never for a
stranger's whole reasoning, and those who reason get a fixed share of a busy model.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

from traceir.batch import Layout
from traceir.decoding import DecodeBatch, Finished, keep_rows, merge_batches, trim
from traceir.encoder import Encoder
from traceir.items import Query, Route
from traceir.prompts import Role
from traceir.serve.fair import Rounds, Usage
from traceir.serve.jobs import FAILURES, PATIENT, Job, Progress, Worker

log = logging.getLogger(__name__)

PACE: Final = 0.5  # seconds of writing for each second of prefill while both are wanted
SHARED_S: Final = 0.03
"""Seconds that a prefill should take while there are several callers, of FEW_ROWS rows at least: one that comes waits so long."""
FEW_ROWS: Final = 4
PROGRESS_S: Final = 0.02  # seconds between two reports on a row that writes


@dataclass(slots=True, eq=False)
class _Input:
    """A job that is laid out: what the model reads, by which route, and when its waiters last heard of it."""

    job: Job
    route: Route
    layout: Layout
    probability: bool
    told: float = 0.0


class ModelThread(Worker):
    """Encodes jobs on the encoder's model, in a thread of its own. `writing` rows write together; those beyond give their cache
    back, wait, and are prefilled again. Equal to the encoder's own results up to floating-point rounding.
    """

    def __init__(self, encoder: Encoder, writing: int) -> None:
        super().__init__()
        self.encoder, self.writing, self.decoder = encoder, writing, encoder.decoder()
        self._own_rows = max(1, writing - writing // 4)  # that one caller may have written, so that others find some free
        self._arrived: Rounds[_Input] = Rounds()
        self._postponed: Rounds[_Input] = Rounds()
        self._company, self._usage = Usage(), Usage()
        self._rate = 0.0  # tokens a second of the last prefills
        self._wake, self._closing = threading.Condition(), False
        self._rows: dict[int, _Input] = {}  # by number: what is being prefilled or written, for the thread alone
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs, and its last batches did not all fail."""
        return self._thread.is_alive() and self._failures < FAILURES

    def route(self, role: Role, route: Route) -> Route:
        return route if self.encoder.model.writes(role) else "direct"

    def start(self, loop: asyncio.AbstractEventLoop, pool: ThreadPoolExecutor) -> None:
        super().start(loop, pool)
        self._thread.start()

    def take(self, job: Job) -> None:
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
        self._company.note(job.who)
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
                self.call(self.fail_all, [one.job for one in self._rows.values()], error)
                batches, self._rows = [], {}

    def _take(self, room: int, *, wait: bool) -> list[_Input] | None:
        """What has come in and is still wanted, at most one batch of one route; None once all is done and closed.

        What was postponed comes first, and alone, where there is room to write a good part of it.
        """
        most = min(self.encoder.batch_rows, self._own_rows)
        if room >= min(most, len(self._postponed)) and self._postponed:
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
        for one in waiting:
            if one.job.wanted:
                size = max(longest, len(one.layout))
                tokens = (len(taken) + 1) * size
                apart = few and bool(taken) and one.job.patient != taken[0].job.patient
                slow = few and len(taken) >= FEW_ROWS and tokens > self._rate * SHARED_S
                if taken and (apart or slow or one.route != taken[0].route or tokens > self.encoder.token_budget):
                    later.append(one)
                else:
                    longest = size
                    taken.append(one)
            if len(taken) >= most or len(later) > (FEW_ROWS if few else self.encoder.batch_rows):
                break
        for one in reversed(later):
            waiting.put_back(one.job.who, one)
        return taken

    def _prefill_or_split(self, inputs: dict[int, _Input]) -> list[DecodeBatch]:
        """Prefills one batch; where that fails, each input alone, so that a bad one fails by itself."""
        if not inputs:
            return []
        started = time.monotonic()
        try:
            batches = self._prefill(inputs, started)
        except Exception as error:  # of torch or a device; the input at fault alone shall fail
            left = {number: one for number, one in inputs.items() if number in self._rows}
            if len(left) > 1:
                return [batch for number, one in left.items() for batch in self._prefill_or_split({number: one})]
            log.exception("an input failed")
            self.call(self.fail_all, [self._rows.pop(number).job for number in left], error)
            return []
        seconds = time.monotonic() - started
        tokens = len(inputs) * max(len(one.layout) for one in inputs.values())
        self._rate += 0.2 * (tokens / max(seconds, 1e-6) - self._rate)
        self._charge([one.job for one in inputs.values()], seconds)
        return batches

    def _prefill(self, inputs: dict[int, _Input], now: float) -> list[DecodeBatch]:
        """Prefills one batch: what bypasses is handed out, what writes is given back."""
        for one in inputs.values():
            one.job.prefilled = now
        layouts = [one.layout for one in inputs.values()]
        route = next(iter(inputs.values())).route
        if route == "direct":
            probability = [one.probability for one in inputs.values()]
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
        """Rows beyond those that may write give their cache back and wait for their turn; memory is bounded so."""
        fresh = {row.number for row in batch.rows}
        by = Counter(one.job.who for number, one in self._rows.items() if number not in fresh)
        kept: list[int] = []
        for place, row in enumerate(batch.rows):
            one = self._rows[row.number]
            if by.total() < self.writing and (not one.job.who or by[one.job.who] < self._own_rows):
                by[one.job.who] += 1
                kept.append(place)
            else:
                del self._rows[row.number]
                one.route = "reason"  # known now, and the prompt is that of the automatic route
                self._postponed.put(one.job.who, one)
        if len(kept) < len(batch.rows):
            keep_rows(batch, kept)

    def _write(self, batches: list[DecodeBatch], until: float) -> list[DecodeBatch]:
        """Writes one token for every row, and more until a moment of the clock; the rows that are not done.

        Rows of long work are a batch of their own, which waits while the callers of the other have had less of the model.
        """
        batches = self._joined(batches)
        while batches:
            batch = min(batches, key=lambda one: min(map(self._usage.of, self._callers(one))))
            started, jobs = time.monotonic(), [self._rows[row.number].job for row in batch.rows]
            self._hand_out(self.decoder.step(batch))
            now = time.monotonic()
            self._charge(jobs, now - started)
            self._tell(batch, now)
            batches = [one for one in batches if one.rows]
            if now >= until and not self._goes_on(batches):
                break
        return batches

    def _callers(self, batch: DecodeBatch) -> set[str]:
        return {self._rows[row.number].job.who for row in batch.rows}

    def _goes_on(self, batches: Sequence[DecodeBatch]) -> bool:
        """Whether some who write have had less of the model than all who wait for a prefill."""
        with self._wake:
            waiting = self._arrived.callers() if self._company.crowded else []
        having = {who for batch in batches for who in self._callers(batch)}
        return bool(waiting and having) and min(map(self._usage.of, having)) < min(map(self._usage.of, waiting))

    def _joined(self, batches: list[DecodeBatch]) -> list[DecodeBatch]:
        """The rows that write next, long work as one batch and the others as one; those whose waiters have gone leave."""
        joining: dict[bool, list[DecodeBatch]] = {}
        for batch in batches:
            live = [place for place, row in enumerate(batch.rows) if self._rows[row.number].job.wanted]
            for place in set(range(len(batch.rows))) - set(live):
                del self._rows[batch.rows[place].number]
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
            self._usage.add(job.who, seconds / len(jobs) * (PATIENT if job.patient else 1.0))

    def _hand_out(self, finished: Finished) -> None:
        if ended := [(self._rows.pop(number).job, encoding) for number, encoding in finished if number in self._rows]:
            self.call(self.finish_all, ended, time.monotonic())

    def _tell(self, batch: DecodeBatch, now: float) -> None:
        """Tells those who listen what their rows have written so far."""
        for row in batch.rows:
            one = self._rows[row.number]
            if one.job.listeners and now - one.told >= PROGRESS_S:
                one.told = now
                self.call(one.job.tell, Progress("reason", row.probability, self.decoder.text_of(row)))
