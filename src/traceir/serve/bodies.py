"""Bodies of requests: bounded in bytes and in time however they arrive, and JSON read strictly."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final

from traceir.errors import InputError
from traceir.serve.fair import Shares, Usage, caller
from traceir.serve.faults import Doubled, location_of_half
from traceir.serve.limits import Buckets, Rate
from traceir.serve.security import App, Message, Receive, Refusal, Send

MAX_BODY: Final = 32 * 1024 * 1024
MAX_ANSWER: Final = 4 * 1024 * 1024  # bytes of the items of one answer, if they are several
MAX_TOGETHER: Final = 512 * 1024 * 1024
"""Bytes of the bodies of all requests that are not answered yet, and of all answers that are not taken yet."""
SMALL: Final = 64 * 1024  # bytes that a caller may always have in bodies and answers, and in which answers are handed on
CROWDED_RATE: Final = 8 * 1024 * 1024
"""Bytes a second of the bodies of one caller while others ask too: reading one holds up whatever else this process does."""
MAX_DEPTH: Final = 32
MAX_VALUES: Final = 250_000
"""Commas and opening brackets of a body, which bounds the objects Python makes of it; an image in base64 is one text."""
MAX_TEXTS: Final = 200_000  # texts of a body, names of fields included; counted first, at the cost of a look at each byte
MAX_DIGITS: Final = 40
CLOSE: Final = ("connection", "close")  # what is left of the body is not read
TOO_MANY_BYTES: Final = Refusal(
    429,
    "the server holds as many bytes of your requests and answers as it can; take the answers, and try again in a second",
    "too_many_bytes",
    (CLOSE, ("retry-after", "1")),
)
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
"""A JSON string, or the rest of the body where it does not end; possessive, so that matching takes linear time."""
_BRACKET = re.compile(rb"[\[\]{}]")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class BodyMiddleware:
    """Middleware, inside `KeyMiddleware`: a body has at most `most` bytes (else 413) and arrives within `seconds` (else 408).

    Bodies that are not answered yet and answers that are not taken yet have at most `together` bytes, those of one caller its
    share (else 429). The application sees a client that went away, and its answer is replaced.
    """

    def __init__(self, app: App, most: int = MAX_BODY, seconds: float = 30.0, together: int = MAX_TOGETHER) -> None:
        self.app, self.most, self.seconds = app, most, seconds
        self.shares = Shares(together, least=min(SMALL, together))
        self.usage, self.paces = Usage(), Buckets(Rate(60 * CROWDED_RATE, burst=0.0))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = int(dict(scope["headers"]).get(b"content-length", b"0"))
        body = _Body(self, receive, send)
        if announced > self.most:
            await body.too_large(announced).answer(send)
            return
        try:
            await self.app(scope, body.receive, body.send)
        except Exception:
            if body.refusal is None:
                raise
        finally:
            self.shares.give(body.who, body.holds)
        if body.refusal is not None and not body.started:
            await body.refusal.answer(send)


class _Body:
    """One request: receiving its body, sending its answer."""

    def __init__(self, bounds: BodyMiddleware, receive: Receive, send: Send) -> None:
        self._bounds, self._receive, self._send = bounds, receive, send
        self.who, self.holds = caller.get(), 0
        self._read, self.started = 0, False
        self._deadline: float | None = asyncio.get_running_loop().time() + bounds.seconds
        self._start: Message | None = None
        self.refusal: Refusal | None = None

    def too_large(self, size: int) -> Refusal:
        return Refusal(413, f"the body has {size} bytes or more, at most {self._bounds.most}", "body_too_large", (CLOSE,))

    async def receive(self) -> Message:
        if self.refusal is not None:
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            late = f"the body did not arrive within {self._bounds.seconds:g} seconds"
            self.refusal = Refusal(408, late, "body_too_slow", (CLOSE,))
            return await self.receive()
        self._read += (count := len(message.get("body", b"")))
        if self._read > self._bounds.most:
            self.refusal = self.too_large(self._read)
        elif not self._hold(count):
            self.refusal = TOO_MANY_BYTES
        elif self._deadline is not None and not message.get("more_body", False):
            self._deadline = None  # from now on only a disconnect is waited for, however long the answer takes
            self._bounds.usage.note(self.who)
            if self._bounds.usage.crowded:  # then those of one caller are not read without a pause
                await asyncio.sleep(self._bounds.paces.take(self.who, self._read, on_debt=True))
        return message if self.refusal is None else await self.receive()

    def _hold(self, count: int) -> bool:
        taken = not count or self._bounds.shares.take(self.who, count)
        self.holds += count * taken
        return taken

    async def send(self, message: Message) -> None:
        """Hands an answer on in pieces, so that what the client does not take stays here, where it is counted."""
        if self.refusal is not None and not self.started:
            return
        if message["type"] == "http.response.start":
            self._start = message  # sent once the rest of the answer is known to fit
            return
        body = message.get("body", b"")
        held = len(body) if len(body) > SMALL else 0
        if not self._hold(held):
            if self.started:
                raise ConnectionError("the client takes too little of its answers")
            self.refusal = TOO_MANY_BYTES
            return
        if self._start is not None:
            self.started, start, self._start = True, self._start, None
            await self._send(start)
        for at in range(0, max(1, len(body)), SMALL):
            more = at + SMALL < len(body) or bool(message.get("more_body", False))
            await self._send({"type": "http.response.body", "body": body[at : at + SMALL], "more_body": more})
        self._bounds.shares.give(self.who, held)
        self.holds -= held


def parse_json(raw: bytes, *, lenient: bool = False, texts: int = MAX_TEXTS) -> Any:
    """The value of a body in strict JSON (RFC 8259), UTF-8 without a mark.

    InputError for anything else: NaN and infinity, a name twice in one object, half a surrogate pair, and what the bounds above
    forbid, which are looked at before anything is built. `lenient`, for callers that judge the parts of a body one by one: half
    pairs stay, what is no number or too large becomes NaN or infinity, and a name that occurs twice stands for a `Doubled`.
    """
    pairs, number = partial(_object, lenient=lenient), partial(_number, lenient=lenient)
    try:
        text = raw.decode("utf-8")
        _check_shape(raw, texts)
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=number, parse_float=number, parse_int=number)
    except UnicodeDecodeError as error:
        raise InputError(f"the body is not UTF-8 at byte {error.start}; send JSON in UTF-8") from error
    except json.JSONDecodeError as error:
        raise InputError(f"the body is not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    if not lenient and _SURROGATE.search(raw) and (location := location_of_half(value)) is not None:
        raise InputError(f"{location}: the body holds half of a surrogate pair there; send whole characters")
    return value


def _check_shape(raw: bytes, texts: int) -> None:
    """Number of texts, then depth and number of values, counted outside texts."""
    if raw.count(b'"') - raw.count(b'\\"') > 2 * texts:
        raise InputError(f"the body holds more than {texts} texts; send it in parts")
    bare = b"".join(_outside_texts(raw))
    if bare.count(b",") + bare.count(b"[") + bare.count(b"{") > MAX_VALUES:
        raise InputError(f"the body holds more than {MAX_VALUES} values; send it in parts")
    depth = 0
    for bracket in _BRACKET.finditer(bare):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > MAX_DEPTH:
            raise InputError(f"the body is nested more than {MAX_DEPTH} levels deep")


def _outside_texts(raw: bytes) -> Iterator[bytes]:
    """In pieces, so that other threads run between them; most texts, also images in base64, hold no escape."""
    at = 0
    while (start := raw.find(b'"', at)) >= 0:
        yield raw[at:start]
        end = raw.find(b'"', start + 1)
        escaped = _TEXT.match(raw, start) if end < 0 or raw.find(b"\\", start, end) >= 0 else None
        at = escaped.end() if escaped else end + 1
    yield raw[at:]


def _object(pairs: Sequence[tuple[str, Any]], *, lenient: bool) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    doubled = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
    if not lenient:
        raise InputError(f"the name {doubled[0][:80]!r} occurs twice in one object of the body")
    return made | {name: Doubled() for name in doubled}


def _number(text: str, *, lenient: bool) -> int | float:
    digits = text.removeprefix("-")
    whole = digits.isdigit()
    value = math.inf if whole and len(digits) > MAX_DIGITS else int(text) if whole else float(text)
    if lenient or math.isfinite(value):
        return value
    raise InputError(f"the body holds {text[:40]}, which is no number of at most {MAX_DIGITS} digits in the range of a double")
