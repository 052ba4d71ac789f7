"""The scripted teacher behind a real HTTP server that speaks OpenAI's chat completions, with faults on demand.

    python -m traceir.cot.scripted.teacher_server --data data/minibeir --port 8040 --faults 0.1 --log teacher.jsonl

What it was asked lies in an append-only log, so that it can be shown what a client paid for, and how often.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hashlib
import hmac
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from traceir.cot.scripted.oracle import ALL, STYLES, TRANSPORT, Faults, Oracle, ReadQuestion, barred_for, spoil, styled
from traceir.errors import InputError, TeacherError, TraceError
from traceir.serve.bodies import parse_json
from traceir.serve.connections import ConnectionLimits, settings
from traceir.serve.security import AccessRules, SecurityMiddleware

MODEL: Final = "scripted-oracle"
KEY_VARIABLE: Final = "TRACEIR_TEACHER_KEY"
MOST_BYTES: Final = 64 * 2**20
"""The largest body that is read."""
CODES: Final = {
    401: ("invalid_api_key", "authentication_error"),
    404: ("model_not_found", "invalid_request_error"),
    429: ("rate_limit_exceeded", "rate_limit_error"),
    500: ("server_error", "server_error"),
}
"""Status -> code and type of OpenAI's errors; of others it is an invalid request."""
IMAGE_TOKENS: Final = 85
WORD_TOKENS: Final = 1.3
_READY: Final = "listening on "


@dataclass(slots=True)
class ScriptedOptions:
    """How the scripted teacher is served, and the options of its command line: data, a folder in M-BEIR's layout; port, 0 takes a
    free one; key, what it asks for; faults, share of questions that meet one of kinds; latency, before each answer, stall, of a
    stalled one, retry-after, of a 429, in seconds; thinking, how thoughts are sent; log, a file to append what is asked to."""

    data: str = ""
    host: str = "127.0.0.1"
    port: int = 8040
    model: str = MODEL
    key: str = ""
    faults: float = 0.0
    fault_seed: int = 0
    kinds: str = ",".join(ALL)
    latency: float = 0.0
    stall: float = 5.0
    retry_after: float = 0.05
    thinking: str = ""
    log: str = ""

    def __post_init__(self) -> None:
        if min(self.latency, self.stall, self.retry_after) < 0:
            waits = f"latency {self.latency}, stall {self.stall}, retry-after {self.retry_after}"
            raise InputError(f"{waits}: seconds, each of at least 0")
        if self.thinking not in ("", *STYLES):
            raise InputError(f"thinking is {self.thinking!r}; choose one of {', '.join(STYLES)}, or none")


class RequestLog:
    """The append-only log of requests (docs/formats.md): JSON lines, each written whole at once; `paid`: a completion was made.

    The end is written before the first byte of the answer. A request without one was in flight when the server ended.
    """

    def __init__(self, path: str = "") -> None:
        self.requests, self._file = 0, -1
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o644)
            lines = Path(path).read_bytes().splitlines(keepends=True)
            self.requests = len(lines)  # no fewer than were numbered so far
            os.write(self._file, b"" if not lines or lines[-1].endswith(b"\n") else b"\n")

    def begin(self, key: str) -> dict[str, Any]:
        """What the log says of a new request; its number is never one of an earlier run on the same log."""
        self.requests += 1
        return {"request": self.requests, "key": key, "stage": "", "qids": (), "fault": None, "status": 0, "paid": False}

    def write(self, event: str, call: dict[str, Any], **more: Any) -> None:
        if self._file >= 0:
            os.write(self._file, json.dumps({"time": round(time.time(), 6), "event": event, **call, **more}).encode() + b"\n")


