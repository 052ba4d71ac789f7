"""The scripted teacher: what it answers, the faults it shows, and its HTTP server in a process of its own."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cot_fakes import candidate, label, line, train_split

from traceir.cot.ask import CotCase, Questions, ReplyFormatError, TeacherQuestion, read_assessment, read_verdict
from traceir.cot.rules import RuleFilter
from traceir.cot.scripted.oracle import ALL, CONTENT, MEANT, TRANSPORT, Faults, Oracle, barred_for, spoil
from traceir.cot.scripted.teacher_server import running
from traceir.cot.source import CaseSource, find_captions, find_parts
from traceir.cot.teachers.teacher import TeacherRequest, prepare
from traceir.errors import InputError, TeacherError

QUESTIONS = Questions()
COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toys: 8 complex changes of an image, one direct, two questions in words of one content, and one to an image."""
    queries, labels, pool = [], [], []
    for number in range(9):
        first, last = COLOURS[number % 4], COLOURS[(number + 1) % 4]
        image, others = f"mbeir_images/toy{number}.png", f"old robot, small kite {number}"
        queries.append(line(f"50:{number}", f"make the left toy number {number} {last}", image, f"50:{number}", 7))
        pool.append(candidate(f"50:{number}", None, f"mbeir_images/goal{number}.png"))
        reasoning = f"see {first} duck, {others}; left {last}; {last} duck, {others}; the rest stays"
        labels.append(label(f"50:{number}", *((reasoning, f"{last} duck, {others}") if number < 8 else ())))
    for qid in ("50:20", "50:21"):
        queries.append(line(qid, "what does the toy maker of Norvik carve", None, "50:20", 1))
        reasoning = "the toy maker of norvik is olga; olga lives by the lake; she carves all winter long"
        labels.append(label(qid, reasoning, "olga carves ducks"))
    pool.append(candidate("50:20", "Olga of Norvik carves ducks.", None))
    queries.append(line("50:30", "the toy right of the one left of the kite", None, "50:0", 0))
    reasoning = "left of the kite stands a robot; right of that robot stands the kite itself; so it is a kite"
    labels.append(label("50:30", reasoning, "a small kite toy"))
    return train_split(tmp_path_factory.mktemp("toys") / "data", "toys", queries, pool, labels)


def cases_of(root: Path) -> dict[str, CotCase]:
    with closing(CaseSource(root)) as source:
        return {case.record.qid: case for part in find_parts(root, 1000) for case in source.cases(part)}


def request(question: TeacherQuestion) -> TeacherRequest:
    return asyncio.run(prepare(question, "scripted-oracle"))


def body(question: TeacherQuestion) -> Any:
    return json.loads(request(question).payload)


def reply(oracle: Oracle, asked: dict[str, Any]) -> str:
    return oracle.answer(oracle.read(asked))


def test_labels_answer_all_three_kinds_of_questions(labelled: Path) -> None:
    oracle, cases = Oracle(labelled), cases_of(labelled)
    assessments = {qid: read_assessment(reply(oracle, body(QUESTIONS.assess(case)))) for qid, case in cases.items()}
    assert {qid for qid, assessment in assessments.items() if assessment["z"] == 0} == {"50:8"}
    assert all(0.75 <= assessment["confidence"] <= 0.99 for assessment in assessments.values())
    assert reply(oracle, body(QUESTIONS.reason(cases["50:1"]))) == (
        "<reasoning>see green duck, old robot, small kite 1; left blue; blue duck, old robot, small kite 1; the rest stays"
        "</reasoning><answer>blue duck, old robot, small kite 1</answer>"
    )
    for qid, answer, right in (
        ("50:1", "Blue duck; OLD robot, small kite 1.", True),
        ("50:1", "red duck, old robot, small kite 0", False),
        ("50:20", "olga carves ducks", True),
        ("50:30", "a small kite toy", True),  # the only image is the target's
        ("50:30", "", False),
    ):
        assert read_verdict(reply(oracle, body(QUESTIONS.verify(cases[qid], answer))))["yes"] == right
    first, again = QUESTIONS.reason(cases["50:0"]), QUESTIONS.reason(cases["50:0"], 1)
    assert oracle.read(body(QUESTIONS.reason(cases["50:21"]))).known.qids == ("50:20", "50:21"), "of one content"
    assert oracle.read(body(first)).key == request(first).key != request(again).key
    assert oracle.read(body(first)).digest == oracle.read(body(again)).digest


def test_unknown_and_broken_questions_are_refused_in_words(labelled: Path) -> None:
    oracle, cases = Oracle(labelled), cases_of(labelled)
    stranger = json.loads(json.dumps(body(QUESTIONS.assess(cases["50:0"]))).replace("make the left", "burn the left"))
    with pytest.raises(InputError, match=r"toys_task7.*burn the left toy number 0"):
        reply(oracle, stranger)
    with pytest.raises(InputError, match="direct"):
        reply(oracle, body(QUESTIONS.reason(cases["50:8"])))


