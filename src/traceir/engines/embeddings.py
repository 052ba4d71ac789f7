"""An encoder over an OpenAI-compatible endpoint of embeddings: vLLM's pooling, Infinity, text-embeddings-inference, hosted ones.

The model, its templates and its limits are the server's; here are the form of the request (forms.py), many requests in flight,
and the checks. At the start the server is asked for probes: they tell the width, and prove that it reads pictures and pairs,
since a server may take a picture and ignore it. Nothing reasons there: every route is `direct`. Shapes: D width.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import re
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any, Final

import numpy as np
from PIL import Image as Pillow

from traceir.connection import Answer, Connection
from traceir.engines.forms import Form, Image, Role, Said, Text, form_for
from traceir.errors import InputError, ModelError
from traceir.image_formats import open_image
from traceir.images import ImageInput
from traceir.items import Encoding, Item, Modality, Query, Route, Vector, check_route

log = logging.getLogger(__name__)

REQUEST_BYTES: Final = 24 * 1024 * 1024
"""Bytes of inputs in one request, beyond which no other input joins."""
SAME: Final = 0.99
"""Cosine from which two answers to a probe are one model's: another batch or precision stays above it, other weights below."""
_START_TRIES: Final = 3
_START_TIMEOUT_S: Final = 60.0
_WRONG: Final = (400, 413, 415, 422)
"""By these a server says that it is the input, or the size of the request, that it does not take."""
_REFUSED: Final = (*_WRONG, 404, 405, 424, 500, 501)
_AGAIN: Final = (424, 500)
_PROBED: Final = 32
"""Components of a probe's vector that a fingerprint keeps."""
_LEAST: Final = 1e-3
"""What two different probes differ in at least, as 1 - cosine: more than one probe does between two batches in bfloat16."""
_ORIENTATION: Final = 0x0112


@dataclass(frozen=True, slots=True)
class _Piece:
    """One input as it is told, what its request states once, and its bytes in JSON."""

    content: Item | Query
    told: Any
    fields: Mapping[str, Any]
    bytes: int


