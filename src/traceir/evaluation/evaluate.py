"""Scores a checkpoint on any folder in M-BEIR's layout: local and global pools, each route, routing, reasoning and cost.

A query is hit at k if any of its positives is among the first k (M-BEIR's rule). Ties are pessimistic (metrics.py). The global
pool is all local pools of the split together, each candidate once, as UniIR scores it. The whole folder is looked at first
(folder.py), then everything is encoded into a store on disk (embeddings.py), then ranked from there (ranking.py): an
interruption costs at most one block of encoding, and any number of processes can share the work.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from traceir.data import mbeir
from traceir.data.folder import Listing, Policy, Problems, Row, read_row, survey
from traceir.errors import InputError
from traceir.evaluation.embeddings import Embedder, Embeddings, Shard
from traceir.evaluation.ranking import Pool, Ranking, rank_queries, write_run
from traceir.evaluation.results import (
    QueryOutcome,
    average,
    continue_results,
    describe_machine,
    header_of,
    read_outcomes,
    summarise,
)
from traceir.files import write_whole
from traceir.items import Encoding, Query, Route
from traceir.prompts import completion_text
from traceir.retrieval.search import EvaluatedEncoder
from traceir.suggest import did_you_mean

log = logging.getLogger(__name__)

PoolKind = Literal["local", "global"]
PromptChoice = Literal["first", "seeded", "all"]
Choice = tuple[int | None, int]
"""The number of an instruction, or None for one drawn for each query; the seed of the draw."""
PROMPTS: Final[tuple[PromptChoice, ...]] = ("first", "seeded", "all")
FORMAT: Final = 2
TOP_K: Final = 50
TOGETHER: Final = 40_000
"""Queries that are ranked in one pass over a global pool."""


def evaluate(
    encoder: EvaluatedEncoder,
    data: Path,
    out: Path,
    *,
    split: mbeir.Split = "test",
    routes: Sequence[Route] = ("auto",),
    pools: Sequence[PoolKind] = ("local",),
    prompt: PromptChoice = "first",
    seed: int = 0,
    rows: Sequence[str] | None = None,
    limit: int | None = None,
    cache: Path | None = None,
    shard: Shard = (0, 1),
    on_error: Policy = "stop",
    progress: bool = True,
) -> dict[str, Any] | None:
    """Scores rows of `data` and writes results.json, queries-ROUTE.jsonl and runs/ to `out`; returns the results.

    `rows` keeps the named rows, or all rows of a named data set; `limit` the first so many queries of a row; pools stay whole.
    `prompt` is each row's first instruction, one drawn for each query by `seed` and qid alone, or all (mean and spread over
    them). `cache` holds the embeddings (default: `out`/embeddings) and may be shared by any evaluations. `shard` (i, n) encodes
    the i-th of n shares; whoever finds everything encoded scores, the others return None. Routes and pools scored earlier into
    the same `out` are kept. Raises DataError by the policy `on_error` (folder.py), StoreError for a damaged block of the cache
    (under `skip` it is encoded again), InputError where `out` holds other results.
    """
    for route in routes:
        encoder.encode_queries([], route=route)  # a route that the model lacks is told now, not behind the candidates
    tasks = mbeir.find_tasks(data, split)
    chosen = {task.name for task in choose_tasks(tasks, rows, data)}
    header = header_of(encoder, FORMAT, data / "meta.json")
    header |= {"split": split, "prompt": prompt if prompt != "seeded" else f"seeded {seed}", "limit": limit}
    results = continue_results(out, header | {"machine": describe_machine(), **encoder.run_settings})
    problems, listing = Problems(on_error), Listing(data)
    read = [read_row(task, problems, listing, limit) for task in tasks if "global" in pools or task.name in chosen]
    problems.settle()
    results["problems"] = problems.summary()
    for row in read:
        if row.task.name in chosen:
            _prompts(row.task)  # a row without instructions is told now too
    embedder = Embedder(encoder, cache or out / "embeddings", shard=shard, repair=on_error == "skip", progress=progress)
    encoded = _encode(embedder, read, [row for row in read if row.task.name in chosen], routes, _choices(prompt, seed))
    if encoded is None:
        log.info("shard %d of %d is done; others are not", *shard)
        return None
    for kind in pools:
        for route in routes:
            scored = results.setdefault("routes" if kind == "local" else "global", {}).setdefault(route, {})
            scored |= _score(encoder, encoded, kind, route, out, progress)
    _finish(out, results)
    return results


def dry_run(
    encoder: EvaluatedEncoder,
    data: Path,
    *,
    split: mbeir.Split = "test",
    routes: Sequence[Route] = ("auto",),
    rows: Sequence[str] | None = None,
    limit: int | None = None,
    sample: int = 64,
) -> str:
    """A dry run: what `evaluate` would score, everything wrong with the folder, and how long encoding would take, as Markdown.

    The time is that of `sample` candidates and queries of each row, so it knows nothing of longer texts further down.
    """
    problems, listing = Problems("skip"), Listing(data)
    read = [read_row(task, problems, listing, limit) for task in choose_tasks(mbeir.find_tasks(data, split), rows, data)]
    total = 0.0
    for row in read:
        items, queries = list(islice(row.items(), sample)), list(islice(_queries(row, 0, 0), sample))
        started = time.perf_counter()
        encoder.encode_items(items)
        middle = time.perf_counter()
        for route in routes:
            encoder.encode_queries(queries, route=route)
        ended = time.perf_counter()
        total += (middle - started) * len(row.dids) / len(items) + (ended - middle) * len(row.records) / len(queries)
    hours, minutes = divmod(round(total / 60), 60)
    clock = f"{hours} h {minutes:02d} min" if total >= 60 else f"{total:.0f} s"
    return f"{survey(read, problems)}\nEncoding all of it takes about {clock} on this machine.\n"


def choose_tasks(tasks: list[mbeir.Task], rows: Sequence[str] | None, data: Path) -> list[mbeir.Task]:
    """The tasks of the named rows, or of the named data sets; InputError for a name that is not there."""
    if rows is None:
        return tasks
    known = {task.name for task in tasks} | {task.dataset for task in tasks}
    if unknown := sorted(set(rows) - known):
        raise InputError(f"rows {unknown} are not in {data}{did_you_mean(unknown[0], known)}; it has {sorted(known)}")
    return [task for task in tasks if task.name in rows or task.dataset in rows]


def _choices(prompt: PromptChoice, seed: int) -> dict[str, Choice]:
    """The ways to choose instructions, by what goes into the names of their files."""
    if prompt == "all":
        return {f"-prompt{number + 1}": (number, seed) for number in range(4)}
    if prompt not in PROMPTS:
        raise InputError(f"prompt {prompt!r} is unknown; choose one of {', '.join(PROMPTS)}")
    return {"": (0 if prompt == "first" else None, seed)}


def _prompts(task: mbeir.Task) -> tuple[str, ...]:
    """The instructions of a row; DataError where the folder has none."""
    return mbeir.read_instructions(task.root).prompts(task.dataset_id, task.query_modality, task.cand_modality)


def _queries(row: Row, number: int | None, seed: int) -> Iterator[Query]:
    """The row's queries with one of its instructions, in the order of its records."""
    task, prompts = row.task, _prompts(row.task)
    for record in row.records:
        drawn = int.from_bytes(hashlib.sha256(f"{seed} {record.qid}".encode()).digest()[:8], "big") if number is None else number
        yield mbeir.to_query(record, prompts[drawn % len(prompts)], task.root)


