"""What the server claims under load and under kills (`python -m benchmarks.serve PART`).

load   64 clients at a time, half of them with complex queries, for five minutes, nothing remembered by the server. Every
       vector is held against that of the same query encoded alone. Beside it, in the same run: one client with the same mix,
       and the simple clients without the complex ones. Ends with status 1 where an answer is lost, crossed or an error other
       than 429, where the throughput is below `--at-least` times that of one client, where the 95th percentile of simple
       queries is above `--at-most` times what it is without complex ones, or where memory grows by a tenth.
kills  the server is ended by SIGKILL at random moments while items, every other with an image, are added in bulk, some of them
       again; whatever was acknowledged must be there, once, as it was sent.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

from traceir.checkpoint import bundled_model
from traceir.data import mbeir
from traceir.encoder import Encoder
from traceir.errors import DataError
from traceir.index import open_index

ROWS = ("mscoco_task0", "mscoco_task3", "cirr_task7", "fashioniq_task7", "infoseek_task6", "webqa_task1")


@dataclass(frozen=True)
class Asked:
    """A query as a request body, and what it must come to."""

    body: bytes
    vector: np.ndarray
    reasoning: str
    reasons: bool


@dataclass
class Seen:
    """What clients saw in one phase."""

    seconds: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    status: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    begun: float = field(default_factory=time.perf_counter)
    ended: float = 0.0

    def rate(self) -> float:
        return sum(len(durations) for durations in self.seconds.values()) / (self.ended - self.begun)

    def p95(self, reasons: bool) -> float:
        return float(np.percentile(self.seconds[reasons], 95)) if self.seconds[reasons] else float("nan")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    load_part, kill_part = parts.add_parser("load"), parts.add_parser("kills")
    load_part.set_defaults(run=load)
    load_part.add_argument("--data", type=Path, default=Path("data/minibeir"))
    load_part.add_argument("--clients", type=int, default=64)
    load_part.add_argument("--seconds", type=float, default=300.0)
    load_part.add_argument("--before", type=float, default=40.0, help="seconds of each of the two phases before (default: 40)")
    load_part.add_argument("--queries", type=int, default=240, help="different queries (default: 240)")
    load_part.add_argument("--at-least", type=float, default=3.0)
    load_part.add_argument("--at-most", type=float, default=2.0)
    kill_part.set_defaults(run=kills)
    kill_part.add_argument("--kills", type=int, default=50)
    for part in (load_part, kill_part):
        part.add_argument("--out", type=Path, default=Path("out/serve"))
        part.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    return int(options.run(options))


@contextmanager
def server(index: Path, *more: str, environment: Mapping[str, str] | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A running server; its address and process."""
    command = [sys.executable, "-m", "traceir", "--threads", "1", "serve", "--index", str(index), "--port", "0", *more]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if " at http://" not in line:
            raise DataError(f"the server did not start: {' '.join(command)} printed {line!r}; run it to see why")
        yield line.split(" at ")[1].strip().rstrip("/"), process
    finally:
        process.kill()
        process.wait()


async def until_ready(session: aiohttp.ClientSession, url: str) -> None:
    while True:
        try:
            async with session.get(f"{url}/ready") as response:
                if response.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.1)


# load


def load(options: argparse.Namespace) -> int:
    asked = prepare(options.data, options.queries, options.seed)
    with server(options.out / "load-index", "--remember", "0", "--requests-per-minute", "1000000") as (url, process):
        return asyncio.run(_load(options, asked, url, process.pid))


def prepare(data: Path, count: int, seed: int) -> list[Asked]:
    """Half simple, half complex test queries, each encoded alone by the model itself."""
    encoder = Encoder.from_pretrained(bundled_model())
    draw = random.Random(seed)
    asked: dict[bool, list[Asked]] = {False: [], True: []}
    tasks = [task for task in mbeir.find_tasks(data, "test") if task.name in ROWS]
    pools = [draw.sample(list(mbeir.read_queries(task.query_path)), 100) for task in tasks]
    for record in itertools.chain.from_iterable(itertools.zip_longest(*pools)):
        if record is None or all(len(queries) >= count // 2 for queries in asked.values()):
            continue
        query = mbeir.to_query(record, None, data)
        encoding = encoder.encode_queries([query])[0]
        reasons = encoding.route == "reason"
        if len(asked[reasons]) < count // 2:
            asked[reasons].append(Asked(body_of(record, data), encoding.vector, encoding.reasoning, reasons))
    return asked[False] + asked[True]


def body_of(record: mbeir.Record, data: Path) -> bytes:
    contents: list[dict[str, Any]] = []
    if record.image_path:
        encoded = base64.b64encode((data / record.image_path).read_bytes()).decode()
        contents.append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}})
    query = mbeir.to_query(record, None, data)
    if query.text:
        contents.append({"type": "text", "text": query.text})
    target = mbeir.TASK_MODALITIES[record.task_id][1]
    return json.dumps({"messages": [{"role": "user", "content": contents}], "modality": target}).encode()


