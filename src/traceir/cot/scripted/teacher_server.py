"""The scripted teacher behind a real HTTP server that speaks OpenAI's chat completions, with faults on demand.

    python -m traceir.cot.scripted.teacher_server --data data/minibeir --port 8040 --faults 0.1 --log teacher.jsonl

A bare ASGI application under uvicorn: about a millisecond of one core a request. What it was asked lies in an append-only log, so
that it can be shown what a client paid for, and how often.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hashlib
import hmac
import http.client
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from traceir.cot.scripted.faults import ALL, TRANSPORT, Faults, barred_for, spoil
from traceir.cot.scripted.oracle import Asked, Oracle
from traceir.cot.scripted.thoughts import STYLES, cut
from traceir.errors import InputError, TeacherError, TraceError
from traceir.serve.bodies import parse_json
from traceir.serve.guard import Guard, Wall
from traceir.serve.wire import WireLimits, settings

MODEL: Final = "scripted-oracle"
KEY_VARIABLE: Final = "TRACEIR_TEACHER_KEY"
MOST_BYTES: Final = 64 * 2**20
"""The largest body that is read."""
IMAGE_TOKENS: Final = 85
WORD_TOKENS: Final = 1.3
_READY: Final = "listening on "
_LOG = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Ledger:
    """The append-only log of requests: JSON lines, each written whole at once.

    {"time", "event": "start" | "end", "request", "key", "stage", "qids", "fault", "status", "paid"}; `status` is 0 at the start,
    `paid` is true where a whole completion was made, whether or not the client was still there. The end is written before the
    first byte of the answer, so what a client has received is here. A request without an end was in flight when the server ended.
    """

    def __init__(self, path: Path | None) -> None:
        self.requests = 0
        self._file = -1
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o644)
        with path.open("rb") as file:
            whole = True
            for line in file:
                self.requests += 1  # no fewer than were numbered so far
                whole = line.endswith(b"\n")
        if not whole:
            os.write(self._file, b"\n")

    def begin(self) -> int:
        """The number of a new request, from 1, and never one of an earlier run on the same log."""
        self.requests += 1
        return self.requests

    def write(self, event: str, call: Call) -> None:
        if self._file < 0:
            return
        line = {"time": round(time.time(), 6), "event": event, "request": call.number, "key": call.key, "stage": call.stage}
        line |= {"qids": list(call.qids), "fault": call.fault, "status": call.status, "paid": call.paid}
        os.write(self._file, json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


@dataclass(slots=True)
class Call:
    """What the log says of one request."""

    number: int
    key: str
    stage: str = ""
    qids: tuple[str, ...] = ()
    fault: str | None = None
    status: int = 0
    paid: bool = False


@dataclass(slots=True)
class TeacherApp:
    """The ASGI application. `latency` and `stall_s` in seconds; `key` None lets everyone in.

    `thinking`: how it sends its thoughts, one of thoughts.STYLES, `cut` for a teacher that comes to no end, "" for none.
    """

    oracle: Oracle
    ledger: Ledger
    model: str = MODEL
    key: str | None = None
    faults: Faults | None = None
    latency: float = 0.0
    stall_s: float = 5.0
    retry_after_s: float = 0.05
    thinking: str = ""
    _met: set[str] = field(default_factory=set)
    """Digests of the questions whose fault of transport has happened."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path, method = scope["path"].rstrip("/"), scope["method"]
        if path not in ("/v1/models", "/v1/chat/completions"):
            await _send_error(send, 404, f"{path} is not served; there are /v1/chat/completions and /v1/models", "not_found")
        elif method != ("GET" if path == "/v1/models" else "POST"):
            await _send_error(send, 405, f"{method} is not for {path}", "method_not_allowed")
        elif path == "/v1/chat/completions":
            await self._complete(scope, receive, send)
        elif self._known(scope):
            about = {"id": self.model, "object": "model", "created": 0, "owned_by": "traceir"}
            await _send_json(send, 200, {"object": "list", "data": [about]})
        else:
            await _send_error(send, 401, "the API key is wrong or missing", "invalid_api_key")

    def _known(self, scope: Message) -> bool:
        if self.key is None:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, f"Bearer {self.key}".encode())

    async def _complete(self, scope: Message, receive: Receive, send: Send) -> None:
        raw = await _read_body(receive)
        if raw is None:
            return  # the client left before its request was whole
        call = Call(self.ledger.begin(), hashlib.sha256(raw).hexdigest())
        if not self._known(scope):
            await self._refuse(send, call, 401, "the API key is wrong or missing", "invalid_api_key")
            return
        if len(raw) > MOST_BYTES:
            await self._refuse(send, call, 413, f"the body is longer than {MOST_BYTES} bytes", "too_large")
            return
        try:
            body = _parse(raw)
            if body.get("model") != self.model:
                said = f"the model {str(body.get('model'))[:80]!r} does not exist; {self.model!r} is served"
                await self._refuse(send, call, 404, said, "model_not_found")
                return
            asked = self.oracle.read(body)
            call.key, call.stage, call.qids = asked.key, asked.stage, asked.entry.qids
            text, finish = self._write(asked, call)
        except InputError as error:
            await self._refuse(send, call, 400, str(error), "invalid_request")
            return
        self.ledger.write("start", call)
        if self.latency:
            await asyncio.sleep(self.latency)
        if call.fault in TRANSPORT:
            await self._break(send, call)
            return
        call.status, call.paid = 200, True
        self.ledger.write("end", call)
        message: dict[str, Any] = {"content": text}
        if self.thinking == "cut":
            message, finish = cut(text), "length"
        elif self.thinking:
            message = STYLES[self.thinking](text)
        await _send_json(send, 200, _completion(self.model, asked, text, message, finish))

    def _write(self, asked: Asked, call: Call) -> tuple[str, str]:
        """Text and finish of the reply, spoilt where its question meets a fault, which is noted in `call`."""
        if self.faults is not None and (asked.stage != "reason" or asked.entry.z):
            fault = self.faults.fault_of(asked.digest, asked.stage, barred_for(asked, self.oracle))
            if fault is not None and fault not in TRANSPORT:
                call.fault = fault
                return spoil(fault, asked, self.oracle)
            if fault is not None and asked.digest not in self._met:
                self._met.add(asked.digest)
                call.fault = fault
        return self.oracle.answer(asked), "stop"

    async def _break(self, send: Send, call: Call) -> None:
        if call.fault == "stall":
            await asyncio.sleep(self.stall_s)
        call.status = {"rate_limit": 429, "server_error": 500}.get(str(call.fault), 200)
        self.ledger.write("end", call)
        if call.fault == "rate_limit":
            wait = [(b"retry-after", b"%g" % self.retry_after_s), (b"retry-after-ms", b"%d" % round(1000 * self.retry_after_s))]
            await _send_error(send, 429, "too many requests; ask again later", "rate_limit_exceeded", wait)
        elif call.fault == "server_error":
            await _send_error(send, 500, "the server had an error; ask again", "server_error")
        else:
            # A reply that ends before its length makes uvicorn close the connection.
            await send({"type": "http.response.start", "status": 200, "headers": _headers(4096)})
            if call.fault == "cut":
                await send({"type": "http.response.body", "body": b'{"id": "chatcmpl-', "more_body": True})

    async def _refuse(self, send: Send, call: Call, status: int, message: str, code: str) -> None:
        self.ledger.write("start", call)
        call.status = status
        self.ledger.write("end", call)
        await _send_error(send, status, message, code)


