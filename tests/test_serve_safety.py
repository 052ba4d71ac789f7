"""The safe-guards of the server: keys, limits, fetching, pictures from requests, the wall, the gate, tenants, the audit log."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import ipaddress
import json
import os
import stat
import struct
import threading
import zlib
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import pytest
from fakes import vector_of
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from pydantic import BaseModel
from tiffs import LONG, SHORT, tiff

from traceir.errors import InputError, StoreError
from traceir.image_formats import MAX_SCANS
from traceir.images import ImageInput, ImageLimits
from traceir.index import And, Eq, Filter, In, Range, SqliteIndex, open_index
from traceir.items import Item, Query
from traceir.serve.audit import AuditLog
from traceir.serve.bodies import MAX_DEPTH, BodyGuard, parse_json
from traceir.serve.fetch import Fetcher, FetchLimits, is_public
from traceir.serve.gate import KeyGate, Limits, scope_needed
from traceir.serve.guard import Guard, Message, Receive, Send, Wall
from traceir.serve.image_store import ImageFolder, as_jpeg
from traceir.serve.keys import KeyRing, Principal, Refusal, list_keys, make_key, revoke_key
from traceir.serve.limits import Buckets, Rate, network_of, retry_after
from traceir.serve.strict import StrictRoute
from traceir.serve.tenants import FIELD, PREFIX, TenantIndex
from traceir.serve.uploads import Intake, Sources, bytes_of_base64, image_in_folders

PUBLIC = "93.184.215.14"


def png(size: tuple[int, int] = (8, 6)) -> bytes:
    out = BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(out, "PNG")
    return out.getvalue()


# Keys


def test_key_is_shown_once_and_stored_as_a_hash(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret = make_key(path, "page", scopes=["read", "write"], tenant="acme", requests_per_minute=90)
    assert secret.startswith("tir_") and len(base64.urlsafe_b64decode(secret[4:] + "=")) == 32
    assert secret[4:] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert KeyRing(path).check(f"Bearer {secret}") == Principal("page", ("read", "write"), "acme", 90)
    assert [key.name for key in list_keys(path)] == ["page"]


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer tir_",
        "tir_{}",
        "Basic {}",
        "Bearer {}x",
        "Bearer x{}",
        "Bearer {} {}",
        "Bearer tir_" + "A" * 43,
    ],
)
def test_header_that_holds_no_known_key_is_refused(tmp_path: Path, header: str | None) -> None:
    secret = make_key(tmp_path / "keys.json", "page")
    found = KeyRing(tmp_path / "keys.json").check(header and header.replace("{}", secret))
    assert isinstance(found, Refusal) and found.status == 401 and secret not in found.message


def test_every_hash_is_compared_in_constant_time_whichever_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = [make_key(tmp_path / "keys.json", f"key-{number}") for number in range(5)]
    ring = KeyRing(tmp_path / "keys.json")
    compared: list[str] = []
    whole = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or whole(a, b))
    for secret in (secrets[0], secrets[4], "tir_" + "A" * 43):
        compared.clear()
        ring.check(f"Bearer {secret}")
        assert len(compared) == 5


def test_running_server_sees_new_and_revoked_keys_and_lets_nobody_in_on_damage(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first = make_key(path, "first")
    ring = KeyRing(path)
    second = make_key(path, "second")
    assert isinstance(ring.check(f"Bearer {second}"), Principal)
    revoke_key(path, "first")
    assert isinstance(ring.check(f"Bearer {first}"), Refusal)
    whole = path.read_text()
    path.write_text(whole[:-5])
    found = ring.check(f"Bearer {second}")
    assert isinstance(found, Refusal) and found.status == 503
    path.write_text(whole)
    assert isinstance(ring.check(f"Bearer {second}"), Principal)
    path.unlink()
    assert isinstance(ring.check(f"Bearer {second}"), Refusal)


def test_key_expires(tmp_path: Path) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    secret = make_key(tmp_path / "keys.json", "guest", days=2, now=lambda: start)
    early = KeyRing(tmp_path / "keys.json", now=lambda: start + timedelta(days=2, seconds=-1))
    late = KeyRing(tmp_path / "keys.json", now=lambda: start + timedelta(days=2))
    assert isinstance(early.check(f"Bearer {secret}"), Principal)
    found = late.check(f"Bearer {secret}")
    assert isinstance(found, Refusal) and found.code == "expired_key"


def test_keys_made_at_once_are_all_there(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: make_key(tmp_path / "keys.json", f"key-{number}"), range(16)))
    assert len(list_keys(tmp_path / "keys.json")) == 16


@pytest.mark.parametrize(
    "options",
    [{"name": ""}, {"name": "a\nb"}, {"scopes": []}, {"scopes": ["admin"]}, {"scopes": ["read", "read"]}, {"days": 0},
     {"requests_per_minute": 0}, {"tenant": "A/../b"}, {"tenant": ""}],
)  # fmt: skip
def test_unusable_key_is_refused_and_nothing_written(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        make_key(tmp_path / "keys.json", **{"name": "page", **options})
    assert not (tmp_path / "keys.json").exists()


@pytest.mark.parametrize(
    "change", [{"scopes": ["root"]}, {"sha256": "x"}, {"expires": "2030-01-01T00:00:00"}, {"tenant": "../a"}, {"name": 5}]
)
def test_edited_file_with_an_unusable_key_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "keys.json"
    make_key(path, "page")
    told = json.loads(path.read_text())
    told["keys"][0] |= change
    path.write_text(json.dumps(told))
    with pytest.raises(StoreError, match="damaged"):
        list_keys(path)


def test_keys_file_that_others_can_write_is_refused(tmp_path: Path) -> None:
    make_key(tmp_path / "keys.json", "page")
    (tmp_path / "keys.json").chmod(0o620)
    with pytest.raises(StoreError, match="chmod 600"):
        KeyRing(tmp_path / "keys.json")


# Limits


@given(
    st.lists(st.tuples(st.floats(0, 5, allow_subnormal=False), st.integers(1, 30)), min_size=1, max_size=60),
    st.integers(1, 600),
    st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_bucket_never_grants_more_than_burst_and_rate(steps: list[tuple[float, int]], per_minute: int, burst: int) -> None:
    now = 0.0
    buckets = Buckets(Rate(per_minute, burst), clock=lambda: now)
    granted: list[int] = []
    for wait, cost in steps:
        now += wait
        seconds = buckets.take("one", cost)
        if seconds == 0.0:
            granted.append(cost)
        else:
            now += seconds + 1e-6
            assert buckets.take("one", cost) == 0.0  # what it said is true
            granted.append(cost)
        assert sum(granted[:-1]) <= burst + now * per_minute / 60 + 1e-6


def test_many_strangers_neither_fill_memory_nor_reset_a_bucket() -> None:
    now = 0.0
    buckets = Buckets(Rate(1, 2), most=50, clock=lambda: now)
    assert [buckets.take("known") > 0 for _ in range(3)] == [False, False, True]
    granted = sum(buckets.take(f"stranger-{number}") == 0 for number in range(10_000))
    assert len(buckets) <= 50 and granted <= 100
    assert buckets.take("known") > 0
    now = 600.0
    assert buckets.take("known") == 0 and buckets.take("another") == 0


def test_senders_and_waits_are_told_plainly() -> None:
    assert network_of("2001:db8:1:2:3::4") == network_of("2001:db8:1:2::9") != network_of("2001:db8:1:3::4")
    assert network_of("::ffff:203.0.113.7") == network_of("203.0.113.7") == "203.0.113.7"
    assert network_of("no address") == "unknown"
    assert [retry_after(seconds) for seconds in (0.01, 1.2, 1e9)] == ["1", "2", "86400"]


# Fetching


class Net:
    """A network of invented hosts: names to addresses, and what a connection answers; remembers every connection."""

    def __init__(self, answer: bytes | Sequence[bytes], *addresses: Sequence[str]) -> None:
        self.answers = [answer] if isinstance(answer, bytes) else list(answer)
        self.addresses = [list(one) for one in addresses] or [[PUBLIC]]
        self.connected: list[tuple[str, int, str | None]] = []
        self.sent: list[bytes] = []

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        return self.addresses.pop(0) if len(self.addresses) > 1 else self.addresses[0]

    async def connect(self, address: str, port: int, name: str | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        self.connected.append((address, port, name))
        reader = asyncio.StreamReader()
        reader.feed_data(self.answers.pop(0))
        reader.feed_eof()
        return reader, cast(asyncio.StreamWriter, _Writer(self.sent))

    def fetcher(self, *hosts: str, **limits: Any) -> Fetcher:
        return Fetcher(hosts or ["img.example"], limits=FetchLimits(**limits), resolve=self.resolve, connect=self.connect)


class _Writer:
    def __init__(self, sent: list[bytes]) -> None:
        self.write = sent.append

    async def drain(self) -> None: ...

    def close(self) -> None: ...


def answer(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    told = {"content-length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    return b"HTTP/1.1 " + status.encode() + b"\r\n" + b"".join(f"{n}: {v}\r\n".encode() for n, v in told.items()) + b"\r\n" + body


def test_image_is_fetched_from_the_checked_address_under_its_name() -> None:
    net = Net(answer(png()), [PUBLIC], ["127.0.0.1"])  # the second look would lead inside
    picture = asyncio.run(net.fetcher().fetch("https://img.example/a/b.png?x=1#part"))
    assert picture.load().size == (8, 6)
    assert net.connected == [(PUBLIC, 443, "img.example")]
    assert net.sent[0].startswith(b"GET /a/b.png?x=1 HTTP/1.1\r\nHost: img.example\r\n")


CLOSED = (
    "127.0.0.1 127.8.9.1 0.0.0.0 10.1.2.3 100.64.0.1 169.254.169.254 172.31.255.1 192.168.1.1 192.0.0.192 198.18.0.1 224.0.0.1 "
    "239.255.255.250 240.0.0.1 255.255.255.255 168.63.129.16 100.100.100.200 192.0.2.1 203.0.113.9 ::1 :: ::ffff:127.0.0.1 "
    "::ffff:10.0.0.1 ::127.0.0.1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::1 fe80::1 fe80::1%eth0 fc00::1 fd00:ec2::254 "
    "ff02::1 2002:7f00:1::1 2001:0:7f00:1::1 2001:db8::1 fec0::1 3fff::1 100::1 2130706433 0x7f000001 0177.0.0.1 127.1 0x7f.1 "
    "localhost 2606:4700::1%1"
).split()


@pytest.mark.parametrize("address", CLOSED)
def test_host_that_resolves_inside_is_never_connected_to(address: str) -> None:
    assert not is_public(address)
    net = Net(answer(png()), [PUBLIC, address])  # one public address beside it does not help
    with pytest.raises(InputError, match="not public") as told:
        asyncio.run(net.fetcher().fetch("https://img.example/a.png"))
    assert net.connected == [] and address not in str(told.value)


@given(st.ip_addresses(v=4))
def test_ipv4_inside_ipv6_is_judged_as_itself(address: ipaddress.IPv4Address) -> None:
    inner = is_public(str(address))
    assert is_public(f"::ffff:{address}") == is_public(str(ipaddress.IPv6Address((0x64FF9B << 96) | int(address)))) == inner
    assert not inner or (address.is_global and not address.is_multicast)


@pytest.mark.parametrize("address", [PUBLIC, "2606:4700::1111", "64:ff9b::5db8:d70e", "::ffff:93.184.215.14"])
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


REFUSED_URLS = [
    *(
        "http://img.example/a.png https://img.example:8443/a https://IMG.example.evil.test/ https://img.example@evil.test/ "
        "https://evil.test@img.example/ https://img.example./a https://img.example%2eevil.test/ https://127.0.0.1/ "
        "https://2130706433/ "
        "https://0x7f000001/ https://0177.0.0.1/ https://127.1/ https://[::1]/ https://[::ffff:127.0.0.1]/ "
        "https://[64:ff9b::7f00:1]/ "
        "https://localhost/ file:///etc/passwd ftp://img.example/a gopher://img.example/ //img.example/a img.example/a data:,x "
        "https:img.example/a https:///img.example/ https://img.example:99999/ https://[img.example/ javascript:1 "
        "https://img.example\\@evil.test/ https://ｉmg.example/ https://evil.test/#@img.example/ https://evil.test?@img.example/"
    ).split(),
    "",
    "https://img.example/\r\nHost: evil",
    "https://img.example/ a",
    "https://img.example/" + "a" * 3000,
]


@pytest.mark.parametrize("url", REFUSED_URLS)
def test_address_that_is_not_exactly_allowed_is_refused_before_anything_is_resolved(url: str) -> None:
    net = Net(answer(png()))
    with pytest.raises(InputError):
        asyncio.run(net.fetcher().fetch(url))
    assert net.connected == []


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "2130706433", "0x7f000001", "10.0.0.0x1", "*.example", "img.example/path", "[::1]", "", "a b", "ftp://img.example",
     "img.example:0", "user@img.example", "img.example:70000"],
)  # fmt: skip
def test_list_takes_exact_names_only(host: str) -> None:
    with pytest.raises(InputError):
        Fetcher([host])


@pytest.mark.parametrize(
    "location",
    ["http://127.0.0.1/", "https://evil.test/", "//evil.test/", "http://img.example/", "https://[", "file:///etc/passwd"],
)
def test_redirect_elsewhere_is_not_followed(location: str) -> None:
    net = Net([answer(b"", "302 Found", location=location), answer(png())])
    with pytest.raises(InputError, match="redirects"):
        asyncio.run(net.fetcher().fetch("https://img.example/a.png"))
    assert len(net.connected) == 1


def test_redirect_within_the_list_is_checked_anew_and_not_endless() -> None:
    moved = answer(b"", "301 Moved", location="/b.png")
    net = Net([moved, answer(png())])
    assert asyncio.run(net.fetcher().fetch("https://img.example/a.png")).load().size == (8, 6)
    inside = Net([moved, answer(png())], [PUBLIC], ["10.0.0.1"])
    with pytest.raises(InputError, match="not public"):
        asyncio.run(inside.fetcher().fetch("https://img.example/a.png"))
    assert len(inside.connected) == 1
    with pytest.raises(InputError, match="more than 2 times"):
        asyncio.run(Net([moved] * 9).fetcher().fetch("https://img.example/a.png"))


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (answer(b"<html>not a picture</html>"), "not a picture"),
        (answer(png(), "404 Not Found"), "status 404"),
        (answer(zlib.compress(png()), content_encoding="gzip"), "packed"),
        (answer(b"", content_length="999999999"), "more than"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"1000\r\n" + b"x" * 4096 + b"\r\n", "whole answer"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + (b"1000\r\n" + b"x" * 4096 + b"\r\n") * 40, "more than"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 30_000, "more than"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000, "whole answer"),
        (b"SSH-2.0-door\r\n\r\n", "whole answer"),
        (b"", "whole answer"),
    ],
)  # fmt: skip
def test_answer_that_is_no_image_of_bounded_size_is_refused(sent: bytes, told: str) -> None:
    with pytest.raises(InputError, match=told):
        asyncio.run(Net(sent).fetcher(file_bytes=100_000).fetch("https://img.example/a.png"))


def test_host_that_does_not_answer_is_given_up() -> None:
    async def never(address: str, port: int, name: str | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return asyncio.StreamReader(), cast(asyncio.StreamWriter, _Writer([]))

    net = Net(b"")
    fetcher = Fetcher(["img.example"], limits=FetchLimits(seconds=0.05), resolve=net.resolve, connect=never)
    with pytest.raises(InputError, match="within"):
        asyncio.run(fetcher.fetch("https://img.example/a.png"))


# Pictures from requests


def take(told: object, **options: Any) -> ImageInput:
    return asyncio.run(Intake(**options).take(told, "image", Sources()))


@pytest.mark.parametrize("form", ["{}", "data:image/png;base64,{}", "DATA:;name=a.png;base64,{}", "\n{}\r\n"])
def test_image_comes_as_base64_or_data_url(form: str) -> None:
    text = form.replace("{}", base64.b64encode(png()).decode())
    picture = take({"data": text})
    assert picture == ImageInput.from_bytes(png()) and picture.path is None and picture.name == ""
    assert bytes_of_base64(base64.urlsafe_b64encode(png()).decode().rstrip("="), "image") == png()


@pytest.mark.parametrize(
    "told",
    [None, "x", 5, [], {}, {"data": 5}, {"data": None}, {"data": ["x"]}, {"data": "x", "item": "y"}, {"path": "/etc/passwd"},
     {"data": ""}, {"data": "%%%"}, {"data": "ä"}, {"data": "data:image/png,abc"}, {"data": "data:text/html;base64,AAAA"},
     {"data": "/etc/passwd"}, {"data": "file:///etc/passwd"}, {"data": "A"}, {"data": "AAAA====AAAA"}, {"url": "https://img.example/a"},
     {"item": "a"}, {"data": "\ud800"}],
)  # fmt: skip
def test_what_is_no_image_is_an_input_error(told: object) -> None:
    with pytest.raises(InputError):
        take(told)


def test_image_is_refused_by_size_before_it_is_decoded() -> None:
    limits = ImageLimits(pixels=1000, file_bytes=10_000)
    with pytest.raises(InputError, match="characters of base64"):
        take({"data": "A" * 20_000}, limits=limits)
    with pytest.raises(InputError, match="has 10001 bytes"):
        take({"data": base64.b64encode(b"x" * 10_001).decode()}, limits=limits)
    with pytest.raises(InputError, match="more than the limit of 1000"):
        take({"data": base64.b64encode(png((100, 100))).decode()}, limits=limits)


def test_bomb_and_endless_jpeg_are_refused() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100_000))), (b"IEND", b"")]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    with pytest.raises(InputError, match="60000"):
        take({"data": base64.b64encode(bomb).decode()})
    out = BytesIO()
    Image.new("RGB", (16, 16)).save(out, "JPEG", progressive=True)
    scans = out.getvalue()
    start = scans.rindex(b"\xff\xda")
    endless = scans[:start] + scans[start:-2] * (MAX_SCANS + 1) + b"\xff\xd9"
    assert take({"data": base64.b64encode(scans).decode()}).load().size == (16, 16)
    with pytest.raises(InputError, match="scans"):
        take({"data": base64.b64encode(endless).decode()})


@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]), st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_image_is_read_or_refused_and_nothing_else(name: str, data: st.DataObject) -> None:
    out = BytesIO()
    Image.linear_gradient("L").resize((9, 7)).convert("RGB").save(out, name)
    raw = bytearray(out.getvalue())
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=8)):
        raw[place] = value
    raw = raw[: data.draw(st.integers(1, len(raw)))]
    with contextlib.suppress(InputError):
        take({"data": base64.b64encode(raw).decode()})


def test_field_report_05_a_motion_photo_is_no_jpeg_of_endless_scans() -> None:
    out = BytesIO()
    Image.new("RGB", (16, 16)).save(out, "JPEG")
    moving = out.getvalue() + b"\xff\xda\0\x0c" * (MAX_SCANS + 1) + b"\0\0\0\x18ftypmp42"
    assert take({"data": base64.b64encode(moving).decode()}).load().size == (16, 16)


def test_field_report_06_a_image_is_kept_and_shown_whatever_its_name(tmp_path: Path) -> None:
    out = BytesIO()
    Image.new("RGB", (16, 16), "teal").save(out, "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    store = ImageFolder(tmp_path / "store")
    for number, data in enumerate((out.getvalue(), out.getvalue() + b"video\xff\xda", png())):
        kept = store.keep(take({"data": base64.b64encode(data).decode()}), str(number)).path
        assert kept is not None and kept.suffix == (".png" if number == 2 else ".jpg") and kept.read_bytes() == data
        for name in (kept.name, "IMG_0001", "a.JPG_large", "b.mpo", "c.jfif"):
            (tmp_path / name).write_bytes(data)
            shown = as_jpeg(image_in_folders(name, [tmp_path], "1"), 64)
            assert Image.open(BytesIO(shown)).format == "JPEG"


def test_field_report_17_a_small_file_of_many_floats_is_refused_at_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    wide = {258: (SHORT, (32,)), 339: (SHORT, (3,))}
    for side in (2829, 5600):  # more than 8 million pixels
        with pytest.raises(InputError, match=rf"{side} x {side} pixels at a time, .* more than the limit of 8000000"):
            take({"data": base64.b64encode(tiff(side, side, bytes(9), packed=True, tags=wide)).decode()})
    tiles = {**wide, 322: (LONG, (16_384,)), 323: (LONG, (16_384,)), 324: (LONG, (8,)), 325: (LONG, (9,))}
    with pytest.raises(InputError, match="16384 x 16384 pixels at a time"):
        take({"data": base64.b64encode(tiff(16, 16, bytes(9), packed=True, tags=tiles)).decode()})


def test_only_files_in_the_folders_are_read(tmp_path: Path) -> None:
    inside, outside = tmp_path / "pictures", tmp_path / "secret.png"
    inside.mkdir()
    outside.write_bytes(png())
    (inside / "cup.png").write_bytes(png())
    (inside / "link.png").symlink_to(outside)
    (inside / "words.txt").write_text("not a picture")
    assert image_in_folders("cup.png", [inside], "1").path == image_in_folders(str(inside / "cup.png"), [inside], "1").path
    with pytest.raises(InputError, match="not a picture"):
        image_in_folders("words.txt", [inside], "1").load()
    for image in (str(outside), "../secret.png", "link.png", str(inside / ".." / "secret.png"), "", ".", "a\0.png",
                  "/etc/passwd", "x" * 5000, "cup.png/../../secret.png", "/proc/self/environ"):  # fmt: skip
        with pytest.raises(InputError) as told:
            image_in_folders(image, [inside], "1")
        assert str(tmp_path) not in str(told.value)


# Bodies


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[1,]", b"NaN", b"[Infinity]", b"[-Infinity]", b"1e999", b'{"a":1,"a":2}', b'"\xff"', b"\xef\xbb\xbf{}",
     b'"\\ud800"',     b'{"\\udfff": 1}', b"[" * 100_000, b'{"a":' * 50_000, b"[" * 33 + b"]" * 33, b"9" * 41,
     b"[" + b"1," * 300_000 + b"1]", b'"\x00"',
     '{"a":1}'.encode("utf-16"), b"{} {}", b'"' + b'\\"' * 500_000, b'"a" ' * 300_000, b"'a'", b"\\" * 100_000],
)  # fmt: skip
def test_what_is_not_strict_json_is_refused(raw: bytes) -> None:
    with pytest.raises(InputError):
        parse_json(raw)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**38), 10**38)
    | st.floats(allow_subnormal=False, allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(JSON, st.booleans())
@settings(max_examples=50)
def test_json_is_read_as_it_was_written(value: Any, ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary(max_size=60) | st.text(alphabet='[]{}",:\\u0d8ef19-+.eNa ', max_size=60).map(str.encode))
def test_any_bytes_are_json_or_an_input_error(raw: bytes) -> None:
    try:
        value = parse_json(raw)
    except InputError:
        return
    assert value == json.loads(raw)


def test_depth_counts_brackets_outside_texts_only() -> None:
    assert parse_json(b'["' + b"[" * 1000 + b'\\"]"]') == ["[" * 1000 + '"]']
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH) is not None


# The wall and the gate, by ASGI


Asgi = Callable[[Message, Receive, Send], Awaitable[None]]
HOST = (b"host", b"127.0.0.1:8080")
KIND = (b"content-type", b"application/json")


async def echo(scope: Message, receive: Receive, send: Send) -> None:
    """Reads the body and tells its length; puts a Server header into its answer."""
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client went away")
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    headers = [(b"server", b"secret/1.0"), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"size": size}).encode()})


def ask(
    app: Asgi,
    method: str = "GET",
    path: str = "/items",
    headers: Sequence[tuple[bytes, bytes]] = (HOST,),
    chunks: Sequence[bytes | None] = (b"",),
    client: str = "198.51.100.7",
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of one request; a chunk None never comes."""
    scope: Message = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "http_version": "1.1",
        "headers": list(headers), "client": (client, 5),
    }  # fmt: skip
    waiting, sent = list(chunks), []

    async def receive() -> Message:
        if not waiting or waiting[0] is None:
            await asyncio.sleep(30)
        chunk = waiting.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(waiting)}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(asyncio.wait_for(cast(Any, app(scope, receive, send)), 10))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, json.loads(sent[1]["body"] or b"null")


