"""The security of the server: keys, limits, fetching, images from requests, bodies, the middleware, tenants."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
import ssl
import stat
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import httpx2
import numpy as np
import pytest
from fakes import vector_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiffs import SHORT, tiff

from traceir.errors import InputError, StoreError
from traceir.images import ImageInput, ImageLimits
from traceir.index import And, Eq, Filter, Glob, In, Not, Or, Range, SqliteIndex, open_index, position_of
from traceir.items import Item
from traceir.serve import fetch
from traceir.serve.access import KeyMiddleware, Limits, scope_needed
from traceir.serve.bodies import MAX_DEPTH, BodyMiddleware, parse_json
from traceir.serve.fetch import Fetcher, FetchLimits, is_public
from traceir.serve.keys import KeyRing, Principal, list_keys, make_key, revoke_key
from traceir.serve.limits import Buckets, Rate, network_of, retry_after
from traceir.serve.security import AccessRules, Message, Receive, Refusal, SecurityMiddleware, Send
from traceir.serve.tenants import FIELD, PREFIX, TenantIndex
from traceir.serve.uploads import LIMITS, ImageFolder, Sources, UploadValidator, as_jpeg, bytes_of_base64, image_in_folders

PUBLIC = "93.184.215.14"


def encoded(format: str = "PNG", size: tuple[int, int] = (8, 6), **options: Any) -> bytes:
    out = BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(out, format, **options)
    return out.getvalue()


PNG = encoded()


# Keys


def test_key_is_shown_once_stored_as_a_hash_and_seen_by_a_running_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    secret = make_key(path, "page", scopes=["write", "read"], tenant="acme", requests_per_minute=90)
    ring = KeyRing(path)
    assert secret.startswith("tir_") and len(base64.urlsafe_b64decode(secret[4:] + "=")) == 32
    assert secret[4:] not in path.read_text() and stat.S_IMODE(path.stat().st_mode) == 0o600
    who = ring.check(f"Bearer {secret}")
    assert isinstance(who, Principal) and who.scopes == ("read", "write")
    assert (who.name, who.tenant, who.requests_per_minute) == ("page", "acme", 90)
    with ThreadPoolExecutor(8) as pool:
        others = list(pool.map(lambda number: make_key(path, f"key-{number}"), range(8)))
    assert len(list_keys(path)) == 9 and all(isinstance(ring.check(f"bearer {key}"), Principal) for key in others)
    compared: list[str] = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: bool(compared.append(a)) or a == b)
    ring.check(f"Bearer {secret}")
    assert len(compared) == 9, "every hash, whichever fits"
    revoke_key(path, "page")
    whole = path.read_text()
    for content, status in ((whole, 401), (whole[:-5], 503), (whole, 401)):
        path.write_text(content)
        assert refused(ring.check(f"Bearer {secret}"))[0] == status
        assert isinstance(ring.check(f"Bearer {others[0]}"), Principal) == (status == 401)
    path.unlink()
    assert refused(ring.check(f"Bearer {others[0]}"))[0] == 503


def refused(answer: object) -> tuple[int, str]:
    assert isinstance(answer, Refusal)
    return answer.status, answer.code


def test_header_that_holds_no_valid_key_is_refused(tmp_path: Path) -> None:
    start, path = datetime(2026, 1, 1, tzinfo=UTC), tmp_path / "keys.json"
    secret = make_key(path, "page", days=2, now=lambda: start)
    forms = "|Bearer|Bearer tir_|tir_{}|Basic {}|Bearer {}x|Bearer x{}|Bearer {} {}".split("|")
    for header in [None, *(form.replace("{}", secret) for form in forms), "Bearer tir_" + "A" * 43]:
        answer = KeyRing(path).check(header)
        assert isinstance(answer, Refusal) and answer.status == 401 and secret not in answer.message
    assert isinstance(KeyRing(path, now=lambda: start + timedelta(days=2, seconds=-1)).check(f"Bearer {secret}"), Principal)
    assert refused(KeyRing(path, now=lambda: start + timedelta(days=2)).check(f"Bearer {secret}")) == (401, "expired_key")


def test_unusable_keys_are_neither_made_nor_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    for options in ({"name": ""}, {"name": "a\nb"}, {"scopes": []}, {"scopes": ["admin"]}, {"scopes": ["read", "read"]},
                    {"days": 0}, {"requests_per_minute": 0}, {"tenant": "A/../b"}, {"tenant": ""}):  # fmt: skip
        with pytest.raises(InputError):
            make_key(path, **{"name": "page", **options})  # type: ignore[arg-type]
    assert not path.exists()
    make_key(path, "page")
    stored = path.read_text()
    for change in ({"scopes": ["root"]}, {"sha256": "x"}, {"expires": "2030-01-01T00:00:00"}, {"tenant": "../a"}, {"name": 5}):
        edited = json.loads(stored)
        edited["keys"][0] |= change
        path.write_text(json.dumps(edited))
        with pytest.raises(StoreError, match="damaged"):
            list_keys(path)
    path.write_text(stored)
    path.chmod(0o620)
    with pytest.raises(StoreError, match="chmod 600"):
        KeyRing(path)


# Limits


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 30)), min_size=1, max_size=40), st.integers(1, 600), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_bucket_never_grants_more_than_burst_and_rate(steps: list[tuple[float, int]], per_minute: int, burst: int) -> None:
    now, granted = 0.0, 0
    buckets = Buckets(Rate(per_minute, burst), clock=lambda: now)
    for wait, cost in steps:
        now += wait
        if seconds := buckets.take("one", cost):
            now += seconds + 1e-6
            assert buckets.take("one", cost) == 0.0, "what it said is true"
        assert granted <= burst + now * per_minute / 60 + 1e-6
        granted += cost


def test_many_strangers_neither_fill_memory_nor_reset_a_bucket() -> None:
    now = 0.0
    buckets = Buckets(Rate(1, 2), most=50, clock=lambda: now)
    assert [buckets.take("known") > 0 for _ in range(3)] == [False, False, True]
    assert sum(buckets.take(f"stranger-{number}") == 0 for number in range(2000)) <= 100 and len(buckets) <= 50
    assert buckets.take("known") > 0
    now = 600.0
    assert buckets.take("known") == 0 and buckets.take("another") == 0
    assert network_of("2001:db8:1:2:3::4") == network_of("2001:db8:1:2::9") != network_of("2001:db8:1:3::4")
    assert network_of("::ffff:203.0.113.7") == network_of("203.0.113.7") == "203.0.113.7" != network_of("no address") == "unknown"
    assert [retry_after(seconds) for seconds in (0.01, 1.2, 1e9)] == ["1", "2", "86400"]


# Fetching


class Net(httpx2.AsyncBaseTransport):
    """A network of invented hosts: names to addresses, and what is answered; remembers every request that went out."""

    def __init__(self, *answers: httpx2.Response, addresses: Sequence[Sequence[str]] = ((PUBLIC,),)) -> None:
        self.answers, self.addresses, self.asked = list(answers), list(addresses), list[httpx2.Request]()

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        return self.addresses.pop(0) if len(self.addresses) > 1 else self.addresses[0]

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(request)
        return self.answers.pop(0)

    def fetch(self, url: str = "https://img.example/a.png", **limits: Any) -> ImageInput:
        fetcher = Fetcher(["img.example"], limits=FetchLimits(**limits), resolve=self.resolve, transport=self)
        return asyncio.run(fetcher.fetch(url))


def sent() -> httpx2.Response:
    return httpx2.Response(200, stream=httpx2.ByteStream(PNG))


def moved(to: str = "/b.png") -> httpx2.Response:
    return httpx2.Response(302, headers={"location": to})


def test_image_is_fetched_from_the_checked_address_under_its_name() -> None:
    net = Net(sent(), addresses=[[PUBLIC], ["127.0.0.1"]])  # the second look would lead inside
    assert net.fetch("https://img.example/a/b.png?x=1#part").load().size == (8, 6)
    (request,) = net.asked
    assert (request.url.host, request.url.raw_path) == (PUBLIC, b"/a/b.png?x=1") and request.headers["host"] == "img.example"
    assert request.extensions["sni_hostname"] == "img.example"
    assert Net(moved(), sent()).fetch().load().size == (8, 6)


CLOSED = (
    "127.0.0.1 127.8.9.1 0.0.0.0 10.1.2.3 100.64.0.1 169.254.169.254 172.31.255.1 192.168.1.1 192.0.0.192 198.18.0.1 224.0.0.1 "
    "239.255.255.250 240.0.0.1 255.255.255.255 168.63.129.16 100.100.100.200 192.0.2.1 203.0.113.9 ::1 :: ::ffff:127.0.0.1 "
    "::ffff:10.0.0.1 ::127.0.0.1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::1 fe80::1 fe80::1%eth0 fc00::1 fd00:ec2::254 "
    "ff02::1 2002:7f00:1::1 2001:0:7f00:1::1 2001:db8::1 fec0::1 3fff::1 100::1 2130706433 0x7f000001 0177.0.0.1 127.1 0x7f.1 "
    "localhost 2606:4700::1%1"
).split()


REFUSED_URLS = [
    *(
        "http://img.example/a.png https://img.example:8443/a https://IMG.example.evil.test/ https://img.example@evil.test/ "
        "https://evil.test@img.example/ https://img.example./a https://img.example%2eevil.test/ https://127.0.0.1/ "
        "https://2130706433/ https://0x7f000001/ https://0177.0.0.1/ https://127.1/ https://[::1]/ https://[::ffff:127.0.0.1]/ "
        "https://[64:ff9b::7f00:1]/ https://localhost/ file:///etc/passwd ftp://img.example/a gopher://img.example/ "
        "//img.example/a img.example/a data:,x https:img.example/a https:///img.example/ https://img.example:99999/ "
        "https://[img.example/ javascript:1 https://img.example\\@evil.test/ https://ｉmg.example/ "
        "https://evil.test/#@img.example/ https://evil.test?@img.example/"
    ).split(),
    "", "https://img.example/\r\nHost: evil", "https://img.example/ a", "https://img.example/" + "a" * 3000,
]  # fmt: skip


MOVED = "http://127.0.0.1/ https://evil.test/ //evil.test/ http://img.example/ https://[ file:///etc/passwd".split()
HERE = "https://img.example/a.png"
REFUSED_NETS = [  # a network, what is asked of it, what is told, and how many requests went out
    *((Net(addresses=[]), url, "image", 0) for url in REFUSED_URLS),
    *((Net(addresses=[[PUBLIC, address]]), HERE, "not public", 0) for address in CLOSED),  # one public address does not help
    *((Net(moved(to)), HERE, "redirects", 1) for to in MOVED),
    (Net(moved(), addresses=[[PUBLIC], ["10.0.0.1"]]), HERE, "not public", 1),
    (Net(moved(), moved(), moved()), HERE, "more than 2 times", 3),
]


def test_what_is_not_exactly_allowed_or_leads_inside_is_never_connected_to() -> None:
    for net, url, shown, asked in REFUSED_NETS:
        with pytest.raises(InputError, match=shown) as refusal:
            net.fetch(url)
        assert len(net.asked) == asked, url
        assert not any(address in str(refusal.value) for addresses in net.addresses for address in addresses)
    assert all(map(is_public, (PUBLIC, "2606:4700::1111", "64:ff9b::5db8:d70e", "::ffff:93.184.215.14")))
    for host in "127.0.0.1 2130706433 0x7f000001 10.0.0.0x1 *.b b/c [::1] ftp://b.c b.c:0 a@b.c b.c:70000 : ".split(" "):
        with pytest.raises(InputError):
            Fetcher([host])


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ANSWERS: list[tuple[bytes, str]] = [
    (b"HTTP/1.1 200 OK\r\ncontent-length: 15\r\n\r\n<html>no</html>", "not an image"),
    (b"HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n", "status 404"),
    (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 0\r\n\r\n", "packed"),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 999999999\r\n\r\n" + bytes(200_000), "more than 100000"),
    (CHUNKED + b"1000\r\n" + b"x" * 4096 + b"\r\n", "whole answer"),
    (CHUNKED + (b"1000\r\n" + b"x" * 4096 + b"\r\n") * 40, "more than 100000"),
    (b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, "whole answer"),
    (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000, "whole answer"),
    (b"SSH-2.0-door\r\n\r\n", "whole answer"),
    (b"", "whole answer"),
    (b"never", "within 0.3 seconds"),
]


def test_answer_that_is_no_image_of_bounded_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def loopback(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.1"]

    async def work(sent: bytes, message: str) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            if sent != b"never":
                writer.write(sent)
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        host = f"img.example:{server.sockets[0].getsockname()[1]}"
        limits = FetchLimits(file_bytes=100_000, seconds=0.3 if sent == b"never" else 15)
        with pytest.raises(InputError, match=message):
            await Fetcher([f"http://{host}"], limits=limits, resolve=loopback).fetch(f"http://{host}/a.png")
        server.close()

    monkeypatch.setattr(ssl, "create_default_context", lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    monkeypatch.setattr(fetch, "is_public", lambda address: True)
    for sent, message in ANSWERS:
        asyncio.run(work(sent, message))


# Images from requests

BIG = bytes(range(256)) * 3000
NO_IMAGE: list[object] = [
    None, "x", 5, [], {}, {"data": "x", "item": "y"}, {"path": "/etc/passwd"}, {"url": "https://img.example/a"}, {"item": "a"},
    *({"data": text} for text in ("", "%%%", "ä", "data:image/png,abc", "data:text/html;base64,AAAA", "/etc/passwd", "A",
      "AA====AA", "\ud800", 5, None, ["x"], base64.b64encode(BIG).decode()[:-3], base64.b64encode(bytes(196_607)).decode() * 2)),
]  # fmt: skip


def take(content: object, limits: ImageLimits = LIMITS) -> ImageInput:
    return asyncio.run(UploadValidator(limits).take(content, "image", Sources()))


def test_image_comes_as_base64_or_data_url_within_limits() -> None:
    for form in ("{}", "data:image/png;base64,{}", "DATA:;name=a.png;base64,{}", "\n{}\r\n"):
        image = take({"data": form.replace("{}", base64.b64encode(PNG).decode())})
        assert image == ImageInput.from_bytes(PNG) and image.path is None and image.name == ""
    for text in (base64.b64encode(BIG), base64.urlsafe_b64encode(BIG).rstrip(b"="), base64.encodebytes(BIG)):
        assert bytes_of_base64(text.decode(), "image") == BIG
    for content in NO_IMAGE:
        with pytest.raises(InputError):
            take(content)
    small = ImageLimits(pixels=1000, file_bytes=10_000)
    floats = tiff(2829, 2829, bytes(9), packed=True, tags={258: (SHORT, (32,)), 339: (SHORT, (3,))})
    for raw, shown, limits in (
        (bytes(15_000), "characters of base64", small),
        (bytes(10_001), "has 10001 bytes", small),
        (encoded(size=(100, 100)), "more than the limit of 1000", small),
        (floats, "2829 x 2829 pixels at a time, .* more than the limit of 8000000", LIMITS),
    ):
        with pytest.raises(InputError, match=shown):
            take({"data": base64.b64encode(raw).decode()}, limits)


def test_files_are_read_in_their_folders_only_and_shown_whatever_their_names(tmp_path: Path) -> None:
    outside, inside = tmp_path / "secret.png", tmp_path / "images"
    inside.mkdir()
    outside.write_bytes(PNG)
    (inside / "link.png").symlink_to(outside)
    (inside / "cup.png").write_bytes(PNG)
    assert image_in_folders("cup.png", [inside], "1").path == image_in_folders(str(inside / "cup.png"), [inside], "1").path
    paths = "../secret.png link.png . a\0.png /etc/passwd cup.png/../../secret.png /proc/self/environ".split(" ")
    for path in (*paths, "", "x" * 5000, str(outside), str(inside / ".." / "secret.png")):
        with pytest.raises(InputError) as refusal:
            image_in_folders(path, [inside], "1")
        assert str(tmp_path) not in str(refusal.value)
    several = encoded("MPO", save_all=True, append_images=[Image.new("RGB", (8, 6))])
    for raw, suffix in ((several, ".jpg"), (several + b"video\xff\xda", ".jpg"), (PNG, ".png")):
        kept = ImageFolder(tmp_path / "store").keep(take({"data": base64.b64encode(raw).decode()}), "1").path
        assert kept is not None and kept.suffix == suffix and kept.read_bytes() == raw
        for name in (kept.name, "IMG_0001", "a.JPG_large", "b.mpo", "c.jfif"):
            (inside / name).write_bytes(raw)
            assert Image.open(BytesIO(as_jpeg(image_in_folders(name, [inside], "1"), 64))).format == "JPEG"


# Bodies

REFUSED_JSON = [
    b"", b"{", b"[1,]", b"NaN", b"[Infinity]", b"[-Infinity]", b"1e999", b'{"a":1,"a":2}', b'"\xff"', b"\xef\xbb\xbf{}",
    b'"\\ud800"', b'{"\\udfff": 1}', b"[" * 100_000, b'{"a":' * 50_000, b"[" * 33 + b"]" * 33, b"[" + b"1," * 300_000 + b"1]",
    '{"a":1}'.encode("utf-16"), b"{} {}", b'"' + b'\\"' * 500_000, b'"a" ' * 300_000, b"'a'", b"\\" * 100_000, b"9" * 41,
    b'"\x00"',
    b'["' + b'","' * 200_000 + b'"]',
]  # fmt: skip
LEAF = st.none() | st.booleans() | st.integers(-(10**38), 10**38) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
JSON = st.recursive(LEAF, lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(), part, max_size=4), max_leaves=9)


def test_what_is_not_strict_json_is_refused() -> None:
    for raw in REFUSED_JSON:
        with pytest.raises(InputError):
            parse_json(raw)
    assert parse_json(b'["' + b"[" * 1000 + b'\\"]"]') == ["[" * 1000 + '"]'], "brackets in texts do not count"
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH) is not None
    for value in (["a"] * 190_000, ['"' * 30_000] * 10, ["\\"] * 9000):
        assert parse_json(json.dumps(value).encode()) == value
    mixed = {"ä\U0001f600": [None, True, -(10**38), 1.5e-7, {"": [[]]}]}
    assert all(parse_json(json.dumps(mixed, ensure_ascii=ascii_only).encode()) == mixed for ascii_only in (True, False))


@pytest.mark.slow
@given(JSON, st.booleans(), st.binary(max_size=40) | st.text(alphabet='[]{}",:\\u0d8ef19-+.eNa ', max_size=60).map(str.encode))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_json_is_read_as_it_was_written_or_refused(value: Any, ascii_only: bool, raw: bytes) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value
    with contextlib.suppress(InputError):
        read = parse_json(raw)
        assert read == json.loads(raw)


# The middleware, by ASGI


Asgi = Callable[[Message, Receive, Send], Awaitable[None]]
HOST = (b"host", b"127.0.0.1:8080")
KIND = (b"content-type", b"application/json")
TWO = (b"content-length", b"2")
CHUNKS = (b"transfer-encoding", b"chunked")


async def echo(scope: Message, receive: Receive, send: Send) -> None:
    """Reads the body and tells its length; puts a Server header into its answer. `/page` is HTML."""
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client went away")
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    kind = b"text/html; charset=utf-8" if scope["path"] == "/page" else b"application/json"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"server", b"secret/1.0"), (b"content-type", kind)]})
    await send({"type": "http.response.body", "body": json.dumps({"size": size}).encode()})


async def drive(app: Asgi, scope: Message, chunks: Sequence[bytes | None] = ()) -> list[Message]:
    """What an application sends; a chunk None of a body never comes."""
    waiting, sent = list(chunks), list[Message]()

    async def receive() -> Message:
        if not waiting or waiting[0] is None:
            await asyncio.sleep(30)
        chunk = waiting.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(waiting)}

    async def send(message: Message) -> None:
        sent.append(message)

    async with asyncio.timeout(10):
        await app(scope, receive, send)
    return sent


def ask(
    app: Asgi,
    method: str = "GET",
    path: str = "/items",
    headers: Sequence[tuple[bytes, bytes]] = (HOST,),
    chunks: Sequence[bytes | None] = (b"",),
    client: str = "198.51.100.7",
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of one request."""
    scope: Message = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "http_version": "1.1",
        "headers": list(headers), "client": (client, 5),
    }  # fmt: skip
    start, body = asyncio.run(drive(app, scope, chunks))
    assert (start["type"], body["type"]) == ("http.response.start", "http.response.body")
    return (
        start["status"],
        {name.decode(): value.decode() for name, value in start["headers"]},
        json.loads(body["body"] or b"null"),
    )


