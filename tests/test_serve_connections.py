"""What stands before the requests: connections that never end, callers that take everything, clients that do not read."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import uvicorn
from conftest import Running
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from traceir.serve import connections
from traceir.serve.connections import ConnectionLimits, settings
from traceir.serve.security import Message, Receive, Send

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
DEAF = b"POST /deaf HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
HEAD = 64 * 1024
PARSERS = [HttpToolsProtocol, H11Protocol]
Address = tuple[str, int]


async def application(scope: Message, receive: Receive, send: Send) -> None:
    """Tells how long the body is; `/deaf` answers without reading it, `/large` with 64 MiB."""
    size = 0
    while scope["path"] != "/deaf":
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message["body"])
        if not message["more_body"]:
            break
    answer = bytes(64 * 1024 * 1024) if scope["path"] == "/large" else str(size).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(answer)).encode())]})
    for start in range(0, len(answer), 65_536):
        piece = answer[start : start + 65_536]
        await send({"type": "http.response.body", "body": piece, "more_body": start + len(piece) < len(answer)})


@contextmanager
def listening(parser: type, limits: ConnectionLimits) -> Iterator[Address]:
    """A server of `application` in a thread: where it listens."""
    server = uvicorn.Server(uvicorn.Config(application, log_level="critical", lifespan="off", **settings(limits, parser)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


@pytest.fixture(params=PARSERS, scope="module")
def patient(request: pytest.FixtureRequest) -> Iterator[Address]:
    """A server whose deadlines never come."""
    with listening(request.param, ConnectionLimits(unread=1 << 20)) as address:
        yield address


@pytest.fixture(params=PARSERS)
def hasty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Address]:
    """A server whose deadlines come at once."""
    monkeypatch.setattr(connections, "TICK_S", 0.02)
    with listening(request.param, ConnectionLimits(head_s=0.2, unread_s=0.2, write_s=0.2)) as address:
        yield address


def connected(address: Address) -> socket.socket:
    return socket.create_connection(address, timeout=20)


def talk(address: Address, *pieces: bytes, endless: bytes = b"", most: int = 8 << 20) -> tuple[bytes, int]:
    """Sends the pieces, then `endless` over and over: what is answered until the server closes, and how much it took."""
    taken = 0
    with connected(address) as connection:
        with suppress(OSError):
            for piece in pieces:
                connection.sendall(piece)
            while endless and taken < most:
                connection.sendall(endless)
                taken += len(endless)
        return read_all(connection), taken


def read_all(connection: socket.socket) -> bytes:
    answer = b""
    with suppress(ConnectionError):
        while data := connection.recv(65_536):
            answer += data
    return answer


def next_answer(connection: socket.socket, *pieces: bytes) -> bytes:
    """Sends the pieces: the next answer of a connection that stays open, its body of one or two digits included."""
    for piece in pieces:
        connection.sendall(piece)
    answer = b""
    while not answer.partition(b"\r\n\r\n")[2]:
        data = connection.recv(1000)
        assert data, answer
        answer += data
    return answer


def ask(address: Address, *pieces: bytes) -> bytes:
    with connected(address) as connection:
        return next_answer(connection, *pieces)


ENDLESS = {
    "header": (b"GET / HTTP/1.1\r\nX: ", b"a" * 10_000),
    "headers": (b"GET / HTTP/1.1\r\n", b"X: a\r\n" * 500),
    "request line": (b"GET /", b"a" * 10_000),
    "method": (b"", b"G" * 10_000),
    "empty lines": (b"", b"\r\n" * 1000),
    "second header": (GET + b"GET / HTTP/1.1\r\nX: ", b"a" * 10_000),
    "trailer": (CHUNKED + b"1\r\na\r\n0\r\nX: ", b"a" * 10_000),
    "trailers": (CHUNKED + b"1\r\na\r\n0\r\n", b"X: a\r\n" * 500),
    "chunk extension": (CHUNKED + b"1;", b"a" * 10_000),
    "chunk of one byte": (CHUNKED, b"1;" + b"a" * 5000 + b"\r\na\r\n"),
    "requests sent ahead": (b"", GET * 20_000),
}
MALFORMED = [b"x y: a", b"x: a\x00b", b"x: a\rb", b"content-length: -1", b"content-length: +1", b"content-length: " + b"9" * 40,
             b"content-length: 1\r\ncontent-length: 2"]  # fmt: skip


def test_what_is_no_body_is_cut_while_it_comes_and_no_head_at_all_is_refused(patient: Address) -> None:
    for name, (start, more) in ENDLESS.items():
        answer, taken = talk(patient, start, endless=more)
        assert taken < 8 << 20, name
        if name in ("header", "headers", "request line"):
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 431 ") and json.loads(body)["error"]["code"] == "headers_too_large"
    for header in MALFORMED:
        assert talk(patient, POST + header + b"\r\n\r\n")[0].startswith(b"HTTP/1.1 400 "), header
    lines = b"".join(b"X-%d: %s\r\n" % (number, b"a" * 1000) for number in range(64))
    whole = GET[:-2] + lines + b"\r\n"
    assert HEAD - 1100 < len(whole) < HEAD
    assert ask(patient, *(whole[start : start + 900] for start in range(0, len(whole), 900))).endswith(b"\r\n\r\n0")
    assert talk(patient, whole[:-2] + lines + b"\r\n")[0].startswith(b"HTTP/1.1 431")


def test_large_bodies_of_many_chunks_early_answers_and_keep_alive_pass(patient: Address) -> None:
    chunks = (b"400\r\n" + b"a" * 1024 + b"\r\n") * 4000 + b"0\r\nX: a\r\n\r\n"
    with connected(patient) as connection:
        for request, size in ((GET, b"0"), (CHUNKED + chunks, b"4096000"), (CHUNKED + b"1\r\na\r\n0\r\n\r\n", b"1"), (GET, b"0")):
            assert next_answer(connection, request).endswith(b"\r\n\r\n" + size)
    answer, _ = talk(patient, DEAF % 500_000, bytes(200_000), bytes(300_000))
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"\r\n\r\n0"), "who still sends reads an early answer"
    assert talk(patient, DEAF % (1 << 40), endless=bytes(100_000), most=64 << 20)[1] < 64 << 20
    with connected(patient) as connection:  # who was refused before its small body came asks again, as pools do
        first = next_answer(connection, DEAF % 10)
        connection.sendall(b"0123456789" + GET)
        connection.shutdown(socket.SHUT_WR)
        assert first.startswith(b"HTTP/1.1 200") and read_all(connection).startswith(b"HTTP/1.1 200")


def test_what_does_not_end_is_given_up_and_others_are_served(hasty: Address) -> None:
    for start, status in ((b"", b""), (b"GET / HTTP/1.1\r\nX: a\r\n", b" 408 "), (GET, b" 200 "), (GET + b"GET / HT", b" 200 "),
                        (DEAF % 9_999_999 + b"a", b" 200 ")):  # fmt: skip
        answer, _ = talk(hasty, start)  # returns, since the server closes
        assert answer.partition(b"\r\n")[0][8:13] == status and answer.count(b"HTTP/1.1") == bool(status)
    with connected(hasty) as slow, connected(hasty) as deaf:
        deaf.sendall(GET.replace(b"/ ", b"/large "))
        with suppress(OSError):
            for byte in b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000:
                slow.sendall(bytes([byte]))
                time.sleep(0.005)
        assert ask(hasty, GET).endswith(b"0")
        with suppress(OSError):
            while True:  # until the server gives up, which the kernel tells only to who sends
                deaf.sendall(b"\r\n")
                time.sleep(0.01)
        assert len(read_all(deaf)) < 64 << 20


@pytest.mark.parametrize("parser", PARSERS)
def test_connections_that_wait_make_room_and_busy_ones_do_not(parser: type) -> None:
    with listening(parser, ConnectionLimits(connections=8)) as address:
        waiting = [connected(address) for _ in range(6)]
        for number in range(12):
            assert ask(address, GET).endswith(b"0"), number
        assert waiting[0].recv(1) == b"", "the one that waited longest went"
        busy = [connected(address) for _ in range(4)]
        for connection in busy:
            connection.sendall(CHUNKED)
        assert talk(address, GET)[0] == b"", "there is no room beside four that are busy"
        assert next_answer(busy[0], b"0\r\n\r\n").endswith(b"0") and ask(address, GET).endswith(b"0")
        for connection in [*waiting, *busy]:
            connection.close()


@pytest.mark.slow
def test_the_server_itself_cuts_heads(running: Running) -> None:
    host, port = running.url.removeprefix("http://").split(":")
    answer, taken = talk((host, int(port)), *ENDLESS["header"][:1], endless=ENDLESS["header"][1])
    assert answer.startswith(b"HTTP/1.1 431 ") and taken < 8 << 20