def test_without_labels_composed_queries_are_scripted_from_captions(tmp_path: Path) -> None:
    red, green, nameless = (f"mbeir_images/{name}.png" for name in ("red", "green", "nameless"))
    queries = [
        line("60:1", None, red, "60:3", 3),
        line("60:2", "emerald square", None, "60:2", 0),
        line("60:3", "the same, but in green", red, "60:2", 7),
        line("60:4", "the same, but in a kind of dark red", nameless, "60:3", 6),
    ]
    pool = [candidate("60:1", None, red), candidate("60:2", None, green), candidate("60:3", "crimson square", None)]
    root = train_split(tmp_path / "signs", "sign", queries, pool, [])
    oracle, rules, answers = Oracle(root), RuleFilter(captions=find_captions(root, None)), {}
    for qid, case in cases_of(root).items():
        assert read_assessment(reply(oracle, body(QUESTIONS.assess(case))))["z"] == (qid in ("60:3", "60:4"))
        if qid in ("60:3", "60:4"):
            checked = rules.check(case, reply(oracle, body(QUESTIONS.reason(case))))
            assert checked.rule == "" and read_verdict(reply(oracle, body(QUESTIONS.verify(case, checked.answer))))["yes"]
            answers[qid] = checked.answer, checked.reasoning.partition(".")[0]
    assert answers == {
        "60:3": ("sign of emerald square", "The picture shows crimson square"),
        "60:4": ("sign of crimson square", "The picture shows what is to be changed"),
    }


@pytest.mark.parametrize("kind", CONTENT)
def test_every_fault_meets_the_rule_meant_for_it(labelled: Path, kind: str) -> None:
    oracle, cases, shown = Oracle(labelled), cases_of(labelled), 0
    sources = {case.record.image_path or "": oracle.read(body(QUESTIONS.assess(case))).known.source for case in cases.values()}
    rules = RuleFilter(captions=sources)
    for attempt in range(2):  # other instructions make other draws of the wording
        for case in cases.values():
            question = QUESTIONS.reason(CotCase(case.record, case.task, f"Try {attempt}.", case.positives, case.root))
            asked = oracle.read(body(question))
            if not asked.known.z or kind in barred_for(asked, oracle):
                continue
            raw, finish = spoil(kind, asked, oracle)
            checked = rules.check(case, raw, finish)
            shown += 1
            if kind == "hallucination":
                verdict = read_verdict(reply(oracle, body(QUESTIONS.verify(case, checked.answer))))
                assert checked.rule == "keyword" or not verdict["yes"]
            else:
                assert (checked.rule, raw) == (MEANT[kind], raw)
    assert shown >= 16


def test_bad_json_cannot_be_read_and_true_replies_break_no_rule(labelled: Path) -> None:
    oracle = Oracle(labelled)
    for number, (qid, case) in enumerate(cases_of(labelled).items()):
        with pytest.raises(ReplyFormatError):
            read_assessment(*spoil("bad_json", oracle.read(body(QUESTIONS.assess(case))), oracle))
        with pytest.raises(ReplyFormatError):
            read_verdict(*spoil("bad_json", oracle.read(body(QUESTIONS.verify(case, f"toy {number}"))), oracle))
        assert qid == "50:8" or RuleFilter().check(case, reply(oracle, body(QUESTIONS.reason(case)))).rule == ""


def test_faults_are_drawn_by_content_at_their_rate_in_equal_shares() -> None:
    digests = [f"{number:064x}" for number in range(4000)]
    faults = Faults(0.2, seed=3)
    reason = Counter(faults.fault_of(digest, "reason") for digest in digests)
    assess = Counter(faults.fault_of(digest, "assess") for digest in digests)
    content = sum(reason[kind] for kind in CONTENT)
    assert content / 4000 == pytest.approx(0.2, abs=0.02) == 1 - assess[None] / 4000
    assert set(reason) == {None, *CONTENT, *TRANSPORT} and set(assess) == {None, "bad_json", *TRANSPORT}
    assert all(0.4 < reason[kind] / (content / len(CONTENT)) < 1.6 for kind in CONTENT)
    assert any(Faults(0.2, 4).fault_of(digest, "reason") != faults.fault_of(digest, "reason") for digest in digests[:99])
    assert "source_copy" not in {Faults(1.0, 3).fault_of(digest, "reason", ("source_copy",)) for digest in digests[:999]}
    assert {Faults(1.0, kinds=("loop",)).fault_of(digest, "reason") for digest in digests[:50]} == {"loop"}
    for rate, kinds in ((1.5, ALL), (0.1, ("gremlin",))):
        with pytest.raises(InputError):
            Faults(rate, 0, kinds)


