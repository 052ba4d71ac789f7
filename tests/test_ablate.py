"""Ablations without any training: who runs what and when, what a kill costs, and the statistics and verdicts by hand."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FORKS

from traceir.errors import InputError, TrainError
from traceir.items import Encoding, Query, Route
from traceir.lab.ablate import ablate, claim, list_tables, read_log
from traceir.lab.ablate_plan import Run, plan_runs
from traceir.lab.ablate_report import Estimate, compare, judge, read_results, t_interval, write_report
from traceir.lab.ablate_score import TwoStage, read_outcomes, relative_speeds, score, time_routes, told_more
from traceir.lab.ablations import BASE, COLD, NONE, TABLES, TIMED, Claim, Comparison, Line, Table, Variant, choose_tables
from traceir.precision import Speed
from traceir.train.train import TrainConfig

ROWS = ("invented_complex", "invented_simple")
TABLE = Table(
    "tiny", "A tiny table", "Table 0",
    (Line("warm", BASE, "direct", {("complex", "R@5"): 50.0}), Line("cold", COLD, paper={("complex", "R@5"): 46.0})),
    (Claim("Warm beats cold", (Comparison("warm", "cold"),)),),
    against="warm",
)  # fmt: skip
TINY = (TABLE,)


@pytest.fixture
def base(tmp_path: Path) -> TrainConfig:
    (tmp_path / "data").mkdir()
    return TrainConfig(data=str(tmp_path / "data"), out="unused", steps=4)


def fake_train(config: TrainConfig) -> Path:
    folder = Path(config.out)
    (folder / "steps" / "000002").mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text('{"step": 4, "seconds": 3.0, "pairs/ret": 0.5}\n')
    with (folder / "trained.txt").open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    return folder / "checkpoint"


def fake_score(run: Run) -> dict[str, Any]:
    """Four queries a row; a better variant or seed has more of them among the first five."""
    if run.variant.work == "speed":
        return {"speed": {row: relative_speeds({f"{n}:{r}": [1.0 + at, 2.0] for at, (n, r) in enumerate(TIMED)}) for row in ROWS}}
    hits = {"base": 3, "none": 1}.get(run.variant.name, 2) + (run.seed == 1 and run.variant.name == "base")
    return made_up([1] * hits + [11] * (4 - hits), run.variant.routes)


def made_up(ranks: list[int], routes: tuple[Route, ...] = ("auto",)) -> dict[str, Any]:
    row = {
        "queries": len(ranks), **{f"hit@{k}": float(np.mean([rank <= k for rank in ranks])) for k in (1, 5, 10)},
        "reasoned": 0.5, "tokens_per_query": 8.0, "truncated": 0.0, "exact": None, "ranks": ranks,
    }  # fmt: skip
    return {"data": "data-1", "routes": {route: dict.fromkeys(ROWS, row) for route in routes}}


def run_all(out: Path, base: TrainConfig, **options: Any) -> Any:
    given = {"tables": TINY, "seeds": (0, 1), "rows": ROWS, "poll": 0.01, "trains": fake_train, "scores": fake_score} | options
    return ablate(given.pop("tables"), out, base, **given)


def trainings(out: Path) -> dict[str, int]:
    return {
        str(file.parent.relative_to(out / "runs")): len(file.read_text().split()) for file in out.glob("runs/*/seed*/trained.txt")
    }


# The tables


def test_every_table_is_whole_and_sets_only_fields_that_exist() -> None:
    known = {one.name for one in fields(TrainConfig)}
    for table in TABLES:
        labels = [line.label for line in table.lines]
        named = {label for one in table.claims for asked in one.comparisons for label in (asked.better, asked.worse)}
        assert table.claims and len(set(labels)) == len(labels) and named | {table.against} <= set(labels), table.id
        names = {variant.name for variant in table.variants}
        for variant in table.variants:
            assert set(variant.settings) <= known, (variant.name, set(variant.settings) - known)
            assert set(variant.uses) <= names
        assert all(line.route in line.variant.routes for line in table.lines)
    variants = [variant for table in TABLES for variant in table.variants]
    assert all(one is other for one in variants for other in variants if one.name == other.name)
    assert {table.paper for table in TABLES} >= {f"Table {n}" for n in (2, 4, 5, 6, 7, 8)}


def test_tables_are_chosen_by_name_and_listed_with_each_run_once() -> None:
    assert [table.id for table in choose_tables(["share", "table4"])] == ["table4", "share"]
    assert choose_tables(["all"]) == list(TABLES)
    with pytest.raises(InputError, match=r"table 'table9' is unknown .*choose all, or among table2"):
        choose_tables(["table9"])
    listed = list_tables(choose_tables(["table5", "symmetric"]), (0, 1, 2))
    assert "reasoning only: run reasoning, route auto" in listed and listed.endswith("5 runs x 3 seeds")


# Running and resuming


def test_all_variants_of_a_seed_come_before_the_next_seed_and_nothing_is_done_twice(tmp_path: Path, base: TrainConfig) -> None:
    order: list[str] = []

    def train(config: TrainConfig) -> Path:
        order.append("/".join(Path(config.out).parts[-2:]))
        return fake_train(config)

    outcome = run_all(tmp_path / "out", base, trains=train)
    assert order == ["base/seed0", "temperature-0.02/seed0", "base/seed1", "temperature-0.02/seed1"]
    assert (outcome.done, outcome.planned, outcome.failed) == (4, 4, {})
    result = json.loads((tmp_path / "out/runs/temperature-0.02/seed1/result.json").read_text())
    assert result["identity"]["config"]["temperature"] == 0.02 and result["identity"]["config"]["seed"] == 1
    assert result["losses"] == {"pairs/ret": 0.5} and result["seconds"]["train"] == 3.0
    assert not (tmp_path / "out/runs/base/seed0/steps").exists()
    run_all(tmp_path / "out", base, trains=train, seeds=(0, 1, 2))
    assert order[4:] == ["base/seed2", "temperature-0.02/seed2"]
    assert json.loads((tmp_path / "out/ablation.json").read_text())["seeds"] == [0, 1, 2]


def test_runs_that_use_others_wait_for_them_and_fail_with_them(tmp_path: Path, base: TrainConfig) -> None:
    table = Table(
        "pair", "Two", "", (Line("pipeline", Variant("p", work="pipeline", uses=("base",))), Line("one", BASE)), (), "one"
    )
    runs, _ = plan_runs([table], tmp_path, base, (0,), ROWS)
    assert [run.variant.name for run in runs] == ["base", "p"] and runs[1].uses == (runs[0].folder,)

    def train(config: TrainConfig) -> Path:
        raise TrainError("step 3: loss is nan\non queries 8:1")

    outcome = run_all(tmp_path, base, tables=[table], seeds=(0,), trains=train)
    assert outcome.done == 0 and outcome.failed == {
        "base, seed 0": "TrainError: step 3: loss is nan on queries 8:1",
        "p, seed 0": "it needs base, seed 0, which failed",
    }
    outcome = run_all(tmp_path, base, tables=[table], seeds=(0,))
    assert outcome.done == 2 and not outcome.failed and trainings(tmp_path) == {"base/seed0": 1}


def test_one_failure_is_recorded_and_the_others_go_on(tmp_path: Path, base: TrainConfig) -> None:
    def train(config: TrainConfig) -> Path:
        if config.temperature == 0.02:
            raise RuntimeError("out of memory")
        return fake_train(config)

    outcome = run_all(tmp_path, base, trains=train)
    assert outcome.done == 2 and set(outcome.failed) == {"temperature-0.02, seed 0", "temperature-0.02, seed 1"}
    page = write_report(tmp_path, tmp_path / "report", tables=TINY).read_text()
    assert "2 of 4 runs are there" in page and "temperature-0.02, seed1: RuntimeError: out of memory" in page


def test_another_configuration_is_refused_and_a_neutral_change_is_not(tmp_path: Path, base: TrainConfig) -> None:
    run_all(tmp_path / "out", base)
    run_all(tmp_path / "out", replace(base, threads=2, log_every=1))
    with pytest.raises(InputError, match=r"of another base configuration \(steps: 4 -> 5\); choose another --out"):
        run_all(tmp_path / "out", replace(base, steps=5))
    with pytest.raises(InputError, match="choose another --out"):
        run_all(tmp_path / "out", base, rows=("other", "rows"))
    (tmp_path / "data/meta.json").write_text('{"fingerprint": "new"}')
    with pytest.raises(InputError, match=r"base/seed0/result.json is of another configuration \(data: None -> 'new'\)"):
        run_all(tmp_path / "out", base)
    assert set(trainings(tmp_path / "out").values()) == {1}


def test_field_report_01_all_runs_have_the_precision_of_the_first(
    tmp_path: Path, base: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever machine they run on; folders of earlier releases, which always took bfloat16, go on."""
    seen: list[object] = []

    def train(config: TrainConfig) -> Path:
        seen.append(config.mixed_precision)
        return fake_train(config)

    for fast, seeds in ((False, (0,)), (True, (0, 1))):
        monkeypatch.setattr("traceir.train.config.bfloat16_on", lambda *_, fast=fast: Speed(fast, "made up"))
        run_all(tmp_path / "out", base, trains=train, seeds=seeds)
    assert seen == [False] * 4
    plan = json.loads((tmp_path / "out/ablation.json").read_text())
    plan["base"]["mixed_precision"] = True
    (tmp_path / "old").mkdir()
    (tmp_path / "old/ablation.json").write_text(json.dumps(plan))
    monkeypatch.setattr("traceir.train.config.bfloat16_on", lambda *_: Speed(False, "made up"))
    run_all(tmp_path / "old", base, trains=train, seeds=(0,))
    assert seen[4:] == [True, True]


