"""Scores one zero-shot task: encodes its pool once and its queries, ranks what each query may choose from, and sums up.

Ties are pessimistic (evaluation/metrics.py). Shapes: Q queries, N candidates or members of a gallery, D width.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from traceir.errors import InputError, ModelError
from traceir.evaluation.embedder import Embedder, in_pieces
from traceir.evaluation.metrics import average_precision_at, hit_at, positive_ranks, rank_positives
from traceir.evaluation.unseen.task import Case, LeftOut, Task
from traceir.items import Encoding, Item, Query, Route, Vector
from traceir.search import EncoderLike

log = logging.getLogger(__name__)

BLOCK: Final = 256
"""Queries whose scores are in memory at once."""
NAMED: Final = 100
"""Names of each kind of loss that a summary lists; the task has all."""

_METRIC = re.compile(r"(?:hit|map)@[1-9]\d*|accuracy")
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Outcome:
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


@dataclass(frozen=True, slots=True)
class _Block:
    """Consecutive queries whose scores have one shape: their numbers in the task, and the columns of their galleries [Q, N].

    `columns_QN` is None where they rank the whole pool.
    """

    numbers: range
    columns_QN: npt.NDArray[np.int64] | None


def score(
    encoder: EncoderLike, task: Task, *, route: Route = "auto", cache: Path | None = None, progress: bool = False
) -> tuple[list[Outcome], dict[str, Any]]:
    """Outcomes in the order of the task's queries, and their summary; embeddings are kept below `cache`, if given.

    Raises InputError for a task without published truth.
    """
    unanswered = next((case.id for case in task.cases if not case.relevant), None)
    if unanswered is not None:
        raise InputError(f"{task.name}: query {unanswered} has no right candidate to score by; write a submission instead")
    if wrong := [metric for metric in task.metrics if not _METRIC.fullmatch(metric)]:
        raise InputError(f"{task.name}: metrics {wrong} are unknown; give hit@k, map@k or accuracy")
    pool_ND = _matrix(_encode_pool(encoder, task, cache, progress), task)
    encodings = _encode_cases(encoder, task, route, cache, progress)
    queries_QD = _matrix(encodings, task)
    place = {id: number for number, id in enumerate(task.pool)}
    outcomes: list[Outcome] = []
    for block in _blocks(task.cases, place):
        cases = task.cases[block.numbers.start : block.numbers.stop]
        scores_QN = _similarities(queries_QD[block.numbers.start : block.numbers.stop], pool_ND, block)
        relevant_QN, allowed_QN = _masks(cases, block, place, scores_QN.shape)
        values = _judge(task.metrics, scores_QN, relevant_QN, allowed_QN)
        ranks = rank_positives(scores_QN, relevant_QN, allowed_QN)
        for row, (case, number) in enumerate(zip(cases, block.numbers, strict=True)):
            own = {metric: float(column[row]) for metric, column in values.items()}
            e = encodings[number]
            outcomes.append(Outcome(task.name, case.id, case.group, int(ranks[row]), own, e.route, e.tokens, e.truncated))
    return outcomes, summarise(task, outcomes)


def rank_pool(
    encoder: EncoderLike, task: Task, k: int, *, route: Route = "auto", cache: Path | None = None, progress: bool = False
) -> dict[str, list[str]]:
    """The first k ids of each query, best first, equal scores in the order of the pool: what a submission holds.

    Masked ids are left out. Queries with a gallery of their own are not ranked here (InputError).
    """
    if any(case.gallery is not None for case in task.cases):
        raise InputError(f"{task.name}: its queries rank galleries of their own; only tasks over one pool are ranked here")
    ids = list(task.pool)
    pool_ND = _matrix(_encode_pool(encoder, task, cache, progress), task)
    queries_QD = _matrix(_encode_cases(encoder, task, route, cache, progress), task)
    found: dict[str, list[str]] = {}
    for number, case in enumerate(task.cases):
        masked = set(case.masked)
        order = np.argsort(-(queries_QD[number] @ pool_ND.T), kind="stable")[: k + len(masked)]
        found[case.id] = [ids[place] for place in order if ids[place] not in masked][:k]
    return found


def summarise(task: Task, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The task's result: metrics over all queries, for each group and as the mean over groups, and what was left out.

    `value` is the number to report: `main`, over all queries or as the mean over groups.
    """
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.group, []).append(outcome)
    overall = _means(task.metrics, outcomes)
    found: dict[str, Any] = {
        "task": task.name,
        "column": task.column,
        "queries": len(outcomes),
        "pool": len(task.pool),
        "metrics": _rounded(overall),
        "main": task.main,
        "value": round(overall[task.main], 4),
        "reasoned": round(float(np.mean([o.route == "reason" for o in outcomes])), 4),
        "tokens_per_query": round(float(np.mean([o.tokens for o in outcomes])), 2),
        "truncated": round(float(np.mean([o.truncated for o in outcomes])), 4),
    }
    if len(groups) > 1 or task.by_group:
        each = {name: _means(task.metrics, group) for name, group in groups.items()}
        mean = {metric: float(np.mean([values[metric] for values in each.values()])) for metric in task.metrics}
        found["groups"] = {name: {"queries": len(groups[name])} | _rounded(values) for name, values in each.items()}
        found["mean_over_groups"] = _rounded(mean)
        if task.by_group:
            found["value"] = round(mean[task.main], 4)
    if task.left_out:
        found["left_out"] = describe(task.left_out)
    return found


