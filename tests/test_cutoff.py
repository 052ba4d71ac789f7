"""The cut-off: thresholds keep the rate they promise, follow the contents of an index, and reach CLI, server and page."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import image_of
from fake_sglang import serving_here
from fakes import FakeEncoder
from test_index_conformance import drawn_background

from traceir.background import COUNT, built_in, choose_queries, read_queries
from traceir.checkpoint import bundled_model
from traceir.cli.main import build_parser, main
from traceir.client import Client
from traceir.encoder import Encoder
from traceir.errors import InputError, StoreError
from traceir.index import Index, SqliteIndex, open_index
from traceir.index.sql import write_background
from traceir.items import Item, Modality, Query
from traceir.retrieval.cutoff import Calibration, Calibrations, check_rate, thresholds
from traceir.retrieval.pipeline import EncodedQuery, SearchOptions, retrieve
from traceir.retrieval.search import EncoderLike, Searcher, encode_background
from traceir.serve.run import ServeConfig, make_server
from traceir.serve.tenants import TenantIndex

CAPTION = "On the left a white ring, in the middle a blue ring, on the right a purple ring."
Draw = Callable[[np.random.Generator, int], np.ndarray[Any, Any]]
SCORES: dict[str, Draw] = {
    "normal": lambda draw, count: draw.normal(0.2, 0.1, count),
    "uneven": lambda draw, count: draw.pareto(3.0, count),
    "tied": lambda draw, count: np.round(draw.normal(0.2, 0.1, count), 1),
}


def alarms(draw_scores: Draw, count: int, rate: float, modalities: tuple[Modality, ...], trials: int = 100) -> float:
    """The share of fresh queries, drawn as the background was, that score more than a threshold in any modality."""
    draw, share = np.random.default_rng(0), 0.0
    for _ in range(trials):
        above = thresholds({name: draw_scores(draw, count).astype(np.float32) for name in modalities}, rate)
        asked = np.stack([draw_scores(draw, 500).astype(np.float32) > above[name] for name in modalities])
        share += float(asked.any(axis=0).mean()) / trials
    return share


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_the_rate_of_false_alarms_holds(kind: str, rate: float) -> None:
    single = alarms(SCORES[kind], 299, rate, ("image",))
    several = alarms(SCORES[kind], 599, rate, ("image", "text", "image,text"))
    # Standard deviations of the mean over 100 backgrounds, each a Beta(k, n + 1 - k) of which 500 queries are drawn.
    slack = 4 * math.sqrt((rate / 300 + rate / 500) / 100)
    assert single <= rate + slack and several <= rate + slack
    if kind != "tied":
        assert single >= rate - slack, "no more careful than it must be"
        assert several >= 0.75 * rate


def test_a_threshold_is_a_score_of_a_background_that_is_large_enough() -> None:
    scores = {"image": np.arange(99, dtype=np.float32)}
    assert thresholds(scores, 0.01) == {"image": 98.0} and thresholds(scores, 0.1) == {"image": 89.0}
    assert thresholds(scores, 0.019) == {"image": 98.0}, "a rate between two counts is rounded to the careful side"
    assert thresholds({}, 0.01) == {}
    with pytest.raises(InputError, match=r"0\.001 is less than 99 background queries can tell, which is 1 in 100.*--count 1000"):
        thresholds(scores, 0.001)
    apart = {**scores, "text": -scores["image"]}
    with pytest.raises(InputError, match="1 in 50"):
        thresholds(apart, 0.01)
    assert thresholds(apart, 0.02) == {"image": 98.0, "text": 0.0}
    unusable: list[Any] = [0, 1, -0.1, float("nan"), "a", True]
    for wrong in unusable:
        with pytest.raises(InputError, match="between 0 and 1"):
            check_rate(wrong)


# The background in an index


def test_a_write_that_breaks_off_leaves_what_was_there_and_a_damaged_background_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    with SqliteIndex(tmp_path, fingerprint="m1", prompt_version="p1", dim=4, create=True) as index:
        index.keep_background(drawn_background(draw))
        before, version = index.background(), index.version()

        def break_off(*arguments: Any) -> None:
            write_background(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("traceir.index.sqlite.write_background", break_off)
            index.keep_background(drawn_background(draw))
        after = index.background()
        assert before is not None and after is not None and index.version() == version
        assert np.array_equal(before.vectors["text"], after.vectors["text"])
        index._connection.execute("DELETE FROM background WHERE number = 3")
        with pytest.raises(StoreError, match="make it anew with `traceir index calibrate`"):
            index.background()
        index.keep_background(drawn_background(draw))
        assert index.background() is not None


def put(encoder: EncoderLike, index: Index, *items: Item) -> None:
    index.upsert(items, np.stack([encoding.vector for encoding in encoder.encode_items(items)]))


def some(encoder: FakeEncoder, index: Index, count: int = 20) -> None:
    items = [Item.of(text=f"thing {n}", id=f"t{n}") for n in range(count)]
    put(encoder, index, *items, *(Item.of(image=image_of(n, 8, 8), id=f"p{n}") for n in range(count)))


@pytest.fixture
def searcher(tmp_path: Path) -> Any:
    encoder = FakeEncoder()
    with open_index(tmp_path / "index", encoder, create=True) as index:
        some(encoder, index)
        yield Searcher(encoder, index)


def test_what_is_there_is_found_and_what_is_not_is_not(searcher: Searcher) -> None:
    with pytest.raises(InputError, match=r"not calibrated.*traceir index calibrate"):
        searcher.search("thing 7", cutoff=0.01)
    searcher.calibrate(built_in(400), "built in")
    best = searcher.search("thing 7", cutoff=0.01, k=5)
    assert [hit.id for hit in best.hits] == ["t7"] and best.hits[0].rank == 1
    assert best.cut is not None and set(best.cut.thresholds) == {"text", "image"}
    assert best.cut.rate == 0.01 and best.cut.below == 9 and best.cut.best == pytest.approx(1.0, abs=1e-6)
    absent = [Query.of(text=f"no such thing {n}", target=(None, "text", "image")[n % 3]) for n in range(300)]
    answers = searcher.search_many(absent, cutoff=0.01)
    assert sum(bool(answer.hits) for answer in answers) <= 10
    nothing = next(answer for answer in answers if not answer.hits)
    assert nothing.cut is not None and nothing.cut.best is not None
    assert nothing.cut.best <= max(nothing.cut.thresholds.values())
    plain = searcher.search("thing 7", k=5)
    assert plain.cut is None and len(plain.hits) == 5
    with pytest.raises(InputError, match="queries that are texts, not images"):
        searcher.search(Query.of(image=image_of(3)), cutoff=0.01)


def test_hits_of_one_modality_do_not_hide_those_of_another(searcher: Searcher) -> None:
    """A text that scores high is below the threshold of texts; an image that scores less is above that of images."""
    query = Query.of(text="thing 7")
    vector = searcher.encoder.encode_queries([query])[0].vector
    plain = searcher.index.search(vector[None], 40)[0]
    texts, images = ([hit for hit in plain if hit.modality == kind] for kind in ("text", "image"))
    above: dict[Modality, float] = {"text": 2.0, "image": images[2].score}
    [page] = retrieve(searcher.index, [EncodedQuery(query, vector, above)], SearchOptions(k=3, cutoff=0.01))
    assert [hit.id for hit in page.hits] == [hit.id for hit in images[:2]] and [hit.rank for hit in page.hits] == [1, 2]
    assert page.cut is not None and page.cut.below == 4 and page.cut.best == texts[0].score


def test_thresholds_follow_the_contents_but_only_so_often(searcher: Searcher) -> None:
    now = 0.0
    calibration = Calibration(searcher.index, clock=lambda: now)
    searcher.index.keep_background(encode_background(searcher.encoder, built_in(200), "built in"))
    before = calibration.thresholds("text", "text", 0.01)
    assert calibration.thresholds("text", "text", 0.5)["text"] < before["text"]
    # An item that answers a background query well: the threshold of texts rises, that of images stays.
    images = calibration.thresholds("text", "image", 0.01)
    items = [Item.of(text=query.text, id=f"b{n}") for n, query in enumerate(built_in(3))]
    searcher.add(items)
    after = calibration.thresholds("text", "text", 0.01)
    assert after["text"] > before["text"] + 0.1 and calibration.thresholds("text", "image", 0.01) == images
    searcher.index.delete([str(item.id) for item in items])
    assert calibration.thresholds("text", "text", 0.01) == before
    searcher.index.keep_background(encode_background(searcher.encoder, built_in(200, seed=1), "another"))
    assert calibration.thresholds("text", "text", 0.01) != before
    times = iter([0.0, 0.0, 1.0, *[1.5] * 2, *[30.0] * 9])
    patient = Calibration(searcher.index, clock=lambda: next(times))
    before = patient.thresholds("text", "text", 0.01)  # takes a second, so it serves for 20 more
    searcher.add([Item.of(text=query.text, id=f"c{n}") for n, query in enumerate(built_in(3, seed=1))])
    assert [patient.thresholds("text", "text", 0.01) == before for _ in range(3)] == [True, True, False]


def test_a_tenant_is_judged_by_its_own_items(tmp_path: Path) -> None:
    encoder, calibrations = FakeEncoder(), Calibrations()
    with open_index(tmp_path / "index", encoder, create=True) as index:
        ours, theirs = (TenantIndex(index, name) for name in ("ours", "theirs"))
        some(encoder, ours)
        index.keep_background(encode_background(encoder, built_in(200), "built in"))
        own = calibrations.of("ours", ours)
        before = own.thresholds("text", None, 0.02)
        assert set(before) == {"text", "image"} and calibrations.of("ours", TenantIndex(index, "ours")) is own
        assert calibrations.of("theirs", theirs).thresholds("text", None, 0.02) == {}
        # The other tenant holds what the background asks for; whoever could see that would be told a threshold near 1.
        put(encoder, theirs, *(Item.of(text=query.text, id=f"b{n}") for n, query in enumerate(built_in(50))))
        assert Calibration(ours).thresholds("text", None, 0.02) == before
        assert Calibration(theirs).thresholds("text", None, 0.02)["text"] > 0.99
        assert "image" not in Calibration(theirs).thresholds("text", None, 0.02)


# Backgrounds


def test_backgrounds_built_in_and_of_users(tmp_path: Path) -> None:
    queries, default = built_in(), build_parser().parse_args(["index", "calibrate", "--index", "i"]).count
    assert len({query.text for query in queries}) == COUNT == default
    assert built_in(5) == queries[:5] and built_in(5, seed=1) != queries[:5]
    assert queries[0].text == "a falcon, a blacksmith and a catapult"
    with pytest.raises(InputError, match="0 built-in"):
        built_in(0)
    lines = tmp_path / "absent.txt"
    lines.write_text("a yak\n\n a yak \na tuba\n", encoding="utf-8")
    assert [query.text for query in read_queries(lines)] == ["a yak", "a tuba"]
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        image_of(number, 8, 8).load().save(tmp_path / "pictures" / f"{number}.png")
    queries, source = choose_queries([tmp_path / "pictures"], tmp_path, count=10)
    counts = {kind: sum(query.modality == kind for query in queries) for kind in ("text", "image", "image,text")}
    assert counts == {"text": 10, "image": 3, "image,text": 3} and source == "pictures, built in"
    queries, source = choose_queries([lines, tmp_path / "pictures"], tmp_path, instruction="find it")
    assert [query.modality for query in queries] == ["text"] * 2 + ["image"] * 3 + ["image,text"] * 3
    assert {query.instruction for query in queries} == {"find it"} and source == "absent.txt, pictures"
    (tmp_path / "background.txt").write_text("of its world\n")
    assert [query.text for query in choose_queries([], tmp_path)[0]] == ["of its world"]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"id": "a", "text": "in green", "image": "pictures/0.png"}) + "\n")
    assert {query.modality for query in choose_queries([pairs], tmp_path)[0]} == {"text", "image,text"}
    pairs.write_text('{"id": "a"}\n{"text": "no id"}\n')
    for wrong, why in ((pairs, "pairs.jsonl:"), (tmp_path / "none", "does not exist")):
        with pytest.raises(InputError, match=why):
            read_queries(wrong)
    lines.write_text("\n")
    with pytest.raises(InputError, match="holds no query"):
        read_queries(lines)


# The command line and the server


@pytest.fixture
def shelf(encoder: Encoder, tmp_path: Path) -> Path:
    """An index by the bundled model, of texts and images."""
    items = [Item.of(text=CAPTION, id="there"), *(Item.of(text=f"a {word} ring", id=word) for word in ("red", "blue", "green"))]
    items += [Item.of(image=image_of(number, 8, 8), id=f"p{number}") for number in range(4)]
    with open_index(tmp_path / "shelf", encoder, create=True) as index:
        put(encoder, index, *items)
    return tmp_path / "shelf"


def test_calibrate_and_search_from_the_command_line(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*line: str, code: int = 0) -> str:
        assert main([*line, "--index", str(shelf)]) == code
        out, err = capsys.readouterr()
        return err if code else out

    asked = ["search", "a cat in a hat", "-k", "3"]
    assert "run `traceir index calibrate`" in run(*asked, "--cutoff", "0.01", code=2)
    assert "between 0 and 1" in run(*asked, "--cutoff", "1", code=2)
    assert "not calibrated (`traceir index calibrate`)" in run("index", "info")
    out = run("index", "calibrate", "--count", "200")
    assert "calibrated with 200 text queries (" in out and "at 1 in 100, a query of text finds image that scores" in out
    assert "cut-off      calibrated with 200 text queries (" in run("index", "info")
    assert json.loads(run("index", "info", "--json"))["background"] == {"text": 200}
    assert "nothing found above the cut-off of 0.01 (the best scored " in run(*asked, "--cutoff", "0.01")
    answer = json.loads(run(*asked, "--cutoff", "0.01", "--json"))
    assert answer["hits"] == [] and answer["cutoff"]["below"] > 0
    assert answer["cutoff"]["best"] < max(answer["cutoff"]["thresholds"].values())
    answer = json.loads(run(*asked, "--json"))
    assert answer["cutoff"] is None and len(answer["hits"]) == 3


def test_the_server_says_that_nothing_was_found(shelf: Path, encoder: Encoder) -> None:
    absent, there = Query.of(text="a cat in a hat"), Query.of(text=CAPTION)
    with open_index(shelf, encoder) as index:
        here = Searcher(encoder, index)
        here.calibrate(choose_queries([], bundled_model(), count=200)[0])
        wanted = [here.search(query, k=4, cutoff=0.05) for query in (absent, there)]
    with serving_here(shelf, encoder, cutoff=0.01) as url, Client(url) as client:
        for query, own in zip((absent, there), wanted, strict=True):
            answer = client.search(query, k=4, cutoff=0.05)
            assert [(hit.id, hit.rank) for hit in answer.hits] == [(hit.id, hit.rank) for hit in own.hits]
            assert answer.cutoff is not None and own.cut is not None and answer.cutoff.rate == 0.05
            assert answer.cutoff.thresholds == pytest.approx(own.cut.thresholds, abs=1e-5)
            assert answer.cutoff.best == pytest.approx(own.cut.best, abs=1e-4)
        assert client.search(absent).hits == () and client.search(there).hits, "the server's own rate"
        assert client.search(absent, cutoff=0).hits and client.search(absent, cutoff=0).cutoff is None
        uncut = client.search(Query.of(image=image_of(1)))
        assert uncut.hits and uncut.cutoff is None, "what the server cannot judge it does not cut, and says so"
        for query, rate, message in (
            (Query.of(image=image_of(1)), 0.01, "queries that are texts, not images"),
            (absent, 0.0001, "less than 200 background queries can tell"),
            (absent, 1, "cutoff"),
        ):
            with pytest.raises(InputError, match=message):
                client.search(query, cutoff=rate)
        config = httpx.get(f"{url}/page/config").json()
        assert config["cutoff"] == {"default": 0.01, "background": {"text": 200}}


def test_a_server_that_could_not_keep_its_cutoff_does_not_start(tmp_path: Path) -> None:
    encoder: Any = FakeEncoder()
    config = ServeConfig(str(tmp_path / "index"), cutoff=0.001)

    async def start() -> None:
        await make_server(config, lambda: encoder).make()

    with pytest.raises(InputError, match="not calibrated"):
        asyncio.run(start())
    with open_index(tmp_path / "index", encoder) as index:
        some(encoder, index)
        index.keep_background(encode_background(encoder, built_in(100), "built in"))
    with pytest.raises(InputError, match="less than 100 background queries can tell"):
        asyncio.run(start())
    with pytest.raises(InputError, match="between 0 and 1"):
        ServeConfig("i", cutoff=1.5)
