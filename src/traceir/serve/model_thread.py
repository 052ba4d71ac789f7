"""The model's thread: requests share prefills and write together, and join and leave as they come and go.

Each of its turns prefills what has come in, at most one batch, and then writes for all rows that reason: as long as `PACE` allows
beside that prefill, and one token at least. So a query that bypasses waits for a prefill and a bounded time of writing, never for
a stranger's whole reasoning, and those who reason get a fixed share of a busy model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from traceir.batch import Layout
from traceir.decoding import DecodeBatch, Decoder, Finished, keep_rows, merge_batches, trim
from traceir.encoder import Encoder
from traceir.items import Item, Query, Route
from traceir.prompts import Role
from traceir.serve.fair import Company, Rounds, Usage
from traceir.serve.jobs import FAILURES, Desk, Job, Progress, tell_all

log = logging.getLogger(__name__)

PACE: Final = 0.5
"""Seconds of writing for each second of prefill while both are wanted."""
SHARED_S: Final = 0.03
"""Seconds that a prefill should take while there are several callers, of FEW_ROWS rows at least: one that comes waits so long."""
FEW_ROWS: Final = 4
PATIENT: Final = 4.0
"""How many times the time of long work counts, so that it has the smaller part of a model that others want too."""
PROGRESS_S: Final = 0.02
"""Seconds between two reports on a row that writes."""


@dataclass(slots=True, eq=False)
class _Input:
    """A job that is laid out: what the model reads, by which route, and when its waiters last heard of it."""

    job: Job
    route: Route
    layout: Layout
    probability: bool
    told: float = 0.0

    @property
    def wanted(self) -> bool:
        return not self.job.done.done()


class ModelThread:
    """Encodes jobs on the encoder's model, in a thread of its own. `writing` rows write together; those beyond give their cache
    back, wait, and are prefilled again. Equal to the encoder's own results up to floating-point rounding.
    """

    def __init__(self, encoder: Encoder, writing: int) -> None:
        self.encoder, self.writing = encoder, writing
        self.decoder: Decoder = encoder.decoder()
        self._arrived: Rounds[_Input] = Rounds()
        self._postponed: Rounds[_Input] = Rounds()
        self._company = Company()
        self._usage = Usage()
        self._rate = 0.0
        self._wake = threading.Condition()
        self._closing = False
        self._failures = 0
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs, and its last batches did not all fail."""
        return self._thread.is_alive() and self._failures < FAILURES

    def route(self, role: Role, route: Route) -> Route:
        return route if self.encoder.model.writes(role) else "direct"

    def start(self, desk: Desk) -> None:
        self._desk = desk
        self._thread.start()

    def take(self, job: Job, content: Query | Item) -> None:
        lay_out = self._desk.loop.run_in_executor(self._desk.pool, self._lay_out, job, content)
        lay_out.add_done_callback(partial(self._laid_out, job))

    async def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _lay_out(self, job: Job, content: Query | Item) -> _Input:
        processor = self.encoder.model.processor
        prompt = self.encoder.model.prompt(content, direct=job.route == "direct")
        layout = processor.forced(prompt) if job.route == "direct" else processor.lay_out(prompt)
        job.prompt_tokens, job.cut = len(layout), layout.cut
        return _Input(job, job.route, layout, isinstance(content, Query) and not prompt.closed)

    def _laid_out(self, job: Job, done: asyncio.Future[_Input]) -> None:
        self._company.note(job.who)
        if (error := done.exception()) is not None:
            self._desk.fail([job], error)
            return
        with self._wake:
            self._arrived.put(job.who, done.result())
            self._wake.notify()

    # In the thread

    def _work(self) -> None:
        writing: dict[int, _Input] = {}
        waves: list[DecodeBatch] = []
        numbers = 0
        while (taken := self._take(self.writing - len(writing), wait=not writing)) is not None:
            inputs = dict(enumerate(taken, numbers))
            numbers += len(inputs)
            writing |= inputs
            started = time.monotonic()
            fresh = self._prefilled(inputs, writing)
            now = time.monotonic()
            try:
                waves = self._write([*waves, *fresh], writing, now + PACE * (now - started))
            except Exception as error:
                log.exception("%d inputs that were being written failed", len(writing))
                self._failures += 1
                self._call(self._desk.fail, [one.job for one in writing.values()], error)
                waves, writing = [], {}

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
            if wait and not self._arrived:
                return None
            return self._fitting(self._arrived, self.encoder.batch_rows)

    @property
    def _own_rows(self) -> int:
        """Rows that one caller may have written at a time, so that another's always find some free."""
        return max(1, self.writing - self.writing // 4)

    def _fitting(self, waiting: Rounds[_Input], most: int) -> list[_Input]:
        """Those that come next and are wanted, one of each caller in turn, of one route, as many as a batch holds."""
        taken: list[_Input] = []
        later: list[_Input] = []
        longest, few = 0, self._company.crowded
        if few and waiting:
            waiting.first(min(waiting.callers(), key=self._usage.of))
        for one in waiting:
            if one.wanted:
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

    def _prefilled(self, inputs: dict[int, _Input], writing: dict[int, _Input]) -> list[DecodeBatch]:
        """Prefills one batch; where that fails, each input alone, so that a bad one fails by itself."""
        started = time.monotonic()
        try:
            fresh = self._prefill(inputs, writing)
            if inputs:
                seconds = time.monotonic() - started
                tokens = len(inputs) * max(len(one.layout) for one in inputs.values())
                self._rate += 0.2 * (tokens / max(seconds, 1e-6) - self._rate)
                self._charge([one.job for one in inputs.values()], seconds)
            return fresh
        except Exception as error:
            left = {number: one for number, one in inputs.items() if number in writing}
            if len(left) > 1:
                return [wave for number, one in left.items() for wave in self._prefilled({number: one}, writing)]
            log.exception("an input failed")
            self._failures += 1
            self._call(self._desk.fail, [writing.pop(number).job for number in left], error)
            return []

    def _prefill(self, inputs: dict[int, _Input], writing: dict[int, _Input]) -> list[DecodeBatch]:
        """Prefills one batch: what bypasses is handed out, what writes is given back."""
        if not inputs:
            return []
        now = time.monotonic()
        for one in inputs.values():
            one.job.prefilled = now
        layouts = [one.layout for one in inputs.values()]
        route = next(iter(inputs.values())).route
        if route == "direct":
            probability = [one.probability for one in inputs.values()]
            self._hand_out(self.decoder.prefill_direct(list(inputs), layouts, probability=probability), writing)
            return []
        finished, wave = self.decoder.prefill(list(inputs), layouts, route)
        self._hand_out(finished, writing)
        for row in wave.rows if wave else ():
            if listeners := inputs[row.number].job.listeners:
                self._call(tell_all, list(listeners), Progress("reason", row.probability, ""))
        if wave is not None:
            self._postpone(wave, writing)
        return [wave] if wave is not None and wave.rows else []

    def _postpone(self, wave: DecodeBatch, writing: dict[int, _Input]) -> None:
        """Rows beyond those that may write give their cache back and wait for their turn; memory is bounded so."""
        if self.encoder.model.settings.pooling_position == "at_token":
            return  # rows that bypass are among them
        fresh = {row.number for row in wave.rows}
        by = Counter(one.job.who for number, one in writing.items() if number not in fresh)
        kept: list[int] = []
        for place, row in enumerate(wave.rows):
            one = writing[row.number]
            if by.total() < self.writing and (not one.job.who or by[one.job.who] < self._own_rows):
                by[one.job.who] += 1
                kept.append(place)
            else:
                del writing[row.number]
                one.route = "reason"  # known now, and the prompt is that of the automatic route
                self._postponed.put(one.job.who, one)
        if len(kept) < len(wave.rows):
            keep_rows(wave, kept)

    def _charge(self, jobs: Sequence[Job], seconds: float) -> None:
        for job in jobs:
            self._usage.add(job.who, seconds / len(jobs) * (PATIENT if job.patient else 1.0))

    def _write(self, waves: list[DecodeBatch], writing: dict[int, _Input], until: float) -> list[DecodeBatch]:
        """Writes one token for every row, and more until a moment of the clock; the rows that are not done.

        Rows of long work are a wave of their own, which waits while the callers of the other have had less of the model.
        """
        waves = self._joined(waves, writing)
        while waves:
            wave = min(waves, key=lambda one: min(self._usage.of(who) for who in self._callers(one, writing)))
            started, jobs = time.monotonic(), [writing[row.number].job for row in wave.rows]
            self._hand_out(self.decoder.step(wave), writing)
            now = time.monotonic()
            self._charge(jobs, now - started)
            self._tell(wave, writing)
            waves = [one for one in waves if one.rows]
            if now >= until and not self._goes_on(waves, writing):
                break
        return waves

    def _callers(self, wave: DecodeBatch, writing: dict[int, _Input]) -> set[str]:
        return {writing[row.number].job.who for row in wave.rows}

    def _goes_on(self, waves: Sequence[DecodeBatch], writing: dict[int, _Input]) -> bool:
        """Whether some who write have had less of the model than all who wait for a prefill."""
        with self._wake:
            waiting = self._arrived.callers() if self._company.crowded else []
        having = {who for wave in waves for who in self._callers(wave, writing)}
        return bool(waiting and having) and min(map(self._usage.of, having)) < min(map(self._usage.of, waiting))

    def _hand_out(self, finished: Finished, writing: dict[int, _Input]) -> None:
        if ended := [(writing.pop(number).job, encoding) for number, encoding in finished if number in writing]:
            self._failures = 0
            self._call(self._desk.deliver, ended, time.monotonic())

    def _joined(self, waves: list[DecodeBatch], writing: dict[int, _Input]) -> list[DecodeBatch]:
        """The rows that write next, long work as one wave and the others as one; those whose waiters have gone leave."""
        joining: dict[bool, list[DecodeBatch]] = {}
        for one in waves:
            live = [place for place, row in enumerate(one.rows) if writing[row.number].wanted]
            if len(live) < len(one.rows):
                for place in set(range(len(one.rows))) - set(live):
                    del writing[one.rows[place].number]
                keep_rows(one, live)
            if one.rows:
                joining.setdefault(writing[one.rows[0].number].job.patient, []).append(one)
        joined = [merge_batches(parts) for parts in joining.values()]
        for one in joined:
            trim(one)
        return joined

    def _tell(self, wave: DecodeBatch, writing: dict[int, _Input]) -> None:
        """Tells those who listen what their rows have written so far."""
        now = time.monotonic()
        for row in wave.rows:
            one = writing[row.number]
            if one.job.listeners and now - one.told >= PROGRESS_S:
                one.told = now
                self._call(tell_all, list(one.job.listeners), Progress("reason", row.probability, self.decoder.text_of(row)))

    def _call(self, what: Callable[..., None], *told: object) -> None:
        """Runs something in the event loop; where that has ended there is nobody left to tell."""
        with contextlib.suppress(RuntimeError):
            self._desk.loop.call_soon_threadsafe(what, *told)
