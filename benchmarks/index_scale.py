"""The indexes at scale against exact FAISS: recall@10 and queries per second as ratios, one thread, one run.

The vectors are synthetic: 2,000 clusters of power-law sizes with a decaying spectrum (effective dimension about 30), shifted by
modality, of unit length. Recall ranks the indexes on them and does not predict a model's. The embedded index is filled with
float32, float16 and int8 storage, Milvus Lite's server (started here, on the loopback) with fewer rows. Each is searched exactly
and approximately, over all rows and over those that pass a filter (one in a thousand, one in two), and so is FAISS's flat index
over the same rows, with a filter as its bitmap; the sides take turns, and a ratio is the median over the repetitions. FAISS
takes the faster of its ways: its own kernel for a single query and with a filter, BLAS for a batch (its
`distance_compute_blas_threshold` counts queries times width in 1.15.1; its default of 128,000 would be slower for a batch).

Resumable: rows already there are not written again, and a finished part is read from FOLDER/PART.json.

    python -m benchmarks.index_scale --folder out/index-scale                                   # 1,000,000 and 100,000 rows
    python -m benchmarks.index_scale --folder out/small --rows 20000 --engine-rows 20000         # minutes
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from traceir.errors import InputError
from traceir.images import ImageInput
from traceir.index import Eq, Filter, Index, Range, open_index
from traceir.items import Item, Modality, Vector

PARTS = ("float32", "float16", "int8", "engine")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
CLUSTERS = 2000
BLOCK = 5000
BATCH = 64
FEW = 4
"""Queries at a time where the recall of approximate search is measured: a large batch is compared with all rows in any case."""
MODALITIES: tuple[Modality, ...] = ("text", "image", "image,text")
SHELVES = 1000
FILTERS: dict[str, tuple[Filter | None, range]] = {
    "all rows": (None, range(SHELVES)),
    "1 in 1,000": (Eq("shelf", 7), range(7, 8)),
    "1 in 2": (Range("shelf", None, SHELVES // 2 - 1), range(SHELVES // 2)),
}
"""Each filter, and the shelves it leaves; row n stands on shelf n modulo 1,000."""
Search = Callable[[Vector], list[list[int]]]


@dataclass(frozen=True)
class Setup:
    """What is searched: rows of D components, Q queries, the best k, and how long each side is timed in a repetition."""

    rows: int
    engine_rows: int
    width: int
    queries: int
    k: int
    repetitions: int
    seconds: float
    seed: int


class World:
    """The synthetic collection: any block of it can be drawn again from the seed."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        generator = np.random.default_rng(setup.seed)
        spectrum = 1.0 / (1.0 + np.arange(setup.width) / 10.0)
        self.spectrum = (spectrum / np.linalg.norm(spectrum)).astype(np.float32)
        self.centres = generator.standard_normal((CLUSTERS, setup.width), dtype=np.float32) * self.spectrum
        sizes = 1.0 / np.arange(1, CLUSTERS + 1) ** 0.8
        self.shares = sizes / sizes.sum()
        self.shifts = generator.standard_normal((len(MODALITIES), setup.width), dtype=np.float32) * self.spectrum

    def block(self, start: int, rows: int) -> tuple[list[Item], Vector]:
        draw = np.random.default_rng([self.setup.seed, 1, start])
        kinds = draw.choice(len(MODALITIES), size=rows, p=(0.3, 0.5, 0.2))
        return [item(start + row, MODALITIES[kind]) for row, kind in enumerate(kinds)], self.vectors(draw, kinds)

    def queries(self) -> Vector:
        draw = np.random.default_rng([self.setup.seed, 2])
        return self.vectors(draw, draw.integers(0, len(MODALITIES), self.setup.queries))

    def vectors(self, draw: np.random.Generator, kinds: Any) -> Vector:
        clusters = draw.choice(CLUSTERS, size=len(kinds), p=self.shares)
        noise = draw.standard_normal((len(kinds), self.setup.width), dtype=np.float32) * self.spectrum
        drawn = self.centres[clusters] + 0.6 * noise + self.shifts[kinds]
        vectors: Vector = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
        return vectors


