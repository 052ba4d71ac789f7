"""The teacher client against a small HTTP server of its own: keys, retries, pace, spend, the cache of answers, batch files."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from cot_fakes import Answer, Chat, completion, failure
from fake_sglang import served
from PIL import Image

from traceir.connection import Connection
from traceir.cot.ask import Stage, TeacherQuestion
from traceir.cot.teachers.answer_cache import FILE, AnswerCache, BatchTeacher, read_batch_results
from traceir.cot.teachers.asker import Asker, Budget, Pacer, SpendLimitError
from traceir.cot.teachers.teacher import (
    OpenAITeacher,
    RecordedTeacher,
    Reply,
    RetryableError,
    UnansweredError,
    image_url,
    reply_of,
    retry_after,
)
from traceir.cot.teachers.teacher import prepare as prepare_async
from traceir.errors import DataError, ImageError, InputError, ModelError, TeacherError

KEY = "sk-invented-0123456789"


@pytest.fixture
def server() -> Iterator[Chat]:
    chat = Chat()
    with served(chat.app) as address:
        chat.url = f"{address}/v1"
        yield chat


def question(number: int = 0, *parts: str | Path, stage: Stage = "assess") -> TeacherQuestion:
    shown = ("<query>a blue square</query>", f"<task>{number}</task>", *parts)
    return TeacherQuestion(stage, f"9:{number}", "cirr_task7", 0, "Sort the query.", shown, 32, 0.0, 1)


def prepare(*args: Any) -> Any:
    return asyncio.run(prepare_async(*args))


def ask_all(
    url: str, folder: Path, questions: list[TeacherQuestion], *, concurrency: int = 8, timeout_s: float = 5.0, **options: Any
) -> tuple[Asker, list[Reply | BaseException]]:
    """All questions at once through a fresh client over the cache in `folder`; `price_in`, `price_out`, `limit`: see Budget."""
    money = {name: options.pop(name) for name in ("price_in", "price_out", "limit") if name in options}

    async def run() -> tuple[Asker, list[Reply | BaseException]]:
        with AnswerCache(folder) as cache:
            teacher = OpenAITeacher("m-1", url, KEY, timeout_s=timeout_s)
            waits = {"base_s": 0.001, "cap_s": 0.002} | options
            asker = Asker(teacher, cache, Pacer(concurrency), Budget(cache, **money), **waits)
            replies = await asyncio.gather(*(asker.ask(question) for question in questions), return_exceptions=True)
            await asker.close()
        return asker, replies

    return asyncio.run(run())


def image(path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB", **options: Any) -> Path:
    Image.linear_gradient("L").resize(size).convert(mode).save(path, **options)
    return path


def test_images_go_as_they_are_or_as_jpeg_and_shrunk(tmp_path: Path) -> None:
    plain, jpeg = image(tmp_path / "plain.png"), image(tmp_path / "plain.jpg")
    url, digest = image_url(plain, 40 * 30)
    assert url.startswith("data:image/png;base64,") and image_url(plain, 0) == (url, digest)
    (tmp_path / "longer.jpg").write_bytes(jpeg.read_bytes() + b"video\xff\xd9")
    exif = Image.Exif()
    exif[0x0112] = 6
    image(tmp_path / "turned.jpg", exif=exif)
    image(tmp_path / "clear.png", mode="RGBA")
    image(tmp_path / "mpo.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (40, 30))])
    for name, pixels in (("longer.jpg", 0), ("turned.jpg", 0), ("clear.png", 0), ("mpo.jpg", 0), ("plain.png", 600)):
        sent, digest = image_url(tmp_path / name, pixels)
        data = base64.b64decode(sent.removeprefix("data:image/jpeg;base64,"))
        shown = Image.open(BytesIO(data))
        assert hashlib.sha256(data).hexdigest() == digest and shown.format == "JPEG" and data != (tmp_path / name).read_bytes()
        assert shown.size == {"turned.jpg": (30, 40)}.get(name, (40, 30)) or shown.width * shown.height <= 600 == pixels
    (tmp_path / "cut.jpg").write_bytes(jpeg.read_bytes()[:300])
    (tmp_path / "words.jpg").write_text("no picture")
    for name in ("cut.jpg", "words.jpg", "missing.jpg"):
        with pytest.raises(ImageError, match=name):
            image_url(tmp_path / name)


def test_key_is_of_the_content_alone_and_as_it_always_was(tmp_path: Path) -> None:
    own, same, other = (image(tmp_path / f"{name}.png", (width, 30)) for name, width in (("a", 40), ("b", 40), ("c", 41)))
    asked = question(0, own, f'"url":"sha256:{image_url(own)[1]}"', "line\n\u2028 \ud800")
    made = prepare(asked, "m", 0)
    sent = json.loads(made.payload)["messages"][1]["content"]
    assert sent[2]["image_url"]["url"] == image_url(own)[0]
    assert [part["text"] for part in sent[3:]] == [*asked.parts[3:]]

    def key_with(shown: Path, model: str = "m", extra: dict[str, Any] | None = None, seed: int = 1) -> str:
        changed = replace(asked, seed=seed, parts=(*asked.parts[:2], shown, *asked.parts[3:]))
        return str(prepare(changed, model, 0, extra).key)

    assert key_with(same) == made.key
    others = key_with(own, "n"), key_with(own, extra={"top_p": 0.9}), key_with(own, seed=2), key_with(other)
    assert len({made.key, *others}) == 5
    assert key_with(own, extra={"top_p": 1, "top_k": 2}) == key_with(own, extra={"top_k": 2, "top_p": 1})
    assert prepare(question(), "m-1").key == "a5ce7f662a528f804a30c302a4bdd13ffa758143f904522666b1945cda560a29"
    renamed = json.loads(prepare(asked, "m", 0, {"max_tokens": None, "max_completion_tokens": 9}).payload)
    assert "max_tokens" not in renamed and renamed["max_completion_tokens"] == 9
    with pytest.raises(TeacherError, match="'model'"):
        OpenAITeacher("m", "http://localhost", extra={"model": "n"})


def test_tries_again_then_reuses(server: Chat, tmp_path: Path) -> None:
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
    assert asker.retried == 5 and len(server.bodies) == 6 and asker.pace.permitted < 8
    assert reply.key == prepare(question(), "m-1").key
    again, (known,) = ask_all(server.url, tmp_path, [question()])
    assert known == reply and again.reused == 1 and len(server.bodies) == 6 and "1 known before" in again.status()


def test_asks_once_and_so_many_at_a_time(server: Chat, tmp_path: Path) -> None:
    server.wait_s = 0.02
    asker, replies = ask_all(server.url, tmp_path, [question(number % 12) for number in range(36)], concurrency=4)
    assert len(server.bodies) == 12 == asker.cache.answers and server.most_at_once == 4
    assert all(isinstance(reply, Reply) for reply in replies) and "0 in flight" in asker.status()


@pytest.mark.parametrize(("status", "code", "named"), [
    (401, "", "API key"), (403, "", "API key"), (404, "", "no model 'm-1'"), (402, "", "budget"),
    (429, "insufficient_quota", "budget"),
])  # fmt: skip
def test_what_cannot_get_better_ends_at_once(server: Chat, tmp_path: Path, status: int, code: str, named: str) -> None:
    server.script = lambda number, body: failure(status, f"not with {KEY}", code)
    asker, replies = ask_all(server.url, tmp_path, [question(number) for number in range(6)], concurrency=2)
    assert len(server.bodies) <= 2 and asker.cache.answers == 0
    for error in replies:
        assert type(error) is TeacherError and named in str(error) and server.url in str(error) and KEY not in str(error)


def test_refused_question_is_a_reply(server: Chat, tmp_path: Path) -> None:
    server.script = lambda number, body: failure(400, "picture too large \ud83d")
    _, (reply,) = ask_all(server.url, tmp_path, [question()])
    assert isinstance(reply, Reply) and (reply.finish, reply.error) == ("error", "400: picture too large \ufffd")
    assert ask_all(server.url, tmp_path, [question()])[1] == [reply] and len(server.bodies) == 1


def test_unreachable_teacher_is_given_up_early(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/v1"
    _, replies = ask_all(url, tmp_path, [question(number) for number in range(3)], attempts=1000)
    assert all(type(error) is TeacherError and url in str(error) and "never reached" in str(error) for error in replies)
    with pytest.raises(TeacherError, match="http address"):
        OpenAITeacher("m", "localhost:8000")


def test_a_question_that_fails_for_a_time_stays_open(server: Chat, tmp_path: Path) -> None:
    server.script = lambda number, body: failure(500, "oops") if "<task>1" in str(body) else (200, {}, completion())
    asker, (good, bad) = ask_all(server.url, tmp_path, [question(0), question(1)], attempts=3)
    assert isinstance(good, Reply) and isinstance(bad, UnansweredError) and "9:1" in str(bad) and "oops" in str(bad)
    assert len(server.bodies) == 4 and asker.cache.answers == 1
    server.wait_s = 0.3
    asker, (error,) = ask_all(server.url, tmp_path, [question(2)], timeout_s=0.05, attempts=2)
    assert isinstance(error, UnansweredError) and "0.05 s" in str(error) and asker.pace.permitted == 2


def test_answers_that_are_no_completions_end_a_build_early(server: Chat, tmp_path: Path) -> None:
    server.script = lambda number, body: (200, {}, b"data: [DONE]")
    asker, replies = ask_all(server.url, tmp_path, [question(number) for number in range(9)], concurrency=2, attempts=20)
    assert len(server.bodies) <= 16 and asker.cache.answers == 0
    assert all(type(error) is TeacherError and "not a chat completion" in str(error) for error in replies)
    server.script = lambda number, body: (200, {}, b"<html>" if "<task>1" in str(body) else completion())
    server.bodies.clear()
    _, (good, bad) = ask_all(server.url, tmp_path, [question(0), question(1)], concurrency=1, attempts=20)
    assert isinstance(good, Reply) and isinstance(bad, UnansweredError) and "in 4 tries" in str(bad) and len(server.bodies) == 5


def test_spend_limit_is_kept(server: Chat, tmp_path: Path) -> None:
    asked = [question(number) for number in range(40)]
    prices = {"price_in": 10.0, "price_out": 100.0, "limit": 0.03}  # an answer: 0.002 USD, 0.0042 by estimate
    asker, replies = ask_all(server.url, tmp_path, asked, concurrency=4, **prices)
    kept = sum(isinstance(reply, Reply) for reply in replies)
    assert kept == len(server.bodies) == asker.cache.answers and 6 <= kept <= 15 and asker.budget.spent <= 0.03
    assert all(isinstance(error, (Reply, SpendLimitError)) for error in replies)
    asker, replies = ask_all(server.url, tmp_path, asked, concurrency=4, **{**prices, "limit": 1.0})
    assert all(isinstance(reply, Reply) for reply in replies) and asker.reused == kept and len(server.bodies) == 40


def test_closing_keeps_what_is_in_flight(server: Chat, tmp_path: Path) -> None:
    server.wait_s = 0.5

    async def run() -> tuple[int, list[Any]]:
        with AnswerCache(tmp_path) as cache:
            asker = Asker(OpenAITeacher("m-1", server.url), cache, Pacer(2))
            asking = [asyncio.create_task(asker.ask(question(number))) for number in range(5)]
            while len(server.bodies) < 2:
                await asyncio.sleep(0.01)
            asking[0].cancel()
            await asker.close()
            return cache.answers, await asyncio.gather(*asking, return_exceptions=True)

    answers, replies = asyncio.run(run())
    assert answers == 2 == len(server.bodies) and isinstance(replies[0], asyncio.CancelledError) and isinstance(replies[1], Reply)
    assert all(isinstance(error, UnansweredError) for error in replies[2:])


# The cache of answers


def key(number: int) -> str:
    return f"{number:016x}" + "0" * 48


def answer(number: int, text: str = "text of \u2028 the reply") -> Reply:
    return Reply(text, "stop", "m-1", 7, 3, "", key(number))


def old_line(reply: Reply, **changed: Any) -> str:
    """A line of the journal of releases before the cache."""
    fields = ("key", "text", "finish", "model", "prompt_tokens", "completion_tokens", "error")
    return json.dumps({name: getattr(reply, name) for name in fields} | {"stage": "assess", "qid": "9:1", "time": 1.5} | changed)


def test_the_first_answer_counts_until_it_is_taken_back_and_processes_share_the_file(tmp_path: Path) -> None:
    with AnswerCache(tmp_path, "0000-of-0002") as first, AnswerCache(tmp_path, "0001-of-0002") as two:
        first.put("assess", "9:1", answer(1)).result()
        two.put("assess", "9:1", answer(1, "a second, paid as well")).result()
        assert first.get(key(1)).result() == two.get(key(1)).result() == answer(1) and two.get(key(2)).result() is None
        with pytest.raises(TeacherError, match="another process"):
            AnswerCache(tmp_path, "0000-of-0002")
        first.take_back([key(1)])
        assert first.get(key(1)).result() is None
        two.put("assess", "9:1", answer(1, "asked anew")).result()
    with AnswerCache(tmp_path, "0000-of-0002") as first:
        assert (first.answers, first.prompt_tokens, first.completion_tokens) == (3, 21, 9), "all were paid"
        assert first.get(key(1)).result() == answer(1, "asked anew")
        with pytest.raises(DataError, match="64 hex"):
            first.put("assess", "9:1", replace(answer(1), key="x"))
    (tmp_path / FILE).write_bytes(b"not a database" * 100)
    with pytest.raises(TeacherError, match=FILE):
        AnswerCache(tmp_path)


def test_old_journals_are_read_in_once_and_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = {"text": "a \udfff", "model": "\ud800", "prompt_tokens": 10**400, "completion_tokens": -3}
    lines = [old_line(answer(1)), old_line(answer(1, "later")), old_line(answer(2)), old_line(answer(3), **odd)]
    lines += [old_line(Reply("", "taken_back", "", key=key(2)), stage="")]
    journal = tmp_path / "0000-of-0001.jsonl"
    journal.write_text("\ufeff" + "\n".join(lines) + '\n{"key": "00')
    for _ in range(2):
        with AnswerCache(tmp_path) as cache:
            assert [cache.get(key(number)).result() for number in (1, 2)] == [answer(1), None]
            assert cache.get(key(3)).result() == Reply("a \ufffd", "stop", "\ufffd", 0, 0, "", key(3))
            assert (cache.answers, cache.prompt_tokens) == (4, 21)
    assert caplog.text.count("its 5 answers are now in answers.sqlite") == 1 and len(journal.read_text().splitlines()) == 6
    with journal.open("a") as stream:
        stream.write('00"}\n')
    with pytest.raises(DataError, match=r"0000-of-0001.jsonl:6: .*remove this line"):
        AnswerCache(tmp_path)
    journal.write_text("\n".join([*lines, old_line(answer(4))]) + "\n")
    with AnswerCache(tmp_path) as cache:
        assert cache.get(key(4)).result() == answer(4) and cache.answers == 5


def test_a_full_disk_ends_the_build_and_loses_nothing(server: Chat, tmp_path: Path) -> None:
    ask_all(server.url, tmp_path, [question(0)])

    async def run() -> tuple[Asker, list[Any]]:
        with AnswerCache(tmp_path) as cache:
            pages = cache._database.execute("PRAGMA page_count").fetchone()[0]
            cache._database.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own way to be full
            asker = Asker(OpenAITeacher("m-1", server.url), cache, Pacer(1))
            replies = await asyncio.gather(*(asker.ask(question(number)) for number in range(9)), return_exceptions=True)
            await asker.close()
            return asker, replies

    server.script = lambda number, body: (200, {}, completion("x" * 20_000))
    asker, replies = asyncio.run(run())
    assert isinstance(replies[0], Reply) and asker.reused == 1 and len(server.bodies) <= 3
    assert all(type(error) is TeacherError and "full" in str(error) and "start again" in str(error) for error in replies[1:])
    assert all(isinstance(reply, Reply) for reply in ask_all(server.url, tmp_path, [question(number) for number in range(9)])[1])


WRITER = """
import sys
from pathlib import Path
from traceir.cot.teachers.answer_cache import AnswerCache
from traceir.cot.teachers.teacher import Reply
cache = AnswerCache(Path(sys.argv[1]))
for number in range(10**9):
    cache.put("assess", "9:1", Reply("x" * 3000, "stop", "m", 1, 1, "", f"{number:016x}" + "0" * 48)).result()
    print(number, flush=True)
