"""The embedded index: search against plain numpy, filters, refusals, durability, several processes and threads."""

from __future__ import annotations

import itertools
import multiprocessing
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fakes import vector_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from traceir.errors import InputError, StoreError
from traceir.images import ImageInput
from traceir.index import And, Eq, Filter, In, Range, SqliteIndex, open_index, sqlite
from traceir.index.filters import matches
from traceir.index.vectors import Rows
from traceir.index.sql import read_number
from traceir.index.store import size_of
from traceir.items import Hit, Item

Vectors = npt.NDArray[np.float32]
DOT = ImageInput.from_bytes(b"not decoded here", name="dot.png")


def opened(folder: Path, *, dim: int = 4, create: bool = True, **options: Any) -> SqliteIndex:
    return open_index(folder, fingerprint="m1", prompt_version="p1", dim=dim, create=create, **options)


def texts(ids: Sequence[str], **fields: Any) -> list[Item]:
    return [Item.of(text=f"text of {id}", id=id, fields=fields) for id in ids]


def unit(*rows: Sequence[float]) -> Vectors:
    array = np.asarray(rows, dtype=np.float64)
    return (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float32)


def drawn(rows: int, dim: int, seed: int = 0) -> Vectors:
    return unit(*np.random.default_rng(seed).normal(size=(rows, dim)))


def naive(
    items: Sequence[Item], vectors: Vectors, query: npt.NDArray[np.float32], k: int, where: Filter | None, modality: Any
) -> list[tuple[str, float]]:
    """Every item, one by one: the meaning of search."""
    scored = []
    for item, vector in zip(items, vectors, strict=True):
        assert item.id is not None
        if modality not in (None, item.modality):
            continue
        if where is None or matches(where, item.id, item.modality, item.fields):
            products = vector[None].astype(np.float64) * query.astype(np.float64)
            scored.append((item.id, float(np.clip(products.sum(axis=1), -1, 1).astype(np.float32)[0])))
    return sorted(scored, key=lambda pair: (-pair[1], pair[0]))[:k]


def pairs(hits: Sequence[Hit]) -> list[tuple[str, float]]:
    assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
    return [(hit.id, hit.score) for hit in hits]


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, -1]),
    st.sampled_from([0.0, 1.0, 1.5]),
    st.sampled_from(["", "0", "1", "a", "b", "ä"]),
)
NAMES = st.sampled_from(["x", "y"])
LEAVES: st.SearchStrategy[Filter] = st.one_of(
    st.builds(Eq, NAMES, VALUES),
    st.builds(In, NAMES, st.lists(VALUES, max_size=3).map(tuple)),
    st.builds(Range, NAMES, st.sampled_from([0, 1.0]), st.one_of(st.none(), st.just(1.5))),
    st.builds(Range, NAMES, st.none(), st.sampled_from(["a", "z"])),
    st.builds(Eq, st.just("modality"), st.sampled_from(["text", "image", "else"])),
    st.builds(In, st.just("id"), st.lists(st.sampled_from(["i0", "i3", "i30"]), max_size=3).map(tuple)),
    st.builds(Range, st.just("id"), st.just("i1"), st.just("i2")),
)
FILTERS = st.recursive(LEAVES, lambda inner: st.builds(And, st.lists(inner, max_size=3).map(tuple)), max_leaves=4)
# Few distinct vectors, so that ties are the rule.
CORNERS = st.sampled_from([(1, 0, 0, 0), (1, 1, 0, 0), (0, 1, 0, 0), (-1, 0, 0, 1), (0.3, 0.2, 0.1, 0.7)])
ITEMS = st.lists(st.tuples(CORNERS, st.sampled_from(["text", "image", "both"]), st.dictionaries(NAMES, VALUES)), max_size=40)


