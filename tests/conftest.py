"""Shared fixtures: a small random model whose `<|emb|>` comes at different steps, and images of several shapes."""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Idle threads of OpenMP wait by computing: on a busy machine two of them take three times the CPU seconds of one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from traceir.batch import PoolingPosition
from traceir.checkpoint import bundled_model
from traceir.data import mbeir
from traceir.encoder import Encoder
from traceir.images import ImageInput
from traceir.index import open_index
from traceir.items import Item, Query
from traceir.lab.fixture import unpack
from traceir.model import TraceModel, TraceSettings
from traceir.prompts import render_query
from traceir.train.small import SmallSize, small_model, train_tokenizer

# The same examples in every run: what passes once passes again, and what fails can be looked at.
settings.register_profile("steady", derandomize=True)
settings.load_profile("steady")

torch.set_num_threads(1)
gc.disable()  # while all is imported, see pytest_collection_finish

FORKS = multiprocessing.get_context("forkserver")
"""Processes that begin with training imported, which takes longer than what they are started for."""
FORKS.set_forkserver_preload(["traceir.train.train"])

WORDS = "query text find image candidate user assistant a red green blue cube ball cone left middle make one then".split()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where slow tests are left out, a file that has no others is not imported: some packages take seconds."""
    if config.option.markexpr != "not slow" or collection_path.suffix != ".py":
        return None
    return True if "\npytestmark = pytest.mark.slow\n" in collection_path.read_text(encoding="utf-8") else None


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Makes a test of a coroutine, which has a minute."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**fixtures), 60))

    return run


def image_of(seed: int, width: int = 48, height: int = 48) -> ImageInput:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return ImageInput.from_pil(Image.fromarray(pixels), name=f"noise-{seed}-{width}x{height}")


def random_model(seed: int = 0, *, emb_scale: float = 3.0, pooling_position: PoolingPosition = "before_token") -> TraceModel:
    """A random model with untied output rows; `emb_scale` makes `<|emb|>` win at about every third step."""
    draw = np.random.default_rng(seed)
    lines = [" ".join(draw.choice(WORDS, 8)) for _ in range(200)]
    tokenizer = train_tokenizer(lines, 400)
    size = SmallSize(hidden=48, layers=2, heads=4, inner=96, vision_hidden=32, vision_layers=2, vision_heads=2,
                     vision_inner=48, vocabulary=400)  # fmt: skip
    settings = TraceSettings(
        prompt_version="brief-1", pooling_position=pooling_position, max_reasoning_tokens=12, fingerprint="random"
    )
    model = small_model(tokenizer, size, settings, seed)
    torch.manual_seed(seed)
    head = model.network.lm_head
    head.weight = torch.nn.Parameter(torch.randn_like(head.weight))
    direction = torch.randn(head.weight.shape[1])
    with torch.no_grad():
        head.weight[model.processor.emb_id] = emb_scale * direction
        head.weight[model.processor.special["<|im_end|>"]] = 0.0
    return model


def both_routes(model: TraceModel, queries: list[Query]) -> TraceModel:
    """Turns the `<|emb|>` row so that every other query bypasses; what the rest write stays as random as before."""
    batch = model.processor.collate([model.processor.lay_out(render_query(q, "brief-1")) for q in queries])
    with torch.no_grad():
        states = model.hidden(batch)[:, -1]
        row = model.network.lm_head.weight[model.processor.emb_id]
        wanted = torch.where(torch.arange(len(queries)) % 2 == 0, 40.0, -40.0)
        row += torch.linalg.lstsq(states, (wanted - states @ row)[:, None]).solution[:, 0]
    return model


@pytest.fixture(scope="session")
def model(queries: list[Query]) -> TraceModel:
    return both_routes(random_model(), queries)


@pytest.fixture(scope="session")
def queries() -> list[Query]:
    """Text, image, image+text and interleaved queries of different lengths."""
    return make_queries()


def make_queries() -> list[Query]:
    draw = np.random.default_rng(7)
    queries: list[Query] = []
    for number in range(24):
        words = " ".join(draw.choice(WORDS, 2 + number % 9))
        kind = number % 4
        if kind == 0:
            queries.append(Query.of(text=words, target="image", instruction="find the image"))
        elif kind == 1:
            queries.append(Query.of(image=image_of(number), target="text"))
        elif kind == 2:
            queries.append(Query.of(text=words, image=image_of(number, 96, 48), target="image"))
        else:
            queries.append(Query((image_of(number), words, image_of(number + 100, 48, 96), "then make one red")))
    return queries


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    """The bundled model."""
    return Encoder.from_pretrained(bundled_model())


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small frozen MiniBEIR: eight test queries of each row, 24 to 40 candidates, some training."""
    return unpack(tmp_path_factory.mktemp("mini") / "data")


@pytest.fixture(scope="session")
def unseen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two to four cases of each of the 13 zero-shot columns; who changes a file puts it back."""
    return unpack(tmp_path_factory.mktemp("unseen") / "built", Path(__file__).parent / "fixtures" / "unseen.zip")


@dataclass(frozen=True)
class Running:
    """A running `traceir serve` over some of the small MiniBEIR: its address, its index, and what was indexed."""

    url: str
    index: Path
    items: tuple[Item, ...]


@contextmanager
def serving(index: Path, *options: str) -> Iterator[str]:
    """`traceir serve` in a process of its own on a free port, killed in the end; yields its address once it is ready."""
    command = [sys.executable, "-m", "traceir", "--threads", "1", "serve", "--index", str(index), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " at http://" in line, line
        url = line.split(" at ")[1].strip().rstrip("/")
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{url}/ready", timeout=5):
                    break
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def running(folder: Path, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server over 40 images, 20 texts and 10 pairs."""
    home = tmp_path_factory.mktemp("served") / "index"
    items: list[Item] = []
    for row, count in (("mscoco_task0_test", 40), ("mscoco_task3_test", 20), ("edis_task2", 10)):
        pool = mbeir.read_pool(folder / "cand_pool" / "local" / f"mbeir_{row}_cand_pool.jsonl")
        items += [mbeir.to_item(candidate, folder) for candidate in itertools.islice(pool, count)]
    with open_index(
        home, fingerprint=encoder.fingerprint, prompt_version=encoder.prompt_version, dim=encoder.width, create=True
    ) as index:
        index.upsert(items, np.stack([encoding.vector for encoding in encoder.encode_items(items)]))
    with serving(home) as url:
        yield Running(url, home, tuple(items))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
# The browser is a program of the system, not a package: where there is none, these cannot run.
IN_BROWSER = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Makes pages; whatever goes wrong in one fails the test. `refusals`: the browser may report answers that are errors."""
    contexts: list[Any] = []
    wrong: list[str] = []

    def opened(url: str, *, refusals: bool = False, before: Callable[[Any], None] | None = None, **how: Any) -> Any:
        def console(message: Any) -> None:
            if message.type == "error" and not (refusals and "Failed to load resource" in message.text):
                wrong.append(message.text)

        contexts.append(browser.new_context(**how))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", console)
        if before:
            before(page)
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong, wrong


def pytest_collection_finish() -> None:
    """What is imported stays for good: the garbage collector need not walk through it again and again."""
    gc.freeze()
    gc.enable()
