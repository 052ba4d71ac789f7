"""What an evaluation leaves, written and read again: the outcome of each query, and its sums over rows, kinds and routes.

Files (docs/formats.md): `queries-ROUTE.jsonl` has one QueryOutcome a line, `results.json` the sums.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from traceir.data.folder import data_fingerprint
from traceir.data.report import markdown_table, points
from traceir.errors import DataError, InputError
from traceir.items import ROUTES, Route
from traceir.retrieval.search import EvaluatedEncoder

DEPTHS: Final = (1, 5, 10)
Key = tuple[str, str]
"""Row and qid."""
Values = npt.NDArray[np.float64]


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


def summarise(outcomes: Sequence[QueryOutcome], metric_k: int, pool: int) -> dict[str, Any]:
    """Shares over one row: hits, routing, reasoning length; with labels also hits by steps and the share of exact reasoning."""
    summary: dict[str, Any] = {"queries": len(outcomes), "metric_k": metric_k} | _shares(outcomes, pool)
    summary["tokens_per_query"] = round(float(np.mean([outcome.tokens for outcome in outcomes])), 2)
    summary["truncated"] = _mean(outcome.truncated for outcome in outcomes)
    for steps in sorted({outcome.steps for outcome in outcomes if outcome.steps is not None}):
        group = [outcome for outcome in outcomes if outcome.steps == steps]
        exact = {name: _mean(getattr(outcome, name) for outcome in group) for name in ("exact", "answer_exact")}
        summary.setdefault("by_steps", {})[str(steps)] = _shares(group, pool) | exact
    return summary


def _shares(outcomes: Sequence[QueryOutcome], pool: int) -> dict[str, Any]:
    hits = {f"hit@{k}": _mean(outcome.rank <= min(k, pool) for outcome in outcomes) for k in DEPTHS}
    return {"queries": len(outcomes), **hits, "reasoned": _mean(outcome.route == "reason" for outcome in outcomes)}


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
    outcomes: list[QueryOutcome] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            outcomes.append(QueryOutcome(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DataError(f"{file}:{number}: not a judged query ({error}); evaluate again") from error
    return outcomes


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


def header_of(encoder: EvaluatedEncoder, format: int, about: Path) -> dict[str, Any]:
    """The first lines of every results.json: its format, the model, and the content of the data described in `about`."""
    model = {"model": encoder.fingerprint, "prompt_version": encoder.prompt_version}
    return {"format": format, **model, "data": data_fingerprint(about)}


def describe_machine() -> str:
    import torch  # a second that reports do not need

    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used"


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table, one line a row, route and kind of pool; the row's own metric in bold."""
    lines: list[list[object]] = []
    for kind, means, word in (("routes", "average", "local"), ("global", "average_global", "global")):
        for route, rows in results.get(kind, {}).items():
            for name, row in rows.items():
                hits = [points(row[f"hit@{k}"]) for k in DEPTHS]
                own = DEPTHS.index(row["metric_k"])
                hits[own] = f"**{hits[own]}**"
                if "prompt_spread" in row:
                    hits[-1] += f" (prompts spread {points(row['prompt_spread'])})"
                costs = f"{points(row['reasoned'], 0)} %", f"{row['tokens_per_query']:.1f}", f"{row['queries_per_second']:.0f}"
                lines.append([name, route, f"{word} {row['pool']}", row["queries"], *hits, *costs])
            if mean := results.get(means, {}).get(route):
                bold = f"**{points(mean['mean'])}**"
                lines.append(["**average** (hit@5, fashion hit@10)", route, word, "", "", bold, "", "", "", ""])
    names = ("row", "route", "pool", "queries", *(f"hit@{k}" for k in DEPTHS), "reasoned", "tokens/query", "queries/s")
    return markdown_table(names, "l" * len(names), lines)


