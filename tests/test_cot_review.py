"""The review of M-BEIR-CoT by people: the list, the decisions on disk, what follows from them, and the security of its server."""

from __future__ import annotations

import asyncio
import errno
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from traceir.cot.ask import CotCase
from traceir.cot.outcomes import CotOutcome
from traceir.cot.review.decisions import Decision, Journal, read_decisions, reviewers
from traceir.cot.review.review import Sampling, agreement_table, choose, kappa, open_sample, sample_hash, settle
from traceir.cot.review.review_server import OPEN_FILES, ReviewSession, app_of
from traceir.data.mbeir import Candidate, Record
from traceir.errors import DataError, InputError


def outcome(
    number: int, rule: str = "", *, root: Path = Path("nowhere"), task: str = "cirr_task7", sure: float = 0.9, text: str = ""
) -> CotOutcome:
    """An invented outcome: kept where `rule` is "", else dropped by it. Its image would be `pictures/{number}.png`."""
    qid, image = f"7:{number}", f"pictures/{number}.png"
    record = Record(qid, text or f"make hat {number} blue", image, "image,text", (f"{qid}0",), (), 7)
    targets = (Candidate(f"{qid}0", None, image, "image"), Candidate(f"{qid}1", "a second hat", None, "text"))
    asked, readable = rule in ("", "verifier"), rule != "tags"
    return CotOutcome(
        case=CotCase(record, task, "Find the changed hat", targets, root), z=1, assessment="an operation on a picture",
        confidence=0.9, reasoning=f"The hat {number} is red; it becomes blue." if readable else "",
        answer=f"a blue hat {number}" if readable else "", raw=f"<reasoning>hat {number}</reasoning>",
        status="dropped" if rule else "kept", rule=rule, detail=f"broke {rule}" if rule else "",
        verdict=not rule if asked else None, verdict_confidence=sure if asked else -1.0,
        verdict_reason="it fits" if asked else "", provenance='{"teacher": "invented"}',
    )  # fmt: skip


def judged(sample: CotOutcome, decision: str, **more: str) -> Decision:
    more = {"why": "vague"} | more if decision == "drop" else more
    return Decision(sample.case.record.qid, sample.case.task, decision, sample_hash(sample), **more)


def write(out: Path, reviewer: str, *decisions: Decision) -> Path:
    journal = Journal(out, reviewer)
    for decision in decisions:
        journal.add(decision)
    journal.close()
    return journal.path


def test_choose_draws_each_stratum_alike_whatever_the_order_of_the_stream() -> None:
    stream = [outcome(n, ("", "language", "verifier")[n % 3]) for n in range(90)] + [outcome(200, task="fashioniq_task7")]
    stream.append(replace(outcome(300), status="direct", z=0))
    chosen = choose(stream, Sampling(per_stratum=5, seed=3))
    assert chosen == choose(reversed(stream), Sampling(per_stratum=5, seed=3)) != choose(stream, Sampling(per_stratum=5, seed=4))
    sizes = {"kept": 30, "dropped / language": 30, "dropped / verifier": 30}
    wanted = {f"cirr_task7 / {name}": n for name, n in sizes.items()} | {"fashioniq_task7 / kept": 1}
    assert {sample.stratum: sample.size for sample in chosen} == wanted and {sample.how for sample in chosen} == {"random"}
    assert len(chosen) == 16 and len({sample.stratum for sample in chosen[:4]}) == 4, "the strata come in turn"
    fewer = [sample for sample in choose(stream, Sampling(per_stratum=2, seed=3)) if sample.stratum == "cirr_task7 / kept"]
    assert fewer == [sample for sample in chosen if sample.stratum == "cirr_task7 / kept"][:2], "a beginning is a draw too"
    drawn = Counter(sample.sample for seed in range(400) for sample in choose(stream[:30:3], Sampling(per_stratum=3, seed=seed)))
    assert len(drawn) == 10 and all(85 < times < 155 for times in drawn.values())  # 120 expected, 9 standard deviation
    sure = [0.99, 0.72, 0.2, 0.66, 0.9]
    stream = [outcome(n, sure=sure[n]) for n in range(5)] + [outcome(n, "language") for n in range(5, 9)]
    doubted = choose(stream, Sampling(per_stratum=3, order="doubt"))
    assert [sample.outcome.verdict_confidence for sample in doubted if sample.how == "doubt"] == [0.72, 0.66, 0.9]
    assert {sample.outcome.rule for sample in doubted if sample.how == "random"} == {"language"}
    with pytest.raises(InputError, match="order 'guess'"):
        choose(stream, Sampling(per_stratum=3, order="guess"))


