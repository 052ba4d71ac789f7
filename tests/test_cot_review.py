"""The review of M-BEIR-CoT by people: the list, the decisions on disk, what follows from them, and the guards of its server."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from traceir.cot.ask import CotCase
from traceir.cot.outcomes import CotOutcome
from traceir.cot.review.decisions import Decision, Journal, read_decisions, reviewers
from traceir.cot.review.review import (
    agree,
    agreement_table,
    choose,
    kappa,
    open_sample,
    sample_hash,
    settle,
)
from traceir.cot.review.review_server import OPEN_FILES, ReviewSession, app_of
from traceir.data.mbeir import Candidate, Record
from traceir.errors import DataError, InputError


def outcome(
    number: int, rule: str = "", *, root: Path = Path("nowhere"), task: str = "cirr_task7", sure: float = 0.9, text: str = ""
) -> CotOutcome:
    """An invented outcome: kept where `rule` is "", else dropped by it. Its picture would be `pictures/{number}.png`."""
    qid = f"7:{number}"
    record = Record(qid, text or f"make hat {number} blue", f"pictures/{number}.png", "image,text", (f"7:{number}0",), (), 7)
    targets = (
        Candidate(f"7:{number}0", None, f"pictures/{number}.png", "image"),
        Candidate(f"7:{number}1", "a second hat", None, "text"),
    )
    asked = rule in ("", "verifier")
    return CotOutcome(
        case=CotCase(record, task, "Find the changed hat", targets, root),
        z=1,
        assessment="an operation on a picture",
        confidence=0.9,
        reasoning="" if rule == "tags" else f"The hat {number} is red; it becomes blue and keeps its brim.",
        answer="" if rule == "tags" else f"a blue hat {number}",
        raw=f"<reasoning>hat {number}</reasoning>",
        status="dropped" if rule else "kept",
        rule=rule,
        detail=f"broke {rule}" if rule else "",
        verdict=not rule if asked else None,
        verdict_confidence=sure if asked else -1.0,
        verdict_reason="it fits" if asked else "",
        provenance='{"teacher": "invented"}',
    )


def judged(one: CotOutcome, decision: str, **more: str) -> Decision:
    return Decision(one.case.record.qid, one.case.task, decision, sample_hash(one), **more)


def write(out: Path, reviewer: str, *decisions: Decision) -> None:
    journal = Journal(out, reviewer)
    for one in decisions:
        journal.add(one)
    journal.close()


# Sampling


def test_choose_draws_each_stratum_alike_whatever_the_order_of_the_stream() -> None:
    stream = [outcome(n, ("", "language", "verifier")[n % 3]) for n in range(90)] + [outcome(200, task="fashioniq_task7")]
    stream.append(replace(outcome(300), status="direct", z=0))
    chosen = choose(stream, per_stratum=5, seed=3)
    assert chosen == choose(reversed(stream), per_stratum=5, seed=3) != choose(stream, per_stratum=5, seed=4)
    kinds = {one.stratum: one.size for one in chosen}
    assert kinds == {
        "cirr_task7 / kept": 30,
        "cirr_task7 / dropped / language": 30,
        "cirr_task7 / dropped / verifier": 30,
        "fashioniq_task7 / kept": 1,
    }
    assert Counter(one.stratum for one in chosen).most_common()[-1][1] == 1 and len(chosen) == 16
    assert len({one.stratum for one in chosen[:4]}) == 4, "the strata come in turn"
    assert {one.how for one in chosen} == {"random"}
    fewer = [one for one in choose(stream, per_stratum=2, seed=3) if one.stratum == "cirr_task7 / kept"]
    assert fewer == [one for one in chosen if one.stratum == "cirr_task7 / kept"][:2], "a beginning is a draw too"


def test_choose_gives_every_outcome_the_same_chance() -> None:
    stream = [outcome(n) for n in range(10)]
    drawn = Counter(one.outcome.case.record.qid for seed in range(1000) for one in choose(stream, per_stratum=3, seed=seed))
    assert len(drawn) == 10 and all(240 < times < 360 for times in drawn.values())  # 300 expected, 14.5 standard deviation


def test_doubt_comes_first_and_is_marked() -> None:
    sure = [0.99, 0.72, 0.2, 0.66, 0.9]
    stream = [outcome(n, sure=sure[n]) for n in range(5)] + [outcome(n, "language") for n in range(5, 9)]
    chosen = choose(stream, per_stratum=3, order="doubt")
    kept = [one for one in chosen if one.outcome.status == "kept"]
    assert [one.outcome.verdict_confidence for one in kept] == [0.72, 0.66, 0.9]
    assert {one.how for one in kept} == {"doubt"}
    assert {one.how for one in chosen if one.outcome.rule == "language"} == {"random"}
    with pytest.raises(InputError, match="order 'guess'"):
        choose(stream, per_stratum=3, order="guess")


def test_the_list_stays_the_same_after_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = [outcome(n) for n in range(40)]
    first = open_sample(tmp_path, stream, per_stratum=6, order="random", seed=1)
    grown = [outcome(n) for n in range(100, 900)] + stream
    assert [one.outcome for one in open_sample(tmp_path, grown, per_stratum=6, order="random", seed=1)] == [
        o.outcome for o in first
    ]
    assert not caplog.records
    again = open_sample(tmp_path, stream[1:], per_stratum=9, order="doubt", seed=2)
    assert {one.outcome for one in again} == {one.outcome for one in first} - {stream[0]}
    assert "remove it for a fresh list" in caplog.text
    (tmp_path / "review" / "sample.json").write_text("{")
    with pytest.raises(DataError, match=r"sample\.json.*remove it"):
        open_sample(tmp_path, stream, per_stratum=6, order="random", seed=1)


# Decisions


def test_a_torn_last_line_is_cut_off_and_the_rest_stands(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = outcome(1), outcome(2)
    write(tmp_path, "ada", judged(one, "keep"), judged(two, "drop", why="vague"))
    file = tmp_path / "review" / "ada.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:70])
    assert set(read_decisions(tmp_path)["ada"]) == {"7:1", "7:2"}
    journal = Journal(tmp_path, "ada")
    assert file.read_bytes() == whole and "half-written (70 bytes)" in caplog.text
    journal.add(judged(two, "keep"))
    journal.close()
    assert [json.loads(line)["decision"] for line in file.read_bytes().splitlines()] == ["keep", "drop", "keep"]
    file.write_bytes(b'{"qid": "7:1"}\n' + whole)
    with pytest.raises(DataError, match=r"ada\.jsonl:1: not a decision"):
        Journal(tmp_path, "ada")


def test_undo_takes_back_the_newest_and_survives_a_restart(tmp_path: Path) -> None:
    one, two = outcome(1), outcome(2)
    write(tmp_path, "ada", judged(one, "keep"), judged(two, "keep"), judged(one, "drop", why="vague"))
    journal = Journal(tmp_path, "ada")
    undone = journal.undo(["7:1", "7:2"])
    assert undone is not None and undone.decision == "drop"
    journal.close()
    journal = Journal(tmp_path, "ada")
    assert journal.latest()["7:1"].decision == "keep", "what was decided before stands again"
    assert journal.undo(["7:9"]) is None
    second = journal.undo(["7:1", "7:2"])
    assert second is not None and second.qid == "7:2"
    journal.close()
    assert {qid: d.decision for qid, d in read_decisions(tmp_path)["ada"].items()} == {"7:1": "keep"}


def test_a_full_disk_leaves_whole_lines_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, "ada")
    journal.add(judged(outcome(1), "keep"))
    before = journal.path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        journal.add(judged(outcome(2), "keep"))
    assert journal.path.read_bytes() == before and set(journal.latest()) == {"7:1"}


def test_one_process_writes_a_reviewers_file_and_names_are_checked(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "ada")
    with pytest.raises(InputError, match="open in another review"):
        Journal(tmp_path, "ada")
    journal.close()
    for name in ("", "../ada", "a/b", "..", "a" * 41, "ada\n"):
        with pytest.raises(InputError, match="a name has"):
            Journal(tmp_path, name)


# What follows


def test_settle_takes_the_majority_the_filter_on_a_tie_and_the_newest_edit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept, dropped, split, edited, changed = (outcome(n, "language" if n == 2 else "") for n in range(1, 6))
    unreadable = outcome(6, "tags")
    no = {"why": "vague"}
    first = {"reasoning": "first", "answer": "one"}
    write(tmp_path, "ada", judged(kept, "drop", **no), judged(dropped, "keep"), judged(split, "keep"),
          judged(edited, "edit", **first), judged(changed, "drop", **no), judged(unreadable, "keep"))  # fmt: skip
    write(tmp_path, "bob", judged(kept, "drop", **no), judged(dropped, "drop", **no), judged(split, "drop", **no),
          judged(edited, "edit", reasoning="second", answer="two"))  # fmt: skip
    write(tmp_path, "eve", judged(kept, "keep"), judged(edited, "drop", **no), judged(outcome(99), "drop", **no))
    now = [kept, dropped, split, edited, replace(changed, answer="something else"), unreadable]
    with caplog.at_level(logging.WARNING):
        found = settle(tmp_path, now)
    texts = {qid: (one.decision, one.answer, one.edited) for qid, one in found.settled.items()}
    assert texts == {
        "7:1": ("drop", "a blue hat 1", False),
        "7:2": ("drop", "a blue hat 2", False),
        "7:3": ("keep", "a blue hat 3", False),
        "7:4": ("keep", "two", True),
    }
    assert found.settled["7:4"].reviewers == ("ada", "bob", "eve") and found.ties == 2
    assert {(one.qid, one.why) for one in found.unused} == {("7:5", "changed"), ("7:6", "nothing to keep"), ("7:99", "gone")}
    assert "3 decisions were not applied" in caplog.text
    assert settle(tmp_path / "unreviewed").settled == {}


def test_kappa_is_that_of_the_definition() -> None:
    # 50 samples, 20 and 15 alike: observed 0.7; marginals 0.5 and 0.6, so chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5; (0.7 - 0.5) / 0.5.
    # Variance: (0.02743 + 0.02547 - 0.0025) / (50 * 0.5^4) = 0.016128; 1.96 * 0.127 = 0.2489.
    assert kappa(20, 5, 10, 15) == pytest.approx((0.4, 0.15109, 0.64891), abs=1e-5)
    assert kappa(5, 0, 0, 5) == (1.0, 1.0, 1.0)
    assert kappa(0, 5, 5, 0)[0] == -1.0
    assert all(math.isnan(value) for value in kappa(9, 0, 0, 0))


def test_agreement_counts_what_both_judged_alike(tmp_path: Path) -> None:
    assert agreement_table(tmp_path) == "no two reviewers have judged the same sample yet"
    samples = [outcome(n) for n in range(53)]
    drop = {"why": "vague"}
    edit = {"reasoning": "other", "answer": "words"}
    write(tmp_path, "ada", *(judged(one, "keep") if n < 25 else judged(one, "drop", **drop) for n, one in enumerate(samples)))
    bob = [
        judged(one, "edit", **edit) if n < 20 or 25 <= n < 35 else judged(one, "drop", **drop) for n, one in enumerate(samples)
    ]
    write(tmp_path, "bob", *bob[:50], replace(bob[50], sample="of another text"))
    (pair,) = agree(read_decisions(tmp_path))
    assert (pair.first, pair.second, pair.n) == ("ada", "bob", 50)
    assert (pair.agreed, pair.kappa) == (pytest.approx(0.7), pytest.approx(0.4))
    assert agreement_table(tmp_path).splitlines()[1] == "ada, bob   50  70.0 %  0.400  0.151 to 0.649"


# The server

HOST = {"host": "127.0.0.1:8420"}
JSON = HOST | {"content-type": "application/json", "origin": "http://127.0.0.1:8420"}


def call(app: Any, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    """One request straight into an ASGI application: status, headers, body."""
    path, _, query = path.partition("?")
    headers = headers | ({"content-length": str(len(body))} if body else {})
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path,
        "raw_path": path.encode(), "query_string": query.encode(), "root_path": "", "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8420), "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    sent: list[dict[str, Any]] = []

    requests = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not requests:
            await asyncio.Event().wait()  # the client stays
        return requests.pop()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    told = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], told, b"".join(one.get("body", b"") for one in sent[1:])


@pytest.fixture
def session(tmp_path: Path) -> ReviewSession:
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    Image.new("RGBA", (40, 30), (200, 30, 30, 255)).save(tmp_path / "data" / "pictures" / "0.png")
    (tmp_path / "data" / "secret.txt").write_text("secret")
    stream = [outcome(0, root=tmp_path / "data"), outcome(1, "tags", root=tmp_path / "data")]
    return ReviewSession(tmp_path / "out", choose(stream, per_stratum=5), "ada")


def test_a_decision_is_in_the_file_when_it_is_answered(session: ReviewSession) -> None:
    app = app_of(session, 8420)
    kept = next(number for number, one in enumerate(session.chosen) if one.outcome.status == "kept")
    sample = json.loads(call(app, "GET", f"/api/sample/{kept}?reviewer=ada", HOST)[2])
    assert len(sample["targets"]) == 2 and sample["mine"] is None
    assert not list(session.out.glob("review/*.jsonl")), "looking writes nothing"
    told = {"number": kept, "reviewer": "ada", "decision": "drop", "why": "vague", "sample": sample["sample"], "note": "\ud800"}
    status, _, reply = call(app, "POST", "/api/decide", JSON, json.dumps(told).encode())
    assert (status, json.loads(reply)) == (200, {"number": kept, "mark": "d"})
    (line,) = (session.out / "review" / "ada.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["qid"], found["decision"], found["why"], found["how"]) == ("7:0", "drop", "vague", "random")
    overview = json.loads(call(app, "GET", "/api/review?reviewer=ada", HOST)[2])
    assert overview["marks"][kept] == "d" and overview["reviewers"] == {"ada": 1}
    assert json.loads(call(app, "POST", "/api/undo", JSON, b'{"reviewer": "ada"}')[2]) == {"number": kept, "mark": "."}
    other = 1 - kept
    for wrong, problem in (
        ({"decision": "drop", "why": "no idea"}, "choose one of"),
        ({"decision": "edit", "reasoning": " ", "answer": "x"}, "is empty"),
        ({"decision": "edit", "reasoning": "</reasoning>", "answer": "x"}, "take it out"),
        ({"sample": "0"}, "load the page again"),
        ({"reviewer": "../x", "decision": "keep"}, "a name has"),
        ({"number": other, "sample": session.chosen[other].sample, "decision": "keep"}, "no reasoning and answer"),
        ({"number": 7}, "there is no sample 7"),
        ({"note": "x" * 300_000}, "more than"),
    ):
        status, _, reply = call(app, "POST", "/api/decide", JSON, json.dumps(told | wrong).encode())
        assert status == 400 and problem in json.loads(reply)["error"], wrong
    assert read_decisions(session.out) == {"ada": {}}


def test_only_our_own_page_gets_in(session: ReviewSession) -> None:
    app = app_of(session, 8420)
    status, headers, page = call(app, "GET", "/", HOST)
    assert status == 200 and b"review.js" in page and "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff" and "unsafe" not in headers["content-security-policy"]
    for host, refused in (("evil.example:8420", 421), ("127.0.0.1:8421", 421), ("127.0.0.1", 421), ("", 400)):
        assert call(app, "GET", "/api/review?reviewer=ada", {"host": host})[0] == refused, host
    undo = b'{"reviewer": "ada"}'
    assert call(app, "POST", "/api/undo", JSON | {"origin": "http://evil.example"}, undo)[0] == 403
    assert call(app, "POST", "/api/undo", JSON | {"origin": "null"}, undo)[0] == 403
    assert call(app, "POST", "/api/undo", JSON | {"content-type": "text/plain"}, undo)[0] == 415
    assert call(app, "POST", "/api/undo", JSON, b"[1]")[0] == 400
    assert call(app, "POST", "/api/undo", JSON, undo)[0] == 200


def test_images_are_those_of_the_samples(session: ReviewSession) -> None:
    app = app_of(session, 8420)
    kept = next(number for number, one in enumerate(session.chosen) if one.outcome.status == "kept")
    for place in (0, 1):
        status, headers, data = call(app, "GET", f"/api/picture/{kept}/{place}", HOST)
        assert (status, headers["content-type"], data[:3]) == (200, "image/jpeg", b"\xff\xd8\xff")
    missing = 1 - kept
    for path in (f"/api/picture/{kept}/2", f"/api/picture/{kept}/9", f"/api/picture/{missing}/0", "/api/picture/9/0",
                 "/api/picture/0/../../data/secret.txt",
                 "/static/../review.py", "/static/review.py", "/data/secret.txt"):  # fmt: skip
        assert call(app, "GET", path, HOST)[0] in (400, 404), path


NUMBERS = (
    "9" * 5000,
    "-1",
    "1e3",
    "NaN",
    "%00",
    "\u0663",
    "0x1",
    "9" * 12,
    " 1",
    "%ff",
    "\ud83d".encode("utf-8", "surrogatepass").hex(),
)


@pytest.mark.parametrize("number", NUMBERS)
def test_field_report_19_a_number_in_a_path_that_is_none_is_refused(session: ReviewSession, number: str) -> None:
    app = app_of(session, 8420)
    for path in (f"/api/sample/{number}?reviewer=ada", f"/api/picture/{number}/0", f"/api/picture/0/{number}"):
        status, _, reply = call(app, "GET", path, HOST)
        assert status == 400 and len(json.loads(reply)["error"]) < 200, path


BODIES = (
    b"", b"null", b"[]", b"3", b'"x"', b"{", b"\xff\xfe", b"NaN", b'{"number": ' + b"9" * 5000 + b"}", b'{"number": 1e999}',
    b'{"number": NaN}', b'{"number": true}', b'{"number": "0"}', b'{"number": 0.0}', b'{"number": null}', b'{"number": -1}',
    b'{"number": ' + b"9" * 4000 + b"}", b"[" * 100_000, b'{"a":' * 40_000, b'{"number": 0, "reviewer": ["ada"]}',
    b'{"number": 0, "reviewer": "\\ud800"}', b'{"number": 0, "reviewer": "a\\u0000"}', b'{"number": 0, "reviewer": "../a"}',
    b'{"number": 0, "reviewer": "ada", "decision": null}', b'{"number": 0, "reviewer": "ada", "sample": {}}',
    b'{"number": 0, "reviewer": "' + b"a" * 200_000 + b'"}', b"{" + b" " * 300_000 + b"}",
)  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_field_report_19_a_body_of_any_shape_is_refused_with_a_message(session: ReviewSession, body: bytes) -> None:
    app = app_of(session, 8420)
    status, _, reply = call(app, "POST", "/api/decide", JSON, body)
    assert status == 400 and 10 < len(json.loads(reply)["error"]) < 300
    if b"ada" not in body:
        assert call(app, "POST", "/api/undo", JSON, body)[0] == 400
    assert not list(session.out.glob("review/*"))


def test_field_report_19_other_methods_and_paths_are_refused(session: ReviewSession) -> None:
    app = app_of(session, 8420)
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO"):
        assert call(app, method, "/api/review?reviewer=ada", JSON)[0] == 405
    for path in ("/api/decide", "/api/undo"):
        assert call(app, "GET", path, HOST)[0] == 405
    for name in ("%00", "..", "a" * 41, "a/b", "%ff", "CON:", ""):
        assert call(app, "GET", f"/api/review?reviewer={name}", HOST)[0] == 400, name


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_field_report_19_undo_begins_no_file_and_few_are_open(session: ReviewSession) -> None:
    app = app_of(session, 8420)
    for number in range(300):
        status, _, reply = call(app, "POST", "/api/undo", JSON, json.dumps({"reviewer": f"name{number}"}).encode())
        assert (status, json.loads(reply)) == (200, {"number": -1, "mark": "."})
    assert not list(session.out.glob("review/*"))
    drop = {"number": 0, "decision": "drop", "why": "vague", "sample": session.chosen[0].sample}
    open_before = open_files()
    statuses = [
        call(app, "POST", "/api/decide", JSON, json.dumps(drop | {"reviewer": f"name{number}"}).encode())[0]
        for number in range(102)
    ]
    assert statuses == [200] * 100 + [400] * 2 and len(reviewers(session.out)) == 100
    assert open_files() - open_before <= OPEN_FILES
    for number in (0, 50, 99):  # closed long ago, and open
        status, _, reply = call(app, "POST", "/api/undo", JSON, json.dumps({"reviewer": f"name{number}"}).encode())
        assert (status, json.loads(reply)["number"]) == (200, 0)
    session.close()
    assert open_files() <= open_before


def test_field_report_03_decisions_with_half_pairs_are_read(tmp_path: Path) -> None:
    one = outcome(1)
    write(tmp_path, "ada", judged(one, "edit", reasoning="it is \ud83d red \x00", answer="a red hat"))
    file = tmp_path / "review" / "ada.jsonl"
    file.write_text(file.read_text().replace("red hat", "red \\udc00 hat"))
    settled = settle(tmp_path, [one]).settled["7:1"]
    assert (settled.reasoning, settled.answer) == ("it is \ufffd red \ufffd", "a red \ufffd hat")
    settled.reasoning.encode()