class ScriptedTeacher:
    """The ASGI application is `app`; `options` may be changed while it serves."""

    def __init__(self, oracle: Oracle, options: ScriptedOptions) -> None:
        self.oracle, self.options, self.log = oracle, options, RequestLog(options.log)
        kinds = tuple(filter(None, options.kinds.split(",")))
        self.faults = Faults(options.faults, options.fault_seed, kinds)
        self._met: set[str] = set()  # digests of the questions whose fault of transport has happened
        routes = [Route("/v1/models", self.models), Route("/v1/chat/completions", self.complete, methods=["POST"])]
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: self.failure})

    async def failure(self, _: Request, error: Exception) -> Response:
        """An error in OpenAI's shape."""
        assert isinstance(error, HTTPException)
        code, kind = CODES.get(error.status_code, ("invalid_request", "invalid_request_error"))
        about = {"message": error.detail, "type": kind, "param": None, "code": code}
        return JSONResponse({"error": about}, error.status_code, dict(error.headers or {}))

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        about = {"id": self.options.model, "object": "model", "created": 0, "owned_by": "traceir"}
        return JSONResponse({"object": "list", "data": [about]})

    async def complete(self, request: Request) -> Response:
        raw = await _read_body(request)
        call = self.log.begin(hashlib.sha256(raw).hexdigest())
        try:
            asked = self._read(request, raw)
            call |= {"key": asked.key, "stage": asked.stage, "qids": asked.known.qids}
            text, finish = self._write(asked, call)
        except (InputError, HTTPException) as error:
            failure = error if isinstance(error, HTTPException) else HTTPException(400, str(error))
            self.log.write("start", call)
            self.log.write("end", call, status=failure.status_code)
            raise failure from error
        self.log.write("start", call)
        await asyncio.sleep(self.options.latency)
        if call["fault"] in TRANSPORT:
            return await self._break(call)
        self.log.write("end", call, status=200, paid=True)
        finish = "length" if self.options.thinking == "cut" else finish
        return JSONResponse(_completion(self.options.model, asked, text, styled(self.options.thinking, text), finish))

    def _check_key(self, request: Request) -> None:
        key = self.options.key
        if key and not hmac.compare_digest(request.headers.get("authorization", "").encode(), f"Bearer {key}".encode()):
            raise HTTPException(401, "the API key is wrong or missing")

    def _read(self, request: Request, raw: bytes) -> ReadQuestion:
        self._check_key(request)
        if len(raw) > MOST_BYTES:
            raise HTTPException(413, f"the body is longer than {MOST_BYTES} bytes")
        body, model = parse_json(raw), self.options.model
        if not isinstance(body, dict) or body.get("stream"):
            raise InputError("the body is not a JSON object, or its stream is true; the scripted teacher answers in one piece")
        if body.get("model") != model:
            raise HTTPException(404, f"the model {str(body.get('model'))[:80]!r} does not exist; {model!r} is served")
        return self.oracle.read(body)

    def _write(self, asked: ReadQuestion, call: dict[str, Any]) -> tuple[str, str]:
        """Text and finish of the reply, spoilt where its question meets a fault, which is noted in `call`."""
        fault = None
        if asked.stage != "reason" or asked.known.z:
            fault = self.faults.fault_of(asked.digest, asked.stage, barred_for(asked, self.oracle))
        if fault in TRANSPORT:
            fault = None if asked.digest in self._met else fault
            self._met.add(asked.digest)
        call["fault"] = fault
        return (self.oracle.answer(asked), "stop") if fault is None or fault in TRANSPORT else spoil(fault, asked, self.oracle)

    async def _break(self, call: dict[str, Any]) -> Response:
        fault, wait = call["fault"], self.options.retry_after
        if fault == "stall":
            await asyncio.sleep(self.options.stall)
        status = {"rate_limit": 429, "server_error": 500}.get(fault, 200)
        self.log.write("end", call, status=status)
        if status == 429:
            raise HTTPException(429, "too many requests", {"retry-after": f"{wait:g}", "retry-after-ms": f"{1000 * wait:.0f}"})
        if status == 500:
            raise HTTPException(500, "the server had an error; ask again")
        # A reply that ends before its length makes uvicorn close the connection.
        piece = b'{"id": "chatcmpl-' if fault == "cut" else b""
        return StreamingResponse(iter([piece]), headers={"content-length": "4096"}, media_type="application/json")


