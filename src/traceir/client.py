"""A client of a TraceIR server (`traceir serve`): embed, search, add, look at, delete; and the server as an encoder.

with Client("http://localhost:8080", "tir_...") as client:
    found = client.search(Query.of(text="a red shoe"), k=5)
    print(found.reasoning, [hit.id for hit in found.hits])
    client.image(found.hits[0]).load().show()
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, Final, Literal, TypeVar, cast
from urllib.parse import quote

import numpy as np

from traceir.connection import Answer, Connected, Connection
from traceir.engines.base import Payload, batches
from traceir.engines.forms import content_parts, message
from traceir.errors import InputError, ModelError
from traceir.images import ImageInput, data_url
from traceir.index.store import check_ids, check_items
from traceir.items import Encoding, Hit, Item, Modality, Part, Query, Route, Value
from traceir.retrieval.cutoff import Cut
from traceir.retrieval.pipeline import Mode

MAX_INPUTS: Final = 64
"""Inputs, or ids, of one request; longer calls send several."""
MAX_INPUT_BYTES: Final = 31 * 1024 * 1024
"""Bytes of one input in JSON: the server's limit of a body (`serve/bodies.py`, 32 MiB) less the rest of the request."""
_PAGE: Final = 500
_NAMED: Final = re.compile(r"\b(?:input|messages)\[(\d+)\]")
_UNASKED: Final[Mapping[str, Any]] = {
    "mode": "vector", "keyword_weight": 0.5, "sort": None, "fold": False, "after": None, "rerank": False
}  # fmt: skip
_REFUSED: Final = (400, 404, 409, 413, 415, 422)
"""Statuses of a request that is wrong itself and would fail again."""
Read = TypeVar("Read")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The one model of a server: its name there, and what an index checks."""

    id: str
    fingerprint: str
    prompt_version: str
    width: int


@dataclass(frozen=True, slots=True)
class Found:
    """One search: hits of ranks from `offset` + 1, whether there are `more`, which `next` as `after` brings, the query's route
    (None where words alone were looked for), seconds by stage; `cut`: how many tokens of a long text the model did not read;
    `cutoff`: what a cut-off did, None where none was on."""

    hits: tuple[Hit, ...]
    more: bool
    route: Literal["reason", "direct"] | None
    reasoning: str
    tokens: int
    emb_probability: float | None
    truncated: bool
    seconds: Mapping[str, float]
    cut: int = 0
    cutoff: Cut | None = None
    next: str | None = None


@dataclass(frozen=True, slots=True)
class Added:
    """What became of one item; `error` says why it failed, `cut` how many tokens of a long text the model did not read."""

    id: str
    status: Literal["added", "updated", "failed"]
    error: str | None = None
    cut: int = 0


@dataclass(frozen=True, slots=True)
class Kept:
    """What a server keeps of an item; `image` is for `Client.image`."""

    id: str
    modality: Modality
    text: str | None
    image: str | None
    fields: Mapping[str, Value]


class Client(Connected):
    """One server by address and API key. Thread-safe; `close` when done, or use it in a `with`.

    Waits and tries again where the server is busy or restarting. Raises InputError where the server finds the request wrong, and,
    before it is sent, for an input of more than 31 MiB in JSON; ModelError where it cannot be reached, fails, or refuses the key.
    """

    def __init__(
        self, base_url: str, api_key: str = "", *, in_flight: int = 8, timeout_s: float = 120.0, tries: int = 5,
        pause_s: float = 0.25,
    ) -> None:  # fmt: skip
        self._connection = Connection(base_url, api_key, in_flight=in_flight, timeout_s=timeout_s, tries=tries, pause_s=pause_s)

    base_url = Connected.address

    @cached_property
    def model(self) -> ServedModel:
        """The server's model, asked for once."""
        return _read(ServedModel, next(iter(_list_of(self._call("GET", "/v1/models"), "data")), None))

    def embed_queries(self, queries: Sequence[Query], *, route: Route = "auto") -> list[Encoding]:
        """Encodings of queries by the given route, in order. Parts in an order of their own travel as a chat."""
        return self._embed(queries, "query", route)

    def embed_items(self, items: Sequence[Item]) -> list[Encoding]:
        """Encodings of candidates, in order."""
        return self._embed(items, "document", "direct")

    def search(
        self, query: Query, *, k: int = 10, offset: int = 0, route: Route = "auto", where: Mapping[str, Any] | str | None = None,
        exact: bool = True, cutoff: float | None = None, mode: Mode = "vector", keyword_weight: float = 0.5,
        terms: Sequence[tuple[float, Query | str]] = (), sort: str | None = None, fold: bool | float = False,
        after: str | None = None, rerank: bool = False,
    ) -> Found:  # fmt: skip
        """The k best items from rank `offset` + 1, or behind the page whose `next` is `after`; options as in `SearchOptions`,
        terms as in `Searcher.search`, of parts alone. `where`: a text in the language of filters, or field -> a value, a list of
        values, or {"gte", "lte"}. `cutoff`: 0 is none, None what the server does by itself. `rerank`: by the server's own
        reranker."""
        body: dict[str, Any] = {"k": k, "offset": offset, "route": route, "exact": exact, "cutoff": cutoff}
        newer = {"mode": mode, "keyword_weight": keyword_weight, "sort": sort, "fold": fold, "after": after, "rerank": rerank}
        body |= {name: value for name, value in newer.items() if value != _UNASKED[name]}  # an older server knows none of them
        body |= {"where": (where if isinstance(where, str) else dict(where)) if where else None}
        if query.parts:
            body["parts"] = _parts(query)
        if terms:
            contents = [(weight, Query.of(text=term) if isinstance(term, str) else term) for weight, term in terms]
            body["terms"] = [{"weight": weight, "parts": _parts(content)} for weight, content in contents]
        answer = self._call("POST", "/search", body | {"instruction": query.instruction, "modality": query.target})
        cut = answer.get("cutoff") and _read(Cut, answer["cutoff"])
        hits = tuple(_hit(entry) for entry in _list_of(answer, "hits"))
        trace = answer.get("trace") or {}
        seconds = {stage: spent for stage, spent in (trace.get("seconds") or {}).items() if spent is not None}
        known = {"hits": hits, "more": bool(answer.get("more")), "cutoff": cut, "next": answer.get("next"), "seconds": seconds}
        return _read(Found, {**trace, **known})

    def add(self, items: Sequence[Item]) -> list[Added]:
        """Indexes items, each of one image, one text, or both, and an id; in order, what became of each.

        `failed` are also items that cannot be sent (without an id, of another form, with an image that cannot be read or is too
        large), those of a request that the server refuses as a whole, and, where the server is lost after its first answer, all
        that it has not confirmed; they may be sent again. Raises ModelError where it does not answer the first request.
        """
        results: dict[int, Added] = {}
        answered, reason = False, "the server does not confirm it"
        for batch in batches(_sendable(items, results), MAX_INPUTS):
            try:
                answer = self._call("POST", "/items", {"items": [payload.body for payload in batch]})
                added = [_read(Added, entry) for entry in _list_of(answer, "results", len(batch))]
                results.update(zip((payload.number for payload in batch), added, strict=True))
            except InputError as error:
                results |= {payload.number: Added("", "failed", str(error)) for payload in batch}
            except ModelError as error:
                if not answered:
                    raise
                reason = str(error)
                break
            answered = True
        missing = Added("", "failed", reason)
        return [replace(results.get(number, missing), id=str(item.id or "")) for number, item in enumerate(items)]

    def get(self, id: str) -> Kept:
        """What is kept of an item. Raises InputError where there is none of this id."""
        # Dots are escaped too: `..` would be taken for the parent path.
        return _read(Kept, self._call("GET", f"/items/{quote(id, safe='').replace('.', '%2E')}"))

    def items(self, *, after: str = "", where: str = "", sort: str = "id") -> Iterator[Kept]:
        """All items that pass a filter, in order of id or of a field (`date`, `-date`), those up to `after` left out, read page
        by page as they are asked for."""
        asked = f"/items?limit={_PAGE}&where={quote(where, safe='')}&sort={quote(sort, safe='')}"
        while True:
            page = self._call("GET", f"{asked}&after={quote(after, safe='')}")
            yield from (_read(Kept, entry) for entry in _list_of(page, "items"))
            if not (after := str(page.get("next") or "")):
                break
        if page.get("more"):
            raise ModelError(f"{self.base_url} does not say how its items go on; is it `traceir serve` of the same release?")

    def image(self, hit: Hit | Kept, *, side: int = 2048) -> ImageInput:
        """The image of a hit or an item of this server, as JPEG, its longer side at most `side` (16 to 2048) pixels.

        Raises InputError where it has none, or the server does not show it.
        """
        if hit.image is None or not hit.image.startswith("/pictures/"):
            raise InputError(f"{hit.id!r} has no image of a server ({hit.image!r}); give a hit with one, of this client")
        path = f"{hit.image}?side={side}"
        answer = self._checked(path, self._connection.call("GET", path, refused=_REFUSED, raw=True))
        return ImageInput.from_bytes(answer.body, name=hit.id)

    picture = image  # its name in earlier releases

    def delete(self, ids: Sequence[str]) -> int:
        """Removes items by id; returns how many were there. Raises InputError, before anything is removed, for what is no id."""
        check_ids(ids)
        chunks = [list(ids[start : start + MAX_INPUTS]) for start in range(0, len(ids), MAX_INPUTS)]
        return sum(int(self._call("DELETE", "/items", {"ids": chunk})["deleted"]) for chunk in chunks)

    def _embed(self, contents: Sequence[Query | Item], input_type: str, route: Route) -> list[Encoding]:
        """Requests of one instruction and target each, since a request states them once, sent side by side."""
        payloads = []
        for number, content in enumerate(contents):
            plain = _plain(content.parts)
            body = _pair(content.parts) if plain else [message("user", content_parts(content.parts, _url))]
            shared: dict[str, str | None] = {"as": "input" if plain else "messages", "input_type": input_type, "route": route}
            if isinstance(content, Query):
                shared |= {"instruction": content.instruction, "modality": content.target}
            payloads.append(_payload(number, content, body, shared))
        payloads.sort(key=lambda payload: json.dumps(payload.fields))
        chunks = list(batches(payloads, MAX_INPUTS))
        encodings: dict[int, Encoding] = {}
        for chunk, answer in zip(
            chunks, self._connection.gather([partial(self._embed_chunk, chunk) for chunk in chunks]), strict=True
        ):
            read = map(_encoding, _list_of(answer, "data", len(chunk)))
            encodings.update(zip((payload.number for payload in chunk), read, strict=True))
        return [encodings[number] for number in range(len(contents))]

    async def _embed_chunk(self, chunk: Sequence[Payload]) -> dict[str, Any]:
        """The answer; where one input is refused, the error names its number in the whole call."""
        shared = dict(chunk[0].fields)
        body = {shared.pop("as"): [payload.body for payload in chunk], **shared, "encoding_format": "base64"}
        try:
            return await self._request("POST", "/v1/embeddings", body)
        except InputError as error:
            named = _NAMED.search(str(error))
            if named is None or int(named[1]) >= len(chunk):
                raise
            raise InputError(f"number {chunk[int(named[1])].number} of what was given (from 0) is refused: {error}") from error

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self._connection.gather([partial(self._request, method, path, body)])[0]

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        stated = body and {name: value for name, value in body.items() if value is not None}
        answer = self._checked(path, await self._connection.request(method, path, stated, refused=_REFUSED))
        if not isinstance(answer.body, dict):
            raise ModelError(f"{self.base_url}{path} answers with {str(answer.body)[:80]!r}; is it `traceir serve`?")
        return answer.body

    def _checked(self, path: str, answer: Answer) -> Answer:
        if answer.status > 299:
            raise InputError(f"{self.base_url}{path} refuses the request ({answer.status}): {answer.message}")
        return answer


