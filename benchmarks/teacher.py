"""How many requests the teacher client keeps in flight, and what a request costs it, against a server of fixed latency.

A child process answers every chat completion after `--latency` seconds and integrates how many it holds. Three clients in turn
send it questions with an image, from one process and one event loop: the `openai` package's own `chat.completions.create`,
`OpenAITeacher` alone, and an `Asker` with cache and pace, as a build uses it. The ideal rate is requests in flight / latency.
Where other work shares the machine the rate says little; CPU ms a request, of this process, says whether one core would do.

    python benchmarks/teacher.py --at-least-share 0.9 --at-most-cpu 2.0
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from PIL import Image

from traceir.cot.ask import TeacherQuestion
from traceir.cot.teachers.answer_cache import AnswerCache
from traceir.cot.teachers.asker import Asker, Pacer
from traceir.cot.teachers.teacher import OpenAITeacher, prepare

IMAGES = 50
SIDE = 192
TEXT = "<reasoning>the square stays, its colour turns from red to blue</reasoning><answer>a blue square</answer>"
Ask = Callable[[int], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Row:
    """One client's figures over the measured seconds."""

    client: str
    in_flight: float
    per_second: float
    share: float
    cpu_ms: float


class Server:
    """The ASGI app: waits, answers, and integrates the number of requests that it holds over time."""

    def __init__(self, latency_s: float) -> None:
        self.latency_s, self.held, self.seconds, self.answered = latency_s, 0, 0.0, 0
        self._at = time.monotonic()
        message = {"role": "assistant", "content": TEXT}
        usage = {"prompt_tokens": 300, "completion_tokens": 60, "total_tokens": 360}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        completion = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
        self._completion = json.dumps(completion).encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        if scope["path"] == "/stats":
            self._hold(0)
            await _respond(send, json.dumps({"seconds": self.seconds, "at": self._at, "answered": self.answered}).encode())
            return
        self._hold(1)
        await asyncio.sleep(self.latency_s)
        self._hold(-1)
        self.answered += 1
        await _respond(send, self._completion)

    def _hold(self, more: int) -> None:
        now = time.monotonic()
        self.seconds += self.held * (now - self._at)
        self._at = now
        self.held += more


async def _respond(send: Any, content: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def serve(port: int, latency_s: float) -> None:
    import uvicorn

    uvicorn.run(Server(latency_s), host="127.0.0.1", port=port, log_level="error", access_log=False)


def make_questions(folder: Path) -> Callable[[int], TeacherQuestion]:
    """Questions that differ, each with one of PICTURES images."""
    draw = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = draw.integers(0, 256, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((SIDE, SIDE)).save(folder / f"{number}.jpg", quality=90)
    system = "You write the reasoning with which a retrieval system finds the target of a complex query. " * 8

    def question(number: int) -> TeacherQuestion:
        parts = (f"<task>invented</task>\n<query>question {number}</query>", folder / f"{number % IMAGES}.jpg")
        return TeacherQuestion("reason", f"9:{number}", "cirr_task7", 0, system, parts, 512, 0.0, 0)

    return question


async def measure(client: str, ask: Ask, workers: int, args: argparse.Namespace, base: str) -> Row:
    """Keeps `workers` asking; the figures are of `--seconds` after a warm-up of one second."""
    numbers = iter(range(10**9))

    async def worker() -> None:
        for number in numbers:
            await ask(number)

    tasks = [asyncio.create_task(worker()) for _ in range(workers)]
    await asyncio.sleep(1.0)
    first, cpu = await asyncio.to_thread(_stats, base), time.process_time()
    await asyncio.sleep(args.seconds)
    last, cpu = await asyncio.to_thread(_stats, base), time.process_time() - cpu
    for task in tasks:
        task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks)
    seconds, answers = last["at"] - first["at"], last["answered"] - first["answered"]
    ideal = args.concurrency / args.latency
    in_flight = (last["seconds"] - first["seconds"]) / seconds
    return Row(client, in_flight, answers / seconds, answers / seconds / ideal, cpu / max(1, answers) * 1e3)


async def measure_all(base: str, folder: Path, args: argparse.Namespace) -> list[Row]:
    import openai

    question, url = make_questions(folder), f"{base}/v1"
    package = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)

    async def create(number: int) -> object:
        return await package.chat.completions.create(**json.loads((await prepare(question(number), "m")).payload))

    rows = [await measure("openai create()", create, args.concurrency, args, base)]
    await package.close()
    teacher = OpenAITeacher("m", url)

    async def send(number: int) -> object:
        return await teacher.send(await teacher.request(question(number)))

    rows.append(await measure("OpenAITeacher", send, args.concurrency, args, base))
    await teacher.close()
    with AnswerCache(folder / "journal") as cache:
        asker = Asker(OpenAITeacher("m", url), cache, Pacer(args.concurrency))
        rows.append(await measure("Asker", lambda number: asker.ask(question(number)), 2 * args.concurrency, args, base))
        await asker.close()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds the server takes")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured for each client")
    parser.add_argument("--at-least-share", type=float, default=0.0, help="least share of the ideal rate for the Asker")
    parser.add_argument("--at-most-cpu", type=float, default=float("inf"), help="most CPU ms a request for the Asker")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.latency)
        return 0
    if importlib.util.find_spec("uvicorn") is None:
        print("uvicorn is missing; pip install uvicorn", file=sys.stderr)
        return 2
    rows = run(args)
    print("| client | in flight | requests/s | of the ideal | CPU ms a request |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.client} | {row.in_flight:.1f} | {row.per_second:.1f} | {row.share:.1%} | {row.cpu_ms:.2f} |")
    if args.out:
        machine = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}
        settings = {"concurrency": args.concurrency, "latency_s": args.latency, "seconds": args.seconds}
        results = {"machine": machine, "settings": settings, "rows": [asdict(row) for row in rows]}
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if rows[-1].share < args.at_least_share or rows[-1].cpu_ms > args.at_most_cpu:
        print(f"the Asker breaks a bound: at least {args.at_least_share}, at most {args.at_most_cpu} ms", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> list[Row]:
    """Starts the server, measures, ends it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, __file__, "--serve", str(port), "--latency", str(args.latency)]
    server = subprocess.Popen(command)
    base = f"http://127.0.0.1:{port}"
    try:
        _wait(base, server)
        with tempfile.TemporaryDirectory() as folder:
            return asyncio.run(measure_all(base, Path(folder), args))
    finally:
        server.terminate()
        server.wait()


def _wait(base: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        with suppress(OSError):
            _stats(base)
            return
        if server.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit("the server did not start; run it with --serve PORT to see why")


def _stats(base: str) -> dict[str, float]:
    with urlopen(f"{base}/stats") as reply:
        stats: dict[str, float] = json.load(reply)
    return stats


if __name__ == "__main__":
    sys.exit(main())