def test_the_list_stays_the_same_after_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = [outcome(n) for n in range(40)]
    first = [sample.outcome for sample in open_sample(tmp_path, stream, Sampling(per_stratum=6, seed=1))]
    grown = [outcome(n) for n in range(100, 300)] + stream
    assert [own.outcome for own in open_sample(tmp_path, grown, Sampling(per_stratum=6, seed=1))] == first and not caplog.records
    again = open_sample(tmp_path, [own for own in stream if own != first[0]], Sampling(per_stratum=9, order="doubt", seed=2))
    assert [own.outcome for own in again] == first[1:]
    assert "remove it for a fresh list" in caplog.text and "1 of 6 samples" in caplog.text
    (tmp_path / "review" / "sample.json").write_text("{")
    with pytest.raises(DataError, match=r"sample\.json.*remove it"):
        open_sample(tmp_path, stream, Sampling(per_stratum=6, seed=1))


def test_decisions_survive_torn_lines_restarts_and_a_full_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, two = outcome(1), outcome(2)
    file = write(tmp_path, "ada", judged(first, "keep"), judged(two, "keep"), judged(first, "drop"))
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:70])
    assert {qid: own.decision for qid, own in read_decisions(tmp_path)["ada"].items()} == {"7:1": "drop", "7:2": "keep"}
    journal = Journal(tmp_path, "ada")
    assert file.read_bytes() == whole and "half-written (70 bytes)" in caplog.text
    with pytest.raises(InputError, match="open in another review"):
        Journal(tmp_path, "ada")
    undone = journal.undo(["7:1", "7:2"])
    assert undone is not None and undone.decision == "drop" and journal.latest()["7:1"].decision == "keep"
    assert journal.undo(["7:9"]) is None
    before = file.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(DataError, match="No space left"):
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        journal.add(judged(two, "drop"))
    assert file.read_bytes() == before
    journal.close()
    journal = Journal(tmp_path, "ada")
    second = journal.undo(["7:1", "7:2"])
    assert second is not None and second.qid == "7:2" and set(journal.latest()) == {"7:1"}
    journal.close()
    file.write_bytes(b'{"qid": "7:1"}\n' + whole)
    with pytest.raises(DataError, match=r"ada\.jsonl:1: .*no decision"):
        Journal(tmp_path, "ada")
    for name in ("", "../ada", "a/b", "..", "a" * 41, "ada\n"):
        with pytest.raises(InputError, match="a name has"):
            Journal(tmp_path, name)


def test_settle_takes_the_majority_the_filter_on_a_tie_and_the_newest_edit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept, dropped, split, edited, changed = (outcome(n, "language" if n == 2 else "") for n in range(1, 6))
    unreadable = outcome(6, "tags")
    write(tmp_path, "ada", judged(kept, "drop"), judged(dropped, "keep"), judged(split, "keep"), judged(changed, "drop"),
          judged(edited, "edit", reasoning="first", answer="one"), judged(unreadable, "keep"))  # fmt: skip
    file = write(tmp_path, "bob", judged(kept, "drop"), judged(dropped, "drop"), judged(split, "drop"),
                 judged(edited, "edit", reasoning="it is \ud83d red \x00", answer="two hat"))  # fmt: skip
    file.write_text(file.read_text().replace("two hat", "two \\udc00 hat"))
    write(tmp_path, "eve", judged(kept, "keep"), judged(edited, "drop"), judged(outcome(99), "drop"))
    settled = settle(tmp_path, [kept, dropped, split, edited, replace(changed, answer="something else"), unreadable])
    assert {qid: (decision.decision, decision.answer, decision.edited) for qid, decision in settled.items()} == {
        "7:1": ("drop", "a blue hat 1", False),
        "7:2": ("drop", "a blue hat 2", False),
        "7:3": ("keep", "a blue hat 3", False),
        "7:4": ("keep", "two \ufffd hat", True),
    }
    assert settled["7:4"].reasoning == "it is \ufffd red \ufffd"
    assert settled["7:4"].reviewers == ("ada", "bob", "eve")
    assert "3 decisions were not applied (first 7:5 by ada: changed)" in caplog.text and settle(tmp_path / "unreviewed") == {}


