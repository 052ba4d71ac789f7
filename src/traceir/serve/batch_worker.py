"""Workers around encoders that cannot be looked into: batches for a library's model, single requests for an engine's."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

from traceir.engines.sglang import SGLangEncoder
from traceir.errors import ImageError, InputError, ModelError
from traceir.items import Encoding, Item, Query, Route
from traceir.prompts import Role
from traceir.search import EncoderLike
from traceir.serve.fair import Rounds, Usage
from traceir.serve.jobs import PATIENT, Job, UnavailableError, Worker

log = logging.getLogger(__name__)

ROWS: Final = 32  # inputs of a batch, where the encoder does not say how many (`batch_rows`)


class EngineWorker(Worker):
    """Every input is one request to the engine behind `encoder`, which batches as it sees fit; those that nobody waits for are
    given up there too. A failure of the engine's is an UnavailableError. Reasoning is told at its end, not while it is written.
    """

    def __init__(self, encoder: SGLangEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self._tasks: set[asyncio.Task[None]] = set()

    def route(self, role: Role, route: Route) -> Route:
        return route if self.encoder.model.writes(role) else "direct"

    def take(self, job: Job) -> None:
        task = self.loop.create_task(self._encode(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        job.done.add_done_callback(lambda _: task.cancel())

    async def close(self) -> None:
        """Ends what is still being encoded, and the connections."""
        for task in self._tasks.copy():
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self.encoder.close)

    async def _encode(self, job: Job) -> None:
        try:
            asked = await self.loop.run_in_executor(self.pool, self.encoder.prepare, job.content, job.route)
            job.prefilled, job.prompt_tokens, job.cut = time.monotonic(), len(asked.read), asked.cut
            encoding = await asyncio.wrap_future(self.encoder.start(asked))
        except (InputError, ImageError) as error:
            self.fail_all([job], error, own=False)
        except Exception as error:  # whatever becomes of one input, the worker goes on
            if not isinstance(error, ModelError):
                log.exception("an input failed")
            self.fail_all([job], UnavailableError(f"{type(error).__name__}: {error}"))
        else:
            self.finish_all([(job, encoding)], time.monotonic())


class BatchWorker(Worker):
    """Collects jobs into batches, queries and candidates apart, and runs them in threads: `in_flight` batches at a time where the
    encoder says so, else one. A batch that fails is halved until the input at fault fails by itself.

    An encoder's own failure (ModelError) is an UnavailableError for the whole batch. Tokens of prompts are not counted.
    """

    def __init__(self, encoder: EncoderLike) -> None:
        super().__init__()
        self.encoder = encoder
        self.rows: int = getattr(encoder, "batch_rows", ROWS)
        self._free: int = getattr(encoder, "in_flight", 1)
        self._threads = ThreadPoolExecutor(self._free, "encoder")
        self._waiting: dict[str, Rounds[Job]] = {}  # by kind
        self._usage = Usage()
        self._running: set[asyncio.Future[None]] = set()

    def route(self, role: Role, route: Route) -> Route:
        if route == "reason":
            self.encoder.encode_queries([], route=route)  # says why it cannot
        return "direct"

    def take(self, job: Job) -> None:
        self._waiting.setdefault(_kind(job), Rounds()).put(job.who, job)
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
            running = self.loop.run_in_executor(self._threads, self._work, batch)
            self._running.add(running)
            running.add_done_callback(self._ended)

    def _ended(self, running: asyncio.Future[None]) -> None:
        self._running.discard(running)
        self._free += 1
        self._run()

    def _next(self) -> list[Job]:
        """The next batch: of the kind of work that has had least of the encoder, one input of each caller in turn."""
        for kind in sorted(self._waiting, key=self._usage.of):
            batch: list[Job] = []
            for job in self._waiting[kind]:
                batch += [job] if job.wanted else []
                if len(batch) == self.rows:
                    break
            if batch:
                return batch
        return []

    # In a thread

    def _work(self, batch: Sequence[Job]) -> None:
        started = time.monotonic()
        for job in batch:
            job.prefilled = started
        self._encode(batch)
        weight = PATIENT if batch[0].patient else 1.0
        self.call(self._usage.add, _kind(batch[0]), (time.monotonic() - started) * weight)

    def _encode(self, batch: Sequence[Job]) -> None:
        """Encodes a batch and hands it in, in halves where it fails."""
        try:
            encodings = self._encodings(batch)
        except Exception as error:  # of any library; the input at fault alone shall fail
            own, half = isinstance(error, ModelError), len(batch) // 2
            if half and not own:
                self._encode(batch[:half])
                self._encode(batch[half:])
            elif isinstance(error, InputError):
                self.call(partial(self.fail_all, batch, error, own=False))
            else:
                if not own:
                    log.exception("an input failed")
                self.call(self.fail_all, batch, UnavailableError(f"{type(error).__name__}: {error}"))
        else:
            for job, encoding in zip(batch, encodings, strict=True):
                job.cut = encoding.cut
            self.call(self.finish_all, list(zip(batch, encodings, strict=True)), time.monotonic())

    def _encodings(self, batch: Sequence[Job]) -> list[Encoding]:
        contents = [job.content for job in batch]
        if queries := [one for one in contents if isinstance(one, Query)]:
            encodings = self.encoder.encode_queries(queries, route="direct")
        else:
            encodings = self.encoder.encode_items([one for one in contents if isinstance(one, Item)])
        if len(encodings) != len(batch):
            raise ModelError(f"the encoder returned {len(encodings)} encodings for {len(batch)} inputs; report it")
        return encodings


def _kind(job: Job) -> str:
    """What is encoded together: queries or candidates, of long work or not."""
    return f"{type(job.content).__name__} {job.patient}"
