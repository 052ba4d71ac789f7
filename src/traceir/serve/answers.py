"""What the server answers: errors in OpenAI's shape, and models as JSON, made in a thread where that takes long."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from traceir.errors import DataError, InputError, ModelError, StoreError, TraceError
from traceir.serve.faults import fault_of
from traceir.serve.guard import kind_of
from traceir.serve.jobs import BusyError, LateError, UnavailableError
from traceir.serve.limits import retry_after
from traceir.serve.strict import LARGE, UnreadableError

log = logging.getLogger(__name__)
STATUS: Final[tuple[tuple[type[Exception], int], ...]] = (
    (BusyError, 429),
    (LateError, 408),
    (InputError, 400),
    (DataError, 400),
    (StoreError, 503),
    (UnavailableError, 503),
    (ModelError, 500),
    (TraceError, 500),
)


class Refused(HTTPException):
    """A request that is not served, with a code for programs; `wait` in seconds becomes Retry-After."""

    def __init__(self, status: int, message: str, code: str, wait: float = 0.0) -> None:
        headers = {"Retry-After": retry_after(wait)} if wait else {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, message, headers)
        self.code = code


def add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def unreadable(_: Request, error: RequestValidationError) -> JSONResponse:
        place, reason = fault_of(error.errors(), skipped=1)
        return error_response(400, f"{place or 'body'}: {reason}", param=place or None)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        code = error.code if isinstance(error, Refused) else None
        param = error.place or None if isinstance(error, UnreadableError) else None
        return error_response(error.status_code, str(error.detail), param=param, code=code, headers=error.headers)

    @app.exception_handler(TraceError)
    async def failed(_: Request, error: TraceError) -> JSONResponse:
        return of_error(error)

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> JSONResponse:  # Starlette raises it again, so it is logged
        return error_response(500, "the server failed; its log says why")


def of_error(error: TraceError) -> JSONResponse:
    """The response to an error of ours."""
    status = next(status for type_, status in STATUS if isinstance(error, type_))
    if status >= 500:
        log.error("%s: %s", type(error).__name__, error)
    headers = {"Retry-After": retry_after(error.retry_after_s)} if isinstance(error, BusyError) else None
    told = str(error)[:2000] if status < 500 else "the server cannot do this now; its log says why"
    return error_response(status, told, headers=headers)


def error_response(
    status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Any = None
) -> JSONResponse:
    """An error in OpenAI's shape."""
    told = {"message": message, "type": kind_of(status), "param": param, "code": code}
    return JSONResponse({"error": told}, status_code=status, headers=headers)


async def in_json(answer: Callable[[], BaseModel], size: int) -> Response:
    """An answer of about so many bytes as JSON; a large one is made in a thread, so that other requests go on meanwhile."""

    def make() -> bytes:
        return answer().model_dump_json().encode()

    return Response(make() if size < LARGE else await asyncio.to_thread(make), media_type="application/json")
