"""The client of a server: bodies within its bound, results kept, items and images read back; a connection that is closed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import image_of
from fake_sglang import serving_here
from fakes import FakeEncoder
from starlette.requests import Request
from starlette.responses import JSONResponse

from traceir import client as client_module
from traceir.client import MAX_INPUT_BYTES, Client
from traceir.connection import Connection
from traceir.engines import base
from traceir.engines.base import REQUEST_BYTES
from traceir.errors import InputError, ModelError
from traceir.images import ImageInput
from traceir.items import Hit, Item, Query
from traceir.serve.bodies import MAX_BODY

BOUND = 40_000
"""Bytes of a body that the server takes here; the client is told of bounds as much smaller than the real ones."""


class Watched:
    """The server's application behind the lower bound; its next `answers` (None: its own) are applications in its place."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.sizes: list[int] = []
        self.answers: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] == "/ready":
            return await self.app(scope, receive, send)
        body = await Request(scope, receive).body()
        self.sizes.append(len(body))
        assert len(body) <= BOUND
        bodies = [{"type": "http.request", "body": body}]
        answer = (self.answers.pop(0) if self.answers else None) or self.app
        await answer(scope, lambda: asyncio.sleep(0, bodies.pop()) if bodies else receive(), send)


def refusal(status: int, message: str = "") -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Watched]]:
    apps: list[Watched] = []
    with serving_here(
        tmp_path_factory.mktemp("client") / "index", FakeEncoder(), wrap=lambda app: apps.append(Watched(app)) or apps[0]
    ) as url:
        yield url, apps[0]


@pytest.fixture
def server(whole: tuple[str, Watched]) -> Watched:
    whole[1].sizes, whole[1].answers = [], []
    return whole[1]


