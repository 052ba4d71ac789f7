"""The teacher client against a small HTTP server of its own: keys, retries, pace, spend, the journal, and batch files."""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from traceir.connection import Connection
from traceir.cot.ask import TeacherQuestion, Stage
from traceir.cot.teachers.asker import Asker, Budget, SpendLimitError, UnansweredError
from traceir.cot.teachers.batch_files import BatchTeacher, read_batch_results
from traceir.cot.teachers.completion import Reply, RetryableError, reply_of, retry_after
from traceir.cot.teachers.answer_cache import AnswerCache
from traceir.cot.teachers.pace import Pacer
from traceir.cot.teachers.teacher import (
    OpenAITeacher,
    RecordedTeacher,
    image_url,
    UnansweredError,
    prepare,
)
from traceir.errors import DataError, ImageError, InputError, ModelError, TeacherError

KEY = "sk-invented-0123456789"
Answer = tuple[int, dict[str, str], bytes]


def completion(text: str = "an invented reply", prompt: int = 100, finish: str = "stop") -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": 10}
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    return json.dumps({"id": "x", "object": "chat.completion", "model": "m-1", "choices": [choice], "usage": usage}).encode()


def failure(status: int, message: str, **headers: str) -> Answer:
    return status, headers, json.dumps({"error": {"message": message, "code": "invented"}}).encode()


