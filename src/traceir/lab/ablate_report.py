"""The report of the ablations: statistics over seeds and over queries, a verdict for each claim, Markdown, plots, runs.json.

Differences are paired by seed. Two 95 % intervals stand beside each: Student's t over the seeds, which says what another seed
could bring, and the bootstrap over queries of the hits averaged over seeds, which says what other queries could bring. The
verdict rests on the first. What is not run yet is said to be so; no figure is filled in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from traceir.data.report import render
from traceir.errors import DataError, InputError
from traceir.evaluation.metrics import Interval, bootstrap_difference
from traceir.evaluation.results import describe_machine
from traceir.files import write_whole
from traceir.lab.ablations import FORMAT, TABLES, AblationLine, Comparison, Kind, Metric, Table, obstacle, read_result
from traceir.lab.plots import Series, plot_lines

Verdict = Literal["reproduced", "not reproduced", "undecided", "not run"]
RECALLS: Final[tuple[Metric, ...]] = ("R@1", "R@5", "R@10")
MAIN: Final[Metric] = "R@5"
PAPER_DATA: Final[Mapping[Kind, str]] = {"complex": "CIRR", "simple": "MSCOCO"}
"""The two kinds of rows, and what the paper evaluates them on."""
_OURS: Final[Mapping[Verdict, str]] = {"reproduced": "confirmed", "not reproduced": "refuted"}
"""What the verdicts are called where the claim is not the paper's."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds and its 95 % t interval; None for the bounds where there is one seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    def shown(self, form: str = ".1f") -> str:
        return f"{self.mean:{form}}" + ("" if self.low is None else f" [{self.low:{form}}, {self.high:{form}}]")


class Compared(NamedTuple):
    """One comparison: better minus worse over seeds, over queries (recall only), and in the paper; None where it is not known."""

    comparison: Comparison
    seeds: Estimate | None
    queries: Interval | None
    paper: float | None

    def as_json(self) -> dict[str, Any]:
        intervals = {"seeds": self.seeds and asdict(self.seeds), "queries": self.queries and asdict(self.queries)}
        return asdict(self.comparison) | intervals | {"paper": self.paper}


class CheckedClaim(NamedTuple):
    text: str
    compared: Sequence[Compared]
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Results:
    """What a folder of ablations holds: ablation.json, and the results by (variant, seed)."""

    plan: Mapping[str, Any]
    runs: Mapping[tuple[str, int], Mapping[str, Any]]

    def row(self, kind: Kind) -> str:
        return str(self.plan["rows"][0 if kind == "complex" else 1])

    def size(self, kind: Kind) -> str:
        """How many queries the row has, in words; "" before the first result."""
        counts = (own[self.row(kind)]["queries"] for run in self.runs.values() for own in run.get("routes", {}).values())
        return next((f" ({count} queries)" for count in counts), "")

    def count(self, tables: Sequence[Table]) -> tuple[int, int]:
        """Runs that are done of those that are planned."""
        planned = {(run.name, seed) for table in tables for run in table.variants for seed in self.plan["seeds"]}
        return len(planned & set(self.runs)), len(planned)

    def of(self, variant: str) -> dict[int, Mapping[str, Any]]:
        """The results of a variant by seed."""
        return {seed: run for (name, seed), run in sorted(self.runs.items()) if name == variant}

    def entries(self, line: AblationLine, kind: Kind) -> dict[int, Mapping[str, Any]]:
        """The line's figures on one row, by seed."""
        return {seed: run["routes"][line.route][self.row(kind)] for seed, run in self.of(line.variant.name).items()}

    def values(self, table: Table, line: AblationLine, kind: Kind, metric: Metric) -> dict[int, float]:
        """One metric by seed: recall in percent, speed in multiples of the direct route's."""
        if metric != "speed":
            return {seed: 100.0 * own[f"hit@{metric[2:]}"] for seed, own in self.entries(line, kind).items()}
        way, runs = f"{line.variant.name}:{line.route}", self.of(table.speed.name) if table.speed is not None else {}
        return {seed: run["speed"][self.row(kind)]["relative"][way] for seed, run in runs.items()}