class EmbeddingsEncoder:
    """Queries and items to Encodings by the endpoint at `address`, asked in a form (forms.py) for the model of that name.

    `dim`: the width asked for, where the model can be cut to it. `known`: the fingerprint of an index that is to be searched or
    added to; where the server's answers to the probes are those kept in it, up to rounding, it becomes this encoder's own.
    Raises ModelError where the server cannot be reached, has no such model, ignores pictures, or is another model under the same
    name than the one of `known`; InputError for inputs that the form or the server has no place for. Results are in the order of
    the input, of unit length. Thread-safe; all threads share the `in_flight` requests.
    """

    def __init__(
        self,
        address: str,
        model: str,
        form: str = "openai",
        *,
        dim: int | None = None,
        known: str = "",
        api_key: str = "",
        in_flight: int = 64,
        timeout_s: float = 120.0,
        tries: int = 7,
        pause_s: float = 0.25,
    ) -> None:
        if not model.strip():
            raise InputError("an endpoint of embeddings serves models by name; give one")
        if dim is not None and dim < 1:
            raise InputError(f"dim is {dim}; give at least 1")
        self.form, self.model, self._dim = form_for(form, model), model, dim
        self.in_flight, self._width = in_flight, dim or 0
        self._base, self._paths = _places(address)
        self._path = self._paths[0]
        self._tokens, self._lock = 0, threading.Lock()
        self._no_images, self._no_pairs = "", ""
        first = min(timeout_s, _START_TIMEOUT_S), min(tries, _START_TRIES)
        self._connection = Connection(
            self._base, api_key, in_flight=in_flight, timeout_s=first[0], tries=first[1], pause_s=pause_s
        )
        try:
            self._path = self._find()
            self._fingerprint = self._recognise(known, f"{model}#{self._probe()}")
        except BaseException:
            self.close()
            raise
        self._connection.timeout_s, self._connection.tries = timeout_s, tries

    @property
    def address(self) -> str:
        return self._base

    @property
    def fingerprint(self) -> str:
        """The model's name, and some rounded components of its answers to the probes; not the address, which may change."""
        return self._fingerprint

    @property
    def prompt_version(self) -> str:
        """The form of request: another one makes other vectors."""
        return f"{self.form.name}-1"

    @property
    def width(self) -> int:
        return self._width

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Of the inputs that form and server read, as the probes have shown."""
        images = self.form.takes != "texts" and not self._no_images
        pairs = images and self.form.takes != "one" and not self._no_pairs
        return ("text", *(("image",) if images else ()), *(("image,text",) if pairs else ()))

    @property
    def tokens(self) -> int:
        """Tokens that the server says it has read for this encoder, as it counts them; 0 where it tells none."""
        return self._tokens

    def encode_items(self, items: Sequence[Item]) -> list[Encoding]:
        return self._encode(items, "candidate")

    def encode_queries(self, queries: Sequence[Query], *, route: Route = "auto") -> list[Encoding]:
        """Queries; all routes are the same here, since the models behind such endpoints do not write."""
        check_route(route)
        return self._encode(queries, "query")

    def close(self) -> None:
        """Closes the connections to the server."""
        self._connection.close()

    def __enter__(self) -> EmbeddingsEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Encoding

    def _encode(self, contents: Sequence[Item] | Sequence[Query], role: Role) -> list[Encoding]:
        for content in contents:
            self._check(content)
        groups = list(_groups(contents, self.form))
        jobs = [partial(self._job, [contents[place] for place in places], role) for places in groups]
        found: dict[int, Vector] = {}
        for places, vectors in zip(groups, self._connection.gather(jobs), strict=True):
            found.update(zip(places, vectors, strict=True))
        return [Encoding(found[place], "direct", "", 0, 1.0, False) for place in range(len(contents))]

    def _check(self, content: Item | Query) -> None:
        """Raises InputError for what the form has no place for, and what the server has shown not to read."""
        texts, images = _counts(content)
        try:
            self.form.check(texts, images)
            if images and self._no_images:
                raise InputError(self._no_images)
            if images and texts and self._no_pairs:
                raise InputError(self._no_pairs)
        except InputError as error:
            raise InputError(f"{_named(content)}: {error}") from error

    async def _job(self, contents: Sequence[Item | Query], role: Role) -> list[Vector]:
        """The vectors of a few inputs, in as many requests as their size and fields need."""
        pieces = await asyncio.to_thread(lambda: [_piece(content, role, self.form) for content in contents])
        return [vector for batch in _batches(pieces) for vector in await self._some(batch)]

    async def _some(self, batch: Sequence[_Piece]) -> list[Vector]:
        """The vectors of one request; where it is refused, those of its halves, so that only what is wrong fails."""
        answer = await self._post(self._body(batch))
        if answer.status < 300:
            return self._read(answer.body, len(batch))
        if len(batch) > 1 and answer.status in _WRONG:
            half = len(batch) // 2
            return [*await self._some(batch[:half]), *await self._some(batch[half:])]
        if answer.status in _WRONG:
            raise InputError(f"{_named(batch[0].content)}: {self._base} refuses it ({answer.status}: {answer.said})")
        raise self._wrong(f"answers {answer.status}: {answer.said}")

    def _body(self, batch: Sequence[_Piece]) -> dict[str, Any]:
        told = self.form.body([piece.told for piece in batch], batch[0].fields)
        return {"model": self.model, **told, **({"dimensions": self._dim} if self._dim else {})}

    async def _post(self, body: Mapping[str, Any]) -> Answer:
        """The request; an inner error of the server's is tried again, as what passes is by the connection."""
        for attempt in range(1, self._connection.tries + 1):
            answer = await self._connection.request("POST", self._path, body, refused=_REFUSED)
            if answer.status not in _AGAIN or attempt == self._connection.tries:
                return answer
            await asyncio.sleep(self._connection.pause_s * 2 ** (attempt - 1))
        raise AssertionError("unreachable")

    # What comes back

    def _read(self, body: Any, count: int) -> list[Vector]:
        """The vectors of an answer by their `index`, each checked and of unit length."""
        data = body.get("data") if isinstance(body, dict) else None
        if not isinstance(data, list) or not all(isinstance(one, dict) for one in data):
            raise self._wrong(f"answers with {str(body)[:120]!r}, which is no list of embeddings; is it an endpoint of them?")
        if sorted(str(one.get("index", place)) for place, one in enumerate(data)) != sorted(map(str, range(count))):
            raise self._wrong(f"returned {len(data)} vectors for {count} inputs, or not one for each; report it to its makers")
        usage = body.get("usage")
        told = usage.get("prompt_tokens", usage.get("total_tokens")) if isinstance(usage, dict) else None
        with self._lock:
            self._tokens += told if isinstance(told, int) else 0
        ordered = sorted(enumerate(data), key=lambda placed: int(placed[1].get("index", placed[0])))
        return [self._vector(one.get("embedding")) for _, one in ordered]

    def _vector(self, told: Any) -> Vector:
        try:
            raw = base64.b64decode(told, validate=True) if isinstance(told, str) else None
            with np.errstate(over="ignore"):  # what float32 does not hold becomes infinite, and is told of below
                vector = np.asarray(told if raw is None else np.frombuffer(raw, dtype="<f4"), dtype=np.float32)
        except (TypeError, ValueError, binascii.Error) as error:
            raise self._wrong(f"returned a vector that is no list of numbers: {str(told)[:80]}") from error
        if vector.ndim != 1 or not len(vector):
            raise self._wrong(f"returned an embedding of shape {vector.shape}; only models of one vector an input can be used")
        if not np.isfinite(vector).all() or not vector.any():
            raise self._wrong("returned a vector that is not finite or all zero; are its weights whole, is its precision right?")
        if self._width and len(vector) != self._width:
            raise self._wrong(f"returned a vector of {len(vector)} components where {self._width} are due")
        return vector / np.linalg.norm(vector)

    # The start

    def _find(self) -> str:
        """The path of the endpoint: what the address names, else `/v1/embeddings`, else `/embeddings`, as Infinity has it."""
        body = self._body([_piece(_WORDS[0], "candidate", self.form)])
        answers = []
        for path in self._paths:
            self._path = path
            answers.append(self._connection.gather([partial(self._post, body)])[0])
            if answers[-1].status not in (404, 405):
                return path
        raise self._wrong(f"answers {answers[0].status}: {answers[0].said}{self._names()}; are address and model right?")

    def _names(self) -> str:
        """The names of the models that the server lists, as part of a message."""
        for path in self._paths:
            try:
                answer = self._connection.call("GET", path.replace("embeddings", "models"), refused=_REFUSED)
            except ModelError:
                return ""
            data = answer.body.get("data") if isinstance(answer.body, dict) else None
            if names := [str(one.get("id")) for one in data or [] if isinstance(one, dict)]:
                return f" (its models: {', '.join(names[:20])})"
        return ""

    def _probe(self) -> str:
        """Asks for the probes, learns the width and what is read, and returns what a fingerprint keeps of the answers."""
        try:
            first, second = (encoding.vector for encoding in self.encode_items(_WORDS))
        except InputError as error:
            told = f"takes no text in the form `{self.form.name}`: {error}{self._names()}; give the form that it takes"
            raise self._wrong(told) from error
        self._width = len(first)
        if not _tells_apart(first, first, [second]):
            raise self._wrong("gives one vector for different texts; is it a model of embeddings?")
        if self.form.takes == "texts":
            return _kept(first)
        image, again, other = _probe_images()
        try:
            seen = [encoding.vector for encoding in self.encode_items([Item((one,)) for one in (image, again, other)])]
        except InputError as error:
            self._no_images = f"this server takes no pictures: {error}"
            log.warning("%s serves texts alone: %s", self._base, error)
            return _kept(first)
        if not _tells_apart(seen[0], seen[1], [seen[2]]):
            raise self._wrong(
                "takes pictures and does not see them: it gives other vectors for equal pixels, or equal ones for others; is "
                f"`{self.form.name}` its form (docs/engines.md)? For a model that reads texts alone write openai:{self._base}"
            )
        if self.form.takes != "one":
            self._no_pairs = self._probe_pairs(image, other, seen[0])
        return f"{_kept(first)}.{_kept(seen[0])}"

    def _probe_pairs(self, image: ImageInput, other: ImageInput, alone: Vector) -> str:
        """Why pairs of a picture and a text cannot be sent; "" where both count in them."""
        words = [str(item.parts[0]) for item in _WORDS]
        pairs = [Item((image, words[0])), Item((image, words[0])), Item((other, words[0])), Item((image, words[1]))]
        try:
            found = [encoding.vector for encoding in self.encode_items(pairs)]
        except InputError as error:
            return f"this server takes no picture together with a text: {error}"
        if not _tells_apart(found[0], found[1], [*found[2:], alone]):
            return "this server ignores the picture or the text where both are in one input; index them as two items"
        return ""

    def _recognise(self, known: str, own: str) -> str:
        """`known` where it is this very model's, else `own`; raises ModelError for another model of the same name."""
        if known.rpartition("#")[0] != self.model or known == own:
            return own
        cosines = _compared(known.rpartition("#")[2], own.rpartition("#")[2])
        if not cosines or min(cosines) < SAME:
            told = "cosines " + ", ".join(f"{cosine:.3f}" for cosine in cosines) + f", at least {SAME} for one and the same model"
            if not cosines:
                told = f"it was filled by another form than `{self.form.name}`, or of other modalities"
            raise self._wrong(
                f"serves another model as {self.model!r} than the one that filled the index: it answers the probes otherwise "
                f"({told}); serve the former, in the form of then, or fill a new index"
            )
        return known

    def _wrong(self, what: str) -> ModelError:
        return ModelError(f"the endpoint {self._base}{self._path} {what}")