def item_of(number: int, kind: str, fields: dict[str, Any]) -> Item:
    text = None if kind == "image" else f"text {number}"
    return Item.of(text=text, image=None if kind == "text" else DOT, id=f"i{number}", fields=fields)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    described=ITEMS,
    queries=st.lists(CORNERS, min_size=1, max_size=3),
    k=st.integers(1, 12),
    where=st.one_of(st.none(), FILTERS),
    modality=st.sampled_from([None, "text", "image", "image,text"]),
    gone=st.sets(st.integers(0, 39)),
    data=st.data(),
)
def test_search_means_what_plain_numpy_says(
    tmp_path_factory: pytest.TempPathFactory,
    described: list[Any],
    queries: list[Any],
    k: int,
    where: Filter | None,
    modality: Any,
    gone: set[int],
    data: st.DataObject,
) -> None:
    items = [item_of(number, kind, fields) for number, (_, kind, fields) in enumerate(described)]
    vectors = unit(*(row[0] for row in described)) if items else np.empty((0, 4), dtype=np.float32)
    asked = unit(*queries)
    cut = data.draw(st.integers(0, len(items)))
    with opened(tmp_path_factory.mktemp("index")) as index:
        index.upsert(items[:cut], vectors[:cut])
        index.search(asked, k)  # loads the first part, so that the second comes in by a refresh
        index.upsert(items[cut:], vectors[cut:])
        index.delete([f"i{number}" for number in gone])
        left = [number for number in range(len(items)) if number not in gone]
        items, vectors = [items[number] for number in left], vectors[left]
        found = index.search(asked, k, where=where, modality=modality)
        assert [pairs(hits) for hits in found] == [naive(items, vectors, q, k, where, modality) for q in asked]
        kept = [item.id for item in items if where is None or matches(where, str(item.id), item.modality, item.fields)]
        assert index.count(where) == len(kept)
        assert [stored.id for stored in index.scan(where)] == sorted(map(str, kept))
        index.build_approximate(cells=3, probes=3)
        everywhere = [index.search(query[None], k, where=where, modality=modality, exact=False)[0] for query in asked]
        assert [pairs(hits) for hits in everywhere] == [pairs(hits) for hits in found]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.dictionaries(st.integers(0, 7), st.tuples(CORNERS, st.dictionaries(NAMES, VALUES)))),
        st.tuples(st.just("remove"), st.sets(st.integers(0, 7))),
        st.tuples(st.just("build"), st.integers(1, 3)),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS, filters=st.lists(FILTERS, min_size=1, max_size=3), query=CORNERS)
def test_filters_asked_again_see_what_was_added_replaced_removed_and_moved(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Any], filters: list[Filter], query: Any
) -> None:
    (asked,) = unit(query)
    there: dict[int, tuple[Item, npt.NDArray[np.float32]]] = {}
    folder = tmp_path_factory.mktemp("index")
    with opened(folder) as index, opened(folder) as other:
        for place, (kind, what) in enumerate(steps):
            writer = other if place % 2 else index
            if kind == "put":
                new = {n: (item_of(n, "text", fields), unit(corner)[0]) for n, (corner, fields) in what.items()}
                if new:
                    writer.upsert([item for item, _ in new.values()], np.stack([vector for _, vector in new.values()]))
                there |= new
            elif kind == "build":
                index.build_approximate(cells=what, probes=3)  # lays rows side by side
            else:
                writer.delete([f"i{number}" for number in what])
                there = {number: one for number, one in there.items() if number not in what}
            items = [item for item, _ in there.values()]
            vectors = np.stack([vector for _, vector in there.values()]) if there else np.empty((0, 4), dtype=np.float32)
            built = index.info().probes > 0
            for where, exact in itertools.product(filters, [True, False] if built else [True]):
                found = index.search(asked[None], 9, where=where, exact=exact)[0]
                assert pairs(found) == naive(items, vectors, asked, 9, where, None), (where, exact)


def test_what_passes_is_asked_for_once_and_then_for_what_is_new() -> None:
    rows = list(range(1, 101))
    asked: list[tuple[str, int]] = []
    passing = Passing(most=150)

    def numbers(condition: str, every: int) -> list[int]:
        def ask(after: int) -> Rows:
            asked.append((condition, after))
            return np.asarray([number for number in rows if number > after and number % every == 0], dtype=np.int64)

        return passing.numbers(condition, rows[-1], ask).tolist()

    assert numbers("tens", 10) == list(range(10, 101, 10)) == numbers("tens", 10)
    rows += range(101, 121)
    assert numbers("tens", 10) == list(range(10, 121, 10)) and asked == [("tens", 0), ("tens", 100)]
    assert len(numbers("all", 1)) == 120 and len(numbers("tens", 10)) == 12 and len(asked) == 3, "both are kept"
    assert len(numbers("pairs", 2)) == 60 and len(numbers("tens", 10)) == 12 and len(asked) == 4
    assert len(numbers("all", 1)) == 120 and asked[4:] == [("all", 0)], "what was asked for longest ago is dropped"
    assert len(numbers("pairs", 2)) == 60 and asked[5:] == [("pairs", 0)]


