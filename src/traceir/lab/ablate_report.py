"""The report of the ablations: statistics over seeds and over queries, a verdict for each claim, Markdown, plots, runs.json.

Differences are paired by seed. Two 95 % intervals stand beside each: Student's t over the seeds, which says what another seed
could bring, and the bootstrap over queries of the hits averaged over seeds, which says what other queries could bring. The
verdict rests on the first. What is not run yet is said to be so; no figure is filled in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from traceir.errors import DataError, InputError
from traceir.evaluation.judged import describe_machine
from traceir.evaluation.metrics import Interval, Values, bootstrap_difference
from traceir.files import write_whole
from traceir.lab.ablate_plan import FORMAT, obstacle, read_result
from traceir.lab.ablations import TABLES, Claim, Comparison, Kind, Line, Metric, Table

Verdict = Literal["reproduced", "not reproduced", "undecided", "not run"]
RECALLS: Final[tuple[tuple[Metric, int], ...]] = (("R@1", 1), ("R@5", 5), ("R@10", 10))
MAIN: Final[Metric] = "R@5"
KINDS: Final[tuple[Kind, ...]] = ("complex", "simple")

STUDENT: Final = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles of Student's t for 1 to 30 degrees of freedom; beyond, the last one is a little too wide."""

_OURS: Final[Mapping[Verdict, str]] = {"reproduced": "confirmed", "not reproduced": "refuted"}
"""What the verdicts are called where the claim is not the paper's."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds and its 95 % t interval; None for the bounds where there is one seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


@dataclass(frozen=True, slots=True)
class Compared:
    """One comparison: better minus worse over seeds, over queries (recall only), and in the paper; None where it is not known."""

    comparison: Comparison
    seeds: Estimate | None
    queries: Interval | None
    paper: float | None


@dataclass(frozen=True, slots=True)
class Results:
    """What a folder of ablations holds: ablation.json, and the results by (variant, seed)."""

    plan: Mapping[str, Any]
    found: Mapping[tuple[str, int], Mapping[str, Any]]

    def row(self, kind: Kind) -> str:
        return str(self.plan["rows"][0 if kind == "complex" else 1])

    def entries(self, line: Line, kind: Kind) -> dict[int, Mapping[str, Any]]:
        """The line's figures on one row, by seed."""
        own = {seed: one for (name, seed), one in sorted(self.found.items()) if name == line.variant.name}
        return {seed: one["routes"][line.route][self.row(kind)] for seed, one in own.items()}

    def values(self, table: Table, line: Line, kind: Kind, metric: Metric) -> dict[int, float]:
        """One metric by seed: recall in percent, speed in multiples of the direct route's."""
        if metric != "speed":
            return {seed: 100.0 * one[f"hit@{metric[2:]}"] for seed, one in self.entries(line, kind).items()}
        name = table.speed.name if table.speed is not None else ""
        own = {seed: one["speed"][self.row(kind)] for (run, seed), one in sorted(self.found.items()) if run == name}
        return {seed: one["relative"][f"{line.variant.name}:{line.route}"] for seed, one in own.items()}


def write_report(out: Path, target: Path, *, tables: Sequence[Table] = TABLES, command: str = "") -> Path:
    """Writes README.md (every claim's sentence), a page and a plot for each table, and runs.json to `target`; returns README.md.

    Works on whatever part of the runs is done. `command` is printed as what made it. Raises InputError where `out` holds no
    ablations, DataError where its runs judge different queries.
    """
    results = read_results(out)
    target.mkdir(parents=True, exist_ok=True)
    for table in tables:
        plot(results, table, target / f"{table.id}.svg")
        write_whole(target / f"{table.id}.md", table_page(results, table))
    write_whole(target / "runs.json", json.dumps(figures(results, tables), indent=1) + "\n")
    write_whole(target / "README.md", index_page(results, tables, _failures(out), command))
    return target / "README.md"


def read_results(out: Path) -> Results:
    """All finished runs of `out`."""
    file = out / "ablation.json"
    if not file.is_file():
        raise InputError(f"{file} is not there; run `traceir ablate TABLE --out {out}` first")
    plan = read_result(file)
    found: dict[tuple[str, int], Mapping[str, Any]] = {}
    asked: dict[str, int] = {}
    for name in sorted((out / "runs").glob("*/seed*/result.json")):
        one = read_result(name)
        for routes in one.get("routes", {}).values():
            for row, figures_of_row in routes.items():
                if asked.setdefault(row, figures_of_row["queries"]) != figures_of_row["queries"]:
                    raise DataError(
                        f"{name}: {figures_of_row['queries']} queries of {row}, other runs have {asked[row]}; run it again"
                    )
        found[one["variant"], one["seed"]] = one
    return Results(plan, found)


# Statistics


