"""What a request may hold: items judged one by one, faults named, nothing of the server's or of another tenant's shown."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from traceir.encoder import Encoder
from traceir.images import ImageInput
from traceir.index import Index, filters, open_index
from traceir.index.filters import MAX_NAME_BYTES
from traceir.index.store import MAX_ID_BYTES
from traceir.ingest import add
from traceir.items import Item
from traceir.serve import bodies, schemas
from traceir.serve import uploads as intake
from traceir.serve.app import Server
from traceir.serve.keys import make_key
from traceir.serve.run import ServeConfig, make_application, make_server
from traceir.sources import FILE_FIELD

LONG = "a red ring and a blue ball. " * 1500
"""42,000 characters, more than the model reads."""


def png(colour: str = "teal") -> bytes:
    out = BytesIO()
    Image.new("RGB", (32, 24), colour).save(out, "PNG")
    return out.getvalue()


IMAGE = {"data": base64.b64encode(png()).decode()}


class Caller:
    """A server in this process, and requests to it in the name of a key."""

    def __init__(self, server: Server, client: TestClient, folder: Path, keys: dict[str, str]) -> None:
        self.server, self.client, self.folder, self.keys = server, client, folder, keys
        self.key = ""

    def raw(self, method: str, path: str, content: bytes = b"", **headers: str) -> tuple[int, Any]:
        given = {"content-type": "application/json", "authorization": f"Bearer {self.key}", **headers}
        answer = self.client.request(method, path, content=content, headers=given)
        return answer.status_code, json.loads(answer.content or b"null")

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        return self.raw(method, path, b"" if body is None else json.dumps(body).encode())

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        return self.ask("POST", path, body)

    def add(self, *items: Any) -> list[dict[str, Any]]:
        status, told = self.post("/items", {"items": list(items)})
        assert status == 200, told
        return list(told["results"])


@pytest.fixture(scope="module")
def caller(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """Over an index of two files, with keys of two tenants and one of nobody's, which is used where nothing else is said."""
    folder = tmp_path_factory.mktemp("requests")
    files = folder / "secret-place"
    files.mkdir()
    (files / "ring.png").write_bytes(png("navy"))
    (files / "note.txt").write_text("a note about a ring")
    (files / "lines.jsonl").write_text(json.dumps({"id": "line", "text": "a line", "file": "own.pdf"}))
    with open_index(folder / "index", encoder, create=True) as index:
        report = add([files, files / "lines.jsonl"], index, encoder, progress=False)
        assert report.added == 3 and index.get(["note.txt"])["note.txt"].fields[FILE_FIELD] == str(files / "note.txt")
    keys = folder / "keys.json"
    made = {name: make_key(keys, name, scopes=("read", "write"), tenant=name) for name in ("acme", "rival")}
    made["nobody"] = make_key(keys, "nobody", scopes=("read", "write"))
    config = ServeConfig(str(folder / "index"), keys=keys, remembered=1000)
    server = make_server(config, lambda: encoder)
    with TestClient(make_application(config, server), base_url="http://127.0.0.1:8080") as client:
        while server.service is None:
            assert server.failed is None
            time.sleep(0.01)
        yield Caller(server, client, folder, made)


@pytest.fixture(autouse=True)
def as_nobody(request: pytest.FixtureRequest) -> None:
    if "caller" in request.fixturenames:
        one = request.getfixturevalue("caller")
        one.key = one.keys["nobody"]


# Items, one by one

