"""The HTTP interface over the application in this process: answers equal to the library's own, items judged one by one, faults
named, nothing of the server's or of another tenant's shown."""

from __future__ import annotations

import base64
import json
import re
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import image_of
from PIL import Image
from starlette.testclient import TestClient

from traceir.collection.ingest import add
from traceir.collection.sources import FILE_FIELD
from traceir.encoder import Encoder
from traceir.images import ImageInput
from traceir.index import filters, open_index
from traceir.index.filters import MAX_NAME_BYTES
from traceir.index.store import MAX_ID_BYTES
from traceir.items import Item, Query
from traceir.retrieval.cursor import MAX_SHOWN
from traceir.retrieval.pipeline import MAX_WEIGHT
from traceir.retrieval.search import Searcher
from traceir.serve import bodies, schemas, service, strict, uploads
from traceir.serve.app import Server
from traceir.serve.keys import make_key, revoke_key
from traceir.serve.run import ServeConfig, make_application, make_server
from traceir.serve.scheduler import Scheduler
from traceir.serve.uploads import ImageFolder

LONG = "a red ring and a blue ball. " * 1500
"""42,000 characters, more than the model reads."""
CAPTION = "On the left a white ring, in the middle a blue ring, on the right a purple ring."
INDIRECT = "Left: a blue ball; middle: a mug in the colour of the left one; right: a ring in the colour of the left one."


def png(colour: str = "teal", width: int = 32) -> bytes:
    out = BytesIO()
    Image.new("RGB", (width, 24), colour).save(out, "PNG")
    return out.getvalue()


def data(content: bytes) -> dict[str, str]:
    return {"data": base64.b64encode(content).decode()}


IMAGE = data(png())


class Caller:
    """A server in this process, and requests to it in the name of a key."""

    def __init__(self, server: Server, client: TestClient, folder: Path, keys: dict[str, str]) -> None:
        self.server, self.client, self.folder, self.keys = server, client, folder, keys
        self.key = ""

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and content of an answer; `body` goes as JSON, bytes as they are."""
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", "authorization": f"Bearer {self.key}"}
        answer = self.client.request(method, path, content=content, headers=headers)
        is_json = answer.headers.get("content-type") == "application/json"
        return answer.status_code, answer.json() if is_json else answer.content

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        return self.ask("POST", path, body)

    def good(self, method: str, path: str, body: Any = None) -> Any:
        status, answer = self.ask(method, path, body)
        assert status == 200, answer
        return answer

    def add(self, *items: Any) -> list[dict[str, Any]]:
        return list(self.good("POST", "/items", {"items": list(items)})["results"])

    def files(self) -> int:
        return sum(path.is_file() for path in (self.folder / "index" / "pictures").rglob("*"))


@pytest.fixture(scope="module")
def caller(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """Over an index of a few files, with keys of two tenants and one of nobody's, which is used where nothing else is said."""
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
    made = {name: make_key(keys, name, scopes=("read", "write"), tenant=name) for name in ("acme", "rival", "brief")}
    made |= {"nobody": make_key(keys, "nobody", scopes=("read", "write")), "reader": make_key(keys, "reader")}
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
        caller = request.getfixturevalue("caller")
        caller.key = caller.keys["nobody"]


def close(actual: Any, wanted: np.ndarray) -> bool:
    return float(np.dot(np.asarray(actual, dtype=np.float64), wanted)) > 0.99999


# Answers


def test_embeddings_have_the_dimensions_asked_for(caller: Caller, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder.model, "settings", replace(encoder.model.settings, matryoshka_dims=(128, 32)))
    [whole] = caller.good("POST", "/v1/embeddings", {"input": "a"})["data"]
    [narrow] = caller.good("POST", "/v1/embeddings", {"input": "a", "dimensions": 32})["data"]
    first = np.asarray(whole["embedding"])[:32]
    assert len(whole["embedding"]) == 128 and narrow["embedding"] == pytest.approx(first / np.linalg.norm(first), abs=1e-6)
    status, answer = caller.post("/v1/embeddings", {"input": "a", "dimensions": 64})
    assert status == 400 and "vectors have 128, 32 components" in str(answer)


