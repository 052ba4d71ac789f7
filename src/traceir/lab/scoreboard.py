"""Evaluations side by side as one report: every row with the published figures beside it, bars, the price of reasoning, routing.

From one command come `NAME.md`, `NAME.csv` (one line a run, row and metric, with its interval) and `NAME.html` (one page that
opens anywhere, its plots inlined). Published figures are scores on the real M-BEIR; every place that shows one says so.
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from traceir.data.mbeir import EVAL_ROWS
from traceir.errors import InputError
from traceir.evaluation.metrics import Interval, bootstrap_mean
from traceir.evaluation.runs import Key, ScoredRun, named_runs, read_run, same_queries
from traceir.files import write_whole
from traceir.lab import published

SHOWN_BESIDE: Final = ("UniIR CLIP-SF", "LamRA-Ret", "TRACE")
"""Published methods in the tables."""


def write_scoreboard(folders: Sequence[str | Path], out: Path) -> str:
    """Writes the report on `[LABEL=]FOLDER[:ROUTE]` beside `out`, which names the Markdown file, and returns its text.

    Raises InputError where the runs judge different queries.
    """
    if out.suffix != ".md" or out.is_dir():
        raise InputError(f"{out} must name a Markdown file that ends in .md; .csv and .html are written beside it")
    runs = [read_run(folder, route, label) for label, (folder, route) in named_runs(folders).items()]
    keys = same_queries(runs)
    scores = {run.label: _scores(run, keys) for run in runs}
    text = "\n".join(
        [_head(runs, keys), "## Rows\n", *_rows_table(scores), "", _NOTE, "## Routing\n", *_routing_table(runs, keys)]
    )
    write_whole(out.with_suffix(".csv"), _as_csv(runs, keys, scores))
    write_whole(out.with_suffix(".html"), _page(runs, keys, scores))
    write_whole(out, text + "\n")
    return text


_NOTE: Final = (
    "The row's own metric in per cent: hit@5, on fashion rows hit@10; [low, high] is its 95 % bootstrap interval over queries. "
    f"Columns marked *published* are scores on the real M-BEIR, local pools ({published.SOURCE}); beside scores on other data "
    "they show the shape of a result, not a rank.\n"
)


def _scores(run: ScoredRun, keys: Sequence[Key]) -> dict[str, Interval]:
    """The row's own metric, by row, shares from 0 to 1."""
    rows = dict.fromkeys(key[0] for key in keys)
    return {row: bootstrap_mean(run.hits([key for key in keys if key[0] == row])) for row in rows}


def _mean(scores: Mapping[str, Interval]) -> float:
    return float(np.mean([score.mean for score in scores.values()]))


def _head(runs: Sequence[ScoredRun], keys: Sequence[Key]) -> str:
    about = runs[0].results
    extent = f"the first {about['limit']} queries of each row" if about.get("limit") else "all queries"
    lines = ["# Scoreboard\n", f"Data {about.get('data') or '(no fingerprint)'}, split {about.get('split')}, {extent}"]
    lines.append(f"({len(keys)}), local pools, instruction {about.get('prompt')}; {about.get('machine')}.\n")
    lines += [f"- {run.label}: model {run.results.get('model')}, route {run.route}" for run in runs]
    return "\n".join(lines) + "\n"


