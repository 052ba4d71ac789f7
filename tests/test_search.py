"""Searcher: routes, targets and filters reach the right place; another model's index is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import FakeEncoder

from traceir.errors import InputError, StoreError
from traceir.index import Eq, open_index
from traceir.items import Item, Query
from traceir.retrieval.search import Searcher


@pytest.fixture
def searcher(tmp_path: Path) -> Iterator[Searcher]:
    encoder = FakeEncoder()
    with open_index(tmp_path / "index", encoder, create=True) as index:
        searcher = Searcher(encoder, index)
        searcher.add([Item.of(text=f"thing {n}", id=f"t{n}", fields={"even": n % 2 == 0}) for n in range(20)])
        yield searcher


def test_a_query_finds_its_item_by_the_model_that_filled_the_index(searcher: Searcher) -> None:
    result = searcher.search("thing 7", k=3)
    assert len(result.hits) == 3 and result.hits[0].id == "t7" and result.hits[0].score > 0.999
    assert result.encoding.route == "direct" and result.encoding.reasoning == ""
    assert result.seconds.encode >= 0 and result.seconds.search >= 0
    searcher.add([])
    with pytest.raises(InputError, match="id"):
        searcher.add([Item.of(text="no id")])
    other = FakeEncoder()
    other.fingerprint = "fake-2"
    for encoder, why in ((other, r"'fake-1'.*'fake-2'"), (FakeEncoder(width=8), "width 16")):
        with pytest.raises(StoreError, match=why):
            Searcher(encoder, searcher.index)


def test_routes_filters_and_targets_are_passed_on(searcher: Searcher) -> None:
    assert searcher.search("one then two").encoding.route == "reason"
    assert searcher.search("one then two", route="direct").encoding.route == "direct"
    assert searcher.search("one", route="reason").encoding.route == "reason"
    odd = searcher.search("thing 4", k=20, where=Eq("even", False)).hits
    assert len(odd) == 10 and all(not hit.fields["even"] for hit in odd)
    assert searcher.search(Query.of(text="thing 4", target="image")).hits == ()
    with pytest.raises(StoreError, match="build_ann"):
        searcher.search("thing 4", exact=False)
    with pytest.raises(InputError, match="k is 0"):
        searcher.search("x", k=0)


def test_many_queries_keep_their_order_across_targets(searcher: Searcher) -> None:
    targets = [None, "text", "image"]
    queries = [Query.of(text=f"thing {n}", target=targets[n % 3]) for n in range(12)]
    for n, (query, result) in enumerate(zip(queries, searcher.search_many(queries, k=2), strict=True)):
        assert result.hits == searcher.search(query, k=2).hits
        assert [hit.id for hit in result.hits[:1]] == ([] if n % 3 == 2 else [f"t{n}"])
    assert searcher.search_many([]) == []