def test_numbers_of_what_was_replaced_do_not_pile_up() -> None:
    passing = Passing()
    for top in range(0, 200_000, 500):
        found = passing.numbers("all", top, lambda after, top=top: np.arange(max(after, top - 100), top, dtype=np.int64) + 1)
        assert len(found) <= 1600


def test_of_filters_with_few_rows_not_all_are_kept() -> None:
    passing = Passing()
    asked: list[int] = []

    def ask(condition: int) -> Rows:
        asked.append(condition)
        return np.empty(0, dtype=np.int64)

    for condition in [*range(300), *range(299, -1, -1)]:
        passing.numbers(condition, 9, lambda after, condition=condition: ask(condition))
    assert asked == [*range(300), *range(43, -1, -1)]


def test_a_deletion_that_was_rolled_back_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, ids = drawn(8, 4), [f"{n}" for n in range(8)]
    with opened(tmp_path) as index, opened(tmp_path) as other:
        index.upsert(texts(ids), vectors)
        assert len(index.search(vectors[:1], 9)[0]) == 8
        with monkeypatch.context() as patched:
            patched.setattr(index, "_place_new", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                index.upsert(texts(["0", "1"]), vectors[:2])
        other.delete(["7"])  # as many deletions as the one that never was
        assert sorted(hit.id for hit in index.search(vectors[:1], 9)[0]) == ids[:7]
        index.delete(["0"])
        other.delete(["6"])
        index.delete(["1"])
        assert sorted(hit.id for hit in index.search(vectors[:1], 9)[0]) == ids[2:6]
        index.delete(["2"])
        assert sorted(hit.id for hit in index.search(vectors[:1], 9)[0]) == ids[3:6]


def test_own_deletions_are_followed_without_reading_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, ids = drawn(80, 4), [f"{n:02d}" for n in range(80)]
    compared: list[Rows] = []
    keep_only = Growing.keep_only

    def counted(self: Growing, live: Rows) -> None:
        compared.append(live)
        keep_only(self, live)

    monkeypatch.setattr(Growing, "keep_only", counted)
    with opened(tmp_path) as index, opened(tmp_path) as other:
        index.upsert(texts(ids), vectors)
        for start in range(0, 40, 5):
            index.upsert(texts(ids[start : start + 5], again=True), vectors[start : start + 5])
            index.delete([ids[79 - start]])
            hits = index.search(vectors[:1], 99)[0]
            assert len(hits) == 79 - start // 5 and sum("again" in hit.fields for hit in hits) == start + 5
        assert not compared
        other.delete(["00"])
        assert "00" not in {hit.id for hit in index.search(vectors[:1], 99)[0]} and len(compared) == 1


def test_ties_beyond_k_go_by_id_also_across_blocks_and_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("traceir.index.matrix._BLOCK_SCORES", 1024)
    same = drawn(1, 48)
    others = drawn(3000, 48, seed=1)
    ids = [f"n{number:05d}" for number in np.random.default_rng(2).permutation(6000)]
    with opened(tmp_path, dim=48) as index:
        index.upsert(texts(ids), np.concatenate([np.repeat(same, 3000, axis=0), others]))
        single = index.search(same, 20)[0]
        assert [hit.id for hit in single] == sorted(ids[:3000])[:20]
        batch = index.search(np.concatenate([others[:7], same]), 20)
        assert batch[7] == single
        assert [index.search(one[None], 20)[0] for one in others[:7]] == batch[:7]


def test_everything_kept_comes_back(tmp_path: Path) -> None:
    fields = {"a": "ä\n", "b": 2**62, "c": 1.5, "d": True, "e": None}
    item = Item.of(text=" two\nlines ", image=DOT, id="x/ü.png", fields=fields)
    vector = drawn(1, 4)
    with opened(tmp_path) as index:
        assert index.upsert([item], vector) == {"x/ü.png"}
    with opened(tmp_path, create=False) as index:
        stored = index.get(["missing", "x/ü.png"], with_vectors=True)["x/ü.png"]
        assert (stored.text, stored.image, stored.modality) == ("two\nlines", "dot.png", "image,text")
        assert dict(stored.fields) == fields and stored.content_hash == item.content_hash()
        assert stored.vector is not None
        np.testing.assert_array_equal(stored.vector, vector[0])
        hit = index.search(vector, 5)[0][0]
        assert (hit.id, hit.text, hit.image, dict(hit.fields)) == (stored.id, stored.text, stored.image, fields)
        assert hit.score == pytest.approx(1.0, abs=1e-6)


def test_upsert_replaces_and_delete_removes(tmp_path: Path) -> None:
    first, second = unit([1, 0, 0, 0], [0, 1, 0, 0])
    with opened(tmp_path) as index:
        index.upsert(texts(["a", "b", "c"], year=1), np.stack([first, first, first]))
        assert [hit.id for hit in index.search(first[None], 9)[0]] == ["a", "b", "c"]
        index.upsert([Item.of(text="new", id="b", fields={"year": 2})], second[None])
        assert [hit.id for hit in index.search(second[None], 1)[0]] == ["b"]
        assert index.count() == 3 and index.count(Eq("year", 1)) == 2
        assert index.get(["b"])["b"].text == "new"
        assert index.delete(["a", "nobody"]) == 1
        assert index.delete(Eq("year", 2)) == 1
        assert [hit.id for hit in index.search(second[None], 9)[0]] == ["c"]
        assert index.delete([]) == 0
        with pytest.raises(InputError, match="single text"):
            index.delete("c")
        assert index.info().counts == {"text": 1}


def test_many_deletions_compact_without_losing_rows(tmp_path: Path) -> None:
    vectors = drawn(400, 4)
    with opened(tmp_path) as index:
        index.upsert(texts([f"{n:03d}" for n in range(400)]), vectors)
        index.search(vectors[:1], 1)
        for start in range(0, 390, 30):
            index.delete([f"{n:03d}" for n in range(start, start + 30)])
            expected = {f"{n:03d}" for n in range(start + 30, 400)}
            assert {hit.id for hit in index.search(vectors[:1], 400)[0]} == expected
        assert index.search(vectors[399:], 1)[0][0].id == "399"


def test_vectors_of_other_lengths_are_normalised(tmp_path: Path) -> None:
    with opened(tmp_path) as index:
        index.upsert(texts(["a", "b"]), np.asarray([[3, 0, 0, 0], [0, 0.001, 0, 0]], dtype=np.float32))
        hits = index.search(np.asarray([[50, 50, 0, 0]], dtype=np.float32), 2)[0]
        assert [hit.score for hit in hits] == pytest.approx([0.5**0.5] * 2, abs=1e-6)


@pytest.mark.parametrize(
    ("vectors", "reason"),
    [
        (np.full((2, 4), np.nan), "NaN or infinity"),
        (np.asarray([[1, 0, 0, 0], [np.inf, 0, 0, 0]]), "vector 1 of item 'b'"),
        (np.asarray([[1, 0, 0, 0], [0, 0, 0, 0]]), "length zero"),
        (np.ones((2, 5)), "5 wide but the index holds 4"),
        (np.ones((3, 4)), r"shape \[3, 4\]"),
        (np.ones(4), r"shape \[4\]"),
        (np.full((2, 4), "x"), "give float32"),
    ],
)
def test_bad_vectors_are_refused_and_nothing_is_written(tmp_path: Path, vectors: Any, reason: str) -> None:
    with opened(tmp_path) as index:
        with pytest.raises(InputError, match=reason):
            index.upsert(texts(["a", "b"]), vectors)
        assert index.count() == 0


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (Item.of(text="x"), "missing"),
        (Item.of(text="x", id=""), "missing"),
        (Item.of(text="x", id="a"), "twice"),
        (Item.of(text="x", id="ü" * 513), "1026 bytes"),
        (Item.of(text="x", id="a\0b"), "zero character"),
        (Item.of(text="x", id="\ud800"), "Unicode"),
        (Item.of(text="\ud800", id="b"), "Unicode"),
        (Item.of(text="x", id="b", fields={"modality": "text"}), "keeps itself"),
        (Item.of(text="x", id="b", fields={"": 1}), "field name"),
        (Item.of(text="x", id="b", fields={"n": float("nan")}), "finite"),
        (Item.of(text="x", id="b", fields={"n": 2**63}), "64-bit"),
        (Item.of(text="x", id="b", fields={"n": [[1]]}), "list"),
    ],
)
def test_bad_items_are_refused_and_nothing_is_written(tmp_path: Path, item: Item, reason: str) -> None:
    with opened(tmp_path) as index:
        with pytest.raises(InputError, match=reason):
            index.upsert([*texts(["a"]), item], drawn(2, 4))
        assert index.count() == 0


