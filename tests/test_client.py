"""The client of a server: bodies within its bound, results kept, items and pictures read back; a connection that is closed."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_sglang import served
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from traceir import client as client_module
from traceir.client import MAX_INPUT_BYTES, Client
from traceir.connection import Connection
from traceir.engines import base
from traceir.engines.base import REQUEST_BYTES
from traceir.errors import InputError, ModelError
from traceir.images import ImageInput
from traceir.items import Hit, Item, Query
from traceir.serve.bodies import MAX_BODY, BodyMiddleware
from traceir.serve.schemas import EmbeddingsIn, ItemOut, ItemPage, ItemResult, ItemsIn, SearchIn
from traceir.serve.service import id_in, image_path
from traceir.serve.strict import read_items

BOUND = 40_000
"""Bytes of a body that the stand-in takes; the client is told of bounds as much smaller than the real ones."""
ROAD = {"route": "direct", "reasoning": "", "tokens": 0, "emb_probability": 1.0, "truncated": False, "seconds": {}}


class Shop:
    """The routes that the client uses, behind the server's own guard of bodies; `answer` may stand in for all of them."""

    def __init__(self) -> None:
        self.kept: dict[str, ItemOut] = {}
        self.sizes: list[int] = []
        self.answers: list[Response | None] = []
        self.hanging, self.let_go = threading.Event(), threading.Event()

    def app(self) -> Any:
        async def answer(request: Request) -> Response:
            self.sizes.append(len(await request.body()))
            told = self.answers.pop(0) if self.answers else None
            return told or await getattr(self, request.scope["path"].split("/")[1])(request)

        return BodyMiddleware(Starlette(routes=[Route("/{rest:path}", answer, methods=["GET", "POST"])]), most=BOUND)

    async def items(self, request: Request) -> Response:
        if request.method == "POST":
            read = read_items(ItemsIn.model_validate(await request.json()).items)
            for one in read:
                if isinstance(one, ItemResult):
                    continue
                image = image_path(one.id, "shown" if one.image else None)
                self.kept[one.id] = ItemOut(id=one.id, modality="text", text=one.text, image=image, fields=one.fields)
            told = [one if isinstance(one, ItemResult) else ItemResult(id=one.id, status="added") for one in read]
            return JSONResponse({"results": [one.model_dump() for one in told]})
        if request.scope["path"] == "/items":
            after, limit = request.query_params["after"], int(request.query_params["limit"])
            beyond = [self.kept[id] for id in sorted(self.kept) if id > after]
            page = ItemPage(items=beyond[:limit], offset=0, more=len(beyond) > limit)
            return Response(page.model_dump_json(), media_type="application/json")
        found = self.kept.get(request.path_params["rest"].removeprefix("items/"))
        return Response(found.model_dump_json()) if found else JSONResponse({"error": {"message": "no such item"}}, 404)

    async def pictures(self, request: Request) -> Response:
        assert id_in(request.path_params["rest"].removeprefix("pictures/")) in self.kept
        side, packed = int(request.query_params["side"]), BytesIO()
        Image.new("RGB", (side, side // 2), "teal").save(packed, "JPEG")
        return Response(packed.getvalue(), media_type="image/jpeg")

    async def v1(self, request: Request) -> Response:
        asked = EmbeddingsIn.model_validate(await request.json())
        vector = base64.b64encode(np.zeros(4, "<f4").tobytes()).decode()
        inputs = asked.messages if asked.messages is not None else asked.input
        return JSONResponse({"data": [{"embedding": vector, "trace": ROAD} for _ in inputs or []]})

    async def search(self, request: Request) -> Response:
        SearchIn.model_validate(await request.json())
        return JSONResponse({"hits": [], "trace": ROAD, "more": False})

    async def hang(self, _: Request) -> Response:
        self.hanging.set()
        await asyncio.to_thread(self.let_go.wait, 20)
        return JSONResponse({})


@pytest.fixture
def shop() -> Shop:
    return Shop()


@pytest.fixture
def address(shop: Shop) -> Iterator[str]:
    with served(shop.app()) as found:
        yield found
        shop.let_go.set()


@pytest.fixture
def client(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr(base, "REQUEST_BYTES", 30_000)
    monkeypatch.setattr(client_module, "MAX_INPUT_BYTES", 38_000)
    with Client(address, pause_s=0.01) as made:
        yield made


def noise(side: int, name: str = "") -> ImageInput:
    """A picture that does not pack: about 4 * side * side bytes in base64."""
    packed = BytesIO()
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(packed, "PNG")
    return ImageInput.from_bytes(packed.getvalue(), name=name)


def test_the_bounds_of_the_client_fit_those_of_the_server() -> None:
    assert REQUEST_BYTES <= MAX_INPUT_BYTES < MAX_BODY


def test_requests_stay_within_the_body_that_the_server_takes(client: Client, shop: Shop) -> None:
    pictures = [noise(50 + place) for place in range(8)]
    assert {one.status for one in client.add([Item.of(image=one, id=f"p{n}") for n, one in enumerate(pictures)])} == {"added"}
    assert len(client.embed_items([Item.of(image=one) for one in pictures])) == 8
    assert len(client.embed_queries([Query((one, "left", one)) for one in pictures[:3]])) == 3
    assert max(shop.sizes) <= BOUND and len(shop.sizes) == 4 + 4 + 3, shop.sizes


def test_image_too_large_for_a_body_is_named_with_the_bound(client: Client, shop: Shop) -> None:
    large = noise(120, "harbour.png")
    calls = (
        lambda: client.embed_items([Item.of(image=large, id="h1")]),
        lambda: client.embed_queries([Query.of(image=large)]),
        lambda: client.search(Query.of(image=large)),
    )
    for call in calls:
        with pytest.raises(InputError, match=r"harbour\.png.*more than the 38000"):
            call()
    assert shop.sizes == []


def test_every_item_has_a_result_whatever_becomes_of_the_others(client: Client, shop: Shop, tmp_path: Path) -> None:
    items = [Item.of(text=f"a cup {place}", id=f"c{place:03}") for place in range(200)]
    items[5] = Item.of(image=noise(120, "harbour.png"), id="large")
    items[6] = Item.of(image=ImageInput.open(tmp_path / "nowhere.png"), id="missing")
    shop.answers = [None, JSONResponse({"error": {"message": "what a request"}}, 400), None, JSONResponse({}, 500)]
    found = client.add(items)
    assert [one.id for one in found] == [item.id for item in items]
    failed = {one.id: one.error or "" for one in found if one.status == "failed"}
    assert "harbour.png" in failed.pop("large") and "nowhere.png" in failed.pop("missing")
    assert len(failed) == 64 + 6 and "what a request" in failed["c066"] and "answers 500" in failed["c199"]
    assert {one.id for one in found if one.status == "added"} == set(shop.kept)
    shop.answers = [JSONResponse({}, 500)]
    with pytest.raises(ModelError, match="answers 500"):
        client.add(items[:1])
    first, nameless = client.add([items[0], Item.of(text="a spoon")])
    assert first.status == "added" and (nameless.id, nameless.status) == ("", "failed") and "give it an id" in str(nameless.error)


def test_items_and_images_are_read_back(client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a/b c?", "..", "z%2F", "ü"]
    client.add([Item.of(text="a cup", image=noise(20), id=name, fields={"shelf": 3}) for name in names])
    for name in names:
        kept = client.get(name)
        assert (kept.id, kept.text, kept.fields) == (name, "a cup", {"shelf": 3})
        assert client.image(kept, side=64).load().size == (64, 32)
    monkeypatch.setattr(client_module, "_PAGE", 3)
    assert [one.id for one in client.items()] == sorted(names)
    assert [one.id for one in client.items(after="a/b c?")] == ["z%2F", "ü"]
    with pytest.raises(InputError, match="no such item"):
        client.get("never")
    shop.answers = [JSONResponse({"error": {"message": "not shown"}}, 404)]
    with pytest.raises(InputError, match="not shown"):
        client.image(kept)
    for image in (None, "folder/cup.png"):
        with pytest.raises(InputError, match="has no image of a server"):
            client.image(Hit("a", 0.5, 1, "image", None, image, {}))


def test_request_that_spent_its_time_is_not_sent_again(client: Client, shop: Shop) -> None:
    shop.answers = [JSONResponse({"error": {"message": "not found in time"}}, 408)] * 2
    with pytest.raises(ModelError, match="408: not found in time"):
        client.search(Query.of(text="a cup"))
    assert len(shop.sizes) == 1


def test_closing_ends_those_who_wait(address: str, shop: Shop) -> None:
    connection = Connection(address)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(connection.call, "GET", "/hang")
        assert shop.hanging.wait(20)
        connection.close()
        with pytest.raises(ModelError, match="closed during a request"):
            waiting.result(20)
    connection.close()
    with pytest.raises(ModelError, match="is closed"):
        connection.call("GET", "/hang")


@pytest.mark.parametrize(
    "bad",
    [
        Item.of(text="a cup"), Item(("a cup", "a spoon"), id="two texts"), Item.of(text="a cup", id="x" * 2000),
        Item.of(text="a cup", id="zero\0"), Item.of(text="a cup", id="half \ud83d"), Item.of(text="half \ud83d", id="half"),
        Item.of(text="a cup", id="nan", fields={"n": float("nan")}), Item.of(text="a cup", id="huge", fields={"n": 10**60}),
        Item.of(text="a cup", id="date", fields={"n": object()}), Item.of(text="a cup", id="list", fields={"n": [[1]]}),
        Item.of(text="a cup", id="name", fields={"": 1}), Item.of(text="x" * 300_000, id="long"),
        Item.of(image=ImageInput.from_bytes(b"no picture"), id="broken"),
    ],
    ids=lambda item: (item.id or "none")[:8],
)  # fmt: skip
def test_an_item_that_cannot_be_sent_or_is_refused_fails_alone(client: Client, shop: Shop, bad: Item) -> None:
    failed, good = client.add([bad, Item.of(text="a cup", id="good")])
    assert (failed.id, failed.status) == (bad.id or "", "failed") and failed.error
    assert (good.id, good.status) == ("good", "added") and set(shop.kept) == {"good"}


def test_a_refused_input_is_named_by_its_place_in_the_call(client: Client, shop: Shop) -> None:
    items = [Item.of(text=f"a cup {place}") for place in range(150)]
    for said in ("input[3]: 300000 characters", "messages[3][0].content[1]: not read"):
        shop.answers = [None, JSONResponse({"error": {"message": said}}, 400), None]
        with pytest.raises(InputError, match=r"number (3|67|131) of what was given \(from 0\).*3\]"):
            client.embed_items(items)
    with pytest.raises(InputError, match="cannot be written in JSON"):
        client.search(Query.of(text="a cup"), where={"year": float("nan")})


def test_what_is_no_id_is_refused_before_anything_is_removed(client: Client, shop: Shop) -> None:
    for bad in ("", "x" * 2000, "half \ud83d", 5):
        with pytest.raises(InputError, match="id "):
            client.delete([*(f"c{place}" for place in range(100)), bad])
    assert shop.sizes == []
