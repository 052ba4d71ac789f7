"""A teacher: whatever answers a question, behind an OpenAI-compatible address or recorded in a file."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import importlib.util
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from PIL import Image
from tqdm import tqdm

from traceir.cot.ask import Question
from traceir.cot.teachers.completion import Reply, TransientError, error_of, reply_of, retry_after
from traceir.cot.teachers.places import LineFiles, Places
from traceir.errors import DataError, ImageError, TeacherError
from traceir.image_formats import FORMATS, extent_of, open_image
from traceir.images import DEFAULT_LIMITS, ImageInput
from traceir.outside import read_json

if TYPE_CHECKING:
    import openai

PIXELS: Final = 512 * 512
PATH: Final = "/chat/completions"
_SENT_AS_IS: Final = frozenset({"JPEG", "PNG", "WEBP"})
_ORIENTATION: Final = 0x0112
_DATA_URL: Final = re.compile(r"data:image/[a-z]+;base64,")
_FIXED: Final = frozenset({"model", "messages", "stream", "n"})
_OVERLOADED: Final = frozenset({408, 429, 503, 504, 529})
REFUSED: Final = frozenset({400, 413, 422})
"""By these a teacher refuses the question itself: asking again changes nothing."""
_SPENT: Final = frozenset({"insufficient_quota", "billing_hard_limit_reached"})


@dataclass(frozen=True, slots=True)
class Request:
    """A question ready to be sent: `key` stands for its content (64 hex digits), `payload` is the body as JSON."""

    key: str
    payload: bytes
    stage: str
    qid: str


class Teacher(Protocol):
    """Answers questions, many at a time in one event loop."""

    name: str

    async def reply(self, question: Question) -> Reply: ...

    async def close(self) -> None: ...


@runtime_checkable
class BodyTeacher(Protocol):
    """A teacher that is reached by chat completions: its requests are keyed by their content and built once for all tries."""

    name: str

    async def request(self, question: Question) -> Request: ...

    async def send(self, request: Request) -> Reply: ...

    async def reply(self, question: Question) -> Reply: ...

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
        self.extra = _checked(extra or {})
        self._api_key = api_key.strip()
        self._client: openai.AsyncOpenAI | None = None

    async def request(self, question: Question) -> Request:
        return await request_of(question, self.name, self.pixels, self.extra)

    async def send(self, request: Request) -> Reply:
        """One try. Raises TransientError where another may help, TeacherError where none will; 400, 413 and 422 are replies."""
        import openai

        client = self._client = self._client or self._connect()
        options: Any = {"headers": {"Content-Type": "application/json"}}
        try:
            async with asyncio.timeout(self.timeout_s):
                text = await client.post(PATH, cast_to=str, content=request.payload, options=options)
        except openai.APIStatusError as error:
            return self._refusal(error.response.status_code, error.response.text, error.response.headers)
        except (openai.APITimeoutError, TimeoutError) as error:
            if type(error.__cause__).__name__ == "ConnectTimeout":  # aiohttp's transport says so of a refused connection too
                raise self._unreached(error) from error
            shown = f"{self.base_url} gave no answer within {self.timeout_s:g} s; raise the time-out or lower the concurrency"
            raise TransientError(shown, overloaded=True, reached=False) from error
        except openai.APIConnectionError as error:
            raise self._unreached(error) from error
        return reply_of(text, self.name)

    async def reply(self, question: Question) -> Reply:
        return await self.send(await self.request(question))

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    def _connect(self) -> openai.AsyncOpenAI:
        import openai

        timeout = openai.Timeout(self.timeout_s, connect=min(10.0, self.timeout_s))
        # The default transport spends twice the time on a request (benchmarks/teacher.py).
        http = openai.DefaultAioHttpClient(timeout=timeout) if importlib.util.find_spec("aiohttp") else None
        key = self._api_key or "none"
        return openai.AsyncOpenAI(base_url=self.base_url, api_key=key, timeout=timeout, max_retries=0, http_client=http)

    def _unreached(self, error: Exception) -> TransientError:
        cause = self._hide(str(error.__cause__ or error))
        return TransientError(
            f"{self.base_url} cannot be reached: {cause}; check the address and that the server runs", reached=False
        )

    def _refusal(self, status: int, text: str, headers: Mapping[str, str]) -> Reply:
        """The reply, or the error, that a status of 400 and more stands for."""
        code, told = error_of(text)
        told = self._hide(told)
        if status in REFUSED:
            return Reply("", "error", self.name, 0, 0, f"{status}: {told}")
        if status == 401 or status == 403:
            remedy = f"check the key and that it may use model {self.name!r}"
            raise TeacherError(f"{self.base_url} refuses the API key ({status}: {told}); {remedy}")
        if status == 404:
            remedy = "check its name, and the path in the address, often /v1"
            raise TeacherError(f"{self.base_url} knows no model {self.name!r} (404: {told}); {remedy}")
        if status == 402 or code in _SPENT:
            raise TeacherError(f"{self.base_url} has no budget left ({status}: {told}); add to it and start again")
        if status in (408, 409, 429) or status >= 500:
            wait = retry_after(headers, time.time())
            raise TransientError(f"{status}: {told}", overloaded=status in _OVERLOADED, retry_after=wait)
        raise TeacherError(f"{self.base_url} answers {status}: {told}; check that it serves {PATH}")

    def _hide(self, text: str) -> str:
        return text.replace(self._api_key, "***") if len(self._api_key) >= 8 else text


class RecordedTeacher:
    """Replies from a file of JSON lines {"stage", "qid", "text", "attempt"}, `attempt` 0 where left out.

    In memory are 16 bytes a line. A question without an entry gets a Reply with finish `error`; of two entries for one
    question the first counts. Raises DataError with file:line for a broken line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places, self._files = Places(), LineFiles()
        file, digest, start = self._files.add(path), hashlib.sha256(), 0
        try:
            with path.open("rb") as stream:
                for number, raw in enumerate(tqdm(stream, desc="reading recorded replies", unit="line", mininterval=2.0), 1):
                    digest.update(raw)
                    if raw.strip():
                        stage, qid, attempt, _ = _recorded(raw, f"{path}:{number}")
                        self._places.add(_hash(stage, qid, attempt), file, start)
                    start += len(raw)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}; give a file of recorded replies") from error
        self.name = f"recorded:{digest.hexdigest()[:8]}"

    async def reply(self, question: Question) -> Reply:
        wanted = (question.stage, question.qid, question.attempt)
        for file, offset in self._places.find(_hash(*wanted)):
            stage, qid, attempt, text = _recorded(self._files.line(file, offset), f"{self.path}, at byte {offset}")
            if (stage, qid, attempt) == wanted:
                return Reply(text, "stop", self.name, 0, 0)
        shown = f"{self.path} has no reply for stage {wanted[0]!r}, qid {wanted[1]!r}, attempt {wanted[2]}; record one"
        return Reply("", "error", self.name, 0, 0, shown)

    async def close(self) -> None:
        self._files.close()


