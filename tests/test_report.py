"""Reports over hand-written evaluations: every number against one computed by hand."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from traceir.errors import DataError, InputError
from traceir.evaluation.compare import compare
from traceir.evaluation.judged import Judged
from traceir.evaluation.runs import read_run
from traceir.lab.examples import choose
from traceir.lab.report import (
    interval,
    routes_report,
    routing_report,
    run_report,
    steps_report,
)
from traceir.lab.scoreboard import write_scoreboard


def judged(row: str, qid: str, rank: int, steps: int | None, *, said: str = "", exact: bool | None = None) -> Judged:
    road = "reason" if said else "direct"
    return Judged(row, qid, rank, road, len(said.split()), False, 0.5, steps, exact, exact, said)


def write_run(
    folder: Path, routes: dict[str, list[Judged]], speed: dict[tuple[str, str], float] | None = None, **about: Any
) -> Path:
    """An evaluation folder as evaluate() leaves it, as far as reports read it."""
    folder.mkdir(parents=True, exist_ok=True)
    header = {"format": 2, "model": f"model-{folder.name}", "data": "data-1", "split": "test", "limit": None, "threshold": None}
    found: dict[str, Any] = {**header, **about, "routes": {}}
    for route, ones in routes.items():
        (folder / f"queries-{route}.jsonl").write_text("".join(json.dumps(asdict(one)) + "\n" for one in ones))
        for name in dict.fromkeys(one.row for one in ones):
            found["routes"].setdefault(route, {})[name] = {
                "queries": sum(one.row == name for one in ones),
                "metric_k": 10 if name.startswith("fashion") else 5,
                "queries_per_second": (speed or {}).get((route, name), 10.0),
            }
    (folder / "results.json").write_text(json.dumps(found))
    return folder


def cells(text: str, *start: str) -> list[str]:
    """The cells of the only table line that begins with the given ones."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    found = [line for line in lines if tuple(line[: len(start)]) == start]
    assert len(found) == 1, (start, found)
    return found[0][len(start) :]


def direct_run(folder: Path) -> Path:
    """Eight queries: R@1 3/4 at 0 and 1 steps, 1/2 at 2, 0/2 at 3 and 4."""
    ranks = [(1, 0), (1, 0), (1, 1), (3, 1), (1, 2), (9, 2), (4, 3), (2, 4)]
    return write_run(folder, {"auto": [judged("cirr_task7", f"8:{n}", rank, steps) for n, (rank, steps) in enumerate(ranks)]})


def reasoning_run(folder: Path, **about: Any) -> Path:
    """The same eight: R@1 2/4, then 2/2 (one reasoning right), then 1/2 (one right)."""
    told = [
        (1, 0, "", None), (2, 0, "", None), (1, 1, "", None), (6, 1, "a b", None),
        (1, 2, "a b c", True), (1, 2, "a", False), (1, 3, "a b", True), (7, 4, "a b", False),
    ]  # fmt: skip
    ones = [
        judged("cirr_task7", f"8:{n}", rank, steps, said=said, exact=exact) for n, (rank, steps, said, exact) in enumerate(told)
    ]
    return write_run(folder, {"auto": ones}, **about)


@pytest.fixture
def compared(tmp_path: Path) -> str:
    runs = {"plain": (direct_run(tmp_path / "plain"), "auto"), "thinks": (reasoning_run(tmp_path / "thinks"), "auto")}
    return steps_report(runs, tmp_path / "deep" / "steps.md").read_text()


def test_groups_hold_recall_difference_routing_and_exactness(compared: str) -> None:
    def means(*start: str) -> list[str]:
        return [cell.split(" [")[0] for cell in cells(compared, *start)]

    assert means("0-1", "plain") == ["4", "75.0", "100.0", "–", "–", "0.0 %", "–"]
    assert means("0-1", "thinks") == ["4", "50.0", "75.0", "-25.0", "-25.0", "25.0 %", "–"]
    assert means("3+", "plain") == ["2", "0.0", "100.0", "–", "–", "0.0 %", "–"]
    assert means("3+", "thinks") == ["2", "50.0", "50.0", "+50.0", "-50.0", "100.0 %", "50.0 %"]
    assert means("all", "plain")[:2] == ["8", "50.0"]
    assert means("all", "thinks") == ["8", "62.5", "75.0", "+12.5", "-12.5", "62.5 %", "50.0 %"]