def test_kappa_and_agreement_on_what_both_judged_alike(tmp_path: Path) -> None:
    # 50 samples, 20 and 15 alike: observed 0.7; marginals 0.5 and 0.6, so chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5; (0.7 - 0.5) / 0.5.
    # Variance: (0.02743 + 0.02547 - 0.0025) / (50 * 0.5^4) = 0.016128; 1.96 * 0.127 = 0.2489.
    assert kappa(20, 5, 10, 15) == pytest.approx((0.4, 0.15109, 0.64891), abs=1e-5)
    assert kappa(5, 0, 0, 5) == (1.0, 1.0, 1.0) and kappa(0, 5, 5, 0)[0] == -1.0
    assert all(math.isnan(value) for value in kappa(9, 0, 0, 0))
    assert agreement_table(tmp_path) == "no two reviewers have judged the same sample yet"
    samples = [outcome(n) for n in range(53)]
    edit = {"reasoning": "other", "answer": "words"}
    write(tmp_path, "ada", *(judged(sample, "keep" if n < 25 else "drop") for n, sample in enumerate(samples)))
    bob = [judged(own, "edit", **edit) if n < 20 or 25 <= n < 35 else judged(own, "drop") for n, own in enumerate(samples)]
    write(tmp_path, "bob", *bob[:50], replace(bob[50], sample="of another text"))
    assert agreement_table(tmp_path).splitlines()[1] == "ada, bob   50  70.0 %  0.400  0.151 to 0.649"


# The server

HOST = {"host": "127.0.0.1:8420"}
JSON = HOST | {"content-type": "application/json", "origin": "http://127.0.0.1:8420"}


def call(app: Any, method: str, path: str, headers: dict[str, str] = HOST, body: Any = b"") -> tuple[int, dict[str, str], bytes]:
    """One request straight into an ASGI application: status, headers, body. A body that is no bytes is sent as JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
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
    shown = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], shown, b"".join(message.get("body", b"") for message in sent[1:])


def post(app: Any, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    status, _, reply = call(app, "POST", path, JSON, body)
    return status, json.loads(reply)


@pytest.fixture
def session(tmp_path: Path) -> ReviewSession:
    """Sample 0 is dropped and has no image, sample 1 is kept."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGBA", (40, 30), (200, 30, 30, 255)).save(tmp_path / "pictures" / "0.png")
    (tmp_path / "secret.txt").write_text("secret")
    return ReviewSession(tmp_path, choose([outcome(0, root=tmp_path), outcome(1, "tags", root=tmp_path)], Sampling(5)), "ada")


def test_a_decision_is_in_the_file_when_it_is_answered(session: ReviewSession) -> None:
    app = app_of(session, 8420)
    assert json.loads(call(app, "GET", "/api/start")[2]) == {"reviewer": "ada"}
    sample = json.loads(call(app, "GET", "/api/sample/1?reviewer=ada")[2])
    assert len(sample["targets"]) == 2 and sample["mine"] is None
    assert not list(session.out.glob("review/*.jsonl")), "looking writes nothing"
    drop = {"number": 1, "reviewer": "ada", "decision": "drop", "why": "vague", "sample": sample["sample"], "note": "\ud800"}
    assert post(app, "/api/decide", drop) == (200, {"number": 1, "mark": "d"})
    saved = json.loads((session.out / "review" / "ada.jsonl").read_text())
    assert (saved["qid"], saved["decision"], saved["why"], saved["how"]) == ("7:0", "drop", "vague", "random")
    overview = json.loads(call(app, "GET", "/api/review?reviewer=ada")[2])
    assert overview["marks"] == ".d" and overview["reviewers"] == {"ada": 1}
    assert post(app, "/api/undo", {"reviewer": "ada"}) == (200, {"number": 1, "mark": "."})
    for wrong, problem in (
        ({"why": "no idea"}, "choose one of"),
        ({"decision": "edit", "reasoning": " ", "answer": "x"}, "is empty"),
        ({"decision": "edit", "reasoning": "</reasoning>", "answer": "x"}, "take it out"),
        ({"sample": "0"}, "load the page again"),
        ({"reviewer": "../x", "decision": "keep"}, "a name has"),
        ({"number": 0, "sample": session.chosen[0].sample, "decision": "keep"}, "no reasoning and answer"),
        ({"number": 7}, "there is no sample 7"),
        ({"note": "x" * 300_000}, "more than"),
    ):
        status, reply = post(app, "/api/decide", drop | wrong)
        assert status == 400 and problem in reply["error"], wrong
    assert read_decisions(session.out) == {"ada": {}}


