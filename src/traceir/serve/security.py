"""The outermost ASGI middleware of every HTTP server here: who may ask from where, in what form, and what every answer carries.

It reads no body. Refused: Host headers that are not ours (DNS rebinding), pages of other origins, headers too many, too long or
doubled, bodies that are not JSON. Every answer gets a request id and headers that keep a page to itself.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from traceir.errors import InputError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

LOOPBACK: Final = ("127.0.0.1", "localhost", "[::1]")
PAGE_POLICY: Final = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; "
    b"form-action 'none'; frame-ancestors 'none'"
)
"""For HTML. `blob:` and `data:` are for images alone: those dropped on the page, and those fetched with a key."""
DATA_POLICY: Final = b"default-src 'none'; frame-ancestors 'none'; sandbox"
"""For everything else: an image or JSON opened by itself runs nothing."""
ALWAYS: Final[Headers] = (
    (b"vary", b"origin"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
)
SAFE_METHODS: Final = frozenset({"GET", "HEAD"})
METHODS: Final = SAFE_METHODS | {"POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
ALLOW: Final = (("allow", "GET, HEAD, POST, DELETE"),)  # the methods of our routes
PREFLIGHT: Final = (
    *ALLOW,
    ("access-control-allow-methods", ALLOW[0][1]),
    ("access-control-allow-headers", "authorization, content-type"),
    ("access-control-max-age", "600"),
)
EXPOSED: Final = (b"access-control-expose-headers", b"x-request-id, retry-after")
PROBED: Final = frozenset({"/health", "/health/", "/ready", "/ready/"})
"""What watchdogs ask by the address of a machine, so under any Host: it tells nothing but whether the server lives."""
_ONCE: Final = ("authorization", "content-length", "content-type", "expect", "host", "origin", "transfer-encoding")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request may not go on: the HTTP status, a message for people, a code for programs."""

    status: int
    message: str
    code: str
    headers: Sequence[tuple[str, str]] = ()

    @property
    def body(self) -> bytes:
        """In the shape of this server's errors, which is OpenAI's."""
        error = {"message": self.message, "type": kind_of(self.status), "param": None, "code": self.code}
        return json.dumps({"error": error}).encode()

    async def answer(self, send: Send) -> None:
        length = str(len(self.body))
        await answer(
            send, self.status, [("content-type", "application/json"), ("content-length", length), *self.headers], self.body
        )


@dataclass(frozen=True, slots=True)
class AccessRules:
    """What `SecurityMiddleware` lets in. `hosts`: names without port, None: any. `origins`: pages of other origins, such as
    `https://app.example.org`, that may use the server from a browser. `port`: how a Host must end, as `:8890`; None: any."""

    hosts: frozenset[str] | None = frozenset(LOOPBACK)
    origins: frozenset[str] = frozenset()
    port: str | None = None
    headers: int = 100
    header_bytes: int = 32 * 1024
    path_bytes: int = 8 * 1024

    @classmethod
    def of(cls, bound_to: str, *, hosts: Iterable[str] = (), origins: Iterable[str] = (), port: int | None = None) -> AccessRules:
        """For a server bound to an address: on loopback the loopback names and `hosts`, elsewhere `hosts`, or any if there
        are none. InputError for what is no host or origin."""
        named = frozenset(host.strip().lower() for host in hosts)
        pages = frozenset(origin.strip().lower().rstrip("/") for origin in origins)
        for host in named:
            if (matched := _HOST.fullmatch(host)) is None or matched[2]:
                raise InputError(f"host {host[:200]!r} is unusable; give a name without scheme and port: search.example.org")
        for page in pages:
            if not page.startswith(("http://", "https://")) or _HOST.fullmatch(page.partition("://")[2]) is None:
                raise InputError(f"origin {page[:200]!r} is unusable; give scheme and host, such as https://app.example.org")
        local = bound_to in ("::1", *LOOPBACK)
        return cls(named | frozenset(LOOPBACK) if local else named or None, pages, f":{port}" if port else None)