def bearer(secret: str) -> tuple[bytes, bytes]:
    return (b"authorization", f"Bearer {secret}".encode())


def post(app: Asgi, *more: tuple[bytes, bytes], chunks: Sequence[bytes | None] = (b"{}",)) -> tuple[int, dict[str, str], Any]:
    size = str(sum(len(chunk) for chunk in chunks if chunk)).encode()
    return ask(app, "POST", "/search", [HOST, KIND, (b"content-length", size), *more], chunks)


APP, EVIL = (b"origin", b"https://app.example"), (b"origin", b"https://app.example.evil.test")
LOCAL, OPENED, ONE_PORT, PUBLIC_ONE = (
    SecurityMiddleware(echo, AccessRules.of(address, **options))
    for address, options in (
        ("127.0.0.1", {}), ("127.0.0.1", {"origins": ["https://app.example/"]}), ("127.0.0.1", {"port": 8080}),
        ("0.0.0.0", {"hosts": ["search.example"]}),
    )
)  # fmt: skip
PREFLIGHT = [HOST, APP, (b"access-control-request-method", b"POST")]
WRONG_HOSTS = b"evil.test 127.0.0.1.evil.test localhost.evil.test:8080 127.1 0.0.0.0 [::]".split()
HOSTS: list[tuple[Asgi, bytes, int, str]] = [
    *((LOCAL, host, 200, "") for host in (b"127.0.0.1:9", b"LOCALHOST", b"[::1]:8080")),
    *((app, host, 421, "wrong_host") for app in (LOCAL, PUBLIC_ONE) for host in WRONG_HOSTS),
    (PUBLIC_ONE, b"search.example:443", 200, ""), (ONE_PORT, HOST[1], 200, ""), (ONE_PORT, b"127.0.0.1:8081", 421, "wrong_host"),
    (ONE_PORT, b"127.0.0.1", 421, "wrong_host"), (LOCAL, b"a b", 400, "bad_host"), (LOCAL, b"", 400, "bad_host"),
]  # fmt: skip
READS: list[tuple[Asgi, str, str, list[tuple[bytes, bytes]], int, str]] = [
    (LOCAL, "GET", "/items", [], 400, "bad_host"),
    (LOCAL, "GET", "/health", [(b"host", b"10.0.0.1")], 200, ""),
    (LOCAL, "GET", "/" + "a" * 9000, [HOST], 414, "path_too_long"),
    (LOCAL, "TRACE", "/items", [HOST], 405, "bad_method"),
    (LOCAL, "OPTIONS", "/items", [HOST], 405, "bad_method"),
    (LOCAL, "OPTIONS", "/health", [HOST], 204, ""),
    (LOCAL, "OPTIONS", "/items", PREFLIGHT, 403, "wrong_origin"),
    (OPENED, "OPTIONS", "/items", PREFLIGHT, 204, ""),
]
POSTS: list[tuple[Asgi, list[tuple[bytes, bytes]], int, str]] = [
    *((LOCAL, [KIND, TWO, (b"origin", o)], 403, "wrong_origin") for o in (APP[1], b"null", b"http://127.0.0.1:9", b"http://[")),
    (OPENED, [KIND, TWO, EVIL], 403, "wrong_origin"),
    *((LOCAL, [KIND, TWO, *more], 200, "") for more in ([], [(b"origin", b"http://127.0.0.1:8080")])),
    (OPENED, [KIND, TWO, APP], 200, ""),
    *((LOCAL, headers, 431, "headers_too_large") for headers in ([(b"x", b"y")] * 200, [(b"x", b"y" * 40_000)])),
    *((LOCAL, headers, 400, "bad_header") for headers in ([HOST], [bearer("a"), bearer("b")], [KIND, TWO, CHUNKS])),
    (LOCAL, [KIND, TWO, (b"content-encoding", b"gzip")], 415, "packed_body"),
    *((LOCAL, headers, 415, "wrong_content_type") for headers in ([(b"content-type", b"text/plain"), TWO], [TWO], [CHUNKS])),
]
REQUESTS = [
    *((app, "GET", "/items", [(b"host", host)], status, code) for app, host, status, code in HOSTS),
    *READS,
    *((app, "POST", "/search", [HOST, *headers], status, code) for app, headers, status, code in POSTS),
]


