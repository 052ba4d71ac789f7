"""LangChain and LlamaIndex: the real packages, over an encoder in this process and over a server."""

from __future__ import annotations

import asyncio
import importlib
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_client_answers
from fakes import FakeEncoder
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from test_client_answers import TEXTS, rows

from traceir.client import Client, ServedEncoder
from traceir.encoder import Encoder
from traceir.errors import InputError
from traceir.images import ImageInput
from traceir.index import In, open_index
from traceir.integrations.langchain import TraceEmbeddings, TraceRetriever
from traceir.integrations.llamaindex import TraceEmbedding
from traceir.items import Item, Query
from traceir.retrieval.search import Searcher

pytestmark = pytest.mark.slow
client, door, photo = test_client_answers.client, test_client_answers.door, test_client_answers.photo


@pytest.fixture(params=["in process", "by server"])
def either(request: pytest.FixtureRequest, client: Client, encoder: Encoder) -> Encoder | ServedEncoder:
    return encoder if request.param == "in process" else ServedEncoder(client)


def test_langchain_embeddings(either: Encoder | ServedEncoder, encoder: Encoder, photo: str) -> None:
    embeddings, image = TraceEmbeddings(either, target="image"), ImageInput.open(photo)
    documents = rows(encoder.encode_items([Item.of(text=text) for text in TEXTS]))
    images = rows(encoder.encode_items([Item.of(image=image)]))
    query = rows(encoder.encode_queries([Query.of(text=TEXTS[2], target="image")]))
    both = rows(encoder.encode_queries([Query.of(text="in red", image=image, target="image")]))
    assert np.array([embeddings.embed_multimodal_query("in red", photo)]) == both

    async def later() -> list[Any]:
        work = (embeddings.aembed_documents(TEXTS), embeddings.aembed_query(TEXTS[2]), embeddings.aembed_image([photo]))
        return list(await asyncio.gather(*work))

    now = [embeddings.embed_documents(TEXTS), embeddings.embed_query(TEXTS[2]), embeddings.embed_image([photo])]
    for texts, text, shown in (now, asyncio.run(later())):
        assert np.array(texts) == documents and np.array([text]) == query and np.array(shown) == images
    store = InMemoryVectorStore.from_texts(TEXTS, embeddings)
    assert store.similarity_search(TEXTS[1], k=1)[0].page_content == TEXTS[1]


def test_langchain_retriever(client: Client, encoder: Encoder, tmp_path: Path) -> None:
    with open_index(tmp_path / "index", encoder, create=True) as index:
        searcher = Searcher(encoder, index)
        searcher.add([Item.of(text=text, id=f"k{n}", fields={"shelf": n % 2, "rank": "oak"}) for n, text in enumerate(TEXTS)])
        local = TraceRetriever(source=searcher, k=2, where=In("shelf", (1,)), route="direct")
        remote = TraceRetriever(source=client, k=2, where={"shelf": 1}, instruction="find it", target="text", route="direct")
        for retriever in (local, remote):
            [document] = retriever.invoke(TEXTS[1])
            assert (document.id, document.page_content) == ("k1", TEXTS[1])
            own = document.metadata.pop("traceir")
            assert document.metadata == {"shelf": 1, "rank": "oak"}, "fields of the user stay as they are"
            asked = Query.of(text=TEXTS[1], instruction=retriever.instruction, target=retriever.target)
            [wanted] = searcher.search(asked, k=1, route="direct", where=In("shelf", (1,))).hits
            assert own["score"] == pytest.approx(wanted.score, abs=1e-5)
            assert (own["id"], own["rank"], own["modality"]) == ("k1", 1, "text")
            document.metadata["traceir"] = own
            assert asyncio.run(retriever.ainvoke(TEXTS[1])) == [document]
        words = TraceRetriever(source=searcher, mode="keyword", where="shelf=1 or id=k0")
        assert [document.id for document in words.invoke(f'"{TEXTS[1]}"')] == ["k1"]
    with pytest.raises(ValueError, match="cannot search"):
        TraceRetriever(source="http://localhost:8080")


def test_llamaindex_embedding(either: Encoder | ServedEncoder, encoder: Encoder, photo: str) -> None:
    embedding = TraceEmbedding(either, instruction="find it", target="text")
    texts = rows(encoder.encode_items([Item.of(text=text) for text in TEXTS]))
    shown = rows(encoder.encode_items([Item.of(image=ImageInput.open(photo))] * 2))
    query = rows(encoder.encode_queries([Query.of(text=TEXTS[2], instruction="find it", target="text")]))
    assert embedding.model_name == f"traceir {encoder.fingerprint}"
    assert np.array([embedding.get_query_embedding(TEXTS[2])]) == query
    assert np.array(embedding.get_text_embedding_batch(TEXTS)) == texts
    assert embedding.get_text_embedding(TEXTS[0]) == pytest.approx(embedding.get_text_embedding_batch(TEXTS)[0], abs=1e-5)
    assert np.array(embedding.get_image_embedding_batch([photo, BytesIO(Path(photo).read_bytes())])) == shown

    async def all_of_it() -> list[Any]:
        images = [await embedding.aget_image_embedding(photo), *await embedding.aget_image_embedding_batch([photo])]
        return [await embedding.aget_query_embedding(TEXTS[2]), await embedding.aget_text_embedding_batch(TEXTS), images]

    embedded = asyncio.run(all_of_it())
    assert np.array([embedded[0]]) == query and np.array(embedded[1]) == texts and np.array(embedded[2]) == shown
    index = VectorStoreIndex(nodes=[TextNode(text=text, id_=text) for text in TEXTS], embed_model=embedding)
    assert index.as_retriever(similarity_top_k=1).retrieve(TEXTS[1])[0].node.node_id == TEXTS[1]


def test_an_adapter_over_a_server_by_its_address(door: tuple[str, str]) -> None:
    vectors = TraceEmbeddings.of_server(*door).embed_documents(TEXTS[:1])
    assert vectors == [TraceEmbedding.of_server(*door).get_text_embedding(TEXTS[0])]


@pytest.mark.parametrize("made", [TraceEmbeddings, TraceEmbedding])
def test_a_batch_of_an_adapter_names_the_text_that_is_empty(made: Any) -> None:
    adapter = made(FakeEncoder())
    embed = adapter.embed_documents if made is TraceEmbeddings else adapter.get_text_embedding_batch
    with pytest.raises(InputError, match=r"text 1 \(from 0\) of 3 is empty"):
        embed(["a spoon", " ", "a cup"])


@pytest.mark.parametrize(("name", "package"), [("langchain", "langchain_core"), ("llamaindex", "llama_index")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    for loaded in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"traceir.integrations.{name}")
    with pytest.raises(ImportError, match=rf"pip install 'traceir\[{name}\]'"):
        importlib.import_module(f"traceir.integrations.{name}")
