"""The client, LangChain and LlamaIndex: the real packages, over an encoder in this process and over a server's HTTP interface."""

from __future__ import annotations

import asyncio
import base64
import binascii
import importlib
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture
from fake_sglang import served
from fakes import FakeEncoder
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from traceir.client import Added, Client, ServedEncoder
from traceir.errors import InputError, ModelError
from traceir.images import ImageInput
from traceir.index import Eq, In, open_index
from traceir.integrations.langchain import TraceEmbeddings, TraceRetriever
from traceir.integrations.llamaindex import TraceEmbedding
from traceir.items import Encoding, Item, Query
from traceir.search import Searcher
from traceir.serve.schemas import EmbeddingsIn, IdsIn, ImageIn, ItemResult, ItemsIn, SearchIn
from traceir.serve.strict import read_items

KEY = "tir_invented"
TEXTS = ["a red kettle", "a green kettle", "a blue kettle then a lid"]


class StandIn:
    """The HTTP surface of `traceir serve` around a FakeEncoder; requests are read by the server's own schemas."""

    def __init__(self, folder: Path) -> None:
        self.encoder = FakeEncoder()
        self.index = open_index(folder, fingerprint="fake-1", prompt_version="p1", dim=16, create=True)
        self.searcher = Searcher(self.encoder, self.index)
        self.bodies: list[dict[str, Any]] = []
        self.busy = 0

    def app(self) -> Starlette:
        async def guarded(request: Request) -> Response:
            if request.headers.get("authorization") != f"Bearer {KEY}":
                return refusal(401, "the key is not known")
            if self.busy:
                self.busy -= 1
                return refusal(429, "the queue is full", {"Retry-After": "0"})
            body = await request.json() if await request.body() else None
            self.bodies.append(body or {})
            try:
                return JSONResponse(getattr(self, request.scope["endpoint_name"])(body))
            except (InputError, ValidationError, binascii.Error) as error:
                return refusal(400, str(error))

        def route(path: str, name: str, *methods: str) -> Route:
            async def endpoint(request: Request) -> Response:
                request.scope["endpoint_name"] = name
                return await guarded(request)

            return Route(path, endpoint, methods=list(methods))

        return Starlette(
            routes=[
                route("/v1/models", "models", "GET"),
                route("/v1/embeddings", "embeddings", "POST"),
                route("/search", "search", "POST"),
                route("/items", "add", "POST"),
                route("/items", "delete", "DELETE"),
            ]
        )

    def models(self, _: Any) -> dict[str, Any]:
        return {"data": [{"id": "traceir", "fingerprint": "fake-1", "prompt_version": "p1", "width": 16}]}

    def embeddings(self, body: Any) -> dict[str, Any]:
        asked = EmbeddingsIn.model_validate(body)
        if asked.messages is not None:
            chats = [[part for turn in chat for part in turn["content"]] for chat in body["messages"]]
            contents = [
                tuple(one["text"] if one["type"] == "text" else image_of(one["image_url"]["url"]) for one in chat)
                for chat in chats
            ]
        else:
            contents = [parts_of(one.text, one.image) for one in asked.input]
        if asked.input_type == "query":
            found = self.encoder.encode_queries([Query(parts) for parts in contents], route=asked.route)
        else:
            found = self.encoder.encode_items([Item(parts) for parts in contents])
        return {"data": [{"embedding": packed(one), "trace": trace(one)} for one in found]}

    def search(self, body: Any) -> dict[str, Any]:
        asked = SearchIn.model_validate(body)
        parts = tuple(image_of(one.data) if isinstance(one, ImageIn) else one for one in asked.parts or ())
        where = next((Eq(name, value) for name, value in (asked.where or {}).items()), None)
        query = Query(parts, instruction=asked.instruction, target=asked.modality)
        found = self.searcher.search(query, k=asked.k + asked.offset, route=asked.route, where=where)
        names = ("id", "score", "rank", "modality", "text")
        hits = [{**{name: getattr(hit, name) for name in names}, "image": None, "fields": dict(hit.fields)} for hit in found.hits]
        return {"hits": hits[asked.offset :], "trace": trace(found.encoding), "offset": asked.offset, "k": asked.k, "more": False}

    def add(self, body: Any) -> dict[str, Any]:
        results, good = [], []
        for one in read_items(ItemsIn.model_validate(body).items):
            if isinstance(one, ItemResult):
                results.append(one.model_dump())
                continue
            try:
                good.append(Item(parts_of(one.text, one.image and one.image.data), id=one.id, fields=one.fields))
                results.append({"id": one.id, "status": "added"})
            except InputError as error:
                results.append({"id": one.id, "status": "failed", "error": str(error)})
        self.index.upsert(good, np.stack([one.vector for one in self.encoder.encode_items(good)]))
        return {"results": results}

    def delete(self, body: Any) -> dict[str, Any]:
        return {"deleted": self.index.delete(IdsIn.model_validate(body).ids)}


def refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    told = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": told}, status_code=status, headers=headers)


def trace(encoding: Encoding) -> dict[str, Any]:
    told = {name: getattr(encoding, name) for name in ("route", "reasoning", "tokens", "truncated", "emb_probability")}
    return {**told, "cached": False, "seconds": {"queue": 0.0, "encode": 0.1, "search": None}}


def packed(encoding: Encoding) -> str:
    return base64.b64encode(encoding.vector.astype("<f4").tobytes()).decode()


def parts_of(text: str | None, image: str | None) -> tuple[str | ImageInput, ...]:
    return (*((image_of(image),) if image else ()), *((text,) if text else ()))


def image_of(told: str) -> ImageInput:
    return ImageInput.from_bytes(base64.b64decode(told.rpartition(",")[2], validate=True))


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StandIn, str]]:
    server = StandIn(tmp_path_factory.mktemp("stand-in") / "index")
    with served(server.app()) as address:
        client = Client(address, KEY)
        client.add(
            [Item.of(text=text, id=f"k{place}", fields={"shelf": place % 2, "rank": "oak"}) for place, text in enumerate(TEXTS)]
        )
        client.close()
        yield server, address


@pytest.fixture
def client(stand_in: tuple[StandIn, str]) -> Iterator[Client]:
    with Client(stand_in[1], KEY, pause_s=0.01) as made:
        yield made


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photo") / "kettle.png"
    picture(1).load().save(path)
    return str(path)


@pytest.fixture(params=["in process", "by server"])
def encoder(request: pytest.FixtureRequest, client: Client) -> FakeEncoder | ServedEncoder:
    return FakeEncoder() if request.param == "in process" else ServedEncoder(client)


def vectors(encodings: list[Encoding]) -> list[list[float]]:
    return [one.vector.tolist() for one in encodings]


def test_langchain_embeddings(encoder: FakeEncoder | ServedEncoder, photo: str) -> None:
    embeddings, oracle = TraceEmbeddings(encoder, target="image"), FakeEncoder()
    documents = vectors(oracle.encode_items([Item.of(text=text) for text in TEXTS]))
    pictures = vectors(oracle.encode_items([Item.of(image=ImageInput.open(photo))]))
    query = vectors(oracle.encode_queries([Query.of(text=TEXTS[2])]))[0]
    both = vectors(oracle.encode_queries([Query.of(text="in red", image=ImageInput.open(photo))]))[0]
    assert embeddings.embed_documents(TEXTS) == documents
    assert embeddings.embed_query(TEXTS[2]) == query
    assert embeddings.embed_image([photo]) == pictures
    assert embeddings.embed_multimodal_query("in red", photo) == both

    async def all_of_it() -> list[Any]:
        work = (embeddings.aembed_documents(TEXTS), embeddings.aembed_query(TEXTS[2]), embeddings.aembed_image([photo]))
        return list(await asyncio.gather(*work))

    assert asyncio.run(all_of_it()) == [documents, query, pictures]
    store = InMemoryVectorStore.from_texts(TEXTS, embeddings)
    assert store.similarity_search(TEXTS[1], k=1)[0].page_content == TEXTS[1]


def test_langchain_retriever(stand_in: tuple[StandIn, str], client: Client) -> None:
    server, _ = stand_in
    local = TraceRetriever(source=server.searcher, k=2, where=In("shelf", (1,)))
    remote = TraceRetriever(source=client, k=2, where={"shelf": 1}, instruction="find it", target="text", route="direct")
    for retriever in (local, remote):
        [found] = retriever.invoke(TEXTS[1])
        assert (found.id, found.page_content) == ("k1", TEXTS[1])
        own = found.metadata.pop("traceir")
        assert found.metadata == {"shelf": 1, "rank": "oak"}, "fields of the user stay as they are"
        assert own["score"] == pytest.approx(1.0) and (own["id"], own["rank"], own["modality"]) == ("k1", 1, "text")
        found.metadata["traceir"] = own
        assert asyncio.run(retriever.ainvoke(TEXTS[1])) == [found]
    asked = server.bodies[-1]
    assert (asked["instruction"], asked["modality"], asked["route"], asked["k"]) == ("find it", "text", "direct", 2)
    with pytest.raises(ValueError, match="cannot search"):
        TraceRetriever(source="http://localhost:8080")


