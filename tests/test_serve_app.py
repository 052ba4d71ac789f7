"""The server as a process: OpenAI's, mteb's, LangChain's and LlamaIndex's clients, clients that go away, probes."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from conftest import Running
from PIL import Image

from traceir.client import Client
from traceir.encoder import Encoder
from traceir.images import ImageInput
from traceir.items import Item, Query

pytestmark = pytest.mark.slow
CAPTION = "On the left a white ring, in the middle a blue ring, on the right a purple ring."
INDIRECT = "Left: a blue ball; middle: a mug in the colour of the left one; right: a ring in the colour of the left one."


def call(url: str, body: Any = None, *, method: str | None = None, key: str | None = None) -> tuple[int, Any]:
    """Status and JSON of a request."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")


def close(found: Any, wanted: np.ndarray) -> bool:
    return float(np.dot(np.asarray(found, dtype=np.float64), wanted)) > 0.99999


def test_what_pillow_calls_mpo_is_sent_kept_shown_and_searched_with(running: Running, tmp_path: Path) -> None:
    path = tmp_path / "two.jpg"
    Image.new("RGB", (40, 30), "teal").save(path, "MPO", save_all=True, append_images=[Image.new("RGB", (40, 30))])
    with Client(running.url) as client:
        added = client.add([Item.of(image=ImageInput.open(path), id="stereo")])
        assert [(one.status, one.error) for one in added] == [("added", None)]
        shown = client.image(client.get("stereo")).load()
        assert shown.size == (40, 30) and shown.getpixel((9, 9))[2] > 100
        found = client.search(
            Query((ImageInput.open(path), "the same", ImageInput.open(path)), target="image"), k=1, route="direct"
        )
        assert found.hits[0].modality == "image"
        assert client.delete(["stereo"]) == 1


def test_mtebs_wrapper_of_apis_drives_it_unchanged(running: Running, encoder: Encoder) -> None:
    from datasets import Dataset
    from mteb import get_task
    from mteb.models import OpenAIAPIEncodeWrapper
    from torch.utils.data import DataLoader

    model = OpenAIAPIEncodeWrapper(running.url, "traceir", modalities=["text", "image"])
    about = {"task_metadata": get_task("CIRRIT2IRetrieval").metadata, "hf_split": "test", "hf_subset": "default"}
    texts = ["a white ring", INDIRECT]
    found = model.encode(DataLoader(Dataset.from_dict({"text": texts}), batch_size=2), show_progress_bar=False, **about)
    wanted = encoder.encode_queries([Query.of(text=text) for text in texts])
    assert all(close(one, encoding.vector) for one, encoding in zip(found, wanted, strict=True))
    picture = running.items[3].images[0]
    pictures = [{"text": ["swap the left two"], "image": [picture.load()]}]
    (shown,) = model.encode(DataLoader(pictures, batch_size=None), show_progress_bar=False, **about)
    encoding = encoder.encode_queries([Query.of(image=picture, text="swap the left two")])[0]
    assert float(np.dot(shown, encoding.vector)) > 0.99


def test_adapters_drive_the_running_server(running: Running, encoder: Encoder) -> None:
    from traceir.integrations.langchain import TraceEmbeddings, TraceRetriever
    from traceir.integrations.llamaindex import TraceEmbedding

    wanted = encoder.encode_queries([Query.of(text=CAPTION)])[0].vector
    assert close(TraceEmbeddings.of_server(running.url).embed_query(CAPTION), wanted)
    assert close(TraceEmbedding.of_server(running.url).get_query_embedding(CAPTION), wanted)
    found = TraceRetriever(source=Client(running.url), k=3).invoke(CAPTION)
    assert [one.id for one in found] == [hit["id"] for hit in call(f"{running.url}/search", {"text": CAPTION, "k": 3})[1]["hits"]]


def metric(url: str, name: str) -> float:
    """The sum of a counter's lines that begin so."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_a_client_that_goes_away_takes_its_inputs_along(running: Running) -> None:
    reasoned = 'traceir_encoded_total{role="query",route="reason"}'
    before = metric(running.url, reasoned)
    texts = [f"{INDIRECT} Number {number}." for number in range(256)]
    body = json.dumps({"input": texts, "input_type": "query", "route": "reason"}).encode()
    host, port = running.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode() + body)
        while metric(running.url, "traceir_inputs_under_way") == 0:
            time.sleep(0.05)
    while metric(running.url, "traceir_inputs_under_way") > 0:
        time.sleep(0.05)
    until = time.monotonic() + 20
    while not (gone := metric(running.url, 'traceir_requests_total{path="/v1/embeddings",status="499"}')):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert gone == 1 and metric(running.url, reasoned) - before < len(texts)


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}, {"encoding_format": None}])
def test_openais_clients_drive_it_whatever_they_send(running: Running, encoder: Encoder, options: dict[str, Any]) -> None:
    wanted = encoder.encode_items([Item.of(text="a white ring")])[0].vector
    given: dict[str, Any] = {
        "model": "traceir", "input": "a white ring", "user": "somebody", "extra_headers": {"x-more": "1"}, "dimensions": None,
        "extra_body": {"input_type": None, "priority": 3}, "extra_query": {"version": "1"}, **options,
    }  # fmt: skip
    about: dict[str, Any] = {"base_url": f"{running.url}/v1/", "api_key": "k", "organization": "o", "project": "p"}
    client = openai.OpenAI(**about)
    found = client.embeddings.create(**given)
    vector = found.data[0].embedding
    raw = struct.unpack(f"<{len(wanted)}f", base64.b64decode(vector)) if isinstance(vector, str) else vector
    assert close(raw, wanted) and client.models.retrieve("traceir").id == "traceir"
    with pytest.raises(openai.NotFoundError, match="else"):
        client.models.retrieve("else")
    with pytest.raises(openai.BadRequestError, match="token ids"):
        client.embeddings.create(model="traceir", input=[[9906, 1917]])

    async def ask() -> Any:
        async with openai.AsyncOpenAI(**about) as other:
            return await other.embeddings.create(**given)

    assert asyncio.run(ask()).usage == found.usage


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
    host, port = running.url.removeprefix("http://").split("/")[0].split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"{asked}\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status and not (body and asked.startswith("HEAD")), answer
