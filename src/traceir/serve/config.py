"""How a server runs; wrong settings are reported before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from traceir.errors import InputError

DISTRIBUTED: Final = ("milvus-lite:", "http://", "https://")
LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """How a server runs.

    `images`: folders whose images may be shown; () is those of the items that are in the index at the start. `uploads`: where
    images that clients send are kept, by default the index's own folder. `remembered`: encodings kept by content.
    `fetch_hosts`: hosts that images may be fetched from. Rates are requests a minute of one key or address; `cutoff` is that of
    false alarms, of searches that state none; `rerank` names the reranker of searches that ask for it.
    """

    index: str
    host: str = "127.0.0.1"
    port: int = 8080
    keys: Path | None = None
    images: tuple[Path, ...] = ()
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
    cutoff: float | None = None
    rerank: str | None = None

    def __post_init__(self) -> None:
        if self.keys is None and self.host not in LOOPBACK:
            remedy = "make some with `traceir keys add` and give --keys FILE, or listen on 127.0.0.1"
            raise InputError(f"--host {self.host} is not this machine alone, and there are no keys; {remedy}")
        if not 0 <= self.port < 2**16:
            raise InputError(f"port {self.port} does not exist; give 0 (a free one) to 65535")
        if self.uploads is None and self.index.startswith(DISTRIBUTED):
            raise InputError(f"--index {self.index} is no folder that could hold the images clients send; give --uploads DIR")
        if self.cutoff is not None:
            from traceir.retrieval.cutoff import check_rate  # here, since it imports numpy

            check_rate(self.cutoff)
        if self.deadline_s <= 0:
            raise InputError(f"the deadline is {self.deadline_s:g} s; give more than 0")
