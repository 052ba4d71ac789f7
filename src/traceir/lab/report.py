"""Reports over finished evaluations: recall by number of steps, routing against the labels, and the cost of each route.

Input is what `traceir evaluate` wrote: results.json and queries-ROUTE.jsonl. Recall is pooled over the queries of all rows (not
averaged over rows). Intervals are 95 % percentile bootstrap intervals over queries, drawn with a fixed seed: the same folders
always give the same bytes. A query is simple at 0 and 1 steps and complex from 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from traceir.errors import InputError
from traceir.evaluation.metrics import RESAMPLES, SEED, bootstrap_mean
from traceir.evaluation.runs import Key, ScoredRun, Values, named_runs, read_results, read_run, same_queries
from traceir.items import ROUTES
from traceir.suggest import did_you_mean

GROUPS: Final[tuple[tuple[str, int, int], ...]] = (("0-1", 0, 1), ("2", 2, 2), ("3+", 3, 99))
"""Name, least and greatest number of steps of each group of queries."""

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
    one = routing_report if kind == "routing" else routes_report
    text = "\n".join(one(Path(folder)) for folder in folders)
    if out is not None:
        _write(_markdown_file(out), text)
    return text


def steps_report(runs: Mapping[str, tuple[Path, str]], out: Path) -> Path:
    """Compares evaluations (label -> folder and route) by number of steps; differences are to the first.

    Writes the Markdown file `out` and a plot of the same name with suffix .svg; returns `out`. Raises InputError where the runs
    judge different data or different queries.
    """
    if not runs:
        raise InputError("no run to compare; give at least one evaluation folder")
    file = _markdown_file(out)
    read = [read_run(Path(folder), route, label) for label, (folder, route) in runs.items()]
    keys = _labelled(read[0], same_queries(read))
    by_group = {name: _between(read[0], keys, low, high) for name, low, high in GROUPS}
    steps = sorted({read[0].steps(key) for key in keys})
    by_steps = {str(count): _between(read[0], keys, count, count) for count in steps}
    plot = file.with_suffix(".svg")
    file.parent.mkdir(parents=True, exist_ok=True)
    _plot(read, by_steps, plot)
    parts = [
        "# Recall by number of reasoning steps\n",
        _header(read),
        f"![Recall@1 against the number of steps]({plot.name})\n",
        "## Groups\n",
        _steps_table(read, by_group | {"all": keys}),
        "## Each number of steps\n",
        _steps_table(read, by_steps),
        _right_reasoning(read, by_group),
        "## R@1 by row\n",
        _rows_table(read, keys),
        "R@k: share of queries with a right candidate among the first k, in percent, pooled over rows. [low, high]: 95 % "
        f"percentile bootstrap interval over queries ({RESAMPLES:,} resamples, seed {SEED}). Differences are in points and "
        "their intervals paired: both runs are resampled by the same queries. Exactly right: of the queries whose label holds "
        "a reasoning, those where the model wrote it to the letter. An interval without width (all queries alike) says only that "
        "resampling cannot look beyond these queries.\n",
    ]
    _write(file, "\n".join(part for part in parts if part))
    return file


def routing_report(folder: Path) -> str:
    """Routing of route `auto`, query by query against the label, as Markdown: each row, all rows, the mixed rows."""
    run = read_run(folder, "auto")
    keys = _labelled(run, list(run.judged))
    rows = {name: [key for key in keys if key[0] == name] for name in dict.fromkeys(key[0] for key in keys)}
    mixed = [name for name, own in rows.items() if all(_split(run, own))]
    sets = [(name, own, "mixed" if name in mixed else "") for name, own in rows.items()]
    sets += [("**all mixed rows**", [key for key in keys if key[0] in mixed], "mixed"), ("**all rows**", keys, "")]
    lines = ["| row | | simple | of these reason | complex | of these reason |", "|---|---|---:|---:|---:|---:|"]
    broken: list[str] = []
    for name, own, mark in sets:
        simple, complex_ = _split(run, own)
        shares = [float(run.reasoned(part).mean()) if part else None for part in (simple, complex_)]
        lines.append(f"| {name} | {mark} | {len(simple)} | {_share(shares[0])} | {len(complex_)} | {_share(shares[1])} |")
        too_many = shares[0] is not None and shares[0] > MAX_SIMPLE_REASON
        too_few = shares[1] is not None and shares[1] < MIN_COMPLEX_REASON
        if too_many or too_few:
            broken.append(name.strip("*"))
    verdict = f"not in {', '.join(broken)}" if broken else "everywhere"
    bound = f"At most {100 * MAX_SIMPLE_REASON:.0f} % of the simple and at least {100 * MIN_COMPLEX_REASON:.0f} % of the complex"
    return "\n".join(["# Routing against the labels\n", _header([run]), *lines, "", f"{bound} queries reason: {verdict}.\n"])


def routes_report(folder: Path) -> str:
    """Every route found in the folder, on simple and on complex queries, as Markdown (the paper's Table 2 in kind).

    Compares the rows that all routes have scored. Speed is known per row only, so it is taken over the rows where at least half
    of the queries are of the kind; the report says how pure these are.
    """
    results = read_results(folder)
    routes = [route for route in ROUTES if results["routes"].get(route)]
    if not routes:
        raise InputError(f"{folder / 'results.json'} has no scored route; run `traceir evaluate` to its end")
    runs = [read_run(folder, route) for route in routes]
    common = set.intersection(*(set(run.judged) for run in runs))
    keys = _labelled(runs[0], [key for key in runs[0].judged if key in common])
    parts = ["# Routes on simple and on complex queries\n", _header(runs[:1])]
    for number, name in enumerate(("simple", "complex")):
        own = _split(runs[0], keys)[number]
        if not own:
            parts.append(f"No {name} queries.\n")
            continue
        rows, purity = _rows_of_kind(runs[0], keys, number)
        lines = [f"## {name.capitalize()} queries ({len(own)})\n"]
        lines += [
            f"| route | R@1 | R@1 to {routes[0]} | row metric | tokens/query | reasoned | queries/s |",
            "|---|---|---|---:|---:|---:|---:|",
        ]
        lines += [_route_line(run, runs[0], own, rows) for run in runs]
        speed = (
            f"over {len(rows)} rows in which {_percent(purity)} % of the queries are {name}" if rows else "no row is mostly so"
        )
        parts += ["\n".join(lines), f"\nqueries/s: {speed}.\n"]
    parts.append(
        "Row metric: hit@5, on fashion rows hit@10, pooled over queries. [low, high]: 95 % bootstrap interval, paired for the "
        "difference. The routes were timed one after the other; benchmarks/encoder.py times them in pairs.\n"
    )
    return "\n".join(parts)


def interval(values: Values) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of `values`."""
    found = bootstrap_mean(values)
    return found.low, found.high


def _labelled(run: ScoredRun, keys: Iterable[Key]) -> list[Key]:
    found = [key for key in keys if run.steps(key) >= 0]
    if not found:
        raise InputError(f"{run.folder}: no query has a label with its number of steps; this report needs labelled data")
    return found


def _between(run: ScoredRun, keys: Iterable[Key], low: int, high: int) -> list[Key]:
    return [key for key in keys if low <= run.steps(key) <= high]


def _split(run: ScoredRun, keys: Sequence[Key]) -> tuple[list[Key], list[Key]]:
    """Simple and complex queries."""
    return _between(run, keys, 0, 1), _between(run, keys, 2, 99)


def _steps_table(runs: Sequence[ScoredRun], sets: Mapping[str, Sequence[Key]]) -> str:
    lines = [
        "| steps | run | n | R@1 | R@5 | R@1 to first | R@5 to first | reasoned | exactly right |",
        "|---|---|---:|---|---|---|---|---:|---:|",
    ]
    for name, keys in sets.items():
        for run in runs if keys else ():
            apart = [_difference(run, runs[0], keys, k) for k in (1, 5)]
            cells = [name, _cell(run.label), str(len(keys)), *(_mean(run.hits(keys, k)) for k in (1, 5)), *apart]
            lines.append(f"| {' | '.join(cells)} | {_share(run.reasoned(keys).mean())} | {_share(_exact_share(run, keys))} |")
    return "\n".join(lines) + "\n"


def _rows_table(runs: Sequence[ScoredRun], keys: Sequence[Key]) -> str:
    """R@1 of every row and group, so that a gain or loss can be traced to where it comes from."""
    lines = ["| row | steps | n | " + " | ".join(_cell(run.label) for run in runs) + " |"]
    lines.append("|---|---|---:|" + "---:|" * len(runs))
    for row in dict.fromkeys(key[0] for key in keys):
        for name, low, high in GROUPS:
            if own := _between(runs[0], [key for key in keys if key[0] == row], low, high):
                cells = " | ".join(_percent(run.hits(own, 1).mean()) for run in runs)
                lines.append(f"| {row} | {name} | {len(own)} | {cells} |")
    return "\n".join(lines) + "\n"


def _right_reasoning(runs: Sequence[ScoredRun], sets: Mapping[str, Sequence[Key]]) -> str:
    """R@1 where the reasoning is exactly right and where it is not, with the first run on the very same queries."""
    lines = [
        "## R@1 where the written reasoning is exactly right, and where it is not\n",
        "| run | steps | reasoning | n | R@1 | first run, same queries |",
        "|---|---|---|---:|---|---|",
    ]
    found = 0
    for run in runs:
        for name, keys in sets.items():
            written = [key for key in keys if run.judged[key].route == "reason" and run.judged[key].exact is not None]
            for right, word in ((True, "right"), (False, "wrong")):
                if own := [key for key in written if run.judged[key].exact is right]:
                    found += 1
                    reference = "–" if run is runs[0] else _mean(runs[0].hits(own, 1))
                    lines.append(
                        f"| {_cell(run.label)} | {name} | {word} | {len(own)} | {_mean(run.hits(own, 1))} | {reference} |"
                    )
    return "\n".join(lines) + "\n" if found else ""


def _route_line(run: ScoredRun, first: ScoredRun, keys: Sequence[Key], rows: Sequence[str]) -> str:
    tokens = float(np.mean([run.judged[key].tokens for key in keys]))
    scored = run.results["routes"][run.route]
    speeds = [(scored[row]["queries"], scored[row]["queries_per_second"]) for row in rows]
    known = speeds and all(speed > 0 for _, speed in speeds)
    speed = sum(count for count, _ in speeds) / sum(count / speed for count, speed in speeds) if known else None
    hits = f"{_mean(run.hits(keys, 1))} | {_difference(run, first, keys, 1)} | {_percent(run.hits(keys).mean())}"
    return (
        f"| {run.route} | {hits} | {tokens:.1f} "
        f"| {_share(run.reasoned(keys).mean())} | {'–' if speed is None else f'{speed:.1f}'} |"
    )


def _rows_of_kind(run: ScoredRun, keys: Sequence[Key], number: int) -> tuple[list[str], float]:
    """The rows with at least half of their queries simple (0) or complex (1), and the share of that kind in them."""
    rows: list[str] = []
    right = total = 0
    for name in dict.fromkeys(key[0] for key in keys):
        own = [key for key in keys if key[0] == name]
        count = len(_split(run, own)[number])
        if 2 * count >= len(own):
            rows, right, total = [*rows, name], right + count, total + len(own)
    return rows, right / total if total else 0.0


def _exact_share(run: ScoredRun, keys: Sequence[Key]) -> float | None:
    """None where no query of these reasons or none has a reasoning in its label."""
    judged = [run.judged[key] for key in keys]
    exact = [one.exact for one in judged if one.exact is not None]
    return float(np.mean(exact)) if exact and any(one.route == "reason" for one in judged) else None


def _plot(runs: Sequence[ScoredRun], sets: Mapping[str, Sequence[Key]], file: Path) -> None:
    """Recall@1 against steps, one line with error bars a run; the same input gives the same bytes."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the plot needs matplotlib; install it with `pip install 'traceir[learn]'`") from error
    with rc_context({"svg.hashsalt": "traceir", "svg.fonttype": "none"}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        for number, run in enumerate(runs):
            hits = [run.hits(keys, 1) for keys in sets.values()]
            means, bounds = [100 * float(own.mean()) for own in hits], [interval(own) for own in hits]
            below = [max(0.0, mean - 100 * low) for mean, (low, _) in zip(means, bounds, strict=True)]
            above = [max(0.0, 100 * high - mean) for mean, (_, high) in zip(means, bounds, strict=True)]
            places = [int(name) + 0.06 * (number - (len(runs) - 1) / 2) for name in sets]
            axes.errorbar(places, means, yerr=[below, above], marker="o", capsize=3, label=run.label)
        axes.set_xticks([int(name) for name in sets], [f"{name}\nn = {len(keys)}" for name, keys in sets.items()])
        axes.set(xlabel="dependent steps a query needs", ylabel="recall@1, %", ylim=(0, 103))
        axes.grid(axis="y", alpha=0.3)
        axes.legend()
        figure.savefig(file, format="svg", metadata={"Date": None})


def _header(runs: Sequence[ScoredRun]) -> str:
    about = runs[0].results
    extent = f"the first {about['limit']} queries of each row" if about.get("limit") else "all queries"
    lines = [f"Data {about.get('data') or '(no fingerprint)'}, split {about.get('split')}, {extent}.\n"]
    for run in runs:
        threshold = run.results.get("threshold")
        knob = "" if threshold is None else f", threshold {threshold}"
        lines.append(f"- {_cell(run.label)}: model {run.results.get('model')}, route {run.route}{knob}")
    return "\n".join(lines) + "\n"


def _markdown_file(out: Path) -> Path:
    if out.suffix != ".md" or out.is_dir():
        raise InputError(f"{out} must name a Markdown file that ends in .md")
    return out


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def _mean(values: Values) -> str:
    low, high = interval(values)
    return f"{_percent(values.mean())} [{_percent(low)}, {_percent(high)}]"


def _difference(run: ScoredRun, first: ScoredRun, keys: Sequence[Key], k: int) -> str:
    if run is first:
        return "–"
    apart = run.hits(keys, k) - first.hits(keys, k)
    low, high = interval(apart)
    return f"{100 * apart.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _share(share: float | None) -> str:
    return "–" if share is None else f"{_percent(share)} %"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
