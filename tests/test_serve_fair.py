"""What callers share: nobody takes all, and who has had less goes first."""

from __future__ import annotations

import asyncio
import base64
import contextvars
import json
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from conftest import Running
from test_serve_app import call
from test_serve_safety import HOST, KIND, Asgi, ask

from traceir.encoder import Encoder
from traceir.errors import InputError
from traceir.items import Hit, Item, Query
from traceir.model import TraceModel
from traceir.serve import fair, service
from traceir.serve.bodies import SMALL, BodyGuard, parse_json
from traceir.serve.fair import FairExecutor, Pace, Places, Rounds, Shares, Turns, Usage, caller, patient
from traceir.serve.gate import KeyGate, Limits
from traceir.serve.guard import Message, Receive, Send
from traceir.serve.jobs import BusyError
from traceir.serve.keys import KeyRing, make_key
from traceir.serve.scheduler import Scheduler
from traceir.serve.service import Service, check_answer, together
from traceir.serve.uploads import bytes_of_base64


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def acting(who: str, work: Callable[..., Any], *told: Any) -> Any:
    """Calls something on behalf of a caller."""

    def act() -> Any:
        caller.set(who)
        return work(*told)

    return contextvars.copy_context().run(act)


def task_of(who: str, work: Callable[[], Coroutine[Any, Any, Any]], *, long: bool = False) -> asyncio.Task[Any]:
    async def act() -> Any:
        caller.set(who)
        patient.set(long)
        return await work()

    return asyncio.create_task(act())


def test_field_report_18_a_share_leaves_as_much_as_it_takes() -> None:
    shares = Shares(120)
    taken = Counter({who: sum(shares.take(who) for _ in range(200)) for who in ("first", "second", "third")})
    assert taken == {"first": 60, "second": 30, "third": 15} and shares.take("new")
    for who, count in taken.items():
        shares.give(who, count)
    assert shares.held == 1 and sum(shares.take("", 1) for _ in range(200)) == 119, "nobody in particular has no share"
    assert not shares.room("new")
    small = Shares(1)
    assert small.take("one") and not small.take("two")


def test_field_report_18_places_are_given_in_turn_and_never_lost() -> None:
    async def work() -> None:
        places = Places(12)
        waiting = [task_of("greedy", lambda: places.wait("greedy"), long=True) for _ in range(9)]
        await asyncio.sleep(0)
        assert places.of("greedy") == 4 and places.take("greedy") and places.take("other")
        late = task_of("late", lambda: places.wait("late"))
        await late
        for one in waiting[:6]:
            one.cancel()  # some have their place, some still wait
        await asyncio.gather(*waiting[:6], return_exceptions=True)
        assert places.of("greedy") == 5, "who was cancelled after it got a place keeps it, since it has run on"
        for _ in range(5):
            places.give("greedy")
        await asyncio.gather(*waiting[6:])
        assert places.of("greedy") == 3

    run(work())