async def _load(options: argparse.Namespace, asked: list[Asked], url: str, pid: int) -> int:
    simple = [query for query in asked if not query.reasons]
    complex_ = [query for query in asked if query.reasons]
    half = options.clients // 2
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await until_ready(session, url)
        await phase(session, url, [(asked, 8)], 5.0, options.seed)  # warm
        mix = list(itertools.chain(*zip(simple, complex_, strict=False)))
        alone = await phase(session, url, [(mix, 1)], options.before, options.seed)
        quiet = await phase(session, url, [(simple, half)], options.before, options.seed)
        memory: list[float] = []
        watch = asyncio.create_task(watch_memory(pid, memory))
        mixed = await phase(session, url, [(simple, half), (complex_, options.clients - half)], options.seconds, options.seed)
        watch.cancel()
    return reported(options, alone, quiet, mixed, memory)


async def phase(
    session: aiohttp.ClientSession, url: str, groups: list[tuple[list[Asked], int]], seconds: float, seed: int
) -> Seen:
    """Clients of several kinds, each asking one query after the other until the time is over."""
    seen, draw = Seen(), random.Random(seed)
    end = seen.begun + seconds

    async def client(queries: list[Asked], start: int) -> None:
        for query in itertools.islice(itertools.cycle(queries), start, None):
            if time.perf_counter() >= end:
                return
            await ask(session, url, query, seen)

    clients = [client(queries, draw.randrange(len(queries))) for queries, count in groups for _ in range(count)]
    await asyncio.gather(*clients)
    seen.ended = time.perf_counter()
    return seen


async def ask(session: aiohttp.ClientSession, url: str, query: Asked, seen: Seen) -> None:
    started = time.perf_counter()
    async with session.post(f"{url}/v1/embeddings", data=query.body, headers={"content-type": "application/json"}) as response:
        seen.status[response.status] += 1
        answer = await response.json()
    if response.status == 429:
        await asyncio.sleep(float(response.headers.get("retry-after", "1")))
        return
    if response.status != 200:
        seen.wrong.append(str(answer)[:200])
        return
    seen.seconds[query.reasons].append(time.perf_counter() - started)
    data = answer["data"][0]
    cosine = float(np.dot(np.asarray(data["embedding"]), query.vector))
    if cosine < 0.9999 or data["trace"]["reasoning"] != query.reasoning:
        seen.wrong.append(f"cosine {cosine:.5f}, {data['trace']['reasoning']!r} for {query.reasoning!r}")


async def watch_memory(pid: int, samples: list[float]) -> None:
    """Appends the MiB of the process every five seconds, until cancelled."""
    while True:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        samples.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        await asyncio.sleep(5)