def item(number: int, modality: Modality) -> Item:
    image = None if modality == "text" else ImageInput.from_bytes(number.to_bytes(8, "little"), name=f"picture-{number}.png")
    text = None if modality == "image" else f"item number {number}"
    return Item.of(text=text, image=image, id=f"{number:08d}", fields={"shelf": number % SHELVES})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the indexes and the results are kept")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--engine-rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each side, of each kind, in a repetition")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write all results here as JSON")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    setup = Setup(**{name: getattr(options, name) for name in Setup.__dataclass_fields__})
    if min(setup.rows, setup.engine_rows, setup.width, setup.queries, setup.k, setup.repetitions) < 1:
        raise InputError(f"{setup}: give at least 1 of each")
    if options.child:
        (options.folder / f"{options.child}.json").write_text(json.dumps(measure(options.child, options.folder, setup), indent=1))
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    results = {part: in_child(part, options.folder, setup) for part in options.parts.split(",")}
    print(table(results, setup))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def in_child(part: str, folder: Path, setup: Setup) -> dict[str, Any]:
    """The results of a part, from its file where the same was measured before, else from a process of one thread."""
    if part not in PARTS:
        raise InputError(f"part {part!r} is unknown; choose of {', '.join(PARTS)}")
    path = folder / f"{part}.json"
    if path.is_file():
        results: dict[str, Any] = json.loads(path.read_text())
        if results["setup"] == asdict(setup):
            return results
    command = [sys.executable, "-m", "benchmarks.index_scale", "--child", part, "--folder", str(folder)]
    for name, value in asdict(setup).items():
        command += ["-k" if name == "k" else f"--{name.replace('_', '-')}", str(value)]
    subprocess.run(command, env={**os.environ, **ONE_THREAD}, check=True)
    measured: dict[str, Any] = json.loads(path.read_text())
    return measured


def measure(part: str, folder: Path, setup: Setup) -> dict[str, Any]:
    world = World(setup)
    rows = setup.engine_rows if part == "engine" else setup.rows
    where = contextlib.nullcontext(str(folder / part)) if part != "engine" else engine(folder / "engine-data")
    with where as address:
        options: dict[str, Any] = {"fingerprint": f"seed {setup.seed}", "prompt_version": "none", "dim": setup.width}
        with open_index(address, **options, create=True, dtype="float32" if part == "engine" else part) as index:
            seconds = {"fill": timed(lambda: fill(index, world, rows))}
            before = resident_megabytes()
            seconds["open"] = timed(lambda: index.search(world.queries()[:1], 1))
            resident = resident_megabytes() - before
            seconds["build"] = timed(lambda: build(index))
            flat = flat_index(world, rows)
            measured = {}
            for name, (where, shelves) in FILTERS.items():
                sides: dict[str, Search] = {
                    "faiss, exact": with_faiss(flat, rows, shelves, setup.k),
                    "exact": with_index(index, setup.k, where, True),
                    "approximate": with_index(index, setup.k, where, False),
                }
                report(f"searching {name}")
                measured[name] = {"recall": recalls(sides, world.queries()), **speeds(sides, world.queries(), setup)}
            return {
                "setup": asdict(setup),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread used",
                "rows": rows,
                "seconds": seconds,
                "megabytes": round(size_of(folder / ("engine-data" if part == "engine" else part)) / 2**20),
                "resident_megabytes": resident,
                "lists": index.info().cells,
                "filters": measured,
            }


