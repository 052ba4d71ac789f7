"""Exact search over a million stored vectors against faiss, on one thread each, and the memory it takes.

Random unit vectors are written through the embedding store, block by block. One child process streams them from disk and reports
its peak resident memory. Another searches them with `rank_queries`, from one array in memory and from memory-mapped blocks, and
with faiss's IndexFlatIP, from memory, in turn; the order changes from one repetition to the next and the figure is the median of
the repetitions' ratios, so that a machine that slows down for a while slows all.

faiss is timed as it is installed and with `distance_compute_blas_threshold` at 20, its default of former releases: recent ones
compute inner products of this many queries without BLAS, which is several times slower. The second is the one to compare with.

    python -m benchmarks.search_million                    # 2 GB of disk, minutes
    python -m benchmarks.search_million --rows 100000      # seconds
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from traceir.errors import InputError
from traceir.evaluation.embeddings import Embeddings, EmbeddingStore, EncoderIdentity, Matrix
from traceir.evaluation.metrics import TIE
from traceir.evaluation.ranking import Ranking, rank_queries
from traceir.items import Encoding, Item, Vector

GIB = 2**30
MEMORY_LIMIT = 2 * GIB
FORMER_THRESHOLD = 20
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
STAGES = ("write", "stream", "compare")


@dataclass(frozen=True)
class Setup:
    """What is searched: N vectors of D components, Q queries, the best k."""

    rows: int
    queries: int
    width: int
    k: int
    repetitions: int
    seed: int


class Candidates:
    """N items, made when asked for."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[Item]:
        return (Item.of(text=f"candidate {number}", id=str(number)) for number in range(self.rows))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("-k", type=int, default=50)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the store here instead of in a temporary folder")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    setup = Setup(options.rows, options.queries, options.width, options.k, options.repetitions, options.seed)
    if setup.queries > setup.rows or min(setup.queries, setup.width, setup.k, setup.repetitions) < 1 or setup.seed < 0:
        raise InputError(f"{setup}: give at least 1 of each, as many rows as queries or more, and a seed of at least 0")
    if options.stage:
        print(json.dumps(run_stage(options.stage, options.folder, setup)))
        return 0
    if options.folder:
        return report(setup, options.folder)
    with tempfile.TemporaryDirectory() as folder:
        return report(setup, Path(folder))


def report(setup: Setup, folder: Path) -> int:
    """Runs the stages, each in a process of one thread, and prints what they found; 1 where a promise is broken."""
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, 1 thread used; Python {platform.python_version()}, "
          f"numpy {np.__version__}, faiss {importlib.import_module('faiss').__version__}")  # fmt: skip
    print(f"setup:   {asdict(setup)}")
    written, streamed, compared = (in_child(stage, folder, setup) for stage in STAGES)
    print(f"store:   {written['seconds']:.1f} s to write {written['blocks']} blocks")
    print(f"stream:  {streamed['seconds']:.2f} s with ranks of one positive a query; peak resident memory "
          f"{streamed['peak'] / GIB:.3f} GiB, over {setup.rows * setup.width * 4 / GIB:.3f} GiB of vectors")  # fmt: skip
    for name, seconds in compared["seconds"].items():
        print(f"search:  {statistics.median(seconds):7.2f} s  {name}  ({', '.join(f'{duration:.2f}' for duration in seconds)})")
    for name in list(compared["seconds"])[3:]:
        for ours in list(compared["seconds"])[:3]:
            paired = zip(compared["seconds"][ours], compared["seconds"][name], strict=True)
            print(f"ratio:   {statistics.median(a / b for a, b in paired):7.3f}    {ours} / {name}")
    print(f"best k:  {compared['same']} of {compared['places']} places are the same; {compared['tied']} differ with scores "
          f"within {TIE:g}; {compared['different']} differ")  # fmt: skip
    return int(compared["different"] > 0 or streamed["peak"] >= MEMORY_LIMIT)