@pytest.mark.parametrize(("app", "method", "path", "headers", "status", "code"), REQUESTS)
def test_requests_are_let_in_as_they_should_and_every_answer_is_headed(
    app: Asgi, method: str, path: str, headers: list[tuple[bytes, bytes]], status: int, code: str
) -> None:
    got, answered, answer = ask(app, method, path, headers, [b"{}"])
    assert got == status and (not code or (answer["error"]["code"] == code and len(answer["error"]) == 4))
    assert "server" not in answered and (answered["cache-control"], answered["x-frame-options"]) == ("no-store", "DENY")
    assert len(answered["x-request-id"]) == 24 and "sandbox" in answered["content-security-policy"]
    shared = "https://app.example" if app is OPENED and APP in headers else None
    assert answered.get("access-control-allow-origin") == shared and "access-control-allow-credentials" not in answered


def test_pages_let_nothing_in_from_elsewhere_and_websockets_are_closed() -> None:
    policy = ask(LOCAL, path="/page")[1]["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy and "http" not in policy
    for origin in ("*", "null", "app.example", "https://app.example/path", "https://*.example"):
        with pytest.raises(InputError):
            AccessRules.of("127.0.0.1", origins=[origin])
    assert asyncio.run(drive(LOCAL, {"type": "websocket", "headers": []}, [b""]))[0]["type"] == "websocket.close"


def test_body_is_bounded_however_it_comes_and_faults_are_not_hidden() -> None:
    app = SecurityMiddleware(BodyMiddleware(echo, most=100, seconds=0.05), AccessRules())
    chunked = [HOST, KIND, CHUNKS]
    assert post(app, chunks=[b"x" * 100])[2] == {"size": 100}
    for status, headers, answer in (post(app, chunks=[b"x" * 101]), ask(app, "POST", "/search", chunked, [b"x" * 30] * 10)):
        assert status == 413 and headers["connection"] == "close" and answer["error"]["code"] == "body_too_large"
    assert ask(app, "POST", "/search", chunked, [b"x", None])[0] == 408

    async def broken(scope: Message, receive: Receive, send: Send) -> None:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError):
        post(BodyMiddleware(broken))


