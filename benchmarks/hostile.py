"""Does the server stay whole under hostile requests?

`python -m benchmarks.hostile` starts a server with an index and keys of its own and sends it two kinds of requests. At least
5,000 made here: broken images of every format Pillow reads, decompression bombs, huge, deep and wrong JSON, path tricks,
private addresses in all notations, header tricks, bad text, wrong keys, slow bodies. And, by schemathesis, requests made from the
server's OpenAPI document, right and wrong ones for every operation, each answer held against the document. `--url` and
`--key-file` do the same to a server that runs already. Ends with status 1 on any answer of 500 or more, any answer that holds a
secret file's content or is not as documented, any connection to a canary that this script opens on loopback, any right granted to
a wrong key, any request left hanging, or a server that is gone; with status 2 where it cannot measure.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import secrets
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis.errors import Unsatisfiable
from schemathesis.core.failures import FailureGroup

from benchmarks.hostile_cases import Case, Scene, all_cases, whole_images
from benchmarks.hostile_crowd import Phase, crowd, faults_of_cut_index, forget_peak, peak_mb
from benchmarks.hostile_http import GoneError, address_of, check_alive, exchange
from traceir.serve.keys import make_key

OPEN_ENDED: Final = frozenset({"header", "slow"})
"""Groups with requests that never end, which a server may keep waiting for; they are cut off after WAIT_OPEN_S."""
WAIT_S: Final = 90.0
WAIT_OPEN_S: Final = 5.0
SLOW_CLIENTS: Final = 24
TRIES: Final = 4
UNLIMITED: Final = 1_000_000
"""Requests a minute of the server that is started here."""
BY_MEANING: Final = ["POST /search", "POST /search/stream", "POST /v1/embeddings", "POST /v1/pictures", "GET /items"]
"""Operations that refuse what no schema can tell: a query of nothing, a text that is no image, a filter without sense."""


class NotReadyError(Exception):
    """The server does not answer yet."""


@dataclass(slots=True)
class Found:
    """What came of the requests."""

    statuses: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    faults: list[str] = field(default_factory=list)
    limited: int = 0
    phases: list[Phase] = field(default_factory=list)
    peak_mb: float | None = None
    """Of the server's memory, before the crowd; each of its phases has its own."""

    def add(self, case: Case, status: str, body: bytes, secret: bytes) -> None:
        self.statuses[case.group][status] += 1
        request = f"{case.group}: {case.name}"
        if status.startswith("5"):
            self.faults.append(f"{status} to {request}: {body[:300]!r}")
        if status == "hung":
            self.faults.append(f"no answer within {WAIT_S:g} s to {request}")
        if secret in body or b"root:x:0:" in body:
            self.faults.append(f"a file's content in the answer to {request}")
        if case.anonymous and status.startswith("2"):
            self.faults.append(f"{status} without a key to {request}")
        self.limited += status == "429"

    def judge(self, ratio: float, memory_mb: float) -> None:
        """Makes faults of the bounds that do not hold."""
        for phase in self.phases:
            if not phase.ratio <= ratio:
                self.faults.append(f"another tenant's p95 is {phase.ratio:.2f} times its quiet value under {phase.name}")
        for name, peak in [("the requests", self.peak_mb), *((phase.name, phase.peak_mb) for phase in self.phases)]:
            if peak is not None and peak > memory_mb:
                self.faults.append(f"the server took {peak:.0f} MB under {name}")


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", metavar="URL", help="base URL of a running server (default: one is started)")
    parser.add_argument(
        "--key-file", type=Path, metavar="FILE", help="a file with a key of both scopes and a high limit of requests"
    )
    parser.add_argument("--pid", type=int, metavar="N", help="the server's process, for its memory")
    parser.add_argument("--requests", type=int, default=6000, metavar="N", help="at least so many (default: 6000)")
    parser.add_argument("--together", type=int, default=8, metavar="N", help="at a time (default: 8)")
    parser.add_argument("--family", action="append", metavar="NAME", help="only these; repeatable; `schema` is schemathesis'")
    parser.add_argument(
        "--examples", type=int, default=300, metavar="N", help="right, and as many wrong, of each operation (default: 300)"
    )
    parser.add_argument("--attack", action="append", default=[], metavar="WORD", help="of the crowd only these; repeatable")
    parser.add_argument("--ratio-at-most", type=float, default=3.0, metavar="X", help="a tenant's p95 under attack (default: 3)")
    parser.add_argument("--memory-at-most", type=float, default=1500.0, metavar="MB", help="the server's peak (default: 1500)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    if options.url:
        return attack(options, options.url, options.key_file.read_text().strip() if options.key_file else None, options.pid)
    with own_server() as (url, keys, pid, index):
        return attack(options, url, keys[0], pid, keys[1:], index)


@contextmanager
def own_server() -> Iterator[tuple[str, list[str], int, Path]]:
    """A server over a fresh index, with keys and an audit log: its address, keys, process, index. The first key is of no tenant
    and may ask without limit; those of a tenant and its rival are as they are made where nothing is said."""
    from benchmarks.serve import server  # imports torch

    with tempfile.TemporaryDirectory() as scratch:
        keys = Path(scratch) / "keys.json"
        made = [
            make_key(keys, name, scopes=("read", "write"), tenant=tenant, requests_per_minute=most)
            for name, tenant, most in (("hostile", None, UNLIMITED), ("tenant", "acme", None), ("rival", "rival", None))
        ]
        more = ("--keys", str(keys), "--audit", str(Path(scratch) / "audit.jsonl"), "--inputs-per-minute", str(UNLIMITED))
        with server(Path(scratch) / "index", *more) as (url, process):
            asyncio.run(fill(url, made[0]))
            yield url, made, process.pid, Path(scratch) / "index"


async def fill(url: str, key: str) -> None:
    """Waits until the server is ready, and gives it some items, two of them with images."""
    host, port = address_of(url)
    scene = Scene(f"{host}:{port}", key, 0, "")
    while (await exchange(scene.request("GET", "/ready"), host, port, 60))[0] != "200":
        await asyncio.sleep(0.2)
    images = [base64.b64encode(encoded).decode() for name, encoded in whole_images().items() if name in ("PNG", "JPEG")]
    items: list[dict[str, Any]] = [
        {"id": f"picture-{number}", "image": {"data": encoded}} for number, encoded in enumerate(images)
    ]
    items += [{"id": f"text-{number}", "text": f"a red cup, number {number}", "fields": {"n": number}} for number in range(50)]
    status, _, body = await exchange(scene.post("/items", {"items": items}), host, port, 60)
    if status != "200" or body.count(b'"added"') != len(items):
        raise GoneError(f"the server does not take its first items: {status} {body[:200]!r}")


def attack(
    options: argparse.Namespace,
    url: str,
    key: str | None,
    pid: int | None,
    tenants: Sequence[str] = (),
    index: Path | None = None,
) -> int:
    results, marker = Found(), secrets.token_hex(24).encode()
    before, started = memory_mb(pid), time.monotonic()
    forget_peak(pid)
    try:
        asyncio.run(attack_by_hand(options, url, key, results, marker))
        if not options.family or "schema" in options.family:
            attack_by_schema(url, key, options.examples, options.seed, results, marker)
            asyncio.run(check_alive(*address_of(url)))
        results.peak_mb = peak_mb(pid)
        if tenants and (not options.family or "crowd" in options.family):
            asyncio.run(crowd(url, tenants[0], tenants[1], pid, results.phases, results.faults, options.attack))
            asyncio.run(check_alive(*address_of(url)))
        if index is not None and (not options.family or "index" in options.family):
            results.faults += faults_of_cut_index(index)
    except GoneError as gone:
        results.faults.append(str(gone))
    except NotReadyError as early:
        print(early, file=sys.stderr)
        return 2
    results.judge(options.ratio_at_most, options.memory_at_most)
    seconds = time.monotonic() - started
    total = sum(sum(counts.values()) for counts in results.statuses.values())
    memory = [before, memory_mb(pid)]
    report(results, total, seconds, memory)
    if options.out:
        options.out.write_text(json.dumps(summary(results, total, seconds, memory, options), indent=1) + "\n")
    if results.faults:
        return 1
    if results.limited > total // 10:
        print(f"{results.limited} requests were turned away for coming too fast; give the key a higher limit", file=sys.stderr)
        return 2
    return 0


async def attack_by_hand(options: argparse.Namespace, url: str, key: str | None, results: Found, marker: bytes) -> None:
    """The cases of hostile_cases.py, and slow clients, beside a canary and a secret file."""
    host, port = address_of(url)
    if (await exchange(Scene(f"{host}:{port}", None, 0, "").request("GET", "/ready"), host, port, 60))[0] != "200":
        raise NotReadyError("the server is not ready (GET /ready); start it and wait for its model")
    canary = Canary()
    await canary.open()
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder) / "secret.png"
        secret.write_bytes(marker)
        scene = Scene(f"{host}:{port}", key, canary.port, str(secret))
        cases = [
            case
            for case in all_cases(scene, options.seed, options.requests)
            if not options.family or case.group in options.family
        ]
        try:
            await check_alive(host, port)
            await send_all(cases, host, port, options.together, results, marker)
            if not options.family or "slow" in options.family:
                await send_slowly(scene, host, port, results, marker)
            await asyncio.sleep(2.0)  # time for a late visit to the canary
            await check_alive(host, port)
        finally:
            results.faults += [f"the canary was visited by {visit}" for visit in canary.visits]