def describe(left_out: LeftOut) -> dict[str, Any]:
    """What was not scored, by number and by name (the first 100 of each kind)."""
    kinds = {
        "queries": left_out.cases,
        "candidates": left_out.candidates,
        "pictures": left_out.images,
        "unknown_ids": left_out.unknown,
        "files": left_out.files,
    }
    return {kind: {"count": len(names), "names": [str(name) for name in names[:NAMED]]} for kind, names in kinds.items() if names}


def _encode_pool(encoder: EncoderLike, task: Task, cache: Path | None, progress: bool) -> Vector:
    """Vectors of the pool [N, D], in its order."""

    def make() -> Iterator[Item]:
        return (task.item(id) for id in task.pool)

    if cache is not None:
        embedded = Embedder(encoder, cache, progress=progress).items(make, len(task.pool))
        assert embedded is not None, "one share is the whole"
        return embedded.matrix()
    return np.stack([encoding.vector for encoding in in_pieces(encoder.encode_items)(list(make()))])


def _encode_cases(encoder: EncoderLike, task: Task, route: Route, cache: Path | None, progress: bool) -> list[Encoding]:
    def make() -> Iterator[Query]:
        return (case.query() for case in task.cases)

    if cache is not None:
        embedded = Embedder(encoder, cache, progress=progress).queries(make, len(task.cases), route)
        assert embedded is not None, "one share is the whole"
        return list(embedded.encodings())
    return in_pieces(lambda queries: encoder.encode_queries(queries, route=route))(list(make()))


def _matrix(vectors: Vector | Sequence[Encoding], task: Task) -> Vector:
    matrix: Vector = vectors if isinstance(vectors, np.ndarray) else np.stack([encoding.vector for encoding in vectors])
    if not np.isfinite(matrix).all():
        raise ModelError(f"{task.name}: the model's vectors are not finite; the checkpoint has diverged")
    return matrix


def _blocks(cases: Sequence[Case], place: Mapping[str, int]) -> Iterator[_Block]:
    """Consecutive queries with galleries of one size, at most BLOCK together."""
    first = 0
    for number in range(1, len(cases) + 1):
        if number < len(cases) and number - first < BLOCK and _size(cases[number]) == _size(cases[first]):
            continue
        galleries = [case.gallery for case in cases[first:number] if case.gallery is not None]
        columns = np.array([[place[id] for id in gallery] for gallery in galleries], dtype=np.int64) if galleries else None
        yield _Block(range(first, number), columns)
        first = number


def _size(case: Case) -> int | None:
    return None if case.gallery is None else len(case.gallery)


def _similarities(queries_QD: Vector, pool_ND: Vector, block: _Block) -> Vector:
    """Cosines [Q, N] of queries to the pool, or each to its gallery."""
    if block.columns_QN is None:
        return queries_QD @ pool_ND.T
    scores_QN: Vector = np.einsum("qd,qnd->qn", queries_QD, pool_ND[block.columns_QN])
    return scores_QN


def _masks(cases: Sequence[Case], block: _Block, place: Mapping[str, int], shape: tuple[int, ...]) -> tuple[Mask, Mask | None]:
    """Which candidates are right [Q, N], and which may be found [Q, N]; None where all may."""
    relevant_QN = np.zeros(shape, dtype=np.bool_)
    allowed_QN = np.ones(shape, dtype=np.bool_)
    for row, case in enumerate(cases):
        columns = None if block.columns_QN is None else block.columns_QN[row]
        _mark(relevant_QN[row], [place[id] for id in case.relevant], columns, True)
        _mark(allowed_QN[row], [place[id] for id in case.masked if id in place], columns, False)
    return relevant_QN, None if allowed_QN.all() else allowed_QN


def _mark(row: Mask, places: list[int], columns: npt.NDArray[np.int64] | None, value: bool) -> None:
    if columns is None:
        row[places] = value
    else:
        row[np.isin(columns, places)] = value


def _judge(
    metrics: Sequence[str], scores_QN: Vector, relevant_QN: Mask, allowed_QN: Mask | None
) -> dict[str, npt.NDArray[np.float64]]:
    """Each metric, one value a query."""
    best = rank_positives(scores_QN, relevant_QN, allowed_QN)
    each = positive_ranks(scores_QN, relevant_QN, allowed_QN) if any(m.startswith("map") for m in metrics) else []
    found: dict[str, npt.NDArray[np.float64]] = {}
    for metric in metrics:
        kind, _, depth = metric.partition("@")
        k = int(depth) if depth else 1  # accuracy is hit@1 over two candidates
        if kind == "map":
            found[metric] = np.array([average_precision_at(ranks, k) for ranks in each])
        else:
            found[metric] = hit_at(best, k, pool=scores_QN.shape[1])
    return found


def _means(metrics: Sequence[str], outcomes: Sequence[Outcome]) -> dict[str, float]:
    return {metric: float(np.mean([outcome.values[metric] for outcome in outcomes])) for metric in metrics}


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}
