"""Reports over hand-written evaluations: every number against one computed by hand."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from evaluations import write

from traceir.errors import DataError, InputError
from traceir.evaluation.compare import compare
from traceir.evaluation.results import QueryOutcome, read_run
from traceir.lab.examples import choose
from traceir.lab.report import run_report, steps_report
from traceir.lab.scoreboard import write_scoreboard


def judged(row: str, qid: str, rank: int, steps: int | None, text: str = "", exact: bool | None = None) -> QueryOutcome:
    return QueryOutcome(row, qid, rank, "reason" if text else "direct", len(text.split()), False, 0.5, steps, exact, exact, text)


def write_run(folder: Path, routes: dict[str, list[QueryOutcome]], speed: dict[Any, float] | None = None, **about: Any) -> Path:
    """An evaluation folder as evaluate() leaves it, as far as reports read it."""
    folder.mkdir(parents=True, exist_ok=True)
    header = {"format": 2, "model": f"model-{folder.name}", "data": "data-1", "split": "test", "limit": None, "threshold": None}
    results: dict[str, Any] = {**header, **about, "routes": {route: {} for route in routes}}
    for route, outcomes in routes.items():
        write(folder / f"queries-{route}.jsonl", *map(asdict, outcomes))
        for name, count in Counter(outcome.row for outcome in outcomes).items():
            results["routes"][route][name] = {
                "queries": count,
                "metric_k": 10 if name.startswith("fashion") else 5,
                "queries_per_second": (speed or {}).get((route, name), 10.0),
            }
    write(folder / "results.json", results)
    return folder


def cells(text: str, *start: str) -> list[str]:
    """The cells of the only table line that begins with the given outcomes, without intervals."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    (line,) = [line for line in lines if tuple(line[: len(start)]) == start]
    return [cell.split(" [")[0] for cell in line[len(start) :]]


def cirr_run(folder: Path, *outcomes: tuple[Any, ...], **about: Any) -> Path:
    """One row; of each query its rank, its steps, what it wrote, and whether that is right."""
    return write_run(folder, {"auto": [judged("cirr_task7", f"8:{n}", *outcome) for n, outcome in enumerate(outcomes)]}, **about)


def direct_run(folder: Path) -> Path:
    """Eight queries: R@1 3/4 at 0 and 1 steps, 1/2 at 2, 0/2 at 3 and 4."""
    return cirr_run(folder, (1, 0), (1, 0), (1, 1), (3, 1), (1, 2), (9, 2), (4, 3), (2, 4))


def reasoning_run(folder: Path, **about: Any) -> Path:
    """The same eight: R@1 2/4, then 2/2 (one reasoning right), then 1/2 (one right)."""
    hard = [(1, 2, "a b c", True), (1, 2, "a", False), (1, 3, "a b", True), (7, 4, "a b", False)]
    return cirr_run(folder, (1, 0), (2, 0), (1, 1), (6, 1, "a b"), *hard, **about)


def test_recall_by_steps_is_compared_query_by_query(tmp_path: Path) -> None:
    runs = {"plain": (direct_run(tmp_path / "plain"), "auto"), "thinks": (reasoning_run(tmp_path / "thinks"), "auto")}
    text = steps_report(runs, tmp_path / "deep" / "steps.md").read_text()
    groups, steps = text.split("## Each number of steps")
    assert cells(groups, "0-1", "plain") == ["4", "75.0", "100.0", "–", "–", "0.0 %", "–"]
    assert cells(groups, "0-1", "thinks") == ["4", "50.0", "75.0", "-25.0", "-25.0", "25.0 %", "–"]
    assert cells(groups, "3+", "thinks") == ["2", "50.0", "50.0", "+50.0", "-50.0", "100.0 %", "50.0 %"]
    assert cells(groups, "all", "thinks") == ["8", "62.5", "75.0", "+12.5", "-12.5", "62.5 %", "50.0 %"]
    assert "| all | thinks | 8 | 62.5 [25.0, 87.5] | 75.0 [37.5, 100.0] | +12.5 [-25.0, +50.0] |" in groups, "paired"
    assert [cells(steps, str(n), "thinks")[0] for n in (0, 1, 3, 4)] == ["2", "2", "1", "1"]
    assert "| 0 | thinks | 2 | 50.0 [0.0, 100.0] |" in steps and "| 0 | plain | 2 | 100.0 [100.0, 100.0] |" in steps
    # Where the reasoning is right and where it is not, with the first run on the very same queries.
    assert cells(text, "thinks", "2", "right") == ["1", "100.0", "100.0"]
    assert cells(text, "thinks", "2", "wrong") == ["1", "100.0", "0.0"]
    assert cells(text, "thinks", "3+", "wrong") == ["1", "0.0", "0.0"]
    assert cells(text, "cirr_task7", "0-1") == ["4", "75.0", "50.0"]
    again, plot = steps_report(runs, tmp_path / "again" / "steps.md"), (tmp_path / "again" / "steps.svg")
    assert again.read_text() == text and plot.read_text() == (tmp_path / "deep" / "steps.svg").read_text()
    assert "(steps.svg)" in text and all(f">{word}<" in plot.read_text() for word in ("plain", "thinks", "n = 2"))


