"""An encoder over an OpenAI-compatible endpoint of embeddings: vLLM's pooling, Infinity, text-embeddings-inference, hosted ones.

The model, its templates and its limits are the server's; here are the requests, in the form (forms.py) that the server takes. At
the start the server embeds probes: they give the width and prove that it reads images and pairs, since a server may take an image
and ignore it; a part of its answers, which identifies the model, goes into the fingerprint. Nothing reasons there: every route is
`direct`. Shapes: D width.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, Unpack

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from traceir.connection import Answer, TransientError
from traceir.engines.base import ConnectionOptions, HttpEngine, Payload, batches
from traceir.engines.forms import EngineInput, Form, Role, content_parts, form_for
from traceir.errors import InputError, ModelError
from traceir.image_formats import open_image
from traceir.images import ImageInput, data_url, file_bytes
from traceir.items import MODALITIES, Encoding, Item, Modality, Query, Route, Vector, check_route

log = logging.getLogger(__name__)

_START_S: Final = 60.0
_START_TRIES: Final = 3
_WRONG: Final = (400, 413, 415, 422)
"""Statuses by which a server refuses the input or the size of the request."""
_AGAIN: Final = (424, 500)
_REFUSED: Final = (*_WRONG, *_AGAIN, 404, 405, 501)
_ORIENTATION: Final = 0x0112
_SAME: Final = 0.99
"""Cosine from which two answers to a probe are one model's: another batch or precision stays above it, other weights below."""
_WORDS: Final = ("A lighthouse on a cliff above a stormy sea.", "The quarterly tax return of a small bakery.")
_TEXTS: Final = tuple(Item((text,)) for text in _WORDS)
_PROBE_COMPONENTS: Final = 32
"""Components of a probe's vector that a fingerprint keeps."""
_DIFFERENT: Final = 1e-3
"""What two different probes differ in at least, as 1 - cosine: more than one probe does between two batches in bfloat16."""


