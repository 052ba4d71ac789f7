"""Does the server stay whole under hostile requests?

`python -m benchmarks.hostile --url http://127.0.0.1:8080 [--key-file FILE] [--pid N]` sends at least 5,000 of them to a server
that runs already: broken pictures of every format Pillow reads, decompression bombs, huge, deep and wrong JSON, path tricks,
private addresses in all notations, header tricks, bad text, wrong keys, slow bodies. Ends with status 1 on any answer of 500 or
more, any answer that holds a secret file's content, any connection to a canary that this script opens on loopback, any right
granted to a wrong key, any request left hanging, or a server that is gone; with status 2 where it cannot measure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from benchmarks.hostile_cases import Case, Scene, all_cases

OPEN_ENDED: Final = frozenset({"header", "slow"})
"""Families with requests that never end, which a server may keep waiting for; they are cut off after WAIT_OPEN_S."""
WAIT_S: Final = 90.0
WAIT_OPEN_S: Final = 5.0
MOST_ANSWER: Final = 32 * 1024 * 1024
SLOW_CLIENTS: Final = 24
TRIES: Final = 4


class GoneError(Exception):
    """The server does not answer any more."""


@dataclass(slots=True)
class Found:
    """What came of the requests."""

    statuses: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    faults: list[str] = field(default_factory=list)
    limited: int = 0

    def add(self, case: Case, status: str, body: bytes, secret: bytes) -> None:
        self.statuses[case.family][status] += 1
        place = f"{case.family}: {case.name}"
        if status.startswith("5"):
            self.faults.append(f"{status} to {place}: {body[:300]!r}")
        if status == "hung":
            self.faults.append(f"no answer within {WAIT_S:g} s to {place}")
        if secret in body or b"root:x:0:" in body:
            self.faults.append(f"a file's content in the answer to {place}")
        if case.anonymous and status.startswith("2"):
            self.faults.append(f"{status} without a key to {place}")
        self.limited += status == "429"


@dataclass(slots=True)
class Canary:
    """A listener on loopback that nothing may ever connect to."""

    port: int = 0
    visits: list[str] = field(default_factory=list)

    async def open(self) -> None:
        async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.visits.append(str(writer.get_extra_info("peername")))
            writer.close()

        server = await asyncio.start_server(visit, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        with suppress(OSError):  # where there is no IPv6
            await asyncio.start_server(visit, "::1", self.port)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True, metavar="URL", help="base URL of a running server")
    parser.add_argument(
        "--key-file", type=Path, metavar="FILE", help="a file with a key of both scopes and a high limit of requests"
    )
    parser.add_argument("--pid", type=int, metavar="N", help="the server's process, for its memory")
    parser.add_argument("--requests", type=int, default=6000, metavar="N", help="at least so many (default: 6000)")
    parser.add_argument("--together", type=int, default=8, metavar="N", help="at a time (default: 8)")
    parser.add_argument("--family", action="append", metavar="NAME", help="only these; repeatable")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    return asyncio.run(attack(options))


async def attack(options: argparse.Namespace) -> int:
    parts = urlsplit(options.url)
    host, port = parts.hostname or "", parts.port or 80
    key = options.key_file.read_text().strip() if options.key_file else None
    if (await exchange(Scene(f"{host}:{port}", None, 0, "").request("GET", "/ready"), host, port, 60))[0] != "200":
        print("the server is not ready (GET /ready); start it and wait for its model", file=sys.stderr)
        return 2
    canary, found = Canary(), Found()
    await canary.open()
    marker = secrets.token_hex(24).encode()
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder) / "secret.png"
        secret.write_bytes(marker)
        scene = Scene(f"{host}:{port}", key, canary.port, str(secret))
        cases = [
            case
            for case in all_cases(scene, options.seed, options.requests)
            if not options.family or case.family in options.family
        ]
        before, started = memory_mb(options.pid), time.monotonic()
        try:
            await check_alive(host, port)
            await send_all(cases, host, port, options.together, found, marker)
            if not options.family or "slow" in options.family:
                await send_slowly(scene, host, port, found, marker)
            await asyncio.sleep(2.0)  # time for a late visit to the canary
            await check_alive(host, port)
        except GoneError as dead:
            found.faults.append(str(dead))
    seconds = time.monotonic() - started
    found.faults += [f"the canary was visited by {visit}" for visit in canary.visits]
    total = sum(sum(one.values()) for one in found.statuses.values())
    memory = [before, memory_mb(options.pid)]
    report(found, total, seconds, memory)
    if options.out:
        options.out.write_text(json.dumps(summary(found, total, seconds, memory, options), indent=1) + "\n")
    if found.faults:
        return 1
    if found.limited > total // 10:
        print(f"{found.limited} requests were turned away for coming too fast; give the key a higher limit", file=sys.stderr)
        return 2
    return 0


async def send_all(cases: Sequence[Case], host: str, port: int, together: int, found: Found, secret: bytes) -> None:
    """Every case, so many at a time; after each 250 the server must still say that it is well."""
    gate, done = asyncio.Semaphore(together), 0

    async def one(case: Case) -> None:
        nonlocal done
        async with gate:
            status, body = await send(case, host, port)
        found.add(case, status, body, secret)
        done += 1
        if done % 250 == 0:
            print(f"{done} of {len(cases)}, {len(found.faults)} faults", file=sys.stderr)
            await check_alive(host, port)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_quietly(one(case))) for case in cases]
    dead = next((task.result() for task in tasks if task.result() is not None), None)
    if dead is not None:
        raise dead


async def _quietly(work: Any) -> GoneError | None:
    try:
        await work
    except GoneError as dead:
        return dead
    return None


async def send(case: Case, host: str, port: int) -> tuple[str, bytes]:
    """The status ("closed" without one) and body; a 429 is asked again after its Retry-After, a few times."""
    status, body = "closed", b""
    for _ in range(TRIES):
        status, head, body = await exchange(case.raw, host, port, WAIT_OPEN_S if case.family in OPEN_ENDED else WAIT_S)
        if status == "hung" and case.family in OPEN_ENDED:
            return "waiting", body
        if status != "429" or case.anonymous:
            break
        wait = head.lower().partition(b"retry-after:")[2].partition(b"\r\n")[0].strip()
        await asyncio.sleep(min(5.0, float(wait or 1)))
    return status, body


async def exchange(raw: bytes, host: str, port: int, seconds: float) -> tuple[str, bytes, bytes]:
    """Sends bytes and reads what comes until the server closes, or an answer is whole: status, head, body."""
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), 30)
    except (OSError, TimeoutError) as error:
        raise GoneError(f"the server takes no connection any more: {error}") from error
    answer = bytearray()
    try:
        async with asyncio.timeout(seconds):
            sending = asyncio.create_task(_write(writer, raw))
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


async def _write(writer: asyncio.StreamWriter, raw: bytes) -> None:
    with suppress(OSError):
        writer.write(raw)
        await writer.drain()


async def send_slowly(scene: Scene, host: str, port: int, found: Found, secret: bytes) -> None:
    """Bodies and heads that come a byte at a time, many together; meanwhile the server must answer others."""
    body = b'{"text":"a"}'
    whole = scene.request("POST", "/search", body, headers=["X-Slow: 1"])
    start = len(whole) - len(body)

    async def drip(number: int) -> None:
        try:
            _, writer = await asyncio.open_connection(host, port)
        except OSError as error:
            raise GoneError(f"the server takes no connection any more: {error}") from error
        with suppress(OSError):
            begin = start if number % 2 else 0
            writer.write(whole[:begin])
            for place in range(begin, min(begin + 8, len(whole) - 1)):
                writer.write(whole[place : place + 1])
                await writer.drain()
                await asyncio.sleep(0.5)
        writer.close()
        found.add(Case("slow", f"drip {number}", b""), "left", b"", secret)

    drips = [asyncio.create_task(_quietly(drip(number))) for number in range(SLOW_CLIENTS)]
    await asyncio.sleep(1.0)
    for _ in range(5):
        await check_alive(host, port)
    for dead in await asyncio.gather(*drips):
        if dead is not None:
            raise dead


async def check_alive(host: str, port: int) -> None:
    status, _, body = await exchange(Scene(f"{host}:{port}", None, 0, "").request("GET", "/health"), host, port, 60)
    if status != "200" or b"ok" not in body:
        raise GoneError(f"the server does not say that it is well: {status} {body[:200]!r}")


def memory_mb(pid: int | None) -> float | None:
    """Resident memory of a process, where the system tells it."""
    if pid is None:
        return None
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    return None


def report(found: Found, total: int, seconds: float, memory: Sequence[float | None]) -> None:
    print("| family | requests | answers |")
    print("|---|---|---|")
    for family, counts in sorted(found.statuses.items()):
        told = ", ".join(f"{status}: {count}" for status, count in sorted(counts.items()))
        print(f"| {family} | {sum(counts.values())} | {told} |")
    print(f"\n{total} requests in {seconds:.0f} s, {len(found.faults)} faults")
    if memory[0] is not None and memory[1] is not None:
        print(f"memory of the server: {memory[0]:.0f} MB before, {memory[1]:.0f} MB after")
    for fault in found.faults[:50]:
        print(f"FAULT {fault}", file=sys.stderr)


def summary(
    found: Found, total: int, seconds: float, memory: Sequence[float | None], options: argparse.Namespace
) -> dict[str, Any]:
    return {
        "requests": total,
        "seconds": round(seconds, 1),
        "seed": options.seed,
        "memory_mb": memory,
        "answers": {family: dict(counts) for family, counts in sorted(found.statuses.items())},
        "faults": found.faults,
    }


if __name__ == "__main__":
    sys.exit(main())