def ask(url: str, sent: object, path: str = "/v1/chat/completions", method: str = "POST", **headers: str) -> tuple[int, Any, Any]:
    """Status, body and headers of plain HTTP; with the key `secret`."""
    connection = http.client.HTTPConnection(url.removeprefix("http://").partition("/")[0], timeout=30)
    try:
        head = {"Authorization": "Bearer secret", "Content-Type": "application/json"} | headers
        content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
        connection.request(method, path, content, head)
        response = connection.getresponse()
        return response.status, json.loads(response.read()), dict(response.getheaders())
    finally:
        connection.close()


BAD = (
    b"", b"null", b"[]", b"{not json", b"\xff", b"NaN", b"[" * 100_000, b'{"model": ' + b"9" * 5000 + b"}",
    b'{"model": "scripted-oracle"}', b'{"model": "scripted-oracle", "stream": true}',
    b'{"model": "scripted-oracle", "messages": 3}', b'{"model": "scripted-oracle", "messages": [[]]}',
    b'{"model": "scripted-oracle", "messages": [{"content": [{"type": "text", "text": 3}]}]}',
    b'{"model": "scripted-oracle", "messages": [{"content": [{"type": "image_url", "image_url": {"url": []}}]}]}',
    b'{"model": "scripted-oracle", "messages": [{"content": [{"type": "audio"}]}]}',
    b'{"model": "scripted-oracle", "messages": [{"content": "<task>\\ud800</task>"}]}',
    b'{"model": "scripted-oracle", "messages": [{"content": "<task>toys_task7</task>"}]}',
    b'{"model": "scripted-oracle", "messages": [{"content": "x"}], "seed": 1e999}',
    b'{"model": "scripted-oracle", "messages": [{"content": "x"}], "a": ' + b'{"a":' * 900 + b"1" + b"}" * 901,
)  # fmt: skip


def test_the_server_shows_each_fault_once_logs_it_and_refuses_all_that_is_no_question(labelled: Path, tmp_path: Path) -> None:
    log = tmp_path / "teacher.jsonl"
    log.write_bytes(b'{"event": "start", "request": 1')  # cut by a kill
    oracle, faults, case, asked = Oracle(labelled), Faults(1.0, 0, TRANSPORT), cases_of(labelled)["50:0"], dict[str, Any]()
    for number in range(40):
        question = body(QUESTIONS.verify(case, f"toy {number}"))
        asked.setdefault(str(faults.fault_of(oracle.read(question).digest, "verify")), question)
    assert set(asked) == set(TRANSPORT)
    with running(labelled, key="secret", faults=1.0, kinds=",".join(TRANSPORT), log=str(log), stall=0.2) as url:
        for fault, question in asked.items():
            if fault in ("stall", "cut"):
                with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                    ask(url, question)
            else:
                status, answer, headers = ask(url, question)
                assert status == {"rate_limit": 429, "server_error": 500}[fault] and answer["error"]["message"]
                assert status != 429 or (float(headers["retry-after"]), headers["retry-after-ms"]) == (0.05, "50")
            status, answer, _ = ask(url, question)
            assert status == 200 and answer["choices"][0]["message"]["content"] == reply(oracle, question)
            assert answer["usage"]["prompt_tokens"] > 2 * 85
        assert ask(url, question, Authorization="Bearer guess")[1]["error"]["code"] == "invalid_api_key"
        assert ask(url, {**question, "model": "gpt-none"})[1]["error"]["code"] == "model_not_found"
        assert ask(url, question, "/v1/embeddings")[0] == 404 and ask(url, b"", method="GET")[0] == 405
        assert [ask(url, raw)[0] for raw in BAD] == [400] * len(BAD)
        for host, status in (("evil.example", 421), ("localhost:1", 200), ("127.0.0.1.evil.example", 421), ("a b", 400)):
            assert ask(url, b"", "/v1/models", "GET", Host=host)[0] == status, host
        assert ask(url, question, Origin="http://evil.example")[0] == 403
        assert ask(url, question, **{"Content-Type": "text/plain"})[0] == 415
    rows = [json.loads(row) for row in log.read_text().splitlines()[1:]]
    begun, ended = ([row for row in rows if row["event"] == event][:8] for event in ("start", "end"))
    assert [row["request"] for row in begun] == [row["request"] for row in ended] == list(range(2, 10))
    assert [(row["fault"], row["paid"]) for row in ended] == [pair for fault in asked for pair in ((fault, False), (None, True))]
    assert [row["key"] for row in ended] == [oracle.read(question).key for question in asked.values() for _ in range(2)]
    assert all(row["qids"] == ["50:0"] and row["stage"] == "verify" for row in ended)
    with pytest.raises(TeacherError, match="no training queries"), running(tmp_path):
        pass
