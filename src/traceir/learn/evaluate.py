"""Scores a checkpoint on any folder in M-BEIR's layout: hit@k in local pools, routing, reasoning and cost, for each route.

A query is hit at k if any of its positives is among the first k (M-BEIR's rule). Ties are pessimistic: a candidate that is not
right and scores the same as a right one, to within TIE, counts as ranked above it.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from traceir.encoder import Encoder
from traceir.errors import DataError, InputError, ModelError
from traceir.items import Encoding, Route, Vector
from traceir.learn import mbeir
from traceir.prompts import completion_text

log = logging.getLogger(__name__)

# Cosines closer than this are one score: equal candidates encoded in different batches differ by rounding.
TIE: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Judged:
    """The outcome of one query: rank of its best positive (from 1), the road it took, and how it compares with its label."""

    row: str
    qid: str
    rank: int
    route: str
    tokens: int
    truncated: bool
    emb_probability: float
    steps: int | None
    exact: bool | None
    answer_exact: bool | None
    reasoning: str


def evaluate(
    encoder: Encoder,
    data: Path,
    out: Path,
    *,
    split: mbeir.Split = "test",
    routes: Sequence[Route] = ("auto",),
    rows: Sequence[str] | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores every row found under `data` and writes results.json and queries-ROUTE.jsonl to `out`; returns the results.

    `rows` keeps the named rows, or all rows of a named data set. `limit` takes the first so many queries of a row. The
    instruction is each row's first prompt. Pools are encoded once, whatever the number of routes. A row already scored in `out`
    by the same model, data, route and limit is not scored again, so an interrupted evaluation goes on where it stopped.
    """
    tasks = choose_tasks(mbeir.find_tasks(data, split), rows, data)
    out.mkdir(parents=True, exist_ok=True)
    about = data / "meta.json"
    header = {
        "format": 1,
        "model": encoder.fingerprint,
        "data": json.loads(about.read_text()).get("fingerprint") if about.is_file() else None,
        "split": split,
        "pool": "local",
        "prompt": "first",
        "limit": limit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used",
        "token_budget": encoder.token_budget,
        "threshold": encoder.threshold,
        "max_reasoning_tokens": encoder.budget,
    }
    results = _previous(out, header)
    instructions = mbeir.read_instructions(data)
    for task in tasks:
        missing = [route for route in routes if task.name not in results["routes"].get(route, {})]
        if not missing:
            continue
        pool_ids, pool_ND, seconds = encode_pool(encoder, task, data, progress)
        if not np.isfinite(pool_ND).all():
            raise ModelError(f"{task.name}: the model's vectors are not finite; the checkpoint has diverged")
        for route in missing:
            judged, spent = _judge(encoder, task, data, instructions, route, pool_ids, pool_ND, limit, progress)
            _append(out / f"queries-{route}.jsonl", task.name, judged)
            row = summarise(judged, task.metric_k)
            row |= {"pool": len(pool_ids), "queries_per_second": round(len(judged) / spent, 2)}
            row["candidates_per_second"] = round(len(pool_ids) / seconds, 2)
            results["routes"].setdefault(route, {})[task.name] = row
            log.info("%s %s: hit@%d %.1f", task.name, route, task.metric_k, 100 * row[f"hit@{task.metric_k}"])
            _write_json(out / "results.json", results)
    results["average"] = {route: average(scored) for route, scored in results["routes"].items()}
    _write_json(out / "results.json", results)
    return results


def summarise(judged: Sequence[Judged], metric_k: int) -> dict[str, Any]:
    """Shares over one row: hits, routing, reasoning length; with labels also hits by steps and the share of exact reasoning."""
    ranks = np.array([j.rank for j in judged])
    reasoned = np.array([j.route == "reason" for j in judged])
    found: dict[str, Any] = {
        "queries": len(judged),
        "metric_k": metric_k,
        **{f"hit@{k}": round(float((ranks <= k).mean()), 4) for k in (1, 5, 10)},
        "reasoned": round(float(reasoned.mean()), 4),
        "tokens_per_query": round(float(np.mean([j.tokens for j in judged])), 2),
        "truncated": round(float(np.mean([j.truncated for j in judged])), 4),
    }
    labelled = [j for j in judged if j.steps is not None]
    if labelled:
        found["by_steps"] = by_steps(labelled)
    return found


