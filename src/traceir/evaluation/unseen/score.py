"""Scores one zero-shot task: encodes its pool once and its queries, ranks what each query may choose from, and sums up.

Ties are pessimistic (evaluation/metrics.py). Shapes: Q queries, N candidates of the pool or members of a gallery, D width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np

from traceir.errors import InputError
from traceir.evaluation.embeddings import Embedder, Embeddings
from traceir.evaluation.metrics import Ranks, average_precision_at, positive_ranks
from traceir.evaluation.ranking import rank_queries
from traceir.evaluation.unseen.task import LeftOut, UnseenQuery, UnseenTask
from traceir.items import Encoding, Route, Vector
from traceir.retrieval.search import EncoderLike

NAMED: Final = 100
"""Names of each kind of loss that a summary lists; the task has all."""
_METRIC = re.compile(r"(?:hit|map)@[1-9]\d*|accuracy")


@dataclass(frozen=True, slots=True)
class UnseenOutcome:
    """One query scored. `rank` is that of its best right candidate, from 1; one more than the candidates where none may be found.

    `values` has one number in [0, 1] for each metric of the task.
    """

    task: str
    case: str
    group: str
    rank: int
    values: Mapping[str, float]
    route: str
    tokens: int
    truncated: bool


def score(
    encoder: EncoderLike, task: UnseenTask, *, route: Route = "auto", cache: Path | None = None, progress: bool = False
) -> tuple[list[UnseenOutcome], dict[str, Any]]:
    """Outcomes in the order of the task's queries, and their summary; embeddings are kept below `cache`, if given.

    Raises InputError for a task without published truth.
    """
    unanswered = next((case.id for case in task.cases if not case.relevant), None)
    if unanswered is not None:
        raise InputError(f"{task.name}: query {unanswered} has no right candidate to score by; write a submission instead")
    if wrong := [metric for metric in task.metrics if not _METRIC.fullmatch(metric)]:
        raise InputError(f"{task.name}: metrics {wrong} are unknown; give hit@k, map@k or accuracy")
    outcomes: list[UnseenOutcome] = []
    with _embedded(encoder, task, route, cache, progress) as (pool, queries, queries_QD):
        for case, encoding, (ranks, size) in zip(task.cases, queries, _rank_all(task, pool, queries_QD), strict=True):
            best = int(ranks[0]) if len(ranks) else size + 1
            values = {metric: _value(metric, ranks, best, size) for metric in task.metrics}
            how = encoding.route, encoding.tokens, encoding.truncated
            outcomes.append(UnseenOutcome(task.name, case.id, case.group, best, values, *how))
    return outcomes, _summarise(task, outcomes)


def rank_pool(
    encoder: EncoderLike, task: UnseenTask, k: int, *, route: Route = "auto", cache: Path | None = None, progress: bool = False
) -> dict[str, list[str]]:
    """The first k ids of each query, best first, equal scores in the order of the pool: what a submission holds.

    Masked ids are left out. Queries with a gallery of their own are not ranked here (InputError).
    """
    if any(case.gallery is not None for case in task.cases):
        raise InputError(f"{task.name}: its queries rank galleries of their own; only tasks over one pool are ranked here")
    ids = list(task.pool)
    with _embedded(encoder, task, route, cache, progress) as (pool, _, queries_QD):
        masked = _positions(task, [case.masked for case in task.cases])
        ranked = rank_queries(queries_QD, pool, [()] * len(queries_QD), top_k=k, excluded=masked).positions.tolist()
    return {case.id: [ids[position] for position in own if position >= 0] for case, own in zip(task.cases, ranked, strict=True)}


def _summarise(task: UnseenTask, outcomes: Sequence[UnseenOutcome]) -> dict[str, Any]:
    """The task's result: metrics over all queries, for each group and as the mean over groups, and what was left out.

    `value` is the number to report: `main`, over all queries or as the mean over groups.
    """
    groups: dict[str, list[UnseenOutcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.group, []).append(outcome)
    metrics = _rounded(_means(task.metrics, outcomes))
    summary: dict[str, Any] = {
        "task": task.name,
        "column": task.column,
        "queries": len(outcomes),
        "pool": len(task.pool),
        "metrics": metrics,
        "main": task.main,
        "value": metrics[task.main],
        "reasoned": round(float(np.mean([outcome.route == "reason" for outcome in outcomes])), 4),
        "tokens_per_query": round(float(np.mean([outcome.tokens for outcome in outcomes])), 2),
        "truncated": round(float(np.mean([outcome.truncated for outcome in outcomes])), 4),
    }
    if len(groups) > 1 or task.by_group:
        each = {name: _means(task.metrics, group) for name, group in groups.items()}
        mean = _rounded({metric: float(np.mean([values[metric] for values in each.values()])) for metric in task.metrics})
        summary["groups"] = {name: {"queries": len(groups[name])} | _rounded(values) for name, values in each.items()}
        summary["mean_over_groups"] = mean
        if task.by_group:
            summary["value"] = mean[task.main]
    return summary | ({"left_out": _describe(task.left_out)} if task.left_out else {})


def _describe(lost: LeftOut) -> dict[str, Any]:
    """What was not scored, by number and by name (the first 100 of each kind)."""
    kinds: dict[str, Sequence[object]] = {
        "queries": lost.cases, "candidates": lost.candidates, "pictures": lost.images, "unknown_ids": lost.unknown,
        "files": lost.files,
    }  # fmt: skip
    return {kind: {"count": len(names), "names": [*map(str, names[:NAMED])]} for kind, names in kinds.items() if names}


@contextmanager
def _embedded(
    encoder: EncoderLike, task: UnseenTask, route: Route, cache: Path | None, progress: bool
) -> Iterator[tuple[Embeddings, list[Encoding], Vector]]:
    """The pool's vectors, in its order, the queries' encodings, and the vectors of these [Q, D]."""
    with TemporaryDirectory() if cache is None else nullcontext(cache) as folder:
        embedder = Embedder(encoder, Path(folder), progress=progress)
        pool = embedder.items(lambda: map(task.item, task.pool), len(task.pool))
        queries = embedder.queries(lambda: map(UnseenQuery.query, task.cases), len(task.cases), route)
        assert pool is not None and queries is not None, "one share is the whole"
        yield pool, list(queries.encodings()), queries.matrix()


def _rank_all(task: UnseenTask, pool: Embeddings, queries_QD: Vector) -> list[tuple[Ranks, int]]:
    """Of each query the ranks of its right candidates, and how many candidates it ranks: the pool, or its own gallery."""
    whole = [number for number, case in enumerate(task.cases) if case.gallery is None]
    ranked: dict[int, tuple[Ranks, int]] = {}
    if whole:
        relevant = _positions(task, [task.cases[number].relevant for number in whole])
        masked = _positions(task, [task.cases[number].masked for number in whole])
        ranking = rank_queries(queries_QD[whole], pool, relevant, top_k=1, excluded=masked)
        ranked = {number: (ranks, len(pool)) for number, ranks in zip(whole, ranking.ranks, strict=True)}
    if len(whole) < len(task.cases):
        pool_ND = pool.matrix()
        galleries = _positions(task, [case.gallery or () for case in task.cases])
        for number, (case, gallery) in enumerate(zip(task.cases, galleries, strict=True)):
            if case.gallery is not None:
                right, allowed = ([[id in ids for id in case.gallery]] for ids in (case.relevant, case.masked))
                scores_QN = queries_QD[number : number + 1] @ pool_ND[gallery].T
                ranked[number] = positive_ranks(scores_QN, np.array(right), ~np.array(allowed))[0], len(gallery)
    return [ranked[number] for number in range(len(task.cases))]


def _positions(task: UnseenTask, names: Sequence[Sequence[str]]) -> list[list[int]]:
    """Where ids are in the pool; those that are not there are left out."""
    position = {id: number for number, id in enumerate(task.pool)}
    return [[position[id] for id in ids if id in position] for ids in names]


def _value(metric: str, ranks: Ranks, best: int, size: int) -> float:
    kind, _, depth = metric.partition("@")
    if kind == "map":
        return average_precision_at(ranks, int(depth))
    return float(best <= min(int(depth or 1), size))  # accuracy is hit@1 over two candidates


def _means(metrics: Sequence[str], outcomes: Sequence[UnseenOutcome]) -> dict[str, float]:
    return {metric: float(np.mean([outcome.values[metric] for outcome in outcomes])) for metric in metrics}


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}