def test_bad_searches_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as index:
        with pytest.raises(InputError, match="k is 0"):
            index.search(drawn(1, 4), 0)
        with pytest.raises(InputError, match="'video' is unknown"):
            index.search(drawn(1, 4), 1, modality="video")
        with pytest.raises(InputError, match="3 wide"):
            index.search(drawn(1, 3), 1)
        with pytest.raises(InputError, match="not a filter"):
            index.count("year = 1")
        assert index.search(drawn(2, 4), 3) == [[], []]
        assert index.search(np.empty((0, 4), dtype=np.float32), 3) == []


def test_texts_numbers_and_booleans_never_mix_in_filters(tmp_path: Path) -> None:
    values: list[Any] = [1, 1.0, True, "1", None, 0, False, "", 2**53 + 1, float(2**53)]
    with opened(tmp_path) as index:
        items = [Item.of(text="x", id=f"{n}", fields={"v": value}) for n, value in enumerate(values)]
        index.upsert([*items, Item.of(text="x", id="none")], drawn(11, 4))
        for where, expected in [
            (Eq("v", 1), "0 1"),
            (Eq("v", True), "2"),
            (Eq("v", "1"), "3"),
            (Eq("v", None), "4 none"),
            (Eq("v", False), "6"),
            (In("v", (0, "")), "5 7"),
            (Eq("v", 2**53), "9"),
            (Range("v", 0, 1), "0 1 5"),
            (Range("v", "", None), "3 7"),
            (And(()), "0 1 2 3 4 5 6 7 8 9 none"),
            (In("v", ()), ""),
            (Eq("id", 1), ""),
            (Eq("id", None), ""),
        ]:
            assert " ".join(stored.id for stored in index.scan(where)) == expected, where


