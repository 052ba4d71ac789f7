"""Vectors of fewer components and of fewer bytes: recall on MiniBEIR's local test pools, bytes, and the speed of exact search.

Each model's queries (route auto) and candidates are encoded once at full width and kept in FOLDER; narrower vectors are their
first components, scaled to length 1, which are the encoder's own with `dim` (tests/test_encoder.py). Every pool is put into an
index of each width and storage and searched exactly. A query counts as complex where its label has two steps or more. Speed:
single queries over --speed-rows synthetic vectors (index_scale.py), the indexes in turn; the median over the rounds of the ratio
to float32 at full width. It is kept in FOLDER too, and measured alone where no model is given.

    python -m benchmarks.narrow nested=CHECKPOINT control=CHECKPOINT --data data/minibeir --folder out/narrow
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from benchmarks.index_scale import Setup, World
from traceir.data import mbeir
from traceir.data.folder import Listing, Problems, Row, read_row
from traceir.evaluation.embeddings import Embedder, Embeddings
from traceir.evaluation.evaluate import choose_tasks
from traceir.evaluation.results import describe_machine
from traceir.files import write_whole
from traceir.index import Index, open_index
from traceir.index.store import StoredType
from traceir.items import Item, Query, Vector
from traceir.library import load_encoder

STORES: tuple[StoredType, ...] = get_args(StoredType)
KS = (1, 5)
KINDS = ("simple", "complex")
Hits = dict[str, list[bool]]
"""By kind of query and k, such as `complex 5`: whether each query had a right candidate among the first k."""


@dataclass(frozen=True)
class Pool:
    """One row of MiniBEIR as vectors: queries [Q, D], candidates [N, D]; what is right for each query, and which are complex."""

    queries: Vector
    candidates: Vector
    dids: tuple[str, ...]
    right: list[frozenset[str]]
    complex: list[bool]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=CHECKPOINT")
    parser.add_argument("--data", type=Path, default=Path("data/minibeir"))
    parser.add_argument("--folder", type=Path, required=True, help="where vectors are kept; what is there is not encoded again")
    parser.add_argument("--rows", help="of MiniBEIR, with commas between (default: all)")
    parser.add_argument("--limit", type=int, help="the first so many queries of each row; pools stay whole")
    parser.add_argument("--width", type=int, default=128, help="of the models")
    parser.add_argument("--speed-rows", type=int, default=200_000)
    parser.add_argument("--speed-queries", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write all figures here as JSON")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    speeds = known_speed(
        options.folder, Setup(options.speed_rows, 0, options.width, options.speed_queries, 10, options.rounds, 0.0, options.seed)
    )
    recalls: dict[str, dict[str, dict[str, float]]] = {}
    for name, _, checkpoint in (model.partition("=") for model in options.models):
        pools = list(encoded(checkpoint, options.data, options.folder, options.rows, options.limit))
        recalls[name] = {f"{dim} {store}": recall(pools, dim, store) for dim in dims(options.width) for store in STORES}
    about = {name: str(getattr(options, name)) for name in ("rows", "limit", "speed_rows", "speed_queries", "rounds", "seed")}
    shown = table(recalls, speeds)
    print(shown)
    if options.out:
        results = {"machine": describe_machine(), "settings": about, "recall": recalls, "speed": speeds}
        write_whole(options.out, json.dumps(results, indent=1) + "\n")
    if options.markdown:
        write_whole(options.markdown, page(shown, options, about))
    return 0


def dims(width: int) -> list[int]:
    return [width // part for part in (1, 2, 4, 8)]


def encoded(checkpoint: str, data: Path, folder: Path, rows: str | None, limit: int | None) -> Iterator[Pool]:
    """The rows of the test split, encoded at full width."""
    embedder = Embedder(load_encoder(checkpoint), folder / "embeddings", progress=sys.stderr.isatty())
    for task in choose_tasks(mbeir.find_tasks(data, "test"), rows.split(",") if rows else None, data):
        row = read_row(task, Problems("stop"), Listing(data), limit)
        candidates = embedder.items(row.items, len(row.dids))
        queries = embedder.queries(lambda row=row: queries_of(row), len(row.records), "auto")
        assert isinstance(candidates, Embeddings) and isinstance(queries, Embeddings)
        right = [row.relevant[record.qid] for record in row.records]
        steps = [row.labels[record.qid].steps for record in row.records]
        yield Pool(queries.matrix(), candidates.matrix(), row.dids, right, [count > 1 for count in steps])
        print(f"{checkpoint}: {task.name}", file=sys.stderr)


def queries_of(row: Row) -> Iterator[Query]:
    """A row's queries with its first instruction."""
    task = row.task
    prompts = mbeir.read_instructions(task.root).prompts(task.dataset_id, task.query_modality, task.cand_modality)
    return (mbeir.to_query(record, prompts[0], task.root) for record in row.records)