def post(app: Asgi, *more: tuple[bytes, bytes], chunks: Sequence[bytes | None] = (b"{}",)) -> tuple[int, dict[str, str], Any]:
    size = str(sum(len(chunk) for chunk in chunks if chunk)).encode()
    return ask(app, "POST", "/search", [HOST, KIND, (b"content-length", size), *more], chunks)


def test_every_answer_carries_an_id_and_headers_and_names_no_server() -> None:
    app = Guard(echo, Wall())
    for status, headers, _ in (ask(app), ask(app, headers=[(b"host", b"evil.test")])):
        assert status in (200, 421)
        assert (
            "server" not in headers and headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
        )
        assert len(headers["x-request-id"]) == 24 and "sandbox" in headers["content-security-policy"]
        assert not any(name.startswith("access-control") for name in headers)


def test_page_policy_lets_nothing_in_from_elsewhere() -> None:
    async def page(scope: Message, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html; charset=utf-8")]})
        await send({"type": "http.response.body", "body": b"null"})

    policy = ask(Guard(page, Wall()))[1]["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy and "http" not in policy


@pytest.mark.parametrize("host", ["evil.test", "127.0.0.1.evil.test", "localhost.evil.test:8080", "127.1", "0.0.0.0", "[::]"])
def test_loopback_server_answers_to_loopback_names_only(host: str) -> None:
    assert ask(Guard(echo, Wall.of("127.0.0.1")), headers=[(b"host", host.encode())])[0] == 421
    for good in ("127.0.0.1:9", "LOCALHOST", "[::1]:8080"):
        assert ask(Guard(echo, Wall.of("127.0.0.1")), headers=[(b"host", good.encode())])[0] == 200
    assert ask(Guard(echo, Wall.of("0.0.0.0", hosts=["search.example"])), headers=[(b"host", host.encode())])[0] == 421
    assert ask(Guard(echo, Wall.of("0.0.0.0", hosts=["search.example"])), headers=[(b"host", b"search.example:443")])[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([HOST] + [(b"x", b"y")] * 200, 431),
        ([HOST, (b"x", b"y" * 40_000)], 431),
        ([HOST, HOST], 400),
        ([], 400),
        ([(b"host", b"a b")], 400),
        ([HOST, (b"x", b"a\x00b")], 400),
        ([HOST, (b"x", b"a\rb")], 400),
        ([HOST, (b"x y", b"a")], 400),
        ([HOST, (b"authorization", b"a"), (b"authorization", b"b")], 400),
        ([HOST, KIND, (b"content-length", b"2"), (b"transfer-encoding", b"chunked")], 400),
        ([HOST, KIND, (b"content-length", b"-1")], 400),
        ([HOST, KIND, (b"content-length", b"9" * 40)], 400),
        ([HOST, KIND, (b"content-length", b"2"), (b"content-encoding", b"gzip")], 415),
        ([HOST, (b"content-type", b"text/plain"), (b"content-length", b"2")], 415),
        ([HOST, (b"content-length", b"2")], 415),
        ([HOST, (b"transfer-encoding", b"chunked")], 415),
    ],
)
def test_header_tricks_are_refused(headers: list[tuple[bytes, bytes]], status: int) -> None:
    got, _, told = ask(Guard(echo, Wall()), "POST", "/search", headers)
    assert got == status and set(told["error"]) == {"message", "type", "param", "code"}


def test_long_paths_odd_methods_and_websockets_are_refused() -> None:
    app = Guard(echo, Wall())
    assert ask(app, path="/" + "a" * 9000)[0] == 414
    assert ask(app, method="TRACE")[0] == ask(app, method="OPTIONS")[0] == 405
    sent: list[Message] = []

    async def socket() -> None:
        async def receive() -> Message:
            return {"type": "websocket.connect"}

        async def send(message: Message) -> None:
            sent.append(message)

        await app({"type": "websocket", "headers": []}, receive, send)

    asyncio.run(socket())
    assert sent[0]["type"] == "websocket.close"


def test_pages_of_other_origins_stay_out_unless_named() -> None:
    closed, opened = Guard(echo, Wall()), Guard(echo, Wall.of("127.0.0.1", origins=["https://app.example/"]))
    app_origin, ours = (b"origin", b"https://app.example"), (b"origin", b"http://127.0.0.1:8080")
    for origin in (app_origin, (b"origin", b"null"), (b"origin", b"http://127.0.0.1:9"), (b"origin", b"http://[")):
        assert post(closed, origin)[0] == 403
    assert post(closed)[0] == post(closed, ours)[0] == 200
    assert not Guard(echo, Wall(hosts=None))._may_write("null", "")  # HTTP/1.0 without a Host
    status, headers, _ = post(opened, app_origin)
    assert status == 200 and headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-credentials" not in headers
    assert post(opened, (b"origin", b"https://app.example.evil.test"))[0] == 403
    asked = [HOST, app_origin, (b"access-control-request-method", b"POST")]
    assert ask(opened, "OPTIONS", headers=asked)[0] == 204 and ask(closed, "OPTIONS", headers=asked)[0] == 403
    for origin in ("*", "null", "app.example", "https://app.example/path", "https://*.example"):
        with pytest.raises(InputError):
            Wall.of("127.0.0.1", origins=[origin])


def test_body_is_bounded_however_it_comes() -> None:
    app = Guard(BodyGuard(echo, most=100, seconds=5), Wall())
    assert post(app, chunks=[b"x" * 100])[2] == {"size": 100}
    assert post(app, chunks=[b"x" * 101])[0] == 413
    chunked = [HOST, KIND, (b"transfer-encoding", b"chunked")]
    status, headers, told = ask(app, "POST", "/search", chunked, [b"x" * 30] * 10)
    assert status == 413 and headers["connection"] == "close" and told["error"]["code"] == "body_too_large"
    slow = Guard(BodyGuard(echo, most=100, seconds=0.05), Wall())
    assert ask(slow, "POST", "/search", chunked, [b"x", None])[0] == 408


def test_bodies_are_bounded_together_until_they_are_answered() -> None:
    async def work() -> None:
        answer = asyncio.Event()
        sent: dict[int, list[Message]] = {}

        async def waiting(scope: Message, receive: Receive, send: Send) -> None:
            while (message := await receive()).get("more_body"):
                pass
            if message["type"] == "http.disconnect":
                return
            await answer.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        guard = BodyGuard(waiting, most=100, together=150)

        async def one(number: int, chunks: list[bytes]) -> None:
            left = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks] + [{"type": "http.request"}]

            async def receive() -> Message:
                return left.pop(0) if left else await asyncio.Future()

            async def send(message: Message) -> None:
                sent.setdefault(number, []).append(message)

            await guard({"type": "http", "method": "POST", "headers": []}, receive, send)

        held = asyncio.create_task(one(0, [b"x" * 90]))
        await asyncio.sleep(0)
        refused = asyncio.create_task(one(1, [b"x" * 30] * 3))
        small = asyncio.create_task(one(2, [b"x" * 30]))
        while guard.held != 120 or not refused.done():
            await asyncio.sleep(0)
        assert sent[1][0]["status"] == 429 and (b"retry-after", b"1") in sent[1][0]["headers"]
        answer.set()
        await asyncio.gather(held, small)
        await one(3, [b"x" * 90])
        assert {number: messages[0]["status"] for number, messages in sent.items()} == {0: 200, 1: 429, 2: 200, 3: 200}
        assert guard.held == 0

    asyncio.run(asyncio.wait_for(work(), 20))


