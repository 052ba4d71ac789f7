"""Why a library was refused where the reason is its behaviour: each check runs the library and says what it saw.

A check gives whether the reason still holds, and the observation in words made of what was observed. `python -m benchmarks.swaps`
runs them; each takes seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import queue
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import requires
from logging.handlers import QueueListener
from typing import Any

import numpy as np

from traceir.errors import InputError

Observed = tuple[bool, str]
Asgi = Callable[..., Awaitable[None]]
HANGS_S = 2.0
"""So long a check waits for what should not take a moment."""


def host_literal() -> Observed:
    """The middleware is told both spellings of the address, as AccessRules knows them."""
    status, _ = asgi_answer(_trusting("::1", "[::1]"), host="[::1]:8000")
    return status != 200, f"where `[::1]` is allowed, `[::1]:8000` gets {status}"


def host_answer() -> Observed:
    """Errors of this server are JSON in OpenAI's form, and a Host with the port of another server is refused."""
    status, kind = asgi_answer(_trusting("localhost"), host="attacker.example")
    elsewhere, _ = asgi_answer(_trusting("localhost"), host="localhost:1")
    seen = f"a foreign host gets {status} in {kind.partition(';')[0]}, localhost with any port {elsewhere}"
    return "json" not in kind and elsewhere == 200, seen


def _trusting(*hosts: str) -> Asgi:
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    return TrustedHostMiddleware(_welcome, allowed_hosts=list(hosts))


def cors() -> Observed:
    from starlette.middleware.cors import CORSMiddleware

    app = CORSMiddleware(_welcome, allow_origins=["https://ours.example"], allow_methods=["POST"])
    ours, _ = asgi_answer(app, origin="https://ours.example", host="x")
    foreign, _ = asgi_answer(app, origin="https://attacker.example", host="x")
    return foreign == 200, f"a POST of an allowed origin gets {ours}, one of a foreign origin {foreign}"


def asgi_answer(app: Asgi, **headers: str) -> tuple[int, str]:
    """Status and content type of a POST."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/", "raw_path": b"/", "query_string": b"", "scheme": "http",
             "http_version": "1.1", "headers": raw, "server": ("x", 80), "client": ("y", 1)}  # fmt: skip

    async def ask() -> None:
        await app(scope, receive, send)

    asyncio.run(ask())
    return sent[0]["status"], dict(sent[0]["headers"]).get(b"content-type", b"").decode()


async def _welcome(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": b"{}"})


def names_twice() -> Observed:
    from pydantic import BaseModel

    from traceir.serve.bodies import parse_json

    class Body(BaseModel, extra="forbid", strict=True):
        k: int

    raw = b'{"k": 1, "k": 2}'
    theirs, standard = Body.model_validate_json(raw).k, json.loads(raw)["k"]
    try:
        ours = f"takes {parse_json(raw)['k']}"
    except InputError:
        ours = "refuses the body"
    return theirs == 2, f"of k = 1 and k = 2 pydantic keeps {theirs}, json {standard}, ours {ours}"


def full_queue() -> Observed:
    """A listener whose handler is slow, with a queue that has no room for the mark of the end."""
    with _listener() as (listener, lines):
        lines.put(logging.makeLogRecord({}))
        time.sleep(0.1)
        lines.put(logging.makeLogRecord({}))
        try:
            listener.stop()
        except queue.Full:
            return True, "with a full queue stop() raises queue.Full"
        return False, "with a full queue stop() returns"


def hanging_disk() -> Observed:
    with _listener() as (listener, lines):
        lines.put(logging.makeLogRecord({}))
        time.sleep(0.1)
        stopping = threading.Thread(target=listener.stop, daemon=True)
        stopping.start()
        stopping.join(HANGS_S)
        hangs = stopping.is_alive()
        return hangs, f"{HANGS_S:g} s into a write that hangs stop() {'still waits' if hangs else 'has returned'}"


@contextlib.contextmanager
def _listener() -> Iterator[tuple[QueueListener, queue.Queue[logging.LogRecord]]]:
    """One whose handler waits until the block ends; its queue holds one line."""
    lines: queue.Queue[logging.LogRecord] = queue.Queue(1)
    free = threading.Event()

    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            free.wait(10 * HANGS_S)

    listener = QueueListener(lines, Slow())
    listener.start()
    try:
        yield listener, lines
    finally:
        free.set()


def token_bucket() -> Observed:
    """Whether `limits` has one now, and how many of 20,000 callers, each heard once, it remembers."""
    from limits import RateLimitItemPerMinute
    from limits.storage import MemoryStorage
    from limits.strategies import STRATEGIES, FixedWindowRateLimiter

    from traceir.serve.limits import MAX_BUCKETS, Buckets, Rate

    callers = 2 * MAX_BUCKETS
    storage, ours = MemoryStorage(), Buckets(Rate(60))
    limiter = FixedWindowRateLimiter(storage)
    for caller in range(callers):
        limiter.hit(RateLimitItemPerMinute(60), str(caller))
        ours.take(str(caller))
    buckets = [name for name in STRATEGIES if "bucket" in name or "token" in name]
    kept = len(storage.storage)
    seen = f"strategies: {', '.join(sorted(STRATEGIES))}; of {callers:,} callers it keeps {kept:,}, ours {len(ours):,}"
    return not buckets and kept == callers, seen


def faiss_copy() -> Observed:
    """Whether an index of FAISS's own sees what is written into the array that it was given."""
    import faiss

    vectors_ND = np.random.default_rng(0).standard_normal((2000, 64), dtype=np.float32)
    indexes = {"IVF": faiss.index_factory(64, "IVF16,Flat"), "HNSW": faiss.index_factory(64, "HNSW16")}
    first, sizes = vectors_ND[0].copy(), {}
    for name, index in indexes.items():
        index.train(vectors_ND)
        index.add(vectors_ND)
        if name == "IVF":
            index.make_direct_map()
        sizes[name] = len(faiss.serialize_index(index)) / vectors_ND.nbytes
    vectors_ND[:] = 0
    copies = [name for name, index in indexes.items() if np.array_equal(index.reconstruct(0), first)]
    sized = ", ".join(f"{name} {size:.2f} times the array" for name, size in sizes.items())
    return len(copies) == len(indexes), f"own copies: {', '.join(copies) or 'none'} ({sized})"


