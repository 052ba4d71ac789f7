"""Reports over finished evaluations: recall by number of steps, routing against the labels, and the cost of each route.

Input is what `traceir evaluate` wrote: results.json and queries-ROUTE.jsonl. Recall is pooled over the queries of all rows (not
averaged over rows). Intervals are 95 % percentile bootstrap intervals over queries, drawn with a fixed seed: the same folders
always give the same bytes. A query is simple at 0 and 1 steps and complex from 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import pandas as pd

from traceir.data.report import escape, percent, render
from traceir.errors import InputError
from traceir.evaluation.metrics import RESAMPLES, SEED, bootstrap_mean
from traceir.evaluation.runs import Key, ScoredRun, named_runs, read_results, read_run, same_queries
from traceir.evaluation.tables import markdown_table
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
    by_steps = {str(steps): own for steps, own in queries.groupby("steps")}
    by_group = {name: between(queries, bounds) for name, bounds in GROUPS.items()}
    write_whole(plot, plot_steps(measure(queries, ["run", "steps"], "hit@1").sort_values("steps", kind="stable")))
    text = render(
        "lab/templates/steps.md.j2",
        runs=read,
        plot=plot.name,
        groups=_steps_table(by_group | {"all": queries}),
        by_steps=_steps_table(by_steps),
        right=_right_reasoning(by_group),
        rows=_rows_table(queries),
        resamples=f"{RESAMPLES:,}",
        seed=SEED,
    )
    write_whole(out, text)
    return out


def routing_report(folder: Path) -> str:
    """Routing of route `auto`, query by query against the label, as Markdown: each row, all rows, the mixed rows."""
    run = read_run(folder, "auto")
    queries = outcomes([run], _labelled(run, run.judged))
    rows = {str(name): own for name, own in queries.groupby("row", sort=False)}
    mixed = [name for name, own in rows.items() if all(len(between(own, bounds)) for bounds in SPLIT.values())]
    rows |= {"**all mixed rows**": queries[queries["row"].isin(mixed)], "**all rows**": queries}
    lines, broken = [], []
    for name, own in rows.items():
        simple, complex_ = (between(own, bounds)["reasoned"] for bounds in SPLIT.values())
        mark = "mixed" if name in (*mixed, "**all mixed rows**") else ""
        lines.append([name, mark, len(simple), _share(simple), len(complex_), _share(complex_)])
        if simple.mean() > MAX_SIMPLE_REASON or complex_.mean() < MIN_COMPLEX_REASON:
            broken.append(name.strip("*"))
    header = ["row", "", "simple", "of these reason", "complex", "of these reason"]
    bounds = {"most": 100 * MAX_SIMPLE_REASON, "least": 100 * MIN_COMPLEX_REASON}
    text = markdown_table(header, "llrrrr", lines)
    return render("lab/templates/routing.md.j2", runs=[run], table=text, broken=broken, **bounds)


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
    return render("lab/templates/routes.md.j2", runs=[about], kinds=kinds)


def outcomes(runs: Sequence[ScoredRun], keys: Sequence[Key]) -> pd.DataFrame:
    """One line a run and query: the fields of Judged (steps -1 without a label), `run`, `first` (whether it is the first run's),
    `reasoned`, hits (`hit@1`, `hit@5`, and `hit` at the row's own k), and those of the first run (`first@1`, `first@5`).
    """
    frames = []
    for run in runs:
        frame = pd.DataFrame([run.judged[key] for key in keys]).astype({"exact": object})
        hits = {f"hit@{k}": run.hits(keys, k) for k in (1, 5)} | {f"first@{k}": runs[0].hits(keys, k) for k in (1, 5)}
        steps, reasoned = frame["steps"].fillna(-1).astype(int), (frame["route"] == "reason").astype(float)
        frames.append(
            frame.assign(run=run.label, first=run is runs[0], steps=steps, reasoned=reasoned, hit=run.hits(keys), **hits)
        )
    return pd.concat(frames, ignore_index=True)


def measure(queries: pd.DataFrame, by: list[str], hit: str) -> pd.DataFrame:
    """One line a group: its `queries`, the `mean` of one of the hits with its interval (`low`, `high`), and mean `tokens`."""
    lines = [
        {
            **dict(zip(by, key, strict=True)),
            "queries": len(own),
            **asdict(bootstrap_mean(own[hit])),
            "tokens": own["tokens"].mean(),
        }
        for key, own in queries.groupby(by, sort=False)
    ]
    return pd.DataFrame(lines)


def between(queries: pd.DataFrame, steps: tuple[int, int]) -> pd.DataFrame:
    return queries[queries["steps"].between(*steps)]


def figure(values: pd.Series, form: str = ".1f") -> str:
    """The mean of shares in per cent, with its interval."""
    share = bootstrap_mean(values)
    return f"{100 * share.mean:{form}} [{100 * share.low:{form}}, {100 * share.high:{form}}]"


def markdown_file(out: Path) -> Path:
    if out.suffix != ".md" or out.is_dir():
        raise InputError(f"{out} must name a Markdown file that ends in .md")
    return out


def _labelled(run: ScoredRun, keys: Iterable[Key]) -> list[Key]:
    labelled = [key for key in keys if run.steps(key) >= 0]
    if not labelled:
        raise InputError(f"{run.folder}: no query has a label with its number of steps; this report needs labelled data")
    return labelled


def _share(values: pd.Series) -> str | None:
    return percent(values.mean()) if len(values) else None


def _difference(own: pd.DataFrame, k: int) -> str | None:
    """Of one run to the first."""
    return None if own["first"].all() else figure(own[f"hit@{k}"] - own[f"first@{k}"], "+.1f")


def _steps_table(sets: Mapping[str, pd.DataFrame]) -> str:
    """The last column is known where a query of these reasons and one has a reasoning in its label."""
    lines = []
    for name, queries in sets.items():
        for label, own in queries.groupby("run", sort=False):
            hits = figure(own["hit@1"]), figure(own["hit@5"]), _difference(own, 1), _difference(own, 5)
            exact = own["exact"].dropna() if own["reasoned"].any() else own["exact"][:0]
            lines.append([name, escape(label), len(own), *hits, _share(own["reasoned"]), _share(exact)])
    header = ["steps", "run", "n", "R@1", "R@5", "R@1 to first", "R@5 to first", "reasoned", "exactly right"]
    return markdown_table(header, "llrllllrr", lines)


def _rows_table(queries: pd.DataFrame) -> str:
    """R@1 of every row and group, so that a gain or loss can be traced to where it comes from."""
    lines = []
    for row, own in queries.groupby("row", sort=False):
        for name, bounds in GROUPS.items():
            hits = between(own, bounds).groupby("run", sort=False)["hit@1"]
            if len(hits):
                lines.append([row, name, int(hits.size().iloc[0]), *(f"{100 * share:.1f}" for share in hits.mean())])
    labels = [escape(label) for label in queries["run"].unique()]
    return markdown_table(["row", "steps", "n", *labels], "llr" + "r" * len(labels), lines)


def _right_reasoning(sets: Mapping[str, pd.DataFrame]) -> str:
    """R@1 where the reasoning is exactly right and where it is not, with the first run on the very same queries."""
    labelled = pd.concat([own.assign(group=name) for name, own in sets.items()])
    written = labelled[(labelled["route"] == "reason") & labelled["exact"].notna()]
    lines = []
    for label in labelled["run"].unique():
        for name in sets:
            for right, word in ((True, "right"), (False, "wrong")):
                own = written[(written["run"] == label) & (written["group"] == name) & (written["exact"] == right)]
                if len(own):
                    first = None if own["first"].all() else figure(own["first@1"])
                    lines.append([escape(label), name, word, len(own), figure(own["hit@1"]), first])
    header = ["run", "steps", "reasoning", "n", "R@1", "first run, same queries"]
    return markdown_table(header, "lllrll", lines) if lines else ""


def _kind_of_queries(routes: Mapping[str, Any], queries: pd.DataFrame, bounds: tuple[int, int]) -> dict[str, Any]:
    """The table of one kind of queries by route, how many they are, and the rows that are mostly so."""
    own, first = between(queries, bounds), queries[queries["first"]]
    if own.empty:
        return {"count": 0}
    is_own = first["steps"].between(*bounds)
    shares = is_own.groupby(first["row"], sort=False).mean()
    rows = list(shares[shares >= 0.5].index)
    lines = []
    for route, part in own.groupby("run", sort=False):
        means = f"{100 * part['hit'].mean():.1f}", f"{part['tokens'].mean():.1f}", _share(part["reasoned"])
        lines.append(
            [route, figure(part["hit@1"]), _difference(part, 1), *means, _speed([routes[str(route)][row] for row in rows])]
        )
    header = ["route", "R@1", f"R@1 to {lines[0][0]}", "row metric", "tokens/query", "reasoned", "queries/s"]
    text = markdown_table(header, "lllrrrr", lines)
    return {"count": int(own["first"].sum()), "table": text, "rows": len(rows), "purity": is_own[first["row"].isin(rows)].mean()}


def _speed(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Queries per second over these rows; a dash where one is not known."""
    if not rows or any(row["queries_per_second"] <= 0 for row in rows):
        return None
    seconds = sum(row["queries"] / row["queries_per_second"] for row in rows)
    return f"{sum(row['queries'] for row in rows) / seconds:.1f}"