def test_runs_on_other_data_or_other_queries_are_refused(tmp_path: Path) -> None:
    plain = direct_run(tmp_path / "plain")
    other_steps = [(1, 2)] * 8
    for other, message in (
        (reasoning_run(tmp_path / "other", data="data-2"), "'other' .* on data data-2, 'plain' .* on data-1"),
        (cirr_run(tmp_path / "fewer", *other_steps[:7]), "1 are in one only, such as 8:7 of cirr_task7"),
        (cirr_run(tmp_path / "new", *other_steps), r"query 8:0 of cirr_task7 has 0 steps in .* and 2 in"),
        (reasoning_run(tmp_path / "all", prompt="all"), "tried every instruction"),
        (plain, "two runs are called 'plain'"),
    ):
        with pytest.raises(InputError, match=message):
            run_report("steps", [plain, other], tmp_path / "s.md")
    assert not (tmp_path / "s.md").exists()


def test_routing_counts_who_reasons_against_the_label(tmp_path: Path) -> None:
    """One row of 20 simple queries, one mixed of 20 simple (1 reasons) and 10 complex (9 reason, then 8)."""
    for reasoned, ending in ((9, "everywhere."), (8, "not in cirr_task7, all mixed rows, all rows.")):
        outcomes = [judged("mscoco_task3", f"9:{n}", 1, 0) for n in range(20)]
        outcomes += [judged("cirr_task7", f"8:{n}", 1, 1, text="a" if n == 0 else "") for n in range(20)]
        outcomes += [judged("cirr_task7", f"8:{n + 20}", 1, 2 + n % 3, text="a" if n < reasoned else "") for n in range(10)]
        text = run_report("routing", [write_run(tmp_path / "run", {"auto": outcomes})])
        assert cells(text, "mscoco_task3") == ["", "20", "0.0 %", "0", "–"]
        assert cells(text, "cirr_task7") == ["mixed", "20", "5.0 %", "10", f"{reasoned}0.0 %"]
        assert cells(text, "**all mixed rows**") == ["mixed", "20", "5.0 %", "10", f"{reasoned}0.0 %"]
        assert cells(text, "**all rows**") == ["", "40", "2.5 %", "10", f"{reasoned}0.0 %"]
        assert text.rstrip().endswith(ending)


def test_routes_are_compared_on_simple_and_on_complex_queries(tmp_path: Path) -> None:
    def run(route: str) -> list[QueryOutcome]:
        texts = {"direct": ("", ""), "auto": ("", "a b c d"), "reason": ("a b", "a b c d")}[route]
        outcomes = [judged("mscoco_task3", f"9:{n}", 1 if n < 3 or route != "reason" else 6, 0, text=texts[0]) for n in range(4)]
        outcomes += [judged("fashioniq_task7", "7:0", 8, 1, text=texts[0])]
        return outcomes + [
            judged("fashioniq_task7", f"7:{n}", 11 if route == "direct" else n, 2, text=texts[1]) for n in (1, 2, 3)
        ]

    speed = {("auto", "mscoco_task3"): 100.0, ("reason", "mscoco_task3"): 20.0, ("auto", "fashioniq_task7"): 8.0}
    routes = {route: run(route) for route in ("direct", "auto", "reason")}
    routes["auto"].append(judged("nights_task4", "4:1", 9, 0))  # a row that one route alone has scored
    simple, complex_ = run_report("routes", [write_run(tmp_path / "all", routes, speed)]).split("## Complex")
    # R@1, difference to auto, row metric (hit@5, fashion hit@10), tokens, reasoned, queries/s of the rows mostly so
    assert cells(simple, "auto") == ["80.0", "–", "100.0", "0.0", "0.0 %", "100.0"]
    assert cells(simple, "reason") == ["60.0", "-20.0", "80.0", "2.0", "100.0 %", "20.0"]
    assert cells(complex_, "auto") == ["33.3", "–", "100.0", "4.0", "100.0 %", "8.0"]
    assert cells(complex_, "direct") == ["0.0", "-33.3", "0.0", "0.0", "0.0 %", "10.0"]
    assert "over 1 rows in which 100.0 % of the queries are simple" in simple and "Simple queries (5)" in simple
    assert "over 1 rows in which 75.0 % of the queries are complex" in complex_
    bare = write_run(tmp_path / "simple", {"auto": [judged("a_task0", "1:1", 1, 1), judged("a_task0", "1:2", 9, None)]})
    text = run_report("routes", [bare])
    assert "No complex queries" in text and "Simple queries (1)" in text, "queries without a label are left out"


