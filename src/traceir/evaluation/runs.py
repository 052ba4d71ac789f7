"""Finished evaluations, read again: results.json and queries-ROUTE.jsonl of one route as one object, by query."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from traceir.errors import DataError, InputError
from traceir.evaluation.judged import QueryOutcome, read_outcomes
from traceir.items import ROUTES, Route

Key = tuple[str, str]
"""Row and qid."""
Values = npt.NDArray[np.float64]


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
    judged = {(one.row, one.qid): one for one in read_outcomes(file) if one.row in rows}
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
        given, _, rest = text.rpartition("=") if "=" not in text else text.partition("=")
        folder, colon, ending = rest.rpartition(":")
        route = next((known for known in ROUTES if colon and known == ending), None)
        place = Path(folder if route else rest)
        label = given or (f"{place.name} ({route})" if route else place.name)
        if label in runs:
            raise InputError(f"two runs are called {label!r}; name them: LABEL=FOLDER:ROUTE")
        runs[label] = (place, route or "auto")
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
