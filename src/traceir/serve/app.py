"""The HTTP interface: routes, server-sent events, errors in OpenAI's shape. The work is done in service.py."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import numpy as np
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from traceir import __version__
from traceir.errors import DataError, InputError, StoreError, TraceError
from traceir.serve import schemas
from traceir.serve.access import Limits, scope_needed
from traceir.serve.audit import AuditLog
from traceir.serve.config import ServeConfig
from traceir.serve.faults import fault_of
from traceir.serve.jobs import BusyError, LateError, Progress, Served, UnavailableError
from traceir.serve.keys import KeyRing, Principal
from traceir.serve.limits import Rate, retry_after
from traceir.serve.metrics import Metrics
from traceir.serve.page import LOOKED_AT, STATIC, page_config, read_instructions
from traceir.serve.security import kind_of
from traceir.serve.service import Service, id_in
from traceir.serve.strict import StrictRoute, UnreadableError

log = logging.getLogger(__name__)
Result = TypeVar("Result")
CLOSE_S: Final = 5.0  # seconds for what is still under way once all requests have been answered or given up
STATUS: Final[Mapping[type[TraceError], int]] = {
    BusyError: 429, LateError: 408, InputError: 400, DataError: 400, StoreError: 503, UnavailableError: 503, TraceError: 500,
}  # fmt: skip
"""The first that fits counts."""
OPENAPI: Final = json.loads((Path(__file__).parent / "openapi.json").read_text(encoding="utf-8"))
"""What FastAPI cannot derive: errors, which have OpenAI's shape, answers that are not JSON, and the keys."""


class Server:
    """All that one server holds. `make` builds the service while /health already answers; where that fails, `failed` says why and
    `on_failure` is called."""

    def __init__(self, config: ServeConfig, make: Callable[[Metrics], Awaitable[Service]]) -> None:
        self.config, self.metrics, self.created = config, Metrics(), int(time.time())
        self.make = partial(make, self.metrics)
        self.keys = KeyRing(config.keys) if config.keys else None
        self.instructions = read_instructions(config.instructions) if config.instructions else None
        self.limits = Limits(Rate(config.requests_per_minute), Rate(config.inputs_per_minute, burst=2000))
        self.audit = audit = AuditLog(config.audit, contents=config.audit_contents) if config.audit else None
        if audit is not None:
            self.metrics.count_dropped(lambda: audit.dropped)
        self.service: Service | None = None
        self.failed: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None

    async def load(self) -> None:
        try:
            self.service = await self.make()
        except Exception as error:  # told by whoever started the server, once it has ended
            self.failed = error
            self.on_failure()

    async def close(self) -> None:
        service, self.service = self.service, None
        if service is not None:
            await service.scheduler.close(CLOSE_S)
            for threads in filter(None, (service.readers, service.writer, service.reranking)):
                await asyncio.to_thread(threads.shutdown)
            service.index.close()

    def ready(self) -> Service:
        if self.service is None:
            raise HTTPException(503, "the model is being loaded; ask again in a moment")
        return self.service

    def model(self, name: str | None = None) -> schemas.ModelOut:
        """The server's model, which may be asked for by its name, its fingerprint, or not at all."""
        encoder = self.ready().scheduler.encoder
        if name not in (None, self.config.model_name, encoder.fingerprint):
            raise Refused(404, f"the model {str(name)[:80]!r} is not here; ask for {self.config.model_name!r}", "model_not_found")
        return schemas.ModelOut(
            id=self.config.model_name, created=self.created, owned_by="traceir", fingerprint=encoder.fingerprint,
            prompt_version=encoder.prompt_version, width=encoder.width,
        )  # fmt: skip

    def width(self, dimensions: int | None) -> int:
        """The width of vectors that a client asks for; InputError for one that the model does not offer."""
        encoder = self.ready().scheduler.encoder
        offered = getattr(encoder, "widths", (encoder.width,))
        if dimensions not in (None, *offered):
            known = ", ".join(map(str, offered))
            raise InputError(
                f"dimensions is {dimensions}, but this server's vectors have {known} components; ask for one of these"
            )
        return dimensions or encoder.width

    def charge(self, principal: Principal, count: int) -> None:
        """Raises Refused where this key has embedded too much for now."""
        if (wait := self.limits.take_inputs(principal, count)) > 0:
            raise Refused(429, f"too many inputs; wait {retry_after(wait)} s", "too_many_inputs", wait)


class Refused(HTTPException):
    """A request that is not served, with a code for programs; `wait` in seconds becomes Retry-After."""

    def __init__(self, status: int, message: str, code: str, wait: float = 0.0) -> None:
        super().__init__(status, message, {"Retry-After": retry_after(wait)} if wait else None)
        self.code = code