class EmbeddingsEncoder(HttpEngine):
    """Queries and items to Encodings by the endpoint at `address`, asked in a form (forms.py) for the model of that name.

    `dim`: the width asked for, where the model can be cut to it. `known`: the fingerprint of an index that is to be searched or
    added to; where the server's answers to the probes are those kept in it, up to rounding, it becomes this encoder's own.
    Raises ModelError where the server cannot be reached, has no such model, ignores images, or is another model under the same
    name than the one of `known`; InputError for inputs that the form or the server has no place for. Results are in the order of
    the input, of unit length.

    `fingerprint`: the model's name and some rounded components of its answers to the probes, not the address, which may change.
    `modalities`: those that form and server read. `tokens`: those that the server says it has read; 0 where it tells none.
    """

    kind = "endpoint"

    def __init__(
        self,
        address: str,
        model: str,
        form: str = "openai",
        *,
        dim: int | None = None,
        known: str = "",
        **options: Unpack[ConnectionOptions],
    ) -> None:
        if not model.strip():
            raise InputError("an endpoint of embeddings serves models by name; give one")
        if dim is not None and dim < 1:
            raise InputError(f"dim is {dim}; give at least 1")
        self.form, self.model, self._dim, self._known = form_for(form, model), model, dim, known
        self.prompt_version = f"{self.form.name}-1"
        self.width, self.tokens, self._lock = dim or 0, 0, threading.Lock()
        self._unread: dict[Modality, str] = {}
        scheme, _, rest = address.partition("://")
        host, _, path = rest.rstrip("/").removesuffix("/embeddings").partition("/")
        self._paths = (f"/{path.rstrip('/')}/embeddings",) if path else ("/v1/embeddings", "/embeddings")
        super().__init__(f"{scheme}://{host}", options)

    @property
    def modalities(self) -> tuple[Modality, ...]:
        of_form = MODALITIES[: {"texts": 1, "one": 2}.get(self.form.takes, 3)]
        return tuple(modality for modality in of_form if modality not in self._unread)

    def encode_items(self, items: Sequence[Item]) -> list[Encoding]:
        return self._encode(items, "candidate")

    def encode_queries(self, queries: Sequence[Query], *, route: Route = "auto") -> list[Encoding]:
        """Queries; all routes are the same here, since the models behind such endpoints do not write."""
        check_route(route)
        return self._encode(queries, "query")

    def _encode(self, contents: Sequence[Item | Query], role: Role) -> list[Encoding]:
        for content in contents:
            self._check(content)
        groups = []  # of inputs that are prepared together: those with images apart, as many as a request holds
        for most, with_images in ((self.form.texts, False), (self.form.images, True)):
            group = [(number, content) for number, content in enumerate(contents) if bool(content.images) == with_images]
            groups += [group[start : start + most] for start in range(0, len(group), most)]
        vectors: dict[int, Vector] = {}
        for of_group in self._connection.gather([partial(self._job, group, role) for group in groups]):
            vectors |= of_group
        return [Encoding(vectors[number], "direct", "", 0, 1.0, False) for number in range(len(contents))]

    def _check(self, content: Item | Query) -> None:
        """Raises InputError for what the form has no place for, and what the server has shown not to read."""
        asked = content.instruction if isinstance(content, Query) else None
        texts = sum(bool(text.strip()) for text in (asked or "", *content.parts) if isinstance(text, str))
        why = self.form.refusal(texts, len(content.images))
        if content.images:
            why = why or self._unread.get("image", "") or (self._unread.get("image,text", "") if texts else "")
        if why:
            raise InputError(f"{_named(content)}: {why}")

    async def _job(self, numbered: Sequence[tuple[int, Item | Query]], role: Role) -> dict[int, Vector]:
        """The vectors of a few inputs by their numbers, in as many requests as their size and fields need."""
        payloads = await asyncio.to_thread(lambda: [_payload(*pair, role, self.form) for pair in numbered])
        vectors: dict[int, Vector] = {}
        for batch in batches(payloads, len(payloads)):
            vectors |= await self._request(batch)
        return vectors

    async def _request(self, batch: Sequence[Payload]) -> dict[int, Vector]:
        """The vectors of one request; where it is refused, those of its halves, so that only what is wrong fails."""
        body = self._body(batch)
        answer = await self._connection.request("POST", self._path, body, refused=_REFUSED, check=self._settled)
        if answer.status < 300:
            return dict(zip((payload.number for payload in batch), self._read(answer.body, len(batch)), strict=True))
        if answer.status not in _WRONG:
            raise self._wrong(f"answers {answer.status}: {answer.message}")
        if len(batch) == 1:
            raise InputError(f"{_named(batch[0].content)}: {self.address} refuses it ({answer.status}: {answer.message})")
        half = len(batch) // 2
        return await self._request(batch[:half]) | await self._request(batch[half:])

    def _body(self, batch: Sequence[Payload]) -> Mapping[str, Any]:
        """A conversation, which is a list, as `messages`, all else under `input`."""
        bodies = [payload.body for payload in batch]
        inputs = {"messages": bodies[0]} if isinstance(bodies[0], list) else {"input": bodies}
        return {"model": self.model, **inputs, **batch[0].fields, **({"dimensions": self._dim} if self._dim else {})}

    def _settled(self, answer: Answer) -> None:
        """An inner error of the server's may pass."""
        if answer.status in _AGAIN:
            raise self._wrong(f"answers {answer.status}: {answer.message}", TransientError)

    def _read(self, body: Any, count: int) -> list[Vector]:
        """The vectors of an answer by their `index`, each checked and of unit length."""
        data = body.get("data") if isinstance(body, dict) else None
        if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
            raise self._wrong(f"answers with {str(body)[:120]!r}, which is no list of embeddings; is it an endpoint of them?")
        rows = {str(row.get("index", number)): row.get("embedding") for number, row in enumerate(data)}
        if len(data) != count or rows.keys() != {str(number) for number in range(count)}:
            raise self._wrong(f"returned {len(data)} vectors for {count} inputs, or not one for each; report it to its authors")
        usage = body.get("usage")
        tokens = usage.get("prompt_tokens", usage.get("total_tokens")) if isinstance(usage, dict) else None
        with self._lock:
            self.tokens += tokens if isinstance(tokens, int) else 0
        return [self._vector(rows[str(number)]) for number in range(count)]

    def _vector(self, value: Any) -> Vector:
        """Numbers, or base64 of float32 in little-endian order."""
        if isinstance(value, str):
            try:
                value = np.frombuffer(base64.b64decode(value, validate=True), dtype="<f4")
            except ValueError as error:
                raise self._wrong(f"returned a vector that is no list of numbers: {value[:80]}") from error
        return self._unit(value, "vector", self.width)

    def _meet(self) -> None:
        """Within fewer tries and seconds than later requests, since somebody waits."""
        connection = self._connection
        timeout_s, tries, self.in_flight = connection.timeout_s, connection.tries, connection.in_flight
        connection.timeout_s, connection.tries = min(timeout_s, _START_S), min(tries, _START_TRIES)
        self._find()
        self.fingerprint = self._recognise(f"{self.model}#{self._probe()}")
        connection.timeout_s, connection.tries = timeout_s, tries

    def _find(self) -> None:
        """The path of the endpoint: what the address names, else `/v1/embeddings`, else `/embeddings`, as Infinity has it."""
        body, answers = self._body([_payload(0, _TEXTS[0], "candidate", self.form)]), []
        for path in self._paths:
            self._path = path
            answers.append(self._connection.call("POST", self._path, body, refused=_REFUSED, check=self._settled))
            if answers[-1].status not in (404, 405):
                return
        raise self._wrong(f"answers {answers[0].status}: {answers[0].message}{self._names()}; are address and model right?")

    def _names(self) -> str:
        """The names of the models that the server lists, as part of a message."""
        for path in self._paths:
            try:
                body = self._connection.call("GET", path.replace("embeddings", "models"), refused=_REFUSED).body
            except ModelError:
                return ""
            listed = body.get("data") if isinstance(body, dict) else None
            if names := [str(model.get("id")) for model in listed or [] if isinstance(model, dict)]:
                return f" (its models: {', '.join(names[:20])})"
        return ""

    def _probe(self) -> str:
        """Asks for the probes, learns the width and what is read, and returns what a fingerprint keeps of the answers."""
        try:
            text, another = (encoding.vector for encoding in self.encode_items(_TEXTS))
        except InputError as error:
            reason = f"takes no text in the form `{self.form.name}`: {error}{self._names()}; give the form that it takes"
            raise self._wrong(reason) from error
        self.width = len(text)
        if not _tells_apart(text, text, [another]):
            raise self._wrong("gives one vector for different texts; is it a model of embeddings?")
        if self.form.takes == "texts":
            return _kept(text)
        image, again, other = probe_images()
        try:
            seen = [encoding.vector for encoding in self.encode_items([Item((each,)) for each in (image, again, other)])]
        except InputError as error:
            self._unread["image"] = self._unread["image,text"] = f"this server takes no images: {error}"
            log.warning("%s serves texts alone: %s", self.address, error)
            return _kept(text)
        if not _tells_apart(seen[0], seen[1], [seen[2]]):
            raise self._wrong(
                "takes images and does not see them: it gives other vectors for equal pixels, or equal ones for others; is "
                f"`{self.form.name}` its form (docs/engines.md)? For a model that reads texts alone write openai:{self.address}"
            )
        if self.form.takes != "one" and (why := self._unread_pairs(image, other, seen[0])):
            self._unread["image,text"] = why
        return f"{_kept(text)}.{_kept(seen[0])}"

    def _unread_pairs(self, image: ImageInput, other: ImageInput, alone: Vector) -> str:
        """Why pairs of an image and a text cannot be sent; "" where both count in them."""
        pairs = [(image, _WORDS[0]), (image, _WORDS[0]), (other, _WORDS[0]), (image, _WORDS[1])]
        try:
            first, again, *others = (encoding.vector for encoding in self.encode_items([Item(pair) for pair in pairs]))
        except InputError as error:
            return f"this server takes no image together with a text: {error}"
        if _tells_apart(first, again, [*others, alone]):
            return ""
        return "this server ignores the image or the text where both are in one input; index them as two items"

    def _recognise(self, own: str) -> str:
        """The known fingerprint where it is this very model's, else `own`; ModelError for another model of the same name."""
        name, _, code = self._known.rpartition("#")
        if name != self.model or self._known == own:
            return own
        cosines = _compared(code, own.rpartition("#")[2])
        if cosines and min(cosines) >= _SAME:
            return self._known
        reason = "cosines " + ", ".join(f"{cosine:.3f}" for cosine in cosines) + f", at least {_SAME} for one and the same model"
        if not cosines:
            reason = f"it was filled by another form than `{self.form.name}`, or of other modalities"
        raise self._wrong(
            f"serves another model as {self.model!r} than the one that filled the index: it answers the probes otherwise "
            f"({reason}); serve the former, in the form of then, or fill a new index"
        )


