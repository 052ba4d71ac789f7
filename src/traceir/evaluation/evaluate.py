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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from traceir.data import mbeir
from traceir.data.folder import Listing, Policy, Problems, Row, read_row, survey
from traceir.errors import InputError
from traceir.evaluation.embedder import Embedder
from traceir.evaluation.embeddings import Embeddings, Shard
from traceir.evaluation.judged import Judged, average, continue_results, describe_machine, read_judged, summarise
from traceir.evaluation.ranking import Pool, Ranking, rank_queries, write_run
from traceir.files import write_whole
from traceir.items import Encoding, Query, Route
from traceir.prompts import completion_text
from traceir.search import EvaluatedEncoder
from traceir.suggest import did_you_mean

log = logging.getLogger(__name__)

PoolKind = Literal["local", "global"]
PromptChoice = Literal["first", "seeded", "all"]
PROMPTS: Final[tuple[PromptChoice, ...]] = ("first", "seeded", "all")
FORMAT: Final = 2
TOP_K: Final = 50
TOGETHER: Final = 40_000
"""Queries that are ranked in one pass over a global pool."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to choose the instruction of each query; `suffix` goes into the names of its files."""

    suffix: str
    choose: Callable[[Sequence[str], str], str]


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
    chosen = choose_tasks(tasks, rows, data)
    results = continue_results(out, _header(encoder, data, split, prompt, seed, limit))
    problems, listing = Problems(on_error), Listing(data)
    read = [read_row(task, problems, listing, limit) for task in (tasks if "global" in pools else chosen)]
    problems.settle()
    results["problems"] = problems.summary()
    names = {task.name for task in chosen}
    work = _Work(encoder, data, cache or out / "embeddings", shard, on_error == "skip", progress)
    encoded = work.encode(read, [row for row in read if row.task.name in names], routes, variants(prompt, seed))
    if encoded is None:
        return None
    out.mkdir(parents=True, exist_ok=True)
    for kind in pools:
        for route in routes:
            sums = results.setdefault("routes" if kind == "local" else "global", {}).setdefault(route, {})
            sums |= _score(encoder, encoded, kind, route, out, progress)
    _finish(out, results)
    return results