class Server:
    """Answers chat completions by `script(number of the request, body)`; keeps what it saw."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.most_at_once = self._at_once = 0
        self.wait_s = 0.0
        self.script: Callable[[int, dict[str, Any]], Answer] = lambda number, body: (200, {}, completion())
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.bodies.append(body)
            number = len(self.bodies)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        time.sleep(self.wait_s)
        status, headers, content = self.script(number, body)
        with self._lock:
            self._at_once -= 1
        try:
            handler.send_response(status)
            for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(content))} | headers).items():
                handler.send_header(name.replace("_", "-"), value)
            handler.end_headers()
            handler.wfile.write(content)
        except OSError:
            pass  # whoever asked has hung up

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def question(number: int = 0, *parts: str | Path, stage: Stage = "assess", max_tokens: int = 32) -> TeacherQuestion:
    shown = ("<query>a blue square</query>", f"<task>{number}</task>", *parts)
    return TeacherQuestion(stage, f"9:{number}", "cirr_task7", 0, "Sort the query.", shown, max_tokens, 0.0, 1)


def ask_all(
    url: str, folder: Path, questions: list[TeacherQuestion], *, concurrency: int = 8, timeout_s: float = 5.0, **options: Any
) -> tuple[Asker, list[Reply | BaseException]]:
    """All questions at once through a fresh client over the journal in `folder`."""

    async def run() -> tuple[Asker, list[Reply | BaseException]]:
        with AnswerCache(folder) as journal:
            teacher = OpenAITeacher("m-1", url, KEY, timeout_s=timeout_s)
            asker = Asker(teacher, journal, Pace(concurrency), **{"base_s": 0.001, "cap_s": 0.002} | options)
            found = await asyncio.gather(*(asker.ask(one) for one in questions), return_exceptions=True)
            await asker.close()
        return asker, found

    return asyncio.run(run())


def picture(path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB", **options: Any) -> Path:
    Image.linear_gradient("L").resize(size).convert(mode).save(path, **options)
    return path


def test_field_report_06_what_pillow_calls_mpo_goes_to_a_teacher_as_jpeg(tmp_path: Path) -> None:
    two = picture(tmp_path / "two.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (40, 30))])
    url, digest = image_url(two, 0)
    sent = base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))
    assert hashlib.sha256(sent).hexdigest() == digest and Image.open(BytesIO(sent)).format == "JPEG"
    plain = picture(tmp_path / "plain.jpg")
    (tmp_path / "longer.jpg").write_bytes(plain.read_bytes() + b"video\xff\xd9")
    for name, as_it_is in (("plain.jpg", True), ("longer.jpg", False)):
        sent = base64.b64decode(image_url(tmp_path / name, 0)[0].removeprefix("data:image/jpeg;base64,"))
        assert (sent == plain.read_bytes()) is as_it_is and Image.open(BytesIO(sent)).size == (40, 30)


def test_images_go_as_they_are_or_shrunk(tmp_path: Path) -> None:
    plain = picture(tmp_path / "plain.png")
    url, digest = image_url(plain, 40 * 30)
    assert url.startswith("data:image/png;base64,") and image_url(plain, 0) == (url, digest)
    smaller = body_of(question(0, plain), "m", 600)["messages"][1]["content"][2]["image_url"]["url"]
    assert smaller.startswith("data:image/jpeg;base64,")
    assert image_url(picture(tmp_path / "clear.png", mode="RGBA"), 0)[0].startswith("data:image/jpeg")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert image_url(picture(tmp_path / "turned.jpg", exif=exif), 0)[1] != image_url(picture(tmp_path / "plain.jpg"), 0)[1]
    whole = picture(tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "words.jpg").write_text("no picture")
    for name in ("cut.jpg", "words.jpg", "missing.jpg"):
        with pytest.raises(ImageError, match=name):
            image_url(tmp_path / name)


def test_key_is_of_the_content_alone(tmp_path: Path) -> None:
    one, same, other = picture(tmp_path / "a.png"), picture(tmp_path / "b.png"), picture(tmp_path / "c.png", (41, 30))
    digest = image_url(one)[1]
    asked = question(0, one, f'"url":"sha256:{digest}"', "line\n\u2028 \ud800")

    def request(asked: TeacherQuestion, model: str = "m", **extra: Any) -> Any:
        return asyncio.run(request_of(asked, model, 0, extra))

    made = request(asked)
    assert json.loads(made.payload) == body_of(asked, "m", 0) and made.key == key_of(body_of(asked, "m", 0))
    assert request(replace(asked, parts=(*asked.parts[:2], same, *asked.parts[3:]))).key == made.key
    keys = {made.key, request(asked, "n").key, request(asked, top_p=0.9).key, request(replace(asked, seed=2)).key}
    keys.add(request(replace(asked, parts=(*asked.parts[:2], other, *asked.parts[3:]))).key)
    assert len(keys) == 5 and request(asked, top_p=1, top_k=2).key == request(asked, top_k=2, top_p=1).key
    renamed = json.loads(request(asked, max_tokens=None, max_completion_tokens=9).payload)
    assert "max_tokens" not in renamed and renamed["max_completion_tokens"] == 9
    with pytest.raises(TeacherError, match="'model'"):
        OpenAITeacher("m", "http://localhost", extra={"model": "n"})


def test_tries_again_then_reuses(server: Server, tmp_path: Path) -> None:
    first: list[Answer] = [
        failure(429, "slow down", retry_after="0.01"),
        failure(500, "oops"),
        (200, {}, b'{"choices": ['),
        (200, {}, b'{"error": {"message": "in a 200"}}'),
        failure(503, "busy"),
    ]
    server.script = lambda number, body: first[number - 1] if number <= len(first) else (200, {}, completion(finish="length"))
    asker, (reply,) = ask_all(server.url, tmp_path, [question()])
    assert isinstance(reply, Reply) and (reply.text, reply.finish, reply.prompt_tokens) == ("an invented reply", "length", 100)
    assert asker.retried == 5 and len(server.bodies) == 6 and asker.pace.limits.permitted < 8
    assert reply.key == key_of(server.bodies[0])
    again, (known,) = ask_all(server.url, tmp_path, [question()])
    assert known == reply and again.reused == 1 and len(server.bodies) == 6


def test_asks_once_and_so_many_at_a_time(server: Server, tmp_path: Path) -> None:
    server.wait_s = 0.02
    asked = [question(number % 12) for number in range(36)]
    asker, replies = ask_all(server.url, tmp_path, asked, concurrency=4)
    assert len(server.bodies) == 12 == asker.journal.answers and server.most_at_once == 4
    assert all(isinstance(reply, Reply) for reply in replies) and "0 in flight" in asker.status()


@pytest.mark.parametrize(("status", "named"), [(401, "API key"), (403, "API key"), (404, "no model 'm-1'"), (402, "budget")])
def test_what_cannot_get_better_ends_at_once(server: Server, tmp_path: Path, status: int, named: str) -> None:
    server.script = lambda number, body: failure(status, f"not with {KEY}")
    asker, found = ask_all(server.url, tmp_path, [question(number) for number in range(6)], concurrency=2)
    assert len(server.bodies) <= 2 and asker.journal.answers == 0
    for error in found:
        assert type(error) is TeacherError and named in str(error) and server.url in str(error) and KEY not in str(error)


def test_refused_question_is_a_reply(server: Server, tmp_path: Path) -> None:
    server.script = lambda number, body: failure(400, "picture too large")
    asker, (reply,) = ask_all(server.url, tmp_path, [question()])
    assert isinstance(reply, Reply) and (reply.finish, reply.error) == ("error", "400: picture too large")
    assert asker.refused == 1 and ask_all(server.url, tmp_path, [question()])[1] == [reply] and len(server.bodies) == 1


def test_unreachable_teacher_is_given_up_early(server: Server, tmp_path: Path) -> None:
    server.close()
    _, found = ask_all(server.url, tmp_path, [question(number) for number in range(3)], attempts=1000)
    assert all(type(error) is TeacherError and server.url in str(error) and "never reached" in str(error) for error in found)
    with pytest.raises(TeacherError, match="http address"):
        OpenAITeacher("m", "localhost:8000")


def test_question_without_answer_stays_open(server: Server, tmp_path: Path) -> None:
    server.script = lambda number, body: failure(500, "oops") if "<task>1" in str(body) else (200, {}, completion())
    asker, (good, bad) = ask_all(server.url, tmp_path, [question(0), question(1)], attempts=3)
    assert isinstance(good, Reply) and isinstance(bad, UnansweredError) and "9:1" in str(bad) and "oops" in str(bad)
    assert len(server.bodies) == 4 and asker.unanswered == 1 and asker.journal.answers == 1


def test_stalled_request_times_out(server: Server, tmp_path: Path) -> None:
    server.wait_s = 0.5
    asker, (error,) = ask_all(server.url, tmp_path, [question()], timeout_s=0.05, attempts=2)
    assert isinstance(error, UnansweredError) and "0.05 s" in str(error) and asker.pace.limits.permitted == 2


def test_spend_limit_is_kept(server: Server, tmp_path: Path) -> None:
    asked = [question(number) for number in range(40)]
    prices = {"price_in": 10.0, "price_out": 100.0, "spend_limit": 0.03}  # an answer: 0.002 USD, 0.0042 by estimate
    asker, found = ask_all(server.url, tmp_path, asked, concurrency=4, **prices)
    kept = sum(isinstance(reply, Reply) for reply in found)
    assert kept == len(server.bodies) == asker.journal.answers and 6 <= kept <= 15 and asker.spent <= 0.03
    assert all(isinstance(error, (Reply, SpendLimitError)) for error in found)
    asker, found = ask_all(server.url, tmp_path, asked, concurrency=4, **{**prices, "spend_limit": 1.0})
    assert all(isinstance(reply, Reply) for reply in found) and asker.reused == kept and len(server.bodies) == 40


def test_drain_keeps_what_is_in_flight(server: Server, tmp_path: Path) -> None:
    server.wait_s = 1.0

    async def run() -> tuple[int, list[Any]]:
        with AnswerCache(tmp_path) as journal:
            asker = Asker(OpenAITeacher("m-1", server.url), journal, Pace(2))
            asking = [asyncio.create_task(asker.ask(question(number))) for number in range(5)]
            while len(server.bodies) < 2:
                await asyncio.sleep(0.01)
            asking[0].cancel()
            await asker.close()
            return journal.answers, await asyncio.gather(*asking, return_exceptions=True)

    answers, found = asyncio.run(run())
    assert answers == 2 == len(server.bodies) and isinstance(found[0], asyncio.CancelledError) and isinstance(found[1], Reply)
    assert all(isinstance(error, UnansweredError) for error in found[2:])


REPLY = Reply("text of \u2028 the reply", "stop", "m-1", 7, 3)


def key(number: int) -> str:
    return f"{number:016x}" + "0" * 48


def test_journal_survives_half_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with AnswerCache(tmp_path, "0000-of-0002") as one, AnswerCache(tmp_path, "0001-of-0002") as two:
        one.put(key(1), question(1), REPLY)
        two.put(key(2), question(2), REPLY)
        with pytest.raises(TeacherError, match="another process"):
            AnswerCache(tmp_path, "0000-of-0002")
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes() + b'{"key":"00')
    with AnswerCache(tmp_path, "0000-of-0002") as one:
        assert "its 10 bytes are removed" in caplog.text and (one.answers, one.prompt_tokens, one.completion_tokens) == (2, 14, 6)
        one.put(key(3), question(3), REPLY)
        same_hash = key(3)[:-1] + "1"
        assert one.get(same_hash) is None
        one.put(same_hash, question(3), replace(REPLY, text="other"))
        assert [one.get(key(number)) for number in (1, 2, 3)] == [replace(REPLY, key=key(number)) for number in (1, 2, 3)]
        found = one.get(same_hash)
        assert found and found.text == "other"
    with AnswerCache(tmp_path, None) as reader:
        assert len(reader) == 4 and key(2) in reader
        with pytest.raises(TeacherError, match="reading only"):
            reader.put(key(4), question(4), REPLY)
    broken = tmp_path / "0001-of-0002.jsonl"
    broken.write_bytes(b'{"key": 3}\n' + broken.read_bytes())
    with pytest.raises(DataError, match=r"0001-of-0002.jsonl:1: .*remove this line"):
        AnswerCache(tmp_path, "0000-of-0002")


def test_full_disk_leaves_whole_lines(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_all(server.url, tmp_path, [question(0)])
    whole, write = (tmp_path / "0000-of-0001.jsonl").read_bytes(), os.write

    def full(fd: int, data: bytes) -> int:
        if len(data) < 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:-60])

    monkeypatch.setattr("traceir.cot.teachers.journal.os.write", full)
    asker, found = ask_all(server.url, tmp_path, [question(number) for number in range(5)], concurrency=1)
    assert isinstance(found[0], Reply) and asker.reused == 1 and len(server.bodies) == 2
    assert all(type(error) is TeacherError and "No space left" in str(error) for error in found[1:])
    assert (tmp_path / "0000-of-0001.jsonl").read_bytes() == whole
    monkeypatch.undo()
    assert all(isinstance(reply, Reply) for reply in ask_all(server.url, tmp_path, [question(number) for number in range(5)])[1])


WRITER = """
import sys
from pathlib import Path
from traceir.cot.ask import TeacherQuestion
from traceir.cot.teachers.journal import Journal
from traceir.cot.teachers.completion import Reply
journal = AnswerCache(Path(sys.argv[1]))
for number in range(10**9):
    question = TeacherQuestion("assess", str(number), "t", 0, "", (), 1, 0.0, 0)
    journal.put(f"{number:016x}" + "0" * 48, question, Reply("x" * 3000, "stop", "m", 1, 1))
    print(number, flush=True)