def test_field_report_18_of_turns_one_is_left_for_others() -> None:
    async def work() -> None:
        turns = Turns(2)
        alone = [task_of("a", turns.enter) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert turns.of("a") == 2, "who is alone has both"
        other = [task_of("b", turns.enter) for _ in range(2)]
        await asyncio.sleep(0)
        turns.give("a")
        await other[0]
        turns.give("a")
        await asyncio.sleep(0)
        assert turns.of("a") + turns.of("b") == 2 and turns.of("b") == 1
        for one in [*alone, *other]:
            one.cancel()

    run(work())


def test_field_report_18_threads_work_for_one_caller_after_the_other() -> None:
    pool, gate, done = FairExecutor(2, "test"), threading.Event(), []
    blocked = [acting("greedy", pool.submit, gate.wait, 20) for _ in range(2)]
    futures = [acting("greedy", pool.submit, done.append, "greedy") for _ in range(6)]
    futures += [acting("other", pool.submit, done.append, "other") for _ in range(2)]
    cancelled = acting("other", pool.submit, done.append, "never")
    failing = acting("other", pool.submit, int, "x")
    assert cancelled.cancel()
    gate.set()
    for one in [*blocked, *futures]:
        one.result(20)
    assert isinstance(failing.exception(20), ValueError)
    assert sorted(done) == ["greedy"] * 6 + ["other"] * 2 and done[:4].count("other") >= 1
    pool.shutdown()


def test_field_report_18_a_blocked_thread_of_one_caller_leaves_one_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, gate = FairExecutor(2, "test"), threading.Event()
    assert acting("other", pool.submit, int, "1").result(20) == 1
    blocked = [acting("greedy", pool.submit, gate.wait, 20) for _ in range(4)]
    assert acting("other", pool.submit, int, "2").result(20) == 2
    gate.set()
    assert all(one.result(20) for one in blocked)
    pool.shutdown()


def test_a_queue_of_rounds_gives_each_caller_a_turn() -> None:
    rounds: Rounds[str] = Rounds()
    for one in ("a1", "a2", "a3", "b1"):
        rounds.put(one[0], one)
    taken = [one for one, _ in zip(rounds, range(3), strict=False)]
    assert taken[:3] == ["a1", "b1", "a2"]
    rounds.put_back("b", "b1")
    assert next(iter(rounds)) == "b1"


def test_usage_is_forgotten_by_half() -> None:
    now = 0.0
    usage = Usage(lambda: now)
    usage.add("a", 4.0)
    usage.add("b", 3.0)
    now = fair.ALONE_S
    assert (usage.of("a"), usage.of("b"), usage.of("c")) == (2.0, 1.5, 0.0)


def test_field_report_18_one_caller_does_not_take_the_whole_capacity(model: TraceModel) -> None:
    async def work() -> None:
        scheduler = Scheduler(Encoder(model), capacity=32)
        scheduler.start()
        service_: Any = Service.__new__(Service)
        object.__setattr__(service_, "scheduler", scheduler)

        async def many(number: int) -> list[Any]:
            texts = [Item.of(text=f"a ring number {number}-{place}") for place in range(40)]
            return list(await together(service_._each(texts, scheduler.encode_item)))

        attack = [task_of("greedy", lambda number=number: many(number)) for number in range(4)]
        for number in range(12):
            served = await task_of("other", lambda n=number: scheduler.encode_query(Query.of(text=f"ring {n}"), "reason"))
            assert not served.cached
        for one in attack:
            assert len(await one) == 40, "long work waits and is done"
        crowd = [task_of("rude", lambda n=n: scheduler.encode_query(Query.of(text=f"cup {n}"), "reason")) for n in range(40)]
        await asyncio.sleep(0)
        await task_of("other", lambda: scheduler.encode_query(Query.of(text="a last ring"), "reason"))
        found = await asyncio.gather(*crowd, return_exceptions=True)
        busy = [one for one in found if isinstance(one, BusyError)]
        assert len(busy) == 40 - 16 and "of them yours" in str(busy[0])
        assert scheduler.under_way == 0 and scheduler._places.held == 0
        await scheduler.close()

    run(work())


def test_field_report_18_rows_of_one_caller_leave_room_to_write_for_another(model: TraceModel, queries: list[Query]) -> None:
    wanted = Encoder(model).encode_queries(queries, route="reason")

    async def work() -> None:
        scheduler = Scheduler(Encoder(model), writing=4, remembered=0)
        scheduler.start()
        asked = [
            task_of(who, lambda q=query: scheduler.encode_query(q, "reason"), long=who == "greedy")
            for query, who in zip(queries, ["greedy", "greedy", "other"] * len(queries), strict=False)
        ]
        for one, alone in zip(await asyncio.gather(*asked), wanted, strict=True):
            assert float(np.dot(one.encoding.vector, alone.vector)) > 0.99999 and one.encoding.reasoning == alone.reasoning
        await scheduler.close()

    run(work())


def test_field_report_18_no_caller_pushes_out_what_is_remembered_for_another(model: TraceModel) -> None:
    async def work() -> None:
        scheduler = Scheduler(Encoder(model), remembered=4)
        scheduler.start()

        async def asked(who: str, text: str) -> bool:
            return bool((await task_of(who, lambda: scheduler.encode_item(Item.of(text=text)))).cached)

        assert not await asked("quiet", "a red ring")
        for number in range(9):
            assert not await asked("greedy", f"ring {number}")
        assert await asked("quiet", "a red ring") and await asked("greedy", "ring 8") and not await asked("greedy", "ring 5")
        await scheduler.close()

    run(work())


# Bytes


def test_field_report_18_bodies_of_one_caller_leave_room_for_another() -> None:
    async def work() -> None:
        statuses: dict[str, int] = {}

        async def reading(scope: Message, receive: Receive, send: Send) -> None:
            while (message := await receive()).get("more_body"):
                pass
            if message["type"] == "http.request":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b""})

        guard = BodyGuard(reading, most=SMALL * 4, together=SMALL * 16)

        async def one(name: str, size: int, *, ends: bool) -> None:
            left = [{"type": "http.request", "body": bytes(SMALL), "more_body": True}] * (size // SMALL)
            left += [{"type": "http.request", "body": bytes(size % SMALL)}] if ends else []

            async def receive() -> Message:
                return left.pop(0) if left else await asyncio.Future()

            async def send(message: Message) -> None:
                if message["type"] == "http.response.start":
                    statuses[name] = message["status"]

            await guard({"type": "http", "method": "POST", "headers": []}, receive, send)

        endless = [task_of("greedy", lambda n=n: one(f"endless {n}", SMALL * 4, ends=False)) for n in range(6)]
        for _ in range(9):
            await asyncio.sleep(0)
        assert statuses == {f"endless {n}": 429 for n in range(2, 6)} and guard.held == SMALL * 8
        await task_of("other", lambda: one("other", SMALL * 3, ends=True))
        assert statuses["other"] == 200
        for task in endless:
            task.cancel()
        await asyncio.gather(*endless, return_exceptions=True)
        assert guard.held == 0
        await task_of("greedy", lambda: one("again", SMALL * 3, ends=True))
        assert statuses["again"] == 200

    run(work())


def test_field_report_19_answers_that_are_not_taken_are_counted_and_bounded() -> None:
    async def work() -> None:
        body, statuses = bytes(range(256)) * 1024, Counter[tuple[str, int]]()  # four pieces
        taken: dict[str, bytes] = {}

        async def answering(scope: Message, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": body})

        guard = BodyGuard(answering, together=len(body) * 4)

        async def one(who: str, reads: asyncio.Event) -> None:
            async def send(message: Message) -> None:
                if message["type"] == "http.response.start":
                    statuses[who, message["status"]] += 1
                else:
                    assert len(message["body"]) <= SMALL
                    taken[who] = taken.get(who, b"") + message["body"]
                    await reads.wait()

            await guard({"type": "http", "method": "GET", "headers": []}, cast(Any, None), send)

        never, at_once = asyncio.Event(), asyncio.Event()
        at_once.set()
        deaf = [task_of("deaf", lambda: one("deaf", never)) for _ in range(9)]
        for _ in range(9):
            await asyncio.sleep(0)
        assert statuses == {("deaf", 200): 2, ("deaf", 429): 7} and guard.held == 2 * len(body)
        await task_of("other", lambda: one("other", at_once))
        assert statuses["other", 200] == 1 and taken["other"] == body
        never.set()
        await asyncio.gather(*deaf)
        assert guard.held == 0

    run(work())


def test_field_report_19_an_answer_of_many_long_items_is_refused_or_ends_early(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    hit = Hit("a", 1.0, 1, "text", "ä" * 1000, None, {"n": 1, "t": "b" * 100})
    monkeypatch.setattr(service, "MAX_ANSWER", 4000)
    check_answer([hit])
    with pytest.raises(InputError, match=r"the 2 hits hold 4208 bytes.*offset"):
        check_answer([hit, hit])
    monkeypatch.undo()
    text = "wörter " * 4600
    items = [{"id": f"long-{number:03}", "text": "ring", "fields": {f"f{n}": text for n in range(24)}} for number in range(8)]
    for start in range(0, 8, 4):
        assert call(f"{running.url}/items", {"items": items[start : start + 4]})[0] == 200
    status, told = call(f"{running.url}/search", {"text": "ring", "k": 1000})
    assert status == 400 and "ask for fewer" in told["error"]["message"]
    found: list[str] = []
    while True:
        status, page = call(f"{running.url}/items?after={found[-1] if found else 'long'}&limit=1000")
        found += [one["id"] for one in page["items"]]
        assert status == 200 and len(json.dumps(page)) < 8 * 1024 * 1024
        if not page["more"]:
            break
    assert [id for id in found if id.startswith("long-")] == [one["id"] for one in items]
    assert call(f"{running.url}/items", {"ids": [one["id"] for one in items]}, method="DELETE")[1] == {"deleted": 8}


# The gate


def test_field_report_18_requests_of_one_key_leave_room_for_another(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys = {name: make_key(path, name) for name in ("greedy", "other")}
    seen: list[str] = []

    async def work() -> None:
        never = asyncio.Event()

        async def slow(scope: Message, receive: Receive, send: Send) -> None:
            seen.append(caller.get())
            await never.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})

        gate = KeyGate(slow, KeyRing(path), Limits(), together=8)
        statuses: Counter[tuple[str, int]] = Counter()

        async def one(name: str) -> None:
            async def send(message: Message) -> None:
                if message["type"] == "http.response.start":
                    statuses[name, message["status"]] += 1

            header = (b"authorization", f"Bearer {keys[name]}".encode())
            scope = {"type": "http", "method": "POST", "path": "/search", "headers": [header], "client": ("10.0.0.1", 1)}
            await gate(scope, cast(Any, None), send)

        asked = [asyncio.create_task(one(name)) for name in ["greedy"] * 9 + ["other"]]
        for _ in range(9):
            await asyncio.sleep(0)
        assert statuses == {("greedy", 429): 5} and seen == ["greedy"] * 4 + ["other"]
        never.set()
        await asyncio.gather(*asked)
        assert statuses == {("greedy", 429): 5, ("greedy", 200): 4, ("other", 200): 1}

    run(work())


def test_field_report_18_without_keys_an_address_is_the_caller() -> None:
    seen: list[str] = []

    async def noting(scope: Message, receive: Receive, send: Send) -> None:
        seen.append(caller.get())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    app: Asgi = KeyGate(noting, None, Limits())
    for address in ("127.0.0.1", "127.0.0.2", "2001:db8:1:2:3::4"):
        ask(app, "POST", "/search", [HOST, KIND], client=address)
    assert seen == ["127.0.0.1", "127.0.0.2", "2001:db8:1:2::/64"]


def test_field_report_18_a_body_of_many_texts_is_refused_before_it_is_read() -> None:
    with pytest.raises(InputError, match="more than 200000 texts"):
        parse_json(b'["' + b'","' * 200_000 + b'"]')
    for told in (["a"] * 190_000, ['"' * 30_000] * 10, ["\\"] * 9000):
        assert parse_json(json.dumps(told).encode()) == told


def test_field_report_18_bodies_of_one_caller_have_pauses_while_another_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        slept.append(round(seconds, 1))
        await sleep(0)

    async def work() -> None:
        pace = Pace(1000)
        await pace.wait("greedy", 5000)
        await pace.wait("greedy", 5000)
        assert slept == [], "who is alone has none"
        await pace.wait("other", 10)
        for _ in range(3):
            await pace.wait("greedy", 5000)
        await pace.wait("other", 10)
        assert slept == [0.0, 0.0, 5.0, 10.0, 0.0]

    monkeypatch.setattr(fair.asyncio, "sleep", noted)
    run(work())


def test_field_report_18_a_search_of_more_texts_than_a_filter_may_have_is_refused_first(running: Running) -> None:
    where = {f"f{n}": ["a"] * 9_000 for n in range(10)}
    status, told = call(f"{running.url}/search", {"text": "a ring", "where": where})
    assert status == 400 and told["error"]["message"] == "the body holds more than 60000 texts; send it in parts"


def test_base64_in_pieces_is_what_it_is_as_a_whole() -> None:
    data = bytes(range(256)) * 3000
    for text in (base64.b64encode(data), base64.urlsafe_b64encode(data).rstrip(b"="), base64.encodebytes(data)):
        assert bytes_of_base64(text.decode(), "image") == data
    for wrong in (base64.b64encode(bytes(196_607)) * 2, base64.b64encode(data)[:-3], base64.b64encode(data) + b"!"):
        with pytest.raises(InputError, match="not base64"):
            bytes_of_base64(wrong.decode(), "image")