def test_fault_of_the_application_is_not_hidden() -> None:
    async def broken(scope: Message, receive: Receive, send: Send) -> None:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError):
        post(BodyGuard(broken))


class Asked(BaseModel):
    text: str


def test_routes_read_strict_json() -> None:
    app = FastAPI()
    app.router.route_class = StrictRoute

    @app.post("/search")
    async def search(asked: Asked) -> Asked:
        return asked

    assert post(app, chunks=[b'{"text": "a"}'])[0] == 200
    for raw in (
        b'{"text": "a", "text": "b"}',
        b'{"text": "\\ud800"}',
        b"[" * 5000,
        b'{"text": NaN}',
        b'{"text": "' + b"x" * 300_000,
    ):
        status, _, told = post(app, chunks=[raw])
        assert status == 400 and "body" in told["detail"] and "error parsing" not in told["detail"]


@pytest.fixture
def ring(tmp_path: Path) -> tuple[KeyRing, str, str]:
    path = tmp_path / "keys.json"
    reads = make_key(path, "reader", tenant="acme", requests_per_minute=3)
    writes = make_key(path, "writer", scopes=["read", "write"])
    return KeyRing(path), reads, writes


def bearer(secret: str) -> tuple[bytes, bytes]:
    return (b"authorization", f"Bearer {secret}".encode())