@pytest.fixture
def ring(tmp_path: Path) -> tuple[KeyRing, str, str]:
    path = tmp_path / "keys.json"
    reads = make_key(path, "reader", tenant="acme", requests_per_minute=3)
    writes = make_key(path, "writer", scopes=["read", "write"])
    return KeyRing(path), reads, writes


def test_a_key_is_asked_for_before_the_body_is_touched(ring: tuple[KeyRing, str, str]) -> None:
    keys, reads, writes = ring
    app = SecurityMiddleware(KeyMiddleware(echo, keys, Limits()), AccessRules())
    status, headers, error = post(app, chunks=[None])  # the body never comes, and nobody waits for it
    assert status == 401 and headers["www-authenticate"].startswith("Bearer") and error["error"]["type"] == "authentication_error"
    assert post(app, bearer(reads))[0] == post(app, bearer(writes))[0] == 200
    for method, path in (("POST", "/items"), ("DELETE", "/items/a"), ("POST", "/nowhere"), ("PUT", "/search")):
        assert ask(app, method, path, [HOST, bearer(reads)])[0] in (403, 429)
        assert ask(app, method, path, [HOST, bearer(writes)])[0] == 200
    for path in ("/", "/health", "/ready", "/static/page.js"):
        assert ask(app, path=path)[0] == 200
    for path in ("/metrics", "/items", "/page/config", "/v1/models", "/Health", "/staticx", "//", "/health/../items"):
        assert ask(app, path=path)[0] in (401, 429)
    assert ask(KeyMiddleware(echo, None, Limits()), "DELETE", "/items/a")[0] == 200, "without keys everyone is anyone"
    assert scope_needed("POST", "/items") == "write" and scope_needed("POST", "/search/stream") == "read"


