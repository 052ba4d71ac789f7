"""The hostile requests of `hostile.py`: the name of their kind and the bytes that are sent. Deterministic by seed."""

from __future__ import annotations

import base64
import gzip
import json
import random
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final

from PIL import Image

LOCAL: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Case:
    """One request: its group, a name for messages, its bytes. `anonymous`: sent without a valid key, so never to be granted."""

    group: str
    name: str
    raw: bytes
    anonymous: bool = False


@dataclass(frozen=True, slots=True)
class Scene:
    """Where the requests go, with which key, the port of the canary, and a file nobody may read."""

    host: str
    key: str | None
    canary: int
    secret: str

    def request(
        self, method: str, path: str, body: bytes | None = None, *, headers: Sequence[str] = (), key: str | None = None
    ) -> bytes:
        """A request as it is sent; `path` as it stands, `key` another header value for Authorization."""
        head = [f"{method} {path} HTTP/1.1", f"Host: {self.host}", "Connection: close"]
        if key is not None or self.key is not None:
            head.append(f"Authorization: {key if key is not None else f'Bearer {self.key}'}")
        if body is not None:
            head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*head, *headers, "", ""]).encode("utf-8", "surrogateescape") + (body or b"")

    def post(self, path: str, body: Any) -> bytes:
        return self.request("POST", path, json.dumps(body).encode())


def all_cases(scene: Scene, seed: int, least: int) -> list[Case]:
    """Every group, shuffled; filled up with damaged bodies to at least `least`."""
    draw = random.Random(seed)
    groups = (broken_images, bombs, odd_json, wrong_types, paths, private_urls, header_tricks, bad_text, strangers)
    cases = [case for group in groups for case in group(scene, draw)]
    damaged = damaged_bodies(scene, draw)
    while len(cases) < least:
        cases.append(next(damaged))
    draw.shuffle(cases)
    return cases


# Images

MAGIC: Final = {
    "BUFR": b"BUFR", "CUR": b"\0\0\2\0\1\0", "DCX": b"\xb1\x68\xde\x3a",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "FITS": b"SIMPLE  =                    T", "FLI": b"\0\0\0\0\x11\xaf", "FTEX": b"FTEX", "GBR": b"\0\0\0\x14\0\0\0\1",
    "GRIB": b"GRIB\0\0\0\1", "HDF5": b"\x89HDF\r\n\x1a\n", "IMT": b"\n\n", "IPTC": b"\x1c\x01", "MCIDAS": b"\0\0\0\0\0\0\0\4",
    "MPEG": b"\0\0\1\xb3", "PCD": b"PCD_" * 600, "PIXAR": b"\x80\xe8\0\0", "PSD": b"8BPS\0\1", "SUN": b"\x59\xa6\x6a\x95",
    "WMF": b"\xd7\xcd\xc6\x9a\0\0", "XBM": b"#define x_width 60000\n#define x_height 60000\nstatic char x_bits[] = {",
    "XPM": b"/* XPM */\nstatic char *x[] = {\"60000 60000 2 1\",", "XVTHUMB": b"P7 332\n#END_OF_COMMENTS\n99999 99999 255\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'><image href='file:///etc/passwd'/>",
    "PDF": b"%PDF-1.7\n", "HTML": b"<script>alert(1)</script>", "ZIP": b"PK\3\4", "ELF": b"\x7fELF",
    "HEIC": b"\0\0\0\x18ftypheic",
}  # fmt: skip


def whole_images() -> dict[str, bytes]:
    """One small whole file of every format that Pillow reads and writes."""
    Image.init()
    images: dict[str, bytes] = {}
    for name in sorted(set(Image.SAVE) & (set(Image.OPEN) | {"MPO"})):
        for mode in ("RGB", "L", "1"):
            out = BytesIO()
            try:
                Image.linear_gradient("L").resize((24, 18)).convert(mode).save(out, name)
            except (OSError, ValueError, KeyError, SystemError):
                continue
            images[name] = out.getvalue()
            break
    return images