def test_gate_asks_for_keys_before_the_body_is_touched(ring: tuple[KeyRing, str, str]) -> None:
    keys, reads, writes = ring
    app = Guard(KeyGate(echo, keys, Limits()), Wall())
    status, headers, told = post(app, chunks=[None])  # the body never comes, and nobody waits for it
    assert status == 401 and headers["www-authenticate"].startswith("Bearer") and told["error"]["type"] == "authentication_error"
    assert post(app, bearer(reads))[0] == post(app, bearer(writes))[0] == 200
    for method, path in (("POST", "/items"), ("DELETE", "/items/a"), ("POST", "/nowhere"), ("PUT", "/search")):
        assert ask(app, method, path, [HOST, bearer(reads)])[0] in (403, 429)
        assert ask(app, method, path, [HOST, bearer(writes)])[0] == 200
    for path in ("/", "/health", "/ready", "/static/page.js"):
        assert ask(app, path=path)[0] == 200
    for path in ("/metrics", "/items", "/page/config", "/v1/models", "/Health", "/staticx", "//", "/health/../items"):
        assert ask(app, path=path)[0] in (401, 429)


def test_gate_slows_down_one_key_and_strangers_but_no_neighbour(ring: tuple[KeyRing, str, str]) -> None:
    keys, reads, writes = ring
    app = KeyGate(echo, keys, Limits(failures=Rate(1, 5)))
    assert [ask(app, headers=[bearer(reads)])[0] for _ in range(4)] == [200, 200, 200, 429]
    assert int(ask(app, headers=[bearer(reads)])[1]["retry-after"]) >= 1
    assert [ask(app)[0] for _ in range(7)] == [401] * 5 + [429] * 2
    assert ask(app, headers=[bearer(writes)])[0] == 200  # the same address, a good key
    assert ask(app, client="198.51.100.8")[0] == 401


