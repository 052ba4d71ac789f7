"""Scores a checkpoint on the zero-shot columns of a folder, route by route, and tables them beside the published figures."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from traceir.errors import DataError, InputError
from traceir.evaluation.judged import continue_results, describe_machine, header_of
from traceir.evaluation.tables import markdown_table, percent
from traceir.evaluation.unseen.catalogue import CIRCO_TEST, SETS, TASKS, find_columns, read_columns, read_set
from traceir.evaluation.unseen.score import UnseenOutcome, rank_pool, score
from traceir.evaluation.unseen.task import Missing
from traceir.files import write_whole
from traceir.items import Route
from traceir.search import EvaluatedEncoder

log = logging.getLogger(__name__)

FORMAT: Final = 1
SUBMITTED: Final = 50
"""Images that CIRCO's server takes for each query."""


def evaluate_unseen(
    encoder: EvaluatedEncoder,
    root: Path,
    out: Path,
    *,
    routes: Sequence[Route] = ("auto",),
    columns: Iterable[str] | None = None,
    missing: Missing = "stop",
    cache: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores the columns found below `root` and writes results.json and outcomes-ROUTE.jsonl to `out`; returns the results.

    `columns` names some of them. `cache` holds the embeddings (default: `out`/embeddings), so that an interruption costs a block.
    Columns and routes scored earlier into the same `out` are kept. Raises InputError where `root` has no column.
    """
    if missing == "keep":
        raise InputError("missing='keep' is for dry runs; choose stop or skip to score")
    for route in routes:
        encoder.encode_queries([], route=route)  # a route that the model lacks is told now, not behind the candidates
    chosen = _chosen(root, columns)
    settings = {name: encoder.run_settings[name] for name in ("threshold", "max_reasoning_tokens")}
    header = header_of(encoder, FORMAT, root / "unseen.json") | {"missing": missing, **settings, "machine": describe_machine()}
    results = continue_results(out, header)
    for task in read_columns(root, chosen, missing):
        for route in routes:
            outcomes, summary = score(encoder, task, route=route, cache=cache or out / "embeddings", progress=progress)
            log.info("%s %s: %s %.1f", task.name, route, task.main, 100 * summary["value"])
            _write_outcomes(out / f"outcomes-{route}.jsonl", task.name, outcomes)
            scored = results["routes"].get(route, {}) | {task.name: summary}
            results["routes"][route] = {name: scored[name] for name in TASKS if name in scored}
            write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
    return results


def dry_run_unseen(root: Path, columns: Iterable[str] | None = None) -> str:
    """A dry run: reads every annotation file, counts, and says what is missing, as Markdown. Nothing is encoded."""
    rows = []
    for task in read_columns(root, _chosen(root, columns), "keep"):
        gone = task.left_out
        counts = len(gone.images), len(gone.unknown), len(gone.files)
        rows.append((task.name, len(task.cases), len(task.pool), task.main, *counts))
    names = ("column", "queries", "pool", "metric", "missing images", "ids not in the pool", "missing files")
    return markdown_table(names, "lrrlrrr", rows)


def submit_circo(
    encoder: EvaluatedEncoder, root: Path, file: Path, *, route: Route = "auto", cache: Path, progress: bool = True
) -> Path:
    """The file that CIRCO's test server takes: the first 50 images of each query of its test split."""
    task = read_set(root, "circo_test", CIRCO_TEST)
    write_submission(file, rank_pool(encoder, task, SUBMITTED, route=route, cache=cache, progress=progress))
    return file


def write_submission(path: Path, rankings: Mapping[str, Sequence[str]]) -> None:
    """Writes {query id: [50 image ids]} from query ids and at least 50 image ids each, best first (`score.rank_pool`).

    Raises DataError where one has fewer, or an id twice.
    """
    for query, ids in rankings.items():
        if (count := len(set(ids[:SUBMITTED]))) != SUBMITTED:
            raise DataError(f"query {query}: {count} different images; the server takes {SUBMITTED} for each")
    write_whole(path, json.dumps({query: [int(id) for id in ids[:SUBMITTED]] for query, ids in rankings.items()}))


def table(results: dict[str, Any]) -> str:
    """One line a column: its metric by each route, and what the paper published on the real set, marked as published."""
    routes: dict[str, Any] = results["routes"]
    rows = []
    for name, about in SETS.items():
        known = [scored[name] for scored in routes.values() if name in scored]
        if known:
            cells = [percent(scored[name]["value"]) if name in scored else None for scored in routes.values()]
            auto = routes.get("auto", {}).get(name)
            reasoned = f"{percent(auto['reasoned'], 0)} %" if auto else None
            sizes = known[0]["queries"], known[0]["pool"], known[0]["main"]
            rows.append((name, *sizes, *cells, reasoned, about.published))
    names = ("column", "queries", "pool", "metric", *routes, "reasoned (auto)", "TRACE, published, real set")
    lines = [markdown_table(names, f"lrrl{'r' * (len(routes) + 2)}", rows)]
    lost = []
    for name, summary in next(iter(routes.values()), {}).items():
        if counts := [f"{what} {about['count']}" for what, about in summary.get("left_out", {}).items()]:
            lost.append(f"- {name}: {', '.join(counts)}")
    return "\n".join([*lines, *(["", "Left out, because files were missing:", *lost] if lost else [])])


def _chosen(root: Path, columns: Iterable[str] | None) -> list[str]:
    chosen = list(columns) if columns is not None else find_columns(root)
    if not chosen:
        raise InputError(f"{root} has the folder of no zero-shot set; docs/unseen.md names the folders of {', '.join(TASKS)}")
    return chosen


def _write_outcomes(file: Path, task: str, outcomes: Sequence[UnseenOutcome]) -> None:
    kept = [line for line in file.read_text().splitlines() if json.loads(line)["task"] != task] if file.is_file() else []
    write_whole(file, "".join(f"{line}\n" for line in [*kept, *(json.dumps(asdict(outcome)) for outcome in outcomes)]))
