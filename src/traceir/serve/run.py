"""Starts the server: model and index into one application, behind its wall, on one address."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import webbrowser
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from traceir.encoder import Encoder
from traceir.engines.sglang import SGLangEncoder
from traceir.errors import InputError
from traceir.index import open_index_of
from traceir.index.store import Index
from traceir.serve.app import Server, create_app
from traceir.serve.audit import AuditLog
from traceir.serve.bodies import BodyGuard
from traceir.serve.fetch import Fetcher
from traceir.serve.gate import KeyGate, Limits
from traceir.serve.guard import Guard, Wall
from traceir.serve.intake import Intake, Sources
from traceir.serve.keys import KeyRing
from traceir.serve.limits import Rate
from traceir.serve.metrics import Counted, Metrics
from traceir.serve.page import read_instructions
from traceir.serve.picture_store import PictureStore
from traceir.serve.scheduler import Scheduler
from traceir.serve.service import Service
from traceir.serve.tenants import Census

log = logging.getLogger(__name__)
DISTRIBUTED: Final = ("milvus-lite:", "http://", "https://")
LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
SWITCH_S: Final = 0.0005
"""Seconds that another thread may keep the model's waiting for the interpreter; Python's own 5 ms would be more than a step of a
small model takes."""
LOOKED_AT: Final = 20_000
"""Items looked at for the folders of their pictures."""


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """How a server runs.

    `pictures`: folders whose pictures may be shown; () is those of the items that are in the index at the start. `uploads`: where
    pictures that clients send are kept, by default the index's own folder. `remembered`: encodings kept by content.
    `fetch_hosts`: hosts that pictures may be fetched from. Rates are requests a minute of one key or address.
    """

    index: str
    host: str = "127.0.0.1"
    port: int = 8080
    keys: Path | None = None
    pictures: tuple[Path, ...] = ()
    uploads: Path | None = None
    allow_hosts: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    fetch_hosts: tuple[str, ...] = ()
    requests_per_minute: int = 6_000
    capacity: int = 512
    writing: int = 64
    remembered: int = 8192
    deadline_s: float = 60.0
    model_name: str = "traceir"
    title: str = "TraceIR"
    instructions: Path | None = None
    inputs_per_minute: int = 60_000
    audit: Path | None = None
    audit_contents: bool = False

    def __post_init__(self) -> None:
        if self.keys is None and self.host not in LOOPBACK:
            raise InputError(
                f"--host {self.host} is not this machine alone, and there are no keys; make some with `traceir keys add` and "
                "give --keys FILE, or listen on 127.0.0.1"
            )
        if not 0 <= self.port < 2**16:
            raise InputError(f"port {self.port} does not exist; give 0 (a free one) to 65535")
        if self.uploads is None and self.index.startswith(DISTRIBUTED):
            raise InputError(f"--index {self.index} is no folder that could hold the pictures clients send; give --uploads DIR")
        if self.deadline_s <= 0:
            raise InputError(f"the deadline is {self.deadline_s:g} s; give more than 0")


def make_server(config: ServeConfig, load: Callable[[], Encoder | SGLangEncoder]) -> Server:
    """The server of a configuration; the model is loaded when it starts, while /health already answers."""

    async def make() -> Service:
        return await _make_service(config, load, server.metrics)

    keys = KeyRing(config.keys) if config.keys else None
    server = Server(make, keys, model_name=config.model_name, title=config.title)
    if config.instructions:
        server.instructions = read_instructions(config.instructions)
    server.limits = Limits(Rate(config.requests_per_minute), Rate(config.inputs_per_minute, burst=2000))
    if config.audit:
        server.audit = audit = AuditLog(config.audit, contents=config.audit_contents)
        server.metrics.count_dropped(lambda: audit.dropped)
    return server


def make_application(config: ServeConfig, server: Server) -> Any:
    """The ASGI application behind its wall."""
    inside = BodyGuard(create_app(server))
    gate = KeyGate(inside, server.keys, server.limits or Limits(), server.audit)
    return Counted(Guard(gate, Wall.of(config.host, hosts=config.allow_hosts, origins=config.cors)), server.metrics)


def serve(
    config: ServeConfig,
    load: Callable[[], Encoder | SGLangEncoder],
    announce: Callable[[str], None],
    *,
    open_browser: bool = False,
) -> None:
    """Serves until SIGINT or SIGTERM; what is under way then ends first. Raises InputError where the address cannot be had."""
    import uvicorn

    server = make_server(config, load)
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        listener = socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(
            f"{config.host}:{config.port} cannot be listened on: {error.strerror or error}; choose another"
        ) from error
    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"http://{host}:{listener.getsockname()[1]}/"
    announce(f"serving at {url}")
    if open_browser:
        webbrowser.open(url)
    options = uvicorn.Config(
        make_application(config, server), log_level="warning", access_log=False, server_header=False, date_header=False,
        timeout_graceful_shutdown=round(config.deadline_s) + 5, timeout_keep_alive=30, proxy_headers=False,
        h11_max_incomplete_event_size=64 * 1024, ws="none",
    )  # fmt: skip
    running = uvicorn.Server(options)
    sys.setswitchinterval(SWITCH_S)

    def stop() -> None:
        running.should_exit = True

    server.on_failure = stop
    try:
        running.run(sockets=[listener])
    finally:
        if server.audit is not None:
            server.audit.close()
    if server.failed is not None:
        raise server.failed


async def _make_service(config: ServeConfig, load: Callable[[], Encoder | SGLangEncoder], metrics: Metrics) -> Service:
    encoder = await asyncio.to_thread(load)
    index = await asyncio.to_thread(open_index_of, encoder, config.index, create=True)  # refuses that of another model
    census = await asyncio.to_thread(_warm, index, encoder.width)
    store = PictureStore(_uploads(config))
    if config.uploads is None and store.folder.is_dir():
        sweeping = asyncio.ensure_future(asyncio.to_thread(store.sweep, (stored.image for stored in index.scan())))
        sweeping.add_done_callback(_swept)
    folders = (store.folder, *(config.pictures or await asyncio.to_thread(picture_folders, index)))
    intake = Intake()
    fetcher = Fetcher(config.fetch_hosts, intake=intake) if config.fetch_hosts else None
    scheduler = Scheduler(encoder, capacity=config.capacity, writing=config.writing, remembered=config.remembered)
    scheduler.start()
    log.info("%s is ready, pictures from %d folders", config.index, len(folders))
    return Service(
        scheduler, index, intake, Sources(index, folders, fetcher), store, ThreadPoolExecutor(4, "reader"),
        ThreadPoolExecutor(1, "writer"), census, metrics, config.deadline_s,
    )  # fmt: skip


def _warm(index: Index, width: int) -> Census:
    """Searches once, so that the first to ask does not wait until all vectors are in memory."""
    index.search(np.eye(1, width, dtype=np.float32), 1)
    census = Census(index)
    census.any()
    return census


def _swept(done: asyncio.Future[int]) -> None:
    if done.cancelled() or (error := done.exception()) is not None:
        log.warning("pictures that no item names were not looked for: %s", "stopped" if done.cancelled() else error)
    elif done.result():
        log.info("threw away %d pictures that no item names", done.result())


def picture_folders(index: Index) -> tuple[Path, ...]:
    """The folders of the pictures that the first items of an index name; says so where it holds more items."""
    items = index.scan()
    named = {Path(stored.image).parent for stored in islice(items, LOOKED_AT) if stored.image}
    if next(items, None) is not None:
        log.warning("only the first %d items were looked at for folders of pictures; give --pictures DIR", LOOKED_AT)
    return tuple(sorted(folder for folder in named if folder.is_dir()))


def _uploads(config: ServeConfig) -> Path:
    """Where uploaded pictures lie: in the index's folder, or where the operator said."""
    return config.uploads.resolve() if config.uploads else Path(config.index).resolve() / "pictures"