def image_url(path: Path, pixels: int = PIXELS) -> tuple[str, str]:
    """A picture as (data URL, hex SHA-256 of the bytes in it), of at most `pixels` pixels (0: any number).

    A plain JPEG, PNG or WebP within `pixels` is sent as it is; all else is decoded to upright RGB, shrunk, and sent as JPEG of
    quality 90. Raises PictureError, which names the file.
    """
    data = read_image(path)
    kind = _kind(data, pixels)
    return _url(data, kind) if kind else _url(_shrink(path, data, pixels), "image/jpeg")


def read_image(path: Path) -> bytes:
    """The bytes of a picture file, not empty and within the limits of `pictures`."""
    limit = DEFAULT_LIMITS.file_bytes
    try:
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise ImageError(f"picture {path} cannot be read: {error.strerror or error}; check the path and rights") from error
    if not 0 < len(data) <= limit:
        raise ImageError(f"picture {path} has {'no' if not data else 'too many'} bytes (limit {limit}); replace or remove it")
    return data


def body_of(question: Question, model: str, pixels: int = PIXELS, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The chat.completions body of a question, pictures as data URLs."""
    urls = [image_url(path, pixels)[0] for path in question.images]
    return _body(question, model, urls, extra or {})


def key_of(body: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a body's canonical JSON in which `sha256:...` of its bytes stands for each picture's data URL."""
    return hashlib.sha256(_canonical(_without_images(body))).hexdigest()


async def request_of(question: Question, model: str, pixels: int, extra: Mapping[str, Any]) -> Request:
    """The request of a question. Pictures that have to be shrunk are, in a thread, so that the event loop goes on."""
    images = []
    for path in question.images:
        data = read_image(path)
        kind = _kind(data, pixels)
        images.append(_url(data, kind) if kind else _url(await asyncio.to_thread(_shrink, path, data, pixels), "image/jpeg"))
    told = _canonical(_body(question, model, [f"sha256:{digest}" for _, digest in images], extra))
    payload = told
    for url, digest in images:
        # Within a JSON string the quotation marks would be escaped: this is found only where `_body` put it.
        payload = payload.replace(f'"url":"sha256:{digest}"'.encode(), f'"url":"{url}"'.encode())
    return Request(hashlib.sha256(told).hexdigest(), payload, question.stage, question.qid)


def _body(question: Question, model: str, urls: list[str], extra: Mapping[str, Any]) -> dict[str, Any]:
    left = iter(urls)
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image_url", "image_url": {"url": next(left)}}
        for part in question.parts
    ]
    body = {
        "model": model,
        "messages": [{"role": "system", "content": question.system}, {"role": "user", "content": parts}],
        "max_tokens": question.max_tokens,
        "temperature": question.temperature,
        "seed": question.seed,
    }
    return {name: value for name, value in {**body, **_checked(extra)}.items() if value is not None}


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode("ascii")