def test_search_finds_what_the_searcher_finds(caller: Caller, encoder: Encoder) -> None:
    shown, other = image_of(1), image_of(2, 64, 48)
    caller.add(*({"id": f"noise-{n}", "text": "noise", "image": data(own.encoded()[0])} for n, own in enumerate((shown, other))))
    asked = [
        ({"text": CAPTION}, Query.of(text=CAPTION)),
        ({"text": INDIRECT, "modality": "text"}, Query.of(text=INDIRECT, target="text")),
        (
            {"image": {"item": "noise-0"}, "text": "swap them", "instruction": "Show it.", "modality": "image,text"},
            Query.of(image=shown, text="swap them", instruction="Show it.", target="image,text"),
        ),
        ({"parts": [data(shown.encoded()[0]), "swap", data(other.encoded()[0])]}, Query((shown, "swap", other))),
    ]
    with open_index(caller.folder / "index", encoder) as index:
        searcher = Searcher(encoder, index)
        for body, query in asked:
            wanted, answer = searcher.search(query, k=5), caller.good("POST", "/search", body | {"k": 5})
            assert [hit["id"] for hit in answer["hits"]] == [hit.id for hit in wanted.hits]
            assert answer["hits"][0]["score"] == pytest.approx(wanted.hits[0].score, abs=1e-5)
            trace = answer["trace"]
            assert (trace["route"], trace["reasoning"]) == (wanted.encoding.route, wanted.encoding.reasoning)
            assert set(trace["seconds"]) == {"queue", "encode", "search"}
    whole = caller.good("POST", "/search", {"text": CAPTION, "k": 5})["hits"]
    page = caller.good("POST", "/search", {"text": CAPTION, "k": 2, "offset": 2})
    assert page["hits"] == whole[2:4] and page["more"] and page["hits"][0]["rank"] == 3


def test_the_stream_tells_route_reasoning_and_the_same_hits(caller: Caller) -> None:
    body = {"text": INDIRECT + " now", "k": 5}
    _, streamed = caller.post("/search/stream", body)
    events = [part.split("\n", 1) for part in streamed.decode().strip().split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in events]
    parts = [json.loads(content.removeprefix("data: ")) for _, content in events]
    assert names[0] == "route" and names[-1] == "hits" and set(names[1:-1]) == {"reasoning"}
    assert parts[0]["route"] == "reason" and parts[-2]["text"] == parts[-1]["trace"]["reasoning"] != ""
    assert parts[-1]["hits"] == caller.good("POST", "/search", body)["hits"]
    _, refused = caller.post("/search/stream", {"image": {"item": "nowhere"}})
    assert refused.startswith(b"event: error\ndata: {") and b"nowhere" in refused


def test_embeddings_of_texts_objects_and_chats(caller: Caller, encoder: Encoder) -> None:
    shown = image_of(3)
    image = f"data:image/png;base64,{data(shown.encoded()[0])['data']}"
    plain = caller.good("POST", "/v1/embeddings", {"input": ["a white ring", {"text": "a ring", "image": image}]})
    items = encoder.encode_items([Item.of(text="a white ring"), Item.of(text="a ring", image=shown)])
    assert all(close(entry["embedding"], item.vector) for entry, item in zip(plain["data"], items, strict=True))
    assert plain["data"][1]["trace"]["route"] == "direct" and plain["usage"]["prompt_tokens"] > 5
    user = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "swap"}]}
    chat = [{"role": "system", "content": "Find the picture after this change."}, user]
    answer = caller.good("POST", "/v1/embeddings", {"messages": chat, "encoding_format": "base64"})
    raw = base64.b64decode(answer["data"][0]["embedding"])
    query = Query((shown, "swap"), instruction="Find the picture after this change.")
    assert close(struct.unpack(f"<{len(raw) // 4}f", raw), encoder.encode_queries([query])[0].vector)
    both = caller.good("POST", "/v1/embeddings", {"messages": [chat, chat[1:]], "route": "direct"})
    assert len(both["data"]) == 2 and {entry["trace"]["route"] for entry in both["data"]} == {"direct"}
    mixed = [{"type": "text", "text": "swap", "image_url": 5}, {"type": "text", "text": "swap", "image_url": image}]
    mixed.append({"type": "input_image", "image_url": image, "text": 5})
    messages = [[{"role": "user", "content": [part]}] for part in mixed]
    answered = caller.good("POST", "/v1/embeddings", {"messages": messages, "route": "direct"})["data"]
    for entry, part in zip(answered, ("swap", "swap", shown), strict=True):  # the type says which field counts
        assert close(entry["embedding"], encoder.encode_queries([Query((part,))], route="direct")[0].vector)


def test_items_are_added_found_shown_and_removed(caller: Caller, encoder: Encoder) -> None:
    out = BytesIO()
    Image.new("RGB", (32, 24), "teal").save(out, "MPO", save_all=True, append_images=[Image.new("RGB", (32, 24))])
    fields = {"shelf": 3, "kind": "own"}
    sent = {"id": "new/one two", "image": data(out.getvalue()), "text": "a teal square", "fields": fields}
    assert caller.add(sent)[0]["status"] == "added" and caller.add(sent)[0]["status"] == "updated"
    item = caller.good("GET", "/items/new%2Fone%20two")
    assert item["fields"] == fields and item["modality"] == "image,text"
    shown = Image.open(BytesIO(caller.good("GET", f"{item['image']}?side=16")))
    assert shown.format == "JPEG" and shown.size == (16, 12) and shown.getpixel((9, 9))[2] > 100
    where = {"kind": "own", "shelf": {"gte": 3, "lte": 3}}
    [hit] = caller.good("POST", "/search", {"text": "a teal square", "where": where})["hits"]
    vector = encoder.encode_items([Item.of(text="a teal square", image=ImageInput.from_bytes(out.getvalue()))])[0].vector
    asked = encoder.encode_queries([Query.of(text="a teal square")])[0].vector
    assert hit["id"] == "new/one two" and hit["score"] == pytest.approx(float(np.dot(asked, vector)), abs=1e-4)
    ids = [item["id"] for item in caller.good("GET", "/items?after=m&limit=2")["items"]]
    assert ids == sorted(ids) and len(ids) == 2 and caller.good("GET", "/items?limit=1")["more"]
    assert caller.good("DELETE", "/items/new%2Fone%20two") == {"deleted": 1}
    assert caller.ask("GET", "/items/new%2Fone%20two")[0] == 404