def test_each_number_of_steps_has_its_line(compared: str) -> None:
    _, steps = compared.split("## Each number of steps")
    assert [cells(steps, str(n), "thinks")[0] for n in (0, 1, 3, 4)] == ["2", "2", "1", "1"]
    assert cells(steps, "0", "plain")[1] == "100.0 [100.0, 100.0]"
    assert cells(steps, "0", "thinks")[1] == "50.0 [0.0, 100.0]"


def test_right_and_wrong_reasoning_are_set_against_the_first_run_on_the_same_queries(compared: str) -> None:
    assert cells(compared, "thinks", "2", "right") == ["1", "100.0 [100.0, 100.0]", "100.0 [100.0, 100.0]"]
    assert cells(compared, "thinks", "2", "wrong") == ["1", "100.0 [100.0, 100.0]", "0.0 [0.0, 0.0]"]
    assert cells(compared, "thinks", "3+", "wrong") == ["1", "0.0 [0.0, 0.0]", "0.0 [0.0, 0.0]"]


def test_rows_are_listed_apart(compared: str) -> None:
    assert cells(compared, "cirr_task7", "0-1") == ["4", "75.0", "50.0"]
    assert cells(compared, "cirr_task7", "3+") == ["2", "0.0", "50.0"]


def test_the_same_folders_give_the_same_bytes_and_one_line_a_run(tmp_path: Path, compared: str) -> None:
    runs = {"plain": (tmp_path / "plain", "auto"), "thinks": (tmp_path / "thinks", "auto")}
    again = steps_report(runs, tmp_path / "again" / "steps.md")
    assert again.read_text() == compared
    plot = (tmp_path / "again" / "steps.svg").read_text()
    assert plot == (tmp_path / "deep" / "steps.svg").read_text()
    assert "(steps.svg)" in compared
    assert all(f">{word}<" in plot for word in ("plain", "thinks", "n = 2"))


def test_the_interval_is_that_of_plain_resampling() -> None:
    values = np.array([1.0] * 30 + [0.0] * 60 + [-1.0] * 10)
    draw = np.random.default_rng(1)
    means = values[draw.integers(0, 100, (20_000, 100))].mean(axis=1)
    assert interval(values) == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=0.011)
    assert interval(np.ones(7)) == (1.0, 1.0)
    low, high = interval(np.array([0.0, 1.0] * 50))
    assert (low, high) == pytest.approx((0.40, 0.60), abs=0.011)


def test_differences_are_paired(tmp_path: Path) -> None:
    """Hits on the same half of the queries differ by exactly 0; hits on opposite halves differ by 0 give or take."""
    for name, right in (("one", 0), ("same", 0), ("opposite", 1)):
        ones = [judged("cirr_task7", f"8:{n}", 1 if n % 2 == right else 2, 2) for n in range(100)]
        write_run(tmp_path / name, {"direct": ones})
    text = steps_report(
        {name: (tmp_path / name, "direct") for name in ("one", "same", "opposite")}, tmp_path / "s.md"
    ).read_text()
    assert cells(text, "all", "same")[3] == "+0.0 [+0.0, +0.0]"
    low, high = map(float, cells(text, "all", "opposite")[3].split("[")[1].rstrip("]").split(","))
    assert (low, high) == pytest.approx((-20, 20), abs=1.5)