"""


def test_kill_takes_nothing_acknowledged(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    lines = [writer.stdout.readline() for _ in range(200)]
    writer.send_signal(signal.SIGKILL)
    lines += writer.stdout.readlines()
    writer.wait()
    with AnswerCache(tmp_path) as journal:
        assert all(journal.get(key(int(line))) for line in lines if line.endswith(b"\n"))
        assert 0 <= journal.answers - len(lines) <= 1


def test_places_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "FOLD", 7)
    made, entries = places.Places(), [(number * 2**59 // 97 % 2**64, number % 5, number * 1000) for number in range(100)]
    more = [(number + 5, 1, 1) for number in range(20)]
    for entry in [*entries, (entries[0][0], 9, 9), *more]:
        made.add(*entry)
    assert len(made) == 121 and list(made.find(1)) == []
    assert all(next(made.find(hash)) == (file, offset) for hash, file, offset in entries)
    assert list(made.find(entries[0][0])) == [(0, 0), (9, 9)]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_limits_back_off_and_recover() -> None:
    clock = Clock()
    limits = Limits(8, clock=clock)
    slots = [limits.start(0) for _ in range(8)]
    assert limits.delay(0) == float("inf")
    for slot in slots[:3]:
        limits.end(slot, overloaded=True)
    assert limits.permitted == 4 and limits.delay(0) == float("inf")  # five are in flight still
    limits.end(slots[3], overloaded=True, retry_after=30)
    assert limits.permitted == 4
    for slot in slots[4:]:
        limits.end(slot, tokens=0)
    assert limits.in_flight == 0 and 4.9 < limits.permitted < 5 and limits.delay(0) == 30
    clock.now += 30
    assert limits.delay(0) == 0
    for _ in range(5):
        limits.end(limits.start(0), overloaded=True)
    assert limits.permitted == 1 and limits.delay(0) == 0
    for _ in range(100):
        limits.end(limits.start(0), tokens=0)
    assert limits.permitted == 8
    with pytest.raises(InputError, match="0 at a time"):
        Limits(0)


def test_limits_keep_the_rates() -> None:
    clock = Clock()
    limits = Limits(1000, requests_per_minute=120, tokens_per_minute=6000, clock=clock)
    started: list[float] = []
    for _ in range(100):
        wait = limits.delay(10)
        clock.now += wait
        limits.end(limits.start(10), tokens=10)
        started.append(clock.now)
    assert max(sum(1 for other in started if at <= other < at + 60) for at in started) <= 122
    clock.now += 60
    limits.end(limits.start(100), tokens=700)  # took more than estimated: the debt is waited for
    assert limits.delay(50) == pytest.approx(6.5)


def test_pace_waits_for_its_turn() -> None:
    async def run() -> list[str]:
        pace, seen = Pace(1), []
        first = await pace.start()

        async def take(name: str) -> None:
            slot = await pace.start()
            seen.append(name)
            pace.end(slot, tokens=0)

        waiting = [asyncio.create_task(take(name)) for name in "abc"]
        await asyncio.sleep(0)
        waiting[1].cancel()
        pace.end(first, tokens=0, retry_after=0.01)
        await asyncio.gather(*waiting, return_exceptions=True)
        slot = await pace.start()
        admitted = asyncio.create_task(pace.start())
        await asyncio.sleep(0)
        pace.end(slot, tokens=0)
        admitted.cancel()  # after its turn came, before it knew
        await asyncio.gather(admitted, return_exceptions=True)
        assert pace.limits.in_flight == 0
        return seen

    assert asyncio.run(run()) == ["a", "c"]
    assert retry_after({"retry-after": "Mon, 23 Nov 2026 10:00:30 GMT"}, 1795428000.0) == pytest.approx(30)
    assert retry_after({"retry-after": "soon"}, 0.0) is None and retry_after({}, 0.0) is None


def test_recorded_teacher(tmp_path: Path) -> None:
    file = tmp_path / "replies.jsonl"
    lines = [{"stage": "assess", "qid": "9:0", "text": "zero"}, {"stage": "assess", "qid": "9:0", "text": "one", "attempt": 1}]
    file.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    teacher = RecordedTeacher(file)
    asked = [question(0), replace(question(0), attempt=1), question(1)]

    async def run() -> list[Reply]:
        with AnswerCache(tmp_path / "journal") as journal:
            asker = Asker(teacher, journal, Pace(2))
            found = [await asker.ask(one) for one in asked]
            await asker.close()
        return found

    zero, one, none = asyncio.run(run())
    assert (zero.text, one.text, zero.model) == ("zero", "one", teacher.name) and teacher.name.startswith("recorded:")
    assert none.finish == "error" and str(file) in none.error and "'9:1'" in none.error
    assert asyncio.run(run()) == [zero, one, none]
    file.write_text('{"stage": "assess", "qid": 3, "text": ""}\n')
    with pytest.raises(DataError, match=r"replies.jsonl:1"):
        RecordedTeacher(file)


def test_batch_files_and_back(server: Server, tmp_path: Path) -> None:
    asked, folder = [question(number) for number in range(5)], tmp_path / "batch"

    async def collect() -> int:
        with AnswerCache(tmp_path / "journal") as journal:
            teacher = BatchTeacher(folder, "m-1", requests_per_file=2)
            asker = Asker(teacher, journal, Pace(4))
            found = await asyncio.gather(*(asker.ask(one) for one in asked + asked), return_exceptions=True)
            assert all(isinstance(error, UnansweredError) for error in found)
            await asker.close()
        return teacher.written

    assert asyncio.run(collect()) == 5 and asyncio.run(collect()) == 0
    files = sorted(folder.glob("requests-0*.jsonl"))
    requests = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert [len(file.read_text().splitlines()) for file in files] == [2, 2, 1]
    assert all(one["custom_id"] == key_of(one["body"]) and one["url"] == "/v1/chat/completions" for one in requests)

    results: list[dict[str, Any]] = [
        {"custom_id": one["custom_id"], "response": {"status_code": 200, "body": json.loads(completion())}, "error": None}
        for one in requests
    ]
    results[3]["response"] = {"status_code": 400, "body": {"error": {"message": "too long"}}}
    results[4] |= {"response": None, "error": {"code": "batch_expired", "message": "too late"}}
    output = folder / "output.jsonl"
    output.write_text("".join(json.dumps(line) + "\n" for line in results))
    with AnswerCache(tmp_path / "journal", "batch") as journal:
        assert read_batch_results([output], journal) == {"imported": 4, "refused": 1, "known": 0, "failed": 1}
        assert read_batch_results([output], journal)["known"] == 4
        output.write_text('{"custom_id": "7", "response": null, "error": null}\n')
        with pytest.raises(DataError, match=r"output.jsonl:1"):
            read_batch_results([output], journal)
    first = json.loads((tmp_path / "journal" / "batch.jsonl").read_text().splitlines()[0])
    assert (first["stage"], first["qid"]) == ("assess", "9:0")
    asker, found = ask_all(server.url, tmp_path / "journal", asked)
    assert asker.reused == 4 and len(server.bodies) == 1 and all(isinstance(reply, Reply) for reply in found)


# What others sent that is no text, no number, no completion


def body(message: object, **more: Any) -> bytes:
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    return json.dumps({"model": "m", "choices": [{"message": message, "finish_reason": "stop"}], "usage": usage} | more).encode()


@pytest.mark.parametrize(
    ("raw", "text", "finish"),
    [
        (body({"content": "a \ud83d b \x00 \U0001f600"}), "a \ufffd b \ufffd \U0001f600", "stop"),
        (b'{"choices": [{"message": {"content": "\xff\xed\xa0\x80\xc0\x80"}}]}', "\ufffd" * 6, "stop"),
        (b"\xef\xbb\xbf" + body({"content": "x"}), "x", "stop"),
        (body({"content": None, "refusal": "no \udc00"}), "no \ufffd", "stop"),
        (body({"content": " ", "reasoning_content": "thought"}), "<think>thought", "stop"),
        (body({"content": None, "reasoning": {"a": 1}, "reasoning_content": None}), "", "stop"),
        (body({"content": ["a", None, 3, {"text": "b"}, {"type": "reasoning", "text": "c"}, {"text": None}]}), "ab", "stop"),
        (body({"content": {"complex": True}}), '{"complex": true}', "stop"),
        (body("words"), "", "stop"),
        (body(None), "", "stop"),
        (body({"content": "x"}, usage=[1], model=["\ud800"]), "x", "stop"),
        (body({"content": "x"}, choices=[]), "", "error"),
        (body({"content": "x"}, choices=[None]), "", "error"),
        (body({}, choices=[{"message": {"content": "x"}, "finish_reason": "MAX_TOKENS"}]), "x", "length"),
        (body({}, choices=[{"message": {"content": "x"}, "finish_reason": ["SAFETY"]}]), "x", "stop"),
    ],
)
def test_field_report_03_a_completion_of_any_shape_is_a_reply_of_valid_text(raw: bytes, text: str, finish: str) -> None:
    reply = reply_of(raw, "m")
    assert (reply.text, reply.finish) == (text, finish)
    f"{reply.model}{reply.error}".encode()


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"<html>", b"data: {}", b'{"choices": 3}', b"[" * 100_000, b'{"error": {"a": "\\ud800"}}']
)
def test_field_report_03_what_is_no_completion_is_tried_again(raw: bytes) -> None:
    with pytest.raises(RetryableError, match="not a chat completion") as caught:
        reply_of(raw, "m")
    assert caught.value.garbled


@pytest.mark.parametrize(
    ("told", "number"),
    [
        (7, 7),
        ("7", 7),
        (7.0, 7),
        (float("nan"), 0),
        (float("inf"), 0),
        (10**4000, 0),
        (-1, 0),
        (True, 0),
        (None, 0),
        ("x", 0),
        ([], 0),
    ],
)
def test_field_report_03_tokens_are_numbers_that_can_be_summed(told: object, number: int) -> None:
    reply = reply_of(body({"content": "x"}, usage={"prompt_tokens": told, "completion_tokens": told}), "m")
    assert (reply.prompt_tokens, reply.completion_tokens) == (number, number) and reply.prompt_tokens * 0.5 >= 0


def test_field_report_03_errors_journals_recorded_files_and_batches_are_made_valid(server: Server, tmp_path: Path) -> None:
    server.script = lambda number, body: (400, {}, b'{"error": {"message": "no \\ud83d \xff \\u0000", "code": 9}}')
    _, (refused,) = ask_all(server.url, tmp_path / "journal", [question(0)])
    assert isinstance(refused, Reply) and refused.error == "400: no \ufffd \ufffd \ufffd"
    line = {"key": key(1), "stage": "assess", "qid": "9:\ud800", "text": "a \udfff", "finish": "stop", "model": "\ud800",
            "error": "", "prompt_tokens": 10**400, "completion_tokens": -3}  # fmt: skip
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "w.jsonl").write_text("\ufeff" + json.dumps(line) + "\n")
    with AnswerCache(tmp_path / "old") as journal:
        assert journal.get(key(1)) == Reply("a \ufffd", "stop", "\ufffd", 0, 0, "", key(1))
        assert (journal.prompt_tokens, journal.completion_tokens) == (0, 0)
        output = tmp_path / "output.jsonl"
        answer = {"custom_id": key(2), "response": {"status_code": 200, "body": json.loads(completion("b \ud83d"))}}
        output.write_bytes(b"\xef\xbb\xbf" + json.dumps(answer).encode() + b"\n")
        assert read_batch_results([output], journal)["imported"] == 1
        taken = journal.get(key(2))
        assert taken is not None and taken.text == "b \ufffd"
    recorded = tmp_path / "recorded.jsonl"
    recorded.write_bytes(b'\xef\xbb\xbf{"stage": "assess", "qid": "9:0", "text": "c \\ud83d \xff"}\n')
    assert asyncio.run(RecordedTeacher(recorded).reply(question(0))).text == "c \ufffd \ufffd"


def test_field_report_09_answers_that_are_no_completions_end_a_build_early(server: Server, tmp_path: Path) -> None:
    server.script = lambda number, body: (200, {}, b"data: [DONE]")
    asker, found = ask_all(server.url, tmp_path, [question(number) for number in range(9)], concurrency=2, attempts=20)
    assert len(server.bodies) <= 16 and asker.journal.answers == 0
    assert all(type(error) is TeacherError and "not a chat completion" in str(error) for error in found)
    server.script = lambda number, body: (200, {}, b"<html>" if "<task>1" in str(body) else completion())
    server.bodies.clear()
    _, (good, bad) = ask_all(server.url, tmp_path, [question(0), question(1)], concurrency=1, attempts=20)
    assert isinstance(good, Reply) and isinstance(bad, UnansweredError) and "in 4 tries" in str(bad) and len(server.bodies) == 5


def test_field_report_09_an_answer_taken_back_is_asked_anew(server: Server, tmp_path: Path) -> None:
    _, (reply,) = ask_all(server.url, tmp_path, [question(0)])
    assert isinstance(reply, Reply)
    with AnswerCache(tmp_path) as journal:
        journal.take_back(reply.key)
        assert journal.get(reply.key) is None and (journal.answers, journal.prompt_tokens) == (1, 100)
    server.script = lambda number, body: (200, {}, completion("another"))
    assert ask_all(server.url, tmp_path, [question(0)])[1][0].text == "another"
    with AnswerCache(tmp_path) as journal:
        found = journal.get(reply.key)
        assert found is not None and found.text == "another" and journal.answers == 2


def test_field_report_03_answers_of_any_server_are_valid_text(server: Server) -> None:
    told: list[Answer] = [
        (200, {}, b'\xef\xbb\xbf{"a\\ud800": ["\\udfff\xff"]}'),
        (400, {}, b'{"detail": "no \\ud83d"}'),
        (200, {}, b"[" * 50_000),
    ]
    server.script = lambda number, body: told[number - 1]
    connection = Connection(server.url, tries=1)
    try:
        assert connection.call("POST", "/x", {}).body == {"a\ufffd": ["\ufffd\ufffd"]}
        assert connection.call("POST", "/x", {}, refused=(400,)).said == "no \ufffd"
        with pytest.raises(ModelError, match="no whole JSON"):
            connection.call("POST", "/x", {})
    finally:
        connection.close()