@pytest.fixture
def client(whole: tuple[str, Watched], server: Watched, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr(base, "REQUEST_BYTES", 30_000)
    monkeypatch.setattr(client_module, "MAX_INPUT_BYTES", 38_000)
    with Client(whole[0], pause_s=0.01) as made:
        yield made
        made.delete([item.id for item in made.items()])


def noise(side: int, name: str = "") -> ImageInput:
    """An image that does not pack: about 4 * side * side bytes in base64."""
    return ImageInput.from_bytes(image_of(side, side, side).encoded()[0], name=name)


def test_the_bounds_of_the_client_fit_those_of_the_server() -> None:
    assert REQUEST_BYTES <= MAX_INPUT_BYTES < MAX_BODY


def test_requests_stay_within_the_body_that_the_server_takes(client: Client, server: Watched) -> None:
    images = [noise(50 + number) for number in range(8)]
    assert {added.status for added in client.add([Item.of(image=image, id=f"p{n}") for n, image in enumerate(images)])} == {
        "added"
    }
    assert len(client.embed_items([Item.of(image=image) for image in images])) == 8
    assert len(client.embed_queries([Query((image, "left", image)) for image in images[:3]])) == 3
    assert max(server.sizes) <= BOUND and len(server.sizes) == 4 + 4 + 3, server.sizes


def test_image_too_large_for_a_body_is_named_with_the_bound(client: Client, server: Watched) -> None:
    large = noise(120, "harbour.png")
    calls = (
        lambda: client.embed_items([Item.of(image=large, id="h1")]),
        lambda: client.embed_queries([Query.of(image=large)]),
        lambda: client.search(Query.of(image=large)),
    )
    for call in calls:
        with pytest.raises(InputError, match=r"harbour\.png.*more than the 38000"):
            call()
    assert server.sizes == []


def test_every_item_has_a_result_whatever_becomes_of_the_others(client: Client, server: Watched, tmp_path: Path) -> None:
    items = [Item.of(text=f"a cup {index}", id=f"c{index:03}") for index in range(200)]
    items[5] = Item.of(image=noise(120, "harbour.png"), id="large")
    items[6] = Item.of(image=ImageInput.open(tmp_path / "nowhere.png"), id="missing")
    server.answers = [None, refusal(400, "what a request"), None, refusal(500)]
    results = client.add(items)
    assert [result.id for result in results] == [item.id for item in items]
    failed = {result.id: result.error or "" for result in results if result.status == "failed"}
    assert "harbour.png" in failed.pop("large") and "nowhere.png" in failed.pop("missing")
    assert len(failed) == 64 + 6 and "what a request" in failed["c066"] and "answers 500" in failed["c199"]
    assert {result.id for result in results if result.status == "added"} == {item.id for item in client.items()}
    server.answers = [refusal(500)]
    with pytest.raises(ModelError, match="answers 500"):
        client.add(items[:1])
    first, nameless = client.add([items[0], Item.of(text="a spoon")])
    assert (
        first.status == "updated" and (nameless.id, nameless.status) == ("", "failed") and "give it an id" in str(nameless.error)
    )


def test_items_and_images_are_read_back(client: Client, server: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a/b c?", "..", "z%2F", "ü"]
    client.add([Item.of(text="a cup", image=noise(64), id=name, fields={"shelf": 3}) for name in names])
    for name in names:
        kept = client.get(name)
        assert (kept.id, kept.text, kept.fields) == (name, "a cup", {"shelf": 3})
        assert client.image(kept, side=32).load().size == (32, 32)
    monkeypatch.setattr(client_module, "_PAGE", 3)
    assert [item.id for item in client.items()] == sorted(names)
    assert [item.id for item in client.items(after="a/b c?")] == ["z%2F", "ü"]
    with pytest.raises(InputError, match="never"):
        client.get("never")
    server.answers = [refusal(404, "not shown")]
    with pytest.raises(InputError, match="not shown"):
        client.image(kept)
    for image in (None, "folder/cup.png"):
        with pytest.raises(InputError, match="has no image of a server"):
            client.image(Hit("a", 0.5, 1, "image", None, image, {}))
    server.sizes, server.answers = [], [refusal(408, "not found in time")]
    with pytest.raises(ModelError, match="408: not found in time"):
        client.search(Query.of(text="a cup"))
    assert len(server.sizes) == 1, "what spent its time is not sent again"


def test_a_server_of_before_is_asked_for_what_it_knows(client: Client, server: Watched) -> None:
    asked: dict[str, Any] = {}
    trace = {"route": "direct", "reasoning": "", "tokens": 0, "emb_probability": 1.0, "truncated": False, "seconds": {}}

    async def older(scope: Any, receive: Any, send: Any) -> None:
        asked.update(await Request(scope, receive).json())
        await JSONResponse({"hits": [], "more": False, "trace": trace})(scope, receive, send)

    server.answers = [older, JSONResponse({"items": [], "offset": 0, "more": True})]
    assert client.search(Query.of(text="a cup")).route == "direct"
    assert set(asked) == {"k", "offset", "route", "exact", "parts"}
    with pytest.raises(ModelError, match="how its items go on; is it `traceir serve` of the same release"):
        list(client.items())


def test_closing_ends_those_who_wait(whole: tuple[str, Watched], server: Watched) -> None:
    hanging, let_go = threading.Event(), threading.Event()

    async def hang(*connection: Any) -> None:
        hanging.set()
        await asyncio.to_thread(let_go.wait, 20)
        await refusal(400)(*connection)

    server.answers, connection = [hang], Connection(whole[0])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(connection.call, "GET", "/hang")
        assert hanging.wait(20)
        connection.close()
        with pytest.raises(ModelError, match="closed during a request"):
            waiting.result(20)
    let_go.set()
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
def test_an_item_that_cannot_be_sent_or_is_refused_fails_alone(client: Client, server: Watched, bad: Item) -> None:
    failed, good = client.add([bad, Item.of(text="a cup", id="good")])
    assert (failed.id, failed.status) == (bad.id or "", "failed") and failed.error
    assert (good.id, good.status) == ("good", "added") and [item.id for item in client.items()] == ["good"]


def test_a_refused_input_is_named_by_its_place_in_the_call(client: Client, server: Watched) -> None:
    items = [Item.of(text=f"a cup {index}") for index in range(150)]
    for why in ("input[3]: 300000 characters", "messages[3][0].content[1]: not read"):
        server.answers = [None, refusal(400, why), None]
        with pytest.raises(InputError, match=r"number (3|67|131) of what was given \(from 0\).*3\]"):
            client.embed_items(items)
    with pytest.raises(InputError, match="cannot be written in JSON"):
        client.search(Query.of(text="a cup"), where={"year": float("nan")})


def test_what_is_no_id_is_refused_before_anything_is_removed(client: Client, server: Watched) -> None:
    for bad in ("", "x" * 2000, "half \ud83d", 5):
        with pytest.raises(InputError, match="id "):
            client.delete([*(f"c{index}" for index in range(100)), bad])
    assert server.sizes == []


def test_an_environment_without_a_usable_proxy_is_an_error_and_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "nonsense://localhost:1")
    raised: list[BaseException] = []

    def ask() -> None:
        with Client("http://localhost:9", tries=1) as client, pytest.raises(ValueError, match="nonsense") as error:
            client.get("x")
        raised.append(error.value)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(10)
    assert raised