def create_app(server: Server) -> FastAPI:
    """The application of one server. The middleware on the raw request goes around it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(server.load())
        yield
        await asyncio.wait([loading])
        await server.close()

    app = FastAPI(
        title="TraceIR", version=__version__, summary="Universal multimodal retrieval that thinks when a query needs it.",
        lifespan=lifespan, redirect_slashes=False, docs_url=None, redoc_url=None,
        responses=refusals(400, 413, 414, 415, 421, 431, 500),
    )  # fmt: skip
    app.router.route_class = StrictRoute
    app.state.server = server
    for add in (_add_errors, _add_status, _add_embeddings, _add_search, _add_items, _add_images, _add_page):
        add(app, server)
    _complete(app.openapi(), keyed=server.keys is not None)
    for route in app.routes:  # after the document, which need not say that HEAD is GET without its body
        if isinstance(route, APIRoute) and route.methods and "GET" in route.methods:
            route.methods.add("HEAD")
    return app


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Answers with an error, for the OpenAPI document."""
    return {str(status): OPENAPI["refusals"][str(status)] for status in statuses}


def _complete(document: dict[str, Any], *, keyed: bool) -> None:
    """Writes into the OpenAPI document what the middleware around the routes asks and answers."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            responses, scope = operation["responses"], scope_needed(method.upper(), path)
            responses.pop("422", None)  # FastAPI's own answer to what breaks the schema; ours is 400
            statuses = [408] if "requestBody" in operation else []
            statuses += [403] if method != "get" or (scope and keyed) else []
            statuses += [429, 503] if scope else []
            if scope and keyed:
                statuses.append(401)
                operation["security"] = [{"key": []}]
            responses |= refusals(*statuses)
    parts = document["components"]
    parts["schemas"] |= OPENAPI["schemas"]
    del parts["schemas"]["HTTPValidationError"], parts["schemas"]["ValidationError"]
    if keyed:
        parts["securitySchemes"] = OPENAPI["security"]


def _add_errors(app: FastAPI, _: Server) -> None:
    @app.exception_handler(RequestValidationError)
    async def unreadable(_: Request, error: RequestValidationError) -> JSONResponse:
        name, reason = fault_of(error.errors(), skipped=1)
        return error_response(400, f"{name or 'body'}: {reason}", param=name or None)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        code = error.code if isinstance(error, Refused) else None
        param = error.location or None if isinstance(error, UnreadableError) else None
        return error_response(error.status_code, str(error.detail), param=param, code=code, headers=error.headers)

    @app.exception_handler(TraceError)
    async def failed(_: Request, error: TraceError) -> JSONResponse:
        return of_error(error)

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> JSONResponse:  # Starlette raises it again, so it is logged
        return error_response(500, "the server failed; its log says why")


def of_error(error: TraceError) -> JSONResponse:
    """The response to an error of ours."""
    status = next(status for kind, status in STATUS.items() if isinstance(error, kind))
    if status >= 500:
        log.error("%s: %s", type(error).__name__, error)
    headers = {"Retry-After": retry_after(error.retry_after_s)} if isinstance(error, BusyError) else None
    shown = str(error)[:2000] if status < 500 else "the server cannot do this now; its log says why"
    return error_response(status, shown, headers=headers)


def error_response(
    status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error in OpenAI's shape."""
    error = {"message": message, "type": kind_of(status), "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


async def principal_of(request: Request) -> Principal:
    """Who asks, as KeyMiddleware found it, which has checked that they may."""
    known: Principal = request.state.principal
    return known


Caller = Annotated[Principal, Depends(principal_of)]


async def view_of(request: Request, principal: Caller) -> Service:
    """The service as this request sees it: over what belongs to the caller's tenant, noting contents where they are logged."""
    server: Server = request.app.state.server
    return server.ready().of_tenant(principal.tenant, request.state.audit.add if server.audit is not None else None)


View = Annotated[Service, Depends(view_of)]


def _json(content: str | bytes) -> Response:
    return Response(content, media_type="application/json")


async def _while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine, which is cancelled if the client goes away meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=0.25)
            if not task.done() and await request.is_disconnected():
                raise Refused(499, "the client has gone", "cancelled")
        return task.result()
    finally:
        task.cancel()


