"""A teacher: whatever answers a question, behind an OpenAI-compatible address or recorded in a file; and its replies, which come
in whatever shape."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import re
import sqlite3
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from PIL import Image

from traceir.cot.ask import TeacherQuestion
from traceir.cot.files import json_lines
from traceir.errors import ImageError, TeacherError
from traceir.image_formats import FORMATS, extent_of, open_image
from traceir.images import DEFAULT_LIMITS, ImageInput, data_url, file_bytes
from traceir.outside import read_json, valid

if TYPE_CHECKING:
    import openai

_FINISHES: Final = dict.fromkeys(("length", "max_tokens", "model_length"), "length") | dict.fromkeys(
    ("content_filter", "safety"), "content_filter"
)
"""What servers say of how a reply ended, and our word for it; whatever else they say is `stop`."""
_THOUGHTS: Final = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message in which servers send thoughts."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. `finish`: `stop`, `length`, `content_filter`, or `error` with the reason in `error`; `key`: of the request.

    Its texts are valid (outside.valid) and its tokens from 0 to 2^31 - 1, 0 for unknown, whatever a server or a file said.
    """

    text: str
    finish: str
    model: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""
    key: str = ""

    def __post_init__(self) -> None:
        for name in ("text", "model", "error"):
            object.__setattr__(self, name, valid(getattr(self, name)))
        for name in ("prompt_tokens", "completion_tokens"):
            value: object = getattr(self, name)
            whole = re.fullmatch(r"([0-9]{1,10})(\.0*)?", str(value)) if isinstance(value, (str, float)) else None
            value = int(whole[1]) if whole else value
            object.__setattr__(self, name, value if type(value) is int and 0 <= value < 2**31 else 0)


@dataclass(eq=False)
class RetryableError(TeacherError):
    """A request that failed and may be sent again.

    `overloaded`: fewer requests at a time may help. `retry_after`: seconds the teacher asks to wait. `reached`: an answer came,
    if not a good one. `garbled`: it came with success and is no chat completion; it may have been paid for.
    """

    message: str
    overloaded: bool = False
    retry_after: float | None = None
    reached: bool = True
    garbled: bool = False

    def __str__(self) -> str:
        return self.message


def reply_of(text: str | bytes, model: str) -> Reply:
    """The Reply in a chat completion's JSON. Raises RetryableError where it is not one."""
    try:
        return read_completion(read_json(text), model)
    except ValueError as error:
        raise _garbled(text if isinstance(text, str) else text.decode(errors="replace")) from error


def read_completion(body: Any, model: str) -> Reply:
    """`reply_of` for parsed JSON; `model` stands in where the completion names none. One without a choice is a refusal."""
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list):
        raise _garbled(str(body))
    usage, named = body.get("usage"), str(body.get("model") or model)[:200]
    counts: Mapping[str, Any] = usage if isinstance(usage, dict) else {}
    tokens = counts.get("prompt_tokens", 0), counts.get("completion_tokens", 0)
    if not choices or not isinstance(choices[0], dict):
        return Reply("", "error", named, *tokens, "the completion holds no choice")
    message, finish = choices[0].get("message"), str(choices[0].get("finish_reason")).lower()
    return Reply(_content(message) if isinstance(message, dict) else "", _FINISHES.get(finish, "stop"), named, *tokens)


def error_of(text: str) -> tuple[str, str]:
    """Code and message of an error's body, on one line, cut to 500 characters; the body itself where it has no such fields."""
    code = ""
    with suppress(ValueError, AttributeError):
        body = read_json(text)
        fields = body.get("error", body)
        code, text = str(fields.get("code") or ""), str(fields.get("message") or text)
    return code, " ".join(valid(text[:500]).split())


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """The seconds that a server asks to wait: `retry-after-ms`, or `retry-after` in seconds or as a date (`now`: epoch s)."""
    try:
        if (value := headers.get("retry-after-ms")) is not None:
            return max(0.0, float(value) / 1000)
        if (value := headers.get("retry-after")) is None:
            return None
        seconds = float(value) if re.fullmatch(r"[\d.]+", value.strip()) else parsedate_to_datetime(value).timestamp() - now
        return max(0.0, seconds)
    except (ValueError, TypeError, OverflowError):
        return None