def reported(options: argparse.Namespace, alone: Seen, quiet: Seen, mixed: Seen, memory: list[float]) -> int:
    # What one client would have needed for the very answers given: quick queries come oftener than the complex ones.
    one_by_one = sum(len(mixed.seconds[kind]) * float(np.mean(alone.seconds[kind])) for kind in (False, True))
    ratio, slower = one_by_one / (mixed.ended - mixed.begun), mixed.p95(False) / quiet.p95(False)
    early = memory[len(memory) // 5 : 2 * len(memory) // 5] or memory
    late = memory[-max(1, len(memory) // 5) :]
    print(f"| {options.clients} clients, {options.seconds:g} s, seed {options.seed} | |\n|---|---|")
    print(f"| answers, of them to complex queries | {sum(map(len, mixed.seconds.values()))}, {len(mixed.seconds[True])} |")
    print(f"| lost, crossed or failed | {len(mixed.wrong)} |\n| statuses | {dict(mixed.status)} |")
    print(f"| throughput to one client, for the same answers | {ratio:.2f} |")
    print(f"| p95 of simple queries with to without complex ones | {slower:.2f} |")
    waits = float(np.mean(mixed.seconds[True])) / float(np.mean(alone.seconds[True]))
    print(f"| mean wait for a complex answer, to one client's | {waits:.1f} |")
    print(f"| memory of the last fifth to the second | {np.mean(late) / np.mean(early):.3f} ({np.mean(late):.0f} MiB) |")
    for line in mixed.wrong[:3]:
        print(line, file=sys.stderr)
    fine = not (mixed.wrong or alone.wrong or quiet.wrong) and ratio >= options.at_least and slower <= options.at_most
    return 0 if fine and np.mean(late) < 1.1 * np.mean(early) else 1


# kills


def kills(options: argparse.Namespace) -> int:
    """Adds items of growing ids and kills; every acknowledged one must be there with its own text, and the index must open."""
    draw = random.Random(options.seed)
    index = options.out / f"kill-index-{options.seed}-{int(time.time())}"
    acknowledged: dict[str, str] = {}
    begun = 0
    for number in range(options.kills):
        with server(index, "--requests-per-minute", "1000000") as (url, process):
            begun = asyncio.run(_add_and_kill(url, process, draw, acknowledged, begun))
        print(f"\rkilled {number + 1} times, {len(acknowledged)} items acknowledged", end="", file=sys.stderr)
    encoder = Encoder.from_pretrained(bundled_model())
    files = sum(path.is_file() and not path.name.startswith(".") for path in (index / "pictures").rglob("*"))
    with open_index(index, fingerprint=encoder.fingerprint, prompt_version=encoder.prompt_version) as opened:
        there = Counter(stored.id for stored in opened.scan())
        texts = {stored.id: stored.text for stored in opened.scan()}
        images = {stored.id: stored.image for stored in opened.scan()}
        anything = np.eye(1, encoder.width, dtype=np.float32)
        counts = Counter(hit.id for hit in opened.search(anything, len(texts) + 8)[0])
    lost = [
        id for id, text in acknowledged.items() if texts.get(id) != text or not counts[id] or not shows(images[id], number_of(id))
    ]
    twice = [id for id in counts | there if counts[id] > 1 or there[id] > 1]
    stray = files - sum(image is not None for image in images.values())
    print(f"\nkilled {options.kills} times: {len(acknowledged)} items acknowledged, {len(lost)} lost, {len(twice)} twice")
    print(f"{len(texts)} items in the index, {files} images kept, {stray} of items that were never added")
    return 0 if not lost and not twice and acknowledged else 1


def number_of(id: str) -> int:
    return int(id.removeprefix("item-"))


def item_of(number: int) -> dict[str, Any]:
    item: dict[str, Any] = {"id": f"item-{number}", "text": f"a red ball number {number}"}
    return item | ({"image": {"data": base64.b64encode(image_of(number)).decode()}} if number % 2 else {})


def image_of(number: int) -> bytes:
    """A PNG of a colour of its own."""
    buffer = BytesIO()
    Image.new("RGB", (28, 28), (number % 256, number // 256 % 256, number // 65536)).save(buffer, "PNG")
    return buffer.getvalue()


def shows(image: str | None, number: int) -> bool:
    """Whether an item of this number has its image, or rightly none."""
    return Path(image).read_bytes() == image_of(number) if image is not None else number % 2 == 0


async def _add_and_kill(
    url: str, process: subprocess.Popen[str], draw: random.Random, acknowledged: dict[str, str], begun: int
) -> int:
    """Adds in four streams until the server is killed at a random moment; the next number of an item."""
    numbers = itertools.count(begun)
    async with aiohttp.ClientSession() as session:
        await until_ready(session, url)

        async def add() -> None:
            while True:
                batch = [next(numbers) for _ in range(draw.randrange(1, 24))]
                batch += [draw.randrange(batch[0])] if batch[0] else []
                items = [item_of(number) for number in batch]
                try:
                    async with session.post(f"{url}/items", json={"items": items}) as response:
                        answer = await response.json()
                except (aiohttp.ClientError, OSError):
                    return
                for result in answer["results"]:
                    if result["status"] in ("added", "updated"):
                        acknowledged[result["id"]] = f"a red ball number {result['id'].removeprefix('item-')}"

        adders = [asyncio.create_task(add()) for _ in range(4)]
        await asyncio.sleep(draw.uniform(0.0, 2.5))
        process.send_signal(signal.SIGKILL)
        await asyncio.gather(*adders)
    return next(numbers)


if __name__ == "__main__":
    sys.exit(main())
