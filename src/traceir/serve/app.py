"""The HTTP interface: routes, and server-sent events. What is done is in service.py."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, TypeVar

import numpy as np
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from traceir import __version__
from traceir.errors import InputError, TraceError
from traceir.serve.answers import Refused, add_errors, in_json, of_error
from traceir.serve.audit import AuditLog
from traceir.serve.gate import Asked, Limits, scope_needed
from traceir.serve.jobs import Progress, Served
from traceir.serve.keys import KeyRing, Principal, Scope
from traceir.serve.limits import retry_after
from traceir.serve.metrics import Metrics
from traceir.serve.page import LOOKED_AT, STATIC, page_config, page_html
from traceir.serve.schemas import (
    EVENTS,
    FOR_BODIES,
    FOR_CALLERS,
    FOR_KEYS,
    FOR_WRITERS,
    JPEG,
    MAX_K,
    MAX_OFFSET,
    METRICS,
    MISSING,
    NOT_READY,
    WALL,
    CutoffConfig,
    Deleted,
    EmbeddingOut,
    EmbeddingsIn,
    EmbeddingsOut,
    IdsIn,
    ItemOut,
    ItemPage,
    ItemsIn,
    ItemsOut,
    ModelOut,
    ModelsOut,
    PageConfig,
    SearchIn,
    SearchOut,
    Status,
    Usage,
    trace_of,
)
from traceir.serve.service import Noted, Service, id_in, item_out, size_in_json
from traceir.serve.strict import StrictRoute
from traceir.serve.values import NO_ZERO, Id

log = logging.getLogger(__name__)
Told = TypeVar("Told")
CLOSE_S: Final = 5.0
"""Seconds for what is still under way once all requests have been answered or given up."""


@dataclass(slots=True)
class Server:
    """All that one server holds. `make` builds the service while /health already answers; where that fails, `failed` says why and
    `on_failure` is called."""

    make: Callable[[], Awaitable[Service]]
    keys: KeyRing | None = None
    metrics: Metrics = field(default_factory=Metrics)
    model_name: str = "traceir"
    title: str = "TraceIR"
    instructions: tuple[str, ...] | None = None
    service: Service | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    failed: Exception | None = None
    limits: Limits | None = None
    audit: AuditLog | None = None
    on_failure: Callable[[], None] = lambda: None

    async def load(self) -> None:
        try:
            self.service = await self.make()
        except Exception as error:
            self.failed = error
            self.on_failure()

    def ready(self) -> Service:
        if self.service is None:
            raise HTTPException(503, "the model is being loaded; ask again in a moment")
        return self.service

    def model(self) -> ModelOut:
        encoder = self.ready().scheduler.encoder
        return ModelOut(
            id=self.model_name, created=self.created, owned_by="traceir", fingerprint=encoder.fingerprint,
            prompt_version=encoder.prompt_version, width=encoder.width,
        )  # fmt: skip


def create_app(server: Server) -> FastAPI:
    """The application of one server. Safe-guards on the raw request (guard.py) go around it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(server.load())
        yield
        await asyncio.wait([loading])
        service, server.service = server.service, None
        if service is not None:
            await service.scheduler.close(CLOSE_S)
            for threads in (service.readers, service.writer):
                await asyncio.to_thread(threads.shutdown)
            service.index.close()

    app = FastAPI(
        title="TraceIR", version=__version__, summary="Universal multimodal retrieval that thinks when a query needs it.",
        lifespan=lifespan, redirect_slashes=False, docs_url=None, redoc_url=None, responses=WALL,
    )  # fmt: skip
    app.router.route_class = StrictRoute
    app.state.server = server
    add_errors(app)
    _add_status(app, server)
    _add_embeddings(app, server)
    _add_search(app, server)
    _add_items(app, server)
    _add_page(app, server)
    _complete(app.openapi(), keyed=server.keys is not None)
    for route in app.routes:  # after the document, which need not say that HEAD is GET without its body
        if isinstance(route, APIRoute) and route.methods and "GET" in route.methods:
            route.methods.add("HEAD")
    return app