def test_bad_filters_are_refused() -> None:
    for make in (
        lambda: Range("a"),
        lambda: Range("a", 1, "b"),
        lambda: Range("a", True, None),
        lambda: In("a", "abc"),
        lambda: Eq("", 1),
        lambda: Eq("a", float("inf")),
        lambda: In("a", tuple(range(10_001))),
    ):
        with pytest.raises(InputError):
            make()


def test_another_model_prompt_or_width_is_refused_with_both_names(tmp_path: Path) -> None:
    opened(tmp_path).close()
    with pytest.raises(StoreError, match=r"model 'm1' but 'm2'.*new index"):
        open_index(tmp_path, fingerprint="m2", prompt_version="p1")
    with pytest.raises(StoreError, match="prompt version 'p1' but 'p2'"):
        open_index(tmp_path, fingerprint="m1", prompt_version="p2", create=True, dim=4)
    with pytest.raises(StoreError, match="width 4, not 8"):
        opened(tmp_path, dim=8)


def test_without_a_model_an_index_can_be_looked_at_and_pruned_only(tmp_path: Path) -> None:
    with opened(tmp_path) as index:
        index.upsert(texts(["a", "b"]), drawn(2, 4))
    with open_index(tmp_path, fingerprint=None, prompt_version=None) as index:
        assert index.info().fingerprint == "m1" and index.delete(["a"]) == 1 and index.count() == 1
        with pytest.raises(StoreError, match="without a model"):
            index.search(drawn(1, 4), 1)
        with pytest.raises(StoreError, match="without a model"):
            index.upsert(texts(["c"]), drawn(1, 4))
    with pytest.raises(InputError, match="needs the encoder's fingerprint"):
        open_index(tmp_path / "new", fingerprint=None, prompt_version=None, create=True)