def _without_images(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            name: _digest_of(one) if name == "url" and isinstance(one, str) else _without_images(one)
            for name, one in value.items()
        }
    return [_without_images(one) for one in value] if isinstance(value, list) else value


def _digest_of(url: str) -> str:
    match = _DATA_URL.match(url)
    return f"sha256:{hashlib.sha256(base64.b64decode(url[match.end() :])).hexdigest()}" if match else url


def _checked(extra: Mapping[str, Any]) -> dict[str, Any]:
    if fixed := sorted(_FIXED & set(extra)):
        raise TeacherError(f"extra field {fixed[0]!r} is set by the build itself; leave it out")
    return dict(extra)


def _kind(data: bytes, pixels: int) -> str:
    """The media type of a picture that can be sent as it is; "" where it must be decoded (and checked) first."""
    try:
        with open_image(data) as image:
            width, height = image.size
            bound = min(pixels or DEFAULT_LIMITS.pixels, DEFAULT_LIMITS.pixels)
            plain = (
                image.format in _SENT_AS_IS
                and 0 < width * height <= bound
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


def _shrink(path: Path, data: bytes, pixels: int) -> bytes:
    image = ImageInput.from_bytes(data, str(path)).load()
    if pixels and image.width * image.height > pixels:
        scale = (pixels / (image.width * image.height)) ** 0.5
        size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    written = BytesIO()
    image.save(written, "JPEG", quality=90)
    return written.getvalue()


def _url(data: bytes, kind: str) -> tuple[str, str]:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}", hashlib.sha256(data).hexdigest()


def _recorded(raw: bytes, where: str) -> tuple[str, str, int, str]:
    try:
        found = read_json(raw)
        stage, qid, text, attempt = found["stage"], found["qid"], found["text"], found.get("attempt", 0)
        if not all(isinstance(one, str) for one in (stage, qid, text)) or type(attempt) is not int:
            raise ValueError("wrong types")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        shown = f"not a recorded reply ({error!r})"
        raise DataError(f'{where}: {shown}; write {{"stage": "reason", "qid": "9:6", "text": "..."}}') from error
    return stage, qid, attempt, text


def _hash(stage: str, qid: str, attempt: int) -> int:
    told = "\0".join((stage, qid, str(attempt))).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "little")
