"""What the server does, without HTTP: requests to Queries and Items, these to the scheduler and the index, answers to JSON."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import numpy as np

from traceir.errors import InputError, StoreError, TraceError
from traceir.images import ImageInput
from traceir.index import And, Eq, Filter, In, Index, Range, Stored
from traceir.index.filter_text import parse_filter
from traceir.index.pages import Position, position_of
from traceir.items import Hit, Item, Modality, Part, Query, Route
from traceir.retrieval.cutoff import Calibrations
from traceir.retrieval.pipeline import EncodedQuery, SearchOptions, combine, retrieve
from traceir.serve import schemas
from traceir.serve.bodies import MAX_ANSWER
from traceir.serve.fair import patient
from traceir.serve.jobs import BusyError, LateError, Listener, Served
from traceir.serve.metrics import Metrics
from traceir.serve.page import FacetCache
from traceir.serve.scheduler import Scheduler
from traceir.serve.strict import read_items
from traceir.serve.tenants import TenantIndex, TenantPresence, check_name
from traceir.serve.uploads import ImageFolder, Sources, UploadValidator, as_jpeg, image_of_item, without_paths
from traceir.world import notice

if TYPE_CHECKING:
    from traceir.retrieval.rerank import Reranker

Result = TypeVar("Result")
Input = TypeVar("Input")
Noted = Callable[[Query | Item], None]  # hears what a request asks, for the audit log; it may read images
log = logging.getLogger(__name__)
_BY_ID: Final = ("id", "-id")


@dataclass(frozen=True, slots=True)
class Service:
    """One model, one index, one store of uploaded images.

    `index` is what this caller may see (a tenant's view of it, or all), `sources` where the images of its requests may come
    from. Index calls run in threads: reads side by side, writes one after the other.
    """

    scheduler: Scheduler
    index: Index
    uploads: UploadValidator
    sources: Sources
    images: ImageFolder
    readers: ThreadPoolExecutor
    writer: ThreadPoolExecutor
    presence: TenantPresence
    metrics: Metrics
    deadline_s: float = 60.0
    cutoff: float | None = None
    calibrations: Calibrations = field(default_factory=Calibrations)
    facets: FacetCache = field(default_factory=FacetCache)
    noted: Noted | None = None
    reranker: Reranker | None = None
    reranking: ThreadPoolExecutor | None = None

    def of_tenant(self, tenant: str | None, noted: Noted | None = None) -> Service:
        """The same service over a tenant's part of the index, for one request; None is what belongs to no tenant."""
        index = TenantIndex(self.index, tenant, self.presence)
        sources, images = replace(self.sources, index=index), replace(self.images, tenant=tenant)
        return replace(self, index=index, sources=sources, images=images, noted=noted)

    async def read(self, work: Callable[[], Result]) -> Result:
        """The result of work with the index, or of other work that takes long, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, work)

    async def write(self, work: Callable[[], Result]) -> Result:
        """The same in the one thread that writes the index."""
        return await asyncio.get_running_loop().run_in_executor(self.writer, work)

    async def _rerank(self, work: Callable[[], Result]) -> Result:
        """The same in the one thread that reranks, so that such searches wait for each other and not all others for them."""
        return await asyncio.get_running_loop().run_in_executor(self.reranking, work)

    # Searching and encoding

    async def search(self, asked: schemas.SearchIn, listener: Listener | None = None) -> tuple[schemas.Trace, str]:
        """A query's trace, and the whole answer, a SearchOut in JSON. Raises InputError, BusyError, LateError, StoreError."""
        async with self._within_deadline():
            options = await self.read(lambda: self._options(asked))
            query, terms = await self._query(asked), await self._terms(asked)
            named = [("parts: " if asked.parts else "image: ", query), *terms]
            with without_paths(query.images, named[0][0]):
                await self._note([query for _, query in named])
            served: list[Served] = []
            if options.mode != "keyword":

                async def encode(before: str, content: Query) -> Served:
                    with without_paths(content.images, before):
                        return await self._encode(content, asked.route or "auto", listener if content is query else None)

                served = await self._each(named, encode)
            work = partial(self._answer, asked, query, options, served)
            return await (self.read(work) if options.rerank is None else self._rerank(work))

    def _options(self, asked: schemas.SearchIn) -> SearchOptions:
        """In a thread, since filters may be large."""
        check_name((asked.sort or "").removeprefix("-"))
        if asked.rerank and self.reranker is None:
            raise InputError("rerank is true, but this server has no reranker; start it with `traceir serve --rerank NAME`")
        return SearchOptions(
            k=asked.k or 10, where=filter_of(asked.where), exact=asked.exact is not False, cutoff=asked.cutoff or None,
            mode=asked.mode or "vector", keyword_weight=0.5 if asked.keyword_weight is None else asked.keyword_weight,
            sort=asked.sort, fold=asked.fold or False, after=asked.after, rerank=self.reranker if asked.rerank else None,
            rerank_s=self.deadline_s / 2, offset=asked.offset or 0,
        )  # fmt: skip

    def _answer(
        self, asked: schemas.SearchIn, query: Query, options: SearchOptions, served: Sequence[Served]
    ) -> tuple[schemas.Trace, str]:
        """The search itself, in a thread. `served`: the query's encoding and those of its terms, none in mode keyword."""
        started = time.perf_counter()
        encoded = EncodedQuery(query)
        if served:
            rate, above = self._thresholds(asked, query)
            options = replace(options, cutoff=rate)
            weights = [term.weight for term in asked.terms or ()]
            vectors = [each.encoding.vector for each in served]
            vector = combine(vectors[0], list(zip(weights, vectors[1:], strict=True)))
            encoded = EncodedQuery(query, vector, above, served[0].encoding.reasoning)
        try:
            [page] = retrieve(self.index, [encoded], options)
        except StoreError as error:
            if options.exact or self.index.info().cells:
                raise
            raise InputError("exact is false, but the index has no IVF lists; run `traceir index build-ann` first") from error
        seconds = time.perf_counter() - started - page.rerank_s
        self.metrics.seconds.labels("search").observe(seconds)
        if options.rerank is not None:
            self.metrics.seconds.labels("rerank").observe(page.rerank_s)
        size = sum(map(size_of, page.hits))
        if size > MAX_ANSWER and len(page.hits) > 1:
            shown_bytes = f"the {len(page.hits)} hits hold {size} bytes, more than {MAX_ANSWER}"
            raise InputError(f"{shown_bytes}; ask for fewer (k), the others by offset")
        trace = schemas.Trace.of(served[0] if served else None, seconds, page.rerank_s if options.rerank else None)
        out = schemas.SearchOut(
            hits=[_hit(hit) for hit in page.hits], trace=trace, offset=options.offset, k=options.k, more=page.next is not None,
            next=page.next, note=notice(self.scheduler.encoder, query, page.hits) if served else None, cutoff=page.cut,
        )  # fmt: skip
        return trace, out.model_dump_json()

    def _thresholds(self, asked: schemas.SearchIn, query: Query) -> tuple[float | None, Mapping[Modality, float]]:
        """The rate in force and what a hit must score more than. The server's own rate gives way where the index cannot tell."""
        rate = self.cutoff if asked.cutoff is None else asked.cutoff or None
        if rate is None:
            return None, {}
        try:
            return rate, self.calibrations.of(self.images.tenant, self.index).thresholds(query.modality, query.target, rate)
        except InputError:
            if asked.cutoff is not None:
                raise
            return None, {}

    async def embed(self, asked: schemas.EmbeddingsIn) -> list[Served]:
        """The encodings of all inputs, in order; the first that fails fails the request and ends the others."""
        async with self._within_deadline():
            contents = await self._contents(asked)
            await self._note([content for _, content in contents])

            async def encode(location: str, content: Query | Item) -> Served:
                with located(location), without_paths(content.images):
                    return await self._encode(content, asked.route or "auto")

            return await self._each(contents, encode)

    async def _encode(self, content: Query | Item, route: Route = "direct", listener: Listener | None = None) -> Served:
        tenant, seconds = self.images.tenant, self.deadline_s
        if isinstance(content, Query):
            served = await self.scheduler.encode_query(content, route, listener=listener, seconds=seconds, tenant=tenant)
        else:
            served = await self.scheduler.encode_item(content, seconds=seconds, tenant=tenant)
        self.metrics.encoded("query" if isinstance(content, Query) else "item", served)
        return served

    async def _note(self, contents: Sequence[Query | Item]) -> None:
        """In a thread, since it reads images."""
        if (noted := self.noted) is not None:
            with without_paths([image for content in contents for image in content.images]):
                await self.read(lambda: [noted(content) for content in contents])

    # What is asked

    async def _query(self, asked: schemas.SearchIn) -> Query:
        """The Query of a request, its images found but not decoded."""
        return Query(await self._content_of(asked), instruction=asked.instruction, target=asked.modality)

    async def _terms(self, asked: schemas.SearchIn) -> list[tuple[str, Query]]:
        """The terms, each with how messages name it, with instruction and target of the query."""
        if asked.terms and asked.mode == "keyword":
            raise InputError("terms move a vector, and mode keyword looks for words alone; write -WORD in the text instead")
        terms: list[tuple[str, Query]] = []
        for number, sent in enumerate(asked.terms or ()):
            with located(f"terms[{number}]"):
                if not (parts := await self._content_of(sent)):
                    raise InputError("it is empty; give a text, an image, or both")
                terms.append((f"terms[{number}]: ", Query(parts, instruction=asked.instruction, target=asked.modality)))
        return terms

    async def _content_of(self, sent: schemas.SearchIn | schemas.TermIn) -> tuple[Part, ...]:
        if sent.parts is not None and (sent.text is not None or sent.image is not None):
            raise InputError("parts stand beside text or image; send parts alone, or text and image")
        parts = [(f"parts[{number}]", part) for number, part in enumerate(sent.parts or ())]
        return await self._parts([*parts, ("image", sent.image), ("text", sent.text)])

    async def _parts(self, sent: Sequence[tuple[str, str | schemas.ImageIn | None]]) -> tuple[Part, ...]:
        """Texts that are not blank, and images, each with its location in the request."""
        parts: list[Part] = []
        for location, part in sent:
            if isinstance(part, schemas.ImageIn):
                parts.append(await self.uploads.take(part.model_dump(exclude_none=True), location, self.sources))
            elif part is not None and part.strip():
                parts.append(part)
        return tuple(parts)

    async def _contents(self, asked: schemas.EmbeddingsIn) -> list[tuple[str, Query | Item]]:
        """What is to be encoded, each with how messages name it."""
        if (asked.input is None) == (asked.messages is None):
            raise InputError("give exactly one of input and messages")
        name, sent = ("input", asked.input) if asked.messages is None else ("messages", asked.messages)
        if sent == []:
            raise InputError(f"{name} is empty; give at least one text, object or chat")
        several = isinstance(sent, list) and (name == "input" or any(isinstance(entry, list) for entry in sent))
        each: list[tuple[str, Any]] = (
            [(f"{name}[{n}]", entry) for n, entry in enumerate(sent or ())] if several else [(name, sent)]
        )
        return await self._each(each, lambda location, entry: self._content(location, entry, asked))

    async def _content(
        self, location: str, sent: str | schemas.ContentIn | list[Any] | schemas.Message, asked: schemas.EmbeddingsIn
    ) -> tuple[str, Query | Item]:
        instructions = [asked.instruction] if asked.instruction else []
        parts: list[tuple[str, str | schemas.ImageIn | None]] = []
        if isinstance(sent, str):
            parts = [(location, sent)]
        elif isinstance(sent, schemas.ContentIn):
            parts = [(f"{location}.image", sent.image), (location, sent.text)]
        elif not sent:
            raise InputError(f"{location} holds no message; give at least one")
        else:
            for name, role, part in _chat_parts(sent, location):
                if role in ("system", "developer") and isinstance(part, str):
                    instructions.append(part)
                else:
                    parts.append((name, part))
        if len(parts) + len(instructions) > schemas.MAX_PARTS + 1:
            raise InputError(f"{location} has more than {schemas.MAX_PARTS} parts; send fewer, or several chats")
        read = await self._parts(parts)
        with located(location):
            if (asked.input_type or ("query" if asked.messages is not None else "document")) == "document":
                return location, Item(read)
            return location, Query(read, instruction=" ".join(instructions) or None, target=asked.modality)

    # Items

    async def add(self, items: Sequence[object]) -> list[schemas.ItemResult]:
        """Indexes items, as they came in JSON; each has a result of its own, and what is told as added is durable."""
        read = await self.read(lambda: read_items(items))
        good = [(entry.id, entry) for entry in read if isinstance(entry, schemas.ItemIn)]
        made = dict(zip((id for id, _ in good), await self._each(good, self._made), strict=True))
        whole = [outcome for outcome in made.values() if not isinstance(outcome, str)]
        await self._note([item for item, _, _ in whole])
        new = await self.write(lambda: self._keep(whole)) if whole else set()
        results: list[schemas.ItemResult] = []
        for entry in read:
            if isinstance(entry, schemas.ItemResult):
                results.append(entry)
            elif isinstance(outcome := made[entry.id], str):
                results.append(schemas.ItemResult(id=entry.id, status="failed", error=outcome))
            else:
                status: Literal["added", "updated"] = "added" if entry.id in new else "updated"
                results.append(schemas.ItemResult(id=entry.id, status=status, cut=outcome[2].cut))
        return results

    async def _made(self, id: str, sent: schemas.ItemIn) -> tuple[Item, Item, Served] | str:
        """The item as it was sent, and with its image in a file that stays, and its encoding; or why it cannot be had."""
        try:
            parts = await self._parts([("image", sent.image), ("text", sent.text)])
            item = Item(parts, id=id, fields=sent.fields or {})
            with without_paths(item.images, "image: "):
                await self.read(lambda: self.index.check([item]))
                served = await self._encode(item)
                return item, await self.read(lambda: self._with_file(item)), served
        except (InputError, BusyError, LateError) as error:
            return str(error)
        except Exception as error:  # whatever becomes of one item, the others have their results
            log.error("item %r is not kept: %s", id, error, exc_info=not isinstance(error, TraceError))
            return "the server cannot keep it now; its log says why"

    def _with_file(self, item: Item) -> Item:
        parts = [self.images.keep(part, str(item.id)) if isinstance(part, ImageInput) else part for part in item.parts]
        return replace(item, parts=tuple(parts))

    def _keep(self, whole: Sequence[tuple[Item, Item, Served]]) -> set[str]:
        """Writes items into the index, by `write`; the ids of those that are new. Files that nothing names any more, those of
        before and those of items that cannot be written, go; what went meanwhile is written again."""
        try:
            items = [kept if all(image.path and image.path.exists() for image in kept.images) else self._with_file(item)
                     for item, kept, _ in whole]  # fmt: skip
            return self.index.upsert(items, np.stack([served.encoding.vector for _, _, served in whole]))
        finally:
            self._remove_unused([str(item.id) for item, _, _ in whole])

    def delete(self, ids: Sequence[str]) -> int:
        """Removes items and the images that were sent with them, by `write`; how many there were."""
        count = self.index.delete(list(ids))
        self._remove_unused(ids)
        return count

    def _remove_unused(self, ids: Sequence[str]) -> None:
        stored = self.index.get(list(ids))
        for id in ids:
            try:
                self.images.remove_unused(id, stored[id].image if id in stored else None)
            except OSError as error:
                log.error("an image of item %r is not removed: %s", id, error)

    def item(self, id: str) -> str | None:
        """An item, an ItemOut in JSON; None where there is none. By `read`."""
        stored = self.index.get([id]).get(id)
        return None if stored is None else schemas.ItemOut(**_shown(stored)).model_dump_json()

    def items(self, where: str, sort: str, after: str, offset: int, limit: int) -> str:
        """An ItemPage in JSON, by `read`: items that pass a filter, in order of a field, those up to `after` and the next
        `offset` left out. `after` is an id in order of id, and else what a page gave as `next`.

        A page ends early where its items are more than MAX_ANSWER bytes, unless it is one.
        """
        last = _position(sort, after) if after else None
        found = self.index.browse(parse_filter(where) if where else None, sort=sort, after=last, limit=offset + limit + 1)[
            offset:
        ]
        shown: list[Stored] = []
        size = 0
        for stored in found[:limit]:
            size += size_of(stored)
            if size > MAX_ANSWER and shown:
                break
            shown.append(stored)
        more = len(found) > len(shown)
        end = position_of(shown[-1], sort) if shown and more else None
        behind = end and (end[1] if sort in _BY_ID else json.dumps(end))
        items = [schemas.ItemOut(**_shown(stored)) for stored in shown]
        return schemas.ItemPage(items=items, offset=offset, more=more, next=behind).model_dump_json()

    async def size_of_image(self, sent: schemas.ImageIn) -> tuple[int, int]:
        """Width and height of an image that can be searched with, by its header. Raises InputError, ImageError."""
        image = await self.uploads.take(sent.model_dump(exclude_none=True), "image", self.sources)
        with without_paths([image], "image: "):
            return await self.read(image.size)

    async def jpeg(self, id: str, side: int) -> bytes:
        """The image of an item as JPEG, its longer side at most `side` pixels. Raises InputError where there is none."""
        image = await self.read(lambda: image_of_item(id, "image", self.sources))
        async with self.uploads.decoders.slot():
            with without_paths([image]):
                return await self.read(lambda: as_jpeg(image, side))

    # Many at a time

    async def _each(self, inputs: Sequence[tuple[str, Input]], work: Callable[[str, Input], Awaitable[Result]]) -> list[Result]:
        """The results of work over the inputs of one request, in order; a quarter of the server's capacity at a time at most.

        Where the server is full the first input is refused; later ones wait, so that work that has begun is kept. Where one
        fails, or the caller is cancelled, the others are cancelled too.
        """
        share = asyncio.Semaphore(max(1, self.scheduler.capacity // 4))

        async def limited(number: int, name: str, content: Input) -> Result:
            async with share:
                patient.set(number > 0)
                return await work(name, content)

        tasks = [asyncio.ensure_future(limited(number, *named)) for number, named in enumerate(inputs)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    @asynccontextmanager
    async def _within_deadline(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.deadline_s):
                yield
        except TimeoutError as error:
            raise LateError(f"not done within {self.deadline_s:g} s; ask for less at a time, or for the direct route") from error


@contextmanager
def located(location: str) -> Iterator[None]:
    """An InputError within says where in the request it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{location}: {error}") from error


def _chat_parts(chat: list[schemas.Message] | schemas.Message, location: str) -> Iterator[tuple[str, str, str | schemas.ImageIn]]:
    """The parts of a chat: location, role, and a text or an image."""
    for number, message in enumerate(chat if isinstance(chat, list) else [chat]):
        name = f"{location}[{number}].content"
        if isinstance(message.content, str):
            yield name, message.role, message.content
            continue
        for at, part in enumerate(message.content):
            yield f"{name}[{at}]", message.role, part if isinstance(part, str) else part.image_url or part.text or ""


def filter_of(where: schemas.Conditions | None) -> Filter | None:
    """The filter tree of a request's `where`."""
    if isinstance(where, str):
        return parse_filter(where) if where.strip() else None
    parts: list[Filter] = []
    for name, wanted in (where or {}).items():
        if isinstance(wanted, schemas.RangeIn):
            parts.append(Range(name, wanted.gte, wanted.lte))
        else:
            parts.append(In(name, tuple(wanted)) if isinstance(wanted, list) else Eq(name, wanted))
    return None if not parts else parts[0] if len(parts) == 1 else And(tuple(parts))


def size_of(item: Hit | Stored) -> int:
    """Bytes of the texts of an item, which is what can be much in an answer."""
    texts = [item.id, item.text or "", *item.fields]
    for value in item.fields.values():
        texts += map(str, value if isinstance(value, list | tuple) else [value])
    return sum(len(text.encode()) for text in texts)


def _shown(item: Hit | Stored) -> dict[str, Any]:
    """The fields of an ItemOut."""
    image = image_path(item.id, item.image)
    return {"id": item.id, "modality": item.modality, "text": item.text, "image": image, "fields": dict(item.fields)}


def _hit(hit: Hit) -> schemas.HitOut:
    return schemas.HitOut(score=hit.score, rank=hit.rank, scores=dict(hit.scores), similar=list(hit.similar), **_shown(hit))


def _position(sort: str, after: str) -> Position:
    """Where a page ended: an id, or a value and an id as `items` wrote them."""
    if sort in _BY_ID:
        return None, after
    try:
        value, id = list(json.loads(after)) if after.startswith("[") else []
        return value, id
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"after {after[:80]!r} is no end of a page sorted by {sort[:80]!r}; give what the page said is `next`"
        ) from error


def image_path(id: str, image: str | None) -> str | None:
    """Where a page finds the image of an item: its id in base64, so that no id can change the meaning of the path."""
    return None if image is None else f"/pictures/{base64.urlsafe_b64encode(id.encode()).decode().rstrip('=')}"


def id_in(name: str) -> str:
    """The id that `image_path` wrote. Raises InputError for what it cannot have written."""
    try:
        return base64.b64decode(name + "=" * (-len(name) % 4), altchars=b"-_", validate=True).decode()
    except ValueError as error:
        raise InputError(f"{name[:80]!r} is not the name of an image here; use the path that a hit gives") from error