def _cells(scores: Mapping[str, Mapping[str, Interval]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table of rows; without a published figure the cell is a dash."""
    rows = list(next(iter(scores.values())))
    beside = SHOWN_BESIDE if any(row in EVAL_ROWS for row in rows) else ()
    header = ["row", *scores, *(f"{method} (published)" for method in beside)]
    lines = []
    for row in rows:
        own = [scores[label][row] for label in scores]
        others = [published.MBEIR[method].get(row) for method in beside]
        shown = [f"{100 * one.mean:.1f} [{100 * one.low:.1f}, {100 * one.high:.1f}]" for one in own]
        lines.append([row, *shown, *("–" if one is None else f"{one:.1f}" for one in others)])
    whole = set(rows) == set(EVAL_ROWS)
    means = [f"{100 * _mean(scores[label]):.1f}" for label in scores]
    lines.append(["average", *means, *(f"{published.average(method):.1f}" if whole else "–" for method in beside)])
    return header, lines


def _rows_table(scores: Mapping[str, Mapping[str, Interval]]) -> list[str]:
    header, lines = _cells(scores)
    every = [header, ["---", *["---:"] * (len(header) - 1)], *lines[:-1], [f"**{cell}**" for cell in lines[-1]]]
    return [
        "| " + " | ".join(cell.replace("|", "\\|") if n == 0 else cell for n, cell in enumerate(line)) + " |" for line in every
    ]


def _routing_cells(runs: Sequence[ScoredRun], keys: Sequence[Key]) -> list[list[str]]:
    """For each run the queries by what they need (label) and the road they took."""
    lines = []
    for run in runs:
        for word, own in (
            ("simple", [key for key in keys if 0 <= run.steps(key) < 2]),
            ("complex", [key for key in keys if run.steps(key) >= 2]),
            ("no label", [key for key in keys if run.steps(key) < 0]),
        ):
            if own:
                reasoned = run.reasoned(own)
                tokens = float(np.mean([run.judged[key].tokens for key in own]))
                direct = f"{int((1 - reasoned).sum())} ({100 * (1 - reasoned.mean()):.1f} %)"
                lines.append([run.label, word, direct, f"{int(reasoned.sum())} ({100 * reasoned.mean():.1f} %)", f"{tokens:.1f}"])
    return lines


_ROUTING_HEADER: Final = ["run", "queries", "direct", "reason", "tokens/query"]


def _routing_table(runs: Sequence[ScoredRun], keys: Sequence[Key]) -> list[str]:
    lines = [_ROUTING_HEADER, ["---", "---", "---:", "---:", "---:"], *_routing_cells(runs, keys)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _as_csv(runs: Sequence[ScoredRun], keys: Sequence[Key], scores: Mapping[str, Mapping[str, Interval]]) -> str:
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    table.writerow(["source", "run", "route", "row", "queries", "metric", "value", "low", "high", "tokens_per_query"])
    for run in runs:
        for row, score in scores[run.label].items():
            own = [key for key in keys if key[0] == row]
            metric = f"hit@{run.results['routes'][run.route][row]['metric_k']}"
            tokens = float(np.mean([run.judged[key].tokens for key in own]))
            numbers = [f"{value:.4f}" for value in (score.mean, score.low, score.high)]
            table.writerow(["measured", run.label, run.route, row, len(own), metric, *numbers, f"{tokens:.2f}"])
    for method, figures in published.MBEIR.items():
        for row, value in figures.items():
            metric = "hit@10" if row.startswith("fashion") else "hit@5"
            table.writerow(
                [f"published, real M-BEIR, {published.SOURCE}", method, "", row, "", metric, f"{value / 100:.4f}", "", "", ""]
            )
    return stream.getvalue()


def _page(runs: Sequence[ScoredRun], keys: Sequence[Key], scores: Mapping[str, Mapping[str, Interval]]) -> str:
    header, lines = _cells(scores)
    body = [
        f"<p>{html.escape(_head(runs, keys).removeprefix('# Scoreboard').strip())}</p>".replace("\n", "<br>"),
        _html_table(header, lines),
        f"<p>{html.escape(_NOTE.replace('*', ''))}</p>",
        "<h2>Rows</h2>",
        _bars(scores),
        "<h2>What reasoning costs and buys</h2>",
        _frontier(runs, keys),
        "<p>Each large mark is a run over all its rows, each small one a row: the mean of the row's metric against the mean "
        "number of reasoning tokens of a query.</p>",
        "<h2>Routing against the labels</h2>",
        _html_table(_ROUTING_HEADER, _routing_cells(runs, keys)),
    ]
    return _PAGE.format(body="\n".join(body))


def _html_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _bars(scores: Mapping[str, Mapping[str, Interval]]) -> str:
    """Bars of every row with their intervals, one colour a run."""
    rows = list(next(iter(scores.values())))
    figure, axes = _figure(8.6, 0.6 + 0.16 * len(rows) * (len(scores) + 0.8))
    height = 0.8 / len(scores)
    for number, (label, own) in enumerate(scores.items()):
        places = [place + height * number for place in range(len(rows))]
        means = [100 * own[row].mean for row in rows]
        below = [max(0.0, 100 * (own[row].mean - own[row].low)) for row in rows]
        above = [max(0.0, 100 * (own[row].high - own[row].mean)) for row in rows]
        axes.barh(places, means, height=height, xerr=[below, above], label=label, error_kw={"linewidth": 0.8})
    axes.set_yticks([place + height * (len(scores) - 1) / 2 for place in range(len(rows))], rows)
    axes.set_ylim(len(rows) - 0.2 - height / 2, -0.2 - height / 2)
    axes.set(xlim=(0, 100), xlabel="the row's metric, %")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return _svg(figure)


def _frontier(runs: Sequence[ScoredRun], keys: Sequence[Key]) -> str:
    """Recall against reasoning tokens."""
    figure, axes = _figure(6.8, 4.2)
    for number, run in enumerate(runs):
        colour = f"C{number}"
        for row in dict.fromkeys(key[0] for key in keys):
            own = [key for key in keys if key[0] == row]
            axes.plot(_tokens(run, own), 100 * run.hits(own).mean(), ".", color=colour, alpha=0.4)
        axes.plot(_tokens(run, keys), 100 * run.hits(keys).mean(), "o", color=colour, markersize=10, label=run.label)
    axes.set(xlabel="reasoning tokens a query", ylabel="the rows' metric, %", ylim=(0, 102))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return _svg(figure)


def _tokens(run: ScoredRun, keys: Sequence[Key]) -> float:
    return float(np.mean([run.judged[key].tokens for key in keys]))


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the plots need matplotlib; install it with `pip install 'traceir[learn]'`") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Any) -> str:
    """The figure as an inline SVG; the same figure gives the same text."""
    from matplotlib import rc_context

    stream = io.StringIO()
    with rc_context({"svg.hashsalt": "traceir", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return f"<div class=wide>{text[text.index('<svg') :]}</div>"


_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TraceIR: scoreboard</title>
<style>
body {{ margin: 0 auto; max-width: 72rem; padding: 1.5rem 1.25rem 4rem; background: #f6f5f1; color: #20242b;
  font: 16px/1.5 system-ui, sans-serif; }}
table {{ border-collapse: collapse; background: #fff; font-size: .86rem; }} th, td {{ border: 1px solid #dedbd2;
  padding: .25rem .6rem; text-align: right; white-space: nowrap; }} th:first-child, td:first-child {{ text-align: left; }}
tbody tr:last-child {{ font-weight: 600; }} .wide {{ overflow-x: auto; }}
svg {{ background: #fff; max-width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>Scoreboard</h1>
{body}
</body>
</html>
"""
