"""JSON over HTTP to one address: many requests in flight, each tried again where that may help, errors in words.

The HTTP library is `httpx2`: huggingface-hub and openai both depend on it, so it is installed wherever TraceIR runs. Requests run
in one event loop on a thread of their own, so that callers on any thread, and in any loop, simply wait, and one that is cancelled
is given up at the server too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from traceir.errors import InputError, ModelError
from traceir.outside import read_json, valid

if TYPE_CHECKING:
    import httpx2

log = logging.getLogger(__name__)

T = TypeVar("T")
_PASSING: Final = frozenset({429, 502, 503, 504})
"""Statuses after which the same request may succeed later. Not 408: that request has used up the server's time limit."""
_LONGEST_PAUSE_S: Final = 30.0
_CLOSING_S: Final = 10.0
"""The most that `close` waits for requests to end."""


class TransientError(ModelError):
    """A request that failed for now; it is sent again until the tries are spent."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: status, body (parsed JSON, or bytes where asked for; None: there is none), for errors what the server says."""

    status: int
    body: Any
    message: str = ""


class Connection:
    """Requests to one address. `in_flight` bounds the jobs under way, over all calling threads together.

    A try lasts at most `timeout_s`; after a 429, 502, 503, 504, a lost connection or half an answer up to `tries` are made,
    with doubling pauses from `pause_s` unless the server names one. Raises ModelError, with address and remedy, when they are
    spent. Thread-safe; `close` ends it, and with it what is under way.
    """

    _loop: asyncio.AbstractEventLoop
    _client: httpx2.AsyncClient
    _stop: asyncio.Event

    def __init__(
        self, address: str, api_key: str = "", *, in_flight: int = 64, timeout_s: float = 120.0, tries: int = 7,
        pause_s: float = 0.25,
    ) -> None:  # fmt: skip
        if not re.match(r"https?://[^/\s]+", address):
            raise InputError(f"address {address!r} is not an http address; give one such as http://localhost:30000")
        if in_flight < 1 or timeout_s <= 0 or tries < 1 or pause_s < 0:
            raise InputError(f"in_flight {in_flight}, timeout_s {timeout_s}, tries {tries}, pause_s {pause_s}: too small a limit")
        if not (api_key.isascii() and api_key.isprintable()):
            raise InputError("the API key holds characters that no header can carry; copy it again")
        self.address = address.rstrip("/")
        self.in_flight, self.timeout_s, self.tries, self.pause_s = in_flight, timeout_s, tries, pause_s
        self._headers = {"Content-Type": "application/json"}
        if api_key.strip():
            self._headers["Authorization"] = f"Bearer {api_key.strip()}"
        self._places = asyncio.Semaphore(in_flight)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._waited_for: set[Future[Any]] = set()
        self._closed = False

    def gather(self, jobs: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
        """Runs the jobs, at most `in_flight` at a time, and waits; results in their order. The first error ends the others."""
        return self._wait(self._all(jobs))

    def start(self, job: Callable[[], Awaitable[T]]) -> Future[T]:
        """Begins one job, when one of the `in_flight` places is free; cancelling the future ends it."""
        return self._started(self._bounded(job))

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None, **options: Any) -> Answer:
        """One request, waited for; `options` as for `request`."""
        return self._wait(self.request(method, path, body, **options))

    async def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        refused: Sequence[int] = (),
        raw: bool = False,
        check: Callable[[Answer], None] = lambda _: None,
    ) -> Answer:
        """One request with its tries. A status in `refused` comes back as an Answer, any other above 299 raises ModelError.

        `raw`: the answer is not JSON, and comes as bytes. `check` raises TransientError for an answer to be asked for again.
        """
        try:
            content = None if body is None else json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"the request to {self.address}{path} cannot be written in JSON: {error}") from error
        attempt = 1
        while True:
            try:
                answer = await self._try(method, f"{self.address}{path}", content, refused, raw)
                check(answer)
                return answer
            except TransientError as error:
                if attempt == self.tries:
                    raise ModelError(f"{error} (tried {attempt} times)") from error
                pause = error.retry_after if error.retry_after is not None else self.pause_s * 2 ** (attempt - 1)
                attempt += 1
                log.info("%s; try %d follows in %.1f s", error, attempt, min(pause, _LONGEST_PAUSE_S))
                await asyncio.sleep(min(pause, _LONGEST_PAUSE_S))

    def close(self) -> None:
        """Ends requests under way (their callers get a ModelError) and the thread; nothing can be sent afterwards."""
        with self._lock:
            self._closed, thread, self._thread = True, self._thread, None
        if thread is not None:
            for future in self._waited_for.copy():
                future.cancel()
            self._loop.call_soon_threadsafe(self._stop.set)
            thread.join(_CLOSING_S)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._started(work)
        try:
            return future.result()
        except CancelledError as error:
            raise ModelError(f"the connection to {self.address} was closed during a request; make a new one") from error
        finally:
            future.cancel()  # where the caller is interrupted; nothing once it is done

    def _started(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """The work in the loop, which the first one starts. Under the lock, so that `close` ends all that was started."""
        with self._lock:
            if self._closed:
                work.close()
                raise ModelError(f"the connection to {self.address} is closed; make a new one")
            if self._thread is None:
                try:
                    self._client = self._new_client()
                except BaseException:  # the environment names certificates or a proxy that cannot be had
                    work.close()
                    raise
                ready, name = threading.Event(), f"traceir {self.address}"
                self._thread = threading.Thread(target=lambda: asyncio.run(self._run(ready)), name=name, daemon=True)
                self._thread.start()
                ready.wait()
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._waited_for.add(future)
            future.add_done_callback(self._waited_for.discard)
            return future

    async def _run(self, ready: threading.Event) -> None:
        """Runs in the thread until `close`; asyncio then cancels what is left."""
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with self._client:
            ready.set()
            await self._stop.wait()

    def _new_client(self) -> httpx2.AsyncClient:
        import httpx2

        limits = httpx2.Limits(max_connections=self.in_flight, max_keepalive_connections=self.in_flight)
        return httpx2.AsyncClient(headers=self._headers, limits=limits, timeout=None)

    async def _bounded(self, job: Callable[[], Awaitable[T]]) -> T:
        async with self._places:
            return await job()

    async def _all(self, jobs: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
        tasks = [asyncio.create_task(self._bounded(job)) for job in jobs]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _try(self, method: str, url: str, content: bytes | None, refused: Sequence[int], raw: bool) -> Answer:
        import httpx2

        try:
            async with asyncio.timeout(self.timeout_s):
                response = await self._client.request(method, url, content=content)
        except TimeoutError as error:
            raise TransientError(
                f"{url} gave no answer within {self.timeout_s:g} s; raise timeout_s or lower in_flight"
            ) from error
        except httpx2.TransportError as error:
            shown = f"cannot reach {url}: {error or type(error).__name__}; is the server running, and is this its address?"
            raise TransientError(shown) from error
        status, message = response.status_code, _message_of(response.text) if response.status_code > 299 else ""
        if status in _PASSING:
            wait = None
            with suppress(ValueError):
                wait = max(0.0, float(response.headers.get("retry-after", "")))
            raise TransientError(f"{url} answers {status}: {message}; it is busy or still starting", wait)
        if status in (401, 403):
            raise ModelError(f"{url} refuses the API key ({status}: {message}); give the right key")
        if status > 299 and status not in refused:
            raise ModelError(f"{url} answers {status}: {message}")
        if raw or status > 299 or not response.content.strip():
            return Answer(status, response.content if raw and status < 300 else None, message)
        try:
            return Answer(status, read_json(response.content))
        except ValueError as error:
            raise TransientError(f"{url} answered with something that is no whole JSON: {response.content[:80]!r}") from error


class Connected:
    """Base of classes that hold a Connection; `close` when done, or use it in a `with`."""

    _connection: Connection

    @property
    def address(self) -> str:
        return self._connection.address

    def close(self) -> None:
        """Closes the connections to the server."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _message_of(text: str) -> str:
    """What an error answer says: its message, in OpenAI's, FastAPI's or SGLang's form, else the text itself."""
    try:
        message = read_json(text)
    except ValueError:
        return valid(text.strip()[:500]) or "no reason given"
    while isinstance(message, dict):
        message = next((message[name] for name in ("error", "message", "detail") if name in message), str(message))
    return str(message)[:500]