def _content(message: Mapping[str, Any]) -> str:
    """The text of a message, of a list of parts those that are no thought; of a refusal without text its words.

    Where a server has put all into the field of the thoughts, they come as one that has no end (ask.spoken).
    """
    content = message.get("content")
    if isinstance(content, list):
        parts = ({"text": part} if isinstance(part, str) else part for part in content)
        spoken = (part for part in parts if isinstance(part, dict) and part.get("type") not in ("thinking", "reasoning"))
        content = "".join(str(part.get("text") or "") for part in spoken)
    text = json.dumps(content) if isinstance(content, dict) else "" if content is None else str(content)
    if text.strip():
        return text
    if refused := message.get("refusal"):
        return str(refused)
    thought = next((value for name in _THOUGHTS if isinstance(value := message.get(name), str)), "")
    return f"<think>{thought}" if thought.strip() else text


def _garbled(text: str) -> RetryableError:
    return RetryableError(f"the teacher's answer is not a chat completion: {text[:200]!r}", garbled=True)


PIXELS: Final = 512 * 512
PATH: Final = "/chat/completions"
_SENT_AS_IS: Final = frozenset({"JPEG", "PNG", "WEBP"})
_ORIENTATION: Final = 0x0112
_FIXED: Final = frozenset({"model", "messages", "stream", "n"})
_OVERLOADED: Final = frozenset({408, 429, 503, 504, 529})
REFUSED: Final = frozenset({400, 413, 422})
"""By these a teacher refuses the question itself: asking again changes nothing."""
_SPENT: Final = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
_BUDGET: Final = "has no budget left", "add to it and start again"
_KEY_REFUSED: Final = "refuses the API key", "check the key and that it may use model {model!r}"
_FATAL: Final = {
    401: _KEY_REFUSED,
    402: _BUDGET,
    403: _KEY_REFUSED,
    404: ("knows no model {model!r}", "check its name, and the path in the address, often /v1"),
}
"""Statuses after which no question will be answered: what the teacher does, and the remedy."""


class UnansweredError(TeacherError):
    """A question that all tries left without an answer, or that was put into a batch file; it is asked anew by a later run."""


@dataclass(frozen=True, slots=True)
class TeacherRequest:
    """A question ready to be sent: `key` stands for its content (64 hex digits), `payload` is the body as JSON."""

    key: str
    payload: bytes
    question: TeacherQuestion


class Teacher(Protocol):
    """Answers questions, many at a time in one event loop. `request` prepares a question once for all tries of `send`."""

    name: str

    async def request(self, question: TeacherQuestion) -> TeacherRequest: ...

    async def send(self, request: TeacherRequest) -> Reply: ...

    async def close(self) -> None: ...