def broken_images(scene: Scene, draw: random.Random) -> Iterator[Case]:
    whole = whole_images()
    for name in sorted({*Image.OPEN, *MAGIC, *whole}):
        start = whole.get(name) or MAGIC.get(name, b"") + draw.randbytes(200)
        for number in range(44 if name in whole else 16):
            yield Case("picture", f"{name} {number}", image_request(scene, draw, _break(start, number, draw)))


def _break(data: bytes, number: int, draw: random.Random) -> bytes:
    """Cut, flipped, blown up, zeroed, doubled, prefixed."""
    raw, kind = bytearray(data), number % 8
    if kind == 0:
        return bytes(raw[: draw.randrange(len(raw))])
    if kind in (1, 2, 3):
        for _ in range(draw.choice((1, 3, 20))):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
    elif kind == 4:  # sizes live near the start
        position = draw.randrange(min(len(raw), 40))
        raw[position : position + 4] = draw.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\0\0"))
    elif kind == 5:
        position = draw.randrange(len(raw))
        raw[position:] = bytes(len(raw) - position)
    elif kind == 6:
        raw = raw + raw
    else:
        raw = bytearray(draw.randbytes(draw.randrange(1, 9))) + raw
    return bytes(raw)


def image_request(scene: Scene, draw: random.Random, data: bytes) -> bytes:
    text = base64.b64encode(data).decode()
    text = draw.choice(("", "", "data:image/png;base64,", "data:;base64,")) + text
    way = draw.randrange(4)
    if way == 0:
        return scene.post("/items", {"items": [{"id": f"hostile-{draw.randrange(9)}", "image": {"data": text}}]})
    if way == 1:
        return scene.post("/v1/embeddings", {"input": [{"image": text}]})
    if way == 2:
        part = {"type": "image_url", "image_url": {"url": text}}
        return scene.post("/v1/embeddings", {"messages": [{"role": "user", "content": [part]}]})
    return scene.post("/search", {"image": {"data": text}, "route": "direct"})


def bombs(scene: Scene, draw: random.Random) -> Iterator[Case]:
    files = {
        "png 60000 x 60000": png(60_000, 60_000, zlib.compress(bytes(2_000_000), 9)),
        "png 30000 x 30000, one bit, whole": png(30_000, 30_000, zlib.compress(bytes(3751 * 30_000), 9), depth=1, kind=0),
        "png 2^31 - 1": png(2**31 - 1, 2**31 - 1, b"x"),
        "png 0 x 0": png(0, 0, b"x"),
        "png 2^31 x 1": png(2**31 - 1, 1, b"x"),
        "png of text": png(4, 4, zlib.compress(bytes(100)), (b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000), 9))),
        "png of profile": png(4, 4, zlib.compress(bytes(100)), (b"iCCP", b"a\0\0" + zlib.compress(bytes(80_000_000), 9))),
        "png of 20000 chunks": png(4, 4, zlib.compress(bytes(100)), *[(b"tEXt", b"a\0b")] * 20_000),
        "gif 65535 x 65535": b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x08\x02\x4c\x01\0;",
        "bmp 2^31": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 70, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 32, 0, 0, 0, 0, 0, 0),
        "webp 16384 x 16384": b"RIFF\x24\0\0\0WEBPVP8L\x0e\0\0\0\x2f\xff\xff\xff\x0f" + bytes(9) + bytes(8),
        "jpeg 65535 x 65535": b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\3\1\x11\0\2\x11\0\3\x11\0"
        b"\xff\xda\0\x0c\3\1\0\2\0\3\0\0?\0\xff\xd9",
        "jpeg of 4000 scans": many_scans(4000),
        "tiff 2^31": b"II*\0\x08\0\0\0\4\0" + b"".join(
            struct.pack("<HHII", *row) for row in ((256, 4, 1, 2**31 - 1), (257, 4, 1, 2**31 - 1), (273, 4, 1, 8), (279, 4, 1, 8))
        ) + bytes(4),
        "tiff of a ring of directories": b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 256, 4, 1, 9) + struct.pack("<I", 8),
        "svg of a billion laughs": b"<!DOCTYPE x [<!ENTITY a 'ha'>" + b"<!ENTITY b '&a;&a;&a;'>" * 9 + b"]><svg>&b;</svg>",
        "gzip of zeros": gzip.compress(bytes(50_000_000)),
        "20 MB of nothing": bytes(20_000_000),
    }  # fmt: skip
    for name, data in files.items():
        for _ in range(3):
            yield Case("bomb", name, image_request(scene, draw, data))