def _complete(document: dict[str, Any], *, keyed: bool) -> None:
    """Writes into the OpenAPI document what the gates around the routes ask and answer."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            told = operation["responses"]
            told.pop("422", None)  # FastAPI's own answer to what breaks the schema; ours is 400
            scope = scope_needed(method.upper(), path)
            told |= FOR_BODIES if "requestBody" in operation else {}
            told |= FOR_WRITERS if method != "get" else {}
            told |= FOR_CALLERS if scope else {}
            if scope and keyed:
                told |= FOR_KEYS
                operation["security"] = [{"key": []}]
    parts = document["components"]
    del parts["schemas"]["HTTPValidationError"], parts["schemas"]["ValidationError"]
    if keyed:
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": "A key of `traceir keys add`."}}


def allowed(scope: Scope) -> Any:
    """A dependency: who asks, as KeyGate found it, where they may do this."""

    def check(request: Request) -> Principal:
        known: Principal = request.state.principal
        if not known.may(scope):
            raise Refused(403, f"the key {known.name!r} may not {scope}; ask for one with this scope", "forbidden")
        return known

    return Depends(check)


def _noted(request: Request) -> Noted | None:
    """What notes contents for the audit log, where it is on."""
    asked: Asked | None = getattr(request.state, "audit", None)
    return asked.add if asked is not None and request.app.state.server.audit is not None else None


def _note_ids(request: Request, ids: Sequence[str]) -> None:
    """Notes for the audit log what is removed."""
    asked: Asked | None = getattr(request.state, "audit", None)
    if asked is not None:
        asked.add_ids(ids)


def _pay(server: Server, principal: Principal, count: int) -> None:
    """Raises Refused where this key has embedded too much for now."""
    wait = server.limits.take_inputs(principal, count) if server.limits else 0.0
    if wait > 0:
        raise Refused(429, f"too many inputs; wait {retry_after(wait)} s", "too_many_inputs", wait)


def _view(server: Server, principal: Principal) -> Service:
    """The service as this caller sees it: over its tenant's items alone."""
    return server.ready().of_tenant(principal.tenant)


def _add_status(app: FastAPI, server: Server) -> None:
    @app.get("/health/", include_in_schema=False)
    @app.get("/health", tags=["status"])
    async def health() -> Status:
        """The process answers."""
        return Status(status="ok")

    @app.get("/ready/", include_in_schema=False)
    @app.get("/ready", tags=["status"], responses=NOT_READY)
    async def ready() -> Status:
        """The model is loaded and the index open; 503 until then."""
        if not server.ready().scheduler.alive:
            raise HTTPException(503, "the model fails at every input; the server's log says why")
        return Status(status="ready")

    @app.get("/metrics", tags=["status"], response_class=Response, responses=METRICS)
    async def metrics(principal: Annotated[Principal, allowed("read")]) -> Response:
        """Counters in Prometheus' text format."""
        if principal.tenant is not None:
            raise Refused(403, "the counters are of all tenants; ask with a key that has none", "forbidden")
        service = server.ready()
        info = await service.info()
        counts = {str(modality): count for modality, count in info.counts.items()}
        return Response(server.metrics.page(service.scheduler, counts), media_type="text/plain; version=0.0.4")


