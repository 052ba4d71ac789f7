"""Hits and misses of an evaluation with their pictures and reasoning, as one page: what the figures look like from near.

Which queries are shown follows a fixed rule, so that none is picked by hand: of every row the first query that is hit at 1 and
the first that is missed at the row's k, of those that reasoned and of those that did not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from traceir.data import mbeir
from traceir.errors import DataError
from traceir.evaluation.judged import Judged
from traceir.evaluation.runs import read_run
from traceir.items import Encoding, Hit, Route
from traceir.lab.gallery import Entry, write_gallery
from traceir.prompts import normalise


def write_examples(folder: Path, data: Path, out: Path, *, route: Route = "auto", rows: Sequence[str] | None = None) -> Path:
    """Writes `index.html` to `out` and returns its path. `folder` is what `traceir evaluate --out` wrote for `data`.

    Raises DataError where `data` does not hold the queries or candidates that the evaluation names.
    """
    run = read_run(folder, route)
    entries: list[Entry] = []
    instructions = mbeir.read_instructions(data)
    for task in mbeir.find_tasks(data, run.results.get("split") or "test"):
        judged = [one for key, one in run.judged.items() if key[0] == task.name and (rows is None or task.name in rows)]
        chosen = choose(judged, task.metric_k)
        if not chosen:
            continue
        records = {record.qid: record for record in mbeir.read_queries(task.query_path)}
        pool = {candidate.did: candidate for candidate in mbeir.read_pool(task.pool_path)}
        found = _read_hits(folder / "runs" / f"{task.name}-{route}.txt", {one.qid for one in chosen})
        relevant = mbeir.read_relevant(task)
        prompts = instructions.prompts(task.dataset_id, task.query_modality, task.cand_modality)
        for one in chosen:
            if one.qid not in records or any(did not in pool for did, _ in found.get(one.qid, [])):
                raise DataError(f"{folder} names query {one.qid} or candidates that {data} does not have; evaluate again")
            record = records[one.qid]
            hits = [_hit(pool[did], score, rank, data) for rank, (did, score) in enumerate(found.get(one.qid, []), start=1)]
            road: Literal["reason", "direct"] = "reason" if one.route == "reason" else "direct"
            encoding = Encoding(
                np.zeros(0, dtype=np.float32), road, one.reasoning, one.tokens, one.emb_probability, one.truncated
            )
            steps = "" if one.steps is None else f", {one.steps} step{'' if one.steps == 1 else 's'}"
            title = f"{task.name}{steps}: {'hit' if one.rank == 1 else 'missed'}, right one at rank {one.rank}"
            right = frozenset(relevant.get(one.qid, set()) | set(record.positives))
            entries.append(Entry(title, mbeir.to_query(record, prompts[0], data), encoding, hits, right, f"query {one.qid}"))
    about = f"Model {run.results.get('model')}, route {route}. Of every row the first query hit at 1 and the first one missed, "
    about += "with and without reasoning; nothing is picked by hand."
    return write_gallery(entries, out, title="TraceIR: hits and misses", intro=about)


def choose(judged: Sequence[Judged], k: int) -> list[Judged]:
    """The first hit at 1 and the first miss at k, of the queries that reasoned and of those that did not, in file order."""
    chosen: list[Judged] = []
    for road in ("direct", "reason"):
        own = [one for one in judged if one.route == road]
        chosen += [one for one in own if one.rank == 1][:1] + [one for one in own if one.rank > k][:1]
    return chosen


def _read_hits(file: Path, wanted: set[str]) -> dict[str, list[tuple[str, float]]]:
    """The first hits of the wanted queries from a run file, best first."""
    found: dict[str, list[tuple[str, float]]] = {}
    try:
        with file.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                columns = line.split()
                if len(columns) != 7:
                    raise DataError(f"{file}:{number}: {len(columns)} columns, a run file has 7; evaluate again")
                if columns[0] in wanted and len(found.setdefault(columns[0], [])) < 5:
                    found[columns[0]].append((columns[2], float(columns[4])))
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}; evaluate again") from error
    return found


def _hit(candidate: mbeir.Candidate, score: float, rank: int, data: Path) -> Hit:
    image = str(data / candidate.image_path) if candidate.image_path else None
    return Hit(candidate.did, score, rank, candidate.modality, normalise(candidate.text) or None, image, {})