def test_limits_slow_down_one_key_and_strangers_but_no_neighbour(ring: tuple[KeyRing, str, str]) -> None:
    keys, reads, writes = ring
    app = KeyMiddleware(echo, keys, Limits(failures=Rate(1, 5)))
    assert [ask(app, headers=[bearer(reads)])[0] for _ in range(4)] == [200, 200, 200, 429]
    assert int(ask(app, headers=[bearer(reads)])[1]["retry-after"]) >= 1
    assert [ask(app)[0] for _ in range(7)] == [401] * 5 + [429] * 2
    assert ask(app, headers=[bearer(writes)])[0] == 200, "the same address, a good key"
    assert ask(app, client="198.51.100.8")[0] == 401
    limits, bulk = Limits(inputs=Rate(60, 10)), Principal("bulk", ("write",))
    assert limits.take_inputs(bulk, 500) == 0.0 and 480 < limits.take_inputs(bulk, 1) <= 500, "paid for afterwards"


# Tenants


def opened(folder: Path) -> SqliteIndex:
    return open_index(folder, fingerprint="m1", prompt_version="p1", dim=4, create=True)


TENANTS = (None, "acme", "acme-b", "b")
IDS = ("a", "b", "acme:a", "_tenant:acme:a", "_tenant:b:a", ":a", "../acme/a", "_tenant", "\x1f")
FILTERS: tuple[Filter | None, ...] = (
    None, Eq("n", 1), Eq("id", "a"), Eq("id", "_tenant:acme:a"), In("id", ("a", "_tenant:b:a")), Range("id", low="a"),
    Range("id", high="b"), Range("id", low="_tenant:acme:", high="_tenant:acme:~"), And(()), And((Eq("n", 2), In("id", IDS))),
    Eq("modality", "text"), In("n", ()), Eq("id", 1), Range("id", low=1), Eq("n", None),
)  # fmt: skip
STEPS = st.lists(
    st.tuples(
        st.sampled_from(TENANTS), st.sampled_from(["upsert", "delete", "delete where"]), st.sampled_from(IDS), st.integers(1, 3),
        st.sampled_from(FILTERS),
    ),
    min_size=6, max_size=14,
)  # fmt: skip