def in_child(stage: str, folder: Path, setup: Setup) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.search_million", "--stage", stage, "--folder", str(folder)]
    for name, value in asdict(setup).items():
        command += ["-k" if name == "k" else f"--{name}", str(value)]
    done = subprocess.run(command, env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, check=True)
    results: dict[str, Any] = json.loads(done.stdout)
    return results


def run_stage(stage: str, folder: Path, setup: Setup) -> dict[str, Any]:
    store = EmbeddingStore(folder, EncoderIdentity("random", f"seed {setup.seed}", setup.width))
    candidates, started = Candidates(setup.rows), time.perf_counter()
    if stage == "write":
        plan = store.fill(candidates, lambda chunk: draw_block(chunk, setup))
        return {"blocks": len(plan), "seconds": time.perf_counter() - started}
    embeddings, queries_QD = store.open(store.plan(candidates)), draw_queries(setup)
    if stage == "stream":
        started = time.perf_counter()
        rank_queries(queries_QD, embeddings, [[query] for query in range(setup.queries)], top_k=setup.k, progress=True)
        return {"seconds": time.perf_counter() - started, "peak": peak_memory()}
    return compare(embeddings, queries_QD, setup)


def compare(embeddings: Embeddings, queries_QD: Vector, setup: Setup) -> dict[str, Any]:
    """Seconds of each side by repetition, and whether both found the same."""
    faiss: Any = importlib.import_module("faiss")
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(setup.width)
    for block_ND in embeddings:
        index.add(np.ascontiguousarray(block_ND))
    as_installed = faiss.cvar.distance_compute_blas_threshold

    def with_faiss(threshold: int) -> Callable[[], Any]:
        def search() -> Any:
            faiss.cvar.distance_compute_blas_threshold = threshold
            return index.search(queries_QD, setup.k)

        return search

    def with_ours(blocks: Iterable[Matrix], relevant: list[list[int]]) -> Callable[[], Ranking]:
        return lambda: rank_queries(queries_QD, blocks, relevant, top_k=setup.k)

    nothing: list[list[int]] = [[] for _ in range(setup.queries)]
    one_each = [[query] for query in range(setup.queries)]
    sides: dict[str, Callable[[], Any]] = {
        "ours, from memory": with_ours([embeddings.matrix()], nothing),
        "ours, from disk": with_ours(embeddings, nothing),
        "ours, from disk, with ranks of one positive a query": with_ours(embeddings, one_each),
        f"faiss with BLAS (threshold {FORMER_THRESHOLD})": with_faiss(FORMER_THRESHOLD),
        f"faiss as installed (threshold {as_installed})": with_faiss(as_installed),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    answers: dict[str, Any] = {}
    for repetition in range(setup.repetitions):
        for name in list(sides)[:: -1 if repetition % 2 else 1]:
            started = time.perf_counter()
            answers[name] = sides[name]()
            seconds[name].append(time.perf_counter() - started)
    ours, (scores, positions) = answers["ours, from disk"], list(answers.values())[-1]
    same = ours.positions == positions
    tied = ~same & (np.abs(ours.scores - scores) <= TIE)
    counts = {"same": same, "tied": tied, "different": ~same & ~tied}
    return {"seconds": seconds, "places": same.size, **{name: int(mask.sum()) for name, mask in counts.items()}}


def draw_block(chunk: Sequence[Item], setup: Setup) -> list[Encoding]:
    vectors = unit(np.random.default_rng([setup.seed, int(chunk[0].id or 0)]), len(chunk), setup.width)
    return [Encoding(vector, "direct", "", 0, 1.0, False) for vector in vectors]


def draw_queries(setup: Setup) -> Vector:
    return unit(np.random.default_rng([setup.seed, setup.rows, 1]), setup.queries, setup.width)


def unit(draw: np.random.Generator, rows: int, width: int) -> Vector:
    vectors: Vector = draw.standard_normal((rows, width), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def peak_memory() -> int:
    """Bytes of peak resident memory of this process alone; `ru_maxrss` may contain that of the process that started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
