"""The scripted teacher: what it answers, the faults it shows, and its HTTP server in a process of its own."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from traceir.cot.ask import CotCase, Questions, TeacherQuestion, read_assessment, read_verdict
from traceir.cot.replies import ReplyFormatError
from traceir.cot.rules import RuleFilter
from traceir.cot.scripted.faults import ALL, CONTENT, MEANT, TRANSPORT, Faults, barred_for, spoil
from traceir.cot.scripted.oracle import Oracle
from traceir.cot.scripted.teacher_server import running
from traceir.cot.source import CaseSource, find_captions, find_parts
from traceir.cot.teachers.teacher import TeacherRequest, prepare
from traceir.errors import InputError, TeacherError

QUESTIONS = Questions()
COLOURS = ("red", "green", "blue", "white")


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def paint(root: Path, name: str, shade: int, mode: str = "RGB") -> str:
    path = root / "mbeir_images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (shade * 20, 255 - shade * 20, shade * 7)).convert(mode).save(path)
    return f"mbeir_images/{name}"


def query(qid: str, text: str | None, image: str | None, positive: str, task_id: int) -> dict[str, Any]:
    modality = ",".join(name for name, there in (("image", image), ("text", text)) if there)
    return {"qid": qid, "query_txt": text, "query_img_path": image, "query_modality": modality, "query_src_content": None,
            "pos_cand_list": [positive], "neg_cand_list": [], "task_id": task_id}  # fmt: skip


def candidate(did: str, text: str | None, image: str | None) -> dict[str, Any]:
    return {"did": did, "txt": text, "img_path": image, "modality": "image" if image else "text", "src_content": None}


def prompts(root: Path, dataset: str, number: int, modalities: list[tuple[str, str]]) -> None:
    path = root / "instructions" / "query_instructions.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ["query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1"]
    rows += [f"{one}\t{two}\t{dataset}\t{number}\tFind the {dataset} that is meant." for one, two in modalities]
    path.write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toys: 8 complex changes of a picture, one direct, two questions in words of one content, and one to a picture."""
    root = tmp_path_factory.mktemp("toys")
    queries, labels, pool = [], [], []
    for number in range(9):
        first, last = COLOURS[number % 4], COLOURS[(number + 1) % 4]
        picture = paint(root, f"toy{number}.png", number)
        queries.append(query(f"50:{number}", f"make the left toy number {number} {last}", picture, f"50:{number}", 7))
        pool.append(candidate(f"50:{number}", None, paint(root, f"goal{number}.png", 9)))
        told = f"see {first} duck, old robot, small kite {number}; left {last}; {last} duck, old robot, small kite {number}"
        label = {"reasoning": f"{told}; the rest stays", "answer": f"{last} duck, old robot, small kite {number}"}
        labels.append({"qid": f"50:{number}", "steps": 2, "z": 1, **label} if number < 8
                      else {"qid": "50:8", "steps": 1, "z": 0, "reasoning": None, "answer": None})  # fmt: skip
    for qid in ("50:20", "50:21"):
        queries.append(query(qid, "what does the toy maker of Norvik carve", None, "50:20", 1))
        told = "the toy maker of norvik is olga; olga lives by the lake; she carves all winter long"
        labels.append({"qid": qid, "steps": 2, "z": 1, "reasoning": told, "answer": "olga carves ducks"})
    pool.append(candidate("50:20", "Olga of Norvik carves ducks.", None))
    queries.append(query("50:30", "the toy right of the one left of the kite", None, "50:0", 0))
    told = "left of the kite stands a robot; right of that robot stands the kite itself; so it is a kite"
    labels.append({"qid": "50:30", "steps": 2, "z": 1, "reasoning": told, "answer": "a small kite toy"})
    lines(root / "query" / "train" / "mbeir_toys_train.jsonl", queries)
    lines(root / "cot" / "train" / "mbeir_toys_train_cot.jsonl", labels)
    lines(root / "cand_pool" / "global" / "mbeir_union_train_cand_pool.jsonl", pool)
    prompts(root, "toys", 50, [("image,text", "image"), ("text", "text"), ("text", "image")])
    return root


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Signs in palette pictures, which a client cannot send as they are; some are named by other queries."""
    root = tmp_path_factory.mktemp("signs")
    red, green, nameless = (paint(root, f"{name}.png", shade, "P") for shade, name in enumerate(("red", "green", "nameless")))
    pool = [candidate("60:1", None, red), candidate("60:2", None, green), candidate("60:3", "crimson square", None)]
    lines(root / "cand_pool" / "global" / "mbeir_union_train_cand_pool.jsonl", pool)
    lines(
        root / "query" / "train" / "mbeir_sign_train.jsonl",
        [
            query("60:1", None, red, "60:3", 3),
            query("60:2", "emerald square", None, "60:2", 0),
            query("60:3", "the same, but in green", red, "60:2", 7),
            query("60:4", "the same, but in a kind of dark red", nameless, "60:3", 6),
        ],
    )
    prompts(root, "sign", 60, [("image", "text"), ("text", "image"), ("image,text", "image"), ("image,text", "text")])
    return root


def cases_of(root: Path) -> dict[str, CotCase]:
    source = CaseSource(root)
    try:
        return {case.record.qid: case for part in find_parts(root, 1000) for case in source.cases(part)}
    finally:
        source.close()


def request(question: TeacherQuestion) -> TeacherRequest:
    return asyncio.run(prepare(question, "scripted-oracle"))


def body(question: TeacherQuestion) -> dict[str, Any]:
    return json.loads(request(question).payload)


def test_labels_answer_all_three_kinds_of_questions(labelled: Path) -> None:
    oracle, cases = Oracle(labelled), cases_of(labelled)
    found = {qid: read_assessment(oracle.reply(body(QUESTIONS.assess(case)))) for qid, case in cases.items()}
    assert {qid for qid, one in found.items() if one["z"] == 0} == {"50:8"}
    assert all(0.75 <= one["confidence"] <= 0.99 for one in found.values())

    changed = cases["50:1"]
    assert oracle.reply(body(QUESTIONS.reason(changed))) == (
        "<reasoning>see green duck, old robot, small kite 1; left blue; blue duck, old robot, small kite 1; the rest stays"
        "</reasoning><answer>blue duck, old robot, small kite 1</answer>"
    )
    for case, answer, right in (
        (changed, "Blue duck; OLD robot, small kite 1.", True),
        (changed, "red duck, old robot, small kite 0", False),
        (cases["50:20"], "olga carves ducks", True),
        (cases["50:30"], "a small kite toy", True),  # the only picture is the target's
        (cases["50:30"], "", False),
    ):
        verdict = read_verdict(oracle.reply(body(QUESTIONS.verify(case, answer))))
        assert verdict["yes"] == right and verdict["confidence"] >= 0.75


def test_equal_contents_share_an_entry_and_keys_are_the_clients(labelled: Path) -> None:
    oracle, cases = Oracle(labelled), cases_of(labelled)
    first, again = (body(QUESTIONS.reason(cases["50:0"], attempt)) for attempt in (0, 1))
    assert oracle.read(body(QUESTIONS.reason(cases["50:21"]))).known.qids == ("50:20", "50:21")
    assert oracle.read(first).key == request(QUESTIONS.reason(cases["50:0"])).key
    assert oracle.read(first).key != oracle.read(again).key and oracle.read(first).digest == oracle.read(again).digest
    assert oracle.read(first).digest != oracle.read(body(QUESTIONS.assess(cases["50:0"]))).digest


def test_unknown_and_broken_questions_are_refused_in_words(labelled: Path) -> None:
    oracle, case = Oracle(labelled), cases_of(labelled)["50:0"]
    stranger = json.loads(json.dumps(body(QUESTIONS.assess(case))).replace("make the left", "burn the left"))
    with pytest.raises(InputError, match=r"toys_task7.*burn the left toy number 0"):
        oracle.reply(stranger)
    with pytest.raises(InputError, match="direct"):
        oracle.reply(body(QUESTIONS.reason(cases_of(labelled)["50:8"])))
    for broken in ({}, {"messages": [3]}, {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}):
        with pytest.raises(InputError):
            oracle.read(broken)


def test_without_labels_composed_queries_are_scripted_from_captions(unlabelled: Path) -> None:
    oracle, cases = Oracle(unlabelled), cases_of(unlabelled)
    rules = RuleFilter(captions=find_captions(unlabelled, None))
    answers = {}
    for qid, case in cases.items():
        found = read_assessment(oracle.reply(body(QUESTIONS.assess(case))))
        assert found["z"] == (qid in ("60:3", "60:4"))
        if found["z"]:
            checked = rules.check(case, oracle.reply(body(QUESTIONS.reason(case))))
            assert checked.rule == ""
            answers[qid] = checked.answer
            verdict = read_verdict(oracle.reply(body(QUESTIONS.verify(case, checked.answer))))
            assert verdict["yes"]
    assert answers == {"60:3": "sign of emerald square", "60:4": "sign of crimson square"}
    told = body(QUESTIONS.reason(cases["60:3"]))
    assert "shows crimson square" in oracle.reply(told)
    as_it_is = base64.b64encode((unlabelled / "mbeir_images" / "red.png").read_bytes()).decode()
    sent = told["messages"][1]["content"][1]["image_url"]["url"]
    assert sent.startswith("data:image/jpeg")
    told["messages"][1]["content"][1]["image_url"]["url"] = f"data:image/png;base64,{as_it_is}"
    assert "shows crimson square" in oracle.reply(told)
    assert "shows what is to be changed" in oracle.reply(body(QUESTIONS.reason(cases["60:4"])))


@pytest.mark.parametrize("kind", CONTENT)
def test_every_fault_meets_the_rule_meant_for_it(labelled: Path, kind: str) -> None:
    oracle, cases = Oracle(labelled), cases_of(labelled)
    rules = RuleFilter(captions={case.record.image_path or "": _source_of(oracle, case) for case in cases.values()})
    shown = 0
    for attempt in range(4):  # other instructions make other draws of the wording
        for case in cases.values():
            question = QUESTIONS.reason(CotCase(case.record, case.task, f"Try {attempt}.", case.positives, case.root))
            asked = oracle.read(body(question))
            if not asked.known.z or kind in barred_for(asked, oracle):
                continue
            raw, finish = spoil(kind, asked, oracle)
            checked = rules.check(case, raw, finish)
            shown += 1
            if kind == "hallucination":
                verdict = read_verdict(oracle.reply(body(QUESTIONS.verify(case, checked.answer))))
                assert checked.rule == "keyword" or not verdict["yes"]
            else:
                assert (checked.rule, raw) == (MEANT[kind], raw)
    assert shown >= 32


def _source_of(oracle: Oracle, case: CotCase) -> str:
    return oracle.read(body(QUESTIONS.assess(case))).known.source


def test_bad_json_cannot_be_read_and_true_replies_break_no_rule(labelled: Path) -> None:
    oracle, cases = Oracle(labelled), cases_of(labelled)
    rules = RuleFilter()
    for number, case in enumerate(cases.values()):
        told, finish = spoil("bad_json", oracle.read(body(QUESTIONS.assess(case))), oracle)
        with pytest.raises(ReplyFormatError):
            read_assessment(told, finish)
        told, finish = spoil("bad_json", oracle.read(body(QUESTIONS.verify(case, f"toy {number}"))), oracle)
        with pytest.raises(ReplyFormatError):
            read_verdict(told, finish)
        assert finish == "stop"
        if case.record.qid != "50:8":
            assert rules.check(case, oracle.reply(body(QUESTIONS.reason(case)))).rule == ""


def test_faults_are_drawn_by_content_at_their_rate_in_equal_shares() -> None:
    digests = [f"{number:064x}" for number in range(40_000)]
    faults = Faults(0.1, seed=3)
    reason = Counter(faults.fault_of(digest, "reason") for digest in digests)
    assess = Counter(faults.fault_of(digest, "assess") for digest in digests)
    content = sum(reason[kind] for kind in CONTENT)
    assert content / 40_000 == pytest.approx(0.1, abs=0.008)
    assert (40_000 - assess[None]) / 40_000 == pytest.approx(0.1, abs=0.008)
    assert set(reason) == {None, *CONTENT, *TRANSPORT} and set(assess) == {None, "bad_json", *TRANSPORT}
    assert all(0.7 < reason[kind] / (content / len(CONTENT)) < 1.3 for kind in CONTENT)
    assert [Faults(0.1, 3).fault_of(digest, "reason") for digest in digests[:2000]] == [
        faults.fault_of(digest, "reason") for digest in digests[:2000]
    ]
    assert any(Faults(0.1, 4).fault_of(digest, "reason") != faults.fault_of(digest, "reason") for digest in digests[:2000])
    barred = Counter(Faults(1.0, 3).fault_of(digest, "reason", ("source_copy",)) for digest in digests[:2000])
    assert barred["source_copy"] == 0 and barred["loop"] > 0
    assert {Faults(1.0, kinds=("loop",)).fault_of(digest, "reason") for digest in digests[:50]} == {"loop"}
    for rate, kinds in ((1.5, ALL), (0.1, ("gremlin",))):
        with pytest.raises(InputError):
            Faults(rate, 0, kinds)


class Client:
    """Plain HTTP, so that the status, headers and broken connections are seen as they are."""

    def __init__(self, url: str, key: str) -> None:
        self.address, self.key = url.removeprefix("http://").partition("/")[0], key

    def ask(self, told: object, path: str = "/v1/chat/completions") -> tuple[int, dict[str, Any], dict[str, str]]:
        connection = http.client.HTTPConnection(self.address, timeout=30)
        try:
            headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
            content = told if isinstance(told, bytes) else json.dumps(told).encode()
            connection.request("POST", path, content, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read()), dict(response.getheaders())
        finally:
            connection.close()


def test_the_server_answers_after_one_fault_each_and_logs_it(labelled: Path, tmp_path: Path) -> None:
    log = tmp_path / "teacher.jsonl"
    log.write_bytes(b'{"event": "start", "request": 1')  # cut by a kill
    oracle, faults, case = Oracle(labelled), Faults(1.0, 0, TRANSPORT), cases_of(labelled)["50:0"]
    asked = {}
    for number in range(40):
        told = body(QUESTIONS.verify(case, f"toy {number}"))
        asked.setdefault(faults.fault_of(oracle.read(told).digest, "verify"), told)
    assert set(asked) == set(TRANSPORT)
    with running(labelled, key="secret", faults=1.0, kinds=",".join(TRANSPORT), log=str(log), stall=0.2) as url:
        client = Client(url, "secret")
        for fault, told in asked.items():
            _meet(client, told, str(fault))
            status, reply, _ = client.ask(told)
            assert status == 200 and reply["choices"][0]["message"]["content"] == oracle.reply(told)
            assert reply["usage"]["prompt_tokens"] > 2 * 85
    rows = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    begun, ended = ([row for row in rows if row["event"] == event] for event in ("start", "end"))
    assert [row["request"] for row in begun] == [row["request"] for row in ended] == list(range(2, 10))
    assert [(row["fault"], row["paid"]) for row in ended] == [pair for fault in asked for pair in ((fault, False), (None, True))]
    assert [row["key"] for row in ended] == [oracle.read(told).key for told in asked.values() for _ in range(2)]
    assert all(row["qids"] == ["50:0"] and row["stage"] == "verify" for row in rows)


def _meet(client: Client, told: dict[str, Any], fault: str) -> None:
    if fault in ("stall", "cut"):
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            client.ask(told)
        return
    status, reply, headers = client.ask(told)
    assert status == {"rate_limit": 429, "server_error": 500}[fault] and reply["error"]["message"]
    if status == 429:
        assert float(headers["retry-after"]) == 0.05 and headers["retry-after-ms"] == "50"


def test_the_server_refuses_wrong_key_model_path_and_query(labelled: Path, tmp_path: Path) -> None:
    told = body(QUESTIONS.assess(cases_of(labelled)["50:0"]))
    log = tmp_path / "teacher.jsonl"
    with running(labelled, key="secret", log=str(log)) as url:
        client = Client(url, "secret")
        assert client.ask(told)[0] == 200
        status, reply, _ = Client(url, "guess").ask(told)
        assert status == 401 and reply["error"]["code"] == "invalid_api_key"
        assert client.ask({**told, "model": "gpt-none"})[1]["error"]["code"] == "model_not_found"
        assert client.ask({**told, "stream": True})[0] == 400
        assert client.ask(b"{not json")[0] == 400
        assert client.ask({**told, "messages": [{"role": "user", "content": "<task>toys_task7</task>"}]})[0] == 400
        assert client.ask(told, "/v1/embeddings")[0] == 404
    ends = [json.loads(line) for line in log.read_text().splitlines() if '"end"' in line]
    assert [(row["status"], row["paid"]) for row in ends] == [(200, True)] + [(code, False) for code in (401, 404, 400, 400, 400)]


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="no training queries"), running(tmp_path):
        pass


BAD = (
    b"", b"null", b"[]", b"{not json", b"\xff", b"NaN", b"[" * 100_000, b'{"model": ' + b"9" * 5000 + b"}",
    b'{"model": "scripted-oracle"}',
    b'{"model": "scripted-oracle", "messages": 3}', b'{"model": "scripted-oracle", "messages": [[]]}',
    b'{"model": "scripted-oracle", "messages": [{"content": [{"type": "text", "text": 3}]}]}',
    b'{"model": "scripted-oracle", "messages": [{"content": [{"type": "image_url", "image_url": {"url": []}}]}]}',
    b'{"model": "scripted-oracle", "messages": [{"content": "<task>\\ud800</task>"}]}',
    b'{"model": "scripted-oracle", "messages": [{"content": "x"}], "seed": 1e999}',
    b'{"model": "scripted-oracle", "messages": [{"content": "x"}], "a": ' + b'{"a":' * 900 + b"1" + b"}" * 901,
)  # fmt: skip


def test_field_report_19_the_teacher_answers_to_its_own_host_and_refuses_all_that_is_no_question(labelled: Path) -> None:
    with running(labelled) as url:
        address = url.removeprefix("http://").partition("/")[0]
        connection = http.client.HTTPConnection(address, timeout=30)
        for number, raw in enumerate(BAD):
            connection.request("POST", "/v1/chat/completions", raw, {"Content-Type": "application/json"})
            response = connection.getresponse()
            told = json.loads(response.read())
            assert response.status in (400, 404, 415) and told["error"]["message"], number
        for host, status in (
            ("evil.example", 421),
            ("127.0.0.1", 200),
            ("localhost:1", 200),
            ("127.0.0.1.evil.example", 421),
            ("a b", 400),
        ):
            connection.request("GET", "/v1/models", headers={"Host": host})
            response = connection.getresponse()
            response.read()
            assert response.status == status, host
        told = json.dumps(body(QUESTIONS.assess(cases_of(labelled)["50:0"]))).encode()
        for headers, status in (
            ({"Host": "evil.example", "Content-Type": "application/json"}, 421),
            ({"Origin": "http://evil.example", "Content-Type": "application/json"}, 403),
            ({"Content-Type": "text/plain"}, 415),
            ({"Content-Type": "application/json"}, 200),
        ):
            connection.request("POST", "/v1/chat/completions", told, headers)
            response = connection.getresponse()
            response.read()
            assert response.status == status, headers
        connection.close()