def compare_with_indexes_of_their_own(folder: Path, steps: Any) -> None:
    """Carries out the steps by every tenant's view of one index and in an index of its own: both say the same."""
    with contextlib.ExitStack() as stack:
        shared = stack.enter_context(opened(folder / "shared"))
        pairs = {who: (TenantIndex(shared, who), stack.enter_context(opened(folder / f"of-{who}"))) for who in TENANTS}
        for tenant, action, id, n, where in steps:
            view, alone = pairs[tenant]
            if action == "upsert":
                item, vectors = Item.of(text=f"{tenant} {id} {n}", id=id, fields={"n": n}), vector_of(f"{id} {n}", 4)[None]
                if tenant is None and id.startswith(PREFIX):
                    with pytest.raises(InputError):
                        view.upsert([item], vectors)
                else:
                    assert view.upsert([item], vectors) == alone.upsert([item], vectors)
            else:
                which = [id] if action == "delete" else where or And(())
                assert view.delete(which) == alone.delete(which)
        query = vector_of("query", 4)[None]
        for view, alone in pairs.values():
            assert view.get(IDS) == alone.get(IDS) and dict(view.info().counts) == alone.info().counts
            for where in FILTERS:
                assert list(view.scan(where)) == list(alone.scan(where)) and view.count(where) == alone.count(where)
                assert view.search(query, 5, where=where) == alone.search(query, 5, where=where)
                assert view.facets(where, limit=3) == alone.facets(where, limit=3)
            for where in (
                "not n=1",
                "id~'*' or n=2",
                "not id~'_tenant*'",
                "not (n is missing) and not id>'m'",
                Not(In("id", IDS[:2])),
            ):
                found = list(alone.scan(where))
                assert list(view.scan(where)) == found and view.count(where) == len(found)
                for sort in ("n", "-n", "-id", "modality"):
                    shown = alone.browse(where, sort=sort, limit=9)
                    assert view.browse(where, sort=sort, limit=9) == shown
                    after = position_of(shown[0], sort) if shown else None
                    assert view.browse(where, sort=sort, after=after, limit=9) == alone.browse(
                        where, sort=sort, after=after, limit=9
                    )
                words = "1 2 3 acme rival none tenant"
                hits = [hit.id for hit in view.search_keywords(words, 20, where=where)]
                assert sorted(hits) == sorted(hit.id for hit in alone.search_keywords(words, 20, where=where))


