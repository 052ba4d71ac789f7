"""The outer wall of the server, as one ASGI middleware that reads no body: who may ask from where, in what form, and what every
answer carries.

Turned away here: Host headers that are not ours (DNS rebinding), pages of other origins (CORS is closed unless origins are
named, also for requests a browser sends without asking first), headers too many, too long, doubled or smuggling, bodies that are
not JSON.
Every answer gets a request id and headers that keep a page to itself, and no answer names the server's software.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

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
"""For HTML. `blob:` and `data:` are for pictures alone: those dropped on the page, and those fetched with a key."""
DATA_POLICY: Final = b"default-src 'none'; frame-ancestors 'none'; sandbox"
"""For everything else: a picture or JSON opened by itself runs nothing."""
ALWAYS: Final[Headers] = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
)
SAFE_METHODS: Final = frozenset({"GET", "HEAD"})
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
ANSWERED: Final = b"GET, HEAD, POST, DELETE"
"""The methods of our routes."""
PROBED: Final = frozenset({"/health", "/health/", "/ready", "/ready/"})
"""What watchdogs ask by the address of a machine, so under any Host: it tells nothing but whether the server lives."""
_ONCE: Final = frozenset({"host", "authorization", "content-length", "content-type", "transfer-encoding", "origin", "expect"})
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?")


@dataclass(frozen=True, slots=True)
class Wall:
    """What the wall lets in. `hosts`: names without port, None: any. `origins`: pages of other origins, such as
    `https://app.example.org`, that may use the server from a browser."""

    hosts: frozenset[str] | None = frozenset(LOOPBACK)
    origins: frozenset[str] = frozenset()
    headers: int = 100
    header_bytes: int = 32 * 1024
    path_bytes: int = 8 * 1024

    @classmethod
    def of(cls, bound_to: str, *, hosts: Iterable[str] = (), origins: Iterable[str] = ()) -> Wall:
        """For a server bound to an address: on loopback the loopback names and `hosts`, elsewhere `hosts`, or any if there
        are none."""
        named = frozenset(_read_host(host) for host in hosts)
        local = bound_to in ("127.0.0.1", "localhost", "::1", "[::1]")
        allowed = named | frozenset(LOOPBACK) if local else named or None
        return cls(hosts=allowed, origins=frozenset(_read_origin(origin) for origin in origins))


class Guard:
    """The wall around an application. Puts `request_id` into `scope["state"]`."""

    def __init__(self, app: App, wall: Wall) -> None:
        self.app, self.wall = app, wall

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        found = _by_name(scope["headers"])
        request_id = secrets.token_hex(12)
        scope.setdefault("state", {})["request_id"] = request_id
        origin = found.get("origin", [""])[0]
        added = [(b"x-request-id", request_id.encode()), *ALWAYS, *self._cors(origin)]
        dressed = _dressing(send, added)
        refused = self._refusal(scope, found)
        if refused is not None:
            await refuse(dressed, *refused)
        elif scope["method"] == "OPTIONS":
            await self._preflight(scope, found, dressed)
        else:
            await self.app(scope, receive, dressed)

    def _refusal(self, scope: Message, found: dict[str, list[str]]) -> tuple[int, str, str] | None:
        """Status, message and code, or None for a request that may pass."""
        wall, method = self.wall, scope["method"]
        sizes = [len(name) + len(value) for name, value in scope["headers"]]
        if len(sizes) > wall.headers or sum(sizes) > wall.header_bytes:
            return 431, f"more than {wall.headers} headers, or {wall.header_bytes} bytes of them", "headers_too_large"
        if len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"") > wall.path_bytes:
            return 414, f"the path and query have more than {wall.path_bytes} bytes", "path_too_long"
        if any(not _TOKEN.fullmatch(name) or _CONTROL.search(value) for name, value in scope["headers"]):
            return 400, "a header holds characters that headers may not hold", "bad_header"
        if doubled := sorted(name for name in _ONCE if len(found.get(name, [])) > 1):
            return 400, f"the header {doubled[0]} occurs more than once", "bad_header"
        if "transfer-encoding" in found and "content-length" in found:
            return 400, "Content-Length and Transfer-Encoding exclude each other", "bad_header"
        if method not in METHODS:
            return 405, f"the method {method[:20]} is not known here", "bad_method"
        host = found.get("host", [""])[0].lower()
        matched = _HOST.fullmatch(host)
        if matched is None and (host or scope.get("http_version") != "1.0"):
            return 400, "the Host header is missing or unusable", "bad_host"
        named = wall.hosts is None or (matched is not None and matched[1] in wall.hosts)
        if not named and not _is_probe(scope, found):
            return 421, "this server does not answer to that Host; start it with --allow-host NAME to change that", "wrong_host"
        if method not in SAFE_METHODS and not self._may_write(found.get("origin", [""])[0], host):
            return 403, "pages of this origin may not use the server; start it with --cors ORIGIN to change that", "wrong_origin"
        return _form_refusal(method, found)

    def _may_write(self, origin: str, host: str) -> bool:
        """Without an Origin it is no browser, or an old one that asks for nothing but pages; ours is one that names our host."""
        return not origin or origin in self.wall.origins or (host != "" and _netloc(origin) == host)

    def _cors(self, origin: str) -> Headers:
        if not self.wall.origins:
            return ()
        if origin not in self.wall.origins:
            return ((b"vary", b"origin"),)
        return (
            (b"vary", b"origin"),
            (b"access-control-allow-origin", origin.encode()),
            (b"access-control-expose-headers", b"x-request-id, retry-after"),
        )

    async def _preflight(self, scope: Message, found: dict[str, list[str]], send: Send) -> None:
        origin = found.get("origin", [""])[0]
        if _is_probe(scope, found):
            await send({"type": "http.response.start", "status": 204, "headers": [(b"allow", ANSWERED)]})
            await send({"type": "http.response.body", "body": b""})
            return
        if origin not in self.wall.origins or "access-control-request-method" not in found:
            await refuse(send, 405, "OPTIONS is answered only to browsers, for origins that were allowed", "bad_method")
            return
        headers = [
            (b"access-control-allow-methods", ANSWERED),
            (b"access-control-allow-headers", b"authorization, content-type"),
            (b"access-control-max-age", b"600"),
        ]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


def kind_of(status: int) -> str:
    """OpenAI's word for the kind of an error."""
    kinds = {401: "authentication_error", 403: "permission_error", 408: "timeout_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


async def refuse(send: Send, status: int, message: str, code: str, headers: Headers = ()) -> None:
    """An answer in the shape of this server's errors."""
    body = json.dumps({"error": {"message": message, "type": kind_of(status), "param": None, "code": code}}).encode()
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (408, 413) or code == "too_many_bytes":
        own.append((b"connection", b"close"))  # what is left of the body is not read
    if status == 405:
        own.append((b"allow", ANSWERED))
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})