BAD_ITEMS: dict[str, tuple[str, str]] = {
    "long id": ('{"id": "%s", "text": "a"}' % ("x" * 2000), "id: 2000 characters, at most 1024"),
    "id long in bytes": ('{"id": "%s", "text": "a", "image": PICTURE}' % ("ü" * 600), "1200 bytes"),
    "empty id": ('{"id": "", "text": "a"}', "id: it is empty"),
    "no id": ('{"text": "a"}', "id: it is missing"),
    "zero in id": (r'{"id": "a\u0000", "text": "a"}', "id: it holds a zero character"),
    "half pair in id": (r'{"id": "a\ud83d", "text": "a"}', "id: it holds half of a surrogate pair"),
    "reserved id": ('{"id": "_tenant:acme:cup", "text": "a"}', "_tenant:"),
    "text too long for memory": ('{"id": "t", "text": "%s"}' % ("x" * 300_000), "text: 300000 characters, at most 262144"),
    "half pair in text": (r'{"id": "s", "text": "two steps \ud83d"}', "text: it holds half of a surrogate pair"),
    "number for a text": ('{"id": "n", "text": 5}', "text: a number, where a text is wanted"),
    "list for an item": ("[1]", "a list, where an object is wanted"),
    "null for an item": ("null", "null, where an object is wanted"),
    "unknown key": ('{"id": "u", "text": "a", "colour": "red"}', "colour: there is no such field"),
    "empty": ('{"id": "e"}', "is empty"),
    "blank": ('{"id": "e2", "text": "  "}', "is empty"),
    "NaN": ('{"id": "f1", "text": "a", "fields": {"n": NaN}}', "fields.n: it is not a finite number"),
    "infinity": ('{"id": "f2", "text": "a", "fields": {"n": 1e999}}', "fields.n: it is not a finite number"),
    "5000 digits": ('{"id": "f3", "text": "a", "fields": {"n": %s}}' % ("9" * 5000), "fields.n: it is not a finite number"),
    "beyond 64 bits": ('{"id": "f4", "text": "a", "fields": {"n": 99999999999999999999}}', "'n'"),
    "list in a list": ('{"id": "f5", "text": "a", "fields": {"n": [1, [2]]}}', "fields.n[1]: a list"),
    "object in fields": ('{"id": "f16", "text": "a", "fields": {"n": {"gte": 1}}}', "fields.n: an object"),
    "long list in fields": (json.dumps({"id": "f17", "text": "a", "fields": {"n": [1] * 1001}}), "fields.n: 1001 entries"),
    "half pair in a field": (r'{"id": "f6", "text": "a", "fields": {"n": "\udc00"}}', "fields.n: it holds half"),
    "half pair in a name": (r'{"id": "f7", "text": "a", "fields": {"\ud800": 1}}', "field name"),
    "zero in a field": (r'{"id": "f8", "text": "a", "fields": {"n": "\u0000"}}', "'n'"),
    "long name of a field": ('{"id": "f9", "text": "a", "fields": {"%s": 1}}' % ("n" * 200), "field name"),
    "long field": ('{"id": "f10", "text": "a", "fields": {"n": "%s"}}' % ("x" * 40_000), "fields.n: 40000 characters"),
    "too many fields": (
        json.dumps({"id": "f11", "text": "a", "fields": {f"n{number}": 1 for number in range(300)}}),
        "fields: 300 entries, at most 256",
    ),
    "fields no object": ('{"id": "f12", "text": "a", "fields": 5}', "fields: a number"),
    "reserved field": ('{"id": "f13", "text": "a", "fields": {"_file": "/etc/passwd"}}', "'_file'"),
    "tenant's field": ('{"id": "f14", "text": "a", "fields": {"_tenant": "acme"}}', "'_tenant'"),
    "index's field": ('{"id": "f15", "text": "a", "fields": {"modality": "text"}}', "'modality'"),
    "no base64": ('{"id": "p1", "image": {"data": "%%%"}}', "image is not base64"),
    "broken picture": ('{"id": "p2", "image": {"data": "aGVsbG8="}}', "image: "),
    "half pair in a picture": (r'{"id": "p3", "image": {"data": "\ud83d"}}', "image is not base64"),
    "picture as a text": ('{"id": "p4", "image": "aGVsbG8="}', "image: a text, where an object is wanted"),
    "picture of two kinds": ('{"id": "p5", "image": {"data": "aGVs", "item": "x"}}', "image is not a picture"),
    "nobody's picture": ('{"id": "p6", "image": {"item": "never"}}', "never"),
    "a name twice": ('{"id": "d1", "text": "a", "text": "b"}', "text: the name occurs twice"),
    "a field twice": ('{"id": "d2", "text": "a", "fields": {"n": 1, "n": 2}}', "fields.n: the name occurs twice"),
    "an id twice": ('{"id": "d3", "id": "d4", "text": "a"}', "id: the name occurs twice"),
    "the same id again": ('{"id": "good-0", "text": "again"}', "occurs twice"),
}  # fmt: skip