def test_what_is_broken_or_asked_wrongly_is_named(tmp_path: Path) -> None:
    folder = direct_run(tmp_path / "plain")
    text = run_report("routes", [folder, folder], tmp_path / "new" / "routes.md")
    assert (tmp_path / "new" / "routes.md").read_text() == text == "\n".join([run_report("routes", [folder])] * 2)
    bare = write_run(tmp_path / "bare", {"auto": [judged("a_task0", "1:1", 1, None)]})
    for kind, folders, out, message in (
        ("pie", [folder], None, "'pie' is unknown; choose one of steps, routing, routes"),
        ("routing", [], None, "at least one folder"),
        ("steps", [folder], None, "--out"),
        ("steps", [folder], tmp_path / "table.txt", r"table\.txt must name a Markdown file"),
        ("routing", [tmp_path / "nowhere"], None, r"nowhere/results\.json is not there"),
        ("routing", [bare], None, "needs labelled data"),
        ("routes", [bare], None, "needs labelled data"),
        ("steps", [f"{folder}:reason"], tmp_path / "s.md", r"no route 'reason' \(it has: auto\)"),
    ):
        with pytest.raises(InputError, match=message):
            run_report(kind, folders, out)
    lines = (folder / "queries-auto.jsonl").read_text().splitlines(keepends=True)
    write(folder / "queries-auto.jsonl", "".join(lines).rstrip(), asdict(judged("nights_task4", "4:1", 1, 0)))
    assert {row for row, _ in read_run(folder, "auto").judged} == {"cirr_task7"}, "up to the last whole row"
    for name, content, message in (
        ("queries-auto.jsonl", "".join(lines[1:]), r"queries-auto\.jsonl: 7 queries of cirr_task7, results\.json has 8"),
        ("queries-auto.jsonl", "".join([*lines, '{"row": "x"}\n']), r"queries-auto\.jsonl:9: not a judged query"),
        ("results.json", "{", r"results\.json: not JSON"),
        ("results.json", '{"format": 3}', "format is 3, this release reads 2"),
    ):
        (folder / name).write_text(content)
        with pytest.raises(DataError, match=message):
            run_report("routing", [folder])


def test_a_comparison_names_what_was_won_and_lost(tmp_path: Path) -> None:
    plain, thinks = direct_run(tmp_path / "plain"), reasoning_run(tmp_path / "thinks")
    text = compare(f"plain={plain}", f"thinks={thinks}", k=1, out=tmp_path / "deep" / "compare.md")
    # At 1: won 8:5 and 8:6, lost 8:1; both 8:0, 8:2, 8:4; neither 8:3, 8:7. McNemar: 2 of 3 either way, p = 1.
    assert cells(text, "cirr_task7") == ["8", "50.0", "62.5", "+12.5", "2", "1", "3", "2", "1.000"]
    # Steps by the label: 8:0 to 8:3 are simple, and only 8:1 moved; both won queries are complex.
    assert cells(text, "**simple** (0 and 1 steps)")[:3] == ["4", "75.0", "50.0"]
    assert cells(text, "**complex** (2 and more)")[:6] == ["4", "25.0", "75.0", "+50.0", "2", "0"]
    assert "Won: 2, the 2 furthest" in text and "- cirr_task7 8:5: rank 9 to 1\n  - thinks wrote: a" in text
    assert text.index("8:5: rank") < text.index("8:6: rank"), "the furthest first"
    assert (tmp_path / "deep" / "compare.md").read_text() == text
    with pytest.raises(InputError, match="two runs are called"):
        compare(str(plain), str(plain))
    with pytest.raises(InputError, match="k is 0"):
        compare(str(plain), str(thinks), k=0)


def test_a_scoreboard_is_one_table_one_page_and_one_file_of_figures(tmp_path: Path) -> None:
    plain, thinks = direct_run(tmp_path / "plain"), reasoning_run(tmp_path / "thinks")
    text = write_scoreboard([f"plain={plain}", f"a <b>={thinks}"], tmp_path / "board" / "board.md")
    # At 5: plain misses rank 9 only, thinks misses ranks 6 and 7. The average is over the one row there is.
    assert cells(text, "cirr_task7") == ["87.5", "75.0", "44.6", "53.1", "57.3"] and "TRACE (published)" in text
    assert cells(text, "**average**") == ["**87.5**", "**75.0**", "**–**", "**–**", "**–**"]
    assert cells(text, r"a \<b\>", "complex") == ["0 (0.0 %)", "4 (100.0 %)", "2.0"]
    lines = list(csv.DictReader((tmp_path / "board" / "board.csv").open()))
    measured = [(line["run"], line["metric"], line["value"]) for line in lines if line["source"] == "measured"]
    assert measured == [("plain", "hit@5", "0.8750"), ("a <b>", "hit@5", "0.7500")]
    assert sum(line["source"].startswith("published, real M-BEIR") for line in lines) == 5 * 16
    page = (tmp_path / "board" / "board.html").read_text()
    assert page.count("<svg") == 2 and "a &lt;b&gt;" in page and "<b>=" not in page and "http-equiv" in page
    with pytest.raises(InputError, match="must name a Markdown file"):
        write_scoreboard([plain], tmp_path / "board.html")


def test_examples_are_the_first_hit_and_the_first_miss_of_each_route() -> None:
    outcomes = [judged("r", qid, rank, 0) for qid, rank in (("a", 3), ("b", 9), ("c", 1), ("e", 8))]
    assert [outcome.qid for outcome in choose([*outcomes, judged("r", "d", 7, 2, text="x")], 5)] == ["c", "b", "d"]