def test_runs_on_other_data_or_other_queries_are_refused(tmp_path: Path) -> None:
    plain = (direct_run(tmp_path / "plain"), "auto")
    other = reasoning_run(tmp_path / "other", data="data-2")
    with pytest.raises(InputError, match=r"'b' .* on data data-2, 'a' .* on data-1; evaluate both on one folder"):
        steps_report({"a": plain, "b": (other, "auto")}, tmp_path / "s.md")
    fewer = write_run(tmp_path / "fewer", {"auto": [judged("cirr_task7", f"8:{n}", 1, 2) for n in range(7)]})
    with pytest.raises(InputError, match="1 are in one only, such as 8:7 of cirr_task7"):
        steps_report({"a": plain, "b": (fewer, "auto")}, tmp_path / "s.md")
    relabelled = write_run(tmp_path / "new", {"auto": [judged("cirr_task7", f"8:{n}", 1, 2) for n in range(8)]})
    with pytest.raises(InputError, match=r"query 8:0 of cirr_task7 has 0 steps in .* and 2 in"):
        steps_report({"a": plain, "b": (relabelled, "auto")}, tmp_path / "s.md")
    assert not (tmp_path / "s.md").exists()


def test_unlabelled_queries_are_left_out_and_wholly_unlabelled_data_is_refused(tmp_path: Path) -> None:
    half = write_run(tmp_path / "half", {"auto": [judged("a_task0", "1:1", 1, 2), judged("a_task0", "1:2", 9, None)]})
    assert cells(steps_report({"half": (half, "auto")}, tmp_path / "s.md").read_text(), "all", "half")[0] == "1"
    bare = write_run(tmp_path / "bare", {"auto": [judged("a_task0", "1:1", 1, None)]})
    for report in (routing_report, routes_report):
        with pytest.raises(InputError, match="needs labelled data"):
            report(bare)


def routing_run(folder: Path, complex_that_reason: int) -> Path:
    """One row of 20 simple queries, one mixed of 20 simple (1 reasons) and 10 complex."""
    ones = [judged("mscoco_task3", f"9:{n}", 1, 0) for n in range(20)]
    ones += [judged("cirr_task7", f"8:{n}", 1, 1, said="a" if n == 0 else "") for n in range(20)]
    ones += [judged("cirr_task7", f"8:{n + 20}", 1, 2 + n % 3, said="a" if n < complex_that_reason else "") for n in range(10)]
    return write_run(folder, {"auto": ones})


def test_routing_counts_who_reasons_against_the_label(tmp_path: Path) -> None:
    text = routing_report(routing_run(tmp_path / "good", 9))
    assert cells(text, "mscoco_task3") == ["", "20", "0.0 %", "0", "–"]
    assert cells(text, "cirr_task7") == ["mixed", "20", "5.0 %", "10", "90.0 %"]
    assert cells(text, "**all mixed rows**") == ["mixed", "20", "5.0 %", "10", "90.0 %"]
    assert cells(text, "**all rows**") == ["", "40", "2.5 %", "10", "90.0 %"]
    assert text.rstrip().endswith("everywhere.")


def test_routing_names_the_rows_where_the_bound_does_not_hold(tmp_path: Path) -> None:
    text = routing_report(routing_run(tmp_path / "bad", 8))
    assert text.rstrip().endswith("not in cirr_task7, all mixed rows, all rows.")