def by_steps(judged: Iterable[Judged]) -> dict[str, dict[str, Any]]:
    """Hits, routing and exactness grouped by the number of steps a query needs."""
    groups: dict[int, list[Judged]] = {}
    for one in judged:
        if one.steps is not None:
            groups.setdefault(one.steps, []).append(one)
    found: dict[str, dict[str, Any]] = {}
    for steps, group in sorted(groups.items()):
        exact = [one.exact for one in group if one.exact is not None]
        answers = [one.answer_exact for one in group if one.answer_exact is not None]
        found[str(steps)] = {
            "queries": len(group),
            **{f"hit@{k}": round(float(np.mean([one.rank <= k for one in group])), 4) for k in (1, 5, 10)},
            "reasoned": round(float(np.mean([one.route == "reason" for one in group])), 4),
            "exact": round(float(np.mean(exact)), 4) if exact else None,
            "answer_exact": round(float(np.mean(answers)), 4) if answers else None,
        }
    return found


def average(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Plain mean over rows of each row's own metric (hit@5, or hit@10 for the fashion rows), and the lowest row."""
    values = {name: row[f"hit@{row['metric_k']}"] for name, row in rows.items()}
    return {"mean": round(float(np.mean(list(values.values()))), 4), "lowest": min(values.values())}


def rank_positives(scores_QN: npt.NDArray[np.float32], relevant_QN: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Rank (from 1) of the best positive of each query; N + 1 where the pool holds none. Ties count against the query."""
    best = np.where(relevant_QN, scores_QN, -np.inf).max(axis=1)
    above = (~(scores_QN < best[:, None] - TIE) & ~relevant_QN).sum(axis=1)  # a score that is not a number counts as above
    ranks: npt.NDArray[np.int64] = np.where(relevant_QN.any(axis=1), above + 1, scores_QN.shape[1] + 1)
    return ranks


def read_judged(file: Path) -> list[Judged]:
    """The lines of a queries-ROUTE.jsonl file."""
    with file.open() as stream:
        return [Judged(**json.loads(line)) for line in stream]


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table, one line a row and route."""
    lines = ["| row | route | pool | queries | hit@1 | hit@5 | hit@10 | reasoned | tokens/query | queries/s |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for route, rows in results["routes"].items():
        for name, row in rows.items():
            hits = " | ".join(
                f"**{100 * row[f'hit@{k}']:.1f}**" if k == row["metric_k"] else f"{100 * row[f'hit@{k}']:.1f}" for k in (1, 5, 10)
            )
            lines.append(
                f"| {name} | {route} | {row['pool']} | {row['queries']} | {hits} | {100 * row['reasoned']:.0f} % "
                f"| {row['tokens_per_query']:.1f} | {row['queries_per_second']:.0f} |"
            )
        mean = results.get("average", {}).get(route)
        if mean:
            lines.append(f"| **average** (hit@5, fashion hit@10) | {route} | | | | **{100 * mean['mean']:.1f}** | | | | |")
    return "\n".join(lines)


def _judge(
    encoder: Encoder,
    task: mbeir.Task,
    data: Path,
    instructions: mbeir.Instructions,
    route: Route,
    pool_ids: list[str],
    pool_ND: Vector,
    limit: int | None,
    progress: bool,
) -> tuple[list[Judged], float]:
    records = list(mbeir.read_queries(task.query_path))[:limit]
    if not records:
        raise DataError(f"{task.query_path} holds no queries; rebuild or download it again")
    prompts = instructions.prompts(task.dataset_id, task.query_modality, task.cand_modality)
    queries = [mbeir.to_query(record, prompts[0] if prompts else None, data) for record in records]
    started = time.perf_counter()
    encodings = encoder.encode_queries(queries, route=route, progress=progress)
    spent = time.perf_counter() - started
    relevant = mbeir.read_relevant(task)
    place = {did: number for number, did in enumerate(pool_ids)}
    labels = mbeir.read_labels(task.labels_path) if task.labels_path.is_file() else {}
    judged: list[Judged] = []
    for first in range(0, len(records), 256):
        chunk = records[first : first + 256]
        scores_QN = np.stack([e.vector for e in encodings[first : first + 256]]) @ pool_ND.T
        relevant_QN = np.zeros(scores_QN.shape, dtype=bool)
        for number, record in enumerate(chunk):
            for did in relevant.get(record.qid, set()) | set(record.positives):
                if did in place:  # M-BEIR's qrels name documents of other pools too; they are never counted
                    relevant_QN[number, place[did]] = True
        for record, encoding, rank in zip(
            chunk, encodings[first : first + 256], rank_positives(scores_QN, relevant_QN), strict=True
        ):
            judged.append(_compare(encoder, task.name, record.qid, int(rank), encoding, labels.get(record.qid)))
    return judged, spent


def _compare(encoder: Encoder, row: str, qid: str, rank: int, encoding: Encoding, label: mbeir.Label | None) -> Judged:
    exact = answer_exact = None
    if label is not None and label.z:
        # The label goes through the tokenizer as the model's own text did (case, blanks before punctuation).
        processor = encoder.model.processor
        wanted = processor.decode(processor.plain_ids(completion_text(label.reasoning, label.answer)))
        answer = processor.decode(processor.plain_ids(label.answer or ""))
        exact, answer_exact = encoding.reasoning == wanted, encoding.reasoning.endswith(answer)
    steps = label.steps if label is not None else None
    return Judged(
        row, qid, rank, encoding.route, encoding.tokens, encoding.truncated, round(encoding.emb_probability, 6),
        steps, exact, answer_exact, encoding.reasoning,
    )  # fmt: skip


def encode_pool(encoder: Encoder, task: mbeir.Task, data: Path, progress: bool) -> tuple[list[str], Vector, float]:
    """The dids of a row's local pool, their vectors [N, D] and the seconds that encoding took."""
    candidates = list(mbeir.read_pool(task.pool_path))
    if not candidates:
        raise DataError(f"{task.pool_path} is empty; rebuild or download it again")
    started = time.perf_counter()
    ids: list[str] = []
    blocks: list[Vector] = []
    for first in range(0, len(candidates), 2048):
        chunk = candidates[first : first + 2048]
        encodings = encoder.encode_items([mbeir.to_item(c, data) for c in chunk], progress=progress)
        ids += [candidate.did for candidate in chunk]
        blocks.append(np.stack([encoding.vector for encoding in encodings]))
    return ids, np.concatenate(blocks), time.perf_counter() - started


def choose_tasks(tasks: list[mbeir.Task], rows: Sequence[str] | None, data: Path) -> list[mbeir.Task]:
    """The tasks of the named rows, or of the named data sets; InputError for a name that is not there."""
    if not tasks:
        raise DataError(f"{data} has no query files of this split; expected query/SPLIT/mbeir_DATASET_taskN_SPLIT.jsonl")
    if rows is None:
        return tasks
    known = {task.name for task in tasks} | {task.dataset for task in tasks}
    if unknown := set(rows) - known:
        raise InputError(f"rows {sorted(unknown)} are not in {data}; it has {sorted(known)}")
    return [task for task in tasks if task.name in rows or task.dataset in rows]


def _previous(out: Path, header: dict[str, Any]) -> dict[str, Any]:
    file = out / "results.json"
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text())
        different = sorted(key for key in header if key != "machine" and found.get(key) != header[key])
        if different:
            raise InputError(f"{file} holds results of another {', '.join(different)}; choose another --out or remove it")
        return found
    return {**header, "routes": {}}


def _append(file: Path, row: str, judged: Sequence[Judged]) -> None:
    """Replaces the lines of one row, so that a row scored again after an interruption is not there twice."""
    kept = [one for one in read_judged(file) if one.row != row] if file.is_file() else []
    fresh = file.with_suffix(".tmp")
    fresh.write_text("".join(json.dumps(asdict(one)) + "\n" for one in [*kept, *judged]))
    os.replace(fresh, file)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    fresh = file.with_suffix(".tmp")
    fresh.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(fresh, file)