def test_llamaindex_embedding(encoder: FakeEncoder | ServedEncoder, photo: str) -> None:
    embedding, oracle = TraceEmbedding(encoder, instruction="find it"), FakeEncoder()
    texts = vectors(oracle.encode_items([Item.of(text=text) for text in TEXTS]))
    shown = vectors(oracle.encode_items([Item.of(image=ImageInput.open(photo))]))[0]
    query = vectors(oracle.encode_queries([Query.of(text=TEXTS[2])]))[0]
    assert embedding.model_name == "traceir fake-1"
    assert embedding.get_query_embedding(TEXTS[2]) == query
    assert embedding.get_text_embedding_batch(TEXTS) == texts and embedding.get_text_embedding(TEXTS[0]) == texts[0]
    assert embedding.get_image_embedding(photo) == shown
    assert embedding.get_image_embedding_batch([photo, photo]) == [shown, shown]
    assert len(embedding.get_image_embedding(BytesIO(Path(photo).read_bytes()))) == len(shown)

    async def all_of_it() -> list[Any]:
        work = (embedding.aget_query_embedding(TEXTS[2]), embedding.aget_text_embedding(TEXTS[0]))
        return [*await asyncio.gather(*work), await embedding.aget_image_embedding(photo)]

    assert asyncio.run(all_of_it()) == [query, texts[0], shown]
    index = VectorStoreIndex(nodes=[TextNode(text=text, id_=text) for text in TEXTS], embed_model=embedding)
    assert index.as_retriever(similarity_top_k=1).retrieve(TEXTS[1])[0].node.node_id == TEXTS[1]


def test_the_client_keeps_order_over_many_requests_and_kinds(stand_in: tuple[StandIn, str], client: Client, photo: str) -> None:
    shown = ImageInput.open(photo)
    queries = [Query.of(text=f"kettle {place}", instruction="find it" if place % 3 else None) for place in range(150)]
    queries[70] = Query((shown, "left", shown, "right"), target="image")
    queries[71] = Query.of(text="then red", image=shown, target="image")
    assert vectors(client.embed_queries(queries)) == vectors(FakeEncoder().encode_queries(queries))
    assert client.embed_queries(queries[71:72])[0].reasoning == "first this, then that"
    assert client.embed_items([]) == [] and client.model.width == 16
    asked = [(body.get("instruction"), body.get("modality")) for body in stand_in[0].bodies if "input_type" in body]
    assert {("find it", None), (None, None), (None, "image")} <= set(asked)


def test_the_client_adds_searches_pages_and_deletes(client: Client, photo: str) -> None:
    items = [Item.of(image=ImageInput.open(photo), id="p1"), Item.of(text="a spoon", id="s1", fields={"shelf": 7})]
    assert client.add(items) == [Added("p1", "added", None), Added("s1", "added", None)]
    found = client.search(Query.of(image=ImageInput.open(photo)), k=2)
    assert found.hits[0].id == "p1" and found.hits[0].rank == 1 and (found.route, found.more) == ("direct", False)
    assert client.search(Query.of(image=ImageInput.open(photo)), k=1, offset=1).hits == found.hits[1:]
    assert [hit.id for hit in client.search(Query.of(text="a spoon"), where={"shelf": 7}).hits] == ["s1"]
    assert client.search(Query.of(text="first then"), k=1).reasoning == "first this, then that"
    assert client.delete(["p1", "s1", "never"]) == 2
    [nameless] = client.add([Item.of(text="a spoon")])
    assert nameless.status == "failed" and "give it an id" in str(nameless.error)


@pytest.mark.parametrize("made", [TraceEmbeddings, TraceEmbedding])
def test_field_report_08_a_batch_of_an_adapter_names_the_text_that_is_empty(made: Any) -> None:
    adapter = made(FakeEncoder())
    embed = adapter.embed_documents if made is TraceEmbeddings else adapter.get_text_embedding_batch
    with pytest.raises(InputError, match=r"text 1 \(from 0\) of 3 is empty"):
        embed(["a spoon", " ", "a cup"])


def test_the_client_says_what_went_wrong(stand_in: tuple[StandIn, str], client: Client) -> None:
    server, address = stand_in
    server.busy = 2
    assert client.search(Query.of(text=TEXTS[0]), k=1).hits[0].id == "k0"
    with Client(address, "tir_wrong") as stranger, pytest.raises(ModelError, match=r"refuses the API key \(401"):
        stranger.embed_queries([Query.of(text="a")])
    with pytest.raises(InputError, match=r"refuses the request \(400"):
        client.search(Query.of(text="a"), k=0)
    with pytest.raises(ModelError, match="answers 404"):
        Client(address + "/elsewhere", KEY)._connection.call("GET", "/v1/models")
    client.close()
    with pytest.raises(ModelError, match="closed"):
        client.embed_queries([Query.of(text="a")])


@pytest.mark.parametrize(("name", "package"), [("langchain", "langchain_core"), ("llamaindex", "llama_index")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    for loaded in [one for one in sys.modules if one.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"traceir.integrations.{name}")
    with pytest.raises(ImportError, match=rf"pip install 'traceir\[{name}\]'"):
        importlib.import_module(f"traceir.integrations.{name}")
