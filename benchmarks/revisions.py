"""Two revisions of this repository, measured against each other in one run.

    python -m benchmarks.revisions --before REVISION [--after HEAD] [--parts search,add,serve,train,evaluate]

Both revisions are unpacked from git into a temporary folder and run with the same interpreter, one thread each. Every round times
one side right after the other, the order alternates, and a figure is the median of the rounds' ratios, before / after: above 1
the later revision is faster. CPU seconds are those of the process (user and system), so a busy machine disturbs them little.

search    an index of `--rows` random unit vectors that the earlier revision wrote: one exact query, a batch of 64,
          one query under a filter that 1 % of the rows pass; both sides must return the same ids
add       `--add` vectors, a thousand at a time, into a new index
serve     `traceir serve` of both, `--clients` clients: embeddings (half of the queries reason) and searches; CPU seconds of the
          server for each answer
train     `traceir train --preset mini` from the bundled model, for `--steps` steps
evaluate  `traceir evaluate` of the bundled model on `--tasks`, nothing cached
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np
from tqdm import tqdm

from benchmarks.serve import Asked, prepare, server, until_ready
from traceir.checkpoint import bundled_model
from traceir.errors import InputError

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
OPEN = """
import json, resource, sys, time
from pathlib import Path
import numpy as np
from traceir.index import open_index
from traceir.index.filters import Eq
from traceir.items import Item
def cpu():
    use = resource.getrusage(resource.RUSAGE_SELF)
    return use.ru_utime + use.ru_stime
def unit(seed, rows, width):
    made = np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)
def fill(path, rows, width):
    with open_index(Path(path), fingerprint="random", prompt_version="none", dim=width, create=True) as index:
        for start in range(0, rows, 1000):
            some = range(start, min(rows, start + 1000))
            items = [Item.of(text=f"item {n}", id=str(n), fields={"group": n % 100}) for n in some]
            index.upsert(items, unit([0, start], len(items), width))
"""
FILL = (
    OPEN
    + """
path, rows, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
begun = cpu()
fill(path, rows, width)
print(json.dumps(cpu() - begun))
"""
)
SEARCH = (
    OPEN
    + """
path, width = sys.argv[1], int(sys.argv[2])
index = open_index(Path(path), fingerprint="random", prompt_version="none", dim=width)
queries = unit([1], 64, width)
asks = {
    "one query": lambda: [index.search(query[None], k=10)[0] for query in queries[:8]],
    "batch of 64": lambda: index.search(queries, k=10),
    "one query, 1 % pass": lambda: [index.search(query[None], k=10, where=Eq("group", 7))[0] for query in queries[:8]],
}
for ask in asks.values():
    ask()
print("ready", flush=True)
for line in sys.stdin:
    begun = cpu()
    found = asks[line.strip()]()
    spent = cpu() - begun
    print(json.dumps([spent, [[hit.id for hit in hits] for hits in found]]), flush=True)