class ServedEncoder:
    """A TraceIR server as an encoder (`EncoderLike` of `retrieval/search.py`): its vectors, over an index of one's own."""

    def __init__(self, client: Client) -> None:
        self.client = client

    @property
    def fingerprint(self) -> str:
        return self.client.model.fingerprint

    @property
    def prompt_version(self) -> str:
        return self.client.model.prompt_version

    @property
    def width(self) -> int:
        return self.client.model.width

    def encode_queries(self, queries: Sequence[Query], *, route: Route = "auto") -> list[Encoding]:
        return self.client.embed_queries(queries, route=route)

    def encode_items(self, items: Sequence[Item]) -> list[Encoding]:
        return self.client.embed_items(items)


def _payload(number: int, content: Item | Query, body: Any, fields: Mapping[str, Any] | None = None) -> Payload:
    """Raises InputError where the input alone is more than a request may hold."""
    payload = Payload(number, content, body, fields or {})
    if payload.bytes > MAX_INPUT_BYTES:
        named = ", ".join(str(image.path or image.name or "in memory") for image in content.images)
        raise InputError(
            f"{type(content).__name__.lower()} {content.id or '(no id)'} (images: {named or 'none'}) is {payload.bytes} bytes in "
            f"JSON, more than the {MAX_INPUT_BYTES} that a request takes; make it smaller"
        )
    return payload


