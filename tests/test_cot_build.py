"""The build of M-BEIR-CoT: stages, resuming, shares, bad input, assembly; and all of it through HTTP, with kills."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cot_fakes import Chat, candidate, completion, failure, label, line, train_split
from fake_sglang import served

from traceir.cli.main import main
from traceir.cli.terminal import parse_shard
from traceir.cot.ask import TeacherQuestion, blocks
from traceir.cot.build import PATIENCE, BuildSummary, Work, is_finished, run_parts, write_manifests
from traceir.cot.outcomes import read_outcomes
from traceir.cot.plan import STAGES, BuildConfig, begin, gather_captions, read_config
from traceir.cot.products import assemble
from traceir.cot.reach import Reach, estimate, open_work
from traceir.cot.rules import RuleFilter, RuleLimits
from traceir.cot.scripted.oracle import Oracle
from traceir.cot.scripted.teacher_server import MODEL, ScriptedOptions, ScriptedTeacher, running
from traceir.cot.source import CaseSource, check_tasks, find_captions, find_parts, read_captions
from traceir.cot.teachers.teacher import Reply, UnansweredError
from traceir.data.cot import read_cot
from traceir.errors import DataError, InputError, TeacherError
from traceir.serve.security import AccessRules, SecurityMiddleware

COLOURS = ("red", "green", "blue", "white", "black", "amber", "violet", "silver", "golden", "brown", "pink", "grey")
LIMITS = RuleLimits(reasoning_least=4)


@pytest.fixture(scope="module")
def boats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 changes of images of boats, the first two of one image and text, and then 6 captions."""
    queries, pool, labels = [], [], []
    for number in range(len(COLOURS)):
        shown = 0 if number == 1 else number
        colour, image = COLOURS[shown], f"mbeir_images/from{shown}.png"
        queries.append(line(f"8:{number + 1}", f"paint the boat {colour}", image, f"8:{number + 100}", 7))
        pool.append(candidate(f"8:{number + 100}", None, f"mbeir_images/to{number}.png"))
        reasoning = f"the boat is plain; the paint is {colour}; the boat becomes {colour}"
        labels.append(label(f"8:{number + 1}", reasoning, f"a {colour} boat"))
    for number in range(6):
        queries.append(line(f"8:{number + 50}", f"a boat in {COLOURS[number]}", None, f"8:{number + 100}", 0))
        labels.append(label(f"8:{number + 50}"))
    return train_split(tmp_path_factory.mktemp("boats") / "data", "cirr", queries, pool, labels)


class Script:
    """Answers at once; `fails` are qids whose reasoning gets no answer, `odd` maps (stage, qid) to what is said instead."""

    def __init__(self, fails: tuple[str, ...] = (), odd: dict[tuple[str, str], str] | None = None) -> None:
        self.fails, self.odd, self.asked = fails, odd or {}, list[tuple[str, str, int]]()

    async def ask(self, question: TeacherQuestion) -> Reply:
        self.asked.append((question.stage, question.qid, question.attempt))
        if question.stage == "reason" and question.qid in self.fails:
            raise UnansweredError(f"no answer to {question.qid}")
        shown = blocks("".join(part for part in question.parts if isinstance(part, str)))
        text = self.odd.get((question.stage, question.qid)) or self.say(question.stage, shown)
        return Reply(text, "stop", "script", 10, 5)

    def say(self, stage: str, shown: dict[str, str]) -> str:
        if stage == "assess":
            return json.dumps({"complex": shown["task"] == "cirr_task7", "reason": "why", "confidence": 0.9})
        if stage == "verify":
            return json.dumps({"verdict": "yes", "confidence": 0.8, "reason": "fits"})
        return f"<reasoning>the boat is plain and then: {shown['query']}</reasoning><answer>{shown['query'][10:]}</answer>"

    def stop(self, error: TeacherError, worthless: Iterable[str] = ()) -> None:
        return

    def status(self) -> str:
        return ""

    async def close(self) -> None:
        return


