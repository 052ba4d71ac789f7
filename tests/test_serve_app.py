"""The server over its socket: clients of OpenAI, mteb, LangChain and LlamaIndex, those that go away, probes, and schemathesis,
which makes requests from the OpenAPI document and holds the answers against it."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import schemathesis
import torch
from conftest import Running
from fake_sglang import served
from test_serve_requests import CAPTION, IMAGE, INDIRECT, close

from traceir.client import Client
from traceir.encoder import Encoder
from traceir.items import Item, Query
from traceir.serve.access import Limits
from traceir.serve.keys import make_key
from traceir.serve.limits import Rate
from traceir.serve.run import ServeConfig, make_application, make_server

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not installed

from benchmarks.hostile import schema_config, try_operation

pytestmark = pytest.mark.slow


def test_mtebs_wrapper_of_apis_drives_it_unchanged(running: Running, encoder: Encoder) -> None:
    from datasets import Dataset
    from mteb import get_task
    from mteb.models import OpenAIAPIEncodeWrapper
    from torch.utils.data import DataLoader

    model = OpenAIAPIEncodeWrapper(running.url, "traceir", modalities=["text", "image"])
    about = {"task_metadata": get_task("CIRRIT2IRetrieval").metadata, "hf_split": "test", "hf_subset": "default"}
    texts = ["a white ring", INDIRECT]
    vectors = model.encode(DataLoader(Dataset.from_dict({"text": texts}), batch_size=2), show_progress_bar=False, **about)
    wanted = encoder.encode_queries([Query.of(text=text) for text in texts])
    assert all(close(vector, encoding.vector) for vector, encoding in zip(vectors, wanted, strict=True))
    image = running.items[3].images[0]
    both = [{"text": ["swap the left two"], "image": [image.load()]}]
    (shown,) = model.encode(DataLoader(both, batch_size=None), show_progress_bar=False, **about)
    encoding = encoder.encode_queries([Query.of(image=image, text="swap the left two")])[0]
    assert float(np.dot(shown, encoding.vector)) > 0.99


def test_adapters_drive_the_running_server(running: Running, encoder: Encoder) -> None:
    from traceir.integrations.langchain import TraceEmbeddings, TraceRetriever
    from traceir.integrations.llamaindex import TraceEmbedding

    wanted = encoder.encode_queries([Query.of(text=CAPTION)])[0].vector
    assert close(TraceEmbeddings.of_server(running.url).embed_query(CAPTION), wanted)
    assert close(TraceEmbedding.of_server(running.url).get_query_embedding(CAPTION), wanted)
    documents = TraceRetriever(source=Client(running.url), k=3).invoke(CAPTION)
    hits = httpx.post(f"{running.url}/search", json={"text": CAPTION, "k": 3}, timeout=60).json()["hits"]
    assert [document.id for document in documents] == [hit["id"] for hit in hits]


def send(url: str, request: str) -> socket.socket:
    """A connection on which a request was sent as it is."""
    host, port = url.removeprefix("http://").split("/")[0].split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(request.encode())
    return connection


def test_a_client_that_goes_away_takes_its_inputs_along(running: Running) -> None:
    def metric(name: str) -> float:
        """The sum of a counter's lines that begin so."""
        lines = httpx.get(f"{running.url}/metrics", timeout=60).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    def wait(reached: Callable[[], bool]) -> None:
        until = time.monotonic() + 60
        while not reached():
            assert time.monotonic() < until
            time.sleep(0.05)

    reasoned = 'traceir_encoded_total{role="query",route="reason"}'
    before = metric(reasoned)
    texts = [f"{INDIRECT} Number {number}." for number in range(256)]
    body = json.dumps({"input": texts, "input_type": "query", "route": "reason"})
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with send(running.url, f"POST /v1/embeddings HTTP/1.1\r\n{head}\r\n\r\n{body}"):
        wait(lambda: metric("traceir_inputs_under_way") > 0)
    wait(lambda: metric("traceir_inputs_under_way") == 0)
    wait(lambda: metric('traceir_requests_total{path="/v1/embeddings",status="499"}') == 1)
    assert metric(reasoned) - before < len(texts)


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}, {"encoding_format": None}])
def test_openais_clients_drive_it_whatever_they_send(running: Running, encoder: Encoder, options: dict[str, Any]) -> None:
    wanted = encoder.encode_items([Item.of(text="a white ring")])[0].vector
    sent: dict[str, Any] = {
        "model": "traceir", "input": "a white ring", "user": "somebody", "extra_headers": {"x-more": "1"}, "dimensions": None,
        "extra_body": {"input_type": None, "priority": 3}, "extra_query": {"version": "1"}, **options,
    }  # fmt: skip
    about: dict[str, Any] = {"base_url": f"{running.url}/v1/", "api_key": "k", "organization": "o", "project": "p"}
    client = openai.OpenAI(**about)
    answer = client.embeddings.create(**sent)
    vector = answer.data[0].embedding
    raw = struct.unpack(f"<{len(wanted)}f", base64.b64decode(vector)) if isinstance(vector, str) else vector
    assert close(raw, wanted) and client.models.retrieve("traceir").id == "traceir"
    with pytest.raises(openai.NotFoundError, match="else"):
        client.models.retrieve("else")
    with pytest.raises(openai.BadRequestError, match="token ids"):
        client.embeddings.create(model="traceir", input=[[9906, 1917]])

    async def ask() -> Any:
        async with openai.AsyncOpenAI(**about) as other:
            return await other.embeddings.create(**sent)

    assert asyncio.run(ask()).usage == answer.usage


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ("HEAD /health HTTP/1.1\r\nHost: 10.0.0.7:8080", 200), ("HEAD /ready HTTP/1.0", 200), ("HEAD / HTTP/1.0", 200),
        ("GET /health HTTP/1.0", 200), ("GET /ready/ HTTP/1.1\r\nHost: 10.0.0.7\r\nUser-Agent: kube-probe/1.30", 200),
        ("OPTIONS * HTTP/1.1\r\nHost: 10.0.0.7", 204), ("OPTIONS / HTTP/1.0", 204), ("OPTIONS /health HTTP/1.0", 204),
        ("GET /items HTTP/1.0", 421), ("GET / HTTP/1.1\r\nHost: 10.0.0.7", 421),
        ("OPTIONS /items HTTP/1.1\r\nHost: localhost", 405),
        ("OPTIONS / HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.test", 403),
    ],
)  # fmt: skip
def test_probes_are_answered(running: Running, asked: str, status: int) -> None:
    with send(running.url, f"{asked}\r\nConnection: close\r\n\r\n") as connection:
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status and not (body and asked.startswith("HEAD")), answer