def t_interval(values: Sequence[float]) -> Estimate:
    """Mean and 95 % t interval of one value a seed; at least one value."""
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Estimate(mean, None, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = STUDENT[min(count - 1, len(STUDENT)) - 1] * deviation / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def compare(results: Results, table: Table, comparison: Comparison) -> Compared:
    """Better minus worse on the seeds that both have."""
    better, worse = table.line(comparison.better), table.line(comparison.worse)
    kind, metric = comparison.kind, comparison.metric
    ours, theirs = (results.values(table, line, kind, metric) for line in (better, worse))
    seeds = sorted(set(ours) & set(theirs))
    over_seeds = t_interval([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None
    over_queries = None
    if seeds and metric != "speed":
        first, second = (_mean_hits(results, line, kind, int(metric[2:]), seeds) for line in (better, worse))
        over_queries = bootstrap_difference(100.0 * first, 100.0 * second)
    key = (kind, metric)
    known = key in better.paper and key in worse.paper
    return Compared(comparison, over_seeds, over_queries, better.paper[key] - worse.paper[key] if known else None)


def judge(differences: Sequence[Estimate | None]) -> Verdict:
    """The verdict on a claim whose comparisons have these differences, better minus worse.

    Reproduced where every interval lies above 0, not reproduced where any lies below 0, not run where a difference is missing.
    """
    if any(one is None for one in differences):
        return "not run"
    known = [one for one in differences if one is not None]
    if any(one.high is not None and one.high < 0 for one in known):
        return "not reproduced"
    if all(one.low is not None and one.low > 0 for one in known):
        return "reproduced"
    return "undecided"


def sentence(results: Results, table: Table, claim: Claim) -> str:
    """The verdict, the claim, and the figures of every comparison."""
    compared = [compare(results, table, one) for one in claim.comparisons]
    verdict = judge([one.seeds for one in compared])
    word = verdict if table.paper else _OURS.get(verdict, verdict)
    counts = sorted({one.seeds.seeds for one in compared if one.seeds is not None})
    seeds = f" {' or '.join(map(str, counts))} seed{'s' if counts != [1] else ''}." if counts else ""
    told = "; ".join(_told(results, one) for one in compared)
    return f"**{word.capitalize()}:** {claim.text}. {told[:1].upper()}{told[1:]}.{seeds}"


def _told(results: Results, one: Compared) -> str:
    asked = one.comparison
    where = f"{asked.better} against {asked.worse} on {results.row(asked.kind)}"
    if one.seeds is None:
        return f"{where}: not run yet"
    form, unit = ("+.2f", "times the speed of direct embedding") if asked.metric == "speed" else ("+.1f", asked.metric)
    text = f"{where}: {one.seeds.mean:{form}} {unit}"
    if one.seeds.low is not None and one.seeds.high is not None:
        text += f" [{one.seeds.low:{form}}, {one.seeds.high:{form}}] over seeds,"
    if one.queries is not None:
        text += f" [{one.queries.low:{form}}, {one.queries.high:{form}}] over queries"
    text = text.rstrip(",")
    data = "CIRR" if asked.kind == "complex" else "MSCOCO"
    return text + (f"; the paper on {data}: {one.paper:{form}}" if one.paper is not None else "")


def _mean_hits(results: Results, line: Line, kind: Kind, k: int, seeds: Sequence[int]) -> Values:
    """Hits of each query averaged over seeds, [Q]."""
    entries = results.entries(line, kind)
    hits = np.array([[float(rank <= k) for rank in entries[seed]["ranks"]] for seed in seeds])
    mean: Values = hits.mean(axis=0)
    return mean


# Pages


def index_page(results: Results, tables: Sequence[Table], failures: Mapping[str, str], command: str) -> str:
    """README.md: what was run, and the sentence of every claim."""
    planned = {(name, seed) for table in tables for name in _variants(table) for seed in results.plan["seeds"]}
    done = len(planned & set(results.found))
    machines = sorted({str(one["machine"]) for one in results.found.values()}) or [describe_machine()]
    seeds = ", ".join(map(str, results.plan["seeds"]))
    parts = [
        "# Ablations\n",
        f"{done} of {len(planned)} runs are there: every variant with seeds {seeds}. Complex row: {results.row('complex')}"
        f"{_size(results, 'complex')}; simple row: {results.row('simple')}{_size(results, 'simple')}.\n",
        f"Made by `{command}` on {'; '.join(machines)}.\n" if command else f"Made on {'; '.join(machines)}.\n",
        _METHOD,
    ]
    for table in tables:
        where = f", the paper's {table.paper}" if table.paper else ", not in the paper"
        parts += [f"## [{table.title}]({table.id}.md){where}\n"]
        parts += ["".join(f"- {sentence(results, table, claim)}\n" for claim in table.claims)]
    if failures:
        parts += ["## Runs that failed\n", "".join(f"- {name}: {reason}\n" for name, reason in failures.items())]
    config = json.dumps(results.plan["base"], indent=1, sort_keys=True)
    parts += ["## The base configuration\n", f"```json\n{config}\n```\n"]
    return "\n".join(parts)


_METHOD: Final = (
    "A claim is reproduced (confirmed, where it is ours) if the interval over seeds of every comparison it names lies on the "
    "claimed side of 0, not reproduced (refuted) if one lies wholly on the other, undecided otherwise. Differences are in "
    "points, paired by seed. Intervals are 95 %: over seeds Student's t; over queries a paired bootstrap of the hits averaged "
    "over seeds. With few seeds the first is wide, and of twenty intervals around nothing one misses 0 by chance. The models are "
    "miniatures, trained for a short time from one common checkpoint, on drawn pictures; the paper's figures are of a 7B model "
    "on CIRR and stand beside ours to compare signs, not sizes.\n"
)


def table_page(results: Results, table: Table) -> str:
    """One table: sentences, plot, recall on both rows, what it costs."""
    planned = {(name, seed) for name in _variants(table) for seed in results.plan["seeds"]}
    done = len(planned & set(results.found))
    where = f" (the paper's {table.paper})" if table.paper else ""
    skipped = {variant.name: reason for variant in table.variants if (reason := obstacle(variant))}
    parts = [f"# {table.title}{where}\n", f"{done} of {len(planned)} runs are there.\n"]
    parts += [f"{name} is left out: {reason}.\n" for name, reason in skipped.items() if (name, 0) not in results.found]
    parts += [f"{table.about}\n"] if table.about else []
    parts += ["".join(f"- {sentence(results, table, claim)}\n" for claim in table.claims)]
    parts += [f"![{table.title}]({table.id}.svg)\n"]
    for kind in KINDS:
        parts += [f"## {results.row(kind)}, the {kind} row{_size(results, kind)}\n", _recall_table(results, table, kind)]
    parts += ["## Cost and behaviour\n", _cost_table(results, table), _LEGEND, "[All tables](README.md)\n"]
    return "\n".join(parts)


_LEGEND: Final = (
    "Means over seeds, with 95 % t intervals over seeds in brackets. Reasoned: share of queries that reason, on the complex and "
    "on the simple row. Tokens: written for a query of the complex row. Exact: share of the complex queries with a label where "
    "what was written is the label's to the letter.\n"
)


def _recall_table(results: Results, table: Table, kind: Kind) -> str:
    lines = [f"| variant | seeds | R@1 | R@5 | R@10 | R@5 to {_cell(table.against)} | the paper: R@1 / R@5 / R@10 |"]
    lines.append("|---|---:|---|---|---|---|---|")
    for line in table.lines:
        values = [list(results.values(table, line, kind, metric).values()) for metric, _ in RECALLS]
        shown = [_shown(t_interval(own)) if own else "not run" for own in values]
        apart = "–"
        if line.label != table.against:
            found = compare(results, table, Comparison(line.label, table.against, kind, MAIN)).seeds
            apart = _shown(found, signed=True) if found is not None else "not run"
        known = [f"{line.paper[kind, metric]:.2f}" if (kind, metric) in line.paper else "–" for metric, _ in RECALLS]
        paper = " / ".join(known) if set(known) != {"–"} else "–"
        lines.append(f"| {_cell(line.label)} | {len(values[0])} | {' | '.join(shown)} | {apart} | {paper} |")
    return "\n".join(lines) + "\n"


def _cost_table(results: Results, table: Table) -> str:
    timed = table.speed is not None
    lines = [
        "| variant | reasoned, complex / simple | tokens | exact | training, s |"
        + (" speed, complex / simple |" if timed else "")
    ]
    lines.append("|---|---:|---:|---:|---:|" + ("---|" if timed else ""))
    for line in table.lines:
        complex_, simple = (list(results.entries(line, kind).values()) for kind in KINDS)
        if not complex_:
            lines.append(f"| {_cell(line.label)} | not run | | | |" + (" |" if timed else ""))
            continue
        runs = [one for (name, _), one in results.found.items() if name == line.variant.name]
        exact = [one["exact"] for one in complex_ if one["exact"] is not None]
        trained = f"{np.mean([one['seconds']['train'] for one in runs]):.0f}" if line.variant.work == "train" else "–"
        cells = [
            f"{_mean_share(complex_, 'reasoned')} / {_mean_share(simple, 'reasoned')}",
            f"{np.mean([one['tokens_per_query'] for one in complex_]):.1f}",
            f"{100 * np.mean(exact):.1f} %" if exact else "–",
            trained,
        ]
        if timed:
            cells.append(" / ".join(_speed(results, table, line, kind) for kind in KINDS))
        lines.append(f"| {_cell(line.label)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _speed(results: Results, table: Table, line: Line, kind: Kind) -> str:
    values = list(results.values(table, line, kind, "speed").values())
    paper = line.paper.get((kind, "speed"))
    beside = f" (the paper: {paper:.2f})" if paper is not None else ""
    return (_shown(t_interval(values), digits=2) if values else "not run") + beside


def plot(results: Results, table: Table, file: Path) -> None:
    """R@5 of every line on both rows with intervals over seeds, each seed a dot, the paper's figure a hollow mark."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the plot needs matplotlib; install it with `pip install 'traceir[learn]'`") from error
    with rc_context({"svg.hashsalt": "traceir", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.2, 1.4 + 0.5 * len(table.lines)), layout="constrained")
        axes = figure.add_subplot()
        for number, kind in enumerate(KINDS):
            _draw(axes, results, table, kind, number)
        axes.set_yticks(range(len(table.lines)), [line.label.replace("`", "") for line in table.lines])
        axes.set_ylim(len(table.lines) - 0.5, -0.5)
        axes.set(xlim=(0, 102), xlabel=f"{MAIN}, %")
        axes.grid(axis="x", alpha=0.3)
        figure.legend(loc="outside lower center", ncols=4)
        figure.savefig(file, format="svg", metadata={"Date": None})


def _draw(axes: Any, results: Results, table: Table, kind: Kind, number: int) -> None:
    colour, label = f"C{number}", results.row(kind)
    place = -0.12 + 0.24 * number
    drawn = [
        (at + place, t_interval(own), own) for at, line in enumerate(table.lines) if (own := _main(results, table, line, kind))
    ]
    for at, _, own in drawn:
        axes.plot(own, [at] * len(own), ".", color=colour, alpha=0.45, markersize=5)
    means = [one.mean for _, one, _ in drawn]
    widths = [one.mean - one.low if one.low is not None else 0.0 for _, one, _ in drawn]
    axes.errorbar(means, [at for at, _, _ in drawn], xerr=widths, fmt="o", color=colour, capsize=3, markersize=5, label=label)
    known = [(line.paper[kind, MAIN], at + place) for at, line in enumerate(table.lines) if (kind, MAIN) in line.paper]
    if known:
        data = "CIRR" if kind == "complex" else "MSCOCO"
        axes.plot(*zip(*known, strict=True), "D", color=colour, fillstyle="none", markersize=5, label=f"the paper, {data}")


def figures(results: Results, tables: Sequence[Table]) -> dict[str, Any]:
    """All figures as plain data: the plan, each run without its queries, each claim with its comparisons and verdict."""
    runs = []
    for (name, seed), one in sorted(results.found.items()):
        kept = {key: one[key] for key in ("machine", "seconds", "losses", "data", "speed") if key in one}
        routes = {
            route: {row: {key: value for key, value in own.items() if key != "ranks"} for row, own in rows.items()}
            for route, rows in one.get("routes", {}).items()
        }
        runs.append({"variant": name, "seed": seed, **kept, "routes": routes})
    claims = []
    for table in tables:
        for claim in table.claims:
            compared = [compare(results, table, one) for one in claim.comparisons]
            told = [
                asdict(one.comparison) | {key: _plain(getattr(one, key)) for key in ("seeds", "queries", "paper")}
                for one in compared
            ]
            claims.append(
                {"table": table.id, "claim": claim.text, "verdict": judge([one.seeds for one in compared]), "comparisons": told}
            )
    return {"format": FORMAT, "plan": dict(results.plan), "claims": claims, "runs": runs}


def _failures(out: Path) -> dict[str, str]:
    """Run: reason, for the runs that failed last time and were not done since."""
    found = {}
    for file in sorted((out / "runs").glob("*/seed*/failed.json")):
        if not (file.parent / "result.json").is_file():
            found[f"{file.parent.parent.name}, {file.parent.name}"] = str(json.loads(file.read_text())["reason"])
    return found


def _variants(table: Table) -> list[str]:
    return [variant.name for variant in table.variants]


def _main(results: Results, table: Table, line: Line, kind: Kind) -> list[float]:
    return list(results.values(table, line, kind, MAIN).values())


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Estimate | Interval) else value


def _size(results: Results, kind: Kind) -> str:
    for one in results.found.values():
        for rows in one.get("routes", {}).values():
            return f" ({rows[results.row(kind)]['queries']} queries)"
    return ""


def _shown(one: Estimate, *, signed: bool = False, digits: int = 1) -> str:
    form = f"{'+' if signed else ''}.{digits}f"
    mean = format(one.mean, form)
    return mean if one.low is None or one.high is None else f"{mean} [{one.low:{form}}, {one.high:{form}}]"


def _mean_share(entries: Sequence[Mapping[str, Any]], name: str) -> str:
    return f"{100 * np.mean([one[name] for one in entries]):.0f} %"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