def png(width: int, height: int, packed: bytes, *more: tuple[bytes, bytes], depth: int = 8, kind: int = 2) -> bytes:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)), *more, (b"IDAT", packed), (b"IEND", b"")]
    written = (struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def many_scans(count: int) -> bytes:
    """A progressive JPEG of 2000 x 2000 whose last scan comes again and again."""
    out = BytesIO()
    Image.new("L", (2000, 2000)).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * count + b"\xff\xd9"


# JSON

ROUTES: Final = ("/search", "/search/stream", "/items", "/v1/embeddings")


def odd_json(scene: Scene, draw: random.Random) -> Iterator[Case]:
    deep = [b"[" * n for n in (40, 1000, 100_000)] + [b'{"a":' * n for n in (40, 1000, 100_000)]
    closed = [b"[" * n + b"]" * n for n in (33, 1000, 200_000)] + [b'{"where":' * n + b"1" + b"}" * n for n in (33, 50_000)]
    inside = [b'{"text":"a","where":' + b'{"a":' * n + b"1" + b"}" * n + b"}" for n in (3, 30, 5000)]
    wide = [
        b"[" + b"0," * 2_000_000 + b"0]", b'{"text":"a","fields":{' + b",".join(b'"%d":1' % n for n in range(300_000)) + b"}}",
        b'{"text":"' + b"a" * 5_000_000 + b'"}', b'{"input":[' + b'"a",' * 50_000 + b'"a"]}',
        b'{"input":[' + b"[1]," * 9_000 + b"[1]]}",
        b'{"items":[' + b'{"id":"a"},' * 90_000 + b'{"id":"a"}]}', b'{"ids":[' + b'"a",' * 90_000 + b'"a"]}',
        b'{"' + b'\\"' * 2_000_000, b'{"text":"a","where":{"a":[' + b"1," * 50_000 + b"1]}}", b" " * 40_000_000,
    ]  # fmt: skip
    odd = [
        b"", b"null", b"true", b"0", b'""', b"[]", b"{}", b"{", b"}", b"NaN", b'{"k":NaN,"text":"a"}', b'{"k":1e999,"text":"a"}',
        b'{"k":' + b"9" * 5000 + b',"text":"a"}', b'{"k":-1e-999,"text":"a"}', b'{"text":"a","text":"b"}',
        b'{"__proto__":{"a":1}}',
        b'{"text":"a","__class__":"x"}', b'{"text":"\\u0000"}', b'{"text":"\\ud800"}', b'{"text":"\\udfff\\ud800"}',
        b"{'text':'a'}",
        b'{"text":"a"} x', b'{"text":"a"}{"text":"b"}', b'/**/{"text":"a"}', b'{"text":"a",}', b'{"text":01}', b'{"text":"a\tb"}',
        b'{"text":"\xff"}', b"\xef\xbb\xbf{}", '{"text":"a"}'.encode("utf-16"), '{"text":"a"}'.encode("utf-32"), b"\0" * 50,
        b"text=a",
        b"--x\r\nContent-Disposition: form-data\r\n\r\n", b"<?xml version='1.0'?>", b'{"$ref":"file:///etc/passwd"}',
    ]  # fmt: skip
    for route in ROUTES:
        for number, body in enumerate([*deep, *closed, *inside, *wide, *odd]):
            yield Case("json", f"{route} {number}", scene.request("POST", route, body))


VALUES: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, 5e-324, "", " ", "\0", "\x1b[31m",
    "a" * 100_000, "ä" * 3000, "\u202e", "😀" * 999, "\ud83d", "../../etc/passwd", "/etc/passwd", "C:\\x", "${jndi:ldap://x}",
    "' OR 1=1 --",
    "%00", "%s%n", "__proto__", "nan", "<script>", [], [[]], [None], [[[[1]]]], ["a"] * 5000, {}, {"a": 1}, {"": ""},
    {"data": None},
    {"gte": "a", "lte": 1}, {"$ne": 1}, [{}], [1, "a", None, {}],
)  # fmt: skip
BODIES: Final[tuple[tuple[str, str, dict[str, Any]], ...]] = (
    ("POST", "/search", {
        "text": "a", "image": {"data": "AA"}, "parts": ["a"], "instruction": "b", "modality": "text", "route": "direct", "k": 3,
        "offset": 0, "where": {"a": 1}, "exact": True, "unknown": 1,
    }),
    ("POST", "/v1/embeddings", {
        "model": "traceir", "input": "a", "input_type": "query", "instruction": "b", "route": "direct",
        "encoding_format": "float",
        "dimensions": 8, "user": "u", "messages": [],
    }),
    ("POST", "/items", {"items": [{"id": "hostile"}]}),
    ("DELETE", "/items", {"ids": ["hostile"]}),
    ("POST", "/search/stream", {"text": "a", "route": "auto", "k": 1}),
)  # fmt: skip