"""


@pytest.mark.slow
def test_a_kill_takes_nothing_acknowledged(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    lines = [writer.stdout.readline() for _ in range(20)]
    writer.send_signal(signal.SIGKILL)
    lines += writer.stdout.readlines()
    writer.wait()
    with AnswerCache(tmp_path) as cache:
        assert all(cache.get(key(int(line))).result() for line in lines if line.endswith(b"\n"))
        assert 0 <= cache.answers - len(lines) <= 1


# Pace


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_pace_backs_off_recovers_and_keeps_the_rates() -> None:
    clock = Clock()
    pace = Pacer(8, clock=clock)
    numbers = [pace.take(0) for _ in range(8)]
    for number in numbers[:3]:
        assert pace.delay(0) == float("inf")
        pace.end(number, overloaded=True)
    assert pace.permitted == 4 and pace.delay(0) == float("inf")  # five are in flight still
    pace.end(numbers[3], overloaded=True, retry_after=30)
    assert pace.permitted == 4
    for number in numbers[4:]:
        pace.end(number, 0)
    assert pace.in_flight == 0 and 4.9 < pace.permitted < 5 and pace.delay(0) == 30
    clock.now += 30
    for _ in range(5):
        assert pace.delay(0) == 0
        pace.end(pace.take(0), overloaded=True)
    assert pace.permitted == 1
    for _ in range(100):
        pace.end(pace.take(0), 0)
    assert pace.permitted == 8
    pace = Pacer(1000, requests_per_minute=120, tokens_per_minute=6000, clock=clock)
    started: list[float] = []
    for _ in range(100):
        clock.now += pace.delay(10)
        pace.end(pace.take(10), 0)
        started.append(clock.now)
    assert max(sum(1 for other in started if at <= other < at + 60) for at in started) <= 122
    clock.now += 60
    pace.end(pace.take(100), 600)  # took more than estimated: the debt is waited for
    assert pace.delay(50) == pytest.approx(6.5)
    for concurrency, rate, problem in ((0, None, "0 at a time"), (1, 0.0, "above 0")):
        with pytest.raises(InputError, match=problem):
            Pacer(concurrency, rate)


def test_the_pace_waits_for_its_turn() -> None:
    async def run() -> list[str]:
        pace, seen = Pacer(1), list[str]()
        first = await pace.start()

        async def take(name: str) -> None:
            number = await pace.start()
            seen.append(name)
            pace.end(number, 0)

        waiting = [asyncio.create_task(take(name)) for name in "abc"]
        await asyncio.sleep(0)
        waiting[1].cancel()
        pace.end(first, 0, retry_after=0.01)
        await asyncio.gather(*waiting, return_exceptions=True)
        assert pace.in_flight == 0
        return seen

    assert asyncio.run(run()) == ["a", "c"]
    assert retry_after({"retry-after": "Mon, 23 Nov 2026 10:00:30 GMT"}, 1795428000.0) == pytest.approx(30)
    assert retry_after({"retry-after": "soon"}, 0.0) is None and retry_after({}, 0.0) is None
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}, 0.0) == 0.25


# Recorded replies and batches


def test_recorded_teacher(tmp_path: Path) -> None:
    file = tmp_path / "replies.jsonl"
    lines = [{"stage": "assess", "qid": "9:0", "text": "zero"}, {"stage": "assess", "qid": "9:0", "text": "one", "attempt": 1}]
    file.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(line) + "\n\n" for line in [*lines, lines[1] | {"text": "x"}]).encode())
    asked = [question(0), replace(question(0), attempt=1), question(1)]

    async def run() -> list[Reply]:
        with AnswerCache(tmp_path / "journal") as cache:
            asker = Asker(RecordedTeacher(file), cache, Pacer(2))
            replies = [await asker.ask(question) for question in asked]
            await asker.close()
        return replies

    zero, first, none = asyncio.run(run())
    assert (zero.text, first.text) == ("zero", "one") and zero.model.startswith("recorded:")
    assert none.finish == "error" and str(file) in none.error and "'9:1'" in none.error
    assert asyncio.run(run()) == [zero, first, none]
    file.write_text('{"stage": "assess", "qid": 3, "text": ""}\n')
    with pytest.raises(DataError, match=r"replies.jsonl:1"):
        RecordedTeacher(file)


def test_batch_files_and_back(server: Chat, tmp_path: Path) -> None:
    asked, folder = [question(number) for number in range(5)], tmp_path / "batch"

    async def collect() -> int:
        with AnswerCache(tmp_path / "journal") as cache:
            teacher = BatchTeacher(folder, "m-1", requests_per_file=2)
            with pytest.raises(TeacherError, match="another process"):
                BatchTeacher(folder, "m-1")
            asker = Asker(teacher, cache, Pacer(4))
            replies = await asyncio.gather(*(asker.ask(question) for question in asked + asked), return_exceptions=True)
            assert all(isinstance(error, UnansweredError) for error in replies)
            await asker.close()
        return teacher.written

    assert asyncio.run(collect()) == 5 and asyncio.run(collect()) == 0
    files = sorted(folder.glob("requests-0*.jsonl"))
    requests = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert [len(file.read_text().splitlines()) for file in files] == [2, 2, 1]
    assert {row["custom_id"] for row in requests} == {prepare(each, "m-1").key for each in asked}
    assert {row["url"] for row in requests} == {"/v1/chat/completions"}
    good = {"response": {"status_code": 200, "body": json.loads(completion("b \ud83d"))}, "error": None}
    results: list[dict[str, Any]] = [{"custom_id": row["custom_id"], **good} for row in requests]
    results[3]["response"] = {"status_code": 400, "body": {"error": {"message": "too long"}}}
    results[4] |= {"response": None, "error": {"code": "batch_expired", "message": "too late"}}
    output = folder / "output.jsonl"
    output.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(line) + "\n" for line in results).encode())
    with AnswerCache(tmp_path / "journal", "batch") as cache:
        assert read_batch_results([output], cache) == {"imported": 4, "refused": 1, "known": 0, "failed": 1}
        assert read_batch_results([output], cache)["known"] == 4
        for broken in ('{"custom_id": "7", "response": null, "error": null}\n', '{"custom_id": 7}\n', "[]\n"):
            output.write_text(broken)
            with pytest.raises(DataError, match=r"output.jsonl:1"):
                read_batch_results([output], cache)
    with closing(sqlite3.connect(tmp_path / "journal" / FILE)) as database:
        assert ("assess", "9:0", "b \ufffd") in list(database.execute("SELECT stage, qid, text FROM answers"))
    asker, replies = ask_all(server.url, tmp_path / "journal", asked)
    assert asker.reused == 4 and len(server.bodies) == 1 and all(isinstance(reply, Reply) for reply in replies)


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
        (body({"content": "x"}, usage=[1], model=["\ud800"]), "x", "stop"),
        (body({"content": "x"}, choices=[]), "", "error"),
        (body({"content": "x"}, choices=[None]), "", "error"),
        (body({}, choices=[{"message": {"content": "x"}, "finish_reason": "MAX_TOKENS"}]), "x", "length"),
        (body({}, choices=[{"message": {"content": "x"}, "finish_reason": ["SAFETY"]}]), "x", "stop"),
    ],
)
def test_a_completion_of_any_shape_is_a_reply_of_valid_text(raw: bytes, text: str, finish: str) -> None:
    reply = reply_of(raw, "m")
    assert (reply.text, reply.finish) == (text, finish)
    f"{reply.model}{reply.error}".encode()


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"<html>", b"data: {}", b'{"choices": 3}', b"[" * 100_000, b'{"error": {"a": "\\ud800"}}']
)
def test_what_is_no_completion_is_tried_again(raw: bytes) -> None:
    with pytest.raises(RetryableError, match="not a chat completion") as caught:
        reply_of(raw, "m")
    assert caught.value.garbled


def test_tokens_are_numbers_that_can_be_summed() -> None:
    odd = (float("nan"), float("inf"), 10**4000, -1, True, None, "x", [])
    for sent, number in ((7, 7), ("7", 7), (7.0, 7), *((value, 0) for value in odd)):
        reply = reply_of(body({"content": "x"}, usage={"prompt_tokens": sent, "completion_tokens": sent}), "m")
        assert (reply.prompt_tokens, reply.completion_tokens) == (number, number), sent


def test_answers_of_any_server_are_valid_text(server: Chat) -> None:
    bodies = b'\xef\xbb\xbf{"a\\ud800": ["\\udfff\xff"]}', b'{"detail": "no \\ud83d"}', b"[" * 50_000
    server.script = lambda number, body: (400 if number == 2 else 200, {}, bodies[number - 1])
    with closing(Connection(server.url, tries=1)) as connection:
        assert connection.call("POST", "/x", {}).body == {"a\ufffd": ["\ufffd\ufffd"]}
        assert connection.call("POST", "/x", {}, refused=(400,)).message == "no \ufffd"
        with pytest.raises(ModelError, match="no whole JSON"):
            connection.call("POST", "/x", {})