def _payload(number: int, content: Item | Query, role: Role, form: Form) -> Payload:
    instruction = (content.instruction or "").strip() if isinstance(content, Query) else ""
    parts = [part for part in content.parts if not isinstance(part, str) or part.strip()]
    sent = EngineInput(role, instruction, tuple(content_parts(parts, upright_url)))
    return Payload(number, content, form.tell(sent), form.fields_of(sent))


def upright_url(image: ImageInput) -> str:
    """The image for a server that may know neither rotation nor transparency: the file itself where it is an upright RGB JPEG
    or PNG, else upright pixels as PNG. Raises ImageError for what cannot be read."""
    upright = image.load()
    data, format = image.encoded()
    with open_image(data) as header:
        plain = header.mode == "RGB" and "transparency" not in header.info and header.getexif().get(_ORIENTATION, 1) == 1
    if plain and format.media_type in ("image/jpeg", "image/png"):
        return data_url(data, format.media_type)
    return data_url(file_bytes(upright, "PNG", compress_level=1), "image/png")


def _named(content: Item | Query) -> str:
    return f"{type(content).__name__.lower()} {content.id or content.text[:40] or '(no id)'!r}"


def probe_images() -> list[ImageInput]:
    """An image, the same pixels in other bytes, and another image of the same size.

    The second file differs from the first earlier than the third does, so that a server which reads files as text, however much
    of them, takes the equal ones for different ones first.
    """
    height, width = np.mgrid[0:96, 0:96]
    wave = ((height + width) * 255 // 190).astype(np.uint8)
    first = Image.fromarray(np.stack([wave, 255 - wave, np.full_like(wave, 90)], axis=-1))
    disc = ((height - 48) ** 2 + (width - 48) ** 2 < 900)[..., None]
    other = Image.fromarray(np.where(disc, np.array([230, 40, 30]), np.array([20, 60, 160])).astype(np.uint8))
    comment = PngInfo()  # stands behind the header, before the pixels
    comment.add_text("Comment", "the same pixels in other bytes")
    files = file_bytes(first, "PNG"), file_bytes(first, "PNG", pnginfo=comment), file_bytes(other, "PNG")
    return [ImageInput.from_bytes(data) for data in files]


def _tells_apart(first: Vector, again: Vector, others: Sequence[Vector]) -> bool:
    """Whether the equal are much nearer to each other than to each of the others."""
    near = 1 - _cosine(first, again)
    return near < 1 - _SAME and all(1 - _cosine(first, other) > _DIFFERENT + 4 * near for other in others)


def _kept(vector: Vector) -> str:
    """Some components of a probe's vector, evenly over its width, as bytes in base64 of URLs."""
    picked = vector[:: max(1, len(vector) // _PROBE_COMPONENTS)][:_PROBE_COMPONENTS]
    return base64.urlsafe_b64encode(np.round(picked / np.abs(picked).max() * 127).astype(np.int8).tobytes()).decode().rstrip("=")


def _compared(code: str, other: str) -> list[float]:
    """Cosines of the probes kept in two fingerprints, [] where they are not of one shape."""
    parts = ([part + "=" * (-len(part) % 4) for part in text.split(".")] for text in (code, other))
    try:
        ours, theirs = ([np.frombuffer(base64.urlsafe_b64decode(part), dtype=np.int8) for part in own] for own in parts)
    except ValueError:
        return []
    if [len(part) for part in ours] != [len(part) for part in theirs] or not all(part.any() for part in ours + theirs):
        return []
    return [_cosine(mine, yours) for mine, yours in zip(ours, theirs, strict=True)]


def _cosine(first: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    first, other = first.astype(np.float64), other.astype(np.float64)
    return float(first @ other / (np.linalg.norm(first) * np.linalg.norm(other)))
