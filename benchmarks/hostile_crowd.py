"""What a tenant sees while a neighbour attacks: the part of `hostile.py` that measures.

One tenant searches, one text after the other. It does so alone, then while the key of another tenant attacks in one way, and so
on for each way. Told for each: the tenant's 95th percentile of seconds in the quiet time just before and under attack, what the
attacker was answered, and the peak of the server's memory meanwhile. A search of the tenant that is not answered is a fault.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.hostile_cases import Scene
from benchmarks.hostile_http import GoneError, address_of, exchange, write_all

ASKED: Final = 60
"""Searches of the tenant in each quiet time and under each attack."""
SETTLE_S: Final = 3.0
"""Seconds from the start of an attack, or from its end, that are not measured."""
MIB: Final = 1024 * 1024
SIDE: Final = 5600
LONG: Final = 32_768
_numbers = itertools.count()
_counts = itertools.cycle((1000, 120))


@dataclass(slots=True)
class Phase:
    """What one way of attack came to; seconds are the tenant's."""

    name: str
    quiet: list[float] = field(default_factory=list)
    attacked: list[float] = field(default_factory=list)
    attacker: Counter[str] = field(default_factory=Counter)
    peak_mb: float | None = None

    @property
    def ratio(self) -> float:
        return p95(self.attacked) / p95(self.quiet)

    def as_json(self) -> dict[str, Any]:
        seconds = {"quiet_p95_s": p95(self.quiet), "attacked_p95_s": p95(self.attacked), "ratio": self.ratio}
        return {"name": self.name, **seconds, "peak_mb": self.peak_mb, "attacker": dict(self.attacker)}

    def row(self) -> str:
        statuses = ", ".join(f"{status}: {count}" for status, count in sorted(self.attacker.items()))
        quiet, attacked = (f"{p95(seconds) * 1000:.0f}" for seconds in (self.quiet, self.attacked))
        return f"| {self.name} | {quiet} | {attacked} | {self.ratio:.2f} | {self.peak_mb or 0:.0f} | {statuses} |"


def p95(seconds: Sequence[float]) -> float:
    return float(np.percentile(seconds, 95)) if seconds else float("nan")


@dataclass(slots=True)
class Attacker:
    """One key that attacks: where, as whom, what it was answered, and until when."""

    scene: Scene
    host: str
    port: int
    answers: Counter[str]

    async def post(self, path: str, body: bytes) -> None:
        """One request as fast as it is answered; who is turned away comes back soon, whatever Retry-After says."""
        with suppress(GoneError):
            status, _, _ = await exchange(self.scene.request("POST", path, body), self.host, self.port, 90)
            self.answers[status] += 1
            if status == "429":
                await asyncio.sleep(0.05)

    async def hold(self, raw: bytes, more: bytes = b"", seconds: float = 60.0) -> None:
        """Sends bytes and reads nothing; goes on with `more` until the server closes, or it was as long as this."""
        try:
            _, writer = await asyncio.open_connection(self.host, self.port)
            try:
                await write_all(writer, raw)
                ends = time.monotonic() + seconds
                while not writer.transport.is_closing() and time.monotonic() < ends:
                    if more:
                        writer.write(more)
                        await writer.drain()
                    await asyncio.sleep(0 if len(more) > 1 else 0.25)
            finally:
                writer.transport.abort()
        except OSError:  # the server's way to say no
            pass
        self.answers["dropped"] += 1
        await asyncio.sleep(1.0)


Attack = Callable[[Attacker], Coroutine[Any, Any, None]]


async def embeddings(by: Attacker) -> None:
    await by.post("/v1/embeddings", json.dumps({"input": [f"a red ring, number {next(_numbers)}" for _ in range(200)]}).encode())


async def reasoning(by: Attacker) -> None:
    texts = [f"On the left a ring, number {next(_numbers)}" for _ in range(64)]
    await by.post("/v1/embeddings", json.dumps({"input": texts, "input_type": "query", "route": "reason"}).encode())


async def items(by: Attacker) -> None:
    items = [{"id": f"bulk-{n}", "text": f"a ring {next(_numbers)}", "fields": {"t": "a" * 4000}} for n in range(256)]
    await by.post("/items", json.dumps({"items": items}).encode())