def test_routes_are_compared_on_simple_and_on_complex_queries(tmp_path: Path) -> None:
    def run(route: str) -> list[Judged]:
        said = {"direct": ("", ""), "auto": ("", "a b c d"), "reason": ("a b", "a b c d")}[route]
        ones = [judged("mscoco_task3", f"9:{n}", 1 if n < 3 or route != "reason" else 6, 0, said=said[0]) for n in range(4)]
        ones += [judged("fashioniq_task7", "7:0", 8, 1, said=said[0])]
        return ones + [judged("fashioniq_task7", f"7:{n}", 11 if route == "direct" else n, 2, said=said[1]) for n in (1, 2, 3)]

    speed = {("auto", "mscoco_task3"): 100.0, ("reason", "mscoco_task3"): 20.0, ("auto", "fashioniq_task7"): 8.0}
    folder = write_run(tmp_path / "all", {route: run(route) for route in ("direct", "auto", "reason")}, speed)
    simple, complex_ = routes_report(folder).split("## Complex")
    # R@1, difference to auto, row metric (hit@5, fashion hit@10), tokens, reasoned, queries/s of the rows mostly so
    assert cells(simple, "auto")[1:] == ["–", "100.0", "0.0", "0.0 %", "100.0"]
    assert cells(simple, "auto")[0].startswith("80.0 [")
    assert cells(simple, "reason")[0].startswith("60.0 [") and cells(simple, "reason")[1].startswith("-20.0 [")
    assert cells(simple, "reason")[2:] == ["80.0", "2.0", "100.0 %", "20.0"]
    assert cells(complex_, "auto")[0].startswith("33.3 [")
    assert cells(complex_, "auto")[2:] == ["100.0", "4.0", "100.0 %", "8.0"]
    assert cells(complex_, "direct")[0] == "0.0 [0.0, 0.0]"
    assert cells(complex_, "direct")[2:] == ["0.0", "0.0", "0.0 %", "10.0"]
    assert "over 1 rows in which 100.0 % of the queries are simple" in simple
    assert "over 1 rows in which 75.0 % of the queries are complex" in complex_


def test_routes_compare_only_the_rows_all_of_them_scored(tmp_path: Path) -> None:
    both = [judged("cirr_task7", "8:1", 1, 1)]
    folder = write_run(tmp_path / "part", {"auto": [*both, judged("nights_task4", "4:1", 9, 0)], "direct": both})
    text = routes_report(folder)
    assert "Simple queries (1)" in text and "No complex queries" in text
    assert cells(text, "auto")[0] == "100.0 [100.0, 100.0]"


def test_an_evaluation_that_did_not_end_is_read_up_to_its_last_whole_row(tmp_path: Path) -> None:
    folder = direct_run(tmp_path / "cut")
    with (folder / "queries-auto.jsonl").open("a") as stream:
        stream.write(json.dumps(asdict(judged("nights_task4", "4:1", 1, 0))) + "\n")
    assert {row for row, _ in read_run(folder, "auto").judged} == {"cirr_task7"}
    lines = (folder / "queries-auto.jsonl").read_text().splitlines(keepends=True)
    (folder / "queries-auto.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(DataError, match=r"queries-auto\.jsonl: 7 queries of cirr_task7, results\.json has 8"):
        read_run(folder, "auto")


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere/results\.json is not there"):
        routing_report(tmp_path / "nowhere")
    folder = direct_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"no route 'reason' \(it has: auto\)"):
        read_run(folder, "reason")
    with (folder / "queries-auto.jsonl").open("a") as stream:
        stream.write('{"row": "x"}\n')
    with pytest.raises(DataError, match=r"queries-auto\.jsonl:9: not a judged query"):
        routing_report(folder)
    (folder / "results.json").write_text("{")
    with pytest.raises(DataError, match=r"results\.json: not JSON"):
        routes_report(folder)
    (folder / "results.json").write_text('{"format": 3}')
    with pytest.raises(DataError, match="format is 3, this release reads 2"):
        routes_report(folder)