# The OpenAPI document

CUP = {"id": "cup", "text": "a red cup", "image": IMAGE, "fields": {"shelf": 2.5}}
GOOD: dict[str, dict[str, Any]] = {
    **{f"GET /{path}": {} for path in ("health", "ready", "metrics", "v1/models", "v1/facets", "page/config")},
    "GET /v1/models/{id}": {"path_parameters": {"id": "traceir"}},
    "POST /v1/pictures": {"body": {"image": IMAGE}},
    "POST /items": {"body": {"items": [CUP, {"id": "a/b", "text": "a red cup"}, {"id": "nothing"}]}},
    "POST /v1/embeddings": {"body": {"input": ["a red cup", {"image": IMAGE["data"]}], "encoding_format": "base64"}},
    "POST /search": {"body": {"image": IMAGE, "text": "the same in blue", "k": 3.0, "where": {"shelf": [1, 2.5]}}},
    "POST /search/stream": {"body": {"parts": ["a red cup", {"item": "cup"}], "modality": "text"}},
    "GET /items": {"query": {"limit": 1}},
    "GET /items/{id}": {"path_parameters": {"id": "a/b"}},
    "GET /pictures/{name}": {"path_parameters": {"name": "Y3Vw"}, "query": {"side": 16}},
    "DELETE /items/{id}": {"path_parameters": {"id": "a/b"}},
    "DELETE /items": {"body": {"ids": ["cup", "nowhere"]}},
}
"""A request of each operation that is granted, in an order that makes it so."""
Tried = tuple[schemathesis.BaseSchema, dict[str, str]]


@pytest.fixture(autouse=True)
def subnormal_numbers() -> None:
    """Hypothesis wants them; what trains or measures in this process before may have switched them off."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def tried(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tried]:
    """The document of an application in this process, with keys but no limit on wrong ones, and the headers of a caller."""
    folder = tmp_path_factory.mktemp("schema")
    config = ServeConfig(str(folder / "index"), keys=folder / "keys.json")
    key = make_key(folder / "keys.json", "all", scopes=("read", "write"))
    server = make_server(config, lambda: encoder)
    server.limits = Limits(None, None, Rate(1e6, 1e6))
    with served(make_application(config, server), lifespan="on") as url:
        while server.service is None:
            assert server.failed is None
            time.sleep(0.05)
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json", config=schema_config(seed=0, strangers=True))
        yield schema, {"Authorization": f"Bearer {key}"}


def test_the_document_names_every_operation(tried: Tried) -> None:
    paths = tried[0].raw_schema["paths"]
    assert {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods} == set(GOOD)


@pytest.mark.parametrize("label", GOOD)
def test_the_answer_is_as_documented_to_what_is_right_and_to_whatever_else(tried: Tried, label: str) -> None:
    (document, headers), (method, path) = tried, label.split()
    operation = document[path][method]

    def validate(case: schemathesis.Case) -> None:
        case.call_and_validate(headers=headers)

    assert operation.Case(**GOOD[label]).call_and_validate(headers=headers).status_code == 200
    try_operation(operation, 25, validate)