def recall(pools: Sequence[Pool], dim: int, store: StoredType) -> dict[str, float]:
    """Shares of queries by `Hits`' keys; the mean over all pools' queries."""
    hits: Hits = defaultdict(list)
    for pool in pools:
        with tempfile.TemporaryDirectory() as folder, filled(Path(folder), cut(pool.candidates, dim), pool.dids, store) as index:
            best = index.search(cut(pool.queries, dim), max(KS))
        for found, right, is_complex in zip(best, pool.right, pool.complex, strict=True):
            for k in KS:
                hits[f"{KINDS[is_complex]} {k}"].append(any(hit.id in right for hit in found[:k]))
    return {name: sum(own) / len(own) for name, own in hits.items()}


def cut(vectors_ND: Vector, dim: int) -> Vector:
    first: Vector = vectors_ND[:, :dim]
    return first / np.linalg.norm(first, axis=1, keepdims=True)


def filled(folder: Path, vectors_ND: Vector, ids: Sequence[str], store: StoredType) -> Index:
    """A new index of texts that have these vectors."""
    dim = vectors_ND.shape[1]
    index = open_index(
        folder / f"{dim}-{store}", fingerprint="narrow", prompt_version="narrow", dim=dim, dtype=store, create=True
    )
    for start in range(0, len(ids), 5000):
        items = [Item.of(text=id, id=id) for id in ids[start : start + 5000]]
        index.upsert(items, vectors_ND[start : start + 5000])
    return index


def known_speed(folder: Path, setup: Setup) -> dict[str, dict[str, Any]]:
    """What `speed` measured in this folder, or measures now."""
    file, key = folder / "speed.json", asdict(setup)
    known = json.loads(file.read_text()) if file.is_file() else {}
    if known.get("setup") != key:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            known = {"setup": key, "speed": speed(setup, Path(scratch))}
        write_whole(file, json.dumps(known, indent=1) + "\n")
    figures: dict[str, dict[str, Any]] = known["speed"]
    return figures


def speed(setup: Setup, folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes of a vector in memory and in the file, and the ratio of single queries per second to float32 at full width."""
    world, rows, width = World(setup), setup.rows, setup.width
    vectors = np.concatenate([world.block(start, min(5000, rows - start))[1] for start in range(0, rows, 5000)])
    ids = [f"{number:08d}" for number in range(rows)]
    sides: dict[str, tuple[Index, Vector]] = {}
    figures: dict[str, dict[str, Any]] = {}
    for dim in dims(width):
        for store in STORES:
            index = filled(folder, cut(vectors, dim), ids, store)
            index.search(np.eye(1, dim, dtype=np.float32), 1)  # reads the vectors
            per_vector = dim * {"float32": 4, "float16": 2, "int8": 1}[store]
            figures[f"{dim} {store}"] = {"bytes": per_vector, "file bytes": index.info().bytes / rows}
            sides[f"{dim} {store}"] = index, cut(world.queries(), dim)
    spent: Mapping[str, list[float]] = defaultdict(list)
    for _ in range(setup.repetitions):
        for name, (index, queries) in sides.items():
            started = time.process_time()
            for query in queries:
                index.search(query[None], 10)
            spent[name].append(time.process_time() - started)
    whole = spent[f"{width} float32"]
    for name, own in spent.items():
        figures[name]["speed"] = statistics.median(first / other for first, other in zip(whole, own, strict=True))
        sides[name][0].close()
    return figures


def table(recalls: Mapping[str, Mapping[str, Mapping[str, float]]], speeds: Mapping[str, Mapping[str, Any]]) -> str:
    columns = [f"{kind} {k}" for kind in KINDS for k in KS]
    titles = [f"{model}, {kind} R@{k}" for model in recalls for kind in KINDS for k in KS]
    head = ["components", "store", "bytes in memory", *titles, "search, times float32 at full width"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, side in speeds.items():
        shares = [f"{100 * recalls[model][name][column]:.1f}" for model in recalls for column in columns]
        lines.append(f"| {' | '.join([*name.split(), str(side['bytes']), *shares, format(side['speed'], '.2f')])} |")
    return "\n".join(lines)


def page(shown: str, options: argparse.Namespace, about: Mapping[str, str]) -> str:
    """docs/results/narrow.md."""
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in about.items())
    return f"""# Narrow vectors

{shown}

R@k: share of queries, in per cent, with a right candidate among the first k of MiniBEIR's local test pools, route auto; complex:
two steps or more by the label. Exact search. `nested`: the bundled model trained on by `--preset mini-nested`; `control`: by the
same without nested losses, `--set matryoshka_dims=`; `bundled`: as it ships. Narrower vectors are the first components, scaled to
length 1. Bytes in memory are of one vector; the file keeps int8 as float32, by which the best are scored again. Search: single
queries, CPU time, the median of the rounds' ratios in one run.

`python -m benchmarks.narrow {" ".join(model.partition("=")[0] + "=CHECKPOINT" for model in options.models)} --folder out/narrow`;
{settings}. {json.dumps(describe_machine())}
"""


if __name__ == "__main__":
    sys.exit(main())
