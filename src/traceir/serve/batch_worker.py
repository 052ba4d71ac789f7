"""Any encoder as the scheduler's worker: what waits is encoded together, without a look into the model."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

from traceir.errors import InputError, ModelError
from traceir.items import Encoding, Item, Query, Route
from traceir.prompts import Role
from traceir.search import EncoderLike
from traceir.serve.fair import Rounds, Usage
from traceir.serve.jobs import Desk, Health, Job, UnavailableError

log = logging.getLogger(__name__)

ROWS: Final = 32
"""Inputs of a batch, where the encoder does not say how many (`batch_rows`)."""
PATIENT: Final = 4.0
"""How many times the time of long work counts, so that it has the smaller part of an encoder that others want too."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    job: Job
    content: Query | Item


class BatchWorker:
    """Collects jobs into batches, queries and candidates apart, and runs them in threads: `in_flight` batches at a time where the
    encoder says so, else one. A batch that fails is halved until the input at fault fails by itself.

    An encoder's own failure (ModelError) is an UnavailableError for the whole batch. Tokens of prompts are not counted.
    """

    def __init__(self, encoder: EncoderLike) -> None:
        self.encoder = encoder
        self.rows: int = getattr(encoder, "batch_rows", ROWS)
        self._free: int = getattr(encoder, "in_flight", 1)
        self._threads = ThreadPoolExecutor(self._free, "encoder")
        self._waiting: dict[tuple[bool, bool], Rounds[_Waiting]] = {}
        self._usage = Usage()
        self._running: set[asyncio.Future[None]] = set()
        self._health = Health()

    @property
    def alive(self) -> bool:
        """Whether the last batches did not all fail, or that was a while ago."""
        return self._health.good

    def route(self, role: Role, route: Route) -> Route:
        if route == "reason":
            self.encoder.encode_queries([], route=route)  # says why it cannot
        return "direct"

    def start(self, desk: Desk) -> None:
        self._desk = desk

    def take(self, job: Job, content: Query | Item) -> None:
        kind = job.patient, isinstance(content, Query)
        self._waiting.setdefault(kind, Rounds()).put(job.who, _Waiting(job, content))
        self._run()

    async def close(self) -> None:
        """Waits for the batches under way, and closes the encoder where it can be closed."""
        await asyncio.gather(*self._running, return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown)
        await asyncio.to_thread(getattr(self.encoder, "close", lambda: None))

    def _run(self) -> None:
        """Starts batches while there are free threads and something waits; in the event loop."""
        while self._free and (batch := self._next()):
            self._free -= 1
            running = self._desk.loop.run_in_executor(self._threads, self._work, batch)
            self._running.add(running)
            running.add_done_callback(self._ended)

    def _ended(self, running: asyncio.Future[None]) -> None:
        self._running.discard(running)
        self._free += 1
        self._run()

    def _next(self) -> list[_Waiting]:
        """The next batch: of the kind of work that has had least of the encoder, one input of each caller in turn."""
        for kind in sorted(self._waiting, key=lambda kind: self._usage.of(repr(kind))):
            batch: list[_Waiting] = []
            for one in self._waiting[kind]:
                if not one.job.done.done():
                    batch.append(one)
                if len(batch) == self.rows:
                    break
            if batch:
                return batch
        return []

    # In a thread

    def _work(self, batch: Sequence[_Waiting]) -> None:
        started = time.monotonic()
        for one in batch:
            one.job.prefilled = started
        self._encode(batch)
        first = batch[0]
        weight = PATIENT if first.job.patient else 1.0
        kind = repr((first.job.patient, isinstance(first.content, Query)))
        self._call(self._usage.add, kind, (time.monotonic() - started) * weight)

    def _encode(self, batch: Sequence[_Waiting]) -> None:
        """Encodes a batch and hands it in, in halves where it fails."""
        jobs = [one.job for one in batch]
        try:
            encodings = self._encodings(batch)
        except ModelError as error:
            self._call(self._fail, jobs, UnavailableError(f"{type(error).__name__}: {error}"))
        except Exception as error:
            if len(batch) > 1:
                self._encode(batch[: len(batch) // 2])
                self._encode(batch[len(batch) // 2 :])
            elif isinstance(error, InputError):
                self._call(self._desk.fail, jobs, error)
            else:
                log.exception("an input failed")
                self._call(self._fail, jobs, UnavailableError(f"{type(error).__name__}: {error}"))
        else:
            for job, encoding in zip(jobs, encodings, strict=True):
                job.cut = encoding.cut
            self._call(self._done, list(zip(jobs, encodings, strict=True)), time.monotonic())

    def _encodings(self, batch: Sequence[_Waiting]) -> list[Encoding]:
        queries = [one.content for one in batch if isinstance(one.content, Query)]
        if queries:
            found = self.encoder.encode_queries(queries, route="direct")
        else:
            found = self.encoder.encode_items([one.content for one in batch if isinstance(one.content, Item)])
        if len(found) != len(batch):
            raise ModelError(f"the encoder returned {len(found)} encodings for {len(batch)} inputs; report it")
        return found

    # Back in the event loop

    def _done(self, finished: Sequence[tuple[Job, Encoding]], now: float) -> None:
        self._health.succeed()
        self._desk.deliver(finished, now)

    def _fail(self, jobs: Sequence[Job], error: UnavailableError) -> None:
        self._health.fail()
        self._desk.fail(jobs, error)

    def _call(self, what: Callable[..., None], *told: object) -> None:
        """Runs something in the event loop; where that has ended there is nobody left to tell."""
        with contextlib.suppress(RuntimeError):
            self._desk.loop.call_soon_threadsafe(partial(what, *told))