def rehearse(
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
    instructions, total = mbeir.read_instructions(data), 0.0
    for row in read:
        prompts = instructions.prompts(row.task.dataset_id, row.task.query_modality, row.task.cand_modality)
        items = list(islice(row.items(), sample))
        queries = [mbeir.to_query(record, prompts[0], data) for record in row.records[:sample]]
        started = time.perf_counter()
        encoder.encode_items(items)
        middle = time.perf_counter()
        for route in routes:
            encoder.encode_queries(queries, route=route)
        ended = time.perf_counter()
        total += (middle - started) * len(row.dids) / len(items) + (ended - middle) * len(row.records) / len(queries)
    return f"{survey(read, problems)}\nEncoding all of it takes about {_clock(total)} on this machine.\n"


def _clock(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if seconds >= 60 else f"{seconds:.0f} s"


def variants(prompt: PromptChoice, seed: int) -> list[Variant]:
    """The ways to choose instructions: one, or for `all` one for each of M-BEIR's four."""
    if prompt == "first":
        return [Variant("", lambda prompts, _: prompts[0])]
    if prompt == "seeded":
        return [Variant("", lambda prompts, qid: prompts[_draw(seed, qid) % len(prompts)])]
    if prompt != "all":
        raise InputError(f"prompt {prompt!r} is unknown; choose one of {', '.join(PROMPTS)}")
    return [Variant(f"-prompt{number + 1}", _pick(number)) for number in range(4)]


def choose_tasks(tasks: list[mbeir.Task], rows: Sequence[str] | None, data: Path) -> list[mbeir.Task]:
    """The tasks of the named rows, or of the named data sets; InputError for a name that is not there."""
    if rows is None:
        return tasks
    known = {task.name for task in tasks} | {task.dataset for task in tasks}
    if unknown := sorted(set(rows) - known):
        raise InputError(f"rows {unknown} are not in {data}{did_you_mean(unknown[0], known)}; it has {sorted(known)}")
    return [task for task in tasks if task.name in rows or task.dataset in rows]


@dataclass(frozen=True)
class _Encoded:
    """All vectors of an evaluation: pools by row, queries by (route, suffix of the variant, row)."""

    rows: Sequence[Row]
    scored: Sequence[Row]
    suffixes: tuple[str, ...]
    candidates: Mapping[str, Embeddings]
    queries: Mapping[tuple[Route, str, str], Embeddings]

    def pools(self, kind: PoolKind) -> dict[str, Pool]:
        """The pool that each scored row is ranked in; under `global` it is one and the same."""
        if kind == "global":
            union = Pool([(row.dids, self.candidates[row.task.name]) for row in self.rows])
            return {row.task.name: union for row in self.scored}
        return {row.task.name: Pool([(row.dids, self.candidates[row.task.name])]) for row in self.scored}


class _Work:
    """The encoding of one evaluation."""

    def __init__(self, encoder: EvaluatedEncoder, data: Path, cache: Path, shard: Shard, repair: bool, progress: bool) -> None:
        self.embedder = Embedder(encoder, cache, shard=shard, repair=repair, progress=progress)
        self.instructions = mbeir.read_instructions(data)

    def encode(
        self, rows: Sequence[Row], scored: Sequence[Row], routes: Sequence[Route], chosen: Sequence[Variant]
    ) -> _Encoded | None:
        """This shard's share of the pools of `rows` and the queries of `scored`; None while other shares are missing."""
        candidates = {row.task.name: self.candidates(row) for row in rows}
        queries = {
            (route, variant.suffix, row.task.name): self.queries(row, route, variant)
            for route in routes
            for variant in chosen
            for row in scored
        }
        whole = {name: found for name, found in candidates.items() if found is not None}
        asked = {key: found for key, found in queries.items() if found is not None}
        if len(whole) < len(candidates) or len(asked) < len(queries):
            log.info("shard %d of %d is done; others are not", *self.embedder.shard)
            return None
        return _Encoded(rows, scored, tuple(variant.suffix for variant in chosen), whole, asked)

    def candidates(self, row: Row) -> Embeddings | None:
        """The row's local pool, in the order of its dids; None while other shards are not done."""
        log.info("%s: %d candidates", row.task.name, len(row.dids))
        return self.embedder.items(row.items, len(row.dids))

    def queries(self, row: Row, route: Route, variant: Variant) -> Embeddings | None:
        """The row's queries by one route, in the order of its records; None while other shards are not done."""
        prompts = self.instructions.prompts(row.task.dataset_id, row.task.query_modality, row.task.cand_modality)

        def make() -> Iterator[Query]:
            for record in row.records:
                yield mbeir.to_query(record, variant.choose(prompts, record.qid), row.task.root)

        log.info("%s: %d queries, route %s", row.task.name, len(row.records), route)
        return self.embedder.queries(make, len(row.records), route)


def _score(
    encoder: EvaluatedEncoder, encoded: _Encoded, kind: PoolKind, route: Route, out: Path, progress: bool
) -> dict[str, dict[str, Any]]:
    """Ranks one route in one kind of pool, writes its files, and returns its entries of results.json by row."""
    pools = encoded.pools(kind)
    judged: dict[str, list[list[Judged]]] = {row.task.name: [] for row in encoded.scored}
    for suffix in encoded.suffixes:
        name = f"{route}{'-global' if kind == 'global' else ''}{suffix}"
        for row, ranking in _rank(encoded, pools, route, suffix, progress):
            _write_run(out, row, ranking, pools[row.task.name], name, encoder.fingerprint)
            judged[row.task.name].append(_judge(encoder, row, encoded.queries[route, suffix, row.task.name], ranking))
        _append(out / f"queries-{name}.jsonl", [one for own in judged.values() for one in own[-1]])
    sums = {}
    for row in encoded.scored:
        name = row.task.name
        spent = sum(encoded.queries[route, suffix, name].seconds for suffix in encoded.suffixes)
        sums[name] = _sum(judged[name], row.task.metric_k, len(pools[name])) | {
            "pool": len(pools[name]),
            "queries_per_second": round(sum(len(own) for own in judged[name]) / max(spent, 1e-9), 2),
            "candidates_per_second": round(len(row.dids) / max(encoded.candidates[name].seconds, 1e-9), 2),
        }
    return sums


def _rank(
    encoded: _Encoded, pools: Mapping[str, Pool], route: Route, suffix: str, progress: bool
) -> Iterator[tuple[Row, Ranking]]:
    """Each row with its ranking; rows that share a pool are ranked in one pass, up to TOGETHER queries."""
    groups: list[list[Row]] = []
    for row in encoded.scored:
        last = groups[-1] if groups else []
        shared = last and pools[last[0].task.name] is pools[row.task.name]
        if shared and sum(len(one.records) for one in last) + len(row.records) <= TOGETHER:
            last.append(row)
        else:
            groups.append([row])
    for group in groups:
        pool = pools[group[0].task.name]
        vectors_QD = np.concatenate([encoded.queries[route, suffix, row.task.name].matrix() for row in group])
        right = [pool.places(row.relevant[record.qid]) for row in group for record in row.records]
        ranking = rank_queries(vectors_QD, pool, right, top_k=min(TOP_K, len(pool)), progress=progress)
        first = 0
        for row in group:
            last_one = first + len(row.records)
            own = slice(first, last_one)
            yield row, Ranking(ranking.ranks[own], ranking.scores[own], ranking.places[own], ranking.size)
            first = last_one


def _judge(encoder: EvaluatedEncoder, row: Row, embedded: Embeddings, ranking: Ranking) -> list[Judged]:
    return [
        _compare(encoder, row.task.name, record.qid, int(rank), encoding, row.labels.get(record.qid))
        for record, rank, encoding in zip(row.records, ranking.best, embedded.encodings(), strict=True)
    ]


def _compare(encoder: EvaluatedEncoder, row: str, qid: str, rank: int, encoding: Encoding, label: mbeir.Label | None) -> Judged:
    exact = answer_exact = None
    if label is not None and label.z:
        wanted = encoder.as_written(completion_text(label.reasoning, label.answer))
        answer = encoder.as_written(label.answer or "")
        exact, answer_exact = encoding.reasoning == wanted, encoding.reasoning.endswith(answer)
    steps = label.steps if label is not None else None
    return Judged(
        row, qid, rank, encoding.route, encoding.tokens, encoding.truncated, round(encoding.emb_probability, 6),
        steps, exact, answer_exact, encoding.reasoning,
    )  # fmt: skip


def _sum(judged: Sequence[list[Judged]], k: int, pool: int) -> dict[str, Any]:
    """Sums of a row: of one choice of instructions, or the mean of the hits over several, with each and their spread."""
    every = [summarise(own, k, pool) for own in judged]
    found = every[0]
    if len(every) > 1:
        each = [one[f"hit@{k}"] for one in every]
        found |= {name: round(float(np.mean([one[name] for one in every])), 4) for name in found if name.startswith("hit@")}
        found |= {"prompts": each, "prompt_spread": round(max(each) - min(each), 4)}
    return found


def _write_run(out: Path, row: Row, ranking: Ranking, pool: Pool, name: str, fingerprint: str) -> None:
    qids = [record.qid for record in row.records]
    file = out / "runs" / f"{row.task.name}-{name}.txt"
    write_run(file, qids, ranking, pool, run_id=fingerprint.replace(" ", "_"), task_ids=row.task.task_id)


def _header(
    encoder: EvaluatedEncoder, data: Path, split: mbeir.Split, prompt: PromptChoice, seed: int, limit: int | None
) -> dict[str, Any]:
    about = data / "meta.json"
    return {
        "format": FORMAT,
        "model": encoder.fingerprint,
        "prompt_version": encoder.prompt_version,
        "data": json.loads(about.read_text()).get("fingerprint") if about.is_file() else None,
        "split": split,
        "prompt": prompt if prompt != "seeded" else f"seeded {seed}",
        "limit": limit,
        "machine": describe_machine(),
        **encoder.run_settings,
    }


def _finish(out: Path, results: dict[str, Any]) -> None:
    results.setdefault("global", {})
    for pool, name in (("routes", "average"), ("global", "average_global")):
        results[pool] = {
            route: dict(sorted(scored.items(), key=lambda row: _place(row[0]))) for route, scored in results[pool].items()
        }
        results[name] = {route: average(scored) for route, scored in results[pool].items()}
    write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")


def _append(file: Path, judged: Sequence[Judged]) -> None:
    """Replaces the lines of the rows judged, so that a row scored again is not there twice."""
    rows = {one.row for one in judged}
    kept = [one for one in read_judged(file) if one.row not in rows] if file.is_file() else []
    ordered = sorted([*kept, *judged], key=lambda one: _place(one.row))
    write_whole(file, "".join(json.dumps(asdict(one)) + "\n" for one in ordered))


def _place(row: str) -> tuple[int, str]:
    return mbeir.EVAL_ROWS.index(row) if row in mbeir.EVAL_ROWS else len(mbeir.EVAL_ROWS), row


def _draw(seed: int, qid: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {qid}".encode()).digest()[:8], "big")


def _pick(number: int) -> Callable[[Sequence[str], str], str]:
    return lambda prompts, _: prompts[number % len(prompts)]
