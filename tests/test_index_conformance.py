"""One suite for every kind of index: the embedded one, a file of Milvus Lite, and its server over loopback.

With TRACEIR_TEST_MILVUS=http://HOST:19530 it also runs against that server, in collections of its own that it drops in the end.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import vector_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_index import CORNERS, DOT, FILTERS, clustered, drawn, item_of, naive, pairs, texts, unit

from traceir.errors import InputError, StoreError
from traceir.index import And, Eq, Filter, In, Index, Range, open_index
from traceir.index.copy import copy
from traceir.index.filters import matches
from traceir.index.milvus_rows import compile_filter, key_of, keys_in, sortable
from traceir.index.store import Background
from traceir.items import Item, Modality

GIVEN = os.environ.get("TRACEIR_TEST_MILVUS", "")
KINDS = ("folder", "file", "server", *(["given"] if GIVEN else []))
has_milvus = all(importlib.util.find_spec(name) for name in ("pymilvus", "milvus_lite"))
# Milvus is an extra of half a gigabyte; `make test` installs it, whoever leaves it out still tests the folder.
needs_milvus = pytest.mark.skipif(
    not has_milvus, reason="pymilvus and milvus-lite are not installed: pip install 'traceir[milvus]'"
)
HOSTILE = (
    "it's",
    'say "hi"',
    "back\\slash",
    "a\nb\tc",
    "' or 1 == 1 or '",
    '"] or key != ""',
    "%_*",
    "ünï 🦉",
    "$meta",
    " ",
    "\\",
)


@dataclass
class Server:
    """`milvus-lite server` on a free port of the loopback, over a folder that outlives it."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["server", "--data-dir", str(self.folder), "--host", "127.0.0.1", "--port", str(self.port)]
        with (self.folder.parent / "server.log").open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "milvus_lite", *command], stdout=log, stderr=log)
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            assert self.process.poll() is None, (self.folder.parent / "server.log").read_text()
            time.sleep(0.1)
        raise AssertionError("the server does not listen")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def new_server(folder: Path) -> Server:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server(folder / "data", port)
    server.start()
    return server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = new_server(tmp_path_factory.mktemp("milvus"))
    yield started
    started.kill()


Fresh = Callable[[], str]


@pytest.fixture(scope="module", params=[KINDS[0], *(pytest.param(kind, marks=needs_milvus) for kind in KINDS[1:])])
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fresh]:
    """A new address of one kind at every call."""
    folder = tmp_path_factory.mktemp(request.param)
    start = {"folder": f"{folder}/i", "file": f"milvus-lite:{folder}/items.db/i", "given": f"{GIVEN}/t{time.time_ns()}_"}
    if request.param == "server":
        start["server"] = f"http://127.0.0.1:{request.getfixturevalue('server').port}/i"
    numbers = itertools.count()
    yield lambda: f"{start[request.param]}{next(numbers)}"
    if request.param == "given":
        drop_collections(start["given"].rpartition("/")[2])


def drop_collections(prefix: str) -> None:
    from pymilvus import MilvusClient

    client = MilvusClient(GIVEN)
    for name in client.list_collections():
        if name.startswith(prefix):
            client.drop_collection(name)


def opened(address: str, *, dim: int = 4, create: bool = True, **options: Any) -> Index:
    return open_index(address, fingerprint="m1", prompt_version="p1", dim=dim, create=create, **options)