def _parts(query: Query) -> list[str | dict[str, str]]:
    """As `/search` takes them; raises InputError where they are more than a request may hold."""
    parts: list[str | dict[str, str]] = [part if isinstance(part, str) else {"data": _url(part)} for part in query.parts]
    _payload(0, query, parts)
    return parts


def _hit(entry: Any) -> Hit:
    hit = _read(Hit, entry)
    return replace(hit, similar=tuple(hit.similar))


def _sendable(items: Sequence[Item], failed: dict[int, Added]) -> Iterator[Payload]:
    """The items as they are sent, made one by one; those that cannot be are noted in `failed` by their number."""
    for number, item in enumerate(items):
        try:
            if item.id is None or not _plain(item.parts):
                raise InputError(f"item {item.id or '(no id)'} cannot be sent: give it an id, and one image, one text, or both")
            check_items([Item(("the server checks the text itself",), id=item.id, fields=item.fields)])
            pair: dict[str, Any] = _pair(item.parts)
            if "image" in pair:
                pair["image"] = {"data": pair["image"]}
            payload = _payload(number, item, {"id": item.id, "fields": dict(item.fields), **pair})
        except InputError as error:
            failed[number] = Added("", "failed", str(error))
        else:
            yield payload


def _plain(parts: Sequence[Part]) -> bool:
    """Whether parts are at most one image and then at most one text, the form of `input`."""
    return [isinstance(part, ImageInput) for part in parts] in ([True], [False], [True, False])