"""
)


@dataclass(frozen=True)
class Side:
    """One revision, unpacked: its name, its folder, the environment to run it in."""

    name: str
    root: Path

    def environment(self) -> dict[str, str]:
        return {**os.environ, **ONE_THREAD, "PYTHONPATH": str(self.root / "src")}

    def script(self, text: str, *arguments: object) -> list[str]:
        return [sys.executable, "-c", text, *map(str, arguments)]

    def traceir(self, *arguments: object) -> float:
        """CPU seconds of one command; InputError with the end of what it printed where it fails."""
        command = [sys.executable, "-m", "traceir", "--threads", "1", *map(str, arguments)]
        begun = os.times()
        done = subprocess.run(command, env=self.environment(), cwd=self.root, capture_output=True, text=True)
        spent = os.times()
        if done.returncode:
            raise InputError(f"{self.name}: {' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
        return spent.children_user + spent.children_system - begun.children_user - begun.children_system


Sides = tuple[Side, Side]
Ratios = dict[str, list[tuple[float, float]]]
"""By what was measured, the seconds of (before, after) of every round."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, metavar="REVISION")
    parser.add_argument("--after", default="HEAD", metavar="REVISION")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=Path("data/minibeir"), help="made by `traceir minibeir build`")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--add", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=15.0, help="of every phase of `serve`")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tasks", default="nights_task4,cirr_task7")
    parser.add_argument("--limit", type=int, default=200, help="queries of each task of `evaluate`")
    parser.add_argument("--at-least", type=float, help="status 1 where a ratio of CPU is below")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        raise InputError(f"--parts: {', '.join(sorted(unknown))} is not among {', '.join(PARTS)}")
    options.data = options.data.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        options.scratch = Path(scratch)
        sides = unpack(options.before, options.scratch / "before"), unpack(options.after, options.scratch / "after")
        print(f"{sides[0].name} against {sides[1].name}; {platform.machine()}, {os.cpu_count()} cores, one thread a side")
        print("\n| part | CPU before | CPU after | before / after | least | greatest |\n|---|---|---|---|---|---|")
        results: dict[str, dict[str, float]] = {}
        for part in options.parts:
            for name, pairs in PARTS[part](options, sides).items():
                results[f"{part}: {name}"] = row = summary(pairs)
                print(f"| {part}: {name} | {row['before']:.3g} s | {row['after']:.3g} s | "
                      f"{row['ratio']:.2f} | {row['least']:.2f} | {row['greatest']:.2f} |", flush=True)  # fmt: skip
    if options.out:
        about = {"before": sides[0].name, "after": sides[1].name, "machine": platform.machine(), "cores": os.cpu_count()}
        settings = {key: value for key, value in vars(options).items() if isinstance(value, int | float | str)}
        options.out.write_text(json.dumps({**about, "settings": settings, "results": results}, indent=1) + "\n", encoding="utf-8")
    slow = [name for name, row in results.items() if options.at_least and row["ratio"] < options.at_least]
    if slow:
        print(f"below {options.at_least}: {', '.join(slow)}", file=sys.stderr)
    return int(bool(slow))


def summary(pairs: list[tuple[float, float]]) -> dict[str, float]:
    ratios = [before / after for before, after in pairs]
    before, after = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {"before": before, "after": after, "ratio": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)}


def unpack(revision: str, target: Path) -> Side:
    """The files of a revision under `target`."""
    named = subprocess.run(["git", "rev-parse", "--short", f"{revision}^{{commit}}"], capture_output=True, text=True)
    if named.returncode:
        raise InputError(f"{revision}: git knows no such revision here; name a commit, a branch or a tag")
    target.mkdir()
    packed = subprocess.run(["git", "archive", "--format=tar", revision, "src"], stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "-x", "-C", str(target)], input=packed.stdout, check=True)
    return Side(named.stdout.strip(), target)


def alternating(rounds: int, sides: Sides, measure: Callable[[Side], float], name: str) -> list[tuple[float, float]]:
    """The seconds of both sides by round; who goes first alternates."""
    pairs = []
    for number in tqdm(range(rounds), desc=name, file=sys.stderr):
        order = sides if number % 2 else sides[::-1]
        seconds = {side.name: measure(side) for side in order}
        pairs.append((seconds[sides[0].name], seconds[sides[1].name]))
    return pairs


def search(options: argparse.Namespace, sides: Sides) -> Ratios:
    path = options.scratch / "search-index"
    filling = sides[0].script(FILL, path, options.rows, options.width)
    subprocess.run(filling, env=sides[0].environment(), stdout=subprocess.DEVNULL, check=True)
    ratios: Ratios = {}
    with searcher(sides[0], path, options.width) as first, searcher(sides[1], path, options.width) as second:
        children = {sides[0].name: first, sides[1].name: second}
        for ask in ("one query", "batch of 64", "one query, 1 % pass"):
            answers: dict[str, list[list[str]]] = {}

            def measure(side: Side, ask: str = ask, answers: dict[str, list[list[str]]] = answers) -> float:
                child = children[side.name]
                assert child.stdin is not None and child.stdout is not None
                print(ask, file=child.stdin, flush=True)
                seconds, answers[side.name] = json.loads(child.stdout.readline())
                return float(seconds)

            ratios[ask] = alternating(options.rounds, sides, measure, ask)
            if answers[sides[0].name] != answers[sides[1].name]:
                raise InputError(f"search, {ask}: the two revisions return different ids")
    return ratios