@pytest.fixture(scope="module")
def filled(fresh: Fresh) -> Iterator[tuple[Index, list[Item], Any]]:
    """Forty items of every modality and kind of field, some replaced and some deleted, with many equal vectors."""
    values: list[Any] = [
        None,
        True,
        False,
        0,
        1,
        2,
        -1,
        0.0,
        1.0,
        1.5,
        "",
        "0",
        "1",
        "a",
        "b",
        "ä",
        ["a", 1, 1.0, None],
        [],
        [True, "b"],
    ]
    kinds = ("text", "image", "both")
    items = [item_of(n, kinds[n % 3], {"x": values[n % 19], "y": values[n * 7 % 19]} if n % 5 else {}) for n in range(44)]
    corners = [(1, 0, 0, 0), (1, 1, 0, 0), (0, 1, 0, 0), (-1, 0, 0, 1), (0.3, 0.2, 0.1, 0.7)]
    vectors = unit(*(corners[n * 3 % 5] for n in range(44)))
    with opened(fresh()) as index:
        index.upsert([item_of(n, "text", {"x": "old"}) for n in range(0, 44, 2)], drawn(22, 4))
        index.upsert(items, vectors)
        assert index.delete([f"i{n}" for n in (3, 7, 40, 41, 99)]) == 4
        left = [n for n in range(44) if n not in (3, 7, 40, 41)]
        yield index, [items[n] for n in left], vectors[left]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    queries=st.lists(CORNERS, min_size=1, max_size=3),
    k=st.integers(1, 12),
    where=st.one_of(st.none(), FILTERS),
    modality=st.sampled_from([None, "text", "image", "image,text"]),
)
def test_search_means_what_plain_python_says(filled: Any, queries: Any, k: int, where: Filter | None, modality: Any) -> None:
    index, items, vectors = filled
    asked = unit(*queries)
    found = index.search(asked, k, where=where, modality=modality)
    assert [pairs(hits) for hits in found] == [naive(items, vectors, query, k, where, modality) for query in asked]
    kept = [str(one.id) for one in items if where is None or matches(where, str(one.id), one.modality, one.fields)]
    assert index.count(where) == len(kept)
    assert [stored.id for stored in index.scan(where)] == sorted(kept)


def test_field_report_11_each_id_is_new_to_one_of_the_calls_that_bring_it_at_once(fresh: Fresh) -> None:
    with opened(fresh()) as index:
        started = threading.Barrier(4)

        def write(number: int) -> set[str]:
            started.wait(20)
            return index.upsert(texts(["cup", "jug", f"own-{number}"]), drawn(3, 4, seed=number))

        with ThreadPoolExecutor(4) as pool:
            new = list(pool.map(write, range(4)))
            assert sorted(id for ids in new for id in ids) == ["cup", "jug", *(f"own-{number}" for number in range(4))]
            counts = list(pool.map(lambda _: index.delete(["cup", "jug", "jug"]), range(4)))
        assert sorted(counts) == [0, 0, 0, 2]
        assert index.upsert(texts(["cup", "own-1"]), drawn(2, 4)) == {"cup"}
        assert index.upsert([], np.zeros((0, 4), dtype=np.float32)) == set()


def test_hits_are_those_of_the_embedded_index(fresh: Fresh, tmp_path: Path) -> None:
    vectors, asked = clustered(1200), clustered(1300)[1200:1230]
    ids = [f"n{n}" for n in range(1200)]
    with opened(fresh(), dim=24) as index, opened(str(tmp_path / "own"), dim=24) as own:
        for one in (index, own):
            one.upsert(texts(ids), vectors)
        for ours, theirs in zip(index.search(asked, 20), own.search(asked, 20), strict=True):
            assert [hit.id for hit in ours] == [hit.id for hit in theirs]
            assert [hit.score for hit in ours] == pytest.approx([hit.score for hit in theirs], abs=1e-5)
        assert [stored.id for stored in index.scan()] == sorted(ids)  # over more than one page