def test_an_answer_of_too_much_is_refused_or_ends_early(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_ANSWER", 4000)
    ids = [f"much-{number}" for number in range(3)]
    caller.add(*({"id": id, "text": "a ring", "fields": {"n": 1, "much": "ä" * 1000}} for id in ids))
    asked = {"text": "a ring", "where": {"much": {"gte": "ä"}}}
    status, answer = caller.post("/search", asked)
    assert status == 400 and re.search(r"the 3 hits hold 6\d+ bytes.*ask for fewer.*offset", answer["error"]["message"])
    assert len(caller.good("POST", "/search", asked | {"k": 1})["hits"]) == 1
    listed: list[str] = []
    while (page := caller.good("GET", f"/items?after={listed[-1] if listed else 'much'}"))["more"]:
        assert len(page["items"]) == 1, "two are too much"
        listed.append(page["items"][0]["id"])
    assert listed == ids[: len(listed)] and len(listed) >= 2
    assert caller.good("DELETE", "/items", {"ids": ids}) == {"deleted": 3}


def test_an_image_sent_goes_with_its_item_alone(caller: Caller) -> None:
    before, navy = caller.files(), data(png("navy", 40))
    borrowed = {"id": "borrowed", "image": {"item": "ring.png"}}
    caller.add({"id": "sent-0", "image": navy}, {"id": "sent-1", "image": navy}, borrowed)
    assert caller.files() == before + 2, "what is a file of the operator's is not copied"
    caller.add({"id": "lent", "image": {"item": "sent-0"}})
    caller.add({"id": "sent-0", "image": data(png("olive", 40))})
    assert caller.files() == before + 3
    assert caller.good("DELETE", "/items/sent-0") == {"deleted": 1} and caller.files() == before + 2
    assert all(caller.ask("GET", caller.good("GET", f"/items/{id}")["image"])[0] == 200 for id in ("sent-1", "lent"))
    assert caller.good("DELETE", "/items", {"ids": ["sent-1", "lent", "borrowed"]}) == {"deleted": 3}
    assert caller.files() == before and (caller.folder / "secret-place" / "ring.png").exists()


def test_what_a_killed_server_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    store = ImageFolder(tmp_path)
    kept, left = (store.keep(ImageInput.from_bytes(png(colour)), colour).path for colour in ("teal", "olive"))
    assert kept is not None and left is not None
    halves = [kept.with_name(f".{kept.name}.{end}") for end in ("0" * 32, "0" * 8 + ".new")]
    own = left.with_name("holiday.png")
    for file in (*halves, own):
        file.write_bytes(b"half, or not ours")
    assert store.collect_garbage([str(kept), None, "elsewhere.png"]) == 0 and halves[0].exists()
    assert store.collect_garbage([str(kept), None, "elsewhere.png"], older_s=0.0) == 3
    assert kept.exists() and own.exists() and not any(file.exists() for file in (left, *halves))


def test_an_image_is_kept_while_others_of_its_item_are_removed(tmp_path: Path) -> None:
    store, images = ImageFolder(tmp_path), [ImageInput.from_bytes(png(colour)) for colour in ("teal", "olive")]
    done = threading.Event()

    def remove() -> None:
        while not done.is_set():
            store.remove_unused("x", None)

    with ThreadPoolExecutor(3) as threads:
        removing = threads.submit(remove)
        try:
            assert all(threads.map(lambda number: store.keep(images[number % 2], "x"), range(100)))
        finally:
            done.set()
        removing.result()


def test_metrics_and_the_document_of_the_interface(caller: Caller) -> None:
    caller.good("POST", "/search", {"text": CAPTION})
    text = caller.good("GET", "/metrics").decode()
    assert 'traceir_encoded_total{role="query",route="direct"}' in text and "traceir_stage_seconds_bucket" in text
    assert 'traceir_requests_total{path="/search",status="200"}' in text
    paths = caller.client.get("/openapi.json").json()["paths"]
    operations = {f"{method} {path}": about for path, methods in paths.items() for method, about in methods.items()}
    assert {"post /v1/embeddings", "post /search/stream", "delete /items/{id}", "get /pictures/{name}"} <= set(operations)
    open_to_all = {label for label, about in operations.items() if about.get("security") != [{"key": []}]}
    assert open_to_all == {"get /health", "get /ready"}
    assert operations["post /search"]["responses"]["415"]["description"] == "A body is JSON, and not packed."
    assert not any("422" in about["responses"] or "400" not in about["responses"] for about in operations.values())


def test_keys_scopes_and_tenants(caller: Caller) -> None:
    def status(key: str, path: str, body: Any) -> int:
        caller.key = caller.keys.get(key, key)
        return caller.post(path, body)[0]

    asked = {"text": "a cup"}
    assert status("", "/search", asked) == status("tir_" + "x" * 43, "/search", asked) == 401
    assert status("reader", "/items", {"items": [{"id": "a", "text": "b"}]}) == 403
    for name in ("acme", "brief"):
        assert status(name, "/items", {"items": [{"id": "cup", "text": f"a cup of {name}"}]}) == 200
        assert [hit["text"] for hit in caller.good("POST", "/search", asked)["hits"]] == [f"a cup of {name}"]
        assert caller.ask("GET", "/metrics")[0] == 403
    revoke_key(caller.folder / "keys.json", "brief")
    assert status("brief", "/search", asked) == 401 and status("reader", "/search", asked) == 200
    assert caller.ask("GET", "/items/cup")[0] == 404


# Items, one by one

BAD_ITEMS: dict[str, tuple[str, str]] = {
    "long id": ('{"id": "%s", "text": "a"}' % ("x" * 2000), "id: 2000 characters, at most 1024"),
    "id long in bytes": ('{"id": "%s", "text": "a", "image": PICTURE}' % ("ü" * 600), "1200 bytes"),
    "empty id": ('{"id": "", "text": "a"}', "id: it is empty"),
    "no id": ('{"text": "a"}', "id: it is missing"),
    "half pair in id": (r'{"id": "a\ud83d", "text": "a"}', "id: it holds half of a surrogate pair"),
    "reserved id": ('{"id": "_tenant:acme:cup", "text": "a"}', "_tenant:"),
    "text too long for memory": ('{"id": "t", "text": "%s"}' % ("x" * 300_000), "text: 300000 characters, at most 262144"),
    "number for a text": ('{"id": "n", "text": 5}', "text: a number, where a text is wanted"),
    "list for an item": ("[1]", "a list, where an object is wanted"),
    "unknown key": ('{"id": "u", "text": "a", "colour": "red"}', "colour: there is no such field"),
    "empty": ('{"id": "e"}', "is empty"),
    "NaN": ('{"id": "f1", "text": "a", "fields": {"n": NaN}}', "fields.n: it is not a finite number"),
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
    "many fields": (json.dumps({"id": "f11", "text": "a", "fields": dict.fromkeys(map(str, range(300)))}), "fields: 300 entries"),
    "fields no object": ('{"id": "f12", "text": "a", "fields": 5}', "fields: a number"),
    "reserved field": ('{"id": "f13", "text": "a", "fields": {"_file": "/etc/passwd"}}', "'_file'"),
    "tenant's field": ('{"id": "f14", "text": "a", "fields": {"_tenant": "acme"}}', "'_tenant'"),
    "index's field": ('{"id": "f15", "text": "a", "fields": {"modality": "text"}}', "'modality'"),
    "no base64": ('{"id": "p1", "image": {"data": "%%%"}}', "image is not base64"),
    "broken picture": ('{"id": "p2", "image": {"data": "aGVsbG8="}}', "image: "),
    "picture as a text": ('{"id": "p4", "image": "aGVsbG8="}', "image: a text, where an object is wanted"),
    "picture of two kinds": ('{"id": "p5", "image": {"data": "aGVs", "item": "x"}}', "image names no single image"),
    "nobody's picture": ('{"id": "p6", "image": {"item": "never"}}', "never"),
    "a name twice": ('{"id": "d1", "text": "a", "text": "b"}', "text: the name occurs twice"),
    "a field twice": ('{"id": "d2", "text": "a", "fields": {"n": 1, "n": 2}}', "fields.n: the name occurs twice"),
    "the same id again": ('{"id": "good-0", "text": "again"}', "occurs twice"),
}  # fmt: skip


def test_each_item_has_a_result_of_its_own_whatever_the_others_are(caller: Caller) -> None:
    before = caller.files()
    texts = ['{"id": "good-0", "text": "a ring", "image": PICTURE}']
    for number, (item, _) in enumerate(BAD_ITEMS.values(), start=1):
        texts += [item, f'{{"id": "good-{number}", "text": "a ring", "image": null, "fields": null}}']
    body = f'{{"items": [{", ".join(texts)}]}}'.replace("PICTURE", json.dumps(IMAGE))
    status, answer = caller.post("/items", body.encode())
    assert status == 200, answer
    results = answer["results"]
    assert [result["id"] for result in results[::2]] == [f"good-{number}" for number in range(len(BAD_ITEMS) + 1)]
    assert {result["status"] for result in results[::2]} == {"added"}
    for (name, (_, shown)), result in zip(BAD_ITEMS.items(), results[1::2], strict=True):
        assert result["status"] == "failed" and shown in result["error"], (name, result)
        assert str(caller.folder) not in result["error"]
    assert caller.files() == before + 1, "nothing stays of what failed"


def test_a_long_text_is_cut_as_in_this_process_and_that_is_told(caller: Caller, encoder: Encoder) -> None:
    whole = encoder.model.processor.forced(encoder.model.prompt(Item.of(text=LONG), direct=True)).cut
    long, short = caller.add({"id": "long", "text": LONG}, {"id": "short", "text": "a ring"})
    assert (long["status"], long["cut"], short["cut"]) == ("added", whole, 0) and whole > 1000
    answer = caller.good("POST", "/v1/embeddings", {"input": ["a ring", LONG]})
    assert [entry["trace"]["cut"] for entry in answer["data"]] == [0, whole]
    assert caller.good("POST", "/search", {"text": LONG, "instruction": LONG})["trace"]["cut"] > whole


def test_an_item_at_which_the_server_breaks_fails_alone(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Scheduler.encode_item

    async def broken(self: Any, item: Item, **options: Any) -> Any:
        if item.id == "breaks":
            raise RuntimeError("a fault in /secret-place")
        return await encode(self, item, **options)

    monkeypatch.setattr(Scheduler, "encode_item", broken)
    results = caller.add(*({"id": id, "text": "a ring"} for id in ("first", "breaks", "third")))
    assert [result["status"] for result in results] == ["added", "failed", "added"]
    assert results[1]["error"] == "the server cannot keep it now; its log says why"


def test_fields_are_the_callers_own_and_shown_however_they_came(caller: Caller, encoder: Encoder) -> None:
    caller.add({"id": "paper", "text": "a paper", "fields": {"file": "paper.pdf", "path": "/a/b"}})
    assert caller.good("GET", "/items/paper")["fields"] == {"file": "paper.pdf", "path": "/a/b"}
    [hit] = caller.good("POST", "/search", {"text": "a paper", "where": {"file": "paper.pdf"}})["hits"]
    assert hit["id"] == "paper" and caller.good("GET", "/items/line")["fields"] == {"file": "own.pdf"}
    item = Item.of(text="from a line", id="wide", fields={"notes": "x" * 40_000})
    with open_index(caller.folder / "index", encoder) as index:
        index.upsert([item], encoder.encode_items([item])[0].vector[None])
    assert len(caller.good("GET", "/items/wide")["fields"]["notes"]) == 40_000
    assert caller.good("POST", "/search", {"text": "from a line", "where": {"notes": {"gte": "x"}}})["hits"][0]["id"] == "wide"


def test_of_adds_at_once_one_is_told_that_it_added(caller: Caller) -> None:
    with ThreadPoolExecutor(4) as pool:
        for number in range(2):
            sent = [{"id": f"same-{number}", "text": f"a ring {writer}"} for writer in range(4)]
            statuses = list(pool.map(lambda item: caller.add(item)[0]["status"], sent))
            assert sorted(statuses) == ["added", "updated", "updated", "updated"]
        gone = list(pool.map(lambda _: caller.good("DELETE", "/items", {"ids": ["same-0", "same-1"]})["deleted"], range(4)))
        assert sorted(gone) == [0, 0, 0, 2]


def test_an_image_is_decoded_once_and_nothing_long_is_done_in_the_event_loop(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, bool]] = []
    running, portal = caller.server.service, caller.client.portal
    assert running is not None and portal is not None
    loop = portal.call(threading.get_ident)

    def watch(owner: Any, *names: str) -> None:
        """Notes calls, and whether they are made in the thread of the event loop."""
        for name, work in [(name, getattr(owner, name)) for name in names]:

            def call(*sent: Any, name: str = name, work: Any = work, **options: Any) -> Any:
                seen.append((name, threading.get_ident() == loop))
                return work(*sent, **options)

            monkeypatch.setattr(owner, name, call)

    watch(type(running.index), "check", "upsert", "delete", "search", "get", "count", "scan", "info")
    watch(ImageInput, "load", "check", "encoded")
    watch(service, "filter_of", "read_items")
    watch(strict, "parse_json")
    watch(uploads, "bytes_of_base64")
    where = {"shelf": [*range(100)], "more": ["x" * 30_000] * 10}  # bodies so large that they are read beside the loop
    sent = {"id": "seen", "text": "a ring", "image": data(png("lime")), "fields": {"more": where["more"]}}
    assert caller.add(sent, {"id": 5})[0]["status"] == "added"
    assert [name for name, _ in seen].count("load") == 1
    for body in ({"image": {"item": "seen"}, "where": where}, {"parts": [IMAGE, "a ring"], "k": 1000, "where": where}):
        caller.good("POST", "/search", body)
    caller.good("POST", "/v1/embeddings", {"input": ["a ring", {"image": IMAGE["data"]}], "user": "x" * 300_000})
    for path in ("/items/seen", "/items", "/page/config", "/metrics", "/pictures/c2Vlbg"):
        caller.good("GET", path)
    assert caller.good("DELETE", "/items/seen") and len(seen) > 20
    assert [name for name, in_loop in seen if in_loop] == []


# Faults in words


def chat(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


FAULTS: dict[str, list[tuple[Any, str]]] = {
    "POST /v1/embeddings": [
        ({"input": ["a"] * 257}, "input: 257 entries, at most 256"),
        ({"input": ["a", "b", "x" * 300_000]}, "input[2]: 300000 characters, at most 262144"),
        ({"input": [*["a"] * 3, 7]}, "input[3]: a number, where a text or an object of text and image (token ids"),
        ({"input": [[9906, 1917]]}, "input[0]: a list, where a text or an object of text and image (token ids"),
        ({"input": {"text": "a"}}, "input: an object, where a text, or a list"),
        ({"input": ["a", {"text": 5}]}, "input[1].text: a number, where a text is wanted"),
        ({"input": ["a", {"txt": "a"}]}, "input[1].txt: there is no such field"),
        ({"input": ["a", {"image": 5}]}, "input[1].image: a number"),
        ({"input": ["a", {"image": {"data": 5}}]}, "input[1].image.data: a number"),
        ({"input": ["a", {"image": "aGVsbG8="}]}, "input[1].image: "),
        ({"input": ["a", "two \ud83d"]}, "input[1]: the body holds half of a surrogate pair"),
        ({"input": ["a", ""]}, "input[1]: "),
        ({"input": []}, "input is empty"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format: it is 'hex'; 'float' or 'base64' is wanted"),
        ({"input": "a", "dimensions": "64"}, "dimensions: a text, where a whole number is wanted"),
        ({"input": "a", "dimensions": 7}, "dimensions is 7, but this server's vectors have "),
        ({"messages": [[]] * 257}, "messages: 257 entries, at most 256"),
        ({"messages": [chat("a"), []], "instruction": "Find it."}, "messages[1] holds no message"),
        ({"messages": [*chat("a"), {"role": "tool"}]}, "messages[1].role: it is 'tool'; 'system', 'user'"),
        ({"messages": chat(5)}, "messages[0].content: a number, where a text or a list of contents"),
        ({"messages": [chat("a"), chat(["a", {"type": "audio"}])]}, "messages[1][0].content[1].type: it is 'audio'; 'text'"),
        ({"messages": chat([{"type": "image_url", "image_url": {"url": 5}}])}, "messages[0].content[0].image_url: a number"),
        ({"messages": chat([{"type": "image_url", "image_url": "x" * 3000}])}, "messages[0].content[0].image_url.url: 3000"),
        ({"messages": chat([{"type": "image_url", "image_url": "data:image/png;base64,%"}])}, "messages[0].content[0] is not"),
        ({"messages": chat([{"type": "image_url"}])}, "messages[0].content[0]: a content of type 'image_url' needs"),
    ],
    "POST /search": [
        ({"parts": ["a", 5]}, "parts[1]: a number, where a text or an image object is wanted"),
        ({"parts": ["a", {"data": 5}]}, "parts[1].data: a number, where a text is wanted"),
        ({"parts": ["a", {"data": "aGVsbG8="}]}, "parts[1]: "),
        ({"parts": ["a"] * 33}, "parts: 33 entries, at most 32"),
        ({"text": "a", "image": "aGVsbG8="}, "image: a text, where an object is wanted"),
        ({"text": "a", "k": 1001}, "k: it is 1001, at most 1000 is wanted"),
        ({"text": "a", "k": True}, "k: a boolean, where a whole number is wanted"),
        ({"text": "a", "modality": "video"}, "modality: it is 'video'"),
        ({"text": "a", "where": {"shelf": [1, [2]]}}, "where.shelf[1]: a list"),
        ({"text": "a", "where": {"shelf": {"gt": 2}}}, "where.shelf.gt: there is no such field"),
        ({"text": "a", "where": {"shelf": {"gte": True}}}, "where.shelf.gte: a boolean"),
        ({"text": "a", "where": {"shelf": [1] * 10_001}}, "where.shelf: 10001 entries, at most 10000"),
        ({"text": "a", "where": {f"n{n}": 1 for n in range(33)}}, "where: 33 fields, at most 32"),
        ({"text": "a", "where": {"shelf": "x" * 40_000}}, "where.shelf: 40000 characters, at most 32768"),
        ({"text": "a", "where": {f"n{n}": ["a"] * 9_000 for n in range(10)}}, "the body holds more than 60000 texts"),
    ],
    "POST /search/stream": [({"text": ["a"]}, "text: a list, where a text is wanted")],
    "POST /items": [
        (b"{", "the body is not JSON"), (b"[]", "body: a list"), (b'{"items": {}}', "items: an object"),
        (b"{}", "items: it is missing"), (b'{"items": []}', "items: 0 entries, at least 1"),
        (b'{"items": [{"id": "\xff"}]}', "the body is not UTF-8"),
        (b'{"items": [{"id": "x", "text": "a"}], "more": 1}', "more: there is no such field"),
        (b'{"items": [1], "items": [2]}', "items: the name occurs twice"),
        ({"items": [1] * 257}, "items: 257 entries, at most 256"),
    ],
    "DELETE /items": [
        ({"ids": ["kept", 5]}, "ids[1]: a number"), ({"ids": ["kept", ""]}, "ids[1]: it is empty"),
        ({"ids": ["kept", "ü" * 600]}, "ids[1]: id "), ({"ids": ["kept"] * 1001}, "ids: 1001 entries, at most 1000"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("operation", FAULTS)
def test_an_error_names_the_element_and_what_is_wrong_with_it_in_openais_shape(caller: Caller, operation: str) -> None:
    caller.add({"id": "kept", "text": "a ring"})
    for body, shown in FAULTS[operation]:
        status, answer = caller.ask(*operation.split(), body)
        error = answer["error"]
        assert status == 400 and error["message"].startswith(shown), answer
        assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
        assert error["param"] is None or shown.startswith((error["param"], "body"))
    assert caller.good("DELETE", "/items/kept") == {"deleted": 1}, "nothing is removed by a request that is refused"


def test_what_is_not_here_is_404(caller: Caller) -> None:
    assert caller.post("/v1/embeddings", {"input": "a", "model": "else"})[0] == 404
    assert caller.post("/nothing", {})[1]["error"]["message"] == "Not Found"


# What clients and watchdogs send


@pytest.mark.parametrize(
    ("path", "name", "body"),
    [("/search", "SearchIn", {"text": "a ring", "k": 3}), ("/v1/embeddings", "EmbeddingsIn", {"input": ["a ring"]})],
)
def test_null_is_as_if_left_out(caller: Caller, path: str, name: str, body: dict[str, Any]) -> None:
    fields = caller.client.get("/openapi.json").json()["components"]["schemas"][name]["properties"]
    nulls = {name: None for name in fields if name not in body}
    assert all({"type": "null"} in fields[name]["anyOf"] for name in nulls) and len(nulls) > 6
    plain, nulled = caller.good("POST", path, body), caller.good("POST", path, nulls | body)
    assert plain.get("hits") == nulled.get("hits") and str(plain.get("data"))[:200] == str(nulled.get("data"))[:200]


def test_every_page_that_can_be_read_can_be_asked_for_by_head(caller: Caller) -> None:
    caller.add({"id": "shown", "image": IMAGE})
    key, machine = {"authorization": f"Bearer {caller.key}"}, {"host": "10.0.0.7:8080"}
    pages = "/ /health /ready /health/ /ready/ /openapi.json /static/api.js /metrics /v1/models /v1/models/traceir /items"
    for path in (*pages.split(), "/items/shown", "/pictures/c2hvd24", "/page/config"):
        got, head = caller.client.get(path, headers=key), caller.client.head(path, headers=key)
        assert (got.status_code, head.status_code) == (200, 200), path
        assert head.headers["content-type"] == got.headers["content-type"]
    for path in ("/health", "/ready"):  # by the address of the machine, without a key
        assert (
            caller.client.head(path, headers=machine).status_code == caller.client.get(path, headers=machine).status_code == 200
        )
        assert caller.client.options(path, headers=machine).headers["allow"] == "GET, HEAD, POST, DELETE"
    assert caller.client.head("/items", headers=machine).status_code == 421
    assert caller.client.head("/items").status_code == caller.client.head("/search").status_code == 401


# What callers may not learn


def test_paths_of_the_server_can_be_neither_seen_nor_guessed(caller: Caller) -> None:
    path = str(caller.folder / "secret-place" / "note.txt")
    for key in ("nobody", "acme"):
        caller.key = caller.keys[key]
        for guess in (path, [path], {"gte": "", "lte": "~"}, None):
            for name in ("file", "image", "source"):
                hits = caller.good("POST", "/search", {"text": "a note", "where": {name: guess}, "k": 100})["hits"]
                assert guess is None or not {"note.txt", "ring.png"} & {hit["id"] for hit in hits}, (name, guess)
            for name in (FILE_FIELD, "_tenant"):
                status, answer = caller.post("/search", {"text": "a note", "where": {"n": 1, name: guess}})
                assert status == 400 and name in answer["error"]["message"]
    caller.key = caller.keys["nobody"]
    shown = [caller.good("GET", path) for path in "/items /items/note.txt /items/ring.png /page/config /openapi.json".split()]
    shown += [caller.good("POST", "/search", body) for body in ({"text": "a note", "k": 100}, {"image": {"item": "ring.png"}})]
    assert "secret-place" not in json.dumps(shown) and str(caller.folder) not in json.dumps(shown)


def test_a_file_that_breaks_is_told_without_its_path(caller: Caller, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    file = caller.folder / "secret-place" / "gone.png"
    file.write_bytes(png("olive"))
    with open_index(caller.folder / "index", encoder) as index:
        add([file], index, encoder, progress=False)
    check = ImageInput.check

    def lose(self: ImageInput, *limits: Any) -> None:
        """The image is whole when it is checked, and gone when it is encoded."""
        check(self, *limits)
        file.unlink(missing_ok=True)

    monkeypatch.setattr(ImageInput, "check", lose)
    asked = {"image": {"item": "gone.png"}}
    for path, body in (("/search", asked), ("/v1/embeddings", {"input": [asked]}), ("/items", {"items": [{"id": "g", **asked}]})):
        file.write_bytes(png("olive"))
        answer = json.dumps(caller.post(path, body)[1])
        assert "secret-place" not in answer and "of the item" in answer, answer


def test_facets_are_the_callers_own_and_follow_what_is_added(caller: Caller) -> None:
    def facets(name: str) -> dict[str, Any]:
        caller.key = caller.keys[name]
        return {facet["name"]: facet["values"] for facet in caller.good("GET", "/v1/facets")["facets"]}

    for count in (1, 2):
        facets("acme")
        caller.add({"id": f"facets/{count}", "text": "a cup", "fields": {"facet": "of acme", "_day": "2024-05-01"}})
        shown = facets("acme")
        assert shown["facet"] == [["of acme", count]] and shown["_day"] == [["2024", count]] and ["facets/", count] in shown["id"]
        assert not any(name.startswith("_tenant") or name == "_file" for name in shown)
        assert "facet" not in facets("rival") and "facet" not in facets("nobody")


def test_an_image_is_checked_before_it_is_searched_with(caller: Caller) -> None:
    shown = caller.good("POST", "/v1/pictures", {"image": IMAGE})
    assert shown["width"] > 0 and shown["height"] > 0
    for image in ({"data": base64.b64encode(b"\x89PNG\r\n\x1a\nno more").decode()}, {"data": "%"}, {"item": "nobody"}):
        status, answer = caller.post("/v1/pictures", {"image": image})
        assert status == 400 and answer["error"]["message"].startswith("image")


def test_nobody_learns_what_another_tenant_asked_or_holds(caller: Caller) -> None:
    body = {"text": "a question that only one has asked", "route": "direct"}
    cached = []
    for name in ("acme", "rival", "nobody", "acme", "rival", "nobody"):
        caller.key = caller.keys[name]
        cached.append(caller.good("POST", "/search", body)["trace"]["cached"])
    assert cached == [False, False, False, True, True, True]
    caller.key = caller.keys["acme"]
    assert caller.add({"id": "plan", "image": IMAGE})[0]["status"] == "added"
    caller.key = caller.keys["rival"]
    for there, never in (("plan", "nalp"), ("_tenant:acme:plan", "_tenant:acme:nalp")):
        paths = [f"/pictures/{base64.urlsafe_b64encode(id.encode()).decode().rstrip('=')}" for id in (there, never)]
        answers = [caller.ask("GET", path) for path in paths]
        assert [status for status, _ in answers] == [404, 404]
        assert answers[0][1]["error"]["message"].replace(there, "x") == answers[1][1]["error"]["message"].replace(never, "x")
        assert caller.ask("GET", f"/items/{there}")[0] == caller.ask("DELETE", f"/items/{there}")[0] == 404


def test_the_limits_in_the_docs_are_those_of_the_code() -> None:
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    _, _, table = page.partition("| limit | |\n|---|---|\n")
    rows = dict(row.strip("| ").split(" | ", 1) for row in table.partition("\n\n")[0].splitlines())
    documented = {name: [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text)] for name, text in rows.items()}
    fields = [schemas.MAX_ITEM_FIELDS, MAX_NAME_BYTES, schemas.MAX_VALUE, 64]
    assert documented == {
        "body": [bodies.MAX_BODY >> 20, 8, 30, bodies.MAX_VALUES, bodies.MAX_TEXTS, bodies.MAX_DEPTH, bodies.MAX_DIGITS],
        "text, instruction": [schemas.MAX_TEXT],
        "inputs of `/v1/embeddings`, chats": [schemas.MAX_INPUTS],
        "parts of a query or chat": [schemas.MAX_PARTS],
        "items of `POST /items`": [schemas.MAX_INPUTS],
        "id": [1, MAX_ID_BYTES, 8],
        "fields of an item": fields,
        "`where`": [schemas.MAX_FIELDS, schemas.MAX_VALUES, filters.MAX_VALUES, filters.MAX_TEXT_BYTES >> 20],
        "`k`, `offset`, `limit`": [schemas.MAX_K, schemas.MAX_OFFSET, schemas.MAX_K],
        "`terms`, `after`": [schemas.MAX_TERMS, int(MAX_WEIGHT), int(MAX_WEIGHT), MAX_SHOWN],
        "`where`, `sort`, `after` of `GET /items`": [schemas.MAX_QUERY],
        "hits or items of an answer": [bodies.MAX_ANSWER >> 20],
        "`ids` of `DELETE /items`": [schemas.MAX_K],
        "image": [uploads.LIMITS.file_bytes >> 20, uploads.LIMITS.pixels // 10**6, uploads.LIMITS.pixels // 10**6 // 4, 2048],
    }
