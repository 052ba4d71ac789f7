"""What callers share: nobody takes all, and who has had less goes first."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from conftest import in_loop
from fakes import FakeEncoder
from test_serve_safety import HOST, KIND, ask, bearer

from traceir.encoder import Encoder
from traceir.items import Item, Query
from traceir.model import TraceModel
from traceir.serve import bodies, fair
from traceir.serve.access import KeyMiddleware, Limits
from traceir.serve.bodies import SMALL, BodyMiddleware
from traceir.serve.fair import FairExecutor, Places, Rounds, Shares, Slots, Usage, caller, patient
from traceir.serve.jobs import BusyError
from traceir.serve.keys import KeyRing, make_key
from traceir.serve.scheduler import Scheduler
from traceir.serve.security import App, Message, Receive, Send


def acting(who: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """Calls something on behalf of a caller."""
    context = contextvars.copy_context()
    context.run(caller.set, who)
    return context.run(work, *arguments)


def task_of(who: str, work: Callable[[], Coroutine[Any, Any, Any]], *, long: bool = False) -> asyncio.Task[Any]:
    async def act() -> Any:
        caller.set(who)
        patient.set(long)
        return await work()

    return asyncio.create_task(act())


async def passes_of_the_loop() -> None:
    for _ in range(9):
        await asyncio.sleep(0)


def test_a_share_leaves_as_much_as_it_takes() -> None:
    shares = Shares(120)
    taken = Counter({who: sum(shares.take(who) for _ in range(200)) for who in ("first", "second", "third")})
    assert taken == {"first": 60, "second": 30, "third": 15} and shares.take("new")
    for who, count in taken.items():
        shares.give(who, count)
    assert shares.held == 1 and sum(shares.take("", 1) for _ in range(200)) == 119, "nobody in particular has no share"
    assert not shares.fits("new")
    small = Shares(1)
    assert small.take("one") and not small.take("two")


@in_loop
async def test_places_and_slots_are_given_in_turn_and_never_lost() -> None:
    shares = Places(12)
    waiting = [task_of("greedy", lambda: shares.wait("greedy"), long=True) for _ in range(9)]
    await asyncio.sleep(0)
    assert shares.of("greedy") == 4 and shares.take("greedy") and shares.take("other")
    await task_of("late", lambda: shares.wait("late"))
    for task in waiting[:6]:
        task.cancel()  # some have their place, some still wait
    await asyncio.gather(*waiting[:6], return_exceptions=True)
    assert shares.of("greedy") == 5, "who was cancelled after it got a place keeps it, since it has run on"
    shares.give("greedy", 5)
    await asyncio.gather(*waiting[6:])
    assert shares.of("greedy") == 3
    slots = Slots(2)
    tasks = [task_of("a", lambda: slots.wait("a")) for _ in range(3)]
    await passes_of_the_loop()
    assert slots.of("a") == 2, "who is alone has both"
    tasks += [task_of("b", lambda: slots.wait("b")) for _ in range(2)]
    await asyncio.sleep(0)
    slots.give("a")
    await tasks[3]
    slots.give("a")
    await asyncio.sleep(0)
    assert slots.of("a") == slots.of("b") == 1
    for task in tasks:
        task.cancel()


def test_threads_work_for_one_caller_after_the_other_and_one_is_left_for_others() -> None:
    pool, release, done = FairExecutor(2, "test"), threading.Event(), list[str]()
    assert acting("other", pool.submit, int, "1").result(20) == 1
    blocked = [acting("greedy", pool.submit, release.wait, 20) for _ in range(4)]
    assert acting("other", pool.submit, int, "2").result(20) == 2
    futures = [acting(who, pool.submit, done.append, who) for who in ["greedy"] * 6]
    failing, cancelled = acting("greedy", pool.submit, int, "x"), acting("greedy", pool.submit, done.append, "never")
    assert cancelled.cancel() and acting("other", pool.submit, done.append, "other").result(20) is None and done == ["other"]
    release.set()
    for future in [*blocked, *futures]:
        future.result(20)
    assert isinstance(failing.exception(20), ValueError) and done == ["other"] + ["greedy"] * 6
    pool.shutdown()
    rounds: Rounds[str] = Rounds()
    for entry in ("a1", "a2", "a3", "b1"):
        rounds.put(entry[0], entry)
    assert [entry for entry, _ in zip(rounds, range(3), strict=False)] == ["a1", "b1", "a2"]
    rounds.put_back("b", "b1")
    assert next(iter(rounds)) == "b1"


@in_loop
async def test_usage_is_forgotten_by_half_and_bodies_have_pauses_while_another_asks() -> None:
    now = 0.0
    usage = Usage(lambda: now)
    usage.add("a", 4.0)
    assert not usage.crowded
    usage.add("b", 3.0)
    assert usage.crowded
    now = fair.ALONE_S
    assert (usage.of("a"), usage.of("b"), usage.of("c")) == (2.0, 1.5, 0.0)
    slept: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        slept.append(round(seconds, 1))
        await sleep(0)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bodies, "CROWDED_RATE", SMALL * 32)
        crowd = Crowd(BodyMiddleware(answering(0)))
        patched.setattr(bodies.asyncio, "sleep", noted)
        for who, size in (("greedy", 16), ("greedy", 16), ("other", 0), *[("greedy", 160)] * 3, ("other", 0)):
            await crowd.ask(who, SMALL * size)
    assert slept == [0.0, 0.0, 5.0, 10.0, 0.0], "who is alone has none"


# The scheduler's places


@in_loop
async def test_one_caller_does_not_take_the_whole_capacity_nor_what_is_remembered_for_another() -> None:
    scheduler = Scheduler(FakeEncoder(delay=0.01), capacity=32, remembered=4)
    scheduler.start()

    async def cached(who: str, text: str, *, long: bool = False) -> bool:
        return bool((await task_of(who, lambda: scheduler.encode_item(Item.of(text=text)), long=long)).cached)

    assert not await cached("quiet", "a red ring")
    attack = [asyncio.ensure_future(cached("greedy", f"ring {number}", long=True)) for number in range(120)]
    await passes_of_the_loop()
    assert not await cached("other", "a blue ring")
    assert not any(await asyncio.gather(*attack)), "long work waits and is done"
    crowd = [asyncio.ensure_future(cached("rude", f"cup {number}")) for number in range(40)]
    await asyncio.sleep(0)
    assert not await cached("other", "a last ring")
    busy = [error for error in await asyncio.gather(*crowd, return_exceptions=True) if isinstance(error, BusyError)]
    assert len(busy) == 40 - 16 and "of them yours" in str(busy[0])
    assert await cached("quiet", "a red ring") and scheduler.under_way == scheduler._places.held == 0
    await scheduler.close()


@pytest.mark.slow
@in_loop
async def test_rows_of_one_caller_leave_room_to_write_for_another(model: TraceModel, queries: list[Query]) -> None:
    wanted = Encoder(model).encode_queries(queries, route="reason")
    scheduler = Scheduler(Encoder(model), writing=4, remembered=0)
    scheduler.start()
    tasks = [
        task_of(who, lambda q=query: scheduler.encode_query(q, "reason"), long=who == "greedy")
        for query, who in zip(queries, ["greedy", "greedy", "other"] * len(queries), strict=False)
    ]
    for served, alone in zip(await asyncio.gather(*tasks), wanted, strict=True):
        assert float(np.dot(served.encoding.vector, alone.vector)) > 0.99999 and served.encoding.reasoning == alone.reasoning
    await scheduler.close()


# Requests and bytes


class Crowd:
    """Requests of callers to one application, and what each was answered."""

    def __init__(self, app: App, client: str = "10.0.0.1") -> None:
        self.app, self.client, self.statuses, self.taken = app, client, Counter[tuple[str, int]](), Counter[str]()
        self.reads = asyncio.Event()

    def ask(self, who: str, size: int = 0, *, ends: bool = True, key: str = "") -> asyncio.Task[Any]:
        left: list[Message] = [{"type": "http.request", "body": bytes(SMALL), "more_body": True}] * (size // SMALL)
        left += [{"type": "http.request", "body": b""}] if ends else []

        async def receive() -> Message:
            return left.pop(0) if left else await asyncio.Future()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.statuses[who, message["status"]] += 1
                return
            assert len(message["body"]) <= SMALL
            self.taken[who] += len(message["body"])
            if who == "deaf":
                await self.reads.wait()

        headers = [bearer(key)] if key else []
        scope = {"type": "http", "method": "POST", "path": "/search", "headers": headers, "client": (self.client, 1)}
        return task_of(who, lambda: cast(Any, self.app(scope, receive, send)))


def answering(size: int, wait: Callable[[], Any] | None = None) -> App:
    """Reads a body, waits, answers with so many bytes."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        while (message := await receive()).get("more_body"):
            pass
        if message["type"] == "http.request":
            if wait is not None:
                await wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": bytes(size)})

    return app


