"""The running server: answers equal to the library's own, whoever asks."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
import time
import urllib.error
import urllib.request
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from conftest import Running, serving
from PIL import Image

from traceir.client import Client
from traceir.encoder import Encoder
from traceir.images import ImageInput
from traceir.index import open_index
from traceir.items import Item, Query
from traceir.search import Searcher
from traceir.serve.image_store import ImageFolder

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


def data_of(picture: ImageInput) -> str:
    assert picture.path is not None
    return base64.b64encode(picture.path.read_bytes()).decode()


def close(found: Any, wanted: np.ndarray) -> bool:
    return float(np.dot(np.asarray(found, dtype=np.float64), wanted)) > 0.99999


def test_search_finds_what_the_searcher_finds(running: Running, encoder: Encoder) -> None:
    picture = running.items[3].images[0]
    asked = [
        ({"text": CAPTION}, Query.of(text=CAPTION)),
        ({"text": INDIRECT, "modality": "image"}, Query.of(text=INDIRECT, target="image")),
        ({"image": {"data": data_of(picture)}, "modality": "text"}, Query.of(image=picture, target="text")),
        (
            {"image": {"item": running.items[3].id}, "text": "swap the left two", "instruction": "Show it.", "modality": "image"},
            Query.of(image=picture, text="swap the left two", instruction="Show it.", target="image"),
        ),
        ({"parts": [{"data": data_of(picture)}, "swap the left two"]}, Query.of(image=picture, text="swap the left two")),
    ]
    with open_index(running.index, fingerprint=encoder.fingerprint, prompt_version=encoder.prompt_version) as index:
        searcher = Searcher(encoder, index)
        for body, query in asked:
            wanted = searcher.search(query, k=7)
            status, found = call(f"{running.url}/search", body | {"k": 7})
            assert status == 200, found
            assert [hit["id"] for hit in found["hits"]] == [hit.id for hit in wanted.hits]
            assert found["hits"][0]["score"] == pytest.approx(wanted.hits[0].score, abs=1e-5)
            trace = found["trace"]
            assert (trace["route"], trace["reasoning"]) == (wanted.encoding.route, wanted.encoding.reasoning)
            assert set(trace["seconds"]) == {"queue", "encode", "search"}


def test_a_image_sent_goes_with_its_item_alone(running: Running) -> None:
    first, second = (base64.b64encode(png(colour)).decode() for colour in ("teal", "olive"))
    store = running.index / "pictures"

    def files() -> int:
        return sum(path.is_file() for path in store.rglob("*"))

    before = files()
    items = [{"id": f"sent-{number}", "image": {"data": first}} for number in range(2)]
    status, _ = call(f"{running.url}/items", {"items": [*items, {"id": "borrowed", "image": {"item": running.items[0].id}}]})
    assert status == 200 and files() == before + 2
    assert call(f"{running.url}/items", {"items": [{"id": "lent", "image": {"item": "sent-0"}}]})[0] == 200
    assert files() == before + 3
    assert call(f"{running.url}/items", {"items": [{"id": "sent-0", "image": {"data": second}}]})[0] == 200
    assert files() == before + 3
    assert call(f"{running.url}/items/sent-0", method="DELETE")[0] == 200
    assert files() == before + 2
    for id in ("sent-1", "lent"):
        picture = call(f"{running.url}/items/{id}")[1]["image"]
        with urllib.request.urlopen(f"{running.url}{picture}", timeout=60) as response:
            assert response.headers["content-type"] == "image/jpeg"
    ids = ["sent-1", "lent", "borrowed"]
    assert call(f"{running.url}/items", {"ids": ids}, method="DELETE") == (200, {"deleted": 3})
    assert files() == before
    assert all(item.images[0].path.exists() for item in running.items if item.images and item.images[0].path)


def test_field_report_06_what_pillow_calls_mpo_is_sent_kept_shown_and_searched_with(running: Running, tmp_path: Path) -> None:
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
        assert len(client.embed_queries([Query((ImageInput.open(path), "the same", ImageInput.open(path)))], route="direct")) == 1
        assert client.delete(["stereo"]) == 1


def test_what_a_killed_server_left_is_swept_once_it_is_old(tmp_path: Path) -> None:
    store = ImageFolder(tmp_path)
    kept, left = (store.keep(ImageInput.from_bytes(png(colour)), colour).path for colour in ("teal", "olive"))
    assert kept is not None and left is not None
    half = kept.with_name(f".{kept.name}.{'0' * 32}")
    half.write_bytes(b"half")
    own = left.with_name("holiday.png")
    own.write_bytes(b"not ours")
    assert store.sweep([str(kept), None, "elsewhere.png"]) == 0 and half.exists()
    assert store.sweep([str(kept), None, "elsewhere.png"], older_s=0.0) == 2
    assert kept.exists() and not left.exists() and not half.exists() and own.exists()


def png(colour: str) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (32, 24), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_pages_of_hits_continue_each_other(running: Running) -> None:
    _, whole = call(f"{running.url}/search", {"text": CAPTION, "k": 70})
    _, second = call(f"{running.url}/search", {"text": CAPTION, "k": 30, "offset": 30})
    _, last = call(f"{running.url}/search", {"text": CAPTION, "k": 30, "offset": 60})
    assert second["hits"] == whole["hits"][30:60] and second["more"] and second["hits"][0]["rank"] == 31
    assert last["hits"] == whole["hits"][60:] and not last["more"]


def test_the_stream_tells_route_reasoning_and_the_same_hits(running: Running) -> None:
    body = {"text": INDIRECT + " now", "modality": "image", "k": 5}
    request = urllib.request.Request(
        f"{running.url}/search/stream", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        events = [part.split("\n", 1) for part in response.read().decode().strip().split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in events]
    told = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert names[0] == "route" and names[-1] == "hits" and set(names[1:-1]) == {"reasoning"}
    assert told[0]["route"] == "reason" and told[-2]["text"] == told[-1]["trace"]["reasoning"] != ""
    assert [hit["id"] for hit in told[-1]["hits"]] == [hit["id"] for hit in call(f"{running.url}/search", body)[1]["hits"]]


def test_items_are_added_found_shown_and_removed(running: Running, encoder: Encoder) -> None:
    buffer = BytesIO()
    Image.new("RGB", (60, 40), "teal").save(buffer, "PNG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    sent = [
        {"id": "new/one two", "image": {"data": picture}, "text": "a teal square", "fields": {"shelf": 3, "kind": "own"}},
        {"id": "broken", "image": {"data": base64.b64encode(b"no picture").decode()}},
        {"id": "empty"},
        {"id": "new/one two", "text": "again"},
        {"id": "_tenant:acme:cup", "text": "a cup"},
        {"id": "named", "text": "a cup", "fields": {"id": "other"}},
    ]
    _, found = call(f"{running.url}/items", {"items": sent})
    assert [one["status"] for one in found["results"]] == ["added", *["failed"] * 5]
    assert "twice" in found["results"][3]["error"]
    status, one = call(f"{running.url}/items/new%2Fone%20two")
    assert status == 200 and one["fields"] == {"shelf": 3, "kind": "own"} and one["modality"] == "image,text"
    with urllib.request.urlopen(f"{running.url}{one['image']}?side=30") as response:
        shown = Image.open(BytesIO(response.read()))
        assert response.headers["content-type"] == "image/jpeg" and shown.size == (30, 20)
    _, hits = call(f"{running.url}/search", {"text": "a teal square", "where": {"kind": "own", "shelf": {"gte": 3, "lte": 3}}})
    assert [hit["id"] for hit in hits["hits"]] == ["new/one two"]
    vector = encoder.encode_items([Item.of(text="a teal square", image=ImageInput.from_bytes(buffer.getvalue()))])[0].vector
    assert hits["hits"][0]["score"] == pytest.approx(
        float(np.dot(encoder.encode_queries([Query.of(text="a teal square")])[0].vector, vector)), abs=1e-4
    )
    _, again = call(f"{running.url}/items", {"items": sent[:1]})
    assert again["results"][0]["status"] == "updated"
    assert call(f"{running.url}/items/new%2Fone%20two", method="DELETE") == (200, {"deleted": 1})
    assert call(f"{running.url}/items/new%2Fone%20two")[0] == 404


def test_embeddings_of_texts_objects_and_chats(running: Running, encoder: Encoder) -> None:
    picture = running.items[0].images[0]
    image = f"data:image/jpeg;base64,{data_of(picture)}"
    _, plain = call(f"{running.url}/v1/embeddings", {"input": ["a white ring", {"text": "a ring", "image": image}]})
    items = encoder.encode_items([Item.of(text="a white ring"), Item.of(text="a ring", image=picture)])
    assert all(close(one["embedding"], item.vector) for one, item in zip(plain["data"], items, strict=True))
    assert plain["data"][1]["trace"]["route"] == "direct" and plain["usage"]["prompt_tokens"] > 5
    shown = {"type": "image_url", "image_url": {"url": image}}
    chat = [
        {"role": "system", "content": "Find the picture after this change."},
        {"role": "user", "content": [shown, {"type": "text", "text": "swap the left two"}]},
    ]
    _, found = call(f"{running.url}/v1/embeddings", {"messages": chat, "encoding_format": "base64"})
    raw = base64.b64decode(found["data"][0]["embedding"])
    query = Query((picture, "swap the left two"), instruction="Find the picture after this change.")
    assert close(struct.unpack(f"<{len(raw) // 4}f", raw), encoder.encode_queries([query])[0].vector)
    _, both = call(f"{running.url}/v1/embeddings", {"messages": [chat, chat[1:]], "route": "direct"})
    assert len(both["data"]) == 2 and {one["trace"]["route"] for one in both["data"]} == {"direct"}


@pytest.mark.parametrize(
    ("path", "body", "status", "shown"),
    [
        ("/v1/embeddings", {"input": "a", "dimensions": 7}, 400, "width"),
        ("/v1/embeddings", {"input": "a", "model": "else"}, 404, "else"),
        ("/v1/embeddings", {"input": [1, 2]}, 400, "input"),
        ("/v1/embeddings", {}, 400, "exactly one"),
        ("/v1/embeddings", {"input": [""]}, 400, "input[0]"),
        ("/v1/embeddings", {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "audio"),
        ("/search", {}, 400, "empty"),
        ("/search", {"text": "a", "typo": 1}, 400, "typo"),
        ("/search", {"text": "a", "k": 0}, 400, "k"),
        ("/search", {"text": "a", "image": {"data": "aGk=", "item": "9:1"}}, 400, "image"),
        ("/search", {"image": {"url": "http://127.0.0.1/x.png"}}, 400, "url"),
        ("/search", {"image": {"item": "nowhere"}}, 400, "nowhere"),
        ("/items", {"items": []}, 400, "items"),
        ("/nothing", {}, 404, "Not Found"),
    ],
)
def test_bad_requests_say_what_is_wrong_in_openais_shape(running: Running, path: str, body: Any, status: int, shown: str) -> None:
    found, told = call(f"{running.url}{path}", body)
    assert found == status, told
    assert shown in told["error"]["message"] and set(told["error"]) == {"message", "type", "param", "code"}


def test_openais_client_drives_it_unchanged(running: Running, encoder: Encoder) -> None:
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="unused")
    assert [model.id for model in client.models.list()] == ["traceir"]
    found = client.embeddings.create(model="traceir", input=["a white ring", "a blue ball"])
    wanted = encoder.encode_items([Item.of(text="a white ring"), Item.of(text="a blue ball")])
    assert all(close(one.embedding, item.vector) for one, item in zip(found.data, wanted, strict=True))
    with pytest.raises(openai.NotFoundError, match="else"):
        client.embeddings.create(model="else", input="a")


def test_metrics_and_the_document_of_the_interface(running: Running) -> None:
    assert call(f"{running.url}/search", {"text": CAPTION})[0] == 200
    with urllib.request.urlopen(f"{running.url}/metrics") as response:
        text = response.read().decode()
    assert 'traceir_encoded_total{role="query",route="direct"}' in text and "traceir_stage_seconds_bucket" in text
    _, document = call(f"{running.url}/openapi.json")
    assert {"/v1/embeddings", "/search", "/search/stream", "/items", "/items/{id}"} <= set(document["paths"])


def test_keys_scopes_and_tenants(running: Running, tmp_path: Path, encoder: Encoder) -> None:
    from traceir.serve.keys import make_key, revoke_key

    keys = tmp_path / "keys.json"
    reader = make_key(keys, "reader")
    one, two = (make_key(keys, name, scopes=("read", "write"), tenant=name) for name in ("one", "two"))
    with serving(tmp_path / "index", "--keys", str(keys)) as url:
        assert call(f"{url}/search", {"text": "a"})[0] == 401
        assert call(f"{url}/search", {"text": "a"}, key="tir_" + "x" * 43)[0] == 401
        assert call(f"{url}/items", {"items": [{"id": "a", "text": "b"}]}, key=reader)[0] == 403
        assert call(f"{url}/items", {"items": [{"id": "a", "text": "a red cup"}]}, key=one)[0] == 200
        assert call(f"{url}/items", {"items": [{"id": "a", "text": "a blue cup"}]}, key=two)[1]["results"][0]["status"] == "added"
        found = {key: call(f"{url}/search", {"text": "a cup"}, key=key)[1]["hits"] for key in (one, two, reader)}
        assert [hit["text"] for hit in found[one]] == ["a red cup"] and [hit["text"] for hit in found[two]] == ["a blue cup"]
        assert found[reader] == [] and call(f"{url}/items/a", key=reader)[0] == 404
        revoke_key(keys, "one")
        assert call(f"{url}/search", {"text": "a cup"}, key=one)[0] == 401


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
    from traceir.client import Client
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


def test_field_report_08_a_good_item_is_added_beside_a_long_and_a_bad_one(running: Running) -> None:
    from traceir.client import Client

    long, ids = "a white ring. " * 3000, ["first", "long", "bad", "last"]
    items = [Item.of(text="a white ring", id="first"), Item.of(text=long, id="long")]
    items += [Item.of(text="half a \ud83d", id="bad"), Item.of(text="a blue ball", id="last", fields={"file": "own.txt"})]
    with Client(running.url) as client:
        found = client.add(items)
        assert [(one.id, one.status) for one in found] == list(zip(ids, ["added", "added", "failed", "added"], strict=True))
        assert found[1].cut > 1000 and found[0].cut == 0 and "surrogate" in str(found[2].error)
        assert dict(client.get("last").fields) == {"file": "own.txt"} and client.search(Query.of(text=long)).cut > 1000
        assert client.delete(ids) == 3


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}, {"encoding_format": None}])
def test_field_report_14_openais_clients_drive_it_whatever_they_send(
    running: Running, encoder: Encoder, options: dict[str, Any]
) -> None:
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
def test_field_report_14_probes_are_answered(running: Running, asked: str, status: int) -> None:
    host, port = running.url.removeprefix("http://").split("/")[0].split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"{asked}\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status and not (body and asked.startswith("HEAD")), answer