def test_field_report_08_each_item_has_a_result_of_its_own_whatever_the_others_are(caller: Caller) -> None:
    texts = ['{"id": "good-0", "text": "a ring", "image": PICTURE}']
    for number, (item, _) in enumerate(BAD_ITEMS.values(), start=1):
        texts += [item, f'{{"id": "good-{number}", "text": "a ring", "image": null, "fields": null}}']
    body = f'{{"items": [{", ".join(texts)}]}}'.replace("PICTURE", json.dumps(IMAGE))
    status, told = caller.raw("POST", "/items", body.encode())
    assert status == 200, told
    results = told["results"]
    assert [one["id"] for one in results[::2]] == [f"good-{number}" for number in range(len(BAD_ITEMS) + 1)]
    assert {one["status"] for one in results[::2]} == {"added"}
    for (name, (_, shown)), one in zip(BAD_ITEMS.items(), results[1::2], strict=True):
        assert one["status"] == "failed" and shown in one["error"], (name, one)
        assert str(caller.folder) not in one["error"]
    assert caller.ask("GET", "/items/good-0")[1]["text"] == "a ring"
    files = [path for path in (caller.folder / "index" / "pictures").rglob("*") if path.is_file()]
    assert len(files) == 1  # that of good-0: nothing stays of what failed


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b"{", "not JSON"), (b"[]", "body: a list"), (b"5", "body: a number"), (b'{"items": {}}', "items: an object"),
        (b'{"items": []}', "items: 0 entries, at least 1"), (b'{"items": null}', "items: null"), (b"{}", "items: it is missing"),
        (b'{"items": [{"id": "x", "text": "a"}], "more": 1}', "more: there is no such field"),
        (b'{"items": [1], "items": [2]}', "items: the name occurs twice"),
        (json.dumps({"items": [1] * 257}).encode(), "items: 257 entries, at most 256"), (b'{"items": [{"id": "\xff"}]}', "UTF-8"),
    ],
)  # fmt: skip
def test_field_report_08_a_body_that_is_no_list_of_items_is_refused_as_a_whole(caller: Caller, body: bytes, shown: str) -> None:
    status, told = caller.raw("POST", "/items", body)
    assert status == 400 and shown in told["error"]["message"]


def test_field_report_08_a_long_text_is_cut_as_in_this_process_and_that_is_told(caller: Caller, encoder: Encoder) -> None:
    whole = encoder.model.processor.forced(encoder.model.prompt(Item.of(text=LONG), direct=True)).cut
    long, short = caller.add({"id": "long", "text": LONG}, {"id": "short", "text": "a ring"})
    assert (long["status"], long["cut"], short["cut"]) == ("added", whole, 0) and whole > 1000
    assert caller.ask("GET", "/items/long")[1]["text"] == LONG.strip()
    status, told = caller.post("/v1/embeddings", {"input": ["a ring", LONG]})
    assert status == 200 and [one["trace"]["cut"] for one in told["data"]] == [0, whole]
    vector = encoder.encode_items([Item.of(text=LONG)])[0].vector
    assert float(np.dot(told["data"][1]["embedding"], vector)) > 0.99999
    assert caller.post("/search", {"text": LONG, "instruction": LONG})[1]["trace"]["cut"] > whole


