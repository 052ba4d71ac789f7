"""One table of behaviours for every kind of index: the embedded one, a file of Milvus Lite, and its server over loopback.

With TRACEIR_TEST_MILVUS=http://HOST:19530 it also runs against that server, in collections of its own that it drops in the end.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import vector_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from traceir.errors import InputError, StoreError
from traceir.images import ImageInput
from traceir.index import And, Eq, Filter, Glob, In, Index, Not, Or, Range, open_index, position_of
from traceir.index.copy import copy
from traceir.index.filters import matches
from traceir.index.store import Background
from traceir.items import Hit, Item

GIVEN = os.environ.get("TRACEIR_TEST_MILVUS", "")
# Milvus is an extra of half a gigabyte; `make test` installs it, whoever leaves it out still tests the folder.
needs_milvus = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("pymilvus", "milvus_lite")),
    reason="pymilvus and milvus-lite are not installed: pip install 'traceir[milvus]'",
)
KINDS = [
    "folder",
    pytest.param("file", marks=needs_milvus),
    pytest.param("server", marks=[needs_milvus, pytest.mark.slow]),
    *(["given"] if GIVEN else []),
]
SLOW_KINDS = [KINDS[0], *(pytest.param(kind, marks=[needs_milvus, pytest.mark.slow]) for kind in ("file", "server"))]
MILVUS_IS_SLOW = pytest.mark.parametrize("fresh", SLOW_KINDS, indirect=True)
DOT = ImageInput.from_bytes(b"not decoded here", name="dot.png")
HOSTILE = ("it's", 'say "hi"', "back\\slash", "a\nb\tc", '"] or key != ""', "%_*", "ünï 🦉", "$meta", " ")
Fresh = Callable[[], str]
Scored = list[tuple[str, float]]


@contextlib.contextmanager
def milvus_server(folder: Path, port: int = 0) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """`milvus-lite server` on a free port of the loopback, or on this one, over a folder that outlives it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the killed server's connections may not have ended
        probe.bind(("127.0.0.1", port))
        port = probe.getsockname()[1]
    command = ["server", "--data-dir", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen([sys.executable, "-m", "milvus_lite", *command], stderr=subprocess.DEVNULL) as process:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert process.poll() is None
            time.sleep(0.1)
        yield port, process
        process.kill()


@pytest.fixture(scope="module", params=KINDS)
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fresh]:
    """A new address of one kind at every call."""
    kind, folder, numbers = request.param, tmp_path_factory.mktemp(request.param), itertools.count()
    start = {"folder": f"{folder}/i", "file": f"milvus-lite:{folder}/items.db/i", "given": f"{GIVEN}/t{time.time_ns()}_"}
    with milvus_server(folder) if kind == "server" else contextlib.nullcontext((0, None)) as (port, _):
        start["server"] = f"http://127.0.0.1:{port}/i"
        yield lambda: f"{start[kind]}{next(numbers)}"
    if kind == "given":
        from pymilvus import MilvusClient

        client = MilvusClient(GIVEN)
        for name in client.list_collections():
            if name.startswith(start["given"].rpartition("/")[2]):
                client.drop_collection(name)


def opened(address: str | Path, **options: Any) -> Any:
    """The index at `address`, made where it is not there; every option can be another."""
    return open_index(address, **{"fingerprint": "m1", "prompt_version": "p1", "dim": 4, "create": True, **options})


def texts(ids: Sequence[str], **fields: Any) -> list[Item]:
    return [Item.of(text=f"text of {id}", id=id, fields=fields) for id in ids]


def unit(*rows: Sequence[float]) -> Any:
    array = np.asarray(rows, dtype=np.float64).reshape(len(rows), -1 if rows else 4)
    return (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float32)


def drawn(rows: int, dim: int, seed: int = 0) -> Any:
    return unit(*np.random.default_rng(seed).normal(size=(rows, dim)))


def clustered(rows: int, dim: int = 24) -> Any:
    generator = np.random.default_rng(3)
    centres = generator.normal(size=(60, dim))
    return unit(*(centres[generator.integers(0, 60, rows)] + 0.4 * generator.normal(size=(rows, dim))))


def damage(folder: Path, statement: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(folder / "index.sqlite")) as file, file:
        file.execute(statement, values)


def item_of(number: int, kind: str, fields: dict[str, Any]) -> Item:
    text = None if kind == "image" else f"text {number}"
    return Item.of(text=text, image=None if kind == "text" else DOT, id=f"i{number}", fields=fields)


def naive(items: Sequence[Item], vectors: Any, query: Any, k: int, where: Filter | None, modality: Any) -> Scored:
    """The meaning of search: every item is looked at."""
    scores = (vectors.astype(np.float64) * query.astype(np.float64)).sum(axis=1).clip(-1, 1).astype(np.float32).tolist()
    scored = [
        (str(item.id), score)
        for item, score in zip(items, scores, strict=True)
        if modality in (None, item.modality) and (where is None or matches(where, str(item.id), item.modality, item.fields))
    ]
    return sorted(scored, key=lambda pair: (-pair[1], pair[0]))[:k]


def pairs(hits: Sequence[Hit]) -> Scored:
    assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
    return [(hit.id, hit.score) for hit in hits]


def share(hits: Sequence[Sequence[Hit]], true: Sequence[Sequence[Hit]]) -> float:
    return float(np.mean([len({h.id for h in a} & {h.id for h in b}) / len(b) for a, b in zip(hits, true, strict=True)]))