def wrong_types(scene: Scene, draw: random.Random) -> Iterator[Case]:
    for method, path, whole in BODIES:
        for name in whole:
            for number, value in enumerate(VALUES):
                required = {"text": "a"} if path.startswith("/search") else {}
                body = json.dumps({**required, name: value}).encode()
                yield Case("types", f"{method} {path} {name} {number}", scene.request(method, path, body))
    for number, value in enumerate(VALUES):
        nested = (
            ("/search", {"image": {"data": value}}), ("/search", {"image": {"item": value}}), ("/search",
            {"image": {"url": value}}),
            ("/search", {"parts": [value]}), ("/search", {"text": "a", "where": {"n": value}}),
            ("/search", {"text": "a", "where": {"n": {"gte": value}}}), ("/search", {"text": "a", "where": {"id": [value]}}),
            ("/items", {"items": [value]}), ("/items", {"items": [{"id": value, "text": "a"}]}),
            ("/items", {"items": [{"id": "hostile", "text": value}]}),
            ("/items", {"items": [{"id": "hostile", "text": "a", "fields": value}]}),
            ("/items", {"items": [{"id": "hostile", "text": "a", "fields": {"n": value}}]}),
            ("/items", {"items": [{"id": "hostile", "text": "a", "fields": {str(value)[:300]: 1}}]}),
            ("/v1/embeddings", {"input": [value]}), ("/v1/embeddings", {"input": [{"text": value}]}),
            ("/v1/embeddings", {"input": [{"image": value}]}), ("/v1/embeddings", {"messages": [value]}),
            ("/v1/embeddings", {"messages": [{"role": value, "content": "a"}]}),
            ("/v1/embeddings", {"messages": [{"role": "user", "content": value}]}),
            ("/v1/embeddings", {"messages": [{"role": "user", "content": [{"type": value, "text": value}]}]}),
        )  # fmt: skip
        for path, required in nested:
            yield Case("types", f"{path} {next(iter(required))} value {number}", scene.post(path, required))
    for name in ("offset", "limit", "side", "x" * 3000):
        for number in ("", "-1", "1e9", "99999999999999999999", "NaN", "0x10", "%00", "a", "1&limit=2", "[]", "%ff", "٣"):
            for path in ("/items", "/pictures/aG9zdGlsZQ"):
                yield Case("types", f"{path}?{name[:9]}={number}", scene.request("GET", f"{path}?{name}={number}"))