def test_field_report_08_an_item_at_which_the_server_breaks_fails_alone(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    service = caller.server.service
    assert service is not None
    encode = type(service.scheduler).encode_item

    async def broken(self: Any, item: Item, **options: Any) -> Any:
        if item.id == "breaks":
            raise RuntimeError("a fault in /secret-place")
        return await encode(self, item, **options)

    monkeypatch.setattr(type(service.scheduler), "encode_item", broken)
    first, second, third = caller.add(*({"id": id, "text": "a ring"} for id in ("first", "breaks", "third")))
    assert (first["status"], third["status"]) == ("added", "added")
    assert second["status"] == "failed" and second["error"] == "the server cannot keep it now; its log says why"


# What of an item is the server's own, and what of a write is decided where


def test_field_report_11_a_field_called_file_is_the_callers_own(caller: Caller) -> None:
    [one] = caller.add({"id": "paper", "text": "a paper", "fields": {"file": "paper.pdf", "path": "/a/b"}})
    assert one["status"] == "added"
    assert caller.ask("GET", "/items/paper")[1]["fields"] == {"file": "paper.pdf", "path": "/a/b"}
    hits = caller.post("/search", {"text": "a paper", "where": {"file": "paper.pdf"}})[1]["hits"]
    assert [hit["id"] for hit in hits] == ["paper"] and hits[0]["fields"]["file"] == "paper.pdf"
    assert caller.ask("GET", "/items/line")[1]["fields"] == {"file": "own.pdf"}
    [again] = caller.add({"id": "paper", "text": "a paper"})
    assert again["status"] == "updated" and caller.ask("GET", "/items/paper")[1]["fields"] == {}


def test_field_report_11_of_adds_at_once_one_is_told_that_it_added(caller: Caller) -> None:
    with ThreadPoolExecutor(4) as pool:
        for number in range(3):
            sent = [{"id": f"same-{number}", "text": f"a ring {writer}"} for writer in range(4)]
            told = list(pool.map(lambda item: caller.add(item)[0]["status"], sent))
            assert sorted(told) == ["added", "updated", "updated", "updated"]
        gone = list(pool.map(lambda _: caller.ask("DELETE", "/items", {"ids": ["same-0", "same-1"]})[1]["deleted"], range(4)))
        assert sorted(gone) == [0, 0, 0, 2]


class Watching:
    """An index that hashes what it checks, as Milvus' does, and notes what is called in the event loop."""

    def __init__(self, index: Index, seen: list[str]) -> None:
        self.index, self.seen = index, seen

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.index, name)
        return self._watched(name, found) if callable(found) else found

    def check(self, items: list[Item]) -> None:
        note(self.seen, "check")
        for item in items:
            item.content_hash()
        self.index.check(items)

    def _watched(self, name: str, call: Any) -> Any:
        def watched(*given: Any, **options: Any) -> Any:
            note(self.seen, name)
            return call(*given, **options)

        return watched


def note(seen: list[str], what: str) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    seen.append(what)