def test_missing_foreign_and_closed_indexes(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no index at"):
        opened(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(StoreError, match="no adapter"):
        opened(Path("http:/a.example"))
    (tmp_path / "other").mkdir()
    with sqlite3.connect(tmp_path / "other" / "index.sqlite") as other:
        other.execute("CREATE TABLE mine (x)")
    with pytest.raises(StoreError, match="not an index of TraceIR"):
        opened(tmp_path / "other")
    index = opened(tmp_path / "new")
    index.close()
    index.close()
    with pytest.raises(StoreError, match="closed"):
        index.count()


def test_another_format_number_is_refused(tmp_path: Path) -> None:
    opened(tmp_path).close()
    with sqlite3.connect(tmp_path / "index.sqlite") as file:
        file.execute("UPDATE meta SET value = '99' WHERE name = 'format'")
    with pytest.raises(StoreError, match="format 99 but this version reads format 1"):
        opened(tmp_path)


def test_damage_is_named(tmp_path: Path) -> None:
    with opened(tmp_path) as index:
        index.upsert(texts([f"a{n}" for n in range(200)]), drawn(200, 4))
    path = tmp_path / "index.sqlite"
    whole = path.read_bytes()
    path.write_bytes(b"something else" * 1000)
    with pytest.raises(StoreError, match="damaged"):
        opened(tmp_path)
    path.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(StoreError, match="damaged"), opened(tmp_path) as index:
        index.search(drawn(1, 4), 5)
    path.write_bytes(whole)
    with sqlite3.connect(path) as file:
        file.execute("UPDATE vectors SET vector = x'00' WHERE n = 5")
    with opened(tmp_path) as index:
        for _ in range(2):  # and the failed load leaves nothing half read behind
            with pytest.raises(StoreError, match="'a4' has no whole vector"):
                index.search(drawn(1, 4), 5)
        index.delete(["a4"])
        assert len(index.search(drawn(1, 4), 500)[0]) == 199


def test_a_second_writer_waits_then_says_so(tmp_path: Path) -> None:
    with opened(tmp_path) as first, opened(tmp_path, timeout=0.05) as second:
        other = sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"locked.*0\.05 seconds"):
            second.upsert(texts(["a"]), drawn(1, 4))
        assert second.search(drawn(1, 4), 1) == [[]]  # reading goes on
        other.execute("ROLLBACK")
        other.close()
        second.upsert(texts(["a"]), drawn(1, 4))
        assert first.count() == 1


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as index:
        index.upsert(texts(["a", "b"]), drawn(2, 4))

        def fail(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(index, "_place_new", fail)
        with pytest.raises(KeyboardInterrupt):
            index.upsert(texts(["b", "c"]), drawn(2, 4, seed=1))
        assert sorted(index.get(["a", "b", "c"])) == ["a", "b"]
        assert [hit.id for hit in index.search(drawn(2, 4)[1:], 1)[0]] == ["b"]
        assert index.search(drawn(2, 4)[1:], 1)[0][0].score == pytest.approx(1.0, abs=1e-6)


def test_commits_are_forced_to_disk(tmp_path: Path) -> None:
    with opened(tmp_path) as index:
        assert index._connection.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert index._connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_half_precision_halves_the_vectors_and_says_so(tmp_path: Path) -> None:
    vectors = drawn(500, 64)
    with opened(tmp_path / "half", dim=64, dtype="float16") as half, opened(tmp_path / "full", dim=64) as full:
        for index in (half, full):
            index.upsert(texts([f"{n}" for n in range(500)]), vectors)
        assert half.info().dtype == "float16"
        length = "SELECT length(vector) FROM vectors LIMIT 1"
        assert half._connection.execute(length).fetchone()[0] * 2 == full._connection.execute(length).fetchone()[0]
        near, true = half.search(vectors[:20], 5), full.search(vectors[:20], 5)
        for ours, theirs in zip(near, true, strict=True):
            assert [hit.score for hit in ours] == pytest.approx([hit.score for hit in theirs], abs=1e-3)
            assert ours[0].id == theirs[0].id


def clustered(rows: int, dim: int = 24) -> Vectors:
    generator = np.random.default_rng(3)
    centres = generator.normal(size=(60, dim))
    return unit(*(centres[generator.integers(0, 60, rows)] + 0.4 * generator.normal(size=(rows, dim))))


def no_cells(*_: object) -> None:
    raise ZeroDivisionError("cells are visited")


def test_approximate_search_is_refused_until_built_then_finds_most_by_visiting_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = clustered(3000)
    items = [Item.of(text=f"t{n}", id=f"{n:04d}", fields={"odd": n % 2 == 1, "rare": n % 100 == 0}) for n in range(3000)]
    with opened(tmp_path, dim=24) as index:
        index.upsert(items[:2900], vectors[:2900])
        with pytest.raises(StoreError, match="build_approximate"):
            index.search(vectors[:1], 10, exact=False)
        index.build_approximate(cells=60, probes=6)
        index.upsert(items[2900:], vectors[2900:])  # placed as they come
        assert read_number(index._connection, "SELECT count(*) FROM cells") == 3000
        assert index.search(vectors[2950:2951], 1, exact=False)[0][0].id == "2950"
        for where, least in ((None, 0.9), (Eq("odd", True), 0.9), (Eq("rare", True), 1.0)):
            near = [index.search(query[None], 10, where=where, exact=False)[0] for query in vectors[::30]]
            true = index.search(vectors[::30], 10, where=where)
            assert [len(hits) for hits in near] == [len(hits) for hits in true]
            shared = [len({h.id for h in a} & {h.id for h in b}) / len(b) for a, b in zip(near, true, strict=True)]
            assert np.mean(shared) >= least
        # Fewer rows pass than the probes would visit, but more than k: all of them are compared.
        exact = [pairs(hits) for hits in index.search(vectors[::30], 3, where=Eq("rare", True))]
        near = [index.search(query[None], 3, where=Eq("rare", True), exact=False)[0] for query in vectors[::30]]
        assert [pairs(hits) for hits in near] == exact
        # So many queries at a time visit everything anyway.
        exact = [pairs(hits) for hits in index.search(vectors[::30], 10)]
        with monkeypatch.context() as patched:
            patched.setattr("traceir.index.sqlite.rows_of_nearest_cells", no_cells)
            assert [pairs(hits) for hits in index.search(vectors[::30], 10, exact=False)] == exact
            with pytest.raises(ZeroDivisionError):
                index.search(vectors[:1], 10, exact=False)
        assert index.info().cells == 60 and index.info().probes == 6
    with opened(tmp_path, dim=24) as index:
        shard = index._snapshot(None)
        from traceir.index.cells import rows_of_nearest_cells

        visited = rows_of_nearest_cells(shard.shards["text"], shard.centroids["text"], vectors[0], 10, None, 6)
        assert 10 <= len(visited) < 1000
        one_cell = rows_of_nearest_cells(shard.shards["text"], shard.centroids["text"], vectors[0], 2000, None, 1)
        assert len(one_cell) >= 2000  # more cells are visited while there are fewer rows than asked for
        index.delete([f"{n:04d}" for n in range(0, 3000, 2)])
        near = index.search(vectors[:5], 10, exact=False)
        assert all(int(hit.id) % 2 for hits in near for hit in hits)


def test_a_build_that_another_handle_made_is_noticed(tmp_path: Path) -> None:
    vectors = clustered(300)
    with opened(tmp_path, dim=24) as one, opened(tmp_path, dim=24) as two:
        one.upsert(texts([f"{n:03d}" for n in range(200)]), vectors[:200])
        one.build_approximate(cells=8, probes=2)
        two.upsert(texts([f"{n:03d}" for n in range(200, 300)]), vectors[200:])
        one.build_approximate(cells=5, probes=5)
        two.upsert(texts(["last"]), vectors[:1])
        assert read_number(two._connection, "SELECT max(cell) FROM cells") == 4
        exact = [pairs(hits) for hits in two.search(vectors[:20], 10)]
        assert [pairs(hits) for hits in two.search(vectors[:20], 10, exact=False)] == exact
        assert [pairs(hits) for hits in one.search(vectors[:20], 10, exact=False)] == exact


def test_a_modality_that_came_after_the_build_is_found(tmp_path: Path) -> None:
    with opened(tmp_path) as index:
        index.upsert(texts(["a", "b"]), drawn(2, 4))
        index.build_approximate()
        index.upsert([Item.of(image=DOT, id="c")], drawn(1, 4, seed=5))
        assert index.search(drawn(1, 4, seed=5), 1, modality="image", exact=False)[0][0].id == "c"


def write_batches(folder: str, batches: int) -> None:
    with opened(Path(folder), create=False, timeout=30) as index:
        for batch in range(batches):
            ids = [f"{batch:03d}-{n}" for n in range(5)]
            index.upsert(texts(ids, batch=batch), np.stack([vector_of(id, 4) for id in ids]))
            if batch % 3 == 2:
                index.upsert(texts(ids, batch=batch), np.stack([vector_of(id, 4) for id in ids]))


def test_a_reader_sees_whole_batches_while_another_process_writes(tmp_path: Path) -> None:
    with opened(tmp_path) as index:
        writer = multiprocessing.get_context("spawn").Process(target=write_batches, args=(str(tmp_path), 30))
        writer.start()
        seen = [0]
        while writer.is_alive() or seen[-1] == 0:
            hits = index.search(vector_of("000-3", 4)[None], 1000)[0]
            assert len(hits) % 5 == 0 and len({hit.id for hit in hits}) == len(hits)
            if hits:
                assert hits[0].id == "000-3"
            seen.append(len(hits))
            if not writer.is_alive() and writer.exitcode != 0:
                break
        writer.join()
        assert writer.exitcode == 0
        assert seen == sorted(seen)
        assert len(index.search(vector_of("000-3", 4)[None], 1000)[0]) == 150
        stored = index.get([f"{batch:03d}-{n}" for batch in range(30) for n in range(5)], with_vectors=True)
        assert len(stored) == 150
        for id, row in stored.items():
            np.testing.assert_array_equal(row.vector, vector_of(id, 4))


def test_two_processes_may_write_in_turns(tmp_path: Path) -> None:
    opened(tmp_path).close()
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_batches, args=(str(tmp_path), 12)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    with opened(tmp_path) as index:
        assert index.count() == 60 == len(index.search(drawn(1, 4), 1000)[0])


def test_a_log_that_goes_while_it_is_measured_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"abc")
    assert size_of([tmp_path / "there", tmp_path / "gone"]) == 3
    with opened(tmp_path / "index") as index:
        assert index.info().bytes >= (tmp_path / "index" / "index.sqlite").stat().st_size


def replace_while_looking(monkeypatch: pytest.MonkeyPatch, change: Callable[[int], object]) -> list[int]:
    """From now on `change` is called, with how many times before, between the finding of rows and the reading of them."""
    looks: list[int] = []
    whole = sqlite.exact_rows

    def found(*given: Any) -> list[Rows]:
        looks.append(len(looks))
        change(looks[-1])
        return whole(*given)

    monkeypatch.setattr(sqlite, "exact_rows", found)
    return looks


def test_what_is_replaced_at_every_look_is_answered_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, ids = drawn(8, 4), [f"{n}" for n in range(8)]
    with opened(tmp_path) as index, opened(tmp_path) as other:
        index.upsert(texts(ids, look=-1), vectors)
        looks = replace_while_looking(monkeypatch, lambda n: other.upsert(texts(ids, look=n), vectors))
        hits = index.search(vectors[3:4], 8)[0]
        assert hits[0].id == "3" and sorted(hit.id for hit in hits) == ids
        assert {hit.fields["look"] for hit in hits} == {looks[-1] - 1}  # of the moment before the last look, and no later one
        assert looks == [0, 1, 2, 3]
        assert other.get(["3"])["3"].fields["look"] == 3 and index.count() == 8


def test_the_last_look_lets_threads_that_write_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, ids = drawn(8, 4), [f"{n}" for n in range(8)]
    writers: list[threading.Thread] = []
    with opened(tmp_path) as index:
        index.upsert(texts(ids), vectors)

        def write(look: int) -> None:
            writers.append(threading.Thread(target=index.upsert, args=(texts(ids), vectors)))
            writers[-1].start()
            writers[-1].join(None if look < 3 else 0.2)

        replace_while_looking(monkeypatch, write)
        assert sorted(hit.id for hit in index.search(vectors[:1], 8)[0]) == ids
        for writer in writers:
            writer.join()
        assert len(writers) == 4 and index.count() == 8


def test_rows_that_another_program_removed_are_named(tmp_path: Path) -> None:
    with opened(tmp_path) as index:
        index.upsert(texts(["a", "b"]), drawn(2, 4))
        assert len(index.search(drawn(1, 4), 2)[0]) == 2
        with sqlite3.connect(tmp_path / "index.sqlite") as strange:
            strange.execute("DELETE FROM items WHERE id = 'a'")
        with pytest.raises(StoreError, match="another program"):
            index.search(drawn(1, 4), 2)
    with opened(tmp_path) as index:
        assert [hit.id for hit in index.search(drawn(1, 4), 2)[0]] == ["b"]


def test_threads_share_one_index(tmp_path: Path) -> None:
    vectors = drawn(200, 4)
    ids = [f"{n:03d}" for n in range(200)]
    failures: list[BaseException] = []
    with opened(tmp_path) as index:
        index.upsert(texts(ids[:100]), vectors[:100])

        def read() -> None:
            try:
                for n in range(60):
                    hit = index.search(vectors[n : n + 1], 1)[0][0]
                    assert hit.score == pytest.approx(1.0, abs=1e-6) and hit.id == ids[n]
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for n in range(100, 200, 10):
            index.upsert(texts(ids[n : n + 10]), vectors[n : n + 10])
            index.upsert(texts(ids[:50]), vectors[:50])  # replaced under the readers' hands
        for thread in threads:
            thread.join()
        assert not failures
        assert index.count() == 200