# Paths and addresses


def paths(scene: Scene, draw: random.Random) -> Iterator[Case]:
    secret = scene.secret
    up = (
        "../" * 12,
        "..%2f" * 12,
        "%2e%2e/" * 12,
        "..%252f" * 12,
        "..\\" * 12,
        "..%5c" * 12,
        "....//" * 12,
        "%c0%ae%c0%ae/" * 12,
        "..;/" * 12,
    )
    tricks = [f"{prefix}{file.lstrip('/')}" for prefix in up for file in (secret, "/etc/passwd")]
    tricks += [
        secret, f"//{secret}", f"file://{secret}", f"%2f{secret.lstrip('/')}", f"{secret}%00.png", f"{secret}\0.png", "", ".",
        "..", "%00",
        "%", "%zz", "%ff%fe", "a" * 5000, "~root", "/proc/self/environ", "con", "index.sqlite", "keys.json", "..%00/", "*",
        "{id}", "a/../../b",
        "%0d%0aset-cookie:x=1", "%E2%80%AE", "..%c1%9c", "%u002e", "\\\\host\\share", "app.py", "../app.py", "../../keys.py",
    ]  # fmt: skip
    for trick in tricks:
        plain = trick.replace("\0", "%00")
        for path in ("/items/{}", "/items/{}/picture", "/pictures/{}", "/static/{}", "/{}", "/v1/{}", "/items/hostile/{}"):
            yield Case("path", path.format(plain[:60]), scene.request("GET", path.format(plain)))
        name = base64.urlsafe_b64encode(trick.encode()).decode().rstrip("=")
        yield Case("path", f"picture of {trick[:60]!r}", scene.request("GET", f"/pictures/{name}"))
        yield Case("path", f"delete {trick[:60]!r}", scene.request("DELETE", f"/items/{plain}"))
        yield Case("path", f"item {trick[:60]!r}", scene.post("/search", {"image": {"item": trick}}))
        yield Case("path", f"data {trick[:60]!r}", scene.post("/search", {"image": {"data": trick}}))
        yield Case("path", f"id {trick[:60]!r}", scene.post("/items", {"items": [{"id": trick, "text": "a"}]}))
        fields = {"image": trick, "file": trick, "path": trick}
        yield Case(
            "path", f"fields {trick[:60]!r}", scene.post("/items", {"items": [{"id": "f", "text": "a", "fields": fields}]})
        )