@in_loop
async def test_bodies_and_untaken_answers_of_one_caller_leave_room_for_another() -> None:
    middleware = BodyMiddleware(answering(0), most=SMALL * 4, together=SMALL * 16)
    crowd = Crowd(middleware)
    endless = [crowd.ask("greedy", SMALL * 4, ends=False) for _ in range(6)]
    await passes_of_the_loop()
    assert crowd.statuses == {("greedy", 429): 4} and middleware.shares.held == SMALL * 8
    await crowd.ask("other", SMALL * 3)
    for task in endless:
        task.cancel()
    await asyncio.gather(*endless, return_exceptions=True)
    assert middleware.shares.held == 0
    await crowd.ask("greedy", SMALL * 3)
    assert crowd.statuses == {("greedy", 429): 4, ("other", 200): 1, ("greedy", 200): 1}
    middleware = BodyMiddleware(answering(SMALL * 4), together=SMALL * 16)
    crowd = Crowd(middleware)
    deaf = [crowd.ask("deaf") for _ in range(9)]
    await passes_of_the_loop()
    assert crowd.statuses == {("deaf", 200): 2, ("deaf", 429): 7} and middleware.shares.held == SMALL * 8
    await crowd.ask("other")
    assert crowd.statuses["other", 200] == 1 and crowd.taken["other"] == SMALL * 4
    crowd.reads.set()
    await asyncio.gather(*deaf)
    assert middleware.shares.held == 0