@contextmanager
def searcher(side: Side, path: Path, width: int) -> Iterator[subprocess.Popen[str]]:
    """A process of that revision with the index open and every question asked once."""
    command = side.script(SEARCH, path, width)
    child = subprocess.Popen(command, env=side.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        if child.stdout.readline().strip() != "ready":
            raise InputError(f"{side.name}: the index at {path} could not be searched; its message is above")
        yield child
    finally:
        child.kill()
        child.wait()


def add(options: argparse.Namespace, sides: Sides) -> Ratios:
    def measure(side: Side) -> float:
        path = options.scratch / "add-index"
        command = side.script(FILL, path, options.add, options.width)
        done = subprocess.run(command, env=side.environment(), stdout=subprocess.PIPE, check=True)
        shutil.rmtree(path)
        return float(json.loads(done.stdout))

    return {f"{options.add} vectors": alternating(options.rounds, sides, measure, "add")}


def train(options: argparse.Namespace, sides: Sides) -> Ratios:
    def measure(side: Side) -> float:
        out = options.scratch / "run"
        of_run = (
            "--data",
            options.data,
            "--init",
            bundled_model(),
            "--out",
            out,
            "--set",
            f"steps={options.steps}",
            "--set",
            "store_pixels=false",
        )
        seconds = side.traceir("train", "--preset", "mini", *of_run)
        shutil.rmtree(out)
        return seconds

    return {f"{options.steps} steps": alternating(options.rounds, sides, measure, "train")}


def evaluate(options: argparse.Namespace, sides: Sides) -> Ratios:
    def measure(side: Side) -> float:
        out = options.scratch / "scores"
        seconds = side.traceir(
            "evaluate", "--data", options.data, "--out", out, "--rows", options.tasks, "--limit", options.limit
        )
        shutil.rmtree(out)
        return seconds

    return {options.tasks: alternating(options.rounds, sides, measure, "evaluate")}


def serve(options: argparse.Namespace, sides: Sides) -> Ratios:
    """Both servers run; one is asked at a time, and its CPU seconds are divided by its answers."""
    asked = prepare(options.data, 64, 0)
    path = options.scratch / "serve-index"
    texts = options.scratch / "texts.txt"
    texts.write_text("".join(f"a drawn thing, number {number}\n" for number in range(200)), encoding="utf-8")
    sides[0].traceir("index", "add", texts, "--index", path)
    alone = ("--remember", "0", "--requests-per-minute", "1000000")
    with (
        server(path, *alone, environment=sides[0].environment()) as first,
        server(path, *alone, environment=sides[1].environment()) as second,
    ):
        servers = {sides[0].name: first, sides[1].name: second}
        ratios: Ratios = {}
        for kind in ("embeddings", "search"):

            def measure(side: Side, kind: str = kind) -> float:
                return asyncio.run(phase(*servers[side.name], kind, asked, options))

            ratios[kind] = alternating(options.rounds, sides, measure, kind)
        return ratios


async def phase(url: str, process: subprocess.Popen[str], kind: str, asked: list[Asked], options: argparse.Namespace) -> float:
    """CPU seconds of the server for one answer."""
    answers = 0
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await until_ready(session, url)
        end = time.perf_counter() + options.seconds

        async def client(number: int) -> None:
            nonlocal answers
            while time.perf_counter() < end:
                number += 1
                if kind == "embeddings":
                    body: bytes | str = asked[number % len(asked)].body
                else:
                    body = json.dumps({"text": f"thing {number}", "route": "direct", "k": 10})
                where = "/v1/embeddings" if kind == "embeddings" else "/search"
                async with session.post(url + where, data=body, headers={"content-type": "application/json"}) as response:
                    if response.status != 200:
                        raise InputError(f"{url}{where} answered {response.status}: {(await response.text())[:300]}")
                    await response.read()
                answers += 1

        begun = cpu_of(process.pid)
        await asyncio.gather(
            *(client(1000 * number + int(np.random.default_rng(number).integers(1000))) for number in range(options.clients))
        )
        return (cpu_of(process.pid) - begun) / answers


def cpu_of(pid: int) -> float:
    """CPU seconds that a process has used; Linux only."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


PARTS: dict[str, Callable[[argparse.Namespace, Sides], Ratios]] = {
    "search": search,
    "add": add,
    "serve": serve,
    "train": train,
    "evaluate": evaluate,
}

if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"{error}")