def private_urls(scene: Scene, draw: random.Random) -> Iterator[Case]:
    hosts = (
        "127.0.0.1 127.1 127.0.1 0 0.0.0.0 2130706433 0x7f000001 0x7f.0.0.1 0177.0.0.1 017700000001 0177.0.0.0x1 127.0.0.1. "
        "127.000.000.001 "
        "localhost LOCALHOST localhost. ip6-localhost [::1] [::] [0:0:0:0:0:0:0:1] [::ffff:127.0.0.1] [::ffff:7f00:1] "
        "[::127.0.0.1] "
        "[64:ff9b::7f00:1] [2002:7f00:1::] [::1%lo] [::1%25lo] [fe80::1] 127.127.127.127 ①②⑦.⓪.⓪.① 127。0。0。1 "
        "１２７.0.0.1 %31%32%37.0.0.1 "
        "127.0.0.1%00.example.org 127.0.0.1%23.example.org example.org@127.0.0.1 127.0.0.1#@example.org example.org%40127.0.0.1 "
        "127.0.0.1.nip.io localtest.me 169.254.169.254 [fd00:ec2::254] 100.100.100.200 10.0.0.1 192.168.0.1 172.16.0.1 "
        "metadata.google.internal"
    ).split()
    forms = [f"{scheme}://{host}:{scene.canary}/x.png" for scheme in ("http", "https") for host in hosts]
    forms += [
        f"{scheme}://{LOCAL}:{scene.canary}/"
        for scheme in "ftp gopher dict ldap ws file jar:http HTTP hTTps unix http+unix tftp sftp".split()
    ]
    forms += [
        f"//{LOCAL}:{scene.canary}/", f"http:{LOCAL}:{scene.canary}/", f"http:/{LOCAL}:{scene.canary}/",
        f"http:\\\\{LOCAL}:{scene.canary}\\",
        f"https://example.org\\@{LOCAL}:{scene.canary}/", f"http://{LOCAL}:{scene.canary}\t/", f" http://{LOCAL}:{scene.canary}/",
        f"http://a\r\nHost: b@{LOCAL}:{scene.canary}/", f"http://{LOCAL}:{scene.canary}?.png",
        f"http://{LOCAL}:{scene.canary}:80/",
        f"file://{scene.secret}", "file:///etc/passwd", "file://localhost/etc/passwd", "data:text/html,<script>",
        "javascript:alert(1)", "",
        "http://", "https://[", "https://]", "https://:443", "https://" + "a" * 5000, "https://" + "a." * 900 + "org",
        "x" * 9000, "about:blank",
    ]  # fmt: skip
    for url in forms:
        part = {"type": "image_url", "image_url": {"url": url}}
        yield Case("url", url[:80], scene.post("/search", {"image": {"url": url}}))
        yield Case("url", url[:80], scene.post("/items", {"items": [{"id": "hostile", "image": {"url": url}}]}))
        yield Case("url", url[:80], scene.post("/v1/embeddings", {"messages": [{"role": "user", "content": [part]}]}))
        yield Case("url", url[:80], scene.post("/v1/embeddings", {"input": [{"image": url}]}))
        yield Case("url", url[:80], scene.post("/search", {"image": {"data": url}}))


# HTTP itself