def write_report(out: Path, target: Path, *, tables: Sequence[Table] = TABLES, command: str = "") -> Path:
    """Writes README.md (every claim's sentence), a page and a plot for each table, and runs.json to `target`; returns README.md.

    Works on whatever part of the runs is done. `command` is printed as what made it. Raises InputError where `out` holds no
    ablations, DataError where its runs are of different queries.
    """
    results = read_results(out)
    checked = {table.id: _check_claims(results, table) for table in tables}
    sentences = [(table, [_sentence(results, table, claim) for claim in checked[table.id]]) for table in tables]
    for table, own in sentences:
        write_whole(target / f"{table.id}.svg", _plot(results, table))
        write_whole(target / f"{table.id}.md", _table_page(results, table, tables=[(table, own)]))
    write_whole(target / "runs.json", json.dumps(_figures(results, checked), indent=1) + "\n")
    failed = [file for file in sorted((out / "runs").glob("*/seed*/failed.json")) if not file.with_name("result.json").is_file()]
    about = {
        "done": results.count(tables),
        "failures": {f"{file.parents[1].name}, {file.parent.name}": json.loads(file.read_text())["reason"] for file in failed},
        "machines": sorted({str(run["machine"]) for run in results.runs.values()}) or [describe_machine()],
    }
    page = render("lab/templates/ablations.md.j2", results=results, tables=sentences, command=command, **about)
    write_whole(target / "README.md", page)
    return target / "README.md"


def read_results(out: Path) -> Results:
    """All finished runs of `out`."""
    file = out / "ablation.json"
    if not file.is_file():
        raise InputError(f"{file} is not there; run `traceir ablate TABLE --out {out}` first")
    runs: dict[tuple[str, int], Mapping[str, Any]] = {}
    counts: dict[str, int] = {}
    for name in sorted((out / "runs").glob("*/seed*/result.json")):
        run = read_result(name)
        for row, own in [pair for rows in run.get("routes", {}).values() for pair in rows.items()]:
            if counts.setdefault(row, own["queries"]) != own["queries"]:
                raise DataError(f"{name}: {own['queries']} queries of {row}, other runs have {counts[row]}; run it again")
        runs[run["variant"], run["seed"]] = run
    return Results(read_result(file), runs)


# Statistics


def t_interval(values: Sequence[float]) -> Estimate:
    """Mean and 95 % t interval of one value a seed; at least one value."""
    count, mean = len(values), fmean(values)
    if count == 1:
        return Estimate(mean, None, None, 1)
    half = float(stats.t.ppf(0.975, count - 1) * stats.sem(values))
    return Estimate(mean, mean - half, mean + half, count)