def test_each_tenant_sees_what_it_would_see_in_an_index_of_its_own(tmp_path: Path) -> None:
    put = [(tenant, "upsert", id, n, None) for tenant in TENANTS for n, id in enumerate(("a", "acme:a", "_tenant", "../acme/a"))]
    forged = [(tenant, "upsert", "_tenant:acme:a", 2, None) for tenant in (None, "b")]
    gone = [("acme", "delete", "a", 1, None), ("b", "delete where", "a", 1, Eq("n", 1)), (None, "delete", "_tenant:b:a", 1, None)]
    compare_with_indexes_of_their_own(tmp_path, put + forged + gone)


@pytest.mark.slow
@given(STEPS)
@settings(max_examples=12, deadline=None)
def test_tenants_stay_apart_whatever_they_do(tmp_path_factory: pytest.TempPathFactory, steps: Any) -> None:
    compare_with_indexes_of_their_own(tmp_path_factory.mktemp("tenants"), steps)


def test_words_of_one_tenant_tell_nothing_of_those_of_another(tmp_path: Path) -> None:
    """BM25 goes by how rare a word is: here by the tenant's own items."""
    vectors = np.stack([vector_of(str(n), 4) for n in range(100)])
    with opened(tmp_path / "shared") as shared, opened(tmp_path / "alone") as alone:
        views = {name: TenantIndex(shared, name) for name in ("acme", "rival", None)}
        own = [
            Item.of(text=f"{'plan' if n % 3 else 'plot'} of {n} cups", id=f"i{n}", fields={"name": f"cup {n}"}) for n in range(12)
        ]
        for index in (views["acme"], alone):
            index.upsert(own, vectors[:12])
        found = [views["acme"].search_keywords(asked, 20) for asked in ("plan plot", '"plan of"', "plot -9")]
        for hits, asked in zip(found, ("plan plot", '"plan of"', "plot -9"), strict=True):
            wanted = alone.search_keywords(asked, 20)
            assert [(hit.id, hit.rank) for hit in hits] == [(hit.id, hit.rank) for hit in wanted] != []
            if "-" not in asked:  # which FTS5 counts before it leaves items out
                assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in wanted], rel=0.02)
        views["rival"].upsert([Item.of(text="plot " * 5, id=f"r{n}") for n in range(100)], vectors)
        assert [views["acme"].search_keywords(asked, 20) for asked in ("plan plot", '"plan of"', "plot -9")] == found
        assert views[None].search_keywords("plot", 20) == [] and len(views["rival"].search_keywords("plot", 3)) == 3
        shared.keep_note("roots", "/home/of/rival")
        assert views["acme"].note("roots") is None
        with pytest.raises(InputError, match="of the whole index"):
            views["acme"].keep_note("roots", "x")