def header_tricks(scene: Scene, draw: random.Random) -> Iterator[Case]:
    body = b'{"text":"a","route":"direct"}'
    one_each = [
        "X: " + "a" * 20_000, "X: " + "a" * 200_000, "\r\n".join(f"X-{n}: a" for n in range(500)), "X: a\0b", "X: \x01", "X : a",
        ": a", "X",
        "X: a\r\n folded", "X: a\nY: b", "Content-Length: 5", "Content-Length: 999999999999", "Content-Length: -1",
        "Content-Length: 1e3",
        "Content-Length: 0x10", "Content-Length: 29, 29", "Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: xchunked", "Transfer-Encoding : chunked", "Content-Encoding: gzip", "Content-Encoding: br",
        "Expect: 100-continue",
        "Expect: nonsense", "Upgrade: websocket", "Upgrade: h2c", "Range: bytes=0-99999999999", "Range: bytes=-1,-2,-3",
        "If-None-Match: *",
        "X-Forwarded-For: 127.0.0.1", "X-Forwarded-Host: evil.test", "X-Forwarded-Proto: https",
        "Forwarded: for=127.0.0.1;host=evil.test",
        "X-HTTP-Method-Override: DELETE", "X-Original-URL: /metrics", "X-Rewrite-URL: /metrics", "Cookie: " + "a=b; " * 3000,
        "Accept: " + "*/*," * 3000, "Accept-Encoding: " + "gzip;q=0," * 900, "Origin: null", "Origin: https://evil.test",
        "Origin: http://[",
        "Referer: https://evil.test", "Host: evil.test", "Content-Type: text/plain",
        "Content-Type: application/json; charset=utf-16",
        "Content-Type: multipart/form-data; boundary=x", "Content-Type: " + "a" * 5000, "Authorization: Bearer",
        "Authorization: Bearer x",
        "Sec-Fetch-Site: cross-site", "TE: trailers", "Trailer: Host", "Via: 1.1 x", "Max-Forwards: 0",
        "Proxy: http://evil.test", "\udcff: \udcff",
        "Last-Event-ID: \udcff", "Date: never", "If-Modified-Since: never", "X-Request-Id: a\udc80b",
        "Connection: upgrade, keep-alive, close",
    ]  # fmt: skip
    for number, extra in enumerate(one_each):
        for method, path, sent in (
            ("POST", "/search", body),
            ("GET", "/items", None),
            ("GET", "/static/x", None),
            ("GET", "/", None),
        ):
            yield Case("header", f"{path} {extra[:40]!r} {number}", scene.request(method, path, sent, headers=[extra]))
    plain = scene.request("POST", "/search", body)
    for number, (old, new) in enumerate((
        (b"HTTP/1.1", b"HTTP/1.0"), (b"HTTP/1.1", b"HTTP/0.9"), (b"HTTP/1.1", b"HTTP/2.0"), (b"HTTP/1.1", b"HTTP/9.9"),
        (b"HTTP/1.1", b""),
        (b"HTTP/1.1", b"X"), (b"POST", b"G" * 5000), (b"POST", b"po st"), (b"POST", b""), (b"POST", b"TRACE"), (b"POST",
        b"CONNECT"),
        (b"POST", b"OPTIONS"), (b"POST", b"PROPFIND"), (b"POST", b"PUT"), (b"POST", b"PATCH"), (b"POST", b"HEAD"), (b"POST",
        b"PRI"),
        (b"/search", b"*"), (b"/search", b"http://evil.test/search"), (b"/search", b"//evil.test/search"), (b"/search",
        b"/search?" + b"a" * 90_000),
        (b"/search", b"/" + b"a/" * 30_000), (b"/search", b"/search%00"), (b"/search", b"/search\xff"), (b"/search", b"/%ff%fe"),
        (b"/search", b""),
        (b"/search", b"search"), (b"/search", b"/search#x"), (b"/search", b"/./search"), (b"/search", b"/x/../search"),
        (b"/search", b"/SEARCH"),
        (b"/search", b"/search/"), (b"/search", b"/search;x"), (b"\r\n", b"\n"), (b"\r\n", b"\r"), (b"\r\n\r\n", b"\r\n\0\r\n"),
        (b"Host: ", b"Host: evil.test:"), (b"Host: ", b"X: "), (b"Content-Length: 29", b"Content-Length: 2"),
    )):  # fmt: skip
        yield Case("header", f"bytes {number} {new[:30]!r}", plain.replace(old, new, 1))
    head = scene.request("POST", "/search", headers=["Content-Type: application/json", "Transfer-Encoding: chunked"])
    for number, chunks in enumerate((
        b"5\r\n{\"te", b"zz\r\nx\r\n", b"-1\r\n", b"ffffffffffffffff\r\nx", b"7fffffff\r\nx",
        b"1;" + b"a" * 100_000 + b"\r\n{\r\n0\r\n\r\n",
        b"0\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", b"1\r\n{\r\n" * 20_000 + b"0\r\n\r\n",
        b"100000\r\n" + b" " * 0x100000 + b"\r\n",
        (b"100000\r\n" + b" " * 0x100000 + b"\r\n") * 40 + b"0\r\n\r\n", b"0\r\n\r\n", b"1 \r\n{\r\n0\r\n\r\n",
        b"+1\r\n{\r\n0\r\n\r\n",
    )):  # fmt: skip
        yield Case("header", f"chunks {number}", head + chunks)
    for number, raw in enumerate((
        b"", b"\r\n" * 500, b"\0" * 1000, b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(300),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\r\n\r\n", b"GET", b"SSH-2.0-x\r\n", b"EHLO x\r\n", b"*1\r\n$4\r\nINFO\r\n", plain * 3,
        plain + b"GET /metrics HTTP/1.1\r\n\r\n",
        scene.request("GET", "/health") * 500, draw.randbytes(50_000),
    )):  # fmt: skip
        yield Case("header", f"raw {number}", raw)