def schema_config(*, seed: int, strangers: bool) -> schemathesis.Config:
    """How schemathesis makes requests and judges answers. `strangers`: it also asks without the key, which a server answers with
    401 until it has had enough of this address and says 429, so only where that limit is out of the way."""
    off = {"enabled": False}
    # The middleware answers OPTIONS and unknown methods before there is a route; its Allow names what the server takes.
    checks: dict[str, Any] = {"allow_header_conformance": off, "negative_data_rejection": {"expected-statuses": ["4xx"]}}
    settings = {
        "seed": seed,
        "checks": checks | ({} if strangers else {"ignored_auth": off, "missing_required_header": off}),
        "operations": [{"include-name": BY_MEANING, "checks": {"positive_data_acceptance": off}}],
        "generation": {"with-security-parameters": False},  # the key is given with each call
    }
    return schemathesis.Config.from_dict(settings)


def attack_by_schema(url: str, key: str | None, examples: int, seed: int, results: Found, secret: bytes) -> None:
    """Every operation of the OpenAPI document; whatever is asked, the answer must be as documented."""
    config = schema_config(seed=seed, strangers=False)
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", config=config)
    headers = {"Authorization": f"Bearer {key}"} if key else None

    def send_one(case: schemathesis.Case) -> None:
        try:
            response = case.call(headers=headers, timeout=WAIT_S)
        except OSError as error:
            raise GoneError(f"no answer to {case.as_curl_command()[:400]}: {error}") from error
        shown = Case("schema", case.as_curl_command()[:400], b"")
        results.add(shown, str(response.status_code), response.content or b"", secret)
        try:
            case.validate_response(response, headers=headers)
        except FailureGroup as wrong:
            results.faults += [f"{failure.title}: {failure.message[:300]}: {shown.name}" for failure in wrong.exceptions]

    for result in schema.get_all_operations():
        try_operation(result.ok(), examples, send_one)
        print(f"{result.ok().label}, {len(results.faults)} faults", file=sys.stderr)


