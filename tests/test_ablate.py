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
from traceir.lab import ablations
from traceir.lab.ablate import TwoStage, ablate, append_text, claim, list_tables, relative_speeds, score
from traceir.lab.ablate_report import Estimate, find_verdict, t_interval, write_report
from traceir.lab.ablations import AblationLine, AblationRun, Claim, Comparison, Table, Variant
from traceir.precision import Speed
from traceir.train.config import TrainConfig

ROWS = ("invented_complex", "invented_simple")
BASE, COLD = ablations.VARIANTS["base"], ablations.VARIANTS["temperature-0.02"]
LINES = (
    AblationLine("warm", BASE, "direct", {("complex", "R@5"): 50.0}),
    AblationLine("cold", COLD, paper={("complex", "R@5"): 46.0}),
)
CLAIMS = (Claim("Warm beats cold", (Comparison("warm", "cold"),)),)
TINY = (Table("tiny", "A tiny table", "Table 0", LINES, CLAIMS, against="warm"),)


@pytest.fixture
def base(tmp_path: Path) -> TrainConfig:
    (tmp_path / "data").mkdir()
    return TrainConfig(data=str(tmp_path / "data"), out="unused", steps=4)


def fake_train(config: TrainConfig) -> Path:
    folder = Path(config.out)
    (folder / "steps" / "000002").mkdir(parents=True, exist_ok=True)
    lines = [{"step": 1, "seconds": 2.0}, {"step": 2, "seconds": 5.0}, {"step": 3, "seconds": 1.5, "pairs/ret": 0.5}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (folder / "trained.txt").open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    return folder / "checkpoint"


def fake_score(run: AblationRun) -> dict[str, Any]:
    """Four queries a row; a better variant or seed has more of them among the first five."""
    if run.variant.work == "speed":
        seconds = {f"{name}:{route}": [1.0 + at, 2.0] for at, (name, route) in enumerate(ablations.TIMED)}
        return {"speed": dict.fromkeys(ROWS, relative_speeds(seconds))}
    hits = {"base": 3, "none": 1}.get(run.variant.name, 2) + (run.seed == 1 and run.variant.name == "base")
    return made_up([1] * hits + [11] * (4 - hits), run.variant.routes)


def made_up(ranks: list[int], routes: tuple[Route, ...] = ("auto",)) -> dict[str, Any]:
    shares = {f"hit@{k}": float(np.mean([rank <= k for rank in ranks])) for k in (1, 5, 10)}
    own = {"queries": 4, **shares, "reasoned": 0.5, "tokens_per_query": 8.0, "truncated": 0.0, "exact": None, "ranks": ranks}
    return {"data": "data-1", "routes": {route: dict.fromkeys(ROWS, own) for route in routes}}


def run_all(out: Path, base: TrainConfig, **options: Any) -> Any:
    fakes = {"tables": TINY, "seeds": (0, 1), "rows": ROWS, "poll": 0.01, "trains": fake_train, "scores": fake_score}
    return ablate(out=out, base=base, **fakes | options)


def trainings(out: Path) -> dict[str, int]:
    """How often each run was trained."""
    files = {str(file.parent.relative_to(out / "runs")): file for file in out.glob("runs/*/seed*/trained.txt")}
    return {name: len(file.read_text().split()) for name, file in files.items()}


def test_every_table_is_whole_and_sets_only_fields_that_exist() -> None:
    known = {field.name for field in fields(TrainConfig)}
    for table in ablations.TABLES:
        labels = [line.label for line in table.lines]
        named = {label for claim in table.claims for asked in claim.comparisons for label in (asked.better, asked.worse)}
        assert table.claims and len(set(labels)) == len(labels) and named | {table.against} <= set(labels), table.id
        for variant in table.variants:
            assert set(variant.settings) <= known and set(variant.uses) <= {own.name for own in table.variants}, variant.name
        assert all(line.route in line.variant.routes for line in table.lines)
    assert {table.paper for table in ablations.TABLES} >= {f"Table {n}" for n in (2, 4, 5, 6, 7, 8)}
    assert ablations.TABLES[0].line("adaptive").paper["simple", "speed"] == 8.25 / 15.68


def test_tables_are_chosen_by_name_and_listed_with_each_run_once() -> None:
    assert [table.id for table in ablations.choose_tables(["share", "table4"])] == ["table4", "share"]
    assert ablations.choose_tables(["all"]) == list(ablations.TABLES)
    with pytest.raises(InputError, match=r"table 'table9' is unknown .*choose all, or among table2"):
        ablations.choose_tables(["table9"])
    listed = list_tables(ablations.choose_tables(["table5", "symmetric"]), (0, 1, 2))
    assert "reasoning only: run reasoning, route auto" in listed and listed.endswith("5 runs x 3 seeds")


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
    assert result["losses"] == {"pairs/ret": 0.5} and result["seconds"]["train"] == 6.5, "added over both starts"
    assert not (tmp_path / "out/runs/base/seed0/steps").exists()
    run_all(tmp_path / "out", base, trains=train, seeds=(0, 1, 2))
    assert order[4:] == ["base/seed2", "temperature-0.02/seed2"]
    assert json.loads((tmp_path / "out/ablation.json").read_text())["seeds"] == [0, 1, 2]


def test_runs_that_use_others_wait_for_them_and_fail_with_them(tmp_path: Path, base: TrainConfig) -> None:
    pipeline, small = Variant("p", work="pipeline", uses=("base",)), Variant("s", preset="no-such-preset")
    lines = (AblationLine("pipeline", pipeline), AblationLine("small", small), AblationLine("base", BASE))
    table = Table("pair", "Two", "", lines, (), "base")

    def train(config: TrainConfig) -> Path:
        raise TrainError("step 3: loss is nan\non queries 8:1")

    outcome = run_all(tmp_path, base, tables=[table], seeds=(0,), trains=train)
    reasons = "TrainError: step 3: loss is nan on queries 8:1", "it needs base, seed 0, which failed"
    assert outcome.done == 0 and outcome.failed == {"base, seed 0": reasons[0], "p, seed 0": reasons[1]}
    assert outcome.skipped == {"s": "there is no preset no-such-preset"}
    page = write_report(tmp_path, tmp_path / "report", tables=TINY).read_text()
    assert "0 of 2 runs are there" in page and "- base, seed0: TrainError: step 3" in page
    outcome = run_all(tmp_path, base, tables=[table], seeds=(0,))
    assert outcome.done == 2 and not outcome.failed and trainings(tmp_path) == {"base/seed0": 1}


def test_another_configuration_is_refused_and_a_neutral_change_is_not(tmp_path: Path, base: TrainConfig) -> None:
    run_all(tmp_path / "out", base)
    for name in ("ablation.json", "runs/base/seed0/result.json"):  # fields have had other names
        file = tmp_path / "out" / name
        file.write_text(file.read_text().replace('"group"', '"family"'))
    run_all(tmp_path / "out", replace(base, threads=2, log_every=1))
    with pytest.raises(InputError, match=r"of another base configuration \(steps: 4 -> 5\); choose another --out"):
        run_all(tmp_path / "out", replace(base, steps=5))
    with pytest.raises(InputError, match="choose another --out"):
        run_all(tmp_path / "out", base, rows=("other", "rows"))
    (tmp_path / "data/meta.json").write_text('{"fingerprint": "new"}')
    with pytest.raises(InputError, match=r"base/seed0/result.json is of another configuration \(data: None -> 'new'\)"):
        run_all(tmp_path / "out", base)
    assert set(trainings(tmp_path / "out").values()) == {1}


def test_all_runs_have_the_precision_of_the_first(tmp_path: Path, base: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever machine they run on; folders of earlier releases, which always took bfloat16, go on."""
    seen: list[object] = []

    def train(config: TrainConfig) -> Path:
        seen.append(config.mixed_precision)
        return fake_train(config)

    for fast, seeds in ((False, (0,)), (True, (0, 1)), (False, (2,))):
        monkeypatch.setattr("traceir.train.config.bfloat16_on", lambda *_, fast=fast: Speed(fast, "made up"))
        if seeds == (2,):
            plan = json.loads((tmp_path / "out/ablation.json").read_text())
            plan["base"]["mixed_precision"] = True
            (tmp_path / "out/ablation.json").write_text(json.dumps(plan))
        run_all(tmp_path / "out", base, trains=train, seeds=seeds)
    assert seen == [False] * 4 + [True] * 2


@pytest.mark.slow
def test_a_kill_loses_only_the_run_in_progress(tmp_path: Path, base: TrainConfig) -> None:
    """The process is killed in its second training."""

    def train(config: TrainConfig) -> Path:
        folder = fake_train(config)
        time.sleep(60 if config.temperature == 0.02 else 0)
        return folder

    process = multiprocessing.get_context("fork").Process(target=run_all, args=(tmp_path, base), kwargs={"trains": train})
    process.start()
    while "temperature-0.02/seed0" not in trainings(tmp_path):
        assert process.is_alive()
        time.sleep(0.02)
    with claim(tmp_path / "runs/temperature-0.02/seed0") as claimed:
        assert not claimed
    process.kill()
    process.join()
    assert not (tmp_path / "runs/temperature-0.02/seed0/result.json").exists()
    outcome = run_all(tmp_path, base)
    assert outcome.done == 4 and trainings(tmp_path)["base/seed0"] == 1 and trainings(tmp_path)["temperature-0.02/seed0"] == 2


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


@pytest.mark.slow
def test_two_processes_share_the_runs(tmp_path: Path, base: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("traceir.lab.ablate.multiprocessing.get_context", lambda _: FORKS)
    outcome = run_all(tmp_path, base, jobs=2, trains=met_train)
    assert outcome.done == outcome.planned == 4 and not outcome.failed
    assert len(trainings(tmp_path)) == 4 and set(trainings(tmp_path).values()) == {1}


class Writer:
    """Writes the same for every query by the route `reason`."""

    def encode_queries(self, queries: list[Query], *, route: Route = "auto", progress: bool = False) -> list[Encoding]:
        assert route == "reason"
        return [Encoding(np.ones(2, np.float32), "reason", "blue ball", 3, 0.5, False)]


def test_the_pipeline_reads_the_written_words_into_the_second_models_vector(model: Any) -> None:
    from traceir.encoder import Encoder

    second, query = Encoder(model), Query.of(text="make one red", target="image")
    (encoded,) = TwoStage(Writer(), second).encode_queries([query], route="reason")
    (wanted,) = second.encode_queries([Query.of(text="make one red blue ball", target="image")], route="direct")
    assert encoded.reasoning == "blue ball" and encoded.route == "reason"
    np.testing.assert_allclose(encoded.vector, wanted.vector, atol=1e-6)
    assert append_text(Query((), instruction="find"), "a blue one").parts == ("a blue one",)
    assert append_text(query, "") is query


def test_runs_are_scored_by_their_routes_and_timed(
    model: Any, folder: Path, tmp_path: Path, base: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from traceir.model import save

    monkeypatch.setattr("traceir.lab.ablate.SPEED_QUERIES", 3)
    rows, (table,) = ("cirr_task7", "mscoco_task3"), ablations.choose_tables(["table2"])
    runs, _ = ablations.plan_runs([table], tmp_path, replace(base, data=str(folder)), (0,), rows)
    for used in runs[-1].uses:
        save(model, used / "checkpoint")
    speeds = score(runs[-1])["speed"]
    assert runs[-1].variant.name == "speed" and set(speeds) == set(rows)
    for own in speeds.values():
        assert own["queries"] == 3 and own["relative"]["none:direct"] == 1.0
        assert set(own["relative"]) == {f"{line.variant.name}:{line.route}" for line in table.lines}
        assert all(len(times) == 5 for times in own["seconds"].values())
    assert relative_speeds({"d": [1.0, 2.0, 1.0], "r": [4.0, 4.0, 2.0]})["relative"] == {"d": 1.0, "r": 0.5}
    routes = score(replace(runs[0], variant=replace(runs[0].variant, routes=("direct",))))["routes"]
    own = routes["direct"]["cirr_task7"]
    assert set(routes) == {"direct"} and set(routes["direct"]) == set(rows)
    assert len(own["ranks"]) == own["queries"] > 0 and own["hit@5"] == np.mean(np.array(own["ranks"]) <= 5)


@pytest.mark.parametrize(
    ("values", "interval"),
    [
        ([1.0, 2.0, 6.0], (3 - 6.573, 3 + 6.573)),  # deviation sqrt(7), t(2) 4.303: 3 +- 4.303 * sqrt(7 / 3)
        ([5.0], (None, None)),
        ([2.0, 2.0], (2.0, 2.0)),
    ],
)
def test_the_t_interval_is_that_of_the_textbook(values: list[float], interval: tuple[Any, Any]) -> None:
    estimate = t_interval(values)
    assert (estimate.mean, estimate.seeds) == (np.mean(values), len(values))
    assert (estimate.low, estimate.high) == pytest.approx(interval, abs=1e-3)


@pytest.mark.parametrize(
    ("intervals", "verdict"),
    [
        ([(1.0, 3.0), (0.1, 9.0)], "reproduced"),
        ([(1.0, 3.0), (-0.1, 9.0)], "undecided"),
        ([(0.0, 3.0)], "undecided"),
        ([(1.0, 3.0), (-5.0, -0.1)], "not reproduced"),
        ([(None, None)], "undecided"),
        ([(1.0, 3.0), None], "not run"),
    ],
)
def test_a_claim_holds_only_if_every_comparison_does(intervals: list[Any], verdict: str) -> None:
    assert find_verdict([pair and Estimate(0.0, *pair, 2) for pair in intervals]) == verdict


@pytest.mark.parametrize(
    ("cold", "sentence", "line"),
    [
        # 50 and 75 against 25 and 75: differences are paired by seed, whatever its own level, and by query.
        ([[1, 11, 11, 11], [1, 1, 11, 6]], "**Reproduced:** Warm beats cold. Warm against cold on invented_complex: +25.0 R@5 "
         "[+25.0, +25.0] over seeds, [+0.0, +50.0] over queries; the paper on CIRR: +4.0. 2 seeds.", "| cold | 2 | "),
        ([[1, 1, 1, 11], [1, 1, 1, 1]], "**Not reproduced:** Warm beats cold", "| 87.5 [-71.3, 246.3] | +25.0 [+25.0, +25.0] |"),
        ([[1, 11, 11, 11], [1, 1, 1, 1]], "**Undecided:** Warm beats cold", "| – / 46.00 / – |"),
    ],
)  # fmt: skip
def test_the_sentence_follows_the_figures(
    tmp_path: Path, base: TrainConfig, cold: list[list[int]], sentence: str, line: str
) -> None:
    hits = {"base": [[1, 1, 11, 11], [1, 1, 1, 11]], "temperature-0.02": cold}
    run_all(tmp_path, base, scores=lambda run: made_up(hits[run.variant.name][run.seed], run.variant.routes))
    page = write_report(tmp_path, tmp_path / "report", tables=TINY, command="traceir ablate tiny").read_text()
    assert sentence in page and "Made by `traceir ablate tiny` on" in page
    assert line in (tmp_path / "report/tiny.md").read_text()


def test_the_report_holds_every_claim_and_tells_what_is_not_run(tmp_path: Path, base: TrainConfig) -> None:
    """Made-up results of two tables; then half of them taken away."""
    with pytest.raises(InputError, match=r"ablation.json is not there; run `traceir ablate TABLE"):
        write_report(tmp_path, tmp_path / "report")
    run_all(tmp_path, base)
    tables = ablations.choose_tables(["table2", "better"])
    for run in ablations.plan_runs(tables, tmp_path, base, (0, 1), ROWS)[0]:
        write_result(run)
    page, report = write_report(tmp_path, tmp_path / "report", tables=tables).read_text(), tmp_path / "report"
    assert "16 of 16 runs are there" in page and "an invented machine" in page
    verdicts = re.findall(r"^- \*\*(Reproduced|Not reproduced|Undecided|Confirmed|Refuted):\*\* (.*)$", page, re.MULTILINE)
    assert len(verdicts) == sum(len(table.claims) for table in tables)
    assert all(f"]({table.id}.md)" in page and (report / f"{table.id}.svg").stat().st_size > 2000 for table in tables)
    line = "| always reasoning | 50 % / 50 % | 8.0 | – | 9 | 0.75 [0.75, 0.75] (the paper: 0.28)"
    assert line in (report / "table2.md").read_text()
    figures = json.loads((report / "runs.json").read_text())
    assert len(figures["runs"]) == 18 and len(figures["claims"]) == len(verdicts) and "ranks" not in json.dumps(figures)
    again = write_report(tmp_path, tmp_path / "again", tables=tables).parent
    assert all((again / name).read_bytes() == (report / name).read_bytes() for name in ("README.md", "runs.json", "better.svg"))

    for file in [*tmp_path.glob("runs/*/seed1/result.json"), tmp_path / "runs/base/seed0/result.json"]:
        file.unlink()
    page = write_report(tmp_path, tmp_path / "part", tables=tables).read_text()
    assert "7 of 16 runs are there" in page and "not run yet" in page and "**Reproduced" not in page
    assert "| base | 0 | not run | not run | not run | – | – |" in (tmp_path / "part/better.md").read_text()


def write_result(run: AblationRun) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    about = {"format": 1, "variant": run.variant.name, "seed": run.seed, "identity": {}, "machine": "an invented machine"}
    run.result.write_text(json.dumps({**about, "seconds": {"train": 9.0}, "losses": {}, **fake_score(run)}))
