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
from typing import Any

import numpy as np
import torch

from traceir.errors import InputError
from traceir.evaluation.metrics import hit_at


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


def summarise(judged: Sequence[Judged], metric_k: int, pool: int) -> dict[str, Any]:
    """Shares over one row: hits, routing, reasoning length; with labels also hits by steps and the share of exact reasoning."""
    ranks = np.array([j.rank for j in judged])
    reasoned = np.array([j.route == "reason" for j in judged])
    found: dict[str, Any] = {
        "queries": len(judged),
        "metric_k": metric_k,
        **{f"hit@{k}": round(float(hit_at(ranks, k, pool).mean()), 4) for k in (1, 5, 10)},
        "reasoned": round(float(reasoned.mean()), 4),
        "tokens_per_query": round(float(np.mean([j.tokens for j in judged])), 2),
        "truncated": round(float(np.mean([j.truncated for j in judged])), 4),
    }
    labelled = [j for j in judged if j.steps is not None]
    if labelled:
        found["by_steps"] = by_steps(labelled, pool)
    return found


def by_steps(judged: Iterable[Judged], pool: int) -> dict[str, dict[str, Any]]:
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
            **{f"hit@{k}": round(float(np.mean([one.rank <= min(k, pool) for one in group])), 4) for k in (1, 5, 10)},
            "reasoned": round(float(np.mean([one.route == "reason" for one in group])), 4),
            "exact": round(float(np.mean(exact)), 4) if exact else None,
            "answer_exact": round(float(np.mean(answers)), 4) if answers else None,
        }
    return found


def average(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Plain mean over rows of each row's own metric (hit@5, or hit@10 for the fashion rows), and the lowest row."""
    values = {name: row[f"hit@{row['metric_k']}"] for name, row in rows.items()}
    return {"mean": round(float(np.mean(list(values.values()))), 4), "lowest": min(values.values())}


def read_judged(file: Path) -> list[Judged]:
    """The lines of a queries-ROUTE.jsonl file."""
    with file.open() as stream:
        return [Judged(**json.loads(line)) for line in stream]


def continue_results(out: Path, header: dict[str, Any]) -> dict[str, Any]:
    """The results that `out` holds, or new ones with this header and no routes.

    Raises InputError where those that it holds are of another model, data or setting; the machine may be another.
    """
    file = out / "results.json"
    if not file.is_file():
        return {**header, "routes": {}}
    found: dict[str, Any] = json.loads(file.read_text())
    if different := sorted(key for key in header if key != "machine" and found.get(key) != header[key]):
        raise InputError(f"{file} holds results of another {', '.join(different)}; choose another --out or remove it")
    return found


def describe_machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used"


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table, one line a row, route and kind of pool; the row's own metric in bold."""
    lines = ["| row | route | pool | queries | hit@1 | hit@5 | hit@10 | reasoned | tokens/query | queries/s |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for kind, means in (("routes", "average"), ("global", "average_global")):
        word = "local" if kind == "routes" else "global"
        for route, rows in results.get(kind, {}).items():
            lines += [_line(name, route, word, row) for name, row in rows.items()]
            if mean := results.get(means, {}).get(route):
                lines.append(
                    f"| **average** (hit@5, fashion hit@10) | {route} | {word} | | | **{100 * mean['mean']:.1f}** | | | | |"
                )
    return "\n".join(lines)


def _line(name: str, route: str, kind: str, row: dict[str, Any]) -> str:
    hits = " | ".join(
        f"**{100 * row[f'hit@{k}']:.1f}**" if k == row["metric_k"] else f"{100 * row[f'hit@{k}']:.1f}" for k in (1, 5, 10)
    )
    if "prompt_spread" in row:
        hits += f" (prompts spread {100 * row['prompt_spread']:.1f})"
    return (
        f"| {name} | {route} | {kind} {row['pool']} | {row['queries']} | {hits} | {100 * row['reasoned']:.0f} % "
        f"| {row['tokens_per_query']:.1f} | {row['queries_per_second']:.0f} |"
    )
