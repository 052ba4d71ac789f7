"""The encoder over SGLang against a stand-in server that runs the bundled checkpoint, and the in-process Encoder as oracle."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import image_of
from fake_sglang import FakeSGLang, served, serving_here
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as Path_

from traceir.checkpoint import bundled_model
from traceir.client import Client
from traceir.data import mbeir
from traceir.encoder import Encoder
from traceir.engines.sglang import SGLangEncoder, without_weights
from traceir.errors import InputError, ModelError
from traceir.images import ImageInput
from traceir.items import Encoding, Item, Query, Route
from traceir.serve import jobs
from traceir.serve.jobs import FAILURES, BusyError, LateError
from traceir.serve.scheduler import Scheduler

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not installed

from benchmarks import engine_parity

TEXT = [Query.of(text="a red cube")]
INVENTED = "a zubbly crate <|emb|> beside <|image_pad|> <|im_end|> and nothing"


@pytest.fixture(scope="module")
def fake(encoder: Encoder) -> Iterator[FakeSGLang]:
    server = FakeSGLang(bundled_model(), encoder.fingerprint)
    with served(server.app()) as address:
        server.address = address
        yield server


@pytest.fixture(scope="module")
def made(fake: FakeSGLang, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangEncoder]:
    """Over a folder that holds no weights at all."""
    with make(fake, without_safetensors(tmp_path_factory.mktemp("engine") / "mini")) as encoder:
        yield encoder


@pytest.fixture
def engine(made: SGLangEncoder, fake: FakeSGLang) -> SGLangEncoder:
    fake.reset()
    return made


@pytest.fixture(scope="module")
def asked(folder: Path) -> list[Query]:
    """Queries that bypass and that reason, one whose text holds special tokens, one of several images of odd shapes."""
    instructions = mbeir.read_instructions(folder)
    queries = []
    for task in mbeir.find_tasks(folder, "test")[::6]:
        prompt = instructions.prompts(task.dataset_id, task.query_modality, task.cand_modality)[0]
        queries.append(mbeir.to_query(next(iter(mbeir.read_queries(task.query_path))), prompt, folder))
    queries.append(Query.of(text=INVENTED, image=image_of(1), target="image"))
    return [*queries, Query((image_of(2, 96, 48), "red", image_of(3, 31, 120), "then green"), instruction="find it")]


def make(fake: FakeSGLang, model: Path, **options: Any) -> SGLangEncoder:
    return SGLangEncoder(fake.address + "/v1/", model, **{"pause_s": 0.01, "tries": 3, **options})


def without_safetensors(target: Path, **changed: Any) -> Path:
    """A copy of the bundled checkpoint without its weights; `changed` replaces entries of traceir.json."""
    shutil.copytree(bundled_model(), target, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((target / "traceir.json").read_text())
    (target / "traceir.json").write_text(json.dumps({**settings, **changed}))
    return target


def assert_same(ours: list[Encoding], theirs: list[Encoding]) -> None:
    for own, other in zip(ours, theirs, strict=True):
        for name in ("route", "reasoning", "tokens", "truncated", "cut"):
            assert getattr(own, name) == getattr(other, name)
        assert own.vector.dtype == "float32" and own.vector == pytest.approx(other.vector, abs=1e-4)
        assert own.emb_probability == pytest.approx(other.emb_probability, abs=1e-4)


@pytest.mark.parametrize("route", ["auto", pytest.param("reason", marks=pytest.mark.slow), "direct"])
def test_queries_equal_the_in_process_encoder(
    engine: SGLangEncoder, fake: FakeSGLang, encoder: Encoder, asked: list[Query], route: Route
) -> None:
    for name in ("fingerprint", "prompt_version", "width"):
        assert getattr(engine, name) == getattr(encoder, name)
    oracle = encoder.encode_queries(asked, route=route)
    assert_same(engine.encode_queries(asked, route=route), oracle)
    if route == "auto":
        assert {encoding.route for encoding in oracle} == {"reason", "direct"}
        assert len(fake.bodies) == len(asked), "one request for each query, whatever its route"


def test_items_of_every_modality_equal_the_in_process_encoder_in_every_layout_of_states(
    engine: SGLangEncoder, fake: FakeSGLang, encoder: Encoder
) -> None:
    items = [
        Item.of(text="a green vase"),
        Item.of(image=image_of(4, 192, 192)),
        Item.of(text="a jacket", image=image_of(5, 40, 100)),
    ]
    oracle, other = encoder.encode_items(items), [1.0] * encoder.width
    for rows in (lambda state: state, lambda state: [other, state], lambda state: [[other, other, state]]):
        fake.after = lambda reply, rows=rows: spoiled(hidden_states=rows(reply["meta_info"]["hidden_states"]))(reply)
        assert_same(engine.encode_items(items), oracle)
    assert engine.encode_items([]) == [] and engine.encode_queries([]) == []


@pytest.mark.parametrize(("closing", "dim"), [("", None), ("so a red cube", 32)])
def test_a_spent_budget_and_narrow_vectors_equal_the_in_process_encoder(
    fake: FakeSGLang, encoder: Encoder, asked: list[Query], tmp_path: Path, closing: str, dim: int | None
) -> None:
    fake.reset()
    whole = without_safetensors(tmp_path / "mini", closing=closing, matryoshka_dims=[128, 32])
    with make(fake, whole, max_reasoning_tokens=3, dim=dim) as engine:
        shutil.copy(bundled_model() / "model.safetensors", whole)
        oracle = Encoder.from_pretrained(whole, max_reasoning_tokens=3, dim=dim).encode_queries(asked)
        assert (engine.width, engine.prompt_version) == (dim or 128, "brief-1, first 32" if dim else "brief-1")
        assert any(encoding.truncated for encoding in oracle)
        encodings = engine.encode_queries(asked)
        assert_same(encodings, oracle)
        assert [encoding.ended for encoding in encodings] == [encoding.ended for encoding in oracle]


def test_threads_get_their_own_answers_and_a_stop_token_of_the_engine_is_read_like_any_other(
    engine: SGLangEncoder, fake: FakeSGLang, encoder: Encoder, asked: list[Query]
) -> None:
    oracle = encoder.encode_queries(asked)
    written = next(encoding for encoding in oracle if encoding.tokens > 3).reasoning
    fake.more_stops = set(encoder.model.processor.plain_ids(written)[:3])
    with ThreadPoolExecutor(4) as threads:
        assert_same(list(threads.map(lambda query: engine.encode_queries([query])[0], asked)), oracle)
    assert len(fake.bodies) > len(asked)


def test_it_waits_for_a_busy_engine(engine: SGLangEncoder, fake: FakeSGLang, encoder: Encoder, asked: list[Query]) -> None:
    busy = JSONResponse({"error": {"message": "The request queue is full."}}, status_code=503, headers={"Retry-After": "0"})
    answers = {1: busy, 2: Response('{"meta_info": {"hidden_sta', media_type="application/json")}
    fake.before = answers.get
    assert_same(engine.encode_queries(asked[:1]), encoder.encode_queries(asked[:1]))
    assert len(fake.bodies) == 3
    given_up = {"finish_reason": {"type": "abort", "message": "retracted too often", "status_code": 503}}
    fake.reset()
    fake.after = lambda reply: {**reply, "meta_info": given_up} if len(fake.bodies) == 1 else reply
    assert_same(engine.encode_queries(asked[:1]), encoder.encode_queries(asked[:1]))
    fake.before = lambda _: busy
    with pytest.raises(ModelError, match=rf"{fake.address}/generate answers 503: The request queue is full.*tried 3 times"):
        engine.encode_queries(asked)


def spoiled(**meta: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda reply: {**reply, "meta_info": {**reply["meta_info"], **meta}}


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (spoiled(hidden_states=None), "--return-hidden-states-mode last"),
        (spoiled(hidden_states=[float("nan")] * 128), "not finite"),
        (spoiled(hidden_states=[0.5] * 384), "joins several layers"),
        (spoiled(finish_reason={"type": "stop", "matched": "NaN happened"}), "NaN happened"),
        (spoiled(finish_reason={"type": "abort", "message": "too long", "status_code": 400}), "too long"),
        (spoiled(weight_version="next"), "changed its weights"),
        (spoiled(prompt_tokens=3), "SGLANG_MM_AVOID_RETOKENIZE"),
        (None, "SGLANG_MM_AVOID_RETOKENIZE"),
        (spoiled(output_token_ids_logprobs=None), "log-probabilities"),
        (lambda reply: {**reply, "output_ids": None, "meta_info": {**reply["meta_info"], "finish_reason": {}}}, "output_ids"),
        (lambda reply: [reply], "no reply of SGLang"),
    ],
)
def test_a_spoiled_reply_is_refused_with_a_remedy(
    engine: SGLangEncoder, fake: FakeSGLang, after: Callable[[dict[str, Any]], Any] | None, message: str
) -> None:
    fake.after, fake.retokenizes = after or fake.after, after is None
    with pytest.raises(ModelError, match=message) as error:
        engine.encode_queries(TEXT if after else [Query.of(text="a zubbly <|emb|>", image=image_of(1))])
    assert fake.address in str(error.value)


@pytest.mark.parametrize(
    ("model", "server", "message"),
    [
        ({"weight_version": "0123456789abcdef"}, {}, "weight version '0123456789abcdef'"),
        ({"weight_version": "default", "model_path": "somebody/else"}, {}, "somebody/else.*--weight-version"),
        ({"is_generation": False}, {}, "--is-embedding"),
        ({}, {"version": "0.5.14"}, "0.5.17"),
        ({}, {"return_hidden_states_mode": None}, "--return-hidden-states-mode last"),
        ({}, {"speculative_algorithm": "NGRAM"}, "NGRAM"),
    ],
)
def test_an_engine_that_will_not_do_is_refused_at_once(
    fake: FakeSGLang, model: dict[str, Any], server: dict[str, Any], message: str
) -> None:
    fake.reset()
    fake.model_info |= model
    fake.server_info |= server
    with pytest.raises(ModelError, match=message):
        make(fake, bundled_model())
    assert fake.bodies == []


def test_addresses_and_checkpoints_that_cannot_do(fake: FakeSGLang, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fake.reset()
    fake.model_info["weight_version"] = "default"
    make(fake, bundled_model()).close()
    assert "only the name could be compared" in caplog.text
    fake.model_info["model_path"] = str(without_safetensors(tmp_path / "mini", fingerprint="another"))
    with pytest.raises(ModelError, match="another"):
        make(fake, bundled_model())
    with pytest.raises(InputError, match="http"):
        SGLangEncoder("localhost:30000", bundled_model())
    with pytest.raises(ModelError, match=r"cannot reach http://127.0.0.1:9.*tried 1 times"):
        SGLangEncoder("http://127.0.0.1:9", bundled_model(), tries=1)
    with pytest.raises(ModelError, match="at_token"):
        without_weights(without_safetensors(tmp_path / "at", read_out="at_token"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        without_weights(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="whole checkpoints"):
        without_weights(tmp_path / "empty")


@pytest.mark.slow
def test_the_parity_benchmark_passes_here_and_notices_a_difference(
    fake: FakeSGLang, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.reset()
    arguments = ["--engine", fake.address, "--model", str(bundled_model()), "--data", str(folder), "--queries", "4"]
    arguments += ["--device", "cpu", "--dtype", "float32", "--repetitions", "1", "--out", str(tmp_path / "engine.json")]
    assert engine_parity.main([*arguments, "--cosine", "0.9999", "--same-route", "1", "--same-text", "1"]) == 0
    assert "ratio" in capsys.readouterr().out
    assert json.loads((tmp_path / "engine.json").read_text())["parity"]["auto"]["inputs"] == 4

    def turned(reply: dict[str, Any]) -> dict[str, Any]:
        reply["meta_info"]["hidden_states"][0] += 1.0
        return reply

    fake.after = turned
    assert engine_parity.main([*arguments, "--cosine", "0.9999"]) == 1
    assert "direct: least_cosine" in capsys.readouterr().err


@pytest.mark.slow
def test_traceir_serve_over_an_engine(
    fake: FakeSGLang,
    encoder: Encoder,
    asked: list[Query],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake.reset()
    items = [Item.of(text=text, id=text) for text in ("a blue mug", "a green vase", "a red ring")]
    broken = Item.of(image=ImageInput.from_bytes(b"no image"), id="broken")
    with (
        make(fake, without_safetensors(tmp_path / "mini"), tries=1) as engine,
        serving_here(tmp_path / "index", engine) as url,
        Client(url, tries=1) as client,
    ):
        assert [added.status for added in client.add([*items, broken])] == ["added"] * 3 + ["failed"]
        assert_same(client.embed_queries(asked[-2:], route="reason"), encoder.encode_queries(asked[-2:], route="reason"))
        assert_same(client.embed_items(items), encoder.encode_items(items))
        usage = httpx.post(f"{url}/v1/embeddings", json={"model": "traceir", "input": "a red ring"}).json()["usage"]
        assert usage["prompt_tokens"] == len(encoder.model.processor.lay_out(encoder.model.prompt(items[2], direct=True)))
        oracle = encoder.encode_queries(TEXT)[0].vector
        scores = {str(item.id): float(oracle @ encoder.encode_items([item])[0].vector) for item in items}
        assert [hit.id for hit in client.search(TEXT[0], k=3).hits] == sorted(scores, key=lambda id: -scores[id])
        fake.before = lambda _: JSONResponse({"error": {"message": "no memory"}}, status_code=500)
        for number in range(FAILURES):
            with pytest.raises(ModelError, match="answers 503"):
                client.search(Query.of(text=f"something new {number}"))
        assert "answers 500: no memory" in caplog.text and httpx.get(f"{url}/ready").status_code == 503
        monkeypatch.setattr(jobs, "AGAIN_S", 0.0)  # requests must come, else nobody learns that it is back
        fake.before = lambda _: None
        assert client.search(Query.of(text="something newer"), k=1).hits


def test_who_leaves_is_given_up_at_the_engine_too(fake: FakeSGLang) -> None:
    fake.reset()
    begun, left, go_on = threading.Event(), threading.Event(), threading.Event()

    async def hold(request: Request) -> Response:
        begun.set()
        while not go_on.is_set():
            if await request.is_disconnected():
                left.set()
                break
            await asyncio.sleep(0.01)
        return JSONResponse({}, status_code=400)

    async def info(request: Request) -> Response:
        return JSONResponse(fake.model_info if "model" in request.url.path else fake.server_info)

    async def work(address: str) -> None:
        scheduler = Scheduler(SGLangEncoder(address, bundled_model(), tries=1))
        scheduler.start()

        async def asking(number: int) -> asyncio.Task[Encoding]:
            begun.clear()
            task = asyncio.create_task(scheduler.encode_query(Query.of(text=f"a red cube number {number}")))
            assert await asyncio.to_thread(begun.wait, 20)
            return task

        try:
            (await asking(0)).cancel()
            assert await asyncio.to_thread(left.wait, 20) and scheduler.under_way == 0
            with pytest.raises(LateError):
                await scheduler.encode_query(TEXT[0], seconds=0.2)
            waits = await asking(1)
            await scheduler.close(0.1)
            with pytest.raises(BusyError):
                await waits
        finally:
            go_on.set()

    paths = [Path_("/generate", hold, methods=["POST"]), Path_("/{name}_info", info)]
    with served(Starlette(routes=paths)) as address:
        asyncio.run(asyncio.wait_for(work(address), 60))
