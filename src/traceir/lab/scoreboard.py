"""Evaluations side by side as one report: every row with the published figures beside it, bars, the price of reasoning, routing.

From one command come `NAME.md`, `NAME.csv` (one line a run, row and metric, with its interval) and `NAME.html` (one page that
opens anywhere, its plots inlined). Published figures (published.csv) are scores on the real M-BEIR, local pools, in per cent, of
TRACE and of its peers as that paper gives them; every place that shows one says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pandas as pd
from markupsafe import Markup

from traceir.data.report import escape, markdown_table, percent, render
from traceir.errors import InputError
from traceir.evaluation.results import ScoredRun, named_runs, read_run, same_queries
from traceir.files import write_whole
from traceir.lab.plots import plot_cost, plot_rows
from traceir.lab.report import measure, outcomes

SOURCE: Final = "arXiv 2603.02929v2, Table 1"
SHOWN_BESIDE: Final = ("UniIR CLIP-SF", "LamRA-Ret", "TRACE")
"""Published methods in the tables."""
CSV: Final = ["source", "run", "route", "row", "queries", "metric", "value", "low", "high", "tokens_per_query"]
Cells = list[list[str]]
"""The lines of a table, its header first."""


def write_scoreboard(folders: Sequence[str | Path], out: Path) -> str:
    """Writes the report on `[LABEL=]FOLDER[:ROUTE]` beside `out`, which names the Markdown file, and returns its text.

    Raises InputError where the runs judge different queries.
    """
    if out.suffix != ".md" or out.is_dir():
        raise InputError(f"{out} must name a Markdown file that ends in .md; .csv and .html are written beside it")
    runs = [read_run(folder, route, label) for label, (folder, route) in named_runs(folders).items()]
    queries = outcomes(runs, same_queries(runs))
    measured = measure(queries, ["run", "row"], "hit")
    published = pd.read_csv(Path(__file__).with_name("published.csv"), index_col="row")
    rows, routing = _rows(measured, published), _routing(queries)
    about = {"runs": runs, "queries": int(queries["first"].sum()), "source": SOURCE}
    header = [rows[0][0], *(escape(run.label) for run in runs), *rows[0][len(runs) + 1 :]]
    marked = markdown_table(header, "l" + "r" * (len(header) - 1), [*rows[1:-1], [f"**{cell}**" for cell in rows[-1]]])
    routes = markdown_table(routing[0], "llrrr", [[escape(line[0]), *line[1:]] for line in routing[1:]])
    text = render("lab/templates/scoreboard.md.j2", rows=marked, routing=routes, **about)
    plots = [Markup(svg[svg.index("<svg") :]) for svg in (plot_rows(measured), plot_cost(queries))]
    page = render("lab/templates/scoreboard.html.j2", rows=rows, routing=routing, bars=plots[0], cost=plots[1], **about)
    write_whole(out.with_suffix(".csv"), _csv(measured, published, runs))
    write_whole(out.with_suffix(".html"), page)
    write_whole(out, text)
    return text


def _rows(measured: pd.DataFrame, published: pd.DataFrame) -> Cells:
    """Every row's own metric and the average; without a published figure the cell is a dash."""
    rows, labels = measured["row"].unique(), measured["run"].unique()
    beside = published.loc[:, list(SHOWN_BESIDE) if published.index.isin(rows).any() else []].reindex(rows)
    lines: Cells = [["row", *labels, *(f"{method} (published)" for method in beside)]]
    for row, own in measured.groupby("row", sort=False):
        shown = [f"{100 * run.mean:.1f} [{100 * run.low:.1f}, {100 * run.high:.1f}]" for run in own.itertuples()]
        lines.append([row, *shown, *map(_known, beside.loc[row])])
    means = measured.groupby("run", sort=False)["mean"].mean()
    averages = beside.mean() if set(rows) == set(published.index) else beside.mean() * float("nan")
    return [*lines, ["average", *(f"{100 * mean:.1f}" for mean in means), *map(_known, averages)]]


def _known(figure: float) -> str:
    return "–" if pd.isna(figure) else f"{figure:.1f}"


def _routing(queries: pd.DataFrame) -> Cells:
    """For each run the queries by what they need (label) and the route they took."""
    needs = pd.cut(queries["steps"], [-2, -1, 1, float("inf")], labels=["no label", "simple", "complex"])
    needs = needs.cat.reorder_categories(["simple", "complex", "no label"])
    lines: Cells = [["run", "queries", "direct", "reason", "tokens/query"]]
    for label, own in queries.groupby("run", sort=False):
        for need, part in own.groupby(needs, observed=True):
            counts = [int((1 - part["reasoned"]).sum()), int(part["reasoned"].sum())]
            shares = [f"{count} ({percent(count / len(part))})" for count in counts]
            lines.append([label, need, *shares, f"{part['tokens'].mean():.1f}"])
    return lines


def _csv(measured: pd.DataFrame, published: pd.DataFrame, runs: Sequence[ScoredRun]) -> str:
    routes = {run.label: run.route for run in runs}
    depths = {row: own["metric_k"] for row, own in runs[0].results["routes"][runs[0].route].items()}
    own = measured.rename(columns={"mean": "value", "tokens": "tokens_per_query"}).assign(
        source="measured", route=measured["run"].map(routes), metric="hit@" + measured["row"].map(depths).astype(str)
    )
    others = published.melt(var_name="run", ignore_index=False).reset_index()
    depth = others["row"].str.startswith("fashion").map({True: "hit@10", False: "hit@5"})
    others = others.assign(source=f"published, real M-BEIR, {SOURCE}", metric=depth, value=others["value"] / 100)
    whole = pd.concat([own, others]).reindex(columns=CSV)
    forms = {"queries": "{:.0f}", **dict.fromkeys(("value", "low", "high"), "{:.4f}"), "tokens_per_query": "{:.2f}"}
    for column, form in forms.items():
        whole[column] = whole[column].map(form.format, na_action="ignore")
    return str(whole.to_csv(index=False, lineterminator="\n"))