async def bodies(by: Attacker) -> None:
    """32 MiB whose last byte never comes."""
    whole = by.scene.request("POST", "/search", b" " * (32 * MIB))
    await by.hold(whole[:-1])


async def heads(by: Attacker) -> None:
    await by.hold(by.scene.request("GET", "/health")[:-2] + b"X: ", b"a" * 65_536)


async def silence(by: Attacker) -> None:
    await by.hold(b"", b"\r")


async def filters(by: Attacker) -> None:
    """As many values as a filter may have, 28.8 MB of them, other ones each time."""
    await by.post("/search", large_filter().replace(b"@" * 9, b"%09d" % next(_numbers)))


async def tiffs(by: Attacker) -> None:
    await by.post("/search", json.dumps({"image": {"data": float_tiff()}, "route": "direct"}).encode())


async def deaf(by: Attacker) -> None:
    """A thousand hits of 32 kB each, or as many as the server gives at a time, never read."""
    body = json.dumps({"text": "a ring", "route": "direct", "k": next(_counts)}).encode()
    await by.hold(by.scene.request("POST", "/search", body), seconds=12.0)


async def deaf_streams(by: Attacker) -> None:
    body = json.dumps({"text": f"On the left a ring, number {next(_numbers)}", "route": "reason", "k": 120}).encode()
    await by.hold(by.scene.request("POST", "/search/stream", body), seconds=12.0)


ATTACKS: Final[dict[str, tuple[Attack, int]]] = {
    "200-input embeddings, 8 at a time": (embeddings, 8),
    "64 queries that reason, 8 at a time": (reasoning, 8),
    "256 items, 4 at a time": (items, 4),
    "bodies of 32 MiB without their last byte, 16": (bodies, 16),
    "heads that never end, 8": (heads, 8),
    "silent connections, 600": (silence, 600),
    "filters of 28.8 MB, 4 at a time": (filters, 4),
    "float TIFFs of 5600 x 5600, 8 at a time": (tiffs, 8),
    "1000 and 120 hits of 32 kB, not read, 32": (deaf, 32),
    "streams, not read, 64": (deaf_streams, 64),
}


@cache
def large_filter() -> bytes:
    where = {f"f{n}": [f"{'@' * 9}-{number:06}-{'x' * 940}" for number in range(10_000)] for n in range(3)}
    return json.dumps({"text": "a ring", "route": "direct", "where": where}).encode()