KEPT = [None, True, False, 0, 1, 2, -1, 0.0, 1.0, 1.5, "", "0", "1", "a", "b", "ä"]
VALUES = st.sampled_from(KEPT)
NAMES = st.sampled_from(["x", "y"])
LEAVES: st.SearchStrategy[Filter] = st.one_of(
    st.builds(Eq, NAMES, VALUES),
    st.builds(In, NAMES, st.lists(VALUES, max_size=3).map(tuple)),
    st.builds(Range, NAMES, st.sampled_from([0, 1.0]), st.one_of(st.none(), st.just(1.5))),
    st.builds(Range, NAMES, st.none(), st.sampled_from(["a", "z"])),
    st.builds(Eq, st.just("modality"), st.sampled_from(["text", "image", "else"])),
    st.builds(In, st.just("id"), st.lists(st.sampled_from(["i0", "i3", "i30"]), max_size=3).map(tuple)),
    st.builds(Range, st.just("id"), st.just("i1"), st.just("i2")),
    st.builds(Range, NAMES, above=st.sampled_from([0, -1.5])),
    st.builds(Range, NAMES, above=st.sampled_from(["", "a"]), below=st.sampled_from(["b", "\U0010ffff"])),
    st.builds(Glob, NAMES, st.sampled_from(["*", "?", "a*", "", "*1", "[a]", "?*"])),
    st.builds(Glob, st.sampled_from(["id", "modality"]), st.sampled_from(["i1*", "i?", "*e*t", "*", "image*", "*3*"])),
)
FILTERS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.builds(Not, inner), *(st.builds(kind, st.lists(inner, max_size=3)) for kind in (And, Or))),
    max_leaves=5,
)
# Few distinct vectors, so that ties are the rule.
ROWS = [(1, 0, 0, 0), (1, 1, 0, 0), (0, 1, 0, 0), (-1, 0, 0, 1), (0.3, 0.2, 0.1, 0.7)]
CORNERS = st.sampled_from(ROWS)


@pytest.fixture(scope="module")
def filled(fresh: Fresh) -> Iterator[tuple[Index, list[Item], Any]]:
    """Forty items of every modality and kind of field, some replaced and some deleted, with many equal vectors."""
    values: list[Any] = [*KEPT, ["a", 1, 1.0, None], [], [True]]
    kinds = ("text", "image", "both")
    items = [item_of(n, kinds[n % 3], {"x": values[n % 19], "y": values[n * 7 % 19]} if n % 5 else {}) for n in range(44)]
    vectors = unit(*(ROWS[n * 3 % 5] for n in range(44)))
    with opened(fresh()) as index:
        index.upsert([item_of(n, "text", {"x": "old"}) for n in range(0, 44, 2)], drawn(22, 4))
        index.upsert(items, vectors)
        assert index.delete([f"i{n}" for n in (3, 7, 40, 41, 99)]) == 4
        left = [n for n in range(44) if n not in (3, 7, 40, 41)]
        yield index, [items[n] for n in left], vectors[left]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    query=CORNERS,
    k=st.integers(1, 12),
    where=st.one_of(st.none(), FILTERS),
    modality=st.sampled_from([None, "text", "image", "image,text"]),
)
def test_search_count_and_scan_mean_what_plain_python_says(filled: Any, query: Any, k: int, where: Any, modality: Any) -> None:
    index, items, vectors = filled
    (asked,) = unit(query)
    hits = pairs(index.search(asked[None], k, where=where, modality=modality)[0])
    everything = naive(items, vectors, asked, 99, where, modality)
    true, scores = everything[:k], dict(everything)
    assert [score for _, score in hits] == pytest.approx([score for _, score in true], abs=1e-6)
    assert all(score == pytest.approx(scores[id], abs=1e-6) for id, score in hits) and len(dict(hits)) == len(true)
    kept = sorted(id for id, _ in naive(items, vectors, asked, 99, where, None))
    assert index.count(where) == len(kept) and [stored.id for stored in index.scan(where)] == kept


def in_order(items: Sequence[Item], sort: str) -> list[Item]:
    """The meaning of an order: kinds apart, equal values by id, what has none last."""

    def place(item: Item) -> tuple[int, Any] | None:
        value = {**item.fields, "id": item.id, "modality": item.modality}.get(sort.lstrip("-"))
        kinds = [bool, int, str]
        kind = 1 if type(value) is float else kinds.index(type(value)) if type(value) in kinds else -1
        return (kind, value) if kind >= 0 else None

    items = sorted(items, key=lambda item: str(item.id))
    valued = [item for item in items if place(item)]
    valued.sort(key=lambda item: place(item) or (0, 0), reverse=sort.startswith("-"))
    return valued + [item for item in items if not place(item)]


@MILVUS_IS_SLOW
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    sort=st.sampled_from(["id", "x", "y", "modality", "none", "-id", "-x", "-y", "-modality"]),
    where=st.one_of(st.none(), LEAVES, FILTERS),
    limit=st.integers(1, 15),
    few=st.sampled_from([0, 1, 1_000_001]),
    patience=st.sampled_from([2, 1_000]),
)
def test_pages_in_any_order_are_what_plain_python_says(
    filled: Any, sort: str, where: Any, limit: int, few: int, patience: int
) -> None:
    index, items, _ = filled
    passing = [item for item in items if where is None or matches(where, str(item.id), item.modality, item.fields)]
    shown, after = list[str](), None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("traceir.index.walk.math.isqrt", lambda _: few)
        patch.setattr("traceir.index.walk._PATIENCE", patience)
        patch.setattr("traceir.index.walk._count_up_to", lambda *_: few + limit + few % 2)
        while page := index.browse(where, sort=sort, after=after, limit=limit):
            shown += [stored.id for stored in page]
            after = position_of(page[-1], sort)
    assert shown == [item.id for item in in_order(passing, sort)]


