"""Access to the server, as ASGI middleware: who asks, whether they may, how fast, and the line in the audit log.

It runs before the application, so that no body is read without a valid key. Only OPEN_PATHS need none.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

from traceir.items import Item, Query
from traceir.serve.audit import MAX_WHAT, AuditLog
from traceir.serve.fair import Shares, caller
from traceir.serve.keys import ANYONE, KeyRing, Principal, Scope
from traceir.serve.limits import Buckets, Rate, network_of, retry_after
from traceir.serve.security import SAFE_METHODS, App, Message, Receive, Refusal, Send

OPEN_PATHS: Final = frozenset({"/", "/favicon.ico", "/health", "/health/", "/ready", "/ready/", "/openapi.json"})
"""What needs no key: the page, which asks for one, and health checks."""
OPEN_FOLDER: Final = "/static/"
FAILURES: Final = Rate(per_minute=30, burst=30)
"""Requests with a bad key from one address; a valid key still passes, so nobody is locked out by others at that address."""
REQUESTS: Final = Rate(per_minute=600, burst=120)
INPUTS: Final = Rate(per_minute=6000, burst=2000)
TOGETHER: Final = 1024  # requests that are being answered


class Limits:
    """Rates of each principal's requests and inputs, and of each address's bad keys; one for a server. None: no limit."""

    def __init__(self, requests: Rate | None = REQUESTS, inputs: Rate | None = INPUTS, failures: Rate = FAILURES) -> None:
        self.requests, self.inputs, self.failures = Buckets(requests), Buckets(inputs), Buckets(failures)

    def take_inputs(self, who: Principal, count: int) -> float:
        """0.0, or the seconds to wait before `count` more texts and images may be embedded."""
        return self.inputs.take(who.name, count)


class KeyMiddleware:
    """Inside `SecurityMiddleware`. Puts `principal`, and `audit` (an `Asked`), into `scope["state"]`; `ring` None: no keys.

    `together` bounds the requests that are being answered, of which each caller (a key, or an address) has a share.
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
        needed, started, status = scope_needed(scope["method"], scope["path"]), time.monotonic(), 500
        scope.setdefault("state", {})["audit"] = asked = Asked(self.audit)

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if (refusal := self._refusal(scope, needed)) is not None:
                await refusal.answer(watched)
                return
            try:
                await self.app(scope, receive, watched)
            finally:
                self._under_way.give(caller.get())
        finally:
            if self.audit is not None and needed:
                self.audit.write(_line(scope, status, time.monotonic() - started, asked))

    def _refusal(self, scope: Message, needed: Scope | None) -> Refusal | None:
        """Why a request may not go on. Where it may, it counts as one of its caller's that are under way."""
        address, who = _address(scope), ANYONE
        if needed and self.ring is not None:
            header = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"), None)
            if isinstance(known := self.ring.check(header), Refusal):
                wait = self.limits.failures.take(network_of(address)) if known.status == 401 else 0.0
                return _too_fast("too many requests without a valid key from this address", "failures", wait) if wait else known
            who = known
        scope["state"]["principal"] = who
        if needed and needed not in who.scopes:
            return Refusal(403, f"the key {who.name!r} has no {needed} scope", "missing_scope")
        own = Rate(who.requests_per_minute) if who.requests_per_minute else None  # goes before the server's
        if needed and (wait := self.limits.requests.take(who.name, rate=own)):
            return _too_fast(f"the key {who.name!r} asks too often; wait {retry_after(wait)} s", "requests", wait)
        caller.set(who.name if self.ring is not None and needed else network_of(address))
        if not self._under_way.take(caller.get()):
            count = self._under_way.of(caller.get())
            return _too_fast(f"{count} of your requests are being answered, and the server takes no more of you", "together", 1.0)
        return None


class Asked:
    """What one request asks, filled by its handler, for the audit log."""

    def __init__(self, audit: AuditLog | None) -> None:
        self._audit = audit
        self.what: list[dict[str, Any]] = []
        self.count = 0

    def add(self, content: Item | Query) -> None:
        """Notes a query or an item; nothing where the log is off. Reads images, to hash them, so not on the event loop."""
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
    reads = method in SAFE_METHODS
    if reads and (path in OPEN_PATHS or path.startswith(OPEN_FOLDER)):
        return None
    return "read" if reads or (method == "POST" and (path == "/search" or path.startswith(("/search/", "/v1/")))) else "write"


def _too_fast(message: str, what: str, wait: float) -> Refusal:
    return Refusal(429, message, f"too_many_{what}", (("retry-after", retry_after(wait)),))


def _address(scope: Message) -> str:
    return str((scope.get("client") or ("", 0))[0])


def _line(scope: Message, status: int, seconds: float, asked: Asked) -> dict[str, Any]:
    who: Principal | None = scope["state"].get("principal")
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