def test_field_report_11_nothing_is_read_hashed_or_asked_of_the_index_in_the_event_loop(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    service = caller.server.service
    assert service is not None
    index = cast(Index, Watching(service.index, seen))
    monkeypatch.setattr(caller.server, "service", replace(service, index=index, sources=replace(service.sources, index=index)))
    for name in ("load", "_read", "encoded", "_remember", "from_bytes"):
        whole = getattr(ImageInput, name)

        def watched(*given: Any, _whole: Any = whole, _name: str = name, **options: Any) -> Any:
            note(seen, _name)
            return _whole(*given, **options)

        monkeypatch.setattr(ImageInput, name, staticmethod(watched) if name == "from_bytes" else watched)
    for place in ("service.filter_of", "strict.parse_json", "strict.fault_of", "uploads.bytes_of_base64", "service.read_items"):
        module, name = place.split(".")
        whole = getattr(__import__(f"traceir.serve.{module}", fromlist=[name]), name)

        def told(*given: Any, _whole: Any = whole, _name: str = place, **options: Any) -> Any:
            note(seen, _name)
            return _whole(*given, **options)

        monkeypatch.setattr(f"traceir.serve.{place}", told)
    padding = "x" * 262_144  # bodies so large that they are read beside the loop
    assert caller.add({"id": "seen", "text": padding, "image": IMAGE}, {"id": 5})[0]["status"] == "added"
    where = {"shelf": [*range(100)], "more": ["x" * 30_000] * 10}
    for body in ({"image": {"item": "seen"}, "where": where}, {"parts": [IMAGE, padding], "k": 1000}):
        assert caller.post("/search", body)[0] == 200
    assert caller.post("/search", {"text": padding, "typo": 1})[0] == 400
    assert caller.post("/v1/embeddings", {"input": [padding, {"image": IMAGE["data"]}]})[0] == 200
    for path in ("/items/seen", "/items", "/page/config", "/metrics"):
        assert caller.client.get(path, headers={"authorization": f"Bearer {caller.key}"}).status_code == 200
    assert caller.client.get("/pictures/c2Vlbg", headers={"authorization": f"Bearer {caller.key}"}).status_code == 200
    assert caller.ask("DELETE", "/items/seen")[0] == 200
    assert seen == []


# Faults in words

FAULTS: list[tuple[str, Any, str]] = [
    ("/v1/embeddings", {"input": ["a"] * 257}, "input: 257 entries, at most 256"),
    ("/v1/embeddings", {"input": ["a", "b", "x" * 300_000]}, "input[2]: 300000 characters, at most 262144"),
    ("/v1/embeddings", {"input": [*["a"] * 3, 7]}, "input[3]: a number, where a text or an object"),
    ("/v1/embeddings", {"input": [9906, 1917]}, "input[0]: a number, where a text or an object of text and image (token ids"),
    ("/v1/embeddings", {"input": [[9906, 1917]]}, "input[0]: a list, where a text or an object of text and image (token ids"),
    ("/v1/embeddings", {"input": ["a", None]}, "input[1]: null"),
    ("/v1/embeddings", {"input": {"text": "a"}}, "input: an object, where a text, or a list"),
    ("/v1/embeddings", {"input": 5}, "input: a number"),
    ("/v1/embeddings", {"input": ["a", {"text": 5}]}, "input[1].text: a number, where a text is wanted"),
    ("/v1/embeddings", {"input": ["a", {"txt": "a"}]}, "input[1].txt: there is no such field"),
    ("/v1/embeddings", {"input": ["a", {"image": 5}]}, "input[1].image: a number"),
    ("/v1/embeddings", {"input": ["a", {"image": {"data": 5}}]}, "input[1].image.data: a number"),
    ("/v1/embeddings", {"input": ["a", {"image": "aGVsbG8="}]}, "input[1].image: "),
    ("/v1/embeddings", {"input": ["a", "two \ud83d"]}, "input[1]: the body holds half of a surrogate pair"),
    ("/v1/embeddings", {"input": ["a", ""]}, "input[1]: "),
    ("/v1/embeddings", {"input": []}, "input is empty"),
    ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format: it is 'hex'; 'float' or 'base64' is wanted"),
    ("/v1/embeddings", {"input": "a", "dimensions": "64"}, "dimensions: a text, where a whole number is wanted"),
    ("/v1/embeddings", {"messages": [[]] * 257}, "messages: 257 entries, at most 256"),
    (
        "/v1/embeddings",
        {"messages": [{"role": "user", "content": "a"}, {"role": "tool"}]},
        "messages[1].role: it is 'tool'; 'system', 'user'",
    ),
    (
        "/v1/embeddings",
        {"messages": [{"role": "user", "content": 5}]},
        "messages[0].content: a number, where a text or a list of contents",
    ),
    (
        "/v1/embeddings",
        {"messages": [[{"role": "user", "content": "a"}], [{"role": "user", "content": ["a", {"type": "audio"}]}]]},
        "messages[1][0].content[1].type: it is 'audio'; 'text', 'input_text', 'image_url'",
    ),
    ("/search", {"parts": ["a", 5]}, "parts[1]: a number, where a text or a picture object is wanted"),
    ("/search", {"parts": ["a", {"data": 5}]}, "parts[1].data: a number, where a text is wanted"),
    ("/search", {"parts": ["a", {"data": "aGVsbG8="}]}, "parts[1]: "),
    ("/search", {"parts": ["a"] * 33}, "parts: 33 entries, at most 32"),
    ("/search", {"text": "a", "image": "aGVsbG8="}, "image: a text, where an object is wanted"),
    ("/search", {"text": "a", "k": 1001}, "k: it is 1001, at most 1000 is wanted"),
    ("/search", {"text": "a", "k": True}, "k: a boolean, where a whole number is wanted"),
    ("/search", {"text": "a", "modality": "video"}, "modality: it is 'video'"),
    ("/search", {"text": "a", "where": {"shelf": [1, [2]]}}, "where.shelf[1]: a list"),
    ("/search", {"text": "a", "where": {"shelf": {"gt": 2}}}, "where.shelf.gt: there is no such field"),
    ("/search", {"text": "a", "where": {"shelf": {"gte": True}}}, "where.shelf.gte: a boolean"),
    ("/search", {"text": "a", "where": {"shelf": [1] * 10_001}}, "where.shelf: 10001 entries, at most 10000"),
    ("/search", {"text": "a", "where": {f"n{n}": 1 for n in range(33)}}, "where: 33 fields, at most 32"),
    ("/search", {"text": "a", "where": {"shelf": "x" * 40_000}}, "where.shelf: 40000 characters, at most 32768"),
    ("/search/stream", {"text": ["a"]}, "text: a list, where a text is wanted"),
]


@pytest.mark.parametrize(("path", "body", "shown"), FAULTS, ids=[row[2][:40] for row in FAULTS])
def test_field_report_13_an_error_names_the_element_and_what_is_wrong_with_it(
    caller: Caller, path: str, body: Any, shown: str
) -> None:
    status, told = caller.post(path, body)
    assert status == 400 and told["error"]["message"].startswith(shown), told


@pytest.mark.parametrize(
    ("ids", "shown"),
    [
        (["a", 5], "ids[1]: a number"),
        (["a", ""], "ids[1]: it is empty"),
        (["a", "ü" * 600], "ids[1]: id "),
        (["a"] * 1001, "ids: 1001 entries, at most 1000"),
    ],
)
def test_field_report_13_ids_that_are_none_are_named_and_nothing_is_removed(caller: Caller, ids: Any, shown: str) -> None:
    caller.add({"id": "a", "text": "a ring"})
    status, told = caller.ask("DELETE", "/items", {"ids": ids})
    assert status == 400 and told["error"]["message"].startswith(shown) and told["error"]["param"].startswith("ids")
    assert caller.ask("DELETE", "/items/a") == (200, {"deleted": 1})


def test_field_report_13_a_long_field_from_elsewhere_is_shown(caller: Caller, encoder: Encoder) -> None:
    service = caller.server.service
    assert service is not None
    item = Item.of(text="from a line", id="wide", fields={"notes": "x" * 40_000})
    service.index.upsert([item], encoder.encode_items([item])[0].vector[None])
    assert len(caller.ask("GET", "/items/wide")[1]["fields"]["notes"]) == 40_000
    assert caller.post("/search", {"text": "from a line", "where": {"notes": {"gte": "x"}}})[1]["hits"][0]["id"] == "wide"


# What clients and watchdogs send


def test_field_report_14_null_is_as_if_left_out(caller: Caller) -> None:
    for body, path in (({"text": "a ring", "k": 3}, "/search"), ({"input": ["a ring"]}, "/v1/embeddings")):
        schema = caller.client.get("/openapi.json").json()["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        document = caller.client.get("/openapi.json").json()["components"]["schemas"][schema["schema"]["$ref"].split("/")[-1]]
        nulls = {name: None for name in document["properties"] if name not in body}
        assert all({"type": "null"} in document["properties"][name]["anyOf"] for name in nulls) and len(nulls) > 6
        (status, plain), (other, nulled) = caller.post(path, body), caller.post(path, nulls | body)
        assert status == other == 200, nulled
        assert plain.get("hits") == nulled.get("hits") and plain.get("data", [{}])[0].get("embedding") == nulled.get(
            "data", [{}]
        )[0].get("embedding")
    assert caller.post("/search", {"text": "a", "typo": None})[0] == 400


def test_field_report_14_every_page_that_can_be_read_can_be_asked_for_by_head(caller: Caller) -> None:
    caller.add({"id": "shown", "image": IMAGE})
    paths = ["/", "/health", "/ready", "/health/", "/ready/", "/openapi.json", "/static/api.js", "/metrics", "/v1/models",
             "/v1/models/traceir", "/items", "/items/shown", "/pictures/c2hvd24", "/page/config"]  # fmt: skip
    for path in paths:
        headers = {"authorization": f"Bearer {caller.key}"}
        got, head = caller.client.get(path, headers=headers), caller.client.head(path, headers=headers)
        assert (got.status_code, head.status_code) == (200, 200), path
        assert head.headers["content-type"] == got.headers["content-type"]
    for path in ("/health", "/ready"):  # by the address of the machine, without a key
        assert caller.client.head(path, headers={"host": "10.0.0.7:8080"}).status_code == 200
        assert caller.client.get(path, headers={"host": "10.0.0.7:8080"}).status_code == 200
        assert caller.client.options(path, headers={"host": "10.0.0.7:8080"}).headers["allow"] == "GET, HEAD, POST, DELETE"
    assert caller.client.head("/items", headers={"host": "10.0.0.7:8080"}).status_code == 421
    assert caller.client.head("/items").status_code == 401 and caller.client.head("/search").status_code == 401


# What callers may not learn


def test_field_report_19_paths_of_the_server_can_be_neither_seen_nor_guessed(caller: Caller) -> None:
    path = str(caller.folder / "secret-place" / "note.txt")
    guesses: list[Any] = [path, [path], {"gte": path}, {"lte": path}, {"gte": "/"}, {"gte": "", "lte": "~"}, None, [None]]
    for key in caller.keys.values():
        caller.key = key
        for guess in guesses:
            for name in ("file", "path", "image", "image_path", "source"):
                hits = caller.post("/search", {"text": "a note", "where": {name: guess}, "k": 100})[1]["hits"]
                found = {hit["id"] for hit in hits}
                assert not {"note.txt", "ring.png"} & found or guess in (None, [None]), (name, guess)
            for name in (FILE_FIELD, "_tenant"):
                status, told = caller.post("/search", {"text": "a note", "where": {"n": 1, name: guess}})
                assert status == 400 and name in told["error"]["message"]
    caller.key = caller.keys["nobody"]
    shown = [
        caller.ask("GET", path)[1] for path in ("/items", "/items/note.txt", "/items/ring.png", "/page/config", "/openapi.json")
    ]
    shown += [caller.post("/search", {"text": "a note", "k": 100})[1], caller.post("/search", {"image": {"item": "ring.png"}})[1]]
    assert "secret-place" not in json.dumps(shown) and str(caller.folder) not in json.dumps(shown)


def test_field_report_19_a_file_that_breaks_is_told_without_its_path(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    service = caller.server.service
    assert service is not None
    file = caller.folder / "secret-place" / "gone.png"
    file.write_bytes(png("olive"))
    with open_index(caller.folder / "index", service.scheduler.encoder) as index:
        add([file], index, service.scheduler.encoder, progress=False)
    take = type(service.intake).take

    async def lose(self: Any, *given: Any) -> ImageInput:
        """The picture is whole when it is taken in, and gone when it is encoded."""
        found = await take(self, *given)
        file.unlink(missing_ok=True)
        return ImageInput.open(file) if found.path == file else found

    monkeypatch.setattr(type(service.intake), "take", lose)
    asked = {"image": {"item": "gone.png"}}
    bodies: list[tuple[str, Any]] = [
        ("/search", asked),
        ("/v1/embeddings", {"input": [asked]}),
        ("/items", {"items": [{"id": "g", **asked}]}),
    ]
    for path, body in bodies:
        file.write_bytes(png("olive"))
        told = caller.post(path, body)[1]
        assert "secret-place" not in json.dumps(told) and "of the item" in json.dumps(told), told


def test_field_report_19_nobody_is_told_what_another_tenant_asked(caller: Caller) -> None:
    body = {"text": "a question that only one has asked", "route": "direct"}
    told = []
    for name in ("acme", "rival", "nobody", "acme", "rival", "nobody"):
        caller.key = caller.keys[name]
        told.append(caller.post("/search", body)[1]["trace"])
    assert [one["cached"] for one in told] == [False, False, False, True, True, True]
    assert all(one["seconds"]["encode"] > 0 for one in told[:3])
    for name, cached in (("acme", False), ("rival", False), ("acme", True)):
        caller.key = caller.keys[name]
        assert caller.post("/v1/embeddings", {"input": ["only once"]})[1]["data"][0]["trace"]["cached"] == cached


def test_field_report_19_a_image_of_another_tenant_is_as_one_that_is_not_there(caller: Caller) -> None:
    caller.key = caller.keys["acme"]
    assert caller.add({"id": "plan", "image": IMAGE})[0]["status"] == "added"
    caller.key = caller.keys["rival"]
    for there, never in (("plan", "nalp"), ("_tenant:acme:plan", "_tenant:acme:nalp")):
        paths = [f"/pictures/{base64.urlsafe_b64encode(id.encode()).decode().rstrip('=')}" for id in (there, never)]
        answers = [caller.ask("GET", path) for path in paths]
        assert [status for status, _ in answers] == [404, 404]
        assert answers[0][1]["error"]["message"].replace(there, "x") == answers[1][1]["error"]["message"].replace(never, "x")
        assert caller.ask("GET", f"/items/{there}")[0] == caller.ask("DELETE", f"/items/{there}")[0] == 404


def test_field_report_13_the_limits_in_the_docs_are_those_of_the_code() -> None:
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    _, _, table = page.partition("| limit | |\n|---|---|\n")
    rows = dict(row.strip("| ").split(" | ", 1) for row in table.partition("\n\n")[0].splitlines())
    told = {name: [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text)] for name, text in rows.items()}
    fields = [schemas.MAX_ITEM_FIELDS, MAX_NAME_BYTES, schemas.MAX_VALUE, 64]
    assert told == {
        "body": [bodies.MAX_BODY >> 20, 8, 30, bodies.MAX_VALUES, bodies.MAX_TEXTS, bodies.MAX_DEPTH, bodies.MAX_DIGITS],
        "text, instruction": [schemas.MAX_TEXT],
        "inputs of `/v1/embeddings`, chats": [schemas.MAX_INPUTS],
        "parts of a query or chat": [schemas.MAX_PARTS],
        "items of `POST /items`": [schemas.MAX_INPUTS],
        "id": [1, MAX_ID_BYTES, 8],
        "fields of an item": fields,
        "`where`": [schemas.MAX_FIELDS, schemas.MAX_VALUES, filters.MAX_VALUES, filters.MAX_TEXT_BYTES >> 20],
        "`k`, `offset`, `limit`": [schemas.MAX_K, schemas.MAX_OFFSET, schemas.MAX_K],
        "hits or items of an answer": [bodies.MAX_ANSWER >> 20],
        "`ids` of `DELETE /items`": [schemas.MAX_K],
        "picture": [intake.LIMITS.file_bytes >> 20, intake.LIMITS.pixels // 10**6, intake.LIMITS.pixels // 10**6 // 4, 2048],
    }