def test_ties_beyond_k_go_by_id(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    same, others = drawn(1, 16), drawn(200, 16, seed=1)
    ids = [f"n{number:05d}" for number in np.random.default_rng(2).permutation(500)]
    with opened(fresh(), dim=16) as index:
        index.upsert(texts(ids), np.concatenate([np.repeat(same, 300, axis=0), others]))
        assert [hit.id for hit in index.search(same, 20)[0]] == sorted(ids[:300])[:20]
        batch = index.search(np.concatenate([others[:3], same]), 20)
        monkeypatch.setattr("traceir.index.milvus.MOST_HITS", 50)  # fewer than the ties: every vector is read
        assert index.search(np.concatenate([others[:3], same]), 20) == batch
        assert [hit.id for hit in index.search(same, 60)[0]] == sorted(ids[:300])[:60]
        assert len(index.search(same, 900)[0]) == 500


def test_everything_kept_comes_back_after_reopening(fresh: Fresh) -> None:
    address = fresh()
    fields = {"a": "ä\n", "b": 2**62, "c": 1.5, "d": True, "e": None, "f": -0.0, "g": ["ä", 1, 1.5, True, None]}
    item = Item.of(text=" two\nlines \\ \" ' ", image=DOT, id="x/ü.png", fields=fields)
    vector = drawn(1, 4)
    with opened(address) as index:
        new = index.upsert([item, Item.of(image=DOT, id="plain")], np.concatenate([vector, drawn(1, 4, seed=3)]))
        assert new == {"x/ü.png", "plain"}
    with opened(address, create=False) as index:
        found = index.get(["missing", "x/ü.png", "plain"], with_vectors=True)
        stored = found["x/ü.png"]
        assert list(found) == ["x/ü.png", "plain"] and found["plain"].text is None
        assert (stored.text, stored.image, stored.modality) == ("two\nlines \\ \" '", "dot.png", "image,text")
        assert dict(stored.fields) == fields and stored.content_hash == item.content_hash()
        assert [type(value) for value in stored.fields.values()] == [str, int, float, bool, type(None), float, list]
        assert stored.vector is not None
        np.testing.assert_array_equal(stored.vector, vector[0])
        hit = index.search(vector, 5)[0][0]
        assert (hit.id, hit.text, hit.image, dict(hit.fields)) == (stored.id, stored.text, stored.image, fields)
        info = index.info()
        assert (info.dim, info.dtype, info.fingerprint, info.prompt_version) == (4, "float32", "m1", "p1")
        assert info.counts == {"image": 1, "image,text": 1} and info.cells == 0


def test_upsert_replaces_and_delete_removes(fresh: Fresh) -> None:
    first, second = unit([1, 0, 0, 0], [0, 1, 0, 0])
    with opened(fresh()) as index:
        assert index.search(drawn(2, 4), 3) == [[], []] and index.search(np.empty((0, 4), dtype=np.float32), 3) == []
        index.upsert(texts(["a", "b", "c"], year=1), np.stack([first, first, first]))
        assert [hit.id for hit in index.search(first[None], 9)[0]] == ["a", "b", "c"]
        index.upsert([Item.of(image=DOT, text="new", id="b", fields={"year": 2})], second[None])
        assert [hit.id for hit in index.search(second[None], 1)[0]] == ["b"]
        assert index.count() == 3 and index.count(Eq("year", 1)) == 2 and index.count(Eq("modality", "image,text")) == 1
        assert index.get(["b"])["b"].text == "new"
        assert index.delete(["a", "a", "nobody"]) == 1 and index.delete(Eq("year", 2)) == 1 and index.delete([]) == 0
        assert [hit.id for hit in index.search(second[None], 9)[0]] == ["c"]
        assert index.info().counts == {"text": 1}
        with pytest.raises(InputError, match="single text"):
            index.delete("c")


def test_hostile_ids_names_and_values_are_only_data(fresh: Fresh) -> None:
    items = [Item.of(text=f"x{text}", id=text, fields={text: text, "n": n}) for n, text in enumerate(HOSTILE)]
    with opened(fresh()) as index:
        index.upsert(items, drawn(len(items), 4))
        assert sorted(index.get(HOSTILE)) == sorted(HOSTILE)
        assert [stored.id for stored in index.scan()] == sorted(HOSTILE)
        for text in HOSTILE:
            for where in (Eq(text, text), In("id", (text,)), Range(text, text, text), And((Eq("id", text), Eq(text, text)))):
                assert [stored.id for stored in index.scan(where)] == [text], where
            assert index.count(Eq(text, None)) == len(HOSTILE) - 1
            assert index.search(drawn(1, 4), 3, where=Eq("modality", text)) == [[]]
        for left, text in enumerate(HOSTILE, start=1):
            assert index.delete([text]) == 1 and index.count() == len(HOSTILE) - left


def test_texts_numbers_and_booleans_never_mix_in_filters(fresh: Fresh) -> None:
    values: list[Any] = [1, 1.0, True, "1", None, 0, False, "", 2**53 + 1, float(2**53), -(2**63), -1.5, -1e300]
    items = [Item.of(text="x", id=f"{n:02}", fields={"v": value}) for n, value in enumerate(values)]
    with opened(fresh()) as index:
        index.upsert([*items, Item.of(text="x", id="none")], drawn(14, 4))
        for where, expected in [
            (Eq("v", 1), "00 01"),
            (Eq("v", True), "02"),
            (Eq("v", "1"), "03"),
            (Eq("v", None), "04 none"),
            (In("v", (None, False)), "04 06 none"),
            (In("v", (0, "")), "05 07"),
            (Eq("v", 2**53), "09"),
            (Range("v", 2**53 + 1, None), "08"),
            (Range("v", None, -1), "10 11 12"),
            (Range("v", -1e299, -1.5), "10 11"),
            (Range("v", 0, 1), "00 01 05"),
            (Range("v", "", None), "03 07"),
            (Range("id", "03", "05"), "03 04 05"),
            (And(()), " ".join([*(f"{n:02}" for n in range(13)), "none"])),
            (In("v", ()), ""),
            (Eq("id", 1), ""),
            (Eq("id", None), ""),
            (In("id", tuple(f"{n}" for n in range(10_000))), "10 11 12"),
        ]:
            assert " ".join(stored.id for stored in index.scan(where)) == expected, where
        with pytest.raises(InputError, match="not a filter"):
            index.count("year = 1")


def test_field_report_10_every_kind_of_index_takes_the_largest_filters_and_ids(fresh: Fresh) -> None:
    numbers = tuple(In("n", tuple(range(start, start + 9_000))) for start in (0, 5_000, 5_001))
    many = And((*numbers, *(In(f"f{n}", ("a", n, True, None)) for n in range(253))))
    assert len(many.parts) == 256 and sum(len(part.values) for part in many.parts if isinstance(part, In)) == 28_012
    long = In("t", ("wanted", *(f"{n}".ljust(16_384, "ü") for n in range(64))))
    with opened(fresh()) as index:
        index.upsert(
            [
                *texts(["a"], n=8_999, f7=7, t="wanted"),
                *texts(["b"], n=9_000),
                *texts(["c"], n=8_999, f7=8),
                *texts(["d"], t="?"),
            ],
            drawn(4, 4),
        )
        for where, expected in ((many, ["a"]), (long, ["a"])):
            assert [hit.id for hit in index.search(drawn(1, 4), 9, where=where)[0]] == expected
        ids = [f"{n:06}" for n in range(5_000)]
        assert index.get([*ids, "b"]).keys() == {"b"} and index.delete([*ids, "b"]) == 1
        with pytest.raises(InputError, match=r"260000 values to be one of in all; give at most 30000"):
            index.count(And(tuple(In("n", tuple(range(10_000))) for _ in range(26))))
        assert index.count() == 3


def test_field_report_11_every_kind_of_index_refuses_vectors_that_would_poison_it(fresh: Fresh) -> None:
    with opened(fresh()) as index:
        index.upsert(texts(["a", "b"]), drawn(2, 4))
        for bad in ([np.nan, 0, 0, 0], [0, np.inf, 0, 0], [0, -np.inf, 0, 1], [0, 0, 0, 0], [1e-30, 0, 0, 0]):
            vectors = np.asarray([[1, 0, 0, 0], bad], dtype=np.float32)
            for act in (
                lambda vectors=vectors: index.upsert(texts(["c", "d"]), vectors),
                lambda vectors=vectors: index.search(vectors, 1),
            ):
                with pytest.raises(InputError, match=r"vector 1.*(NaN or infinity|length zero)"):
                    act()
        assert len(index.search(drawn(1, 4), 9)[0]) == 2


@needs_milvus
def test_field_report_11_a_broken_row_of_a_collection_is_named(tmp_path: Path) -> None:
    with opened(f"milvus-lite:{tmp_path}/items.db") as index:
        index.upsert(texts([f"{n}" for n in range(5)]), drawn(5, 4))
        client: Any = index._collections._client
        row = client.query("traceir", filter=keys_in([key_of("3")]), output_fields=["*"])[0]
        for name, value, why in (
            ("vector", np.full(4, np.nan, dtype=np.float32), "item '3' has no whole vector"),
            ("vector", np.zeros(4, dtype=np.float32), "item '3' has no whole vector"),
            ("vector", np.full(4, 9, dtype=np.float32), "item '3' has no whole vector"),
            ("fields", "{", "item '3' is damaged"),
            ("fields", '{"a": {"b": 1}}', "item '3' is damaged"),
            ("modality", "video", "item '3' is damaged"),
        ):
            client.upsert("traceir", [{**row, name: value}])
            with pytest.raises(StoreError, match=rf"items\.db is damaged: {why}.*add"):
                index.search(drawn(1, 4), 5)
        index.delete(["3"])
        assert len(index.search(drawn(1, 4), 5)[0]) == 4


@needs_milvus
def test_field_report_19_damaged_files_of_milvus_lite_end_in_a_store_error(tmp_path: Path) -> None:
    code = "import test_index_conformance as suite; suite.fill_file({!r})"  # the file belongs to a process until it ends
    address = f"milvus-lite:{tmp_path}/whole.db"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", code.format(address)], check=True, env=environment)
    whole = tmp_path / "whole.db"
    names = [file.relative_to(whole) for file in sorted(whole.rglob("*")) if file.suffix in (".json", ".parquet", ".idx")]
    assert len(names) >= 3
    for number, name in enumerate(names):
        for place, change in enumerate((lambda data: data[: len(data) // 2], lambda data: data[:9] + b"\xff" * 40 + data[49:])):
            copied = tmp_path / f"{number}-{place}.db"
            shutil.copytree(whole, copied, ignore=shutil.ignore_patterns("LOCK"))
            (copied / name).write_bytes(change((whole / name).read_bytes()))
            with contextlib.suppress(StoreError), opened(f"milvus-lite:{copied}", create=False) as index:
                assert len(index.search(drawn(1, 4), 99)[0]) in (0, 30), name
    (tmp_path / "file.db").write_bytes(b"of another program")
    (tmp_path / "file").write_bytes(b"")
    for path in ("file.db", "file/below.db", "none.db", f"{'n' * 300}.db"):
        with pytest.raises(StoreError, match=r"\.db.*(no file of Milvus Lite|choose another|check the address)"):
            opened(f"milvus-lite:{tmp_path}/{path}", create=path == "file/below.db")


def fill_file(address: str) -> None:
    with opened(address) as index:
        index.upsert(texts([f"{n}" for n in range(30)]), drawn(30, 4))


def test_field_report_23_a_list_is_found_by_each_of_its_values(fresh: Fresh) -> None:
    lists: list[Any] = [["red", "it's"], ["red"], "red", [], [None], [1, "1", True], [2**53 + 1], ("a", "b"), ["x"] * 1000]
    items = [Item.of(text="x", id=f"{n}", fields={"v": value, "w v": value}) for n, value in enumerate(lists)]
    with opened(fresh()) as index:
        index.upsert(items, drawn(len(items), 4))
        for name in ("v", "w v"):
            for where, expected in (
                (Eq(name, "red"), "0 1 2"), (Eq(name, "it's"), "0"), (Eq(name, None), "3 4"), (Eq(name, 1), "5"),
                (Eq(name, True), "5"), (Eq(name, 2**53), ""), (In(name, (None, "b", 2**53 + 1)), "3 4 6 7"), (Eq(name, "x"), "8"),
                (Range(name, "a", "z"), "2"), (Range(name, 0, None), ""), (And((Eq(name, "red"), Eq(name, "it's"))), "0"),
            ):  # fmt: skip
                assert " ".join(stored.id for stored in index.scan(where)) == expected, where
                kept = index.get([str(item.id) for item in items]).values()
                assert " ".join(s.id for s in kept if matches(where, s.id, s.modality, s.fields)) == expected, where
        index.upsert([Item.of(text="x", id="0", fields={"v": "blue"})], drawn(1, 4))
        assert [stored.id for stored in index.scan(Eq("v", "red"))] == ["1", "2"] and index.count(Eq("v", "blue")) == 1
        with pytest.raises(InputError, match="at most 1000"):
            index.upsert([Item.of(text="x", id="9", fields={"v": [1] * 1001})], drawn(1, 4))


@pytest.mark.parametrize(
    ("item", "vectors", "reason"),
    [
        (Item.of(text="x", id="a"), drawn(2, 4), "twice"),
        (Item.of(text="x", id="ü" * 513), drawn(2, 4), "1026 bytes"),
        (Item.of(text="x", id="b", fields={"modality": "text"}), drawn(2, 4), "keeps itself"),
        (Item.of(text="x", id="b"), np.full((2, 4), np.nan), "NaN or infinity"),
        (Item.of(text="x", id="b"), np.ones((2, 5)), "5 wide but the index holds 4"),
    ],
)
def test_what_is_refused_leaves_nothing(fresh: Fresh, item: Item, vectors: Any, reason: str) -> None:
    with opened(fresh()) as index:
        with pytest.raises(InputError, match=reason):
            index.upsert([*texts(["a"]), item], vectors)
        assert index.count() == 0
        for search, why in ((lambda: index.search(drawn(1, 4), 0), "k is 0"), (lambda: index.search(drawn(1, 3), 1), "3 wide")):
            with pytest.raises(InputError, match=why):
                search()


def test_another_model_prompt_or_width_is_refused(fresh: Fresh) -> None:
    address = fresh()
    with pytest.raises(StoreError, match="there is no index at"):
        opened(address, create=False)
    with pytest.raises(InputError, match="needs the encoder's fingerprint"):
        open_index(address, fingerprint=None, prompt_version=None, create=True)
    with opened(address) as index:
        index.upsert(texts(["a", "b"]), drawn(2, 4))
    with pytest.raises(StoreError, match=r"model 'm1' but 'm2'.*new index"):
        open_index(address, fingerprint="m2", prompt_version="p1")
    with pytest.raises(StoreError, match="prompt version 'p1' but 'p2'"):
        open_index(address, fingerprint="m1", prompt_version="p2", create=True, dim=4)
    with pytest.raises(StoreError, match="width 4, not 8"):
        opened(address, dim=8)
    with open_index(address, fingerprint=None, prompt_version=None) as index:
        assert index.info().fingerprint == "m1" and index.delete(["a"]) == 1 and index.count() == 1
        for act in (lambda: index.search(drawn(1, 4), 1), lambda: index.upsert(texts(["c"]), drawn(1, 4))):
            with pytest.raises(StoreError, match="without a model"):
                act()
    index.close()
    with pytest.raises(StoreError, match="closed"):
        index.count()


def test_approximate_search_is_refused_until_built_then_finds_most(fresh: Fresh) -> None:
    vectors = clustered(1500)
    items = [Item.of(text=f"t{n}", id=f"{n:04d}", fields={"odd": n % 2 == 1, "rare": n % 100 == 0}) for n in range(1500)]
    with opened(fresh(), dim=24) as index:
        index.upsert(items[:1400], vectors[:1400])
        with pytest.raises(StoreError, match="build_approximate"):
            index.search(vectors[:1], 10, exact=False)
        built: Any = index
        built.build_approximate()
        assert index.info().cells >= 1
        index.upsert(items[1400:], vectors[1400:])  # placed as they come
        assert index.search(vectors[1450:1451], 1, exact=False)[0][0].id == "1450"
        for where, least in ((None, 0.9), (Eq("odd", True), 0.9), (Eq("rare", True), 1.0)):
            near = [index.search(query[None], 10, where=where, modality="text", exact=False)[0] for query in vectors[::30]]
            true = index.search(vectors[::30], 10, where=where, modality="text")
            shared = [len({h.id for h in a} & {h.id for h in b}) / len(b) for a, b in zip(near, true, strict=True)]
            assert np.mean(shared) >= least
        index.upsert([Item.of(text="moved", id="0000", fields={"odd": True})], vectors[700:701])
        index.delete([f"{n:04d}" for n in range(2, 1500, 2)])
        near = index.search(vectors[:5], 10, exact=False)
        assert all(int(hit.id) % 2 or hit.id == "0000" for hits in near for hit in hits)
        exact = {hit.id: hit.score for hit in index.search(vectors[:1], 900)[0]}
        assert all(hit.score == exact[hit.id] for hit in near[0])
        assert index.search(vectors[:1], 3, modality="image", exact=False) == [[]]


def test_copy_goes_on_where_it_was_cut_off(fresh: Fresh, tmp_path: Path) -> None:
    items = [
        *texts([f"t{n:02}" for n in range(30)], year=1),
        *(Item.of(image=DOT, id=name, fields={name: 1}) for name in HOSTILE),
    ]
    vectors = drawn(len(items), 4)
    with opened(str(tmp_path / "a")) as source, opened(fresh()) as target, opened(str(tmp_path / "b")) as back:
        source.upsert(items, vectors)
        target.upsert(items[:7], vectors[:7])
        target.upsert(texts(["t07"], year=2), vectors[7:8])  # the same text with another field is written again
        assert copy(source, target, batch=4, progress=False) == len(items) - 7
        assert copy(source, target, batch=4, progress=False) == 0
        assert copy(target, back, progress=False) == len(items)
        for ours, theirs in zip(source.scan(with_vectors=True), back.scan(with_vectors=True), strict=True):
            assert ours.vector is not None and theirs.vector is not None
            np.testing.assert_array_equal(ours.vector, theirs.vector)
            described = [(s.id, s.modality, s.text, s.image, dict(s.fields), s.content_hash) for s in (ours, theirs)]
            assert described[0] == described[1]
        assert target.search(vectors[:3], 5) == source.search(vectors[:3], 5)
        other = open_index(str(tmp_path / "c"), fingerprint="m2", prompt_version="p1", dim=4, create=True)
        with other, pytest.raises(StoreError, match="model 'm2' but 'm1'"):
            copy(source, other, progress=False)


def write_until_killed(address: str) -> None:
    """Runs in a process of its own: says each batch once it is acknowledged, and deletes one item of every third."""
    with opened(address) as index:
        for batch in range(1000):
            ids = [f"{batch:03d}-{n}" for n in range(5)]
            index.upsert(texts(ids, batch=batch), np.stack([vector_of(id, 4) for id in ids]))
            print(f"+ {batch}", flush=True)
            if batch % 3 == 2:
                index.delete([f"{batch:03d}-0"])
                print(f"- {batch}", flush=True)


def killed_writer(address: str, acknowledgements: int) -> list[str]:
    """What a writer acknowledged before it was killed."""
    code = f"import test_index_conformance as suite; suite.write_until_killed({address!r})"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as writer:
        assert writer.stdout is not None
        said = [writer.stdout.readline() for _ in range(acknowledgements)]
        writer.send_signal(signal.SIGKILL)
        return [line for line in said + writer.stdout.readlines() if line.endswith("\n")]


def check_acknowledged(address: str, said: Sequence[str]) -> None:
    added = [int(line[2:]) for line in said if line[0] == "+"]
    removed = {int(line[2:]) for line in said if line[0] == "-"}
    assert len(added) >= 4 and removed
    with opened(address, create=False) as index:
        for batch in added:
            ids = [f"{batch:03d}-{n}" for n in range(5)]
            found = index.get(ids, with_vectors=True)
            in_flight = batch == added[-1] and batch % 3 == 2  # its deletion may or may not have come through
            gone = set(ids[:1]) if batch in removed or (in_flight and ids[0] not in found) else set()
            assert set(found) == set(ids) - gone
            for id, stored in found.items():
                np.testing.assert_array_equal(stored.vector, vector_of(id, 4))
        last = index.count(Eq("batch", added[-1] + 1))
        assert last in (0, 4, 5)  # all of the batch in flight, or none
        assert index.count() == len(list(index.scan())) == len(index.search(drawn(1, 4), 10_000)[0])


def test_what_a_killed_writer_acknowledged_is_there(fresh: Fresh, tmp_path: Path) -> None:
    address = fresh()
    if address.startswith("milvus-lite:"):
        address = f"milvus-lite:{tmp_path}/killed.db"  # no other process may hold the file
    check_acknowledged(address, killed_writer(address, 9))


@needs_milvus
def test_what_a_killed_server_acknowledged_is_there(tmp_path: Path) -> None:
    server = new_server(tmp_path)
    try:
        address = f"http://127.0.0.1:{server.port}/killed"
        with opened(address) as index:
            index.upsert(texts([f"{n:03d}" for n in range(200)], n=1), drawn(200, 4))
            index.delete(["000", "001"])
            server.kill()
            with pytest.raises(StoreError, match="Fail connecting"):
                opened(address, create=False, timeout=1)
            server.start()
            assert index.count() == 198 and len(index.search(drawn(1, 4), 500)[0]) == 198
    finally:
        server.kill()


@needs_milvus
def test_what_milvus_cannot_keep_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"milvus-lite:{tmp_path}/new/limits.db"
    with opened(address) as index:
        for item, what in (
            (Item.of(text="ü" * 40_000, id="b"), "text of item 'b' take 80000 bytes"),
            (Item.of(text="x", id="b", fields={"long": "y" * 66_000}), "fields of item 'b'"),
            (Item.of(text="x", id="b", fields={"long": "y" * 40_000}), "filter values of item 'b'"),
        ):
            with pytest.raises(InputError, match=what):
                index.upsert([*texts(["a"]), item], drawn(2, 4))
        monkeypatch.setattr("traceir.index.milvus.MAX_REQUEST_BYTES", 20_000)
        with pytest.raises(InputError, match=r"at most [0-9]+ such items a call"):
            index.upsert(texts([f"{n}" for n in range(200)]), drawn(200, 4))
        assert index.count() == 0
    with pytest.raises(StoreError, match="no index of float16 and width 4"):
        opened(f"milvus-lite:{tmp_path}/new/half.db", dtype="float16")
    for wrong in ("milvus-lite:items", f"milvus-lite:{tmp_path}/new/limits.db/a-b", f"milvus-lite:{tmp_path}/x.db/i_near_text"):
        with pytest.raises(StoreError, match=r"ends in \.db|letters, digits"):
            opened(wrong)
    monkeypatch.setenv("TRACEIR_MILVUS_TOKEN", "")
    with pytest.raises(StoreError, match="cannot be opened") as refused:
        opened("http://user:hidden-word@127.0.0.1:1/items", timeout=1)
    assert "hidden-word" not in str(refused.value)


@needs_milvus
def test_collections_of_other_programs_and_formats_are_refused(server: Server) -> None:
    from pymilvus import MilvusClient

    client = MilvusClient(f"http://127.0.0.1:{server.port}")
    client.create_collection("foreign", dimension=4)
    with pytest.raises(StoreError, match="another program"):
        opened(f"http://127.0.0.1:{server.port}/foreign")
    opened(f"http://127.0.0.1:{server.port}/later").close()
    client.alter_collection_properties("later", properties={"traceir": '{"format": 99}'})
    with pytest.raises(StoreError, match="format 99 but this version reads format 1"):
        opened(f"http://127.0.0.1:{server.port}/later")
    client.close()


def test_sortable_texts_keep_the_order_of_values() -> None:
    numbers: list[Any] = [
        -1e308,
        -(2**63),
        -(2**53) - 1,
        -(2**53),
        -1.5,
        -1,
        0,
        5e-324,
        1,
        2**53,
        2**53 + 1,
        2**63 - 1,
        2.0**63,
        1e308,
    ]
    assert [sortable(number) for number in numbers] == sorted({sortable(number) for number in numbers})
    assert sortable(-0.0) == sortable(0) and sortable(1) == sortable(1.0)
    words = ["", "a", "a\x7f", "aä", "b", "ä", "\uffff", "\U0001f989"]
    assert [sortable(word) for word in words] == sorted(sortable(word) for word in words)
    listed = 'json_contains_any(TT_69742773, ["7361792022686922"])'
    assert compile_filter(Eq("it's", 'say "hi"')) == f'(T_69742773 in ["7361792022686922"]) or ({listed})'


# The background of a cut-off


def drawn_background(draw: np.random.Generator, count: int = 30, dim: int = 4) -> Background:
    vectors: dict[Modality, Any] = {"text": directions(draw, count, dim), "image": directions(draw, 7, dim)}
    return Background(vectors, "drawn", "2026-01-01T00:00:00+00:00")


def directions(draw: np.random.Generator, count: int, dim: int = 4) -> Any:
    drawn = draw.normal(size=(count, dim)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def test_an_index_keeps_a_background_and_notices_changes(fresh: Callable[[], str]) -> None:
    draw = np.random.default_rng(0)
    address = fresh()
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
        index.upsert([Item.of(text="one", id="a")], directions(draw, 1))
        versions.append(index.version())
        index.upsert([Item.of(text="another", id="a")], directions(draw, 1))
        versions.append(index.version())
        index.delete(["a"])
        versions.append(index.version())
        assert index.version() == versions[-1] and len(set(versions[1:])) == len(versions) - 1
        for wrong in (Background({}, "", ""), Background({"text": np.zeros((1, 4), dtype=np.float32)}, "", "")):
            with pytest.raises(InputError):
                index.keep_background(wrong)
        with pytest.raises(InputError, match="4"):
            index.keep_background(drawn_background(draw, dim=5))
        read = index.background()
        assert read is not None and read.counts == {"text": 30, "image": 7}
    if not address.startswith("milvus-lite"):  # which keeps its file until the process ends
        with opened(address, create=False) as again:
            read = again.background()
            assert read is not None and read.counts == {"text": 30, "image": 7}


def test_a_copy_carries_the_background(fresh: Callable[[], str], tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    with opened(fresh()) as one, opened(str(tmp_path / "there")) as other, opened(fresh()) as third:
        one.upsert([Item.of(text="one", id="a")], directions(draw, 1))
        one.keep_background(drawn_background(draw))
        copy(one, other, progress=False)
        copy(other, third, progress=False)
        kept, carried = one.background(), third.background()
        assert kept is not None and carried is not None and kept.counts == carried.counts
        np.testing.assert_allclose(kept.vectors["text"], carried.vectors["text"], atol=1e-6)