@contextlib.contextmanager
def engine(data: Path) -> Iterator[str]:
    """Milvus Lite's server on a free port of the loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "milvus_lite", "server", "--data-dir", str(data), "--host", "127.0.0.1", "--port", str(port)]
    with data.with_suffix(".log").open("ab") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline and server.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/scale"
        finally:
            server.kill()


def fill(index: Index, world: World, rows: int) -> None:
    """Write the blocks that are not there; a block is written whole or not at all."""
    for start in range(0, rows, BLOCK):
        size = min(BLOCK, rows - start)
        if not index.get([f"{start:08d}", f"{start + size - 1:08d}"]):
            index.upsert(*world.block(start, size))
        report(f"rows {start + size:,} of {rows:,}")
    for where, shelves in FILTERS.values():
        wanted = sum(len(range(shelf, rows, SHELVES)) for shelf in shelves)
        if index.count(where) != wanted:
            raise InputError(
                f"the index holds {index.count(where)} rows of filter {where}, not {wanted}; choose an empty --folder"
            )


def build(index: Any) -> None:
    if not index.info().cells:
        report("building for approximate search")
        index.build_ann()


def flat_index(world: World, rows: int) -> Any:
    faiss: Any = importlib.import_module("faiss")
    faiss.omp_set_num_threads(1)
    faiss.cvar.distance_compute_blas_threshold = 20 * world.setup.width
    flat = faiss.IndexFlatIP(world.setup.width)
    for start in range(0, rows, BLOCK):
        flat.add(world.block(start, min(BLOCK, rows - start))[1])
    return flat


def with_faiss(flat: Any, rows: int, shelves: range, k: int) -> Search:
    faiss: Any = importlib.import_module("faiss")
    passing = np.isin(np.arange(rows) % SHELVES, shelves)
    chosen = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(np.packbits(passing, bitorder="little")))
    options = {} if passing.all() else {"params": chosen}
    return lambda queries: [[int(row) for row in rows if row >= 0] for rows in flat.search(queries, k, **options)[1]]


def with_index(index: Index, k: int, where: Filter | None, exact: bool) -> Search:
    return lambda queries: [[int(hit.id) for hit in hits] for hits in index.search(queries, k, where=where, exact=exact)]


def recalls(sides: dict[str, Search], queries: Vector) -> dict[str, float]:
    """The share of FAISS's best that each side finds."""
    hits_of: dict[str, list[list[int]]] = {}
    for name, search in sides.items():
        report(f"recall of {name}")
        size = FEW if name == "approximate" else BATCH
        hits_of[name] = [hits for start in range(0, len(queries), size) for hits in search(queries[start : start + size])]
    true = hits_of["faiss, exact"]
    return {
        name: float(np.mean([len(set(ours) & set(best)) / len(best) for ours, best in zip(hits, true, strict=True)]))
        for name, hits in hits_of.items()
    }


def speeds(sides: dict[str, Search], queries: Vector, setup: Setup) -> dict[str, Any]:
    """Queries per second one at a time and in batches, each repetition's, and the median ratios to FAISS."""
    rates: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in sides} for kind in ("single", "batch")}
    for repetition in range(setup.repetitions):
        for name in list(sides)[:: -1 if repetition % 2 else 1]:
            report(f"repetition {repetition + 1}: {name}")
            rates["single"][name].append(rate(sides[name], queries, 1, setup.seconds))
            rates["batch"][name].append(rate(sides[name], queries, BATCH, setup.seconds))
    ratios = {
        kind: {name: statistics.median(a / b for a, b in zip(own[name], own["faiss, exact"], strict=True)) for name in sides}
        for kind, own in rates.items()
    }
    return {"queries_per_second": rates, "ratio_to_faiss": ratios}


def rate(search: Search, queries: Vector, size: int, seconds: float) -> float:
    """Queries per second over at least `seconds`, in calls of `size`; the first call warms up and does not count."""
    search(queries[:size])
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        start = done % max(1, len(queries) - size + 1)
        search(queries[start : start + size])
        done += size
    return done / (time.perf_counter() - started)


def timed(action: Callable[[], None]) -> float:
    started = time.perf_counter()
    action()
    return round(time.perf_counter() - started, 1)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def resident_megabytes() -> int:
    """Memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1024


def report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def table(results: dict[str, dict[str, Any]], setup: Setup) -> str:
    lines = [
        f"Width {setup.width}, {setup.queries} queries, k = {setup.k}; the ratio is to exact FAISS in the same run, one thread.",
        "",
        f"| index | rows | MB on disk | MB in memory | of them | search | recall@{setup.k} "
        f"| single queries/s (ratio) | in batches of {BATCH} (ratio) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    names = {
        "float32": "embedded, float32",
        "float16": "embedded, float16",
        "int8": "embedded, int8",
        "engine": "Milvus Lite's server",
    }
    for part, figures in results.items():
        for name, of_filter in figures["filters"].items():
            for side, recall in of_filter["recall"].items():
                rates, ratios = of_filter["queries_per_second"], of_filter["ratio_to_faiss"]
                speed = [f"{statistics.median(rates[kind][side]):.1f} ({ratios[kind][side]:.2f})" for kind in ("single", "batch")]
                cells = (
                    names[part],
                    f"{figures['rows']:,}",
                    str(figures["megabytes"]),
                    str(figures["resident_megabytes"]),
                    name,
                    side,
                    f"{recall:.3f}",
                    *speed,
                )
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
