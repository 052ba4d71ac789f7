"""The outermost wall: what a connection may hold, and for how long, before there is a request and after its answer.

uvicorn's parsers bound neither a head nor a trailer while they come in, and wait for ever for a client that neither sends nor
reads. Here every connection is watched, whichever parser is installed: bytes that are no body, time without a whole head, answers
that are not taken, requests sent ahead, connections of one address and of all.
"""

from __future__ import annotations

import asyncio
import json
import resource
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any, Final, Literal

from traceir.serve.fair import Shares
from traceir.serve.guard import kind_of
from traceir.serve.limits import network_of

PIECE: Final = 16 * 1024
"""Bytes that a parser is given at a time, so that it never works through much that is refused."""
TICK_S: Final = 1.0
"""Seconds between two looks at all connections, by which deadlines are late at most."""
SPARE_FILES: Final = 256
"""File handles that connections leave to the index, pictures and logs."""
CONNECTIONS: Final = 2048


@dataclass(frozen=True, slots=True)
class WireLimits:
    """Bounds of one connection, and of all.

    `head`: bytes of a request line with its headers, of a trailer, of a chunk's own line, and of all the framing of a body beyond
    as many as the body has. `head_s`: seconds from the connection, or from the last answer, to the end of the next head. `unread`
    and `unread_s`: how much of a body, and how long, is thrown away after an early answer, so that a client that is still sending
    can read it. `write_s`: seconds in which a client must take 64 KiB of its answer. `ahead`: requests sent before an answer.
    """

    head: int = 64 * 1024
    head_s: float = 30.0
    unread: int = 32 * 1024 * 1024
    unread_s: float = 10.0
    write_s: float = 10.0
    ahead: int = 16
    connections: int = CONNECTIONS


def settings(limits: WireLimits | None = None, parser: Literal["httptools", "h11"] | None = None) -> dict[str, Any]:
    """What of `uvicorn.Config` makes this wall: its own protocol, watched. Without `parser` the faster one that is installed."""
    limits = limits or WireLimits()
    limits = replace(limits, connections=min(limits.connections, possible_connections()))
    watched = type("WatchedProtocol", (_Watched, _parser(parser)), {"watch": _Watch(limits)})
    return {"http": watched, "ws": "none", "h11_max_incomplete_event_size": limits.head + PIECE, "timeout_keep_alive": 3600}