def bad_text(scene: Scene, draw: random.Random) -> Iterator[Case]:
    pieces = [
        b"\xff",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xf5\x80\x80\x80",
        b"\xe2\x82",
        b"\x80",
        b"\xfe\xff",
        b"\\ud800",
        b"\\udc00\\ud800",
        b"\\u0000",
        b"\\uFFFF",
        b"\\u202e",
        b"\xf0\x9f\x98",
        b"\\x41",
        b"\\u12",
        b"\\",
        b"\\u{41}",
        b"\x7f",
        b"\x1b]0;x\x07",
        b"\\u0085",
    ]
    for number, piece in enumerate(pieces):
        for path, body in (
            ("/search", b'{"text":"%s"}'), ("/search", b'{"text":"a","instruction":"%s"}'), ("/search",
            b'{"text":"a","where":{"%s":1}}'),
            ("/search", b'{"text":"a","where":{"id":"%s"}}'), ("/search", b'{"%s":1}'), ("/search", b'{"image":{"item":"%s"}}'),
            ("/search/stream", b'{"text":"%s"}'), ("/items", b'{"items":[{"id":"%s","text":"a"}]}'),
            ("/items", b'{"items":[{"id":"hostile","text":"%s"}]}'), ("/items",
            b'{"items":[{"id":"hostile","text":"a","fields":{"%s":"%s"}}]}'),
            ("/v1/embeddings", b'{"input":"%s"}'), ("/v1/embeddings", b'{"input":"a","model":"%s"}'), ("/v1/embeddings",
            b'{"input":"a","route":"%s"}'),
        ):  # fmt: skip
            yield Case("text", f"{path} {number}", scene.request("POST", path, body.replace(b"%s", piece)))


def strangers(scene: Scene, draw: random.Random) -> Iterator[Case]:
    """Requests with keys that are none; only where the server has keys."""
    if scene.key is None:
        return
    good = scene.key
    wrong = [
        "", "Bearer", "Bearer ", "Basic " + base64.b64encode(f"x:{good}".encode()).decode(), good, f"Bearer {good[:-1]}",
        f"Bearer {good}x",
        f"Bearer {good.upper()}", f"Bearer {good}\tx", f"Bearer x {good}", f"Bearer\0{good}", f"Token {good}", "Bearer null",
        "Bearer tir_" + "A" * 43,
        "Bearer " + "a" * 9000, "Bearer *", "Bearer ' OR 1=1", "Bearer \udcff", f"Bearer {good};",
        f"Bearer {good[:20]}%00{good[20:]}",
    ]  # fmt: skip
    for value in wrong:
        for method, path, body in (
            ("POST", "/search", b'{"text":"a"}'), ("POST", "/items", b'{"items":[{"id":"x","text":"a"}]}'), ("DELETE",
            "/items/x", None),
            ("GET", "/items", None), ("GET", "/metrics", None), ("GET", "/page/config", None), ("POST", "/v1/embeddings",
            b'{"input":"a"}'),
        ):  # fmt: skip
            yield Case("key", f"{path} {value[:30]!r}", scene.request(method, path, body, key=value), anonymous=True)


def damaged_bodies(scene: Scene, draw: random.Random) -> Iterator[Case]:
    """Good requests of every route with a few bytes changed, without end."""
    number = 0
    while True:
        method, path, whole = draw.choice(BODIES)
        names = draw.sample(sorted(whole), draw.randrange(1, min(4, len(whole)) + 1))
        raw = bytearray(json.dumps({"text": "a", **{name: whole[name] for name in names}}).encode())
        for _ in range(draw.randrange(1, 6)):
            position = draw.randrange(len(raw))
            if draw.random() < 0.5:
                raw[position] = draw.choice(b'{}[]",:\\0eE-+.nul \xff\0')
            else:
                raw[position:position] = draw.choice((b"null", b"{}", b"[]", b"1e99", b'"', b"\\u", draw.randbytes(3)))
        number += 1
        yield Case("damage", f"{path} {number}", scene.request(method, path, bytes(raw)))