def _add_embeddings(app: FastAPI, server: Server) -> None:
    @app.get("/v1/models", tags=["embeddings"])
    async def models(principal: Annotated[Principal, allowed("read")]) -> ModelsOut:
        """The one model that this server runs."""
        return ModelsOut(data=[server.model()])

    @app.get("/v1/models/{id:path}", tags=["embeddings"], responses=MISSING)
    async def named(id: str, principal: Annotated[Principal, allowed("read")]) -> ModelOut:
        """The same by its name, as OpenAI's clients ask for it."""
        return _model(server, id)

    @app.post("/v1/embeddings", tags=["embeddings"], responses=MISSING, response_model=EmbeddingsOut)
    async def embeddings(asked: EmbeddingsIn, request: Request, principal: Annotated[Principal, allowed("read")]) -> Response:
        """Vectors of texts, pictures and pairs, as OpenAI gives them, with a `trace` beside each."""
        service, model = _view(server, principal), _model(server, asked.model)
        if asked.dimensions not in (None, model.width):
            raise InputError(
                f"dimensions is {asked.dimensions}, but the width of this server's vectors is {model.width} (`serve --dim`)"
            )
        given = asked.messages if asked.messages is not None else asked.input
        _pay(server, principal, len(given) if isinstance(given, list) else 1)
        served = await _while_connected(request, service.embed(asked, noted=_noted(request)))

        def answer() -> EmbeddingsOut:
            data = [_embedding(place, one, asked.encoding_format) for place, one in enumerate(served)]
            tokens = sum(one.prompt_tokens for one in served)
            usage = Usage(prompt_tokens=tokens, total_tokens=tokens + sum(one.encoding.tokens for one in served))
            return EmbeddingsOut(data=data, model=model.id, usage=usage)

        return await in_json(answer, len(served) * model.width * 12)


def _model(server: Server, name: str | None) -> ModelOut:
    """The server's model, which may be asked for by its name, its fingerprint, or not at all."""
    model = server.model()
    if name not in (None, model.id, model.fingerprint):
        raise Refused(404, f"the model {str(name)[:80]!r} is not here; ask for {model.id!r}", "model_not_found")
    return model


def _embedding(place: int, served: Served, form: str) -> EmbeddingOut:
    vector = served.encoding.vector
    shown = base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode() if form == "base64" else vector.tolist()
    return EmbeddingOut(index=place, embedding=shown, trace=trace_of(served))


def _add_search(app: FastAPI, server: Server) -> None:
    @app.post("/search", tags=["search"], response_model=SearchOut)
    async def search(asked: SearchIn, request: Request, principal: Annotated[Principal, allowed("read")]) -> Response:
        """The items nearest to a query of text, picture, both, or parts in reading order."""
        view, noted = _view(server, principal), _noted(request)
        found = await _while_connected(request, _searched(server, view, asked, noted=noted))
        return await in_json(lambda: found, size_in_json(found.hits))

    @app.post("/search/stream", tags=["search"], response_class=StreamingResponse, responses=EVENTS)
    async def stream(asked: SearchIn, request: Request, principal: Annotated[Principal, allowed("read")]) -> StreamingResponse:
        """As `/search`, with the reasoning as it is written: events `route`, `reasoning` (all so far), then `hits` or `error`."""
        view = _view(server, principal)
        return StreamingResponse(
            _events(server, view, asked, _noted(request)), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )


async def _searched(
    server: Server, service: Service, asked: SearchIn, listener: Callable[[Progress], None] | None = None,
    noted: Noted | None = None,
) -> SearchOut:  # fmt: skip
    found = await service.search(asked, listener=listener, noted=noted)
    server.metrics.searched(found.trace.seconds.search or 0.0)
    return found


async def _while_connected(request: Request, work: Coroutine[Any, Any, Told]) -> Told:
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


async def _events(server: Server, service: Service, asked: SearchIn, noted: Noted | None = None) -> AsyncIterator[str]:
    heard: asyncio.Queue[Progress | None] = asyncio.Queue()
    task = asyncio.ensure_future(_searched(server, service, asked, heard.put_nowait, noted))
    task.add_done_callback(lambda _: heard.put_nowait(None))
    told_route = False
    try:
        while (progress := await heard.get()) is not None:
            if not told_route:
                told_route = True
                yield _event("route", {"route": progress.route, "emb_probability": progress.emb_probability})
            if progress.reasoning:
                yield _event("reasoning", {"text": progress.reasoning})
        try:
            found = task.result()
        except TraceError as error:
            yield _event("error", json.loads(bytes(of_error(error).body)))
            return
        except Exception:
            log.exception("a streamed search failed")
            yield _event(
                "error", {"error": {"message": "the server failed", "type": "server_error", "param": None, "code": None}}
            )
            return
        if not told_route:
            yield _event("route", {"route": found.trace.route, "emb_probability": found.trace.emb_probability})
        if found.trace.reasoning:
            yield _event("reasoning", {"text": found.trace.reasoning})
        yield _event("hits", await asyncio.to_thread(found.model_dump_json))
    finally:
        task.cancel()