def test_client_can_neither_set_nor_ask_for_the_tenant(tmp_path: Path) -> None:
    vector = vector_of("x", 4)[None]
    with opened(tmp_path) as index:
        acme, rival, nobody = TenantIndex(index, "acme"), TenantIndex(index, "rival"), TenantIndex(index, None)
        acme.upsert([Item.of(text="a plan", id="plan", fields={"n": 1})], vector)
        for view in (acme, rival, nobody):
            with pytest.raises(InputError, match=FIELD):
                view.upsert([Item.of(text="x", id="x", fields={FIELD: "acme"})], vector)
            for where in (
                Eq(FIELD, "acme"),
                And((And((In(FIELD, ("acme", None)),)),)),
                Range(FIELD, low=""),
                Not(Or((Glob(FIELD, "*"),))),
            ):
                for work in (lambda: view.search(vector, 5, where=where), lambda: view.delete(where)):  # noqa: B023  # called at once
                    with pytest.raises(InputError, match=FIELD):
                        work()
            for refused in (
                partial(view.count, f"n=1 or not {FIELD}=acme"),
                partial(view.browse, sort=f"-{FIELD}", limit=1),
                partial(view.search_keywords, "plan", 3, where="_file is missing"),
            ):
                with pytest.raises(InputError, match=r"_tenant|_file"):
                    refused()
        assert dict(acme.get(["plan"])["plan"].fields) == {"n": 1}
        assert rival.get(["plan", "_tenant:acme:plan"]) == nobody.get(["plan", "_tenant:acme:plan"]) == {}
        with pytest.raises(InputError, match="more than"):
            acme.upsert([Item.of(text="x", id="x" * 1024)], vector)
        rival.upsert([Item.of(text="rival", id="plan")], vector)

        class Leaky:
            """The same index, which ignores filters."""

            def __getattr__(self, name: str) -> Any:
                return getattr(index, name)

            def search(self, vectors: Any, k: int, **options: Any) -> Any:
                return index.search(vectors, k)

            def scan(self, where: Any, **options: Any) -> Any:
                return index.scan()

        leaky = TenantIndex(cast(Any, Leaky()), "acme")
        assert [(hit.text, hit.rank) for hit in leaky.search(vector, 5)[0]] == [("a plan", 1)]
        assert [stored.text for stored in leaky.scan()] == ["a plan"] and TenantIndex(cast(Any, Leaky()), None).search(
            vector, 5
        ) == [[]]
    for name in ("", "A", "a:b", "a/b", "a" * 64, "-a", "a\n"):
        with pytest.raises(InputError):
            TenantIndex(index, name)
