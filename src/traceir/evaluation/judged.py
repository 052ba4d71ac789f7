"""What an evaluation leaves: the outcome of each query, and its sums over rows, kinds and routes.

Files (docs/formats.md): `queries-ROUTE.jsonl` has one Judged a line, `results.json` the sums.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from traceir.data.report import markdown_table, points
from traceir.errors import DataError, InputError
from traceir.search import EvaluatedEncoder

DEPTHS: Final = (1, 5, 10)


@dataclass(frozen=True, slots=True)
class QueryOutcome:
    """The outcome of one query: rank of its best positive (from 1), the route it took, and how it compares with its label."""

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


def summarise(judged: Sequence[QueryOutcome], metric_k: int, pool: int) -> dict[str, Any]:
    """Shares over one row: hits, routing, reasoning length; with labels also hits by steps and the share of exact reasoning."""
    summary: dict[str, Any] = {"queries": len(judged), "metric_k": metric_k} | _shares(judged, pool)
    summary["tokens_per_query"] = round(float(np.mean([one.tokens for one in judged])), 2)
    summary["truncated"] = _mean(one.truncated for one in judged)
    if steps := sorted({one.steps for one in judged if one.steps is not None}):
        groups = {count: [one for one in judged if one.steps == count] for count in steps}
        summary["by_steps"] = {
            str(count): _shares(group, pool)
            | {"exact": _mean(one.exact for one in group), "answer_exact": _mean(one.answer_exact for one in group)}
            for count, group in groups.items()
        }
    return summary


def _shares(judged: Sequence[QueryOutcome], pool: int) -> dict[str, Any]:
    hits = {f"hit@{k}": _mean(one.rank <= min(k, pool) for one in judged) for k in DEPTHS}
    return {"queries": len(judged), **hits, "reasoned": _mean(one.route == "reason" for one in judged)}


def _mean(values: Iterable[bool | None]) -> float | None:
    """Over the values that there are, None where there is none."""
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 4) if known else None


def average(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Plain mean over rows of each row's own metric (hit@5, or hit@10 for the fashion rows), and the lowest row."""
    values = [row[f"hit@{row['metric_k']}"] for row in rows.values()]
    return {"mean": round(float(np.mean(values)), 4), "lowest": min(values)}


def read_outcomes(file: Path) -> list[QueryOutcome]:
    """The lines of a queries-ROUTE.jsonl file. DataError where it is missing, or for a line that is none."""
    if not file.is_file():
        raise DataError(f"{file} is missing beside its results.json; evaluate again")
    judged: list[QueryOutcome] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            judged.append(QueryOutcome(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DataError(f"{file}:{number}: not a judged query ({error}); evaluate again") from error
    return judged


def continue_results(out: Path, header: dict[str, Any]) -> dict[str, Any]:
    """The results that `out` holds, or new ones with this header and no routes.

    Raises InputError where those that it holds are of another model, data or setting; the machine may be another.
    """
    file = out / "results.json"
    if not file.is_file():
        return {**header, "routes": {}}
    results: dict[str, Any] = json.loads(file.read_text())
    if different := sorted(key for key in header if key != "machine" and results.get(key) != header[key]):
        raise InputError(f"{file} holds results of another {', '.join(different)}; choose another --out or remove it")
    return results


def data_fingerprint(about: Path) -> Any:
    """What a data folder's description says of its content; None where it has no description."""
    return json.loads(about.read_text(encoding="utf-8")).get("fingerprint") if about.is_file() else None


def header_of(encoder: EvaluatedEncoder, format: int, about: Path) -> dict[str, Any]:
    """The first lines of every results.json: its format, the model, and the content of the data described in `about`."""
    model = {"model": encoder.fingerprint, "prompt_version": encoder.prompt_version}
    return {"format": format, **model, "data": data_fingerprint(about)}


def describe_machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used"


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table, one line a row, route and kind of pool; the row's own metric in bold."""
    lines: list[list[str]] = []
    for kind, means, word in (("routes", "average", "local"), ("global", "average_global", "global")):
        for route, rows in results.get(kind, {}).items():
            lines += [[name, route, f"{word} {row['pool']}", *_cells(row)] for name, row in rows.items()]
            if mean := results.get(means, {}).get(route):
                bold = f"**{points(mean['mean'])}**"
                lines.append(["**average** (hit@5, fashion hit@10)", route, word, "", "", bold, "", "", "", ""])
    names = ("row", "route", "pool", "queries", *(f"hit@{k}" for k in DEPTHS), "reasoned", "tokens/query", "queries/s")
    return markdown_table(names, "l" * len(names), lines)


def _cells(row: dict[str, Any]) -> list[str]:
    hits = [f"**{points(row[f'hit@{k}'])}**" if k == row["metric_k"] else points(row[f"hit@{k}"]) for k in DEPTHS]
    if "prompt_spread" in row:
        hits[-1] += f" (prompts spread {points(row['prompt_spread'])})"
    return [str(row["queries"]), *hits, f"{points(row['reasoned'], 0)} %", f"{row['tokens_per_query']:.1f}",
            f"{row['queries_per_second']:.0f}"]  # fmt: skip
