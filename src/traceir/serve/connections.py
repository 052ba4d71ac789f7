"""What a connection may hold, and for how long, before there is a request and after its answer.

uvicorn's parser bounds neither a head nor a trailer while they come in, and waits for ever for a client that neither sends nor
reads.
"""

from __future__ import annotations

import asyncio
import resource
from collections import deque
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any, Final

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from traceir.serve.fair import Shares
from traceir.serve.limits import network_of
from traceir.serve.security import Refusal

PIECE: Final = 16 * 1024  # bytes that a parser is given at a time, so that it never works through much that is refused
TICK_S: Final = 1.0  # seconds between two checks of a connection; deadlines are late by no more
SPARE_FILES: Final = 256  # file handles that connections leave to the index, images and logs
CONNECTIONS: Final = 2048


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bounds of one connection, and of all.

    `head`: bytes of a head, of a trailer, of a chunk's own line, and of the framing of a body beyond the body's own. `head_s`:
    seconds from the connection, or the last answer, to the end of a head. `unread`, `unread_s`: what is thrown away of a body
    after an early answer. `write_s`: seconds in which a client must take 64 KiB. `ahead`: requests sent before an answer.
    """

    head: int = 64 * 1024
    head_s: float = 30.0
    unread: int = 32 * 1024 * 1024
    unread_s: float = 10.0
    write_s: float = 10.0
    ahead: int = 16
    connections: int = CONNECTIONS


def settings(limits: ConnectionLimits | None = None, protocol: type[asyncio.Protocol] = AutoHTTPProtocol) -> dict[str, Any]:
    """The options of `uvicorn.Config` that put `_Watched` before its own protocol."""
    limits = limits or ConnectionLimits()
    limits = replace(limits, connections=min(limits.connections, possible_connections()))
    bound = {"limits": limits, "shares": Shares(limits.connections), "watched": dict[_Watched, None]()}
    watched = type("WatchedProtocol", (_Watched, protocol), bound)
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


class _Watched(asyncio.Protocol):
    """Mixed in before one of uvicorn's protocols. A connection is `busy` with a request, or waits for the next head, or is
    `lingering`: it was answered, and what it still sends is thrown away unparsed."""

    limits: ConnectionLimits
    shares: Shares
    watched: dict[_Watched, None]
    """All of one server, the oldest first."""
    loop: asyncio.AbstractEventLoop
    cycle: Any
    transport: asyncio.Transport
    pipeline: deque[Any] | tuple[()] = ()
    address = ""
    lingering = False
    since = 0.0  # when it began to wait, to linger or to close
    _stuck: float | None = None  # since when too little of an answer is taken
    _timer: asyncio.TimerHandle | None = None
    _spent = _framing = _body = 0  # bytes since the last head or piece of a body; of this body: all that frames it, and its own
    _left = 0  # bytes that are still thrown away while it lingers

    @property
    def busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.since = self.loop.time()
        self._timer = self.loop.call_later(TICK_S, self._look)
        peer = transport.get_extra_info("peername")
        self.address = network_of(str(peer[0])) if isinstance(peer, tuple) else "local"
        if not self.shares.fits(self.address):
            self._evict_one()
        if self.shares.take(self.address):
            self.watched[self] = None
        else:
            self.transport.abort()

    def _evict_one(self) -> None:
        """Ends a connection that waits for a request: the one that has waited longest, of the same address where that has any."""
        same = self.shares.of(self.address) > 0
        idle = [other for other in self.watched if not other.busy and (other.address == self.address or not same)]
        if idle:
            oldest = min(idle, key=lambda other: other.since)
            oldest._leave()
            oldest.transport.abort()

    def _leave(self) -> None:
        if self in self.watched:
            del self.watched[self]
            self.shares.give(self.address)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        at = 0
        while at < len(data) and not self.transport.is_closing():
            if self.lingering:
                self._left -= len(data) - at
                if self._left < 0:
                    self.transport.abort()
                return
            piece = data[at : at + min(PIECE, self.limits.head - self._spent)]
            at += len(piece)
            self._feed(piece)

    def _feed(self, piece: bytes) -> None:
        """Gives the parser a piece and counts what of it became body. A new cycle tells that a head is complete."""
        head, cycle = self.limits.head, self.cycle
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
        if len(self.pipeline) > self.limits.ahead:
            self.transport.abort()
        elif self._spent >= head or self._framing > head + self._body:
            self._refuse(Refusal(431, f"a request line with its headers has at most {head} bytes", "headers_too_large"))

    def on_response_complete(self) -> None:
        """uvicorn's hook at the end of an answer. A small body's rest is read, and the connection kept for the next request."""
        cycle = self.cycle
        behind: Any = super()  # uvicorn's class, the next one
        behind.on_response_complete()
        self.since = self.loop.time()
        announced = dict(cycle.scope["headers"]).get(b"content-length", b"")
        small = announced.isdigit() and len(announced) < 10 and int(announced) <= self.limits.head // 2
        if self.cycle is cycle and cycle.response_complete and cycle.more_body and not small:
            self._linger(self.limits.unread)

    def pause_writing(self) -> None:
        self._stuck = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stuck = None
        super().resume_writing()

    def _look(self) -> None:
        """Ends the connection where a deadline has passed."""
        self._timer = self.loop.call_later(TICK_S, self._look)
        limits, now, closing = self.limits, self.loop.time(), self.transport.is_closing()
        waited = now - self.since
        if self._stuck is not None and now - self._stuck > limits.write_s:
            self.transport.abort()
        elif closing or self.lingering:
            if waited > limits.unread_s:
                self.transport.abort()
        elif not self.busy and waited > limits.head_s:
            if self._spent:
                self._refuse(Refusal(408, f"a request's head must arrive within {limits.head_s:g} seconds", "head_too_slow"))
            else:
                self.since = now
                self.transport.close()

    def _refuse(self, refusal: Refusal) -> None:
        """Tells the client why, where it waits for no other answer, and is done with it."""
        if self.busy or self.transport.is_closing():
            self.transport.abort()
            return
        head = f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(refusal.body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + refusal.body)
        self.since = self.loop.time()
        self._linger(16 * self.limits.head)

    def _linger(self, left: int) -> None:
        """Closes the sending side alone: closing a connection with unread bytes would reset it and lose the answer."""
        self.lingering, self._left = True, left
        if self.transport.is_closing():
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()
