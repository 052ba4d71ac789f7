"""Searcher: routes, targets and filters reach the right place; another model's index is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeEncoder

from traceir.errors import InputError, StoreError
from traceir.index import Eq, SqliteIndex, open_index
from traceir.items import Item, Query
from traceir.search import Searcher


def filled(folder: Path, encoder: FakeEncoder) -> SqliteIndex:
    index = open_index(
        folder, fingerprint=encoder.fingerprint, prompt_version=encoder.prompt_version, dim=encoder.width, create=True
    )
    items = [Item.of(text=f"thing {n}", id=f"t{n}", fields={"even": n % 2 == 0}) for n in range(20)]
    index.upsert(items, np.stack([one.vector for one in encoder.encode_items(items)]))
    return index


def test_a_query_finds_its_item_and_says_how(tmp_path: Path) -> None:
    encoder = FakeEncoder()
    with filled(tmp_path, encoder) as index:
        result = Searcher(encoder, index).search(Query.of(text="thing 7"), k=3)
        assert len(result.hits) == 3 and result.hits[0].id == "t7" and result.hits[0].score > 0.999
        assert result.encoding.route == "direct" and result.encoding.reasoning == ""
        assert result.seconds.encode >= 0 and result.seconds.search >= 0


def test_routes_filters_and_targets_are_passed_on(tmp_path: Path) -> None:
    encoder = FakeEncoder()
    with filled(tmp_path, encoder) as index:
        searcher = Searcher(encoder, index)
        assert searcher.search(Query.of(text="one then two")).encoding.route == "reason"
        assert searcher.search(Query.of(text="one then two"), route="direct").encoding.route == "direct"
        assert searcher.search(Query.of(text="one"), route="reason").encoding.route == "reason"
        odd = searcher.search(Query.of(text="thing 4"), k=20, where=Eq("even", False)).hits
        assert len(odd) == 10 and all(not hit.fields["even"] for hit in odd)
        assert searcher.search(Query.of(text="thing 4", target="image")).hits == ()
        with pytest.raises(StoreError, match="build_approximate"):
            searcher.search(Query.of(text="thing 4"), exact=False)
        with pytest.raises(InputError, match="'fast' is unknown"):
            searcher.search(Query.of(text="x"), route="fast")
        with pytest.raises(InputError, match="k is 0"):
            searcher.search(Query.of(text="x"), k=0)


def test_many_queries_keep_their_order_across_targets(tmp_path: Path) -> None:
    encoder = FakeEncoder()
    with filled(tmp_path, encoder) as index:
        searcher = Searcher(encoder, index)
        targets = [None, "text", "image"]
        queries = [Query.of(text=f"thing {n}", target=targets[n % 3]) for n in range(12)]
        results = searcher.search_many(queries, k=2)
        for n, (query, result) in enumerate(zip(queries, results, strict=True)):
            assert result.hits == searcher.search(query, k=2).hits
            assert [hit.id for hit in result.hits[:1]] == ([] if n % 3 == 2 else [f"t{n}"])
        assert searcher.search_many([]) == []


def test_an_index_of_another_model_is_refused(tmp_path: Path) -> None:
    encoder = FakeEncoder()
    with filled(tmp_path, encoder) as index:
        other = FakeEncoder()
        other.fingerprint = "fake-2"
        with pytest.raises(StoreError, match=r"'fake-1'.*'fake-2'"):
            Searcher(other, index)
        with pytest.raises(StoreError, match="width 16"):
            Searcher(FakeEncoder(width=8), index)


def test_the_serving_side_imports_no_torch() -> None:
    code = (
        "import sys, traceir.images, traceir.index, traceir.search, traceir.ingest; "
        "sys.exit(any(name.split('.')[0] in ('torch', 'transformers') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