@MILVUS_IS_SLOW
def test_pages_go_on_behind_what_was_shown_while_items_come_and_go(fresh: Fresh) -> None:
    with opened(fresh()) as index:
        index.upsert([Item.of(text="x", id=f"{n:02}", fields={"n": n // 4, "odd": n % 2}) for n in range(24)], drawn(24, 4))
        page = index.browse(sort="-n", limit=6)
        assert [stored.id for stored in page] == ["20", "21", "22", "23", "16", "17"]
        index.delete(["17", "16", "22"])  # also the one that the position is of
        index.upsert(texts(["165", "175", "23"], n=4), drawn(3, 4))
        index.upsert(texts(["00"], n=9), drawn(1, 4))
        page = index.browse(sort="-n", after=position_of(page[-1], "-n"), limit=3)
        assert [stored.id for stored in page] == ["175", "18", "19"], "23 moved behind, 00 before the position"
        page = index.browse("odd=1 and n>=2", sort="n", after=(2, "09"), limit=9)
        assert [stored.id for stored in page] == ["11", "13", "15", "19", "21"]
        for wrong, why in (({"sort": ""}, "sort ''"), ({"limit": 0}, "limit is 0"), ({"after": 5}, "position 5")):
            with pytest.raises(InputError, match=why):
                index.browse(**{"limit": 3, **wrong})


WORDED: dict[str, tuple[str, dict[str, Any]]] = {
    "2024/IMG_2034-beach.JPG": ("a red cup on the sand", {"camera": "iPhone15", "tags": ["ocean", "light"], "_file": "secret"}),
    "a/beachParty2024.png": ("Strandkorb an der See", {"camera": "Pixel 7", "note": "naïve Café"}),
    "東京/タワー.jpg": ("東京タワーの夜景", {}),
    "w": ("日落时分的海边", {"n": 7}),
    "thai": ("ฉันรักทะเลไทย", {}),
    "arabic": ("كِتَاب جميل", {}),
    "hindi": ("हिन्दी किताब", {}),
    "emoji": ("good 🏖️ sun", {"year": 2024}),
    "_tenant:acme:cup": ("another cup, blue", {}),
}  # fmt: skip
FOUND = [
    ("beach", "2024/IMG_2034-beach.JPG a/beachParty2024.png"), ("IMG_2034", "2024/IMG_2034-beach.JPG"),
    ("img2034", "2024/IMG_2034-beach.JPG"), ("beachparty", "a/beachParty2024.png"), ("party", "a/beachParty2024.png"),
    ("iphone", "2024/IMG_2034-beach.JPG"), ("ocean", "2024/IMG_2034-beach.JPG"), ("cafe", "a/beachParty2024.png"),
    ("NAÏVE", "a/beachParty2024.png"), ("cup", "2024/IMG_2034-beach.JPG _tenant:acme:cup"), ("cup -red", "_tenant:acme:cup"),
    ('"red cup"', "2024/IMG_2034-beach.JPG"), ('"cup red"', ""), ('"red cup" blue', "2024/IMG_2034-beach.JPG"),
    ("red,blue", "2024/IMG_2034-beach.JPG _tenant:acme:cup"), ('cup -"red cup"', "_tenant:acme:cup"),
    ("secret acme tenant", ""), ("東京", "東京/タワー.jpg"), ("東京タワー", "東京/タワー.jpg"), ("京東", ""), ("海边", "w"),
    ("海边的日落", "w"), ("日", "w"), ("ทะเล", "thai"), ("كتاب", "arabic"), ("किताब", "hindi"), ("कताब", ""), ("🏖", "emoji"),
    ('red" OR text:cup', "2024/IMG_2034-beach.JPG _tenant:acme:cup"), ("NEAR(sun", "emoji"),
    ("sand) OR (", "2024/IMG_2034-beach.JPG"),
    ("cup' --", "2024/IMG_2034-beach.JPG _tenant:acme:cup"), ("{sun}", "emoji"), ("^sun", "emoji"), ("sun + NOT", "emoji"),
]  # fmt: skip


def test_words_are_found_in_texts_names_and_fields(fresh: Fresh) -> None:
    """Of many scripts; and whatever is typed is words, never a language of the index."""
    with opened(fresh()) as index:
        items = [Item.of(text=text, id=id, fields=fields) for id, (text, fields) in WORDED.items()]
        index.upsert(items, drawn(len(items), 4))
        for query, expected in FOUND:
            hits = index.search_keywords(query, 9)
            assert " ".join(sorted(hit.id for hit in hits)) == expected, query
            assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        for hostile in HOSTILE:
            with contextlib.suppress(InputError):
                index.search_keywords(hostile, 3)
        assert [hit.id for hit in index.search_keywords("blue cup", 1)] == ["_tenant:acme:cup"], "the rarer word counts more"
        assert [hit.id for hit in index.search_keywords("cup", 9, where='camera~"iPhone*"')] == ["2024/IMG_2034-beach.JPG"]
        assert index.search_keywords("cup", 9, modality="image") == []
        for empty, why in (("", "no word"), ("-cup", "must not occur"), ('" - !', "no word")):
            with pytest.raises(InputError, match=why):
                index.search_keywords(empty, 3)
        index.delete(["_tenant:acme:cup"])
        index.upsert([Item.of(text="a jug now", id="w"), Item.of(text="a cup more", id="new")], drawn(2, 4))
        assert {hit.id for hit in index.search_keywords("cup 日落", 9)} == {"2024/IMG_2034-beach.JPG", "new"}


@MILVUS_IS_SLOW
def test_a_note_is_kept_and_leaves_the_version(fresh: Fresh) -> None:
    address = fresh()
    with opened(address) as index:
        version = index.version()
        assert index.note("roots") is None
        for value in ("first", '[{"root": "/ü \'x\'"}]\n'):
            index.keep_note("roots", value)
            assert index.note("roots") == value and index.version() == version
        for name, value in (("", "x"), ("Ä", "x"), ("roots", "x" * 60_001), ("roots", 5)):
            with pytest.raises(InputError, match="note"):
                index.keep_note(name, value)
    with opened(address, create=False, fingerprint=None, prompt_version=None, dim=None) as index:
        assert index.note("roots") == '[{"root": "/ü \'x\'"}]\n' and index.note("other") is None and index.count() == 0


@MILVUS_IS_SLOW
def test_everything_kept_comes_back_after_reopening(fresh: Fresh) -> None:
    address, vector = fresh(), drawn(1, 4)
    fields = {"a": "ä\n", "b": 2**62, "c": 1.5, "d": True, "e": None, "f": -0.0, "g": ["ä", 1, 1.5, True, None]}
    item = Item.of(text=" two\nlines \\ \" ' ", image=DOT, id="x/ü.png", fields=fields)
    with opened(address) as index:
        new = index.upsert([item, Item.of(image=DOT, id="plain")], np.concatenate([vector, drawn(1, 4, seed=3)]))
        assert new == {"x/ü.png", "plain"}
    with opened(address, create=False) as index:
        kept = index.get(["missing", "x/ü.png", "plain"], with_vectors=True)
        stored = kept["x/ü.png"]
        assert list(kept) == ["x/ü.png", "plain"] and kept["plain"].text is None
        assert (stored.text, stored.image, stored.modality) == ("two\nlines \\ \" '", "dot.png", "image,text")
        assert dict(stored.fields) == fields and stored.content_hash == item.content_hash()
        assert [type(value) for value in stored.fields.values()] == [str, int, float, bool, type(None), float, list]
        np.testing.assert_array_equal(stored.vector, vector[0])
        hit = index.search(vector, 5)[0][0]
        assert (hit.id, hit.text, hit.image, dict(hit.fields)) == (stored.id, stored.text, stored.image, fields)
        info = index.info()
        assert (info.dim, info.dtype, info.fingerprint, info.prompt_version) == (4, "float32", "m1", "p1")
        assert info.counts == {"image": 1, "image,text": 1} and info.cells == 0


@MILVUS_IS_SLOW
def test_facets_count_the_fields_of_what_passes(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [
        Item.of(text="t", id=f"{'ab'[n % 2]}/deep/{n}", fields={
            "date": f"{2020 + n % 3}-05-0{n + 1}T10:00:00", "camera": ["X", "Y", "Y"][n % 3], "n": n, "tags": ["p", "q"][: n % 3],
            "mixed": n if n % 2 else "text", "flag": n == 0, "long": "x" * 500,
        })
        for n in range(6)
    ]  # fmt: skip
    with opened(fresh()) as index:
        assert index.facets(limit=2) == []
        index.upsert([*items, Item.of(text="t", id="plain")], drawn(7, 4))
        expected = {
            ("camera", "text"): (6, "X", "Y", (("Y", 4), ("X", 2))), ("mixed", "number"): (3, 1, 5, ((1, 1), (3, 1))),
            ("date", "date"): (6, "2020-05-01T10:00:00", "2022-05-06T10:00:00", (("2020", 2), ("2021", 2))),
            ("tags", "text"): (6, "p", "q", (("p", 4), ("q", 2))), ("n", "number"): (6, 0, 5, ((0, 1), (1, 1))),
            ("mixed", "text"): (3, "text", "text", (("text", 3),)),
            ("flag", "boolean"): (6, False, True, ((False, 5), (True, 1))),
            ("long", "text"): (6, "x" * 500, "x" * 500, ()), ("id", "folder"): (6, "a/", "b/", (("a/", 3), ("b/", 3))),
        }  # fmt: skip
        for _ in range(2):
            facets = index.facets(limit=2)
            shown = {(facet.name, facet.kind): (facet.count, facet.low, facet.high, tuple(facet.values)) for facet in facets}
            assert shown == expected and [facet.count for facet in facets] == [6] * 7 + [3, 3]
            assert [type(value) for facet in facets if facet.name == "flag" for value, _ in facet.values] == [bool, bool]
            assert {facet.name: facet.count for facet in index.facets(Eq("camera", "X"), limit=2)}["n"] == 2
            monkeypatch.setattr("traceir.index.sqlite.COUNTED", 1)  # from here on by a sample, which is all of them


@MILVUS_IS_SLOW
def test_upsert_replaces_and_delete_removes(fresh: Fresh) -> None:
    first, second = unit([1, 0, 0, 0], [0, 1, 0, 0])
    with opened(fresh()) as index:
        assert index.search(drawn(2, 4), 3) == [[], []] and index.search(np.empty((0, 4), dtype=np.float32), 3) == []
        assert index.upsert([], np.zeros((0, 4), dtype=np.float32)) == set()
        index.upsert(texts(["a", "b", "c"], year=1), np.stack([first, 3 * first, first]))  # of any length
        for k in (9, 10**12, 10**30):
            assert [hit.id for hit in index.search(first[None], k)[0]] == ["a", "b", "c"], "equal scores, in order of id"
        assert index.upsert([Item.of(image=DOT, text="new", id="b", fields={"year": 2})], second[None]) == set()
        assert [hit.id for hit in index.search(second[None], 1)[0]] == ["b"]
        assert index.count() == 3 and index.count(Eq("year", 1)) == 2 and index.count(Eq("modality", "image,text")) == 1
        assert index.get(["b"])["b"].text == "new"
        assert index.delete(["a", "a", "nobody"]) == 1 and index.delete(Eq("year", 2)) == 1 and index.delete([]) == 0
        assert [hit.id for hit in index.search(second[None], 9)[0]] == ["c"] and index.info().counts == {"text": 1}
        with pytest.raises(InputError, match="single text"):
            index.delete("c")


@MILVUS_IS_SLOW
def test_each_id_is_new_to_one_of_the_calls_that_bring_it_at_once(fresh: Fresh) -> None:
    with opened(fresh()) as index, ThreadPoolExecutor(4) as pool:
        new = list(pool.map(lambda n: index.upsert(texts(["cup", "jug", f"own-{n}"]), drawn(3, 4, seed=n)), range(4)))
        assert sorted(id for ids in new for id in ids) == ["cup", "jug", *(f"own-{n}" for n in range(4))]
        assert sorted(pool.map(lambda _: index.delete(["cup", "jug", "jug"]), range(4))) == [0, 0, 0, 2]


@MILVUS_IS_SLOW
def test_hostile_ids_names_and_values_are_only_data(fresh: Fresh) -> None:
    items = [Item.of(text=f"x{text}", id=text, fields={text: text, "n": n}) for n, text in enumerate(HOSTILE)]
    with opened(fresh()) as index:
        index.upsert(items, drawn(len(items), 4))
        assert sorted(index.get(HOSTILE)) == sorted(HOSTILE) == [stored.id for stored in index.scan()]
        for text in HOSTILE:
            for where in (Eq(text, text), Range(text, text, text), And((In("id", (text,)), Eq(text, text)))):
                assert [stored.id for stored in index.scan(where)] == [text], where
            assert index.count(Eq(text, None)) == len(HOSTILE) - 1 and index.count(Eq("modality", text)) == 0
        for left, text in enumerate(HOSTILE, start=1):
            assert index.delete([text]) == 1 and index.count() == len(HOSTILE) - left


LISTS: list[Any] = [["red", "it's"], ["red"], "red", [], [None], [1, "1", True], [2**53 + 1], ("a", "b"), ["x"] * 1000]
SINGLE: list[Any] = [1, 1.0, True, "1", None, 0, False, "", 2**53 + 1, float(2**53), -(2**63), -1.5, -1e300, 5e-324, 2**63 - 1,
                     2.0**63, "aä", "\uffff", "\U0001f989", -0.0]  # fmt: skip
MEANINGS: list[tuple[Filter, str]] = [
    (Eq("v", 1), "00 01"), (Eq("v", True), "02"), (Eq("v", "1"), "03"), (In("v", (None, False)), "04 06 none"),
    (In("v", (0, "")), "05 07 19"), (Eq("v", 2**53), "09"), (Range("v", 2**53 + 1, 2**60), "08"),
    (Range("v", None, -1), "10 11 12"), (Range("v", -1e299, -1.5), "10 11"), (Range("v", 0, 1), "00 01 05 13 19"),
    (Range("v", "", None), "03 07 16 17 18"),
    (Range("v", 2**63 - 1, 2**63 - 1), "14"), (Range("v", 2.0**63, None), "15"), (Range("v", None, 0), "05 10 11 12 19"),
    (Range("v", "b", "\uffff"), "17"), (Range("v", "a\x7f", "b"), "16"), (Range("v", "\U0001f989", None), "18"),
    (Range("id", "03", "05"), "03 04 05"), (In("v", ()), ""), (Eq("id", 1), ""), (Eq("id", None), ""),
    (In("id", tuple(f"{n}" for n in range(8_000, 10_000))), ""), (In("id", ("10", "12", 11)), "10 12"),
    (Eq("w v", "x"), "l8"), (Eq("w v", "red"), "l0 l1 l2"), (Eq("w v", "it's"), "l0"),
    (Eq("w v", 1), "l5"), (Eq("w v", True), "l5"), (Eq("w v", 2**53), ""),
    (In("w v", ("b", 2**53 + 1)), "l6 l7"), (Range("w v", "a", "z"), "l2"), (Range("w v", 0, None), ""),
    (And((Range("v", -2, 1), Range("v", 0, 0.5))), "05 13 19"),
    (And((Range("v", above=-1.5, below=1), Range("v", above=0, below=2))), "13"), (And((Range("v", 0), Range("v", ""))), ""),
    (Range("v", above=0, below=1.5), "00 01 13"), (Glob("w v", "?e*"), "l0 l1 l2"), (Glob("w v", "*'s"), "l0"),
    (Not(Range("v", -(2.0**63), 2.0**63)), "02 03 04 06 07 12 16 17 18 l0 l1 l2 l3 l4 l5 l6 l7 l8 none"),
    (Not(Not(Glob("v", "a*"))), "16"), (And((Not(Eq("w v", None)), Not(Glob("w v", "*")))), "l6"), (Or(()), ""),
    (Or((Eq("v", "1"), And((Range("id", below="02"), Not(Eq("id", "00")))))), "01 03"),
    (And((Eq("w v", "red"), Eq("w v", "it's"))), "l0"), (And((Eq("w v", None), Range("id", "l", None))), "l3 l4 none"),
]  # fmt: skip


@MILVUS_IS_SLOW
def test_filters_keep_kinds_and_lists_apart(fresh: Fresh) -> None:
    """Texts, numbers and booleans never mix; a list is found by each of its values."""
    items = [Item.of(text="x", id=f"{n:02}", fields={"v": value}) for n, value in enumerate(SINGLE)]
    items += [Item.of(text="x", id=f"l{n}", fields={"w v": v, "v": [2, "?"]}) for n, v in enumerate(LISTS)]
    items += [Item.of(text="x", id="none")]
    with opened(fresh()) as index:
        index.upsert(items, drawn(len(items), 4))
        for where, expected in MEANINGS:
            assert " ".join(stored.id for stored in index.scan(where)) == expected, where
            assert index.count(Not(where)) == len(items) - len(expected.split()), where


@MILVUS_IS_SLOW
def test_every_kind_of_index_takes_the_largest_filters_and_many_ids(fresh: Fresh) -> None:
    numbers = tuple(In("n", tuple(range(start, start + 9_000))) for start in (0, 5_000, 5_001))
    many = And((*numbers, *(In(f"f{n}", ("a", n, True, None)) for n in range(253))))
    long = In("t", ("wanted", *(f"{n}".ljust(16_384, "ü") for n in range(64))))
    deep: Filter = Eq("t", "wanted")
    for n in range(13):
        deep = (And if n % 2 else Or)((deep, *(Not(Eq(f"g{n}", ("x", 0)[m % 2])) for m in range(9)))) if n % 3 else Not(deep)
    with opened(fresh()) as index:
        if hasattr(index, "_connection"):  # what SQLite is built for everywhere
            index._connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 32_766)
        kept = {"a": {"n": 8_999, "f7": 7, "t": "wanted"}, "b": {"n": 9_000}, "c": {"n": 8_999, "f7": 8}}
        for ids, filters in ((("a", "b"), (many, long)), (("c",), (many,))):  # once more, with one that is new
            for id in ids:
                index.upsert(texts([id], **kept[id]), drawn(1, 4))
            for where in filters:
                assert [hit.id for hit in index.search(drawn(1, 4), 9, where=where)[0]] == ["a"]
        assert index.count(Or((deep, Not(deep)))) == 3 == index.count(deep) + index.count(Not(deep))
        ids = tuple(f"{n:06}" for n in range(9_000))
        assert index.get([*ids, "b"]).keys() == {"b"} and index.delete([*ids, "b"]) == 1
        assert index.count(many) == 1 == index.delete(many) and index.count() == 1


REFUSED_ITEMS: list[tuple[dict[str, Any], str]] = [
    ({"id": None}, "missing"), ({"id": ""}, "missing"), ({"id": "a"}, "twice"), ({"id": "ü" * 513}, "1026 bytes"),
    ({"id": "a\0b"}, "zero character"), ({"id": "\ud800"}, "Unicode"), ({"text": "\ud800"}, "Unicode"),
    ({"fields": {"modality": "text"}}, "keeps itself"), ({"fields": {"": 1}}, "field name"),
    ({"fields": {"n": float("nan")}}, "finite"), ({"fields": {"n": 2**63}}, "64-bit"), ({"fields": {"n": [[1]]}}, "list"),
    ({"fields": {"n": [1] * 1001}}, "at most 1000"),
]  # fmt: skip
REFUSED_VECTORS: list[tuple[Any, str]] = [
    *(([[1, 0, 0, 0], bad], r"vector 1 of item 'b' contains NaN or infinity") for bad in ([np.nan] * 4, [0, -np.inf, 0, 1])),
    *(([[1, 0, 0, 0], bad], "length zero") for bad in ([0, 0, 0, 0], [1e-30, 0, 0, 0])),
    (np.ones((2, 5)), "5 wide but the index holds 4"), (np.ones((3, 4)), r"shape \[3, 4\]"),
    (np.ones(4), r"shape \[4\]"), (np.full((2, 4), "x"), "give float32"),
]  # fmt: skip


@MILVUS_IS_SLOW
def test_what_is_refused_leaves_nothing(fresh: Fresh) -> None:
    with opened(fresh()) as index:
        for described, reason in REFUSED_ITEMS:
            with pytest.raises(InputError, match=reason):
                index.upsert([*texts(["a"]), Item.of(**{"text": "x", "id": "b", **described})], drawn(2, 4))
        for vectors, reason in REFUSED_VECTORS:
            with pytest.raises(InputError, match=reason):
                index.upsert(texts(["a", "b"]), np.asarray(vectors))
        assert index.count() == 0
        for query, options, why in (
            ([1, 0, 0, 0], {"k": 0}, "k is 0"),
            ([1, 0, 0], {"k": 1}, "3 wide"),
            ([1, 0, 0, np.nan], {"k": 1}, "NaN"),
            ([1, 0, 0, 0], {"k": 1, "modality": "video"}, "'video' is unknown"),
        ):
            with pytest.raises(InputError, match=why):
                index.search(np.asarray([query]), **options)
        with pytest.raises(InputError, match="not a filter"):
            index.count(1.5)


@MILVUS_IS_SLOW
def test_another_model_prompt_or_width_is_refused(fresh: Fresh) -> None:
    address, no_model = fresh(), {"fingerprint": None, "prompt_version": None, "dim": None}
    with pytest.raises(StoreError, match="there is no index at"):
        opened(address, create=False)
    with pytest.raises(InputError, match="needs the encoder's fingerprint"):
        opened(address, **no_model)
    with opened(address) as index:
        index.upsert(texts(["a", "b"]), drawn(2, 4))
    for option, why in (
        ({"fingerprint": "m2"}, r"model 'm1' but 'm2'.*new index"),
        ({"prompt_version": "p2"}, "prompt version 'p1' but 'p2'"),
        ({"dim": 8}, "width 4, not 8"),
    ):
        with pytest.raises(StoreError, match=why):
            opened(address, **option)
    with opened(address, **no_model, create=False) as index:
        assert index.info().fingerprint == "m1" and index.delete(["a"]) == 1 and index.count() == 1
        for act in (lambda: index.search(drawn(1, 4), 1), lambda: index.upsert(texts(["c"]), drawn(1, 4))):
            with pytest.raises(StoreError, match="without a model"):
                act()
    index.close()
    with pytest.raises(StoreError, match="closed"):
        index.count()


@MILVUS_IS_SLOW
def test_approximate_search_is_refused_until_built_then_finds_most(fresh: Fresh) -> None:
    vectors, rows = clustered(400), 400
    items = [Item.of(text=f"t{n}", id=f"{n:04d}", fields={"odd": n % 2 == 1, "rare": n % 100 == 0}) for n in range(rows)]
    with opened(fresh(), dim=24) as index:
        index.upsert(items[: rows - 100], vectors[: rows - 100])
        with pytest.raises(StoreError, match="build_ann"):
            index.search(vectors[:1], 10, exact=False)
        index.build_ann()
        assert index.info().cells >= 1
        index.upsert(items[rows - 100 :], vectors[rows - 100 :])  # placed as they come
        assert index.search(vectors[-50:-49], 1, exact=False)[0][0].id == f"{rows - 50:04}"
        for where, least in ((None, 0.9), (Eq("odd", True), 0.9), (Eq("rare", True), 1.0)):
            near = [index.search(query[None], 10, where=where, modality="text", exact=False)[0] for query in vectors[::30]]
            assert share(near, index.search(vectors[::30], 10, where=where, modality="text")) >= least
        index.upsert([Item.of(text="moved", id="0000", fields={"odd": True})], vectors[7:8])
        index.delete([f"{n:04d}" for n in range(2, rows, 2)])
        near = index.search(vectors[:5], 10, exact=False)
        assert all(int(hit.id) % 2 or hit.id == "0000" for hits in near for hit in hits)
        assert index.search(vectors[:1], 3, modality="image", exact=False) == [[]]


@MILVUS_IS_SLOW
def test_copy_goes_on_where_it_was_cut_off_and_carries_the_background(fresh: Fresh, tmp_path: Path) -> None:
    items = texts([f"t{n:02}" for n in range(30)], year=1) + [Item.of(image=DOT, id=name, fields={name: 1}) for name in HOSTILE]
    vectors = drawn(len(items), 4)
    with opened(str(tmp_path / "a")) as source, opened(fresh()) as target, opened(str(tmp_path / "b")) as back:
        source.upsert(items, vectors)
        source.keep_background(drawn_background(np.random.default_rng(1)))
        target.upsert(items[:7], vectors[:7])
        target.upsert(texts(["t07"], year=2), vectors[7:8])  # the same text with another field is written again
        assert copy(source, target, batch=4, progress=False) == len(items) - 7
        assert copy(source, target, batch=4, progress=False) == 0
        assert copy(target, back, progress=False) == len(items)
        for ours, theirs in zip(source.scan(with_vectors=True), back.scan(with_vectors=True), strict=True):
            np.testing.assert_array_equal(ours.vector, theirs.vector)
            described = [(s.id, s.modality, s.text, s.image, dict(s.fields), s.content_hash) for s in (ours, theirs)]
            assert described[0] == described[1]
        np.testing.assert_allclose(back.background().vectors["text"], source.background().vectors["text"], atol=1e-6)
        with opened(str(tmp_path / "c"), fingerprint="m2") as other, pytest.raises(StoreError, match="model 'm2' but 'm1'"):
            copy(source, other, progress=False)


def drawn_background(draw: np.random.Generator, count: int = 30, dim: int = 4) -> Background:
    vectors = {"text": unit(*draw.normal(size=(count, dim))), "image": unit(*draw.normal(size=(7, dim)))}
    return Background(vectors, "drawn", "2026-01-01T00:00:00+00:00")


@MILVUS_IS_SLOW
def test_an_index_keeps_a_background_and_notices_changes(fresh: Fresh) -> None:
    draw, address = np.random.default_rng(0), fresh()
    with opened(address) as index:
        versions = [index.version()]
        assert index.background() is None and index.info().background == {}
        for _ in range(2):
            kept = drawn_background(draw)
            index.keep_background(kept)
            versions.append(index.version())
            read = index.background()
            assert read is not None and read.source == "drawn" and read.created == kept.created
            for modality, vectors in kept.vectors.items():
                np.testing.assert_allclose(read.vectors[modality], vectors, atol=1e-6)
        assert index.info().background == {"text": 30, "image": 7} and index.info().background_source == "drawn"
        for act in (
            lambda: index.upsert([Item.of(text="one", id="a")], drawn(1, 4)),
            lambda: index.upsert([Item.of(text="another", id="a")], drawn(1, 4)),
            lambda: index.delete(["a"]),
        ):
            act()
            versions.append(index.version())
        assert index.version() == versions[-1] and len(set(versions[1:])) == len(versions) - 1
        for wrong in (Background({}, "", ""), Background({"text": np.zeros((1, 4), dtype=np.float32)}, "", "")):
            with pytest.raises(InputError):
                index.keep_background(wrong)
        with pytest.raises(InputError, match="4"):
            index.keep_background(drawn_background(draw, dim=5))
    with opened(address, create=False) as again:
        assert again.background().counts == {"text": 30, "image": 7}


def write_batch(index: Index, batch: int) -> None:
    ids = [f"{batch:03d}-{n}" for n in range(5)]
    index.upsert(texts(ids, batch=batch), np.stack([vector_of(id, 4) for id in ids]))


def write_until_killed(address: str) -> None:
    """Runs in a process of its own: says each batch once it is acknowledged, and deletes one item of every third."""
    with opened(address) as index:
        for batch in range(1000):
            write_batch(index, batch)
            print(f"+ {batch}", flush=True)
            if batch % 3 == 2:
                index.delete([f"{batch:03d}-0"])
                print(f"- {batch}", flush=True)


def in_process(code: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", f"import test_index_conformance as suite; {code}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_what_a_killed_writer_acknowledged_is_there(fresh: Fresh, tmp_path: Path) -> None:
    address = fresh()
    if address.startswith("milvus-lite:"):
        address = f"milvus-lite:{tmp_path}/killed.db"  # no other process may hold the file
    with in_process(f"suite.write_until_killed({address!r})") as writer:
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(9)]
        writer.kill()
        lines = [line for line in lines + writer.stdout.readlines() if line.endswith("\n")]
    added = [int(line[2:]) for line in lines if line[0] == "+"]
    removed = {int(line[2:]) for line in lines if line[0] == "-"}
    assert len(added) >= 4 and removed
    with opened(address, create=False) as index:
        for batch in added:
            ids = [f"{batch:03d}-{n}" for n in range(5)]
            kept = index.get(ids, with_vectors=True)
            in_flight = batch == added[-1] and batch % 3 == 2  # its deletion may or may not have come through
            assert set(ids) - set(kept) == (set(ids[:1]) if batch in removed or (in_flight and ids[0] not in kept) else set())
            for id, stored in kept.items():
                np.testing.assert_array_equal(stored.vector, vector_of(id, 4))
        assert index.count(Eq("batch", added[-1] + 1)) in (0, 4, 5)  # all of the batch in flight, or none
        assert index.count() == len(list(index.scan())) == len(index.search(drawn(1, 4), 10_000)[0])


# What only Milvus does


@needs_milvus
@pytest.mark.slow
def test_what_milvus_cannot_keep_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(f"milvus-lite:{tmp_path}/new/limits.db") as index:
        for item, what in (
            (Item.of(text="ü" * 40_000, id="b"), "text of item 'b' take 80000 bytes"),
            (Item.of(text="x", id="b", fields={"long": "y" * 66_000}), "fields of item 'b'"),
            (Item.of(text="x", id="b", fields={"long": "y" * 40_000}), "filter values of item 'b'"),
        ):
            with pytest.raises(InputError, match=what):
                index.upsert([*texts(["a"]), item], drawn(2, 4))
            with pytest.raises(InputError, match=what):
                index.check([item])
        large = [Item.of(text="y" * 60_000, id=f"{n}") for n in range(1100)]
        with pytest.raises(InputError, match=r"at most [0-9]+ such items a call"):
            index.upsert(large, drawn(1100, 4))
        assert index.count() == 0
    with pytest.raises(StoreError, match="no index of float16 and width 4"):
        opened(f"milvus-lite:{tmp_path}/new/half.db", dtype="float16")
    with pytest.raises(InputError, match="cannot hold int8"):
        opened(f"milvus-lite:{tmp_path}/new/bytes.db", dtype="int8")
    for wrong in ("milvus-lite:items", f"milvus-lite:{tmp_path}/new/limits.db/a-b", f"milvus-lite:{tmp_path}/x.db/i_near_text"):
        with pytest.raises(StoreError, match=r"ends in \.db|letters, digits"):
            opened(wrong)
    monkeypatch.setenv("TRACEIR_MILVUS_TOKEN", "")
    with pytest.raises(StoreError, match="cannot be opened") as refused:
        opened("http://user:hidden-word@127.0.0.1:1/items", timeout=1)
    assert "hidden-word" not in str(refused.value)


@needs_milvus
@pytest.mark.slow
def test_foreign_and_damaged_collections_are_named(tmp_path: Path) -> None:
    from pymilvus import MilvusClient

    file = f"{tmp_path}/items.db"
    with opened(f"milvus-lite:{file}/mine") as index:
        index.upsert(texts([f"{n}" for n in range(5)]), drawn(5, 4))
        client = MilvusClient(file)
        (row,) = client.query("mine", filter='key == "33"', output_fields=["*"])
        del row["bm25"]  # made by Milvus
        for name, value, why in (
            ("vector", np.full(4, 9, dtype=np.float32), "item '3' has no whole vector"),
            ("fields", "{", "item '3' is damaged"),
            ("fields", '{"a": {"b": 1}}', "item '3' is damaged"),
            ("modality", "video", "item '3' is damaged"),
        ):
            client.upsert("mine", [{**row, name: value}])
            with pytest.raises(StoreError, match=rf"items\.db/mine is damaged: {why}.*add"):
                index.search(np.ones((1, 4)), 5)
        index.delete(["3"])
        assert len(index.search(drawn(1, 4), 5)[0]) == 4
        client.create_collection("foreign", dimension=4)
        with pytest.raises(StoreError, match="another program"):
            opened(f"milvus-lite:{file}/foreign")
        client.alter_collection_properties("mine", properties={"traceir": '{"format": 99}'})
        with pytest.raises(StoreError, match="format 99 but this version reads format 1"):
            opened(f"milvus-lite:{file}/mine")


@needs_milvus
@pytest.mark.slow
def test_a_collection_from_before_keyword_search_goes_on_and_says_to_copy_it(tmp_path: Path) -> None:
    from pymilvus import DataType, MilvusClient

    file = f"{tmp_path}/items.db"
    with opened(f"milvus-lite:{file}/new") as new:
        client = MilvusClient(file)
        schema = client.create_schema(auto_id=False, enable_dynamic_field=True)
        schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=2048)
        for name in ("modality", "text", "image", "fields", "content_hash"):
            schema.add_field(name, DataType.VARCHAR, max_length=65_535)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=4)
        flat = client.prepare_index_params()
        flat.add_index("vector", index_type="FLAT", metric_type="IP", params={})
        properties = client.describe_collection("new")["properties"]
        client.create_collection("old", schema=schema, index_params=flat, consistency_level="Strong", properties=properties)
        with opened(f"milvus-lite:{file}/old", create=False) as old:
            old.upsert(texts(["a", "b"], n=1), drawn(2, 4))
            assert [stored.id for stored in old.browse("n=1", sort="-n", limit=9)] == ["a", "b"]
            with pytest.raises(StoreError, match="traceir index copy"):
                old.search_keywords("text", 3)
            old.keep_note("roots", "[]")
            assert copy(old, new, progress=False) == 2 and new.note("roots") == "[]"
        assert {hit.id for hit in new.search_keywords("text", 3)} == {"a", "b"}
        with pytest.raises(InputError, match="beginnings"):
            new.search_keywords("tex*", 3)


@needs_milvus
@pytest.mark.slow
def test_what_a_killed_server_acknowledged_is_there(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        port, process = stack.enter_context(milvus_server(tmp_path / "data"))
        address = f"http://127.0.0.1:{port}/killed"
        index = stack.enter_context(opened(address))
        index.upsert(texts([f"{n:03d}" for n in range(200)], n=1), drawn(200, 4))
        index.delete(["000", "001"])
        process.kill()
        process.wait()
        with pytest.raises(StoreError, match="Fail connecting"):
            opened(address, create=False, timeout=1)
        stack.enter_context(milvus_server(tmp_path / "data", port))
        assert index.count() == 198 and len(index.search(drawn(1, 4), 500)[0]) == 198


def fill_file(address: str) -> None:
    with opened(address) as index:
        index.upsert(texts([f"{n}" for n in range(30)]), drawn(30, 4))


@needs_milvus
@pytest.mark.slow
def test_damaged_files_of_milvus_lite_end_in_a_store_error(tmp_path: Path) -> None:
    assert in_process(f"suite.fill_file('milvus-lite:{tmp_path}/whole.db')").wait() == 0  # which holds its file until it ends
    whole = tmp_path / "whole.db"
    names = [file.relative_to(whole) for file in sorted(whole.rglob("*")) if file.suffix in (".json", ".parquet", ".idx")]
    assert len(names) >= 3
    changes = (lambda data: data[: len(data) // 2], lambda data: data[:9] + b"\xff" * 40 + data[49:])
    for number, (name, change) in enumerate(itertools.product(names, changes)):
        copied = tmp_path / f"{number}.db"
        shutil.copytree(whole, copied, ignore=shutil.ignore_patterns("LOCK"))
        (copied / name).write_bytes(change((whole / name).read_bytes()))
        with contextlib.suppress(StoreError), opened(f"milvus-lite:{copied}", create=False) as index:
            assert len(index.search(drawn(1, 4), 99)[0]) in (0, 30), name
    (tmp_path / "file.db").write_bytes(b"of another program")
    (tmp_path / "file").write_bytes(b"")
    for path in ("file.db", "file/below.db", "none.db", f"{'n' * 300}.db"):
        with pytest.raises(StoreError, match=r"\.db.*(no file of Milvus Lite|choose another|check the address)"):
            opened(f"milvus-lite:{tmp_path}/{path}", create=path == "file/below.db")
