"""An engine as the scheduler's worker: every input is one job of the engine's, which batches as it sees fit."""

from __future__ import annotations

import asyncio
import logging
import time

from traceir.engines.sglang import SGLangEncoder
from traceir.errors import ImageError, InputError, ModelError
from traceir.items import Item, Query, Route
from traceir.prompts import Role
from traceir.serve.jobs import Desk, Health, Job, UnavailableError

log = logging.getLogger(__name__)


class EngineWorker:
    """Sends jobs to the engine behind `encoder`, and gives up those that nobody waits for.

    A failure of the engine's is an UnavailableError. Reasoning is told at its end, not while it is written.
    """

    def __init__(self, encoder: SGLangEncoder) -> None:
        self.encoder = encoder
        self._tasks: set[asyncio.Task[None]] = set()
        self._health = Health()

    @property
    def alive(self) -> bool:
        """Whether the last inputs did not all fail, or that was a while ago."""
        return self._health.good

    def route(self, role: Role, route: Route) -> Route:
        return route if self.encoder.model.writes(role) else "direct"

    def start(self, desk: Desk) -> None:
        self._desk = desk

    def take(self, job: Job, content: Query | Item) -> None:
        task = self._desk.loop.create_task(self._encode(job, content))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        job.done.add_done_callback(lambda _: task.cancel())

    async def close(self) -> None:
        """Ends what is still being encoded, and the connections."""
        for task in self._tasks.copy():
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self.encoder.close)

    async def _encode(self, job: Job, content: Query | Item) -> None:
        try:
            asked = await self._desk.loop.run_in_executor(self._desk.pool, self.encoder.prepare, content, job.route)
            job.prefilled, job.prompt_tokens, job.cut = time.monotonic(), len(asked.read), asked.cut
            encoding = await asyncio.wrap_future(self.encoder.start(asked))
        except (InputError, ImageError) as error:
            self._desk.fail([job], error)
        except Exception as error:
            self._health.fail()
            if not isinstance(error, ModelError):
                log.exception("an input failed")
            self._desk.fail([job], UnavailableError(f"{type(error).__name__}: {error}"))
        else:
            self._health.succeed()
            self._desk.deliver([(job, encoding)], time.monotonic())