# Inputs


def _counts(content: Item | Query) -> tuple[int, int]:
    """Texts, of which an instruction is one, and pictures."""
    asked = content.instruction if isinstance(content, Query) else None
    texts = [asked or "", *(part for part in content.parts if isinstance(part, str))]
    return sum(bool(text.strip()) for text in texts), len(content.images)


def _groups(contents: Sequence[Item | Query], form: Form) -> Iterator[list[int]]:
    """Places of inputs that are prepared together: those with pictures apart, as many as a request holds."""
    for most, with_images in ((form.texts, False), (form.images, True)):
        places = [place for place, content in enumerate(contents) if bool(content.images) == with_images]
        yield from (places[start : start + most] for start in range(0, len(places), most))


def _piece(content: Item | Query, role: Role, form: Form) -> _Piece:
    instruction = (content.instruction or "").strip() if isinstance(content, Query) else ""
    parts = tuple(
        Image(data_url(part)) if isinstance(part, ImageInput) else Text(part)
        for part in content.parts
        if isinstance(part, ImageInput) or part.strip()
    )
    said = Said(role, instruction, parts)
    told = form.tell(said)
    return _Piece(content, told, form.fields(said), len(json.dumps(told)))


def _batches(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """In order, each of like fields and of at most `REQUEST_BYTES`, or of one larger piece."""
    batch: list[_Piece] = []
    for piece in pieces:
        size = sum(one.bytes for one in batch) + piece.bytes
        if batch and (size > REQUEST_BYTES or batch[0].fields != piece.fields):
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def data_url(image: ImageInput) -> str:
    """The picture for a server that may know neither rotation nor transparency: the file itself where it is an upright RGB JPEG
    or PNG, else upright pixels as PNG. Raises ImageError for what cannot be read."""
    upright = image.load()
    data, format = image.encoded()
    if format.media_type not in ("image/jpeg", "image/png") or not _plain(data):
        packed = BytesIO()
        upright.save(packed, "PNG", compress_level=1)
        return _url("image/png", packed.getvalue())
    return _url(format.media_type, data)


def _plain(data: bytes) -> bool:
    with open_image(data) as image:
        return image.mode == "RGB" and "transparency" not in image.info and image.getexif().get(_ORIENTATION, 1) == 1


def _url(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def _named(content: Item | Query) -> str:
    kind, shown = type(content).__name__.lower(), content.id or content.text[:40] or "(no id)"
    return f"{kind} {shown!r}"


def _places(address: str) -> tuple[str, tuple[str, ...]]:
    """The server's root, and the paths under which the endpoint may be."""
    found = re.fullmatch(r"(https?://[^/\s]+)(/\S*)?", address.rstrip("/"))
    if found is None:
        raise InputError(f"address {address!r} is not an http address; give one such as http://localhost:8000/v1")
    path = (found[2] or "").removesuffix("/embeddings").rstrip("/")
    return found[1], (f"{path}/embeddings",) if path else ("/v1/embeddings", "/embeddings")


# Probes

_WORDS: Final = (
    Item(("A lighthouse on a cliff above a stormy sea.",)),
    Item(("The quarterly tax return of a small bakery.",)),
)


def _probe_images() -> tuple[ImageInput, ImageInput, ImageInput]:
    """A picture, the same pixels in other bytes, and another picture of the same size.

    The second is told from the first earlier in its file than the third is. A server that reads the file as text therefore
    finds the equal ones different before it finds the different ones so, however much of it it reads.
    """
    height, width = np.mgrid[0:96, 0:96]
    wave = ((height + width) * 255 // 190).astype(np.uint8)
    first = np.stack([wave, 255 - wave, np.full_like(wave, 90)], axis=-1)
    disc = ((height - 48) ** 2 + (width - 48) ** 2 < 900)[..., None]
    second = np.where(disc, np.array([230, 40, 30]), np.array([20, 60, 160]))
    plain, other = (_png(pixels) for pixels in (first, second))
    return ImageInput.from_bytes(plain), ImageInput.from_bytes(_with_note(plain)), ImageInput.from_bytes(other)


def _png(pixels: Any) -> bytes:
    packed = BytesIO()
    Pillow.fromarray(pixels.astype(np.uint8)).save(packed, "PNG")
    return packed.getvalue()


def _with_note(png: bytes) -> bytes:
    """The same PNG with a chunk of text behind its header (8 bytes of signature, 25 of IHDR)."""
    chunk = b"tEXtComment\0the same pixels in other bytes"
    note = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return png[:33] + note + png[33:]


def _tells_apart(first: Vector, again: Vector, others: Sequence[Vector]) -> bool:
    """Whether the equal are much nearer to each other than to each of the others."""
    near = 1 - _cosine(first, again)
    return near < 1 - SAME and all(1 - _cosine(first, other) > _LEAST + 4 * near for other in others)


def _cosine(one: Vector, other: Vector) -> float:
    return float(np.dot(one.astype(np.float64), other.astype(np.float64)) / (np.linalg.norm(one) * np.linalg.norm(other)))


def _kept(vector: Vector) -> str:
    """Some components of a probe's vector, evenly over its width, as bytes in base64 of URLs."""
    picked = vector[:: max(1, len(vector) // _PROBED)][:_PROBED]
    return base64.urlsafe_b64encode(np.round(picked / np.abs(picked).max() * 127).astype(np.int8).tobytes()).decode().rstrip("=")


def _compared(one: str, other: str) -> list[float]:
    """Cosines of the probes kept in two fingerprints, [] where they are not of one shape."""
    ours, theirs = ([_unpacked(part) for part in code.split(".")] for code in (one, other))
    if [len(part) for part in ours] != [len(part) for part in theirs] or not all(part.any() for part in ours + theirs):
        return []
    return [_cosine(mine, yours) for mine, yours in zip(ours, theirs, strict=True)]


def _unpacked(code: str) -> Vector:
    try:
        raw = base64.urlsafe_b64decode(code + "=" * (-len(code) % 4))
    except (binascii.Error, ValueError):
        return np.zeros(0, dtype=np.float32)
    return np.frombuffer(raw, dtype=np.int8).astype(np.float32)