def test_bulk_of_inputs_is_paid_for_afterwards() -> None:
    limits = Limits(inputs=Rate(60, 10))
    who = Principal("bulk", ("write",))
    assert limits.take_inputs(who, 500) == 0.0
    assert 480 < limits.take_inputs(who, 1) <= 500


def test_without_keys_everyone_is_anyone() -> None:
    app = KeyGate(echo, None, Limits())
    assert ask(app, "DELETE", "/items/a")[0] == 200
    assert scope_needed("POST", "/items") == "write" and scope_needed("POST", "/search/stream") == "read"


# Tenants


def opened(folder: Path) -> SqliteIndex:
    return open_index(folder, fingerprint="m1", prompt_version="p1", dim=4, create=True)


TENANTS = (None, "acme", "acme-b", "b")
IDS = ("a", "b", "acme:a", "_tenant:acme:a", "_tenant:b:a", ":a", "../acme/a", "_tenant", "\x1f")
FILTERS: tuple[Filter | None, ...] = (
    None, Eq("n", 1), Eq("id", "a"), Eq("id", "_tenant:acme:a"), In("id", ("a", "_tenant:b:a")), Range("id", low="a"),
    Range("id", high="b"), Range("id", low=""),
    Range("id", low="_tenant:acme:", high="_tenant:acme:~"), And(()), And((Eq("n", 2), In("id", IDS))),
    Eq("modality", "text"), In("n", ()), Eq("id", 1), Range("id", low=1), Eq("n", None),
)  # fmt: skip
STEPS = st.lists(
    st.tuples(
        st.sampled_from(TENANTS), st.sampled_from(["upsert", "delete", "delete where"]), st.sampled_from(IDS), st.integers(1, 3),
        st.sampled_from(FILTERS),
    ),
    min_size=3, max_size=14,
)  # fmt: skip