def try_operation(operation: Any, examples: int, send_one: Callable[[schemathesis.Case], None]) -> None:
    """Requests at every edge of an operation's schema, then so many right ones and as many wrong ones."""
    schema, modes = operation.schema, list(schemathesis.GenerationMode)
    for case in schema.iter_coverage_cases(operation, generation_modes=modes, generation_config=schema.config.generation):
        send_one(case)
    steady = hypothesis_settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    for mode in modes:
        with suppress(Unsatisfiable):  # there is no wrong way to GET /health
            steady(given(operation.as_strategy(generation_mode=mode))(send_one))()


async def send_all(cases: Sequence[Case], host: str, port: int, together: int, results: Found, secret: bytes) -> None:
    """Every case, so many at a time; after each 250 the server must still say that it is well."""
    slots, done = asyncio.Semaphore(together), 0

    async def send_case(case: Case) -> None:
        nonlocal done
        async with slots:
            status, body = await send(case, host, port)
        results.add(case, status, body, secret)
        done += 1
        if done % 250 == 0:
            print(f"{done} of {len(cases)}, {len(results.faults)} faults", file=sys.stderr)
            await check_alive(host, port)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_quietly(send_case(case))) for case in cases]
    gone = next((task.result() for task in tasks if task.result() is not None), None)
    if gone is not None:
        raise gone