def wilson_effective() -> Observed:
    """Ours takes the effective number of reviews, which is no whole number."""
    from scipy import stats

    try:
        stats.binomtest(3, 41.7)
        refused = False
    except (TypeError, ValueError):
        refused = True
    there = importlib.util.find_spec("statsmodels") is not None
    seen = f"scipy {'refuses' if refused else 'takes'} 41.7 trials; statsmodels is {'' if there else 'not '}installed"
    return refused and not there, seen


def httpx_threads() -> Observed:
    """A call that waits for a slow server is to be given up."""
    import httpx

    with served(lambda request: time.sleep(HANGS_S)) as (address, _), ThreadPoolExecutor(1) as pool:
        call = pool.submit(httpx.get, address, timeout=10.0, trust_env=False)
        time.sleep(0.3)
        begun, cancelled = time.perf_counter(), call.cancel()
        call.exception()
        waited = time.perf_counter() - begun
    seen = f"cancel() of a call in flight gives {cancelled}, and it goes on for {waited:.1f} s"
    return not cancelled and waited > HANGS_S / 2, seen


def httpx_brought() -> Observed:
    """What the two packages ask for, by their own metadata."""
    asked = {name: _http_packages(name) for name in ("openai", "huggingface-hub")}
    seen = "; ".join(f"{name} asks for {', '.join(found) or 'neither httpx nor httpx2'}" for name, found in asked.items())
    return not any("httpx" in found for found in asked.values()), seen


def _http_packages(name: str) -> list[str]:
    wanted = [line for line in requires(name) or () if "extra ==" not in line]
    return sorted({match[0] for line in wanted if (match := re.match(r"httpx\d?(?![\w-])", line))})


def spent_quota() -> Observed:
    spent = {"error": {"message": "no money left", "type": "insufficient_quota", "code": "insufficient_quota"}}
    asked, seconds = asked_openai(lambda request: answer(request, 429, spent), max_retries=5)
    return asked > 1, f"with 5 retries a spent quota is asked {asked} times in {seconds:.1f} s"


def long_wait() -> Observed:
    busy = {"error": {"message": "later", "type": "rate_limit_error"}}
    asked, _ = asked_openai(lambda request: answer(request, 429, busy, **{"Retry-After": "300"}), max_retries=5)
    return asked == 1, f"told `Retry-After: 300` it asks {asked} time{'s' * (asked > 1)}"


def dripping() -> Observed:
    """An answer of which a byte comes now and then."""

    def drip(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("content-type", "application/json")
        request.end_headers()
        for _ in range(8):
            request.wfile.write(b" ")
            request.wfile.flush()
            time.sleep(0.5)

    _, seconds = asked_openai(drip, max_retries=0, timeout=1.0)
    return seconds > 2.0, f"a timeout of 1 s lets an answer that drips for 4 s hold {seconds:.1f} s"


def asked_openai(reply: Callable[[BaseHTTPRequestHandler], None], **options: Any) -> tuple[int, float]:
    """How often openai's client asks for one completion, and for how long."""
    import openai

    with served(reply) as (address, counted), openai.OpenAI(base_url=address, api_key="k", **options) as client:
        begun = time.perf_counter()
        with contextlib.suppress(openai.OpenAIError, ValueError):  # what drips is no JSON
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": "a"}])
        return len(counted), time.perf_counter() - begun


def answer(request: BaseHTTPRequestHandler, status: int, content: object, **headers: str) -> None:
    body = json.dumps(content).encode()
    request.send_response(status)
    for name, value in {"content-type": "application/json", "content-length": str(len(body)), **headers}.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)


@contextlib.contextmanager
def served(reply: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[tuple[str, list[str]]]:
    """The address of a server of this process, and the paths that were asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers.get("content-length", 0)))
            reply(self)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


CHECKS: dict[str, Callable[[], Observed]] = {
    check.__name__: check
    for check in (
        host_literal, host_answer, cors, names_twice, full_queue, hanging_disk, token_bucket, faiss_copy, wilson_effective,
        httpx_threads, httpx_brought, spent_quota, long_wait, dripping,
    )
}  # fmt: skip