@given(STEPS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_tenant_sees_what_it_would_see_in_an_index_of_its_own(tmp_path_factory: pytest.TempPathFactory, steps: Any) -> None:
    folder = tmp_path_factory.mktemp("tenants")
    shared, alone = opened(folder / "shared"), {tenant: opened(folder / f"of-{tenant}") for tenant in TENANTS}
    views = {tenant: TenantIndex(shared, tenant) for tenant in TENANTS}
    try:
        for tenant, action, id, n, where in steps:
            outside = tenant is None and id.startswith(PREFIX)
            if action == "upsert":
                item, vectors = Item.of(text=f"{tenant} {id} {n}", id=id, fields={"n": n}), vector_of(f"{id} {n}", 4)[None]
                if outside:
                    with pytest.raises(InputError):
                        views[tenant].upsert([item], vectors)
                else:
                    assert views[tenant].upsert([item], vectors) == alone[tenant].upsert([item], vectors)
            else:
                which = [id] if action == "delete" else where or And(())
                assert views[tenant].delete(which) == alone[tenant].delete(which)
        for tenant in TENANTS:
            view, own = views[tenant], alone[tenant]
            assert view.get(IDS) == own.get(IDS)
            assert dict(view.info().counts) == own.info().counts
            for where in FILTERS:
                assert list(view.scan(where)) == list(own.scan(where)) and view.count(where) == own.count(where)
                asked = vector_of("query", 4)[None]
                assert view.search(asked, 5, where=where) == own.search(asked, 5, where=where)
    finally:
        for index in (shared, *alone.values()):
            index.close()


def test_client_can_neither_set_nor_ask_for_the_tenant(tmp_path: Path) -> None:
    with opened(tmp_path) as index:
        acme, rival, nobody = TenantIndex(index, "acme"), TenantIndex(index, "rival"), TenantIndex(index, None)
        acme.upsert([Item.of(text="a plan", id="plan", fields={"n": 1})], vector_of("plan", 4)[None])
        for view in (acme, rival, nobody):
            with pytest.raises(InputError, match=FIELD):
                view.upsert([Item.of(text="x", id="x", fields={FIELD: "acme"})], vector_of("x", 4)[None])
            for where in (Eq(FIELD, "acme"), And((And((In(FIELD, ("acme", None)),)),)), Range(FIELD, low="")):
                with pytest.raises(InputError, match=FIELD):
                    view.search(vector_of("x", 4)[None], 5, where=where)
                with pytest.raises(InputError, match=FIELD):
                    view.delete(where)
        assert dict(acme.get(["plan"])["plan"].fields) == {"n": 1}
        assert rival.get(["plan", "_tenant:acme:plan"]) == nobody.get(["plan", "_tenant:acme:plan"]) == {}
        with pytest.raises(InputError, match="more than"):
            acme.upsert([Item.of(text="x", id="x" * 1024)], vector_of("x", 4)[None])
    for name in ("", "A", "a:b", "a/b", "a" * 64, "-a", "a\n"):
        with pytest.raises(InputError):
            TenantIndex(index, name)


def test_index_that_filters_wrongly_shows_too_little_not_too_much(tmp_path: Path) -> None:
    with opened(tmp_path) as index:
        for tenant in ("acme", "rival"):
            TenantIndex(index, tenant).upsert([Item.of(text=tenant, id="plan")], vector_of(tenant, 4)[None])

        class Leaky:
            """The same index, which ignores filters."""

            def __getattr__(self, name: str) -> Any:
                return getattr(index, name)

            def search(self, vectors: Any, k: int, **options: Any) -> Any:
                return index.search(vectors, k)

            def scan(self, where: Any, **options: Any) -> Any:
                return index.scan()

        leaky = TenantIndex(cast(Any, Leaky()), "acme")
        assert [(hit.text, hit.rank) for hit in leaky.search(vector_of("rival", 4)[None], 5)[0]] == [("acme", 1)]
        assert [stored.text for stored in leaky.scan()] == ["acme"]
        assert TenantIndex(cast(Any, Leaky()), None).search(vector_of("rival", 4)[None], 5) == [[]]


# The audit log


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def keyed(path: Path, sha256: str) -> str:
    """What an operator with the secret computes to find a content in the log."""
    secret = bytes.fromhex(path.with_name(f"{path.name}.secret").read_text())
    return hmac.new(secret, sha256.encode(), "sha256").hexdigest()


def test_gate_writes_who_asked_what(tmp_path: Path, ring: tuple[KeyRing, str, str]) -> None:
    query = Query.of(text="a secret wish\n", image=ImageInput.from_bytes(png()), instruction="Find it")

    async def handler(scope: Message, receive: Receive, send: Send) -> None:
        scope["state"]["audit"].add(query)
        await echo(scope, receive, send)

    for contents in (False, True):
        path = tmp_path / f"audit-{contents}.jsonl"
        audit = AuditLog(path, contents=contents)
        app = Guard(KeyGate(handler, ring[0], Limits(), audit), Wall())
        _, headers, _ = post(app, bearer(ring[1]))
        post(app)
        audit.close()
        first, second = lines(path)
        assert first["request"] == headers["x-request-id"] and (first["key"], first["tenant"], first["status"]) == (
            "reader",
            "acme",
            200,
        )
        assert first["path"] == "/search" and first["asked"][0]["hmac"] == keyed(path, query.content_hash())
        assert ("secret wish" in path.read_text()) == contents and ring[1] not in path.read_text()
        assert (second["key"], second["status"]) == (None, 401) and "asked" not in second
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_audit_log_rotates_and_keeps_the_newest(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.jsonl", most_bytes=400, keep=2)
    for number in range(40):
        audit.write({"number": number})
    audit.close()
    names = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".secret")
    assert names == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    kept = [line["number"] for name in reversed(names) for line in lines(tmp_path / name)]
    assert kept == list(range(40 - len(kept), 40)) and all(path.stat().st_size <= 400 for path in tmp_path.iterdir())


def test_audit_log_never_waits_and_tells_what_it_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, whole = threading.Event(), os.write

    def slow(handle: int, data: bytes) -> int:
        stuck.wait(10)
        return whole(handle, data)

    monkeypatch.setattr("traceir.serve.audit.os.write", slow)
    audit = AuditLog(tmp_path / "audit.jsonl", waiting=2)
    for number in range(10):
        audit.write({"number": number})  # returns although the disk hangs
    lost = audit.dropped
    stuck.set()
    audit.close()
    told = lines(tmp_path / "audit.jsonl")
    assert lost >= 7 and sum(line.get("dropped", 0) for line in told) == lost
    assert sum("number" in line for line in told) + lost == 10