@dataclass(frozen=True)
class ScoredRun:
    """One finished evaluation by one route: the header of its results and its judged queries by (row, qid)."""

    label: str
    route: str
    folder: Path
    results: Mapping[str, Any]
    judged: Mapping[Key, QueryOutcome]

    def hits(self, keys: Sequence[Key], k: int | None = None) -> Values:
        """1.0 where the query is hit at k (None: at its own row's k), else 0.0; shape [len(keys)]."""
        rows = self.results["routes"][self.route]
        depths = {name: min(k or row["metric_k"], row.get("pool", k or row["metric_k"])) for name, row in rows.items()}
        return np.array([float(self.judged[key].rank <= depths[key[0]]) for key in keys])

    def reasoned(self, keys: Sequence[Key]) -> Values:
        return np.array([float(self.judged[key].route == "reason") for key in keys])

    def steps(self, key: Key) -> int:
        """The label's number of steps; -1 without a label."""
        steps = self.judged[key].steps
        return -1 if steps is None else steps


def read_run(folder: Path, route: str, label: str = "") -> ScoredRun:
    """One route of an evaluation folder, without the lines of a row whose evaluation did not end.

    Raises InputError where the route was never scored, DataError on a broken or incomplete file.
    """
    results = read_results(folder)
    rows = results["routes"].get(route)
    if not rows:
        have = ", ".join(results["routes"]) or "none"
        raise InputError(f"{folder} has no route {route!r} (it has: {have}); run `traceir evaluate --route {route}`")
    if results.get("prompt") == "all":
        raise InputError(f"{folder} tried every instruction; reports read an evaluation with --prompt first or seeded")
    file = folder / f"queries-{route}.jsonl"
    judged = {(outcome.row, outcome.qid): outcome for outcome in read_outcomes(file) if outcome.row in rows}
    for name, row in rows.items():
        count = sum(key[0] == name for key in judged)
        if count != row["queries"]:
            raise DataError(f"{file}: {count} queries of {name}, results.json has {row['queries']}; evaluate again")
    return ScoredRun(label or folder.name, route, folder, results, judged)


def read_results(folder: Path) -> dict[str, Any]:
    """The results.json of an evaluation. InputError where there is none, DataError where it is broken or of another format."""
    file = folder / "results.json"
    if not file.is_file():
        raise InputError(f"{file} is not there; give a folder written by `traceir evaluate --out`")
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); evaluate again") from error
    if results.get("format") != 2 or not isinstance(results.get("routes"), dict):
        raise DataError(f"{file}: format is {results.get('format')!r}, this release reads 2; evaluate again")
    return results


def named_runs(folders: Sequence[str | Path]) -> dict[str, tuple[Path, Route]]:
    """`[LABEL=]FOLDER[:ROUTE]` as label -> folder and route; InputError where two have one label."""
    runs: dict[str, tuple[Path, Route]] = {}
    for text in map(str, folders):
        named, _, rest = text.rpartition("=") if "=" not in text else text.partition("=")
        folder, colon, ending = rest.rpartition(":")
        route = next((known for known in ROUTES if colon and known == ending), None)
        path = Path(folder if route else rest)
        label = named or (f"{path.name} ({route})" if route else path.name)
        if label in runs:
            raise InputError(f"two runs are called {label!r}; name them: LABEL=FOLDER:ROUTE")
        runs[label] = (path, route or "auto")
    return runs


def same_queries(runs: Sequence[ScoredRun]) -> list[Key]:
    """The queries all runs judged, in the first run's order; InputError where they differ."""
    first = runs[0]
    for run in runs[1:]:
        ours, theirs = first.results.get("data"), run.results.get("data")
        if ours != theirs:
            raise InputError(
                f"{run.label!r} ({run.folder}) was evaluated on data {theirs}, {first.label!r} ({first.folder}) on {ours}; "
                "evaluate both on one folder"
            )
        if different := sorted(set(first.judged) ^ set(run.judged)):
            row, qid = different[0]
            raise InputError(
                f"{run.label!r} ({run.folder}) and {first.label!r} ({first.folder}) judge different queries: {len(different)} "
                f"are in one only, such as {qid} of {row}; evaluate both with the same --rows, --split and --limit"
            )
        for key in first.judged:
            if first.steps(key) != run.steps(key):
                raise InputError(
                    f"query {key[1]} of {key[0]} has {first.steps(key)} steps in {first.folder} and {run.steps(key)} in "
                    f"{run.folder}; evaluate both on the same labels"
                )
    return list(first.judged)