@cache
def float_tiff() -> str:
    """SIDE x SIDE numbers of 32 bits in about 120 kB, in base64."""
    packed = zlib.compress(np.full((SIDE, SIDE), 0.5, np.float32).tobytes(), 9)
    tags = {256: SIDE, 257: SIDE, 258: 32, 259: 8, 262: 1, 273: 8, 277: 1, 278: SIDE, 279: len(packed), 339: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    packed += b"\0" * (len(packed) % 2)
    whole = struct.pack("<2sHI", b"II", 42, 8 + len(packed)) + packed + struct.pack("<H", len(tags)) + entries + bytes(4)
    return base64.b64encode(whole).decode()


async def crowd(
    url: str, tenant: str, rival: str, pid: int | None, phases: list[Phase], faults: list[str], only: Sequence[str]
) -> None:
    """Every attack by the key `rival`, or those with a word of `only` in their names, while the key `tenant` searches."""
    host, port = address_of(url)
    ours, theirs = Scene(f"{host}:{port}", tenant, 0, ""), Scene(f"{host}:{port}", rival, 0, "")
    await fill(theirs, host, port)
    await secrets_between(ours, theirs, host, port, faults)
    for name in ATTACKS:
        if only and not any(part in name for part in only):
            continue
        phase = Phase(name)
        phases.append(phase)
        await searches(ours, host, port, phase.quiet, faults, f"before {name}")
        forget_peak(pid)
        attacker = await begin(name, url, rival)
        await asyncio.sleep(SETTLE_S)
        await searches(ours, host, port, phase.attacked, faults, f"under {name}")
        counts, _ = await attacker.communicate(b"\n")
        phase.attacker.update(json.loads(counts))
        phase.peak_mb = peak_mb(pid)
        print(phase.row(), file=sys.stderr, flush=True)
        await asyncio.sleep(SETTLE_S)


async def begin(name: str, url: str, key: str) -> asyncio.subprocess.Process:
    """An attack in a process of its own, so that it delays no search but through the server; it ends with a line on its input."""
    command = (sys.executable, "-m", "benchmarks.hostile_crowd", name, url)
    running = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert running.stdin is not None and running.stdout is not None
    running.stdin.write(key.encode() + b"\n")
    await running.stdout.readline()
    return running


async def attack_on(name: str, url: str) -> Counter[str]:
    """The attack itself, until there is a line on the standard input after the one that holds the key."""
    host, port = address_of(url)
    by = Attacker(Scene(f"{host}:{port}", sys.stdin.readline().strip(), 0, ""), host, port, Counter())
    attack, at_once = ATTACKS[name]
    large_filter(), float_tiff()
    print("ready", flush=True)

    async def for_ever() -> None:
        while True:
            await attack(by)

    running = [asyncio.create_task(for_ever()) for _ in range(at_once)]
    await asyncio.to_thread(sys.stdin.readline)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    return by.answers


async def searches(scene: Scene, host: str, port: int, seconds: list[float], faults: list[str], when: str) -> None:
    """The tenant's searches, by the automatic route, each of a text that was never asked before."""
    for _ in range(ASKED):
        body = json.dumps({"text": f"a blue ring and {next(_numbers)} others"}).encode()
        started = time.perf_counter()
        status, _, reply = await exchange(scene.request("POST", "/search", body), host, port, 90)
        seconds.append(time.perf_counter() - started)
        if status != "200":
            faults.append(f"a search of the tenant {when} was answered {status}: {reply[:200]!r}")
        await asyncio.sleep(0.02)


async def fill(scene: Scene, host: str, port: int) -> None:
    """A thousand items of 32 kB."""
    for start in range(0, 1000, 250):
        items = [{"id": f"long-{n}", "text": f"ring {n}", "fields": {"t": "a" * LONG}} for n in range(start, start + 250)]
        status, _, body = await exchange(scene.post("/items", {"items": items}), host, port, 90)
        if status != "200" or body.count(b'"added"') != len(items):
            raise GoneError(f"the server does not take the rival's items: {status} {body[:200]!r}")


async def secrets_between(ours: Scene, theirs: Scene, host: str, port: int, faults: list[str]) -> None:
    """What one tenant asked is not told to another, and no filter tells where the server keeps its files."""
    for scene in (theirs, ours):
        status, _, body = await exchange(scene.post("/search", {"text": "a secret wish"}), host, port, 90)
        if status != "200" or b'"cached":true' in body:
            faults.append(f"a first search tells that another tenant asked the same: {status} {body[-300:]!r}")
    for guess in ({"gte": "/"}, {"lte": "~"}, {"gte": "", "lte": "~"}, [str(Path.cwd())], ""):
        for name in ("file", "image", "path"):
            got = await exchange(ours.post("/search", {"text": "a", "route": "direct", "where": {name: guess}}), host, port, 90)
            if got[0] == "200" and json.loads(got[2])["hits"]:
                faults.append(f"a filter of {guess!r} on {name!r} finds items")


def faults_of_cut_index(index: Path) -> list[str]:
    """What is not said in words of an index whose files end early."""
    with tempfile.TemporaryDirectory() as scratch:
        cut = Path(shutil.copytree(index, Path(scratch) / "cut"))
        for file in cut.glob("*.sqlite*"):
            os.truncate(file, file.stat().st_size // 2)
        command = [sys.executable, "-m", "traceir", "index", "info", "--index", str(cut)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    good = done.returncode in (1, 2) and "Traceback" not in done.stderr
    return [] if good else [f"a cut index ends with status {done.returncode}: {done.stderr[-300:]}"]


def forget_peak(pid: int | None) -> None:
    with suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_mb(pid: int | None) -> float | None:
    """Most resident memory of a process since `forget_peak`, where the system tells it."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return None


if __name__ == "__main__":
    print(json.dumps(asyncio.run(attack_on(*sys.argv[1:]))))
