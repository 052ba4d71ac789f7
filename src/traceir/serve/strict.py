"""FastAPI's routes, reading bodies strictly: `parse_json`, then the route's model, in a thread where that takes long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from traceir.errors import InputError
from traceir.index.store import MAX_ID_BYTES
from traceir.serve.bodies import MAX_TEXTS, parse_json
from traceir.serve.faults import fault_of, plain
from traceir.serve.schemas import ItemIn, ItemResult

LARGE: Final = 256 * 1024  # bytes of a body from which on it is read in a thread, so that other requests go on meanwhile


class UnreadableError(HTTPException):
    """A body, or a parameter, that breaks its schema; `location` is that of the first fault."""

    def __init__(self, reason: str, location: str = "") -> None:
        super().__init__(400, f"{location}: {reason}" if location else reason)
        self.location = location


class StrictRoute(APIRoute):
    """Set as `app.router.route_class` before any route is added."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        wanted = self.body_field.field_info.annotation if self.body_field is not None else None
        model = wanted if isinstance(wanted, type) and issubclass(wanted, BaseModel) else None

        class StrictRequest(Request):
            async def json(self) -> Any:
                """The body as an object of the route's model, which FastAPI then takes as it is."""
                raw = await self.body()
                return read_body(raw, model) if len(raw) < LARGE else await asyncio.to_thread(read_body, raw, model)

        async def strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


def read_body(raw: bytes, model: type[BaseModel] | None) -> Any:
    """Raises UnreadableError, since FastAPI hides every other exception of a body behind one message."""
    try:
        value = parse_json(raw, lenient=getattr(model, "each_alone", False), texts=getattr(model, "most_texts", MAX_TEXTS))
        return value if model is None else model.model_validate(value)
    except ValidationError as error:
        location, reason = fault_of(error.errors(include_url=False))
        raise UnreadableError(reason, location or "body") from error
    except InputError as error:
        raise UnreadableError(str(error)) from error


def read_items(entries: Sequence[object]) -> list[ItemIn | ItemResult]:
    """Each item as it is meant, or its failure; of several with one id the first counts."""
    seen: set[str] = set()
    items: list[ItemIn | ItemResult] = []
    for entry in entries:
        item: ItemIn | ItemResult
        try:
            item = ItemIn.model_validate(entry)
        except ValidationError as error:
            location, reason = fault_of(error.errors(include_url=False))
            id = entry.get("id") if isinstance(entry, dict) else None
            shown = plain(id)[:MAX_ID_BYTES] if isinstance(id, str) else None
            item = ItemResult(id=shown, status="failed", error=f"{location}: {reason}" if location else reason)
        if item.id in seen:
            item = ItemResult(id=item.id, status="failed", error=f"id {item.id!r} occurs twice in one request; send it once")
        elif isinstance(item, ItemIn):
            seen.add(item.id)
        items.append(item)
    return items