def _add_status(app: FastAPI, server: Server) -> None:
    @app.get("/health/", include_in_schema=False)
    @app.get("/health", tags=["status"])
    async def health() -> schemas.Status:
        """The process answers."""
        return schemas.Status(status="ok")

    @app.get("/ready/", include_in_schema=False)
    @app.get("/ready", tags=["status"], responses=refusals(503))
    async def ready() -> schemas.Status:
        """The model is loaded and the index open; 503 until then."""
        if not server.ready().scheduler.alive:
            raise HTTPException(503, "the model fails at every input; the server's log says why")
        return schemas.Status(status="ready")

    @app.get("/metrics", tags=["status"], response_class=Response, responses=OPENAPI["counters"])
    async def metrics(principal: Caller) -> Response:
        """Counters in Prometheus' text format."""
        if principal.tenant is not None:
            raise Refused(403, "the counters are of all tenants; ask with a key that has none", "forbidden")
        service = server.ready()
        info = await service.read(service.index.info)
        return Response(server.metrics.page(service.scheduler, info.counts), media_type="text/plain; version=0.0.4")


def _add_embeddings(app: FastAPI, server: Server) -> None:
    @app.get("/v1/models", tags=["embeddings"])
    async def models() -> schemas.ModelsOut:
        """The one model that this server runs."""
        return schemas.ModelsOut(data=[server.model()])

    @app.get("/v1/models/{id:path}", tags=["embeddings"], responses=refusals(404))
    async def named(id: str) -> schemas.ModelOut:
        """The same by its name, as OpenAI's clients ask for it."""
        return server.model(id)

    @app.post("/v1/embeddings", tags=["embeddings"], responses=refusals(404), response_model=schemas.EmbeddingsOut)
    async def embeddings(asked: schemas.EmbeddingsIn, request: Request, principal: Caller, view: View) -> Response:
        """Vectors of texts, images and pairs, as OpenAI gives them, with a `trace` beside each."""
        model = server.model(asked.model)
        width = server.width(asked.dimensions)
        inputs = asked.messages if asked.messages is not None else asked.input
        server.charge(principal, len(inputs) if isinstance(inputs, list) else 1)
        served = await _while_connected(request, view.embed(asked))
        return _json(await view.read(lambda: _embeddings(served, model.id, width, packed=asked.encoding_format == "base64")))


def _embeddings(served: list[Served], model: str, width: int, *, packed: bool) -> str:
    """An EmbeddingsOut in JSON, of vectors cut to `width`."""
    data: list[schemas.EmbeddingOut] = []
    for index, result in enumerate(served):
        vector = result.encoding.vector[:width]
        if width < len(result.encoding.vector):
            vector = vector / np.linalg.norm(vector)
        shown = base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode() if packed else vector.tolist()
        data.append(schemas.EmbeddingOut(index=index, embedding=shown, trace=schemas.Trace.of(result)))
    tokens = sum(result.prompt_tokens for result in served)
    usage = schemas.TokenUsage(prompt_tokens=tokens, total_tokens=tokens + sum(result.encoding.tokens for result in served))
    return schemas.EmbeddingsOut(data=data, model=model, usage=usage).model_dump_json()


