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
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from traceir.batch import Layout
from traceir.decoding import Decoder, Finished, Wave, keep_rows, merge_waves, trim
from traceir.encoder import Encoder
from traceir.items import Item, Query, Route
from traceir.serve.jobs import FAILURES, Desk, Job, Progress, tell_all

log = logging.getLogger(__name__)

PACE: Final = 0.5
"""Seconds of writing for each second of prefill while both are wanted."""
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
        self._arrived: deque[_Input] = deque()
        self._postponed: deque[_Input] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._failures = 0
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs, and its last batches did not all fail."""
        return self._thread.is_alive() and self._failures < FAILURES

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
        if (error := done.exception()) is not None:
            self._desk.fail([job], error)
            return
        with self._wake:
            self._arrived.append(done.result())
            self._wake.notify()

    # In the thread

    def _work(self) -> None:
        writing: dict[int, _Input] = {}
        wave: Wave | None = None
        numbers = 0
        while (taken := self._take(self.writing - len(writing), wait=not writing)) is not None:
            inputs = dict(enumerate(taken, numbers))
            numbers += len(inputs)
            writing |= inputs
            started = time.monotonic()
            fresh = self._prefilled(inputs, writing)
            now = time.monotonic()
            try:
                wave = self._write([*([wave] if wave else []), *fresh], writing, now + PACE * (now - started))
            except Exception as error:
                log.exception("%d inputs that were being written failed", len(writing))
                self._failures += 1
                self._call(self._desk.fail, [one.job for one in writing.values()], error)
                wave, writing = None, {}

    def _take(self, room: int, *, wait: bool) -> list[_Input] | None:
        """What has come in and is still wanted, at most one batch of one route; None once all is done and closed.

        What was postponed comes first, and alone, where there is room to write a good part of it.
        """
        most = min(self.encoder.batch_rows, self.writing)
        if room >= min(most, len(self._postponed)) and self._postponed:
            return self._fitting(self._postponed, most)
        with self._wake:
            while wait and not self._arrived and not self._closing:
                self._wake.wait(0.5)
            if wait and not self._arrived:
                return None
            return self._fitting(self._arrived, self.encoder.batch_rows)

    def _fitting(self, waiting: deque[_Input], most: int) -> list[_Input]:
        """The first of those that wait and are wanted, of one route, as many as a batch holds; the others keep their places."""
        taken: list[_Input] = []
        later: list[_Input] = []
        longest = 0
        while waiting and len(taken) < most and len(later) <= self.encoder.batch_rows:
            one = waiting.popleft()
            if not one.wanted:
                continue
            size = max(longest, len(one.layout))
            if taken and (one.route != taken[0].route or (len(taken) + 1) * size > self.encoder.token_budget):
                later.append(one)
                continue
            longest = size
            taken.append(one)
        waiting.extendleft(reversed(later))
        return taken

    def _prefilled(self, inputs: dict[int, _Input], writing: dict[int, _Input]) -> list[Wave]:
        """Prefills one batch; where that fails, each input alone, so that a bad one fails by itself."""
        try:
            return self._prefill(inputs, writing)
        except Exception as error:
            left = {number: one for number, one in inputs.items() if number in writing}
            if len(left) > 1:
                return [wave for number, one in left.items() for wave in self._prefilled({number: one}, writing)]
            log.exception("an input failed")
            self._failures += 1
            self._call(self._desk.fail, [writing.pop(number).job for number in left], error)
            return []

    def _prefill(self, inputs: dict[int, _Input], writing: dict[int, _Input]) -> list[Wave]:
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

    def _postpone(self, wave: Wave, writing: dict[int, _Input]) -> None:
        """Rows beyond those that may write give their cache back and wait for their turn; memory is bounded so."""
        if self.encoder.model.settings.read_out == "at_token":
            return  # rows that bypass are among them
        room = max(0, self.writing - (len(writing) - len(wave.rows)))
        for row in wave.rows[room:]:
            one = writing.pop(row.number)
            one.route = "reason"  # known now, and the prompt is that of the automatic route
            self._postponed.append(one)
        if room < len(wave.rows):
            keep_rows(wave, range(room))

    def _write(self, waves: list[Wave], writing: dict[int, _Input], until: float) -> Wave | None:
        """Writes one token for every row, and more until a moment of the clock; the rows that are not done."""
        wave = self._joined(waves, writing)
        while wave is not None:
            self._hand_out(self.decoder.step(wave), writing)
            self._tell(wave, writing)
            if not wave.rows:
                return None
            if time.monotonic() >= until:
                break
        return wave

    def _hand_out(self, finished: Finished, writing: dict[int, _Input]) -> None:
        if ended := [(writing.pop(number).job, encoding) for number, encoding in finished if number in writing]:
            self._failures = 0
            self._call(self._desk.deliver, ended, time.monotonic())

    def _joined(self, waves: list[Wave], writing: dict[int, _Input]) -> Wave | None:
        """The rows that write next, as one wave: those whose waiters have gone leave."""
        for one in waves:
            live = [place for place, row in enumerate(one.rows) if writing[row.number].wanted]
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

    def _tell(self, wave: Wave, writing: dict[int, _Input]) -> None:
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
