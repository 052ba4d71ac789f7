"""Hits and misses of an evaluation with their images and reasoning, as one page: what the figures look like from near.

Which queries are shown follows a fixed rule, so that none is picked by hand: of every row the first query that is hit at 1 and
the first that is missed at the row's k, of those that reasoned and of those that did not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from traceir.data import mbeir
from traceir.errors import DataError
from traceir.evaluation.results import QueryOutcome, read_run
from traceir.items import Encoding, Hit, Route
from traceir.lab.gallery import Entry, write_gallery
from traceir.prompts import normalise


def write_examples(folder: Path, data: Path, out: Path, *, route: Route = "auto", rows: Sequence[str] | None = None) -> Path:
    """Writes `index.html` to `out` and returns its path. `folder` is what `traceir evaluate --out` wrote for `data`.

    Raises DataError where `data` does not hold the queries or candidates that the evaluation names.
    """
    run = read_run(folder, route)
    entries: list[Entry] = []
    for task in mbeir.find_tasks(data, run.results.get("split") or "test"):
        outcomes = [own for (row, _), own in run.judged.items() if row == task.name and (rows is None or row in rows)]
        if chosen := choose(outcomes, task.metric_k):
            hits = _read_hits(folder / "runs" / f"{task.name}-{route}.txt", {outcome.qid for outcome in chosen})
            entries += _entries(task, chosen, hits, folder, data)
    about = f"Model {run.results.get('model')}, route {route}. Of every row the first query hit at 1 and the first one missed, "
    about += "with and without reasoning; nothing is picked by hand."
    return write_gallery(entries, out, title="TraceIR: hits and misses", intro=about)


def choose(outcomes: Sequence[QueryOutcome], k: int) -> list[QueryOutcome]:
    """The first hit at 1 and the first miss at k, of the queries that reasoned and of those that did not, in file order."""
    chosen: list[QueryOutcome] = []
    for route in ("direct", "reason"):
        own = [outcome for outcome in outcomes if outcome.route == route]
        chosen += [outcome for outcome in own if outcome.rank == 1][:1] + [outcome for outcome in own if outcome.rank > k][:1]
    return chosen


def _entries(
    task: mbeir.Task, chosen: Sequence[QueryOutcome], hits: Mapping[str, Sequence[tuple[str, float]]], folder: Path, data: Path
) -> list[Entry]:
    records = {record.qid: record for record in mbeir.read_queries(task.query_path)}
    pool = {candidate.did: candidate for candidate in mbeir.read_pool(task.pool_path)}
    relevant = mbeir.read_relevant(task)
    prompt = mbeir.read_instructions(data).prompts(task.dataset_id, task.query_modality, task.cand_modality)[0]
    entries = []
    for own in chosen:
        if own.qid not in records or any(did not in pool for did, _ in hits[own.qid]):
            raise DataError(f"{folder} names query {own.qid} or candidates that {data} does not have; evaluate again")
        record, shown = records[own.qid], []
        for rank, (did, score) in enumerate(hits[own.qid], start=1):
            image, text = pool[did].image_path, normalise(pool[did].text) or None
            shown.append(Hit(did, score, rank, pool[did].modality, text, str(data / image) if image else None, {}))
        route: Literal["reason", "direct"] = "reason" if own.route == "reason" else "direct"
        blank = np.zeros(0, dtype=np.float32)
        encoding = Encoding(blank, route, own.reasoning, own.tokens, own.emb_probability, own.truncated)
        steps = "" if own.steps is None else f", {own.steps} step{'' if own.steps == 1 else 's'}"
        title = f"{task.name}{steps}: {'hit' if own.rank == 1 else 'missed'}, right one at rank {own.rank}"
        right = frozenset(relevant.get(own.qid, set()) | set(record.positives))
        entries.append(Entry(title, mbeir.to_query(record, prompt, data), encoding, shown, right, f"query {own.qid}"))
    return entries


def _read_hits(file: Path, wanted: set[str]) -> dict[str, list[tuple[str, float]]]:
    """The first five hits of the wanted queries from a run file of 7 columns, best first."""
    hits: dict[str, list[tuple[str, float]]] = {qid: [] for qid in wanted}
    try:
        with file.open(encoding="utf-8") as stream:
            for number, columns in enumerate(map(str.split, stream), start=1):
                if len(columns) != 7:
                    raise DataError(f"{file}:{number}: {len(columns)} columns, a run file has 7; evaluate again")
                if columns[0] in wanted and len(hits[columns[0]]) < 5:
                    hits[columns[0]].append((columns[2], float(columns[4])))
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}; evaluate again") from error
    return hits