def _event(name: str, told: str | Mapping[str, Any]) -> str:
    """`told`: an object, or its JSON."""
    return f"event: {name}\ndata: {told if isinstance(told, str) else json.dumps(told, ensure_ascii=False)}\n\n"


def _add_items(app: FastAPI, server: Server) -> None:
    @app.post("/items", tags=["items"])
    async def add(asked: ItemsIn, request: Request, principal: Annotated[Principal, allowed("write")]) -> ItemsOut:
        """Adds or replaces items; each has a result of its own, and what is added is on the disk."""
        _pay(server, principal, len(asked.items))
        adding = _view(server, principal).add(asked.items, noted=_noted(request))
        return ItemsOut(results=await _while_connected(request, adding))

    @app.get("/items", tags=["items"], response_model=ItemPage)
    async def page(
        principal: Annotated[Principal, allowed("read")],
        after: Annotated[str, Query(max_length=1024, pattern=NO_ZERO)] = "",
        offset: Annotated[int, Query(ge=0, le=MAX_OFFSET)] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_K)] = 100,
    ) -> Response:
        """Items in order of id, those up to `after` left out: give the last id of a page to get the next one."""
        items, more = await _view(server, principal).items(after, offset, limit)
        return await in_json(lambda: ItemPage(items=items, offset=offset, more=more), size_in_json(items))

    @app.delete("/items", tags=["items"])
    async def remove(asked: IdsIn, request: Request, principal: Annotated[Principal, allowed("write")]) -> Deleted:
        """Removes items; ids that are not there do not count."""
        _note_ids(request, asked.ids)
        return Deleted(deleted=await _view(server, principal).delete(asked.ids))

    @app.get("/items/{id:path}", tags=["items"], responses=MISSING, response_model=ItemOut)
    async def one(id: Id, principal: Annotated[Principal, allowed("read")]) -> Response:
        """What is kept of an item."""
        found = await _view(server, principal).item(id)
        if found is None:
            raise Refused(404, f"there is no item {id[:80]!r}", "not_found")
        shown = item_out(found)
        return await in_json(lambda: shown, size_in_json([shown]))

    @app.delete("/items/{id:path}", tags=["items"], responses=MISSING)
    async def remove_one(id: Id, principal: Annotated[Principal, allowed("write")]) -> Deleted:
        """Removes an item."""
        count = await _view(server, principal).delete([id])
        if not count:
            raise Refused(404, f"there is no item {id[:80]!r}", "not_found")
        return Deleted(deleted=count)

    @app.get("/pictures/{name}", tags=["items"], response_class=Response, responses=JPEG)
    async def image(
        name: str, principal: Annotated[Principal, allowed("read")], side: Annotated[int, Query(ge=16, le=2048)] = 2048
    ) -> Response:
        """The picture of an item, by the path that a hit gives, as JPEG; its longer side at most `side` pixels."""
        try:
            content = await _view(server, principal).jpeg(id_in(name), side)
        except InputError as error:
            raise Refused(404, str(error), "not_found") from error
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=300"})


def _add_page(app: FastAPI, server: Server) -> None:
    @app.get("/page/config", tags=["page"])
    async def config(principal: Annotated[Principal, allowed("read")]) -> PageConfig:
        """What the page shows before the first search."""
        view = _view(server, principal)
        info, kept = await view.info(), await view.first(LOOKED_AT)
        counts = {str(name): count for name, count in info.counts.items()}
        cutoff = CutoffConfig(default=view.cutoff, background=dict(info.background))
        world = getattr(view.scheduler.encoder, "world", None)
        return await asyncio.to_thread(
            page_config, server.title, server.model(), counts, kept, world=world, instructions=server.instructions,
            reasons=view.scheduler.reasons, cutoff=cutoff,
        )  # fmt: skip

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page_html(), media_type="text/html; charset=utf-8")

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