def test_run_report_reads_labels_and_routes_from_its_arguments(tmp_path: Path) -> None:
    direct_run(tmp_path / "plain")
    write_run(
        tmp_path / "two", {route: [judged("cirr_task7", f"8:{n}", 1, n // 2) for n in range(8)] for route in ("auto", "direct")}
    )
    with pytest.raises(InputError, match=r"query 8:7 of cirr_task7 has 4 steps in .*plain and 3 in"):
        run_report("steps", [tmp_path / "plain", f"{tmp_path / 'two'}:direct"], tmp_path / "s.md")
    text = run_report("steps", [f"first={tmp_path / 'two'}:direct", tmp_path / "two"], tmp_path / "s.md")
    assert cells(text, "all", "first")[0] == cells(text, "all", "two")[0] == "8"
    assert "first: model model-two, route direct" in text and "two: model model-two, route auto" in text
    with pytest.raises(InputError, match="two runs are called 'two'"):
        run_report("steps", [tmp_path / "two", tmp_path / "two"], tmp_path / "s.md")


def test_run_report_writes_what_it_returns_and_refuses_the_rest(tmp_path: Path) -> None:
    folder = direct_run(tmp_path / "plain")
    assert run_report("routing", [folder]) == routing_report(folder)
    both = run_report("routes", [folder, folder], tmp_path / "new" / "routes.md")
    assert (tmp_path / "new" / "routes.md").read_text() == both == "\n".join([routes_report(folder)] * 2)
    for kind, folders, out, message in (
        ("pie", [folder], None, "'pie' is unknown; choose one of steps, routing, routes"),
        ("routing", [], None, "at least one folder"),
        ("steps", [folder], None, "--out"),
        ("steps", [folder], tmp_path / "table.txt", r"table\.txt must name a Markdown file"),
    ):
        with pytest.raises(InputError, match=message):
            run_report(kind, folders, out)


def test_an_evaluation_of_every_instruction_is_no_single_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tried every instruction"):
        read_run(reasoning_run(tmp_path / "all", prompt="all"), "auto")


def test_a_comparison_names_what_was_won_and_lost(tmp_path: Path) -> None:
    plain, thinks = direct_run(tmp_path / "plain"), reasoning_run(tmp_path / "thinks")
    text = compare(f"plain={plain}", f"thinks={thinks}", k=1, out=tmp_path / "deep" / "compare.md")
    # At 1: won 8:5 and 8:6, lost 8:1; both 8:0, 8:2, 8:4; neither 8:3, 8:7. McNemar: 2 of 3 either way, p = 1.
    n, first, second, difference, won, lost, both, neither, p = cells(text, "cirr_task7")
    assert (n, first, second, difference.split()[0]) == ("8", "50.0", "62.5", "+12.5")
    assert (won, lost, both, neither, p) == ("2", "1", "3", "2", "1.000")
    # Steps by the label: 8:0 to 8:3 are simple, and only 8:1 moved; both won queries are complex.
    assert cells(text, "**simple** (0 and 1 steps)")[:3] == ["4", "75.0", "50.0"]
    assert cells(text, "**complex** (2 and more)")[:6] == ["4", "25.0", "75.0", "+50.0 [+0.0, +100.0]", "2", "0"]
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
    own, other, *beside = cells(text, "cirr_task7")
    assert own.startswith("87.5 [") and other.startswith("75.0 [") and beside == ["44.6", "53.1", "57.3"]
    assert "TRACE (published)" in text and cells(text, "**average**")[:2] == ["**87.5**", "**75.0**"]
    assert cells(text, "a <b>", "complex") == ["0 (0.0 %)", "4 (100.0 %)", "2.0"]
    lines = list(csv.DictReader((tmp_path / "board" / "board.csv").open()))
    measured = [line for line in lines if line["source"] == "measured"]
    assert [(line["run"], line["metric"], line["value"]) for line in measured] == [
        ("plain", "hit@5", "0.8750"), ("a <b>", "hit@5", "0.7500")
    ]  # fmt: skip
    assert sum(line["source"].startswith("published, real M-BEIR") for line in lines) == 5 * 16
    page = (tmp_path / "board" / "board.html").read_text()
    assert page.count("<svg") == 2 and "a &lt;b&gt;" in page and "<b>=" not in page and "http-equiv" in page
    with pytest.raises(InputError, match="must name a Markdown file"):
        write_scoreboard([plain], tmp_path / "board.html")


def test_examples_are_the_first_hit_and_the_first_miss_of_each_road() -> None:
    ones = [
        judged("r", "a", 3, 0),
        judged("r", "b", 9, 0),
        judged("r", "c", 1, 0),
        judged("r", "d", 7, 2, said="x"),
        judged("r", "e", 8, 0),
    ]
    assert [one.qid for one in choose(ones, 5)] == ["c", "b", "d"]