def _pair(parts: Sequence[Part]) -> dict[str, str]:
    return dict(("text", part) if isinstance(part, str) else ("image", _url(part)) for part in parts)


def _url(image: ImageInput) -> str:
    """The file as it is, or pixels as PNG. Raises ImageError for what is no image."""
    data, format = image.encoded()
    return data_url(data, format.media_type)


def _encoding(entry: Any) -> Encoding:
    try:
        vector = np.frombuffer(base64.b64decode(entry["embedding"], validate=True), dtype="<f4").astype(np.float32)
        return _read(Encoding, {**entry["trace"], "vector": vector})
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError("the server's embeddings have no `trace`; is it `traceir serve`?") from error


def _read(kind: type[Read], entry: Any) -> Read:
    """A dataclass from the fields of the same names of a JSON object; ModelError where it has not those that are needed."""
    try:
        declared = fields(cast(Any, kind))  # always a dataclass
        wanted = {field.name: field.default is MISSING and field.default_factory is MISSING for field in declared}
        return kind(**{name: entry[name] for name, needed in wanted.items() if needed or name in entry})
    except (KeyError, TypeError) as error:
        why = f"cannot be read: {str(entry)[:80]!r}; is it `traceir serve` of the same release?"
        raise ModelError(f"a {kind.__name__} of the server {why}") from error


def _list_of(answer: Mapping[str, Any], name: str, count: int = -1) -> list[Any]:
    """A list of an answer, of `count` entries where that is known."""
    entries = answer.get(name)
    if isinstance(entries, list) and count in (-1, len(entries)):
        return entries
    shown = f"{len(entries)} {name!r} for {count}" if isinstance(entries, list) else f"no {name!r}: {str(answer)[:80]!r}"
    raise ModelError(f"the server's answer has {shown}; is it `traceir serve`?")