@in_loop
async def test_requests_of_one_key_leave_room_for_another(tmp_path: Path) -> None:
    keys = {name: make_key(tmp_path / "keys.json", name) for name in ("greedy", "other")}
    answered = asyncio.Event()
    crowd = Crowd(KeyMiddleware(answering(2, answered.wait), KeyRing(tmp_path / "keys.json"), Limits(), together=8))
    tasks = [crowd.ask(name, key=keys[name]) for name in ["greedy"] * 9 + ["other"]]
    await passes_of_the_loop()
    assert crowd.statuses == {("greedy", 429): 5}
    answered.set()
    await asyncio.gather(*tasks)
    assert crowd.statuses == {("greedy", 429): 5, ("greedy", 200): 4, ("other", 200): 1}


def test_without_keys_an_address_is_the_caller() -> None:
    seen: list[str] = []

    async def noting(scope: Message, receive: Receive, send: Send) -> None:
        seen.append(caller.get())
        await answering(0)(scope, receive, send)

    for address in ("127.0.0.1", "127.0.0.2", "2001:db8:1:2:3::4"):
        ask(KeyMiddleware(noting, None, Limits()), "POST", "/search", [HOST, KIND], client=address)
    assert seen == ["127.0.0.1", "127.0.0.2", "2001:db8:1:2::/64"]
