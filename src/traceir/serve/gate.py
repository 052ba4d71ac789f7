"""The inner gate of the server, as one ASGI middleware: who asks, whether they may, how fast, and the line in the audit log.

It stands before the application, so that a stranger's body is never read and nothing of it is parsed. What needs no key is listed
here; everything else does, also paths that do not exist.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from traceir.items import Item, Query
from traceir.serve.audit import MAX_WHAT, AuditLog
from traceir.serve.fair import Shares, caller
from traceir.serve.guard import App, Message, Receive, Send, refuse
from traceir.serve.keys import ANYONE, KeyRing, Principal, Refusal, Scope
from traceir.serve.limits import Buckets, Rate, network_of, retry_after

log = logging.getLogger(__name__)
OPEN_PATHS: Final = frozenset({"/", "/favicon.ico", "/health", "/health/", "/ready", "/ready/", "/openapi.json"})
"""What needs no key: the page, which asks for one, and what a watchdog calls."""
OPEN_FOLDER: Final = "/static/"
FAILURES: Final = Rate(per_minute=30, burst=30)
"""Requests with a bad key from one address; a good key passes all the same, so nobody is locked out by a neighbour."""
REQUESTS: Final = Rate(per_minute=600, burst=120)
INPUTS: Final = Rate(per_minute=6000, burst=2000)
TOGETHER: Final = 1024
"""Requests that are being answered."""


class Limits:
    """How fast each principal may ask and embed, and each address fail; one for a server."""

    def __init__(self, requests: Rate | None = REQUESTS, inputs: Rate | None = INPUTS, failures: Rate = FAILURES) -> None:
        self._requests = Buckets(requests) if requests else None
        self._inputs = Buckets(inputs) if inputs else None
        self._failures = Buckets(failures)

    def take_request(self, who: Principal) -> float:
        """0.0, or the seconds to wait before the next request. A key's own limit goes before the server's."""
        own = Rate(who.requests_per_minute) if who.requests_per_minute else None
        if self._requests is None:
            return 0.0
        return self._requests.take(who.name, 1.0, own)

    def take_inputs(self, who: Principal, count: int) -> float:
        """0.0, or the seconds to wait before `count` more texts and pictures may be embedded."""
        return 0.0 if self._inputs is None else self._inputs.take(who.name, float(count))

    def take_failure(self, address: str) -> float:
        return self._failures.take(network_of(address))


class KeyGate:
    """Middleware, inside `Guard`. Puts `principal`, and `audit` (an `Asked`), into `scope["state"]`; `ring` None: no keys.

    `together` bounds the requests that are being answered, of which each caller has a share. Who that is, a key or else an
    address, stands in `fair.caller` while the request is answered.
    """

    def __init__(
        self, app: App, ring: KeyRing | None, limits: Limits, audit: AuditLog | None = None, together: int = TOGETHER
    ) -> None:
        self.app, self.ring, self.limits, self.audit = app, ring, limits, audit
        self._under_way = Shares(together)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        needed = scope_needed(scope["method"], scope["path"])
        asked = Asked(self.audit)
        state = scope.setdefault("state", {})
        state["audit"] = asked
        started, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        who: Principal | None = None
        try:
            found = self._judge(scope, needed) if needed else ANYONE
            if isinstance(found, Principal):
                who = state["principal"] = found
                caller.set(who.name if self.ring is not None and needed else network_of(_address(scope)))
                if self._under_way.take(caller.get()):
                    try:
                        await self.app(scope, receive, watched)
                    finally:
                        self._under_way.give(caller.get())
                else:
                    count = self._under_way.of(caller.get())
                    told = f"{count} of your requests are being answered, and the server takes no more of you now"
                    await refuse(watched, 429, told, "too_many_together", [(b"retry-after", b"1")])
            else:
                refusal, wait, who = found
                await refuse(watched, refusal.status, refusal.message, refusal.code, _headers_of(refusal, wait))
        finally:
            if self.audit is not None and needed:
                self.audit.write(_line(scope, who, status or 500, time.monotonic() - started, asked))

    def _judge(self, scope: Message, needed: Scope) -> Principal | tuple[Refusal, float, Principal | None]:
        """Who may go on; or why not, how long to wait, and who it was if that is known."""
        header = next((value for name, value in scope["headers"] if name == b"authorization"), None)
        who = ANYONE if self.ring is None else self.ring.check(None if header is None else header.decode("latin-1"))
        if isinstance(who, Refusal):
            wait = self.limits.take_failure(_address(scope)) if who.status == 401 else 0.0
            if wait > 0.0:
                return Refusal(429, "too many requests without a valid key from this address", "too_many_failures"), wait, None
            return who, 0.0, None
        if not who.may(needed):
            return Refusal(403, f"the key {who.name!r} has no {needed} scope", "missing_scope"), 0.0, who
        wait = self.limits.take_request(who)
        if wait > 0.0:
            return (
                Refusal(429, f"the key {who.name!r} asks too often; wait {retry_after(wait)} s", "too_many_requests"),
                wait,
                who,
            )
        return who


class Asked:
    """What one request asks, filled by its handler, for the audit log."""

    def __init__(self, audit: AuditLog | None) -> None:
        self._audit = audit
        self.what: list[dict[str, Any]] = []
        self.count = 0

    def add(self, content: Item | Query) -> None:
        """Notes a query or an item; nothing where the log is off. Reads pictures, to hash them, so not on the event loop."""
        if self._audit is not None:
            self.count += 1
            if len(self.what) < MAX_WHAT:
                self.what.append(self._audit.describe(content))

    def add_ids(self, ids: Sequence[str]) -> None:
        """Notes the ids of items."""
        if self._audit is not None:
            self.count += len(ids)
            self.what += [{"id": id} for id in ids[: MAX_WHAT - len(self.what)]]


def scope_needed(method: str, path: str) -> Scope | None:
    """What a request needs: nothing, `read`, or `write` for what changes the index."""
    if method in ("GET", "HEAD") and (path in OPEN_PATHS or path.startswith(OPEN_FOLDER)):
        return None
    if method in ("GET", "HEAD") or (method == "POST" and (path == "/search" or path.startswith(("/search/", "/v1/")))):
        return "read"
    return "write"


def _address(scope: Message) -> str:
    return str((scope.get("client") or ("", 0))[0])


def _headers_of(refusal: Refusal, wait: float) -> list[tuple[bytes, bytes]]:
    if refusal.status == 401:
        return [(b"www-authenticate", b'Bearer realm="traceir"')]
    return [(b"retry-after", retry_after(wait).encode())] if refusal.status == 429 else []


def _line(scope: Message, who: Principal | None, status: int, seconds: float, asked: Asked) -> Mapping[str, Any]:
    line: dict[str, Any] = {
        "request": scope["state"].get("request_id"),
        "key": who.name if who else None,
        "tenant": who.tenant if who else None,
        "address": _address(scope),
        "method": scope["method"],
        "route": getattr(scope.get("route"), "path", None),
        "path": scope["path"][:2048],
        "status": status,
        "seconds": round(seconds, 4),
    }
    return line | ({"count": asked.count, "asked": asked.what} if asked.count else {})
