"""Starts the server: model and index into one application, behind its middleware, on one address."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import webbrowser
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from traceir.errors import InputError
from traceir.index import open_index
from traceir.index.store import Index
from traceir.retrieval.cutoff import Calibrations
from traceir.retrieval.search import EncoderLike
from traceir.serve.access import TOGETHER, KeyMiddleware
from traceir.serve.app import Server, create_app
from traceir.serve.bodies import BodyMiddleware
from traceir.serve.config import ServeConfig
from traceir.serve.connections import possible_connections, settings
from traceir.serve.fair import FairExecutor
from traceir.serve.fetch import Fetcher
from traceir.serve.metrics import Counted, Metrics
from traceir.serve.scheduler import Scheduler
from traceir.serve.security import AccessRules, SecurityMiddleware
from traceir.serve.service import Service
from traceir.serve.tenants import TenantIndex, TenantPresence
from traceir.serve.uploads import ImageFolder, Sources, UploadValidator

if TYPE_CHECKING:
    from traceir.retrieval.rerank import Reranker

log = logging.getLogger(__name__)
SWITCH_S: Final = 0.00005
"""How long another thread may keep the model's thread from the interpreter; Python's default of 5 ms is longer than a step of a
small model."""
LOOKED_AT: Final = 20_000  # items looked at for the folders of their images


def make_server(config: ServeConfig, load: Callable[[], EncoderLike]) -> Server:
    """The server of a configuration; the model is loaded when it starts, while /health already answers."""
    return Server(config, partial(_make_service, config, load))


def make_application(config: ServeConfig, server: Server) -> Any:
    """The ASGI application behind its middleware."""
    together = min(TOGETHER, possible_connections() // 2)
    keyed = KeyMiddleware(BodyMiddleware(create_app(server)), server.keys, server.limits, server.audit, together)
    rules = AccessRules.of(config.host, hosts=config.allow_hosts, origins=config.cors)
    return Counted(SecurityMiddleware(keyed, rules), server.metrics)


def serve(
    config: ServeConfig, load: Callable[[], EncoderLike], announce: Callable[[str], None], *, open_browser: bool = False
) -> None:
    """Serves until SIGINT or SIGTERM; what is under way then ends first. Raises InputError where the address cannot be had."""
    import uvicorn

    server = make_server(config, load)
    v6 = ":" in config.host
    try:
        family = socket.AF_INET6 if v6 else socket.AF_INET
        listener = socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        address = f"{config.host}:{config.port}"
        raise InputError(f"{address} cannot be listened on: {error.strerror or error}; choose another") from error
    url = f"http://{f'[{config.host}]' if v6 else config.host}:{listener.getsockname()[1]}/"
    announce(f"serving at {url}")
    if open_browser:
        webbrowser.open(url)
    options = uvicorn.Config(
        make_application(config, server), log_level="warning", access_log=False, server_header=False, date_header=False,
        timeout_graceful_shutdown=round(config.deadline_s) + 5, proxy_headers=False, **settings(),
    )  # fmt: skip
    running = uvicorn.Server(options)
    server.on_failure = partial(setattr, running, "should_exit", True)
    sys.setswitchinterval(SWITCH_S)
    try:
        running.run(sockets=[listener])
    finally:
        if server.audit is not None:
            server.audit.close()
    if server.failed is not None:
        raise server.failed


async def _make_service(config: ServeConfig, load: Callable[[], EncoderLike], metrics: Metrics) -> Service:
    asyncio.get_running_loop().set_default_executor(FairExecutor(2, "aside"))
    encoder = await asyncio.to_thread(load)
    index = await asyncio.to_thread(open_index, config.index, encoder, create=True)  # refuses that of another model
    presence, calibrations = TenantPresence(index), Calibrations()
    # The first to search does not wait until all vectors are in memory, nor until the tenants are counted.
    await asyncio.to_thread(index.search, np.eye(1, encoder.width, dtype=np.float32), 1)
    await asyncio.to_thread(presence.any)
    if config.cutoff is not None:  # raises where it cannot be had, and spares the first to search the wait
        everybody = calibrations.of(None, TenantIndex(index, None, presence))
        await asyncio.to_thread(everybody.thresholds, "text", None, config.cutoff)
    reranker = await asyncio.to_thread(_load_reranker, config.rerank, encoder) if config.rerank else None
    store = ImageFolder(config.uploads.resolve() if config.uploads else Path(config.index).resolve() / "pictures")
    if config.uploads is None and store.folder.is_dir():
        collecting = asyncio.ensure_future(asyncio.to_thread(store.collect_garbage, (stored.image for stored in index.scan())))
        collecting.add_done_callback(_log_removed)
    folders = (store.folder, *(config.images or await asyncio.to_thread(image_folders, index)))
    uploads = UploadValidator()
    fetcher = Fetcher(config.fetch_hosts, validator=uploads) if config.fetch_hosts else None
    scheduler = Scheduler(encoder, capacity=config.capacity, writing=config.writing, remembered=config.remembered)
    scheduler.start()
    log.info("%s is ready, images from %d folders", config.index, len(folders))
    return Service(
        scheduler, index, uploads, Sources(index, folders, fetcher), store, FairExecutor(4, "reader"),
        FairExecutor(1, "writer"), presence, metrics, config.deadline_s, config.cutoff, calibrations,
        reranker=reranker, reranking=FairExecutor(1, "reranker") if reranker else None,
    )  # fmt: skip


def _load_reranker(name: str, encoder: EncoderLike) -> Reranker:
    """On the device of the encoder's model, where it is in this process."""
    from traceir.retrieval.rerank import load_reranker

    return load_reranker(name, encoder, device=str(getattr(getattr(encoder, "model", None), "device", "cpu")))


def _log_removed(done: asyncio.Future[int]) -> None:
    if done.cancelled() or (error := done.exception()) is not None:
        log.warning("images that no item names were not looked for: %s", "stopped" if done.cancelled() else error)
    elif done.result():
        log.info("removed %d images that no item names", done.result())


def image_folders(index: Index) -> tuple[Path, ...]:
    """The folders of the images that the first items of an index name; says so where it holds more items."""
    items = index.scan()
    named = {Path(stored.image).parent for stored in islice(items, LOOKED_AT) if stored.image}
    if next(items, None) is not None:
        log.warning("only the first %d items were looked at for folders of images; give --images DIR", LOOKED_AT)
    return tuple(sorted(folder for folder in named if folder.is_dir()))