class OpenAITeacher:
    """A model behind an OpenAI-compatible address (vLLM, SGLang, a hosted one), over the `openai` package.

    `extra` goes into every body and into the key; a None in it takes a field away ({"max_tokens": None,
    "max_completion_tokens": 512}). `timeout_s` bounds a request as a whole. Neither address nor API key enters the key, so that
    answers outlive a move. `send` parses the reply itself: the package's models cost more time than the request.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        api_key: str = "",
        *,
        timeout_s: float = 120.0,
        pixels: int = PIXELS,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        if not re.match(r"https?://[^/\s]+", base_url):
            raise TeacherError(f"base URL {base_url!r} is not an http address; give one such as http://localhost:8000/v1")
        if not model or timeout_s <= 0:
            raise TeacherError(f"model {model!r}, time-out {timeout_s} s; give the model's name, and more than 0 seconds")
        if not (api_key.isascii() and api_key.isprintable()):
            raise TeacherError("the API key holds characters that no header can carry; copy it again")
        self.name, self.base_url, self.pixels, self.timeout_s = model, base_url, pixels, timeout_s
        self.extra, self._api_key = check_extra(extra or {}), api_key.strip()
        self._client: openai.AsyncOpenAI | None = None

    async def request(self, question: TeacherQuestion) -> TeacherRequest:
        return await prepare(question, self.name, self.pixels, self.extra)

    async def send(self, request: TeacherRequest) -> Reply:
        """One try. Raises RetryableError where another may help, TeacherError where none will; 400, 413 and 422 are replies."""
        import openai

        client = self._client = self._client or self._connect()
        options: Any = {"headers": {"Content-Type": "application/json"}}
        try:
            async with asyncio.timeout(self.timeout_s):
                text = await client.post(PATH, cast_to=str, content=request.payload, options=options)
        except openai.APIStatusError as error:
            return self._refusal(error.response.status_code, error.response.text, error.response.headers)
        except (openai.APIConnectionError, TimeoutError) as error:
            timed_out = isinstance(error, (openai.APITimeoutError, TimeoutError))
            if timed_out and type(error.__cause__).__name__ != "ConnectTimeout":  # aiohttp's word for a refused connection too
                shown = f"{self.base_url} gave no answer within {self.timeout_s:g} s; raise the time-out or lower the concurrency"
                raise RetryableError(shown, overloaded=True, reached=False) from error
            cause = self._hide(str(error.__cause__ or error))
            shown = f"{self.base_url} cannot be reached: {cause}; check the address and that the server runs"
            raise RetryableError(shown, reached=False) from error
        return reply_of(text, self.name)

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    def _connect(self) -> openai.AsyncOpenAI:
        """A client without tries of its own: it would hold its place in the pace while it waits, and give up a teacher that asks
        to wait for more than two minutes."""
        import openai

        timeout = openai.Timeout(self.timeout_s, connect=min(10.0, self.timeout_s))
        # The default transport spends twice the time on a request (benchmarks/teacher.py).
        http = openai.DefaultAioHttpClient(timeout=timeout) if importlib.util.find_spec("aiohttp") else None
        key = self._api_key or "none"
        return openai.AsyncOpenAI(base_url=self.base_url, api_key=key, timeout=timeout, max_retries=0, http_client=http)

    def _refusal(self, status: int, text: str, headers: Mapping[str, str]) -> Reply:
        """The reply, or the error, that a status of 400 and more stands for."""
        code, message = error_of(text)
        message = f"{status}: {self._hide(message)}"
        if status in REFUSED:
            return Reply("", "error", self.name, error=message)
        fatal = _FATAL.get(status) or (_BUDGET if code in _SPENT else None)
        if fatal is None and (status in (408, 409, 429) or status >= 500):
            raise RetryableError(message, status in _OVERLOADED, retry_after(headers, time.time()))
        problem, remedy = fatal or (f"answers {status}", f"check that it serves {PATH}")
        model = self.name
        raise TeacherError(f"{self.base_url} {problem.format(model=model)} ({message}); {remedy.format(model=model)}")

    def _hide(self, text: str) -> str:
        return text.replace(self._api_key, "***") if len(self._api_key) >= 8 else text


class RecordedTeacher:
    """Replies from a file of JSON lines {"stage", "qid", "text", "attempt"}, `attempt` 0 where left out.

    They are kept in a database of SQLite's own temporary files. A question without an entry gets a Reply with finish `error`; of
    two entries for one question the first counts. Raises DataError with file:line for a broken line.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._replies = path, sqlite3.connect("")
        self._replies.execute("CREATE TABLE replies (stage, qid, attempt, text, PRIMARY KEY (stage, qid, attempt))")

        def read(row: dict[str, Any]) -> tuple[str, str, int, str]:
            texts, attempt = (row["stage"], row["qid"], row["text"]), row.get("attempt", 0)
            if not all(isinstance(text, str) for text in texts) or type(attempt) is not int:
                raise TypeError("wrong types")
            return *texts[:2], attempt, texts[2]

        rows = json_lines(path, read, 'write recorded replies as {"stage": "reason", "qid": "9:6", "text": "..."}')
        self._replies.executemany("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?)", rows)
        with path.open("rb") as stream:
            self.name = f"recorded:{hashlib.file_digest(stream, 'sha256').hexdigest()[:8]}"

    async def request(self, question: TeacherQuestion) -> TeacherRequest:
        """Keyed by the file's digest and all that the question shows."""
        shown = [part if isinstance(part, str) else {"picture": ImageInput.open(part).sha256} for part in question.parts]
        asked = [self.name, question.stage, question.qid, question.attempt, question.system, shown]
        return TeacherRequest(hashlib.sha256(json.dumps(asked, separators=(",", ":")).encode()).hexdigest(), b"", question)

    async def send(self, request: TeacherRequest) -> Reply:
        asked = request.question.stage, request.question.qid, request.question.attempt
        row = self._replies.execute("SELECT text FROM replies WHERE (stage, qid, attempt) = (?, ?, ?)", asked).fetchone()
        if row is not None:
            return Reply(row[0], "stop", self.name)
        shown = f"{self.path} has no reply for stage {asked[0]!r}, qid {asked[1]!r}, attempt {asked[2]}; record one"
        return Reply("", "error", self.name, error=shown)

    async def close(self) -> None:
        self._replies.close()