def test_a_start_that_is_missing_skips_the_variant_with_its_reason(tmp_path: Path, base: TrainConfig) -> None:
    table = Table("t", "T", "", (Line("small", Variant("s", preset="no-such-preset")), Line("one", BASE)), (), "one")
    outcome = run_all(tmp_path, base, tables=[table])
    assert outcome.skipped == {"s": "there is no preset no-such-preset"} and outcome.done == outcome.planned == 2


@pytest.fixture
def killed(tmp_path: Path, base: TrainConfig) -> Path:
    """Ablations whose process was killed in its second training."""

    def train(config: TrainConfig) -> Path:
        folder = fake_train(config)
        if config.temperature == 0.02:
            time.sleep(60)
        return folder

    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=run_all, args=(out, base), kwargs={"trains": train})
    process.start()
    while "temperature-0.02/seed0" not in trainings(out):
        assert process.is_alive()
        time.sleep(0.02)
    with claim(out / "runs/temperature-0.02/seed0") as claimed:
        assert not claimed
    process.kill()
    process.join()
    return out


def test_a_kill_loses_only_the_run_in_progress(killed: Path, base: TrainConfig) -> None:
    dead = int((killed / "runs/temperature-0.02/seed0/lock").read_text())
    assert dead != os.getpid() and not (killed / "runs/temperature-0.02/seed0/result.json").exists()
    outcome = run_all(killed, base)
    assert outcome.done == 4 and trainings(killed)["base/seed0"] == 1 and trainings(killed)["temperature-0.02/seed0"] == 2