def serve(options: ScriptedOptions, on_ready: Callable[[str], None] | None = None) -> None:
    """Serves the scripted teacher of a folder until SIGINT or SIGTERM. Port 0 takes a free one.

    On a loopback address it answers to loopback names alone (DNS rebinding). `on_ready` is told the base URL when the socket
    listens. Raises InputError where the address cannot be had, DataError for a broken folder.
    """
    import uvicorn

    teacher = ScriptedTeacher(Oracle(options.data), options)
    gc.freeze()  # what was learnt stays; collecting it over and over would delay answers
    try:
        listener = socket.create_server((options.host, options.port), backlog=2048)
    except OSError as error:
        address = f"{options.host}:{options.port}"
        raise InputError(f"{address} cannot be listened on: {error.strerror or error}; choose another port") from error
    url = f"http://{options.host}:{listener.getsockname()[1]}/v1"
    logging.getLogger(__name__).info("the scripted teacher of %s (%d contents) is at %s", options.data, len(teacher.oracle), url)
    if on_ready is not None:
        on_ready(url)
    config = uvicorn.Config(
        SecurityMiddleware(teacher.app, AccessRules.of(options.host)),
        log_level=logging.CRITICAL, access_log=False, lifespan="off",
        timeout_graceful_shutdown=1, server_header=False, **settings(ConnectionLimits(head_s=120.0)),
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listener])


@contextmanager
def running(root: Path | str, **options: Any) -> Iterator[str]:
    """The server, with these of ScriptedOptions, in a process of its own on a free port; yields its base URL, and kills it in the
    end. Raises TeacherError with the server's last words where it does not start."""
    chosen = asdict(ScriptedOptions(**options)) | {"data": root, "port": 0}
    key = chosen.pop("key")
    command = [sys.executable, "-m", "traceir.cot.scripted.teacher_server"]
    command += [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with tempfile.TemporaryFile() as errors:
        environment = {**os.environ, KEY_VARIABLE: key}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            line = process.stdout.readline() if process.stdout is not None else ""
            if not line.startswith(_READY):
                process.wait()
                errors.seek(0)
                last = (errors.read().decode(errors="replace").strip().splitlines() or ["nothing"])[-1]
                raise TeacherError(f"the scripted teacher did not start; its last words: {last[:300]}")
            yield line.removeprefix(_READY).strip()
        finally:
            process.kill()
            process.communicate()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of the server; returns its exit status."""
    about = f"{ScriptedOptions.__doc__} Ways of thinking: {', '.join(STYLES)}."
    parser = argparse.ArgumentParser(prog="teacher_server", description=about)
    for option in fields(ScriptedOptions):
        name, kind = f"--{option.name.replace('_', '-')}", {"int": int, "float": float}.get(str(option.type), str)
        parser.add_argument(name, type=kind, default=option.default, required=option.name == "data", help=f"({option.default})")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        options = ScriptedOptions(**vars(parser.parse_args(argv)))
        options.key = options.key or os.environ.get(KEY_VARIABLE, "")
        serve(options, lambda url: print(f"{_READY}{url}", flush=True))
    except KeyboardInterrupt:
        return 130
    except TraceError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


async def _read_body(request: Request) -> bytes:
    """The body, at most a little more than MOST_BYTES of it: what is left is read by nobody and kept nowhere."""
    raw = bytearray()
    async for piece in request.stream():
        raw += piece
        if len(raw) > MOST_BYTES:
            break
    return bytes(raw)


def _completion(model: str, asked: ReadQuestion, text: str, message: dict[str, Any], finish: str) -> dict[str, Any]:
    prompt = int(asked.words * WORD_TOKENS) + IMAGE_TOKENS * asked.images
    completion = int(len(text.split()) * WORD_TOKENS)
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    message = {"role": "assistant", "refusal": None, **message}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    about = {"id": f"chatcmpl-{asked.key[:24]}", "object": "chat.completion", "created": int(time.time()), "model": model}
    return about | {"choices": [choice], "usage": usage}


if __name__ == "__main__":
    sys.exit(main())