def _add_search(app: FastAPI, server: Server) -> None:
    @app.post("/search", tags=["search"], response_model=schemas.SearchOut)
    async def search(asked: schemas.SearchIn, request: Request, view: View) -> Response:
        """The items nearest to a query of text, image, both, or parts in reading order."""
        _, answer = await _while_connected(request, view.search(asked))
        return _json(answer)

    @app.post("/search/stream", tags=["search"], response_class=StreamingResponse, responses=OPENAPI["events"])
    async def stream(asked: schemas.SearchIn, view: View) -> StreamingResponse:
        """As `/search`, with the reasoning as it is written: events `route`, `reasoning` (all so far), then `hits` or `error`."""
        return StreamingResponse(_events(view, asked), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _events(service: Service, asked: schemas.SearchIn) -> AsyncIterator[str]:
    heard: asyncio.Queue[Progress | None] = asyncio.Queue()
    task = asyncio.ensure_future(service.search(asked, heard.put_nowait))
    task.add_done_callback(lambda _: heard.put_nowait(None))
    first = True
    try:
        while (progress := await heard.get()) is not None:
            yield _progress(progress, first)
            first = False
        trace, answer = task.result()
        yield _progress(trace, first) + _event("hits", answer)
    except TraceError as error:
        yield _event("error", bytes(of_error(error).body).decode())
    except Exception:  # the status has been sent, so the error is told as an event
        log.exception("a streamed search failed")
        yield _event("error", bytes(error_response(500, "the server failed").body).decode())
    finally:
        task.cancel()


def _progress(progress: Progress | schemas.Trace, first: bool) -> str:
    route = {"route": progress.route, "emb_probability": progress.emb_probability}
    shown = _event("route", json.dumps(route)) if first else ""
    reasoning = json.dumps({"text": progress.reasoning}, ensure_ascii=False)
    return shown + (_event("reasoning", reasoning) if progress.reasoning else "")


def _event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"


def _add_items(app: FastAPI, server: Server) -> None:
    @app.post("/items", tags=["items"])
    async def add(asked: schemas.ItemsIn, request: Request, principal: Caller, view: View) -> schemas.ItemsOut:
        """Adds or replaces items; each has a result of its own, and what is added is on the disk."""
        server.charge(principal, len(asked.items))
        return schemas.ItemsOut(results=await _while_connected(request, view.add(asked.items)))

    @app.get("/items", tags=["items"], response_model=schemas.ItemPage)
    async def page(
        view: View,
        where: Annotated[str, Query(max_length=schemas.MAX_QUERY, pattern=schemas.NO_ZERO)] = "",
        sort: Annotated[str, Query(min_length=1, max_length=schemas.MAX_QUERY, pattern=schemas.NO_ZERO)] = "id",
        after: Annotated[str, Query(max_length=schemas.MAX_QUERY, pattern=schemas.NO_ZERO)] = "",
        offset: Annotated[int, Query(ge=0, le=schemas.MAX_OFFSET)] = 0,
        limit: Annotated[int, Query(ge=1, le=schemas.MAX_K)] = 100,
    ) -> Response:
        """Items that pass `where`, in order of id or of another field (`sort`, `-sort`), those up to `after`, which is the `next`
        of the page before, left out. In order of id it may be any id."""
        return _json(await view.read(lambda: view.items(where, sort, after, offset, limit)))

    @app.delete("/items", tags=["items"])
    async def remove(asked: schemas.IdsIn, request: Request, view: View) -> schemas.Deleted:
        """Removes items; ids that are not there do not count."""
        request.state.audit.add_ids(asked.ids)
        return schemas.Deleted(deleted=await view.write(lambda: view.delete(asked.ids)))

    @app.get("/items/{id:path}", tags=["items"], responses=refusals(404), response_model=schemas.ItemOut)
    async def one(id: schemas.Id, view: View) -> Response:
        """What is kept of an item."""
        if (shown := await view.read(lambda: view.item(id))) is None:
            raise Refused(404, f"there is no item {id[:80]!r}", "not_found")
        return _json(shown)

    @app.delete("/items/{id:path}", tags=["items"], responses=refusals(404))
    async def remove_one(id: schemas.Id, view: View) -> schemas.Deleted:
        """Removes an item."""
        if not (count := await view.write(lambda: view.delete([id]))):
            raise Refused(404, f"there is no item {id[:80]!r}", "not_found")
        return schemas.Deleted(deleted=count)


def _add_images(app: FastAPI, server: Server) -> None:
    """What the page shows of a collection beside its items."""

    @app.get("/v1/facets", tags=["items"], response_model=schemas.FacetsOut)
    async def facets(principal: Caller, view: View) -> Response:
        """The fields of all items, with ranges and commonest values, to choose filters from."""
        return _json(await view.read(lambda: view.facets.of(principal.tenant, view.index)))

    @app.post("/v1/pictures", tags=["items"])
    async def check(asked: schemas.PictureIn, view: View) -> schemas.PictureOut:
        """Whether an image can be searched with, told by its header; nothing is kept."""
        width, height = await view.size_of_image(asked.image)
        return schemas.PictureOut(width=width, height=height)

    @app.get("/pictures/{name}", tags=["items"], response_class=Response, responses=refusals(404) | OPENAPI["image"])
    async def image(name: str, view: View, side: Annotated[int, Query(ge=16, le=2048)] = 2048) -> Response:
        """The image of an item, by the path that a hit gives, as JPEG; its longer side at most `side` pixels."""
        try:
            content = await view.jpeg(id_in(name), side)
        except InputError as error:
            raise Refused(404, str(error), "not_found") from error
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=300"})


def _add_page(app: FastAPI, server: Server) -> None:
    @app.get("/page/config", tags=["page"])
    async def config(view: View) -> schemas.PageConfig:
        """What the page shows before the first search."""
        info = await view.read(view.index.info)
        kept = await view.read(lambda: list(islice(view.index.scan(), LOOKED_AT)))
        cutoff = schemas.CutoffConfig(default=view.cutoff, background=dict(info.background))
        world, reasons = getattr(view.scheduler.encoder, "world", None), view.scheduler.reasons
        about: dict[str, Any] = {"world": world, "instructions": server.instructions, "reasons": reasons, "cutoff": cutoff}
        return await view.read(lambda: page_config(server.config.title, server.model(), info.counts, kept, **about))

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return FileResponse(STATIC / "index.html", media_type="text/html; charset=utf-8")

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