def test_a_stale_lock_stops_nobody_and_a_live_one_does(tmp_path: Path, base: TrainConfig) -> None:
    folder = tmp_path / "runs/base/seed0"
    folder.mkdir(parents=True)
    (folder / "lock").write_text("999999999\n")
    with claim(folder) as claimed:
        assert claimed and (folder / "lock").read_text() == f"{os.getpid()}\n"
        worker = threading.Thread(target=run_all, args=(tmp_path, base))
        worker.start()
        while len(trainings(tmp_path)) < 3:
            time.sleep(0.01)
        assert "base/seed0" not in trainings(tmp_path) and worker.is_alive()
    worker.join(timeout=30)
    assert not worker.is_alive() and trainings(tmp_path)["base/seed0"] == 1


def met_train(config: TrainConfig) -> Path:
    """Ends when two processes have trained, so that neither does all the work."""
    folder = fake_train(config)
    runs, begun = folder.parents[2], time.monotonic()
    while len({line for file in runs.glob("*/seed*/trained.txt") for line in file.read_text().split()}) < 2:
        assert time.monotonic() - begun < 60
        time.sleep(0.02)
    return folder


def test_two_processes_share_the_runs(tmp_path: Path, base: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("traceir.lab.ablate.multiprocessing.get_context", lambda _: FORKS)
    outcome = run_all(tmp_path, base, jobs=2, trains=met_train)
    assert outcome.done == outcome.planned == 4 and not outcome.failed
    assert len(trainings(tmp_path)) == 4 and set(trainings(tmp_path).values()) == {1}


def test_seconds_are_added_over_starts(tmp_path: Path) -> None:
    lines = [{"step": 1, "seconds": 2.0}, {"step": 2, "seconds": 5.0}, {"step": 3, "seconds": 1.5, "x/gen": 0.25}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_log(tmp_path / "log.jsonl") == (6.5, {"x/gen": 0.25})
    assert read_log(tmp_path / "none") == (0.0, {})


# Evaluation


class FakeEncoder:
    """Says on which queries it was asked and by which route."""

    def __init__(self, written: str = "") -> None:
        self.written, self.asked = written, []

    def encode_queries(self, queries: list[Query], *, route: Route = "auto", progress: bool = False) -> list[Encoding]:
        self.asked.append(route)
        road = "reason" if self.written else "direct"
        return [Encoding(np.ones(2, np.float32), road, self.written, 3, 0.5, False) for _ in queries]


def test_what_the_writer_wrote_goes_behind_the_last_text() -> None:
    assert told_more(Query(("a red cube",)), "then a blue one").parts == ("a red cube then a blue one",)
    assert told_more(Query((), instruction="find"), "a blue one").parts == ("a blue one",)
    query = Query(("a red cube",))
    assert told_more(query, "") is query


def test_the_pipeline_reads_the_written_words_into_the_second_models_vector(model: Any) -> None:
    from traceir.encoder import Encoder

    writer, second, query = FakeEncoder("blue ball"), Encoder(model), Query.of(text="make one red", target="image")
    (found,) = TwoStage(writer, second).encode_queries([query], route="reason")
    (wanted,) = second.encode_queries([Query.of(text="make one red blue ball", target="image")], route="direct")
    assert writer.asked == ["reason"] and found.reasoning == "blue ball" and found.route == "reason"
    np.testing.assert_allclose(found.vector, wanted.vector, atol=1e-6)


def test_routes_are_timed_in_turns_and_compared_within_each_round() -> None:
    one, other = FakeEncoder(), FakeEncoder()
    seconds = time_routes({"d": (one, "direct"), "r": (other, "reason")}, [Query(("x",))], rounds=3)
    assert [len(times) for times in seconds.values()] == [3, 3] and len(one.asked) == 4 and set(other.asked) == {"reason"}
    found = relative_speeds({"d": [1.0, 2.0, 1.0], "r": [4.0, 4.0, 2.0]})
    assert found["relative"] == {"d": 1.0, "r": 0.5}


def test_a_run_is_scored_by_its_routes_and_keeps_each_rank(model: Any, folder: Path, tmp_path: Path, base: TrainConfig) -> None:
    from traceir.model import save

    table = Table("t", "T", "", (Line("none", NONE, "direct"),), (), "none")
    config = replace(base, data=str(folder))
    (run,), _ = plan_runs([replace(table, lines=(Line("x", Variant("x", routes=("direct",))),))], tmp_path, config, (0,),
                          ("cirr_task7", "mscoco_task3"))  # fmt: skip
    save(model, run.folder / "checkpoint")
    found = score(run)
    row = found["routes"]["direct"]["cirr_task7"]
    assert set(found["routes"]) == {"direct"} and set(found["routes"]["direct"]) == {"cirr_task7", "mscoco_task3"}
    assert len(row["ranks"]) == row["queries"] > 0 and row["hit@5"] == np.mean(np.array(row["ranks"]) <= 5)
    assert read_outcomes(run.folder / "evaluation/queries-direct.jsonl") == found["routes"]["direct"]


def test_the_speed_of_both_models_is_measured_on_both_rows(
    model: Any, folder: Path, tmp_path: Path, base: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from traceir.model import save

    monkeypatch.setattr("traceir.lab.ablate_score.SPEED_QUERIES", 3)
    config, (table,) = replace(base, data=str(folder)), choose_tables(["table2"])
    runs, _ = plan_runs([table], tmp_path, config, (0,), ("cirr_task7", "mscoco_task3"))
    for used in runs[-1].uses:
        save(model, used / "checkpoint")
    found = score(runs[-1])["speed"]
    assert runs[-1].variant.name == "speed" and set(found) == {"cirr_task7", "mscoco_task3"}
    for row in found.values():
        assert row["queries"] == 3 and row["relative"]["none:direct"] == 1.0
        assert set(row["relative"]) == {f"{line.variant.name}:{line.route}" for line in table.lines}


# Statistics and verdicts


def test_the_t_interval_is_that_of_the_textbook() -> None:
    found = t_interval([1.0, 2.0, 6.0])  # deviation sqrt(7), t(2) 4.303: 3 +- 4.303 * sqrt(7 / 3)
    assert found.mean == 3.0 and (found.low, found.high) == pytest.approx((3 - 6.573, 3 + 6.573), abs=1e-3)
    assert t_interval([5.0]) == Estimate(5.0, None, None, 1)
    assert t_interval([2.0, 2.0]) == Estimate(2.0, 2.0, 2.0, 2)
    many = t_interval([0.0, 1.0] * 50)
    assert many.high == pytest.approx(0.5 + 2.042 * 0.050252, abs=1e-4)


@pytest.mark.parametrize(
    ("intervals", "verdict"),
    [
        ([(1.0, 3.0)], "reproduced"),
        ([(1.0, 3.0), (0.1, 9.0)], "reproduced"),
        ([(1.0, 3.0), (-0.1, 9.0)], "undecided"),
        ([(0.0, 3.0)], "undecided"),
        ([(1.0, 3.0), (-5.0, -0.1)], "not reproduced"),
        ([(None, None)], "undecided"),
        ([(1.0, 3.0), None], "not run"),
    ],
)
def test_a_claim_holds_only_if_every_comparison_does(intervals: list[Any], verdict: str) -> None:
    assert judge([pair and Estimate(0.0, *pair, 2) for pair in intervals]) == verdict


def results_of(out: Path, base: TrainConfig, hits: dict[str, list[list[int]]]) -> Path:
    """Finished runs with the given ranks, by variant and seed."""

    def scores(run: Run) -> dict[str, Any]:
        return made_up(hits[run.variant.name][run.seed], run.variant.routes)

    run_all(out, base, scores=scores, seeds=range(len(next(iter(hits.values())))))
    return out


@pytest.mark.parametrize(
    ("cold", "word"),
    [
        ([[11, 11, 11, 11], [11, 11, 11, 11]], "**Reproduced:** Warm beats cold"),
        ([[1, 1, 1, 1], [1, 1, 1, 1]], "**Not reproduced:** Warm beats cold"),
        ([[1, 11, 11, 11], [1, 1, 1, 1]], "**Undecided:** Warm beats cold"),
    ],
)
def test_the_sentence_follows_the_figures(tmp_path: Path, base: TrainConfig, cold: list[list[int]], word: str) -> None:
    out = results_of(tmp_path / "out", base, {"base": [[1, 5, 11, 11], [2, 11, 4, 11]], "temperature-0.02": cold})
    assert word in write_report(out, tmp_path / "report", tables=TINY).read_text()


def test_differences_are_paired_by_seed_and_by_query(tmp_path: Path, base: TrainConfig) -> None:
    """50 and 75 against 25 and 75: differences 25 and 0, whatever the seeds' own level."""
    out = results_of(
        tmp_path / "out", base,
        {"base": [[1, 1, 11, 11], [1, 1, 1, 11]], "temperature-0.02": [[1, 11, 11, 11], [1, 1, 11, 6]]},
    )  # fmt: skip
    read = read_results(out)
    found = compare(read, TABLE, Comparison("warm", "cold"))
    assert found.seeds is not None and found.queries is not None
    assert (found.seeds.mean, found.seeds.seeds, found.paper) == (25.0, 2, 4.0)
    assert found.queries.mean == 25.0 and found.queries.low == 0.0 and found.queries.high <= 50.0
    page = write_report(out, tmp_path / "report", tables=TINY, command="traceir ablate tiny").read_text()
    assert "Warm against cold on invented_complex: +25.0 R@5 [+25.0, +25.0] over seeds" in page
    assert "; the paper on CIRR: +4.0. 2 seeds." in page and "Made by `traceir ablate tiny` on" in page
    table = (tmp_path / "report/tiny.md").read_text()
    assert "| cold | 2 | " in table and "| – / 46.00 / – |" in table


def test_the_report_holds_every_claim_of_every_table_and_its_verdict(tmp_path: Path, base: TrainConfig) -> None:
    """Made-up results of all variants; then half of them taken away."""
    out = tmp_path / "out"
    run_all(out, base, seeds=(0,))
    plan = json.loads((out / "ablation.json").read_text())
    (out / "ablation.json").write_text(json.dumps(plan | {"seeds": [0, 1]}))
    for variant in {variant.name: variant for table in TABLES for variant in table.variants}.values():
        for seed in (0, 1):
            run = Run(variant, seed, out / "runs" / variant.name / f"seed{seed}", base, ROWS)
            run.folder.mkdir(parents=True, exist_ok=True)
            about = {"format": 1, "variant": variant.name, "seed": seed, "identity": {}, "machine": "an invented machine"}
            run.result.write_text(json.dumps({**about, "seconds": {"train": 9.0}, "losses": {}, **fake_score(run)}))
    page = write_report(out, tmp_path / "report").read_text()
    assert "58 of 58 runs are there" in page and "an invented machine" in page
    verdicts = re.findall(r"^- \*\*(Reproduced|Not reproduced|Undecided|Confirmed|Refuted):\*\* (.*)$", page, re.MULTILINE)
    assert len(verdicts) == sum(len(table.claims) for table in TABLES)
    for table in TABLES:
        assert all(claim.text in page for claim in table.claims)
        assert f"]({table.id}.md)" in page and (tmp_path / "report" / f"{table.id}.svg").stat().st_size > 2000
    speeds = (tmp_path / "report/table2.md").read_text()
    assert "| always reasoning | 50 % / 50 % | 8.0 | – | 9 | 0.75 [0.75, 0.75] (the paper: 0.28)" in speeds
    runs = json.loads((tmp_path / "report/runs.json").read_text())
    assert len(runs["runs"]) == 58 and len(runs["claims"]) == len(verdicts) and "ranks" not in json.dumps(runs)
    again = write_report(out, tmp_path / "again")
    assert again.read_text() == page
    assert all(one.read_bytes() == (tmp_path / "report" / one.name).read_bytes() for one in again.parent.iterdir())

    for file in out.glob("runs/*/seed1/result.json"):
        file.unlink()
    (out / "runs/base/seed0/result.json").unlink()
    page = write_report(out, tmp_path / "part").read_text()
    assert "28 of 58 runs are there" in page and "not run yet" in page and "**Reproduced" not in page
    assert "| base | 0 | not run | not run | not run | – | – |" in (tmp_path / "part/better.md").read_text()


def test_a_folder_without_ablations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ablation.json is not there; run `traceir ablate TABLE"):
        write_report(tmp_path, tmp_path / "report")