def image_url(path: Path, pixels: int = PIXELS) -> tuple[str, str]:
    """An image as (data URL, hex SHA-256 of the bytes in it), of at most `pixels` pixels (0: any number).

    A plain JPEG, PNG or WebP within `pixels` is sent as it is; all else is decoded to upright RGB, shrunk, and sent as JPEG of
    quality 90. Raises ImageError, which names the file.
    """
    data = _read_image(path)
    media_type = _plain_type(data, pixels)
    return _url(data, media_type) if media_type else _shrunk_url(path, data, pixels)


def _read_image(path: Path) -> bytes:
    """The bytes of an image file, at most one more than may be decoded."""
    try:
        with path.open("rb") as stream:
            return stream.read(DEFAULT_LIMITS.file_bytes + 1)
    except OSError as error:
        raise ImageError(f"image {path} cannot be read: {error.strerror or error}; check the path and rights") from error


async def prepare(
    question: TeacherQuestion, model: str, pixels: int = PIXELS, extra: Mapping[str, Any] | None = None
) -> TeacherRequest:
    """The request of a question: a body of chat completions with its images as data URLs, shrunk in threads."""
    images: dict[Path, tuple[str, str]] = {}
    for path in question.images:
        data = _read_image(path)
        media_type = _plain_type(data, pixels)
        images[path] = _url(data, media_type) if media_type else await asyncio.to_thread(_shrunk_url, path, data, pixels)
    parts = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": f"sha256:{images[part][1]}"}}
        for part in question.parts
    ]
    body = {
        "model": model,
        "messages": [{"role": "system", "content": question.system}, {"role": "user", "content": parts}],
        "max_tokens": question.max_tokens,
        "temperature": question.temperature,
        "seed": question.seed,
        **(extra or {}),
    }
    payload = canonical({name: value for name, value in body.items() if value is not None})
    key = hashlib.sha256(payload).hexdigest()
    for url, digest in images.values():
        # Within a JSON string the quotation marks would be escaped: this is found only where an image stands.
        payload = payload.replace(f'"url":"sha256:{digest}"'.encode(), f'"url":"{url}"'.encode())
    return TeacherRequest(key, payload, question)


def canonical(body: Any) -> bytes:
    """JSON of which the SHA-256 is a key, where `sha256:...` of its bytes stands for each image's data URL."""
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode("ascii")


def check_extra(extra: Mapping[str, Any]) -> dict[str, Any]:
    if fixed := sorted(_FIXED & set(extra)):
        raise TeacherError(f"extra field {fixed[0]!r} is set by the build itself; leave it out")
    return dict(extra)


def _plain_type(data: bytes, pixels: int) -> str:
    """The media type of an image that can be sent as it is; "" where it must be decoded (and checked) first."""
    try:
        with open_image(data) as image:
            width, height = image.size
            plain = (
                image.format in _SENT_AS_IS
                and len(data) <= DEFAULT_LIMITS.file_bytes
                and 0 < width * height <= min(pixels or DEFAULT_LIMITS.pixels, DEFAULT_LIMITS.pixels)
                and max(width, height) <= DEFAULT_LIMITS.aspect_ratio * min(width, height)
                and image.mode in ("RGB", "L")
                and "transparency" not in image.info
                and ("exif" not in image.info or image.getexif().get(_ORIENTATION, 1) == 1)
                and not getattr(image, "is_animated", False)
                and extent_of(data).end == len(data)
            )
            return FORMATS[str(image.format)].media_type if plain else ""
    except (OSError, SyntaxError, ValueError, KeyError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return ""


def _shrunk_url(path: Path, data: bytes, pixels: int) -> tuple[str, str]:
    image = ImageInput.from_bytes(data, str(path)).load()
    if pixels and image.width * image.height > pixels:
        scale = (pixels / (image.width * image.height)) ** 0.5
        size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    return _url(file_bytes(image, quality=90), "image/jpeg")


def _url(data: bytes, media_type: str) -> tuple[str, str]:
    return data_url(data, media_type), hashlib.sha256(data).hexdigest()
