"""Dynamic batching: the encoder's own results whatever comes together, and nothing lost, crossed or left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from conftest import in_loop

from traceir.decoding import Decoder
from traceir.encoder import Encoder
from traceir.errors import ImageError
from traceir.images import ImageInput
from traceir.items import Encoding, Item, Query, Route
from traceir.model import TraceModel
from traceir.serve.jobs import FAILURES, BusyError, LateError, Progress
from traceir.serve.scheduler import Scheduler

ROUTE_OF: list[Route] = ["auto", "reason", "direct"]


@asynccontextmanager
async def scheduling(model: TraceModel, **options: Any) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(Encoder(model), **options)
    scheduler.start()
    try:
        yield scheduler
        assert scheduler.under_way == 0
    finally:
        await scheduler.close()


def same(actual: Encoding, wanted: Encoding) -> bool:
    cosine = float(np.dot(actual.vector, wanted.vector))
    return cosine > 0.99999 and (actual.route, actual.reasoning, actual.tokens) == (wanted.route, wanted.reasoning, wanted.tokens)


@in_loop
async def test_what_comes_together_is_what_the_encoder_gives_alone(model: TraceModel, queries: list[Query]) -> None:
    queries, encoder = queries[::2] + queries[1::6], Encoder(model)
    wanted = {(query, route): encoder.encode_queries([query], route=route)[0] for query in queries for route in ROUTE_OF}
    items = [Item(query.parts) for query in queries]
    wanted_items = encoder.encode_items(items)

    async def ask(query: Query, route: Route, wait: float) -> None:
        await asyncio.sleep(wait)
        served = await scheduler.encode_query(query, route)
        assert same(served.encoding, wanted[query, route]), (route, query)
        assert served.encoding.vector.base is None, "what is remembered holds no other memory"

    async def add(number: int) -> None:
        served = await scheduler.encode_item(items[number])
        assert same(served.encoding, wanted_items[number]) and served.encoding.emb_probability == 1.0
        assert served.encoding.vector.base is None

    async with scheduling(model, writing=4, remembered=0) as scheduler:
        asked = [ask(query, route, 0.003 * number) for number, query in enumerate(queries) for route in ROUTE_OF]
        await asyncio.gather(*asked, *(add(number) for number in range(len(items))))


@in_loop
async def test_equal_queries_at_a_time_are_one_and_later_ones_are_remembered(model: TraceModel, queries: list[Query]) -> None:
    async with scheduling(model) as scheduler:
        together = await asyncio.gather(*(scheduler.encode_query(queries[1], "reason") for _ in range(5)))
        assert len({id(served.encoding) for served in together}) == 1 and not any(served.cached for served in together)
        again = await scheduler.encode_query(queries[1], "reason")
        assert again.cached and again.encoding is together[0].encoding
        assert not (await scheduler.encode_query(queries[1], "direct")).cached, "another route is another encoding"


@in_loop
async def test_beyond_the_capacity_is_refused_at_once_and_the_rest_is_answered(model: TraceModel, queries: list[Query]) -> None:
    async with scheduling(model, capacity=4) as scheduler:
        results = await asyncio.gather(*(scheduler.encode_query(query, "reason") for query in queries), return_exceptions=True)
        busy = [error for error in results if isinstance(error, BusyError)]
        assert len(busy) == len(queries) - 4 and all(error.retry_after_s > 0 for error in busy)
        assert not (await scheduler.encode_query(queries[-1], "reason")).cached


@in_loop
async def test_who_leaves_takes_the_row_along_and_disturbs_nobody(model: TraceModel, queries: list[Query]) -> None:
    wanted = Encoder(model).encode_queries(queries, route="reason")
    async with scheduling(model) as scheduler:
        tasks = [asyncio.create_task(scheduler.encode_query(query, "reason")) for query in queries]
        twin = asyncio.create_task(scheduler.encode_query(queries[0], "reason"))
        while scheduler.under_way < len(queries):
            await asyncio.sleep(0.001)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results[::2])
        for result, alone in zip(results[1::2], wanted[1::2], strict=True):
            assert not isinstance(result, BaseException) and same(result.encoding, alone)
        assert same((await twin).encoding, wanted[0]), "another waits for the same query"


@in_loop
async def test_a_deadline_or_a_broken_image_ends_one_request_alone(model: TraceModel, queries: list[Query]) -> None:
    broken = Query.of(image=ImageInput.from_bytes(b"not a picture", name="broken"))
    async with scheduling(model) as scheduler:
        late = scheduler.encode_query(queries[0], "reason", seconds=1e-9)
        others = scheduler.encode_query(broken), scheduler.encode_query(queries[1])
        results = await asyncio.gather(late, *others, return_exceptions=True)
        assert [type(result).__name__ for result in results] == [LateError.__name__, ImageError.__name__, "Served"]
        assert (await scheduler.encode_query(queries[0], "reason")).encoding.tokens > 0


@in_loop
async def test_progress_is_told_in_order_and_ends_in_the_reasoning(model: TraceModel, queries: list[Query]) -> None:
    async with scheduling(model) as scheduler:
        heard: list[Progress] = []
        served = await scheduler.encode_query(queries[2], "reason", listener=heard.append)
        assert heard and heard[0].reasoning == "" and heard[0].emb_probability == served.encoding.emb_probability
        assert all(served.encoding.reasoning.startswith(progress.reasoning.rstrip("�")) for progress in heard)


@in_loop
async def test_closing_lets_what_is_under_way_end(model: TraceModel, queries: list[Query]) -> None:
    async with scheduling(model) as scheduler:
        tasks = [asyncio.create_task(scheduler.encode_query(query, "reason")) for query in queries]
        while scheduler.under_way < len(queries):
            await asyncio.sleep(0.001)
        await scheduler.close()
        assert len([(await task).encoding for task in tasks]) == len(queries)
        with pytest.raises(BusyError):
            await scheduler.encode_query(queries[0], "direct")


@in_loop
async def test_a_failing_model_is_told_to_those_who_wait_and_the_next_one_is_served(
    model: TraceModel, queries: list[Query], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scheduling(model, remembered=0) as scheduler:
        with monkeypatch.context() as patched:
            patched.setattr(Decoder, "step", lambda *arguments: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await scheduler.encode_query(queries[0], "reason")
        assert (await scheduler.encode_query(queries[0], "reason")).encoding.tokens > 0
        with monkeypatch.context() as patched:
            patched.setattr(Decoder, "prefill", lambda *arguments: 1 / 0)
            for number in range(FAILURES):
                assert scheduler.alive
                with pytest.raises(ZeroDivisionError):
                    await scheduler.encode_query(queries[number], "reason")
            assert not scheduler.alive


@in_loop
async def test_one_bad_input_fails_alone(model: TraceModel, queries: list[Query], monkeypatch: pytest.MonkeyPatch) -> None:
    bad = queries[-1]
    ids = model.processor.lay_out(model.prompt(bad, direct=False)).ids.tolist()
    wanted = Encoder(model).encode_queries([query for query in queries if query != bad], route="reason")
    prefill = Decoder.prefill

    def fragile(self: Decoder, numbers: Any, layouts: Any, route: Route) -> Any:
        if any(layout.ids.tolist() == ids for layout in layouts):
            raise RuntimeError("no memory")
        return prefill(self, numbers, layouts, route)

    async with scheduling(model, remembered=0) as scheduler:
        monkeypatch.setattr(Decoder, "prefill", fragile)
        results = await asyncio.gather(*(scheduler.encode_query(query, "reason") for query in queries), return_exceptions=True)
        assert isinstance(results.pop(), RuntimeError)
        for result, alone in zip(results, wanted, strict=True):
            assert not isinstance(result, BaseException) and same(result.encoding, alone)
        assert scheduler.alive
