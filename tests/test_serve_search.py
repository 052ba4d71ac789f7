"""Searches and pages of items over HTTP: what a Searcher answers, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import image_of
from fake_sglang import serving_here
from fakes import FakeEncoder
from test_retrieval import Longest, beside, ids

from traceir.client import Client
from traceir.errors import InputError
from traceir.index import open_index
from traceir.items import Item, Query
from traceir.retrieval import rerank
from traceir.retrieval.search import Searcher

WORDS = ("a red cup", "a blue cup", "a red hat", "a blue hat")


def items() -> list[Item]:
    """24 texts; of every three the first two are alike, and the third has no date."""
    dates = ("2024-05-01", "2024-04-02", None)
    return [
        Item.of(
            text=f"{WORDS[n % 4]} of {'wood' * (n + 1)}",
            id=f"t{n:02}",
            fields={"date": dates[n % 3], "_stat": "1:2"} if n % 3 < 2 else {},
        )
        for n in range(24)
    ]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Searcher]]:
    encoder, folder = FakeEncoder(), tmp_path_factory.mktemp("search") / "index"
    with pytest.MonkeyPatch.context() as patch, open_index(folder, encoder, create=True) as index:
        patch.setattr(rerank, "load_reranker", lambda name, encoder, device: Longest())
        index.upsert(items(), np.stack([beside("cup", 0.9 - n // 3 / 20, n // 3) for n in range(24)]))
        searcher = Searcher(encoder, index)
        searcher.calibrate([Query.of(text=f"background {n}") for n in range(100)])
        with serving_here(folder, encoder, rerank="longest") as url:
            yield url, searcher


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "keyword"}, {"mode": "hybrid"}, {"mode": "hybrid", "keyword_weight": 0.9, "cutoff": 0.05}, {"fold": True},
        {"fold": 0.9}, {"sort": "-date"}, {"sort": "date", "where": "not date is missing", "cutoff": 0.05},
        {"where": 'date<2024-05 or id~"t1?"'},
        {"terms": [(-0.5, "hat"), (2.0, Query.of(image=image_of(1).encoded()[0], text="wood"))]},
    ],
)  # fmt: skip
def test_the_server_answers_as_a_searcher(served: tuple[str, Searcher], options: dict[str, Any]) -> None:
    url, searcher = served
    query, after = Query.of(text="cup"), None
    with Client(url) as client:
        for _ in range(3):
            here = searcher.search(query, k=4, after=after, **options)
            there = client.search(query, k=4, after=after, **options)
            assert ids(there) == ids(here) and there.next == here.next and there.more == (here.next is not None)
            assert [(hit.rank, hit.similar) for hit in there.hits] == [(hit.rank, hit.similar) for hit in here.hits]
            for ours, theirs in zip(here.hits, there.hits, strict=True):
                assert theirs.scores == pytest.approx(ours.scores, abs=1e-5) and theirs.score == pytest.approx(
                    ours.score, abs=1e-5
                )
                assert "_stat" not in theirs.fields
            assert (there.route is None) == (here.encoding is None) and (there.cutoff is None) == (here.cut is None)
            after = here.next


def test_the_server_reranks_where_it_is_asked_to(served: tuple[str, Searcher]) -> None:
    with Client(served[0]) as client:
        plain, again = client.search(Query.of(text="cup"), k=3), client.search(Query.of(text="cup"), k=3, rerank=True)
        assert ids(plain) != ids(again) == ["t09", "t08", "t07"] and again.hits[0].scores["rerank"] > 0
        assert again.seconds["rerank"] > 0 and "rerank" not in plain.seconds


@pytest.fixture
def http(served: tuple[str, Searcher]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served[0]) as http:
        yield http


def test_a_search_without_words_or_sense_is_refused(http: httpx.Client) -> None:
    picture = {"item": "t00"}
    for body, param, message in (
        ({"text": "cup", "mode": "words"}, "mode", ""), ({"text": "cup", "keyword_weight": 2}, "keyword_weight", ""),
        ({"text": "cup", "fold": "yes"}, "fold", "true, false, or a cosine"), ({"text": "cup", "fold": 0}, "fold", "cosine"),
        ({"text": "cup", "terms": [{"weight": 11, "text": "x"}]}, "terms[0].weight", ""), ({"text": "x", "sort": ""}, "sort", ""),
        ({"text": "cup", "where": []}, "where", "an object of fields, or a text"),
        ({"text": "cup", "terms": [{"weight": 1}]}, None, "terms[0]: it is empty"),
        ({"text": "cup", "terms": [{"image": picture}]}, None, "terms[0]: image"),
        ({"text": "cup", "terms": [{"weight": -1, "text": "cup"}]}, None, "cancel the query out"),
        ({"text": "cup", "terms": [{"text": "x"}], "mode": "keyword"}, None, "write -WORD"),
        ({"instruction": "find", "mode": "keyword"}, None, "has no words"),
        ({"text": "cup", "mode": "keyword", "cutoff": 0.1}, None, "a cut-off judges vectors"),
        ({"text": "cup", "after": "x"}, None, "cursor (after)"),
        ({"text": "cup", "after": "dGlyMQAAAAA=", "offset": 3}, None, "one of"),
        ({"text": "cup", "where": "date>="}, None, "a value is missing"), ({"text": "cup", "where": "_stat=1"}, None, "'_stat'"),
        ({"text": "cup", "sort": "_file"}, None, "'_file'"),
        ({"text": "cup", "rerank": True, "sort": "date"}, None, "leave out one"),
    ):  # fmt: skip
        answer = http.post("/search", json=body)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == param and message in error["message"], (body, error)
    assert http.post("/search", json={"text": "cup", "where": " ", "fold": False, "mode": None}).status_code == 200


def test_items_are_paged_in_order_of_a_field(served: tuple[str, Searcher], http: httpx.Client) -> None:
    url, searcher = served
    with Client(url) as client:
        for where, sort in (("", "id"), ("", "-id"), ("", "-date"), ('text is missing or id~"t0*"', "date"), ("id>t05", "date")):
            wanted = [stored.id for stored in searcher.index.browse(where or None, sort=sort, limit=99)]
            assert [kept.id for kept in client.items(where=where, sort=sort)] == wanted
            ended, after = [], ""
            while True:
                page = http.get("/items", params={"where": where, "sort": sort, "after": after, "limit": 5}).json()
                ended += [kept["id"] for kept in page["items"]]
                assert page["more"] == (page["next"] is not None) and not any("_stat" in kept["fields"] for kept in page["items"])
                if not (after := page["next"]):
                    break
            assert ended == wanted
        assert [kept.id for kept in client.items(after="t21x")] == ["t22", "t23"], "an id that is not there is a place too"
        for asked in (
            {"sort": "_stat"},
            {"where": "_file=x"},
            {"where": "date>"},
            {"sort": "date", "after": "t01"},
            {"sort": "date", "after": '"ab"'},
            {"sort": "date", "after": "[1, 2]"},
            {"sort": "modality", "after": '["text", null]'},
        ):
            assert http.get("/items", params=asked).status_code == 400, asked
        with pytest.raises(InputError, match="cannot be read"):
            list(client.items(where="("))


def test_a_server_without_a_reranker_says_so(tmp_path: Path) -> None:
    refused = pytest.raises(InputError, match="serve --rerank NAME")
    with serving_here(tmp_path / "index", FakeEncoder()) as url, Client(url) as client, refused:
        client.search(Query.of(text="cup"), rerank=True)