def _is_probe(scope: Message, found: dict[str, list[str]]) -> bool:
    """Whether a load balancer asks if anybody is there: by a path of PROBED, or in a way that no body is an answer to."""
    method, path = scope["method"], scope["path"]
    if method == "OPTIONS":
        return path in PROBED | {"*", "/"} and "origin" not in found
    return (method in SAFE_METHODS and path in PROBED) or (method == "HEAD" and path == "/")


def _netloc(origin: str) -> str:
    """Host and port of an origin in small letters, "" where it is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


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


def _form_refusal(method: str, found: dict[str, list[str]]) -> tuple[int, str, str] | None:
    """What is wrong with how the body is announced. Only JSON may come: a browser asks before it sends that to another origin."""
    length = found.get("content-length", ["0"])[0]
    if not (length.isascii() and length.isdigit() and len(length) <= 18):
        return 400, "Content-Length is not a number of bytes", "bad_header"
    if "content-encoding" in found:
        return 415, "packed bodies are not read; send the JSON as it is", "packed_body"
    if method in SAFE_METHODS or (int(length) == 0 and "transfer-encoding" not in found):
        return None
    kind = found.get("content-type", [""])[0].partition(";")[0].strip().lower()
    if kind != "application/json":
        return 415, "a body needs the header Content-Type: application/json", "wrong_content_type"
    return None


def _by_name(headers: Headers) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in headers:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1").strip())
    return found


def _read_host(text: str) -> str:
    host = text.strip().lower()
    matched = _HOST.fullmatch(host)
    if matched is None or matched[2]:
        raise InputError(f"host {text[:200]!r} is unusable; give a name without scheme and port, such as search.example.org")
    return host


def _read_origin(text: str) -> str:
    origin = text.strip().lower().rstrip("/")
    try:
        parts = urlsplit(origin)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or _HOST.fullmatch(parts.netloc) is None or parts.path or parts.query:
        raise InputError(f"origin {text[:200]!r} is unusable; give scheme and host, such as https://app.example.org")
    return origin