@dataclass(frozen=True)
class _Encoded:
    """All vectors of an evaluation: pools by row, queries by (route, suffix, row)."""

    rows: Sequence[Row]
    scored: Sequence[Row]
    suffixes: tuple[str, ...]
    candidates: Mapping[str, Embeddings]
    queries: Mapping[tuple[Route, str, str], Embeddings]


def _encode(
    embedder: Embedder, rows: Sequence[Row], scored: Sequence[Row], routes: Sequence[Route], choices: Mapping[str, Choice]
) -> _Encoded | None:
    """This shard's share of the pools of `rows` and the queries of `scored`; None while other shares are missing."""
    pools: dict[str, Embeddings] = {}
    queries: dict[tuple[Route, str, str], Embeddings] = {}
    for row in rows:
        log.info("%s: %d candidates", row.task.name, len(row.dids))
        if (embedded := embedder.items(row.items, len(row.dids))) is not None:
            pools[row.task.name] = embedded
    for route, (suffix, choice), row in product(routes, choices.items(), scored):
        log.info("%s: %d queries, route %s", row.task.name, len(row.records), route)
        if (embedded := embedder.queries(partial(_queries, row, *choice), len(row.records), route)) is not None:
            queries[route, suffix, row.task.name] = embedded
    complete = len(pools) == len(rows) and len(queries) == len(routes) * len(choices) * len(scored)
    return _Encoded(rows, scored, tuple(choices), pools, queries) if complete else None


