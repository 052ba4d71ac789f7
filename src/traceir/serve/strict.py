"""FastAPI's routes, reading their bodies with `parse_json`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from traceir.errors import InputError
from traceir.serve.bodies import parse_json

LARGE: Final = 256 * 1024
"""Bytes of a body from which on it is parsed in a thread, so that other requests go on meanwhile."""


class StrictRoute(APIRoute):
    """Set as `app.router.route_class` before any route is added."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return strict


class _StrictRequest(Request):
    async def json(self) -> Any:
        raw = await self.body()
        try:
            return parse_json(raw) if len(raw) < LARGE else await asyncio.to_thread(parse_json, raw)
        except InputError as error:
            # FastAPI hides every other exception of a body behind one message.
            raise HTTPException(400, str(error)) from error