class SecurityMiddleware:
    """The middleware. Puts `request_id` into `scope["state"]`."""

    def __init__(self, app: App, rules: AccessRules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        headers: dict[str, list[str]] = defaultdict(list)
        for name, value in scope["headers"]:
            headers[name.decode("latin-1").lower()].append(value.decode("latin-1").strip())
        request_id = scope.setdefault("state", {})["request_id"] = secrets.token_hex(12)
        origin = headers.get("origin", [""])[0]
        shared = [(b"access-control-allow-origin", origin.encode()), EXPOSED] if origin in self.rules.origins else []
        dressed = _dressing(send, [(b"x-request-id", request_id.encode()), *ALWAYS, *shared])
        refusal = next(self._refusals(scope, headers), None)
        if refusal is not None:
            await refusal.answer(dressed)
        elif scope["method"] == "OPTIONS":
            await answer(dressed, 204, PREFLIGHT)
        else:
            await self.app(scope, receive, dressed)

    def _refusals(self, scope: Message, headers: Mapping[str, Sequence[str]]) -> Iterator[Refusal]:
        """What is wrong with a request, the first fault first. What no parser of uvicorn lets through is not looked for."""
        rules, method, matched = self.rules, scope["method"], _HOST.fullmatch(headers.get("host", [""])[0].lower())
        origin, (host, name, port) = headers.get("origin", [""])[0], matched.group(0, 1, 2) if matched else ("", None, None)
        sizes = [len(name) + len(value) for name, value in scope["headers"]]
        if len(sizes) > rules.headers or sum(sizes) > rules.header_bytes:
            yield Refusal(431, f"more than {rules.headers} headers, or {rules.header_bytes} bytes of them", "headers_too_large")
        if len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"") > rules.path_bytes:
            yield Refusal(414, f"the path and query have more than {rules.path_bytes} bytes", "path_too_long")
        for doubled in filter(lambda name: len(headers.get(name, ())) > 1, _ONCE):
            yield Refusal(400, f"the header {doubled} occurs more than once", "bad_header")
        if "transfer-encoding" in headers and "content-length" in headers:
            yield Refusal(400, "Content-Length and Transfer-Encoding exclude each other", "bad_header")
        if method not in METHODS:
            yield Refusal(405, f"the method {method[:20]} is not known here", "bad_method", ALLOW)
        if not host and ("host" in headers or scope.get("http_version") != "1.0"):
            yield Refusal(400, "the Host header is missing or unusable", "bad_host")
        here = (rules.hosts is None or name in rules.hosts) and rules.port in (None, port)
        probe = _is_probe(method, scope["path"], origin)
        if not here and not probe:
            message = "this server does not answer to that Host; start it with --allow-host NAME, or keep its port in a tunnel"
            yield Refusal(421, message, "wrong_host")
        ours = host and origin.lower() in (f"http://{host}", f"https://{host}")
        if origin and method not in SAFE_METHODS and origin not in rules.origins and not ours:
            message = "pages of this origin may not use the server; start it with --cors ORIGIN to change that"
            yield Refusal(403, message, "wrong_origin")
        if method == "OPTIONS" and not probe and not (origin in rules.origins and "access-control-request-method" in headers):
            yield Refusal(405, "OPTIONS is answered only to browsers, for origins that were allowed", "bad_method", ALLOW)
        if "content-encoding" in headers:
            yield Refusal(415, "packed bodies are not read; send the JSON as it is", "packed_body")
        kind = headers.get("content-type", [""])[0].partition(";")[0].strip().lower()
        announced = "transfer-encoding" in headers or headers.get("content-length", ["0"])[0].strip("0")
        if announced and method not in SAFE_METHODS and kind != "application/json":
            yield Refusal(415, "a body needs the header Content-Type: application/json", "wrong_content_type")


def _is_probe(method: str, path: str, origin: str) -> bool:
    """Whether a load balancer asks if anybody is there: by a path of PROBED, or in a way that no body is an answer to."""
    if method == "OPTIONS":
        return path in PROBED | {"*", "/"} and not origin
    return (method in SAFE_METHODS and path in PROBED) or (method == "HEAD" and path == "/")


def _dressing(send: Send, added: Headers) -> Send:
    async def dressed(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [(name, value) for name, value in message["headers"] if name.lower() not in (b"server", b"x-powered-by")]
            have = {name.lower(): value for name, value in headers}
            policy = PAGE_POLICY if have.get(b"content-type", b"").startswith(b"text/html") else DATA_POLICY
            defaults = [*added, (b"content-security-policy", policy), (b"cache-control", b"no-store")]
            message = {**message, "headers": [*headers, *((n, v) for n, v in defaults if n not in have or n == b"vary")]}
        await send(message)

    return dressed


def kind_of(status: int) -> str:
    """OpenAI's word for the kind of an error."""
    kinds = {401: "authentication_error", 403: "permission_error", 408: "timeout_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


async def answer(send: Send, status: int, headers: Iterable[tuple[str, str]], body: bytes = b"") -> None:
    raw = [(name.encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