async def _quietly(work: Any) -> GoneError | None:
    try:
        await work
    except GoneError as gone:
        return gone
    return None


async def send(case: Case, host: str, port: int) -> tuple[str, bytes]:
    """The status ("closed" without one) and body; a 429 is asked again after its Retry-After, a few times."""
    status, body = "closed", b""
    for _ in range(TRIES):
        status, head, body = await exchange(case.raw, host, port, WAIT_OPEN_S if case.group in OPEN_ENDED else WAIT_S)
        if status == "hung" and case.group in OPEN_ENDED:
            return "waiting", body
        if status != "429" or case.anonymous:
            break
        wait = head.lower().partition(b"retry-after:")[2].partition(b"\r\n")[0].strip()
        await asyncio.sleep(min(5.0, float(wait or 1)))
    return status, body


async def send_slowly(scene: Scene, host: str, port: int, results: Found, secret: bytes) -> None:
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
            for index in range(begin, min(begin + 8, len(whole) - 1)):
                writer.write(whole[index : index + 1])
                await writer.drain()
                await asyncio.sleep(0.5)
        writer.close()
        results.add(Case("slow", f"drip {number}", b""), "left", b"", secret)

    drips = [asyncio.create_task(_quietly(drip(number))) for number in range(SLOW_CLIENTS)]
    await asyncio.sleep(1.0)
    for _ in range(5):
        await check_alive(host, port)
    for gone in await asyncio.gather(*drips):
        if gone is not None:
            raise gone


def memory_mb(pid: int | None) -> float | None:
    """Resident memory of a process, where the system tells it."""
    if pid is None:
        return None
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    return None


def report(results: Found, total: int, seconds: float, memory: Sequence[float | None]) -> None:
    print("| group | requests | answers |")
    print("|---|---|---|")
    for group, counts in sorted(results.statuses.items()):
        answers = ", ".join(f"{status}: {count}" for status, count in sorted(counts.items()))
        print(f"| {group} | {sum(counts.values())} | {answers} |")
    print(f"\n{total} requests in {seconds:.0f} s, {len(results.faults)} faults")
    if memory[0] is not None and memory[1] is not None:
        print(f"memory of the server: {memory[0]:.0f} MB before, {memory[1]:.0f} MB after")
    peaks = [peak for peak in (results.peak_mb, *(phase.peak_mb for phase in results.phases)) if peak is not None]
    if peaks:
        print(f"peak memory of the server: {max(peaks):.0f} MB")
    if results.phases:
        print(
            "\n| attack by one key | quiet p95, ms | p95 under attack, ms | ratio | peak, MB | what the attacker was answered |"
        )
        print("|---|---|---|---|---|---|")
        for phase in results.phases:
            print(phase.row())
        print(f"\nanother tenant's p95 under attack: at most {max(p.ratio for p in results.phases):.2f} times its quiet value")
    for fault in results.faults[:50]:
        print(f"FAULT {fault}", file=sys.stderr)


def summary(
    results: Found, total: int, seconds: float, memory: Sequence[float | None], options: argparse.Namespace
) -> dict[str, Any]:
    return {
        "requests": total,
        "seconds": round(seconds, 1),
        "seed": options.seed,
        "memory_mb": memory,
        "peak_mb": results.peak_mb,
        "crowd": [phase.as_json() for phase in results.phases],
        "answers": {group: dict(counts) for group, counts in sorted(results.statuses.items())},
        "faults": results.faults,
    }


if __name__ == "__main__":
    sys.exit(main())