def serve(
    root: Path | str,
    host: str = "127.0.0.1",
    port: int = 8040,
    *,
    model: str = MODEL,
    key: str | None = None,
    faults: Faults | None = None,
    latency: float = 0.0,
    log: Path | None = None,
    stall_s: float = 5.0,
    retry_after_s: float = 0.05,
    thinking: str = "",
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serves the scripted teacher of a folder until SIGINT or SIGTERM. Port 0 takes a free one.

    `latency`: seconds before each answer; `stall_s`: how long a stalled request is held; `retry_after_s`: what a 429 asks for.
    `thinking`: see TeacherApp. On a loopback address it answers to loopback names alone (DNS rebinding).
    `on_ready` is told the base URL when the socket listens. Raises InputError where the address cannot be had or an option is
    bad, DataError for a broken folder.
    """
    import uvicorn

    if latency < 0 or stall_s < 0 or retry_after_s < 0:
        raise InputError(f"latency {latency}, stall {stall_s}, retry-after {retry_after_s}: seconds, each of at least 0")
    if thinking not in ("", "cut", *STYLES):
        raise InputError(f"thinking is {thinking!r}; choose one of cut, {', '.join(STYLES)}, or none")
    app = TeacherApp(Oracle(root), Ledger(log), model, key, faults, latency, stall_s, retry_after_s, thinking)
    gc.freeze()  # what was learnt stays; collecting it over and over would delay answers
    try:
        listener = socket.create_server((host, port), backlog=2048)
    except OSError as error:
        raise InputError(f"{host}:{port} cannot be listened on: {error.strerror or error}; choose another port") from error
    url = f"http://{host}:{listener.getsockname()[1]}/v1"
    _LOG.info("the scripted teacher of %s (%d contents) is at %s", root, len(app.oracle), url)
    if on_ready is not None:
        on_ready(url)
    config = uvicorn.Config(
        Guard(app, Wall.of(host)), log_level=logging.CRITICAL, access_log=False, lifespan="off", timeout_graceful_shutdown=1,
        server_header=False, **settings(WireLimits(head_s=120.0)),
    )  # fmt: skip
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        app.ledger.close()


@contextmanager
def running(
    root: Path | str,
    *,
    model: str = MODEL,
    key: str | None = None,
    faults: Faults | None = None,
    latency: float = 0.0,
    log: Path | None = None,
    stall_s: float = 5.0,
    retry_after_s: float = 0.05,
    thinking: str = "",
) -> Iterator[str]:
    """The server in a process of its own on a free port; yields its base URL, and kills it in the end.

    Raises TeacherError with the server's last words where it does not start.
    """
    command = [sys.executable, "-m", __name__ if __name__ != "__main__" else "traceir.cot.scripted.teacher_server"]
    command += ["--data", str(root), "--port", "0", "--model", model, "--latency", str(latency)]
    command += ["--stall", str(stall_s), "--retry-after", str(retry_after_s), "--thinking", thinking]
    if faults is not None:
        command += ["--faults", str(faults.rate), "--fault-seed", str(faults.seed), "--kinds", ",".join(faults.kinds)]
    if log is not None:
        command += ["--log", str(log)]
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    if key is not None:
        environment[KEY_VARIABLE] = key
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            yield _wait_ready(process, key, errors)
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of the server; returns its exit status."""
    parser = argparse.ArgumentParser(prog="teacher_server", description="Serve the scripted teacher of an M-BEIR folder.")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder in M-BEIR's layout")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8040, help="0 takes a free one (default: 8040)")
    parser.add_argument("--model", default=MODEL, help=f"the name it answers to (default: {MODEL})")
    parser.add_argument("--key", default=None, help=f"the key it asks for (default: what {KEY_VARIABLE} holds, else none)")
    parser.add_argument("--faults", type=float, default=0.0, metavar="RATE", help="share of questions that meet a fault")
    parser.add_argument("--fault-seed", type=int, default=0, metavar="N")
    parser.add_argument("--kinds", default=",".join(ALL), help="faults to take, separated by commas (default: all)")
    parser.add_argument("--latency", type=float, default=0.0, metavar="S", help="seconds before each answer")
    parser.add_argument("--stall", type=float, default=5.0, metavar="S", help="seconds for which a stalled request is held")
    parser.add_argument("--retry-after", type=float, default=0.05, metavar="S", help="seconds that a 429 asks to wait")
    parser.add_argument("--thinking", default="", metavar="STYLE", help=f"send thoughts: cut, {', '.join(STYLES)}")
    parser.add_argument("--log", type=Path, default=None, metavar="FILE", help="append what is asked to this file")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        faults = Faults(options.faults, options.fault_seed, tuple(filter(None, options.kinds.split(","))))
        serve(
            options.data, options.host, options.port, model=options.model, key=options.key or os.environ.get(KEY_VARIABLE),
            faults=faults if faults.rate else None, latency=options.latency, log=options.log, stall_s=options.stall,
            retry_after_s=options.retry_after, thinking=options.thinking, on_ready=_announce,
        )  # fmt: skip
    except KeyboardInterrupt:
        return 130
    except TraceError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _announce(url: str) -> None:
    sys.stdout.write(f"{_READY}{url}\n")
    sys.stdout.flush()


def _wait_ready(process: subprocess.Popen[str], key: str | None, errors: Any) -> str:
    """The base URL, once the server has answered there."""
    line = process.stdout.readline() if process.stdout is not None else ""
    if not line.startswith(_READY):
        process.wait()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines() or ["nothing"]
        raise TeacherError(f"the scripted teacher did not start; its last words: {said[-1][:300]}")
    url = line.removeprefix(_READY).strip()
    address = url.removeprefix("http://").partition("/")[0]
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
        status = connection.getresponse().status
    except OSError as error:
        raise TeacherError(f"the scripted teacher at {url} does not answer: {error}; start it anew") from error
    finally:
        connection.close()
    if status != 200:
        raise TeacherError(f"the scripted teacher at {url} answers with status {status}; start it anew")
    return url


async def _read_body(receive: Receive) -> bytes | None:
    """The body, at most a little more than MOST_BYTES of it; None where the client left before its end."""
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > MOST_BYTES or not message.get("more_body", False):
            return b"".join(pieces)  # what is left is read by nobody and kept nowhere


def _parse(raw: bytes) -> dict[str, Any]:
    body = parse_json(raw)
    if not isinstance(body, dict):
        raise InputError("the body is not a JSON object")
    if body.get("stream"):
        raise InputError("stream is true; the scripted teacher answers in one piece, leave it out")
    return body


def _completion(model: str, asked: Asked, text: str, message: dict[str, Any], finish: str) -> dict[str, Any]:
    prompt = int(asked.words * WORD_TOKENS) + IMAGE_TOKENS * asked.images
    completion = int(len(text.split()) * WORD_TOKENS)
    return {
        "id": f"chatcmpl-{asked.key[:24]}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "refusal": None, **message},
                "logprobs": None,
                "finish_reason": finish,
            }
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    }


def _headers(length: int) -> list[tuple[bytes, bytes]]:
    return [(b"content-type", b"application/json"), (b"content-length", b"%d" % length)]


async def _send_json(send: Send, status: int, told: Any, more: Sequence[tuple[bytes, bytes]] = ()) -> None:
    content = json.dumps(told).encode()
    await send({"type": "http.response.start", "status": status, "headers": [*_headers(len(content)), *more]})
    await send({"type": "http.response.body", "body": content})


async def _send_error(send: Send, status: int, message: str, code: str, more: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """An error in OpenAI's shape."""
    kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
    kind = kinds.get(status, "invalid_request_error")
    await _send_json(send, status, {"error": {"message": message, "type": kind, "param": None, "code": code}}, more)


if __name__ == "__main__":
    sys.exit(main())