def run(boats: Path, out: Path, script: Script, shard: tuple[int, int] = (0, 1), **settings: Any) -> BuildSummary:
    config = BuildConfig(str(boats), "script", part_size=4, limits=LIMITS, **settings)
    begin(out, config)
    parts = [part for part in find_parts(boats, 4)[shard[0] :: shard[1]] if not is_finished(out, part)]
    rules = RuleFilter(LIMITS, find_captions(boats, None))
    with closing(CaseSource(boats, config.tasks)) as source:
        return run_parts(Work(config, out, source, config.questions(), rules, script, script), parts, progress=False)


def files(folder: Path) -> dict[str, str]:
    """Digests of the stage files and of the data set."""
    paths = [path for name in (*STAGES, "dataset") for path in (folder / name).glob("*.*") if path.name != "README.md"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def test_parts_cover_every_line_once_and_captions_come_from_the_pairs_of_the_folder(boats: Path, tmp_path: Path) -> None:
    whole = [case.record.qid for part in find_parts(boats, 1000) for case in CaseSource(boats).cases(part)]
    small = [case.record.qid for part in find_parts(boats, 5) for case in CaseSource(boats).cases(part)]
    assert len(whole) == 18 and small == whole
    captions = find_captions(boats, None)
    assert captions["mbeir_images/to3.png"] == "a boat in white" and "mbeir_images/to9.png" not in captions
    own = tmp_path / "captions.jsonl"
    own.write_text('{"img_path": "mbeir_images/to9.png", "caption": "mine"}\n{"img_path": "else.png", "caption": "no"}\n')
    assert find_captions(boats, own)["mbeir_images/to9.png"] == "mine" and "else.png" not in find_captions(boats, own)
    with pytest.raises(InputError, match=r"'cirr_task6' .* cirr_task0, cirr_task7"):
        check_tasks(boats, ["cirr_task6"])


def test_outcomes_say_what_became_of_every_query_and_assembly_mixes_direct_and_kept(boats: Path, tmp_path: Path) -> None:
    odd = {
        ("assess", "8:50"): "no idea",
        ("reason", "8:3"): "I'm sorry, but I can't help with that.",
        ("verify", "8:4"): '{"verdict": "yes", "confidence": 0.7, "reason": "perhaps"}',
        ("verify", "8:5"): "hm",
    }
    script = Script(odd=odd)
    summary = run(boats, tmp_path, script, attempts=2)
    assert summary.parts == 5 and not summary.unfinished
    outcomes = {outcome.case.record.qid: outcome for outcome in read_outcomes(tmp_path)}
    assert [outcomes[f"8:{number}"].rule for number in (1, 2, 3, 4, 5)] == ["", "duplicate", "refusal", "verifier", "teacher"]
    assert outcomes["8:50"].rule == "teacher" and outcomes["8:51"].status == "direct" and outcomes["8:6"].status == "kept"
    assert outcomes["8:6"].reasoning.startswith("the boat is plain") and "<" not in outcomes["8:6"].reasoning
    assert script.asked.count(("reason", "8:3", 1)) == 1, "a broken reply is asked for again"
    assert not [question for question in script.asked if question[:2] == ("verify", "8:3")]
    provenance = json.loads(outcomes["8:6"].provenance)
    assert provenance["teacher"] == "script" and provenance["prompts"] == "cot-1" and provenance["prompt_tokens"] == 30
    funnel = assemble(tmp_path).as_json()["all"]
    assert funnel == {
        "complex": 12, "direct": 5, "dropped": 5, "kept": 8, "queries": 18,
        "rule:duplicate": 1, "rule:refusal": 1, "rule:teacher": 2, "rule:verifier": 1,
    }  # fmt: skip
    pairs = {data.name: data for data in read_cot(tmp_path / "dataset")}
    assert len(pairs["cirr_task7"]) == 8 and len(pairs["cirr_task0"]) == 5
    label = pairs["cirr_task7"].rows[0].label
    assert label is not None and label.answer == "boat red" and label.z == 1
    assert assemble(tmp_path, dropped="direct", format="jsonl").as_json()["all"] == funnel
    assert len({data.name: data for data in read_cot(tmp_path / "dataset")}["cirr_task7"]) == 12
    assert not list((tmp_path / "dataset").glob("*.parquet"))


def test_what_lacks_answers_is_left_unfinished_and_only_that_is_done_again(boats: Path, tmp_path: Path) -> None:
    first = run(boats, tmp_path / "a", Script(fails=("8:6",)))
    assert list(first.unfinished) == ["cirr-00001"] and first.parts == 4
    with pytest.raises(DataError, match="1 of 5 parts are not finished"):
        list(read_outcomes(tmp_path / "a"))
    assert len(list(read_outcomes(tmp_path / "a", partial=True))) == 14
    again = Script()
    assert run(boats, tmp_path / "a", again).parts == 1
    assert {qid for stage, qid, _ in again.asked} == {"8:5", "8:6", "8:7", "8:8"}
    assert not [question for question in again.asked if question[0] == "assess"], "the stage that was done is not asked for again"
    for number in (2, 0, 1):  # shares, in any order
        run(boats, tmp_path / "b", Script(), (number, 3))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    write_manifests(tmp_path / "b", find_parts(boats, 4))
    assert "verify/manifest.json" in files(tmp_path / "b")


def test_tasks_can_be_chosen_and_taken_as_complex_unasked_and_other_settings_are_refused(boats: Path, tmp_path: Path) -> None:
    script = Script()
    run(boats, tmp_path, script, tasks=("cirr_task7",), complex=("cirr_task7",))
    assert not [question for question in script.asked if question[0] == "assess"]
    assert {outcome.case.task for outcome in read_outcomes(tmp_path)} == {"cirr_task7"}
    config = read_config(tmp_path)
    begin(tmp_path, config)
    with pytest.raises(InputError, match=r"limits.reasoning_least = 4, now it is 16"):
        begin(tmp_path, replace(config, limits=RuleLimits()))
    for share in ("2/2", "1", "-1/2", "a/b", "9" * 5000 + "/4", "0/²"):
        with pytest.raises(InputError, match="--shard"):
            parse_shard(share)


def test_a_dry_run_counts_requests_and_tokens_and_asks_nothing(
    boats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = BuildConfig(str(boats), "script", complex=("cirr_task7",))
    with closing(CaseSource(boats)) as source:
        stages = {stage.stage: stage for stage in estimate(config, source, find_parts(boats, 4), complex_share=0.5)}
    assert stages["assess"].requests == 6, "complex tasks are not asked about"
    assert stages["reason"].requests == stages["verify"].requests == round(12 + 0.5 * 6)
    assert stages["verify"].prompt_tokens > stages["reason"].prompt_tokens > 15 * 40
    assert main([*command_of(boats, tmp_path / "new", "http://127.0.0.1:9/v1"), "--dry-run", "--price-in", "1"]) == 0
    assert "requests" in capsys.readouterr().out and not (tmp_path / "new").exists()


def test_bad_input_is_one_line_that_names_it(boats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = command_of(boats, tmp_path, "http://127.0.0.1:9/v1")
    for more, shown in (
        (["--tasks", "oven_task6"], "oven_task6"),
        (["--teacher", "localhost:8000"], "localhost:8000"),
        (["--set", "limits.most=3"], "limits"),
        (["--spend-limit", "3"], "prices"),
        (["--extra", "[1]"], "[1]"),
        (["--data", str(tmp_path / "nowhere")], "nowhere"),
    ):
        assert main([*base, *more]) == 2
        assert shown in capsys.readouterr().err.strip()


# Through HTTP and the command line


def command_of(boats: Path, out: Path, url: str) -> list[str]:
    command = ["reasoning", "build", "--data", str(boats), "--out", str(out), "--teacher", url, "--model", MODEL]
    settings = (f"--set={setting}" for setting in ("attempts=1", "limits.reasoning_least=4", "part_size=4"))
    return [*command, "--concurrency", "8", *settings]


def kept_answers(out: Path) -> int:
    file = out / "journal" / "answers.sqlite"
    if file.exists():
        with closing(sqlite3.connect(file)) as database, suppress(sqlite3.OperationalError):
            return int(database.execute("SELECT count(*) FROM answers").fetchone()[0])
    return 0


@pytest.mark.slow
def test_a_build_through_http_survives_faults_and_a_kill(boats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = {"faults": 0.3, "fault_seed": 5, "stall": 0.05, "retry_after": 0.01}
    with running(boats, **faults) as url:
        assert main(command_of(boats, tmp_path / "whole", url)) == 0
        assert "cirr_task7" in capsys.readouterr().out
    log = tmp_path / "teacher.jsonl"
    with running(boats, **faults, latency=0.05, log=str(log)) as url:
        command = [sys.executable, "-m", "traceir", *command_of(boats, tmp_path / "killed", url)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and kept_answers(tmp_path / "killed") < 6:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kept = kept_answers(tmp_path / "killed")
        assert main(command_of(boats, tmp_path / "killed", url)) == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    paid = [line["key"] for line in map(json.loads, log.read_text().splitlines()) if line["event"] == "end" and line["paid"]]
    assert kept > 0 and len(paid) - len(set(paid)) <= 16, "only what was in flight, or not on the disk yet, is paid twice"


@pytest.mark.slow
def test_ray_makes_the_same_files_from_the_same_functions(boats: Path, tmp_path: Path) -> None:
    with running(boats) as url:
        assert main([*command_of(boats, tmp_path / "ray", url), "--engine", "ray", "--workers", "2"]) == 0
        assert main(command_of(boats, tmp_path / "local", url)) == 0
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    assert kept_answers(tmp_path / "ray") >= kept_answers(tmp_path / "local")


class Speaking:
    """The scripted teacher on a thread of this process; `teacher.options` are how it speaks from now on."""

    def __init__(self, root: Path) -> None:
        self.teacher, self.url = ScriptedTeacher(Oracle(root), ScriptedOptions()), ""

    @property
    def paid(self) -> int:
        return self.teacher.log.requests


@pytest.fixture(scope="module")
def shared(boats: Path) -> Iterator[Speaking]:
    speaking = Speaking(boats)
    with served(SecurityMiddleware(speaking.teacher.app, AccessRules.of("127.0.0.1"))) as address:
        speaking.url = f"{address}/v1"
        yield speaking


@pytest.fixture
def speaking(shared: Speaking) -> Speaking:
    shared.teacher.options = ScriptedOptions()
    return shared


@pytest.fixture(scope="module")
def plain_rows(boats: Path, shared: Speaking, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the data set that a teacher without thoughts makes."""
    out = tmp_path_factory.mktemp("plain")
    shared.teacher.options = ScriptedOptions()
    assert main(command_of(boats, out, shared.url)) == 0
    return {name: digest for name, digest in files(out).items() if name.endswith(".parquet")}


@pytest.mark.slow
def test_a_wrong_key_an_unreachable_teacher_and_a_spent_limit_end_in_one_line_and_the_folder_goes_on(
    boats: Path, tmp_path: Path, speaking: Speaking, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "invented-key")
    speaking.teacher.options = ScriptedOptions(key="another-key")
    assert main(command_of(boats, tmp_path, speaking.url)) == 1
    error = capsys.readouterr().err
    assert "refuses the API key" in error and "invented-key" not in error and "another-key" not in error
    assert main(command_of(boats, tmp_path, "http://127.0.0.1:9/v1")) == 1
    assert "cannot be reached" in capsys.readouterr().err
    speaking.teacher.options = ScriptedOptions(key="invented-key")
    prices = ["--price-in", "100", "--price-out", "100", "--spend-limit"]
    assert main([*command_of(boats, tmp_path, speaking.url), *prices, "0.3"]) == 1
    assert "spend limit" in capsys.readouterr().err
    assert main([*command_of(boats, tmp_path, speaking.url), *prices, "100"]) == 0


@pytest.mark.parametrize("style", ["harmony", "texts"])
def test_a_teacher_that_thinks_makes_the_same_data(
    style: str, boats: Path, tmp_path: Path, speaking: Speaking, plain_rows: dict[str, str]
) -> None:
    speaking.teacher.options, before = ScriptedOptions(thinking=style), speaking.paid
    assert main(command_of(boats, tmp_path, speaking.url)) == 0
    assert {name: digest for name, digest in files(tmp_path).items() if name.endswith(".parquet")} == plain_rows
    assert speaking.paid - before == 17 + 11 + 12, "as without thoughts: two queries are one question, no try is paid twice"


def test_first_replies_of_no_use_end_a_build_and_a_mended_teacher_goes_on(
    boats: Path, tmp_path: Path, speaking: Speaking, capsys: pytest.CaptureFixture[str]
) -> None:
    speaking.teacher.options, before = ScriptedOptions(thinking="cut"), speaking.paid
    command = [*command_of(boats, tmp_path, speaking.url), "--set=attempts=4", "--concurrency=2"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "replies to stage 'assess' and none of use" in error and "cut at max_tokens" in error and "max_tokens=" in error
    assert PATIENCE - 4 <= speaking.paid - before <= PATIENCE + 6, "72 would have been asked"
    before = speaking.paid
    assert main([*command, "--patience=0", f"--out={tmp_path / 'on'}"]) == 2 and speaking.paid - before > PATIENCE + 6
    error = capsys.readouterr().err
    assert "all 18 queries were dropped: 18 x the reply cannot be read: it was cut at max_tokens" in error
    assert "no training queries" not in error and not (tmp_path / "on" / "dataset").exists()
    funnel = json.loads((tmp_path / "on" / "funnel.json").read_text())["all"]
    assert funnel == {"dropped": 18, "queries": 18, "rule:teacher": 18}
    speaking.teacher.options = ScriptedOptions(thinking="think")
    assert main(command) == 0
    assert len(list(read_outcomes(tmp_path))) == 18 and not [own for own in read_outcomes(tmp_path) if own.rule == "teacher"]


def test_a_teacher_that_refuses_every_question_is_quoted(boats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Chat()
    server.script = lambda number, body: failure(400, f"Unsupported parameter: 'max_tokens' in {1000 + number}.")
    with served(server.app) as address:
        assert main([*command_of(boats, tmp_path, f"{address}/v1"), "--patience=9", "--concurrency=1"]) == 1
        error = capsys.readouterr().err
        assert "9 x 400: Unsupported parameter: ... in ...." in error and "--extra" in error and len(server.bodies) <= 12
        server.script = lambda number, body: (200, {}, completion("I would say so."))
        assert main([*command_of(boats, tmp_path, f"{address}/v1"), "--patience=0"]) == 2, "what was refused is asked anew"
        assert "18 x the reply cannot be read: it holds no whole JSON object" in capsys.readouterr().err


def test_no_complex_query_kept_is_no_success(boats: Path, tmp_path: Path) -> None:
    odd = {("verify", f"8:{number}"): '{"verdict": "hm", "confidence": 1}' for number in range(1, 13)}
    run(boats, tmp_path, Script(odd=odd), attempts=1)
    assert main(["reasoning", "assemble", str(tmp_path)]) == 1
    assert assemble(tmp_path).problem() == (
        "none of 12 complex queries was kept: 12 x the reply cannot be read: its verdict is neither yes nor no"
    )


def test_an_interrupt_asks_nothing_more_of_what_waits(boats: Path, tmp_path: Path, speaking: Speaking) -> None:
    speaking.teacher.options, before = ScriptedOptions(latency=0.3), speaking.paid
    config = BuildConfig(str(boats), MODEL, part_size=4, limits=LIMITS)
    begin(tmp_path, config)
    done = threading.Event()

    def interrupt() -> None:
        while speaking.paid - before < 2 and not done.is_set():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with open_work(config, tmp_path, Reach(speaking.url, concurrency=2), "w") as work:
        thread.start()
        summary = run_parts(work, find_parts(boats, 4), progress=False)
    done.set()
    thread.join()
    assert "interrupted" in summary.stopped and speaking.paid - before <= 8


LONE = "two steps \ud83d and a \x00"


def test_a_build_goes_on_from_the_journal_of_an_older_release(boats: Path, tmp_path: Path, speaking: Speaking) -> None:
    assert main(command_of(boats, tmp_path, speaking.url)) == 0
    cache = tmp_path / "journal" / "answers.sqlite"
    with closing(sqlite3.connect(cache)) as database:
        database.row_factory = sqlite3.Row
        rows = [dict(row) for row in database.execute("SELECT * FROM answers")]
    cache.unlink()
    for row in rows:
        row |= {"model": row["model"] + "\udc80", "prompt_tokens": 10**400}
        if row["stage"] == "assess":
            row["text"] = json.dumps(json.loads(row["text"]) | {"reason": LONE})
        row["text"] = row["text"].replace("</reasoning>", f" {LONE}</reasoning>")
    cache.with_name("0000-of-0001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for stage in STAGES:
        for file in (tmp_path / stage).glob("*"):
            file.unlink()
    before = speaking.paid
    assert main([*command_of(boats, tmp_path, speaking.url), "--price-in=1"]) == 0
    assert speaking.paid == before, "all is replayed"
    assert {outcome.verdict for outcome in read_outcomes(tmp_path)} == {True, None}
    assert main(["reasoning", "report", str(tmp_path)]) == 0
    for format in ("parquet", "jsonl"):
        assemble(tmp_path, format=format)
        texts = [sample.label.reasoning or "" for data in read_cot(tmp_path / "dataset") for sample in data.rows]
        assert any(text.endswith("two steps \ufffd and a \ufffd") for text in texts)


def test_queries_pools_captions_and_templates_with_half_pairs(boats: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(boats, data)
    for file in (data / "query/train/mbeir_cirr_train.jsonl", data / "cand_pool/global/mbeir_union_train_cand_pool.jsonl"):
        text = file.read_text().replace("paint the boat", "paint the boat \\ud800\\u0000")
        file.write_text(text.replace('"txt": null', '"txt": "x\\udfff"'))
    captions, templates = tmp_path / "captions.jsonl", tmp_path / "templates.json"
    captions.write_bytes(b'\xef\xbb\xbf{"img_path": "mbeir_images/to9.png", "caption": "a \\ud83d boat \xff\xed\xa0\x80"}\n')
    templates.write_bytes(b'\xef\xbb\xbf{"visual": "look \\udc00"}')
    run(data, tmp_path / "out", Script(), captions=str(captions), templates=str(templates))
    shown = read_captions(gather_captions(tmp_path / "out", read_config(tmp_path / "out")))
    assert shown["mbeir_images/to9.png"].startswith("a \ufffd boat \ufffd")
    assert sum(assemble(tmp_path / "out").as_json()["all"][name] for name in ("direct", "kept")) > 6
    assert any("\ufffd" in (own.record.text or "") for pairs in read_cot(tmp_path / "out" / "dataset") for own in pairs.rows)
    captions.write_text('{"img_path": ["a"], "caption": "b"}\n')
    with pytest.raises(DataError, match=r"captions.jsonl:1"):
        read_captions(captions, {"x"})
    captions.write_text('{"image": "a", "caption": "b"}\n')
    with pytest.raises(DataError, match=r"captions.jsonl:1: it has no 'img_path'; give a file of JSON lines"):
        read_captions(captions, {"x"})