def test_only_our_own_page_gets_in_and_sees_only_images_of_samples(session: ReviewSession) -> None:
    app = app_of(session, 8420)
    status, headers, page = call(app, "GET", "/")
    assert status == 200 and b"review.js" in page and "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff" and "unsafe" not in headers["content-security-policy"]
    for host, refused in (("evil.example:8420", 421), ("127.0.0.1:8421", 421), ("127.0.0.1", 421), ("", 400)):
        assert call(app, "GET", "/api/review?reviewer=ada", {"host": host})[0] == refused, host
    undo = {"reviewer": "ada"}
    wrong = {"origin": "http://evil.example"}, {"origin": "null"}, {"content-type": "text/plain"}, {}
    assert [call(app, "POST", "/api/undo", JSON | more, undo)[0] for more in wrong] == [403, 403, 415, 200]
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO"):
        assert call(app, method, "/api/review?reviewer=ada", JSON)[0] == 405
    assert [call(app, "GET", path)[0] for path in ("/api/decide", "/api/undo")] == [405, 405]
    for index in (0, 1):
        status, headers, data = call(app, "GET", f"/api/picture/1/{index}")
        assert (status, headers["content-type"], data[:3]) == (200, "image/jpeg", b"\xff\xd8\xff")
    for path in ("1/2", "1/9", "0/0", "9/0", "0/../../secret.txt"):
        assert call(app, "GET", f"/api/picture/{path}")[0] in (400, 404), path
    for path in ("/static/../review.py", "/static/review.py", "/secret.txt"):
        assert call(app, "GET", path)[0] == 404, path


NUMBERS = ("9" * 5000, " 1", *"-1 1e3 NaN %00 \u0663 0x1 999999999999 %ff eda0bd".split())
BODIES = (
    b"", b"null", b"[]", b"3", b'"x"', b"{", b"\xff\xfe", b"NaN", b'{"number": ' + b"9" * 5000 + b"}", b'{"number": 1e999}',
    b'{"number": NaN}', b'{"number": true}', b'{"number": "0"}', b'{"number": 0.0}', b'{"number": null}', b'{"number": -1}',
    b"[" * 100_000, b'{"a":' * 40_000, b'{"number": 0, "reviewer": ["ada"]}', b'{"number": 0, "reviewer": "\\ud800"}',
    b'{"number": 0, "reviewer": "a\\u0000"}', b'{"number": 0, "reviewer": "../a"}',
    b'{"number": 0, "reviewer": "ada", "decision": null}', b'{"number": 0, "reviewer": "ada", "sample": {}}',
    b'{"number": 0, "reviewer": "' + b"a" * 200_000 + b'"}', b"{" + b" " * 300_000 + b"}",
)  # fmt: skip


def test_a_number_a_name_and_a_body_of_any_shape_are_refused_with_a_message(session: ReviewSession) -> None:
    app = app_of(session, 8420)
    for number in NUMBERS:
        for path in (f"/api/sample/{number}?reviewer=ada", f"/api/picture/{number}/0", f"/api/picture/0/{number}"):
            status, _, reply = call(app, "GET", path)
            assert status == 400 and len(json.loads(reply)["error"]) < 200, path
    for name in ("%00", "..", "a" * 41, "a/b", "%ff", "CON:", ""):
        assert call(app, "GET", f"/api/review?reviewer={name}")[0] == 400, name
    for body in BODIES:
        status, answer = post(app, "/api/decide", body)
        assert status == 400 and 10 < len(answer["error"]) < 300, body[:60]
        assert b"ada" in body or post(app, "/api/undo", body)[0] == 400
    assert not list(session.out.glob("review/*"))


def test_undo_begins_no_file_and_few_files_are_open(session: ReviewSession) -> None:
    app, files = app_of(session, 8420), Path("/proc/self/fd")
    for number in range(30):
        assert post(app, "/api/undo", {"reviewer": f"name{number}"}) == (200, {"number": -1, "mark": "."})
    assert not list(session.out.glob("review/*"))
    drop = {"number": 0, "decision": "drop", "why": "vague", "sample": session.chosen[0].sample}
    before = len(list(files.iterdir()))
    statuses = [post(app, "/api/decide", drop | {"reviewer": f"name{number}"})[0] for number in range(102)]
    assert statuses == [200] * 100 + [400] * 2 and len(reviewers(session.out)) == 100
    assert len(list(files.iterdir())) - before <= OPEN_FILES
    for number in (0, 50, 99):  # closed long ago, and open
        assert post(app, "/api/undo", {"reviewer": f"name{number}"}) == (200, {"number": 0, "mark": "."})
    session.close()
    assert len(list(files.iterdir())) <= before


@pytest.mark.slow
def test_ctrl_c_ends_the_review_page_without_a_traceback(tmp_path: Path) -> None:
    script = """
import os, signal, sys, threading
from pathlib import Path
from test_cot_review import outcome
from traceir.cot.review.review_server import serve_review
root = Path(sys.argv[1])
def stop(line):
    for after in (1.0, 1.03):  # who is in a hurry presses it twice
        threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()
serve_review(root / "build", port=0, outcomes=[outcome(0, "", root=root, text="")], announce=stop)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