def compare(results: Results, table: Table, comparison: Comparison) -> Compared:
    """Better minus worse on the seeds that both have."""
    lines = table.line(comparison.better), table.line(comparison.worse)
    kind, metric = comparison.kind, comparison.metric
    ours, theirs = (results.values(table, line, kind, metric) for line in lines)
    seeds = sorted(set(ours) & set(theirs))
    over_queries = None
    if seeds and metric != "speed":
        ranks = [np.array([results.entries(line, kind)[seed]["ranks"] for seed in seeds]) for line in lines]
        over_queries = bootstrap_difference(*(100.0 * (own <= int(metric[2:])).mean(axis=0) for own in ranks))
    over_seeds = t_interval([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None
    paper = [line.paper[kind, metric] for line in lines if (kind, metric) in line.paper]
    return Compared(comparison, over_seeds, over_queries, paper[0] - paper[1] if len(paper) == 2 else None)


def find_verdict(differences: Sequence[Estimate | None]) -> Verdict:
    """The verdict on a claim whose comparisons have these differences, better minus worse.

    Reproduced where every interval lies above 0, not reproduced where any lies below 0, not run where a difference is missing.
    """
    known = [each for each in differences if each is not None]
    if len(known) < len(differences):
        return "not run"
    if any(each.high is not None and each.high < 0 for each in known):
        return "not reproduced"
    return "reproduced" if all(each.low is not None and each.low > 0 for each in known) else "undecided"


def _check_claims(results: Results, table: Table) -> list[CheckedClaim]:
    checked = []
    for claim in table.claims:
        compared = [compare(results, table, comparison) for comparison in claim.comparisons]
        checked.append(CheckedClaim(claim.text, compared, find_verdict([each.seeds for each in compared])))
    return checked


def _sentence(results: Results, table: Table, claim: CheckedClaim) -> str:
    """The verdict, the claim, and the figures of every comparison."""
    word = claim.verdict if table.paper else _OURS.get(claim.verdict, claim.verdict)
    counts = sorted({each.seeds.seeds for each in claim.compared if each.seeds is not None})
    seeds = f" {' or '.join(map(str, counts))} seed{'s' if counts != [1] else ''}." if counts else ""
    details = "; ".join(_details(results, each) for each in claim.compared)
    return f"**{word.capitalize()}:** {claim.text}. {details[:1].upper()}{details[1:]}.{seeds}"


def _details(results: Results, compared: Compared) -> str:
    comparison, seeds, queries, paper = compared
    where = f"{comparison.better} against {comparison.worse} on {results.row(comparison.kind)}"
    if seeds is None:
        return f"{where}: not run yet"
    is_speed = comparison.metric == "speed"
    form, unit = ("+.2f", "times the speed of direct embedding") if is_speed else ("+.1f", comparison.metric)
    over = [f"[{seeds.low:{form}}, {seeds.high:{form}}] over seeds"] if seeds.low is not None else []
    over += [f"[{queries.low:{form}}, {queries.high:{form}}] over queries"] if queries is not None else []
    beside = f"; the paper on {PAPER_DATA[comparison.kind]}: {paper:{form}}" if paper is not None else ""
    return " ".join([f"{where}: {seeds.mean:{form}} {unit}", ", ".join(over)]).rstrip() + beside


# Pages


def _table_page(results: Results, table: Table, **values: object) -> str:
    """One table: its claims, the plot, recall on both rows, what it costs."""

    def shown(line: AblationLine, kind: Kind, metric: Metric) -> str:
        values = list(results.values(table, line, kind, metric).values())
        return t_interval(values).shown(".2f" if metric == "speed" else ".1f") if values else "not run"

    def apart(line: AblationLine, kind: Kind) -> str:
        seeds = compare(results, table, Comparison(line.label, table.against, kind, MAIN)).seeds
        return "not run" if seeds is None else seeds.shown("+.1f")

    def cost(line: AblationLine, kind: Kind) -> pd.DataFrame:
        seconds = [run["seconds"]["train"] for run in results.of(line.variant.name).values()]
        return pd.DataFrame(list(results.entries(line, kind).values())).assign(seconds=seconds)

    skipped = {run.name: reason for run in table.variants if (reason := obstacle(run)) and (run.name, 0) not in results.runs}
    functions = {"shown": shown, "apart": apart, "cost": cost}
    values |= {"recalls": RECALLS, "kinds": list(PAPER_DATA), "skipped": skipped, "done": results.count([table])}
    return render("lab/templates/ablation_table.md.j2", results=results, **functions, **values)


def _plot(results: Results, table: Table) -> str:
    """R@5 of every line on both rows with intervals over seeds, each seed a dot, the paper's figure a hollow mark."""
    series = []
    for kind, data in PAPER_DATA.items():
        dots = {at: list(results.values(table, line, kind, MAIN).values()) for at, line in enumerate(table.lines)}
        means = {at: t_interval(own) for at, own in dots.items() if own}
        bars = {at: (own.mean, own.mean - own.low if own.low is not None else 0.0) for at, own in means.items()}
        paper = {at: line.paper[kind, MAIN] for at, line in enumerate(table.lines) if (kind, MAIN) in line.paper}
        series.append(Series(results.row(kind), dots, bars, paper, f"the paper, {data}"))
    return plot_lines([line.label.replace("`", "") for line in table.lines], series, f"{MAIN}, %")


def _figures(results: Results, checked: Mapping[str, Sequence[CheckedClaim]]) -> dict[str, Any]:
    """All figures as plain data: the plan, each run without its queries, each claim with its comparisons and verdict."""
    runs = []
    for (name, seed), run in sorted(results.runs.items()):
        kept = {key: run[key] for key in ("machine", "seconds", "losses", "data", "speed") if key in run}
        routes = {
            route: {row: {key: value for key, value in own.items() if key != "ranks"} for row, own in rows.items()}
            for route, rows in run.get("routes", {}).items()
        }
        runs.append({"variant": name, "seed": seed, **kept, "routes": routes})
    claims = [
        {
            "table": table,
            "claim": claim.text,
            "verdict": claim.verdict,
            "comparisons": [each.as_json() for each in claim.compared],
        }
        for table, own in checked.items()
        for claim in own
    ]
    return {"format": FORMAT, "plan": dict(results.plan), "claims": claims, "runs": runs}