def possible_connections() -> int:
    """CONNECTIONS, or fewer where the process may not open so many files; it asks for as many as it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS + SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return CONNECTIONS
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(2, soft - SPARE_FILES)


def _parser(name: str | None) -> type[asyncio.Protocol]:
    if name != "h11":
        try:
            from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
        except ImportError:
            if name is not None:
                raise
        else:
            return HttpToolsProtocol
    from uvicorn.protocols.http.h11_impl import H11Protocol

    return H11Protocol


class _Watch:
    """All connections of one server."""

    def __init__(self, limits: WireLimits) -> None:
        self.limits = limits
        self.connections: dict[_Watched, str] = {}
        self._shares = Shares(limits.connections)
        self._looking: asyncio.TimerHandle | None = None

    def add(self, one: _Watched, address: str) -> bool:
        """Whether there is room. Where there is none, a connection that waits for a request makes it: the one that has waited
        longest, of the same address where that has any."""
        if not self._shares.room(address):
            same = self._shares.of(address) > 0
            idle = [other for other, its in self.connections.items() if not other.busy and (its == address or not same)]
            if not idle:
                return False
            oldest = min(idle, key=lambda other: other.since)
            self.remove(oldest)
            oldest.abort()
        if not self._shares.take(address):
            return False
        self.connections[one] = address
        self._look_later()
        return True

    def remove(self, one: _Watched) -> None:
        if (address := self.connections.pop(one, None)) is not None:
            self._shares.give(address)

    def _look_later(self) -> None:
        if self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(TICK_S, self._look)

    def _look(self) -> None:
        self._looking = None
        now = asyncio.get_running_loop().time()
        for one in list(self.connections):
            one.look(now)
        if self.connections:
            self._look_later()


class _Watched(asyncio.Protocol):
    """Goes before one of uvicorn's protocols. A connection is `busy` with a request, or waits for the next head, or is
    `lingering`: it was answered, and what it still sends is thrown away unparsed."""

    watch: _Watch
    cycle: Any
    transport: asyncio.Transport
    lingering = False
    since = 0.0
    """When it began to wait or to linger."""
    _stuck: float | None = None
    """Since when too little of an answer is taken."""
    _closing: float | None = None
    _spent = _framing = _body = 0
    """Bytes since the last head or piece of a body; of this body: all that frames it, and its own."""
    _left = 0
    """Bytes that are still thrown away while it lingers."""

    @property
    def busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.since = asyncio.get_running_loop().time()
        peer = transport.get_extra_info("peername")
        if not self.watch.add(self, network_of(str(peer[0])) if isinstance(peer, tuple) else "local"):
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.watch.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        place = 0
        while place < len(data) and not self.transport.is_closing():
            if self.lingering:
                self._left -= len(data) - place
                if self._left < 0:
                    self.abort()
                return
            room = self.watch.limits.head - self._spent
            piece = data[place : place + min(PIECE, room)]
            place += len(piece)
            self._feed(piece)

    def _feed(self, piece: bytes) -> None:
        """Gives the parser a piece and counts what of it became body. A new cycle tells that a head is complete."""
        limits, cycle = self.watch.limits, self.cycle
        had, unfinished = (len(cycle.body), cycle.more_body) if cycle is not None else (0, False)
        super().data_received(piece)
        if self.cycle is not cycle:
            self._spent, self._framing, self._body = 0, 0, len(self.cycle.body)
        elif unfinished and not cycle.more_body:
            self._spent = self._framing = 0
        else:
            grown = len(cycle.body) - had if cycle is not None else 0
            self._spent = 0 if grown else self._spent + len(piece)
            self._framing += len(piece) - grown
            self._body += grown
        if len(getattr(self, "pipeline", ())) > limits.ahead:
            self.abort()
        elif self._spent >= limits.head or self._framing > limits.head + self._body:
            self._refuse(431, f"a request line with its headers has at most {limits.head} bytes", "headers_too_large")

    def on_response_complete(self) -> None:
        """uvicorn's hook at the end of an answer."""
        cycle = self.cycle
        behind: Any = super()  # uvicorn's class, which goes behind this one
        behind.on_response_complete()
        self.since = asyncio.get_running_loop().time()
        unread = self.cycle is cycle and cycle.response_complete and cycle.more_body and not self._is_brief(cycle.scope)
        if unread and not self.transport.is_closing():
            self._linger(self.watch.limits.unread)

    def _is_brief(self, scope: Any) -> bool:
        """Whether a body is so small that its rest is read after an early answer, and the connection kept for the next one."""
        told = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        return told.isdigit() and len(told) < 10 and int(told) <= self.watch.limits.head // 2

    def pause_writing(self) -> None:
        self._stuck = asyncio.get_running_loop().time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stuck = None
        super().resume_writing()

    def look(self, now: float) -> None:
        """Ends what has lasted too long."""
        limits = self.watch.limits
        if self._stuck is not None and now - self._stuck > limits.write_s:
            self.abort()
        elif self.transport.is_closing():
            self._closing = self._closing or now
            if now - self._closing > limits.unread_s:
                self.abort()
        elif self.lingering:
            if now - self.since > limits.unread_s:
                self.abort()
        elif not self.busy and now - self.since > limits.head_s:
            if self._spent:
                self._refuse(408, f"a request's head must arrive within {limits.head_s:g} seconds", "head_too_slow")
            else:
                self.transport.close()

    def abort(self) -> None:
        self.transport.abort()

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Tells the client why, where it waits for no other answer, and is done with it."""
        if self.busy or self.transport.is_closing():
            self.abort()
            return
        told = json.dumps({"error": {"message": message, "type": kind_of(status), "param": None, "code": code}}).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(told)}"
        self.transport.write(head.encode() + b"\r\nconnection: close\r\n\r\n" + told)
        self.since = asyncio.get_running_loop().time()
        self._linger(16 * self.watch.limits.head)

    def _linger(self, left: int) -> None:
        """Ends the answers' direction alone: a connection closed on bytes that nobody read would take the answer along."""
        self.lingering, self._left = True, left
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()
