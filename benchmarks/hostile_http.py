"""One request of `hostile.py` over HTTP: what is sent, byte for byte, and what comes back."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final
from urllib.parse import urlsplit

from benchmarks.hostile_cases import Scene

MOST_ANSWER: Final = 32 * 1024 * 1024


class GoneError(Exception):
    """The server does not answer any more."""


def address_of(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 80


async def exchange(raw: bytes, host: str, port: int, seconds: float) -> tuple[str, bytes, bytes]:
    """Sends bytes and reads what comes until the server closes, or an answer is whole: status, head, body."""
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), 30)
    except (OSError, TimeoutError) as error:
        raise GoneError(f"the server takes no connection any more: {error}") from error
    answer = bytearray()
    try:
        async with asyncio.timeout(seconds):
            sending = asyncio.create_task(write_all(writer, raw))
            with suppress(OSError):
                while data := await reader.read(65_536):
                    answer += data
                    if len(answer) > MOST_ANSWER:
                        break
            await sending
    except TimeoutError:
        if not answer:
            return "hung", b"", b""
    finally:
        writer.close()
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 100") and body:
        head, _, body = body.partition(b"\r\n\r\n")
    first = head.split(b"\r\n", 1)[0].split(b" ")
    known = len(first) > 1 and first[0].startswith(b"HTTP/") and first[1].isdigit()
    return first[1].decode() if known else "closed", head, body


async def write_all(writer: asyncio.StreamWriter, raw: bytes) -> None:
    with suppress(OSError):
        writer.write(raw)
        await writer.drain()


async def check_alive(host: str, port: int) -> None:
    status, _, body = await exchange(Scene(f"{host}:{port}", None, 0, "").request("GET", "/health"), host, port, 60)
    if status != "200" or b"ok" not in body:
        raise GoneError(f"the server does not say that it is well: {status} {body[:200]!r}")
