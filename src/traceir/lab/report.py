"""Reports over finished evaluations: recall by number of steps, routing against the labels, and the cost of each route.

Input is what `traceir evaluate` wrote: results.json and queries-ROUTE.jsonl. Recall is pooled over the queries of all rows (not
averaged over rows). Intervals are 95 % percentile bootstrap intervals over queries, drawn with a fixed seed: the same folders
always give the same bytes. A query is simple at 0 and 1 steps and complex from 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

import pandas as pd
from markupsafe import Markup

from traceir.data.report import percent, render
from traceir.errors import InputError
from traceir.evaluation.metrics import RESAMPLES, SEED, bootstrap_mean
from traceir.evaluation.results import Key, ScoredRun, named_runs, read_results, read_run, same_queries
from traceir.files import write_whole
from traceir.items import ROUTES
from traceir.lab.plots import plot_steps
from traceir.suggest import did_you_mean

GROUPS: Final[Mapping[str, tuple[int, int]]] = {"0-1": (0, 1), "2": (2, 2), "3+": (3, 99)}
"""Least and greatest number of steps of each group of queries."""
SPLIT: Final[Mapping[str, tuple[int, int]]] = {"simple": (0, 1), "complex": (2, 99)}

MAX_SIMPLE_REASON: Final = 0.05
MIN_COMPLEX_REASON: Final = 0.90
KINDS: Final = ("steps", "routing", "routes")
COLUMNS: Final = ["row", "route", "tokens", "steps", "exact"]
_FIELDS: Final = attrgetter(*COLUMNS)


def run_report(kind: str, folders: Sequence[str | Path], out: Path | None = None) -> str:
    """One report as Markdown, also written to the Markdown file `out` if given.

    Kinds: `steps` compares the folders, each given as `[LABEL=]FOLDER[:ROUTE]` (default: the folder's name, `auto`), and needs
    `out`, beside which it puts the plot; `routing` and `routes` report on every folder in turn.
    """
    if kind not in KINDS:
        raise InputError(f"report {kind!r} is unknown{did_you_mean(kind, KINDS)}; choose one of {', '.join(KINDS)}")
    if not folders:
        raise InputError(f"report {kind} needs at least one folder written by `traceir evaluate --out`")
    if kind == "steps":
        if out is None:
            raise InputError("report steps writes a table and a plot; name the Markdown file with --out")
        return steps_report(named_runs(folders), out).read_text(encoding="utf-8")
    report = routing_report if kind == "routing" else routes_report
    text = "\n".join(report(Path(folder)) for folder in folders)
    if out is not None:
        write_whole(markdown_file(out), text)
    return text


def steps_report(runs: Mapping[str, tuple[Path, str]], out: Path) -> Path:
    """Compares evaluations (label -> folder and route) by number of steps; differences are to the first.

    Writes the Markdown file `out` and a plot of the same name with suffix .svg; returns `out`. Raises InputError where the runs
    judge different data or different queries.
    """
    if not runs:
        raise InputError("no run to compare; give at least one evaluation folder")
    plot = markdown_file(out).with_suffix(".svg")
    read = [read_run(Path(folder), route, label) for label, (folder, route) in runs.items()]
    queries = outcomes(read, _labelled(read[0], same_queries(read)))
    groups = {name: between(queries, bounds) for name, bounds in GROUPS.items()}
    steps = {str(count): own for count, own in queries.groupby("steps")}
    write_whole(plot, plot_steps(measure(queries, ["run", "steps"], "hit@1").sort_values("steps", kind="stable")))
    written = queries[(queries["route"] == "reason") & queries["exact"].notna()]
    values = {"written": written, "plot": plot.name, "resamples": f"{RESAMPLES:,}", "seed": SEED}
    write_whole(out, _page("steps", read, queries=queries, groups=groups, steps=steps, bounds=GROUPS, **values))
    return out


def routing_report(folder: Path) -> str:
    """Routing of route `auto`, query by query against the label, as Markdown: each row, all rows, the mixed rows."""
    run = read_run(folder, "auto")
    queries = outcomes([run], _labelled(run, run.judged))
    rows = {str(name): own for name, own in queries.groupby("row", sort=False)}
    mixed = [name for name, own in rows.items() if all(len(between(own, bounds)) for bounds in SPLIT.values())]
    rows |= {"**all mixed rows**": queries[queries["row"].isin(mixed)], "**all rows**": queries}
    reasoned = {name: [between(own, bounds)["reasoned"] for bounds in SPLIT.values()] for name, own in rows.items()}
    most, least = MAX_SIMPLE_REASON, MIN_COMPLEX_REASON
    broken = [name.strip("*") for name, own in reasoned.items() if own[0].mean() > most or own[1].mean() < least]
    return _page("routing", [run], rows=reasoned, mixed=mixed, broken=broken, most=most, least=least)


def routes_report(folder: Path) -> str:
    """Every route found in the folder, on simple and on complex queries, as Markdown (the paper's Table 2 in kind).

    Compares the rows that all routes have scored. Speed is known per row only, so it is taken over the rows where at least half
    of the queries are of the kind; the report says how pure these are.
    """
    results = read_results(folder)
    routes = [route for route in ROUTES if results["routes"].get(route)]
    if not routes:
        raise InputError(f"{folder / 'results.json'} has no scored route; run `traceir evaluate` to its end")
    runs = [read_run(folder, route, route) for route in routes]
    common = set.intersection(*(set(run.judged) for run in runs))
    queries = outcomes(runs, _labelled(runs[0], [key for key in runs[0].judged if key in common]))
    kinds = {name: _kind_of_queries(results["routes"], queries, bounds) for name, bounds in SPLIT.items()}
    about = ScoredRun(folder.name, routes[0], folder, results, {})
    return _page("routes", [about], kinds=kinds)


def outcomes(runs: Sequence[ScoredRun], keys: Sequence[Key]) -> pd.DataFrame:
    """One line a run and query: some fields of Judged (steps -1 without a label), `run`, `first` (whether it is the first run's),
    `reasoned`, hits (`hit@1`, `hit@5`, and `hit` at the row's own k), and those of the first run (`first@1`, `first@5`).
    """
    frames = []
    for run in runs:
        frame = pd.DataFrame([_FIELDS(run.judged[key]) for key in keys], columns=COLUMNS).astype({"exact": object})
        hits = {f"hit@{k}": run.hits(keys, k) for k in (1, 5)} | {f"first@{k}": runs[0].hits(keys, k) for k in (1, 5)}
        frames.append(frame.assign(run=run.label, first=run is runs[0], hit=run.hits(keys), **hits))
    queries = pd.concat(frames, ignore_index=True)
    steps, reasoned = queries["steps"].fillna(-1).astype(int), (queries["route"] == "reason").astype(float)
    return queries.assign(steps=steps, reasoned=reasoned)


def measure(queries: pd.DataFrame, by: list[str], hit: str) -> pd.DataFrame:
    """One line a group: its `queries`, the `mean` of one of the hits with its interval (`low`, `high`), and mean `tokens`."""
    lines = []
    for key, own in queries.groupby(by, sort=False):
        interval = asdict(bootstrap_mean(own[hit]))
        lines.append(dict(zip(by, key, strict=True)) | {"queries": len(own), **interval, "tokens": own["tokens"].mean()})
    return pd.DataFrame(lines)


def between(queries: pd.DataFrame, steps: tuple[int, int]) -> pd.DataFrame:
    return queries[queries["steps"].between(*steps)]


def markdown_file(out: Path) -> Path:
    if out.suffix != ".md" or out.is_dir():
        raise InputError(f"{out} must name a Markdown file that ends in .md")
    return out


def _labelled(run: ScoredRun, keys: Iterable[Key]) -> list[Key]:
    labelled = [key for key in keys if run.steps(key) >= 0]
    if not labelled:
        raise InputError(f"{run.folder}: no query has a label with its number of steps; this report needs labelled data")
    return labelled


def _page(template: str, runs: Sequence[ScoredRun], **values: object) -> str:
    def difference(own: pd.DataFrame, k: int) -> str:
        """Of one run to the first."""
        return "–" if own["first"].all() else _figure(own[f"hit@{k}"] - own[f"first@{k}"], "+.1f")

    functions = {"between": between, "figure": _figure, "share": _share, "difference": difference}
    return render(f"lab/templates/{template}.md.j2", runs=runs, **functions, **values)


def _figure(values: pd.Series, form: str = ".1f") -> Markup:
    """The mean of shares in per cent, with its interval."""
    share = bootstrap_mean(values)
    return Markup(f"{100 * share.mean:{form}} [{100 * share.low:{form}}, {100 * share.high:{form}}]")


def _share(values: pd.Series) -> str:
    return percent(values.mean()) if len(values) else "–"


def _kind_of_queries(routes: Mapping[str, Any], queries: pd.DataFrame, bounds: tuple[int, int]) -> dict[str, Any]:
    """One kind of queries by route, with the speed over the rows that are mostly so, and how pure these are."""
    first = queries[queries["first"]]
    is_own = first["steps"].between(*bounds)
    shares = is_own.groupby(first["row"], sort=False).mean()
    rows = list(shares[shares >= 0.5].index)
    routes_of = {str(route): own for route, own in between(queries, bounds).groupby("run", sort=False)}
    speeds = {route: _speed([routes[route][row] for row in rows]) for route in routes_of}
    purity = is_own[first["row"].isin(rows)].mean()
    return {"count": int(is_own.sum()), "routes": routes_of, "speeds": speeds, "rows": len(rows), "purity": purity}


def _speed(rows: Sequence[Mapping[str, Any]]) -> str:
    """Queries per second over these rows; a dash where one is not known."""
    if not rows or any(row["queries_per_second"] <= 0 for row in rows):
        return "–"
    seconds = sum(row["queries"] / row["queries_per_second"] for row in rows)
    return f"{sum(row['queries'] for row in rows) / seconds:.1f}"
