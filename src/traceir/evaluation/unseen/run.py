"""Scores a checkpoint on the zero-shot columns of a folder, route by route, and tables them beside the published figures."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from traceir.errors import InputError
from traceir.evaluation.judged import continue_results, describe_machine
from traceir.evaluation.unseen.catalogue import TASKS, find_columns, read_columns
from traceir.evaluation.unseen.circo import read_circo, write_submission
from traceir.evaluation.unseen.score import Outcome, rank_pool, score
from traceir.evaluation.unseen.task import Missing
from traceir.files import write_whole
from traceir.items import Route
from traceir.lab.published import UNSEEN
from traceir.search import EvaluatedEncoder

log = logging.getLogger(__name__)

FORMAT: Final = 1
SUBMITTED: Final = 50
"""Pictures a query of CIRCO's test server wants."""


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
    results = continue_results(out, _header(encoder, root, missing))
    for task in read_columns(root, chosen, missing):
        for route in routes:
            outcomes, summary = score(encoder, task, route=route, cache=cache or out / "embeddings", progress=progress)
            log.info("%s %s: %s %.1f", task.name, route, task.main, 100 * summary["value"])
            _write_outcomes(out / f"outcomes-{route}.jsonl", task.name, outcomes)
            scored = results["routes"].setdefault(route, {})
            scored[task.name] = summary
            results["routes"][route] = {name: scored[name] for name in TASKS if name in scored}
            write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
    return results


def rehearse_unseen(root: Path, columns: Iterable[str] | None = None) -> str:
    """A dry run: reads every annotation file, counts, and says what is missing, as Markdown. Nothing is encoded."""
    lines = ["| column | queries | pool | metric | missing pictures | ids not in the pool | missing files |"]
    lines.append("|---|---:|---:|---|---:|---:|---:|")
    for task in read_columns(root, _chosen(root, columns), "keep"):
        gone = task.left_out
        counts = f"{len(gone.images)} | {len(gone.unknown)} | {len(gone.files)}"
        lines.append(f"| {task.name} | {len(task.cases)} | {len(task.pool)} | {task.main} | {counts} |")
    return "\n".join(lines)


def _chosen(root: Path, columns: Iterable[str] | None) -> list[str]:
    chosen = list(columns) if columns is not None else find_columns(root)
    if not chosen:
        raise InputError(f"{root} has the folder of no zero-shot set; docs/unseen.md names the folders of {', '.join(TASKS)}")
    return chosen


def submit_circo(
    encoder: EvaluatedEncoder, root: Path, file: Path, *, route: Route = "auto", cache: Path, progress: bool = True
) -> Path:
    """The file that CIRCO's test server takes: the first 50 pictures of each query of its test split."""
    task = read_circo(root, split="test")
    write_submission(file, rank_pool(encoder, task, SUBMITTED, route=route, cache=cache, progress=progress))
    return file


def table(results: dict[str, Any]) -> str:
    """One line a column: its metric by each route, and what the paper published on the real set, marked as published."""
    routes = list(results["routes"])
    lines = [f"| column | queries | pool | metric | {' | '.join(routes)} | reasoned (auto) | TRACE, published, real set |"]
    lines.append("|---|---:|---:|---|" + "---:|" * (len(routes) + 2))
    for name in TASKS:
        found = [results["routes"][route].get(name) for route in routes]
        known = [one for one in found if one]
        if known:
            cells = " | ".join("–" if one is None else f"{100 * one['value']:.1f}" for one in found)
            auto = results["routes"].get("auto", {}).get(name)
            reasoned = f"{100 * auto['reasoned']:.0f} %" if auto else "–"
            first = known[0]
            lines.append(
                f"| {name} | {first['queries']} | {first['pool']} | {first['main']} | {cells} | {reasoned} | {_published(name)} |"
            )
    lost = []
    for name, one in next(iter(results["routes"].values()), {}).items():
        if counts := [f"{what} {about['count']}" for what, about in one.get("left_out", {}).items()]:
            lost.append(f"- {name}: {', '.join(counts)}")
    return "\n".join([*lines, *(["", "Left out, because files were missing:", *lost] if lost else [])])


def _published(name: str) -> str:
    return f"{UNSEEN[name]:.1f}" if name in UNSEEN else "–"


def _header(encoder: EvaluatedEncoder, root: Path, missing: Missing) -> dict[str, Any]:
    about = root / "unseen.json"
    return {
        "format": FORMAT,
        "model": encoder.fingerprint,
        "prompt_version": encoder.prompt_version,
        "data": json.loads(about.read_text()).get("fingerprint") if about.is_file() else None,
        "missing": missing,
        **{name: encoder.run_settings[name] for name in ("threshold", "max_reasoning_tokens")},
        "machine": describe_machine(),
    }


def _write_outcomes(file: Path, task: str, outcomes: Sequence[Outcome]) -> None:
    kept = [line for line in file.read_text().splitlines() if json.loads(line)["task"] != task] if file.is_file() else []
    write_whole(file, "".join(f"{line}\n" for line in [*kept, *(json.dumps(asdict(one)) for one in outcomes)]))