def _score(
    encoder: EvaluatedEncoder, encoded: _Encoded, kind: PoolKind, route: Route, out: Path, progress: bool
) -> dict[str, dict[str, Any]]:
    """Ranks one route in one kind of pool, writes its files, and returns its entries of results.json by row."""
    outcomes: dict[str, list[list[QueryOutcome]]] = {row.task.name: [] for row in encoded.scored}
    sizes: dict[str, int] = {}
    run_id = encoder.fingerprint.replace(" ", "_")
    for suffix in encoded.suffixes:
        name = f"{route}{'-global' if kind == 'global' else ''}{suffix}"
        for row, pool, ranking in _rank(encoded, kind, route, suffix, progress):
            qids, file = [record.qid for record in row.records], out / "runs" / f"{row.task.name}-{name}.txt"
            write_run(file, qids, ranking, pool, run_id=run_id, task_id=row.task.task_id)
            encodings = encoded.queries[route, suffix, row.task.name].encodings()
            ranked = zip(qids, ranking.best.tolist(), encodings, strict=True)
            outcomes[row.task.name].append([_outcome(encoder, row, *query) for query in ranked])
            sizes[row.task.name] = len(pool)
        _append(out / f"queries-{name}.jsonl", [outcome for own in outcomes.values() for outcome in own[-1]])
    sums = {}
    for row in encoded.scored:
        name = row.task.name
        spent = sum(encoded.queries[route, suffix, name].seconds for suffix in encoded.suffixes)
        sums[name] = _sum(outcomes[name], row.task.metric_k, sizes[name]) | {
            "pool": sizes[name],
            "queries_per_second": round(sum(map(len, outcomes[name])) / max(spent, 1e-9), 2),
            "candidates_per_second": round(len(row.dids) / max(encoded.candidates[name].seconds, 1e-9), 2),
        }
    return sums


def _rank(encoded: _Encoded, kind: PoolKind, route: Route, suffix: str, progress: bool) -> Iterator[tuple[Row, Pool, Ranking]]:
    """Each row with its pool and ranking; rows of the global pool are ranked in one pass, up to TOGETHER queries."""
    union = Pool([(row.dids, encoded.candidates[row.task.name]) for row in encoded.rows]) if kind == "global" else None
    groups: list[list[Row]] = []
    for row in encoded.scored:
        if union is not None and groups and sum(len(other.records) for other in (*groups[-1], row)) <= TOGETHER:
            groups[-1].append(row)
        else:
            groups.append([row])
    for group in groups:
        pool = union or Pool([(row.dids, encoded.candidates[row.task.name]) for row in group])
        queries_QD = np.concatenate([encoded.queries[route, suffix, row.task.name].matrix() for row in group])
        right = [pool.positions(row.relevant[record.qid]) for row in group for record in row.records]
        ranking = rank_queries(queries_QD, pool, right, top_k=min(TOP_K, len(pool)), progress=progress)
        first = 0
        for row in group:
            own = slice(first, first := first + len(row.records))
            yield row, pool, Ranking(ranking.ranks[own], ranking.scores[own], ranking.positions[own], ranking.size)


def _outcome(encoder: EvaluatedEncoder, row: Row, qid: str, rank: int, encoding: Encoding) -> QueryOutcome:
    label, exact, answer_exact = row.labels.get(qid), None, None
    if label is not None and label.z:
        wanted = encoder.as_written(completion_text(label.reasoning, label.answer))
        answer = encoder.as_written(label.answer or "")
        exact, answer_exact = encoding.reasoning == wanted, encoding.reasoning.endswith(answer)
    return QueryOutcome(
        row.task.name, qid, rank, encoding.route, encoding.tokens, encoding.truncated, round(encoding.emb_probability, 6),
        label.steps if label is not None else None, exact, answer_exact, encoding.reasoning,
    )  # fmt: skip


def _sum(outcomes: Sequence[list[QueryOutcome]], k: int, pool: int) -> dict[str, Any]:
    """Sums of a row: of one choice of instructions, or the mean of the hits over several, with each and their spread."""
    every = [summarise(own, k, pool) for own in outcomes]
    summary = every[0]
    if len(every) > 1:
        each = [other[f"hit@{k}"] for other in every]
        hits = [name for name in summary if name.startswith("hit@")]
        summary |= {name: round(float(np.mean([other[name] for other in every])), 4) for name in hits}
        summary |= {"prompts": each, "prompt_spread": round(max(each) - min(each), 4)}
    return summary


def _finish(out: Path, results: dict[str, Any]) -> None:
    results.setdefault("global", {})
    for pool, name in (("routes", "average"), ("global", "average_global")):
        for route, scored in results[pool].items():
            results[pool][route] = {row: scored[row] for row in sorted(scored, key=mbeir.row_order)}
        results[name] = {route: average(scored) for route, scored in results[pool].items()}
    write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")


def _append(file: Path, outcomes: Sequence[QueryOutcome]) -> None:
    """Replaces the lines of the rows scored, so that a row scored again is not there twice."""
    rows = {outcome.row for outcome in outcomes}
    kept = [outcome for outcome in read_outcomes(file) if outcome.row not in rows] if file.is_file() else []
    ordered = sorted([*kept, *outcomes], key=lambda outcome: mbeir.row_order(outcome.row))
    write_whole(file, "".join(json.dumps(asdict(outcome)) + "\n" for outcome in ordered))
