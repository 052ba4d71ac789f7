"""What the server does, without HTTP: requests to Queries and Items, these to the scheduler and the index."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from traceir.cutoff import Calibrations, search_above
from traceir.errors import ImageError, InputError, StoreError, TraceError
from traceir.images import ImageInput
from traceir.index import And, Eq, Filter, In, Index, IndexInfo, Stored
from traceir.index import Range as RangeFilter
from traceir.items import Hit, Item, Modality, Part, Query, Route
from traceir.serve.bodies import MAX_ANSWER
from traceir.serve.fair import patient
from traceir.serve.image_store import ImageFolder, as_jpeg
from traceir.serve.jobs import BusyError, LateError, Listener, Served
from traceir.serve.metrics import Metrics
from traceir.serve.scheduler import Scheduler
from traceir.serve.schemas import (
    CHAT_ROLES,
    MAX_PARTS,
    ContentIn,
    Cutoff,
    EmbeddingsIn,
    HitOut,
    ImageIn,
    ItemIn,
    ItemOut,
    ItemResult,
    Range,
    SearchIn,
    SearchOut,
    Where,
    trace_of,
)
from traceir.serve.strict import read_items
from traceir.serve.tenants import Census, TenantIndex
from traceir.serve.uploads import Intake, Sources, image_of_item, told_without_paths, without_paths
from traceir.serve.values import MAX_TEXT
from traceir.world import notice

Told = TypeVar("Told")
Given = TypeVar("Given")
Noted = Callable[[Query | Item], None]
"""Hears what a request asks, for the audit log; it may read pictures."""
log = logging.getLogger(__name__)
_AROUND = 500
"""About the bytes of an item in JSON beside its texts."""


@dataclass(frozen=True, slots=True)
class Service:
    """One model, one index, one store of uploaded pictures.

    `index` is what this caller may see (a tenant's view of it, or all), `sources` where the pictures of its requests may come
    from. Index calls run in threads: reads side by side, writes one after the other.
    """

    scheduler: Scheduler
    index: Index
    intake: Intake
    sources: Sources
    images: ImageFolder
    readers: ThreadPoolExecutor
    writer: ThreadPoolExecutor
    census: Census
    metrics: Metrics
    deadline_s: float = 60.0
    cutoff: float | None = None
    calibrations: Calibrations = field(default_factory=Calibrations)

    def of_tenant(self, tenant: str | None) -> Service:
        """The same service over a tenant's part of the index; None is what belongs to no tenant."""
        index = TenantIndex(self.index, tenant, self.census)
        images = replace(self.images, tenant=tenant)
        return replace(self, index=index, sources=replace(self.sources, index=index), images=images)

    async def search(self, asked: SearchIn, *, listener: Listener | None = None, noted: Noted | None = None) -> SearchOut:
        """The hits of a query. Raises InputError, PictureError, BusyError, LateError, StoreError."""
        async with self._within_deadline():
            return await self._search(asked, listener, noted)

    async def _search(self, asked: SearchIn, listener: Listener | None, noted: Noted | None) -> SearchOut:
        where = await self._read(lambda: filter_of(asked.where)) if asked.where else None
        query = await self.query(asked)
        await self._note([query], noted)
        with told_without_paths(query.images):
            served = await self.scheduler.encode_query(query, asked.route, listener=listener, tenant=self.tenant)
        self.metrics.encoded("query", served)
        try:
            return await self._read(lambda: self._found(asked, query, where, served))
        except StoreError as error:
            if asked.exact or (await self.info()).cells:
                raise
            raise InputError("exact is false, but the index has no cells; run `traceir index optimise` first") from error

    def _found(self, asked: SearchIn, query: Query, where: Filter | None, served: Served) -> SearchOut:
        """The search itself, in a thread."""
        started = time.perf_counter()
        wanted = asked.offset + asked.k + 1
        rate, above = self._thresholds(asked, query)
        vector = np.stack([served.encoding.vector])
        [(found, cut)] = search_above(
            self.index, vector, wanted, rate, [above], where=where, modality=asked.modality, exact=asked.exact
        )
        trace = trace_of(served, time.perf_counter() - started)
        hits = found[asked.offset : asked.offset + asked.k]
        check_answer(hits)
        return SearchOut(
            hits=[hit_out(hit) for hit in hits], trace=trace, offset=asked.offset, k=asked.k, more=len(found) == wanted,
            note=notice(self.scheduler.encoder, query, hits),
            cutoff=None if cut is None else Cutoff(**asdict(cut)),
        )  # fmt: skip

    def _thresholds(self, asked: SearchIn, query: Query) -> tuple[float | None, dict[Modality, float]]:
        """The rate in force and what a hit must score more than. The server's own rate gives way where the index cannot tell."""
        rate = self.cutoff if asked.cutoff is None else asked.cutoff or None
        if rate is None:
            return None, {}
        calibration = self.calibrations.of(self.tenant, self.index)
        try:
            return rate, calibration.thresholds(query.modality, query.target, rate)
        except InputError:
            if asked.cutoff is not None:
                raise
            return None, {}

    async def embed(self, asked: EmbeddingsIn, *, noted: Noted | None = None) -> list[Served]:
        """The encodings of all inputs, in order; the first that fails fails the request and ends the others."""
        async with self._within_deadline():
            contents, places = await self._contents(asked)
            await self._note(contents, noted)

            async def encode(one: tuple[str, Query | Item]) -> Served:
                place, content = one
                try:
                    return await self._encode(content, asked.route)
                except InputError as error:
                    raise InputError(f"{place}: {error}") from error

            return await together(self._each(list(zip(places, contents, strict=True)), encode))

    async def add(self, items: Sequence[object], *, noted: Noted | None = None) -> list[ItemResult]:
        """Indexes items, as they came in JSON; each has a result of its own, and what is told as added is durable."""
        read = await self._read(lambda: read_items(items))
        good = [one for one in read if isinstance(one, ItemIn)]
        touched: set[str] = set()
        with self.images.holding([one.id for one in good]):
            results = iter(await self._add(good, touched, noted))
        if touched:
            await self._write(lambda: self._tidy(sorted(touched)))
        return [next(results) if isinstance(one, ItemIn) else one for one in read]

    async def _add(self, items: Sequence[ItemIn], touched: set[str], noted: Noted | None) -> list[ItemResult]:
        """Notes in `touched` whose pictures, those of before and those of now, are to be looked through."""
        made = await together(self._each(items, lambda one: self._made(one, touched)))
        good = [one for one in made if not isinstance(one, str)]
        await self._note([item for item, _ in good], noted)
        new: set[str] = set()
        if good:
            kept = [item for item, _ in good]
            vectors = np.stack([served.encoding.vector for _, served in good])
            new = await self._write(lambda: self.index.upsert(kept, vectors))
            touched |= {str(item.id) for item in kept}.difference(new)
        return [
            ItemResult(id=given.id, status="failed", error=one)
            if isinstance(one, str)
            else ItemResult(id=given.id, status="added" if given.id in new else "updated", cut=one[1].cut)
            for given, one in zip(items, made, strict=True)
        ]

    async def delete(self, ids: Sequence[str]) -> int:
        """Removes items and the pictures that were sent with them; how many there were."""

        def remove() -> int:
            count = self.index.delete(list(ids))
            self._tidy(ids)
            return count

        return await self._write(remove)

    @property
    def tenant(self) -> str | None:
        """Whose part of the index this is."""
        return self.images.tenant

    async def item(self, id: str) -> Stored | None:
        return (await self._read(lambda: self.index.get([id]))).get(id)

    async def items(self, after: str, offset: int, limit: int) -> tuple[list[ItemOut], bool]:
        """Items in order of id, those up to `after` and the next `offset` left out, and whether there are more.

        A page ends early where its items are more than MAX_ANSWER bytes, unless it is one.
        """
        where = RangeFilter("id", low=after) if after else None

        def page() -> tuple[list[ItemOut], bool]:
            found: list[ItemOut] = []
            size = 0
            beyond = (stored for stored in self.index.scan(where) if stored.id != after)
            for place, stored in enumerate(beyond):
                if place >= offset:
                    found.append(item_out(stored))
                    size += size_of(stored)
                if len(found) > limit or (size > MAX_ANSWER and len(found) > 1):
                    return found[:-1], True
            return found, False

        return await self._read(page)

    async def first(self, count: int) -> list[Stored]:
        """The first items in order of id."""
        return await self._read(lambda: list(islice(self.index.scan(), count)))

    async def info(self) -> IndexInfo:
        return await self._read(self.index.info)

    async def query(self, asked: SearchIn) -> Query:
        """The Query of a request, its pictures found but not decoded."""
        if asked.parts is not None and (asked.text is not None or asked.image is not None):
            raise InputError("parts stand beside text or image; send parts alone, or text and image")
        given: list[tuple[str, str | ImageIn]] = [(f"parts[{place}]", one) for place, one in enumerate(asked.parts or ())]
        given += [(place, one) for place, one in (("image", asked.image), ("text", asked.text)) if one is not None]
        parts = [one if isinstance(one, str) else await self.image(one, place) for place, one in given]
        kept = tuple(part for part in parts if not isinstance(part, str) or part.strip())
        return Query(kept, instruction=asked.instruction, target=asked.modality)

    async def jpeg(self, id: str, side: int) -> bytes:
        """The picture of an item as JPEG, its longer side at most `side` pixels. Raises InputError where there is none."""
        image = await self._read(lambda: image_of_item(id, "picture", self.sources))
        async with self.intake.decoding():
            try:
                return await self._read(lambda: as_jpeg(image, side))
            except ImageError as error:
                raise ImageError(without_paths([image], error)) from error

    async def image(self, given: ImageIn, place: str = "image") -> ImageInput:
        """The picture that a request means, once it has been decoded."""
        return await self.intake.take(given.model_dump(exclude_none=True), place, self.sources)

    async def _contents(self, asked: EmbeddingsIn) -> tuple[list[Query | Item], list[str]]:
        """What is to be encoded, and how messages name each of it."""
        if (asked.input is None) == (asked.messages is None):
            raise InputError("give exactly one of input and messages")
        if asked.messages is not None:
            if not asked.messages:
                raise InputError("messages is empty; give one chat, or a list of chats")
            several = isinstance(asked.messages[0], list)
            chats = asked.messages if several else [asked.messages]
            places = [f"messages[{number}]" if several else "messages" for number in range(len(chats))]
            return await together([self._of_chat(*one, asked) for one in zip(places, chats, strict=True)]), places
        inputs = [asked.input] if isinstance(asked.input, str) else list(asked.input or [])
        if not inputs:
            raise InputError("input is empty; give at least one text or object")
        places = ["input"] if isinstance(asked.input, str) else [f"input[{number}]" for number in range(len(inputs))]
        return await together([self._of_input(*one, asked) for one in zip(places, inputs, strict=True)]), places

    async def _of_input(self, place: str, given: str | ContentIn, asked: EmbeddingsIn) -> Query | Item:
        parts: list[Part] = []
        if isinstance(given, ContentIn) and given.image is not None:
            image = ImageIn(data=given.image) if isinstance(given.image, str) else given.image
            parts.append(await self.image(image, f"{place}.image"))
        text = given if isinstance(given, str) else given.text
        if text is not None and text.strip():
            parts.append(text)
        return _content(tuple(parts), asked.instruction, asked, asked.input_type or "document", place)

    async def _of_chat(self, place: str, chat: Any, asked: EmbeddingsIn) -> Query | Item:
        """One chat: the system's texts are the instruction, the user's contents the parts."""
        if not isinstance(chat, list) or not chat:
            raise InputError(f"{place} is not a list of messages; write [{{'role': 'user', 'content': ...}}]")
        parts: list[Part] = []
        told: list[str] = [asked.instruction] if asked.instruction else []
        for number, message in enumerate(chat):
            here = f"{place}[{number}]"
            role = message.get("role") if isinstance(message, dict) else None
            if role not in CHAT_ROLES:
                raise InputError(f"{here}: the role is {str(role)[:40]!r}; write one of {', '.join(CHAT_ROLES)}")
            contents = message.get("content")
            if not isinstance(contents, str | list):
                raise InputError(f"{here}.content is neither a text nor a list of contents; send one of them")
            for at, one in enumerate(contents if isinstance(contents, list) else [contents]):
                if len(parts) + len(told) > MAX_PARTS:
                    raise InputError(f"{place} has more than {MAX_PARTS} parts; send fewer, or several chats")
                part = await self._of_chat_part(one, f"{here}.content[{at}]" if isinstance(contents, list) else f"{here}.content")
                if role in ("system", "developer") and isinstance(part, str):
                    told.append(part)
                elif not isinstance(part, str) or part.strip():
                    parts.append(part)
        return _content(tuple(parts), " ".join(told) or None, asked, asked.input_type or "query", place)

    async def _of_chat_part(self, given: Any, place: str) -> Part:
        if isinstance(given, str):
            return _bounded(given, place)
        kind = given.get("type") if isinstance(given, dict) else None
        if kind in ("text", "input_text") and isinstance(given.get("text"), str):
            return _bounded(str(given["text"]), place)
        if kind in ("image_url", "image", "input_image", "image_base64"):
            address = given.get(kind) or given.get("image_url")
            address = address.get("url") if isinstance(address, dict) else address
            if isinstance(address, str):
                return await self.image(address_in(address, place), place)
        raise InputError(f"{place}: a content of type {str(kind)[:40]!r} cannot be read; send texts and image_url")

    async def _encode(self, content: Query | Item, route: Route) -> Served:
        with told_without_paths(content.images):
            if isinstance(content, Query):
                served = await self.scheduler.encode_query(content, route, seconds=self.deadline_s, tenant=self.tenant)
            else:
                served = await self.scheduler.encode_item(content, seconds=self.deadline_s, tenant=self.tenant)
        self.metrics.encoded("query" if isinstance(content, Query) else "item", served)
        return served

    async def _made(self, given: ItemIn, touched: set[str]) -> tuple[Item, Served] | str:
        """The item, its picture a file that stays, and its encoding; or why it cannot be had."""
        fields: Mapping[str, Any] = given.fields  # what of them an index keeps is its to say
        try:
            image = await self.image(given.image) if given.image is not None else None
            item = Item.of(text=given.text, image=image, id=given.id, fields=fields)
            with told_without_paths(item.images):
                await self._read(lambda: self.index.check([item]))
                if image is not None:
                    touched.add(given.id)
                    kept = await self._read(partial(self.images.keep, image, given.id))
                    item = Item.of(text=given.text, image=kept, id=given.id, fields=fields)
                    await self._read(lambda: self.index.check([item]))
            return item, await self._encode(item, "direct")
        except (InputError, BusyError, LateError) as error:
            return str(error)
        except Exception as error:  # whatever becomes of one item, the others have their results
            log.error("item %r is not kept: %s", given.id, error, exc_info=not isinstance(error, TraceError))
            return "the server cannot keep it now; its log says why"

    def _each(self, given: Sequence[Given], work: Callable[[Given], Awaitable[Told]]) -> list[Coroutine[Any, Any, Told]]:
        """Work over many inputs of one request, which takes at most a quarter of the server's capacity at a time.

        Where there is no room the first input says so; the others wait for it, so that what is begun is not lost.
        """
        share = asyncio.Semaphore(max(1, self.scheduler.capacity // 4))

        async def one(place: int, content: Given) -> Told:
            async with share:
                patient.set(place > 0)
                return await work(content)

        return [one(place, content) for place, content in enumerate(given)]

    @asynccontextmanager
    async def _within_deadline(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.deadline_s):
                yield
        except TimeoutError as error:
            raise LateError(f"not done within {self.deadline_s:g} s; ask for less at a time, or for the direct route") from error

    async def _note(self, contents: Sequence[Query | Item], noted: Noted | None) -> None:
        """In a thread, since it reads pictures."""
        if noted is not None:
            told = noted
            with told_without_paths([image for one in contents for image in one.images]):
                await self._read(lambda: [told(one) for one in contents])

    def _tidy(self, ids: Sequence[str]) -> None:
        there = self.index.get(list(ids))
        for id in ids:
            try:
                self.images.tidy(id, there[id].image if id in there else None)
            except OSError as error:
                log.error("a picture of item %r is not thrown away: %s", id, error)

    async def _write(self, work: Callable[[], Told]) -> Told:
        return await asyncio.get_running_loop().run_in_executor(self.writer, work)

    async def _read(self, work: Callable[[], Told]) -> Told:
        return await asyncio.get_running_loop().run_in_executor(self.readers, work)


async def together(works: Sequence[Coroutine[Any, Any, Told]]) -> list[Told]:
    """The results of all, in order; where one fails, or the caller is cancelled, the others are cancelled too."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _bounded(text: str, place: str) -> str:
    if len(text) > MAX_TEXT:
        raise InputError(f"{place}: {len(text)} characters, at most {MAX_TEXT}")
    return text


def address_in(address: str, place: str) -> ImageIn:
    """The picture of a chat's `image_url`: a data URL, or an address."""
    if address.startswith("data:"):
        return ImageIn(data=address)
    if len(address) > 2048:
        raise InputError(f"{place}: image_url is neither a data: URL nor an address of at most 2048 characters")
    return ImageIn(url=address)


def filter_of(where: Where | None) -> Filter | None:
    """The filter tree of a request's `where`."""
    parts: list[Filter] = []
    for name, wanted in (where or {}).items():
        if isinstance(wanted, Range):
            parts.append(RangeFilter(name, wanted.gte, wanted.lte))
        elif isinstance(wanted, list):
            parts.append(In(name, tuple(wanted)))
        else:
            parts.append(Eq(name, wanted))
    return None if not parts else parts[0] if len(parts) == 1 else And(tuple(parts))


def size_of(one: Hit | Stored | HitOut | ItemOut) -> int:
    """Bytes of the texts of an item, which is what can be much in an answer."""
    texts = [one.id, one.text or "", *one.fields]
    for value in one.fields.values():
        texts += [str(part) for part in (value if isinstance(value, list | tuple) else [value])]
    return sum(len(text.encode()) for text in texts)


def size_in_json(shown: Sequence[HitOut | ItemOut]) -> int:
    """About the bytes of hits or items in an answer: their texts, and what stands around them."""
    return sum(_AROUND + size_of(one) for one in shown)


def check_answer(hits: Sequence[Hit]) -> None:
    """Raises InputError where hits, if they are several, are too many bytes for one answer."""
    size = sum(map(size_of, hits))
    if size > MAX_ANSWER and len(hits) > 1:
        raise InputError(
            f"the {len(hits)} hits hold {size} bytes, more than {MAX_ANSWER}; ask for fewer (k), the others by offset"
        )


def hit_out(hit: Hit) -> HitOut:
    return HitOut(
        id=hit.id, score=hit.score, rank=hit.rank, modality=hit.modality, text=hit.text,
        image=image_path(hit.id, hit.image), fields=dict[str, Any](hit.fields),
    )  # fmt: skip


def item_out(stored: Stored) -> ItemOut:
    return ItemOut(
        id=stored.id, modality=stored.modality, text=stored.text, image=image_path(stored.id, stored.image),
        fields=dict[str, Any](stored.fields),
    )  # fmt: skip


def image_path(id: str, image: str | None) -> str | None:
    """Where a page finds the picture of an item: its id in base64, so that no id can change the meaning of the path."""
    if image is None:
        return None
    return f"/pictures/{base64.urlsafe_b64encode(id.encode()).decode().rstrip('=')}"


def id_in(name: str) -> str:
    """The id that `picture_path` wrote. Raises InputError for what it cannot have written."""
    try:
        return base64.b64decode(name + "=" * (-len(name) % 4), altchars=b"-_", validate=True).decode()
    except ValueError as error:
        raise InputError(f"{name[:80]!r} is not the name of a picture here; use the path that a hit gives") from error


def _content(parts: tuple[Part, ...], instruction: str | None, asked: EmbeddingsIn, role: str, place: str) -> Query | Item:
    try:
        if role == "query":
            return Query(parts, instruction=instruction, target=asked.modality)
        return Item(parts)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
