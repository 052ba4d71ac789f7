"""Modes, terms, folding, order, cursors and reranking, through Searcher; tests/test_serve_search.py has the same over HTTP."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import image_of
from fakes import FakeEncoder, vector_of
from hypothesis import given, settings
from hypothesis import strategies as st

from traceir.errors import InputError, ModelError
from traceir.index import open_index
from traceir.index.store import Index
from traceir.items import Item, Query, Vector
from traceir.retrieval.cursor import MAX_SHOWN, Cursor
from traceir.retrieval.rerank import load_reranker
from traceir.retrieval.search import Searcher

CAMERA = {"camera": "Pixel 8"}


class Recorder(FakeEncoder):
    """Keeps what it was asked to encode, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[Query]] = []

    def encode_queries(self, queries: Sequence[Query], **options: Any) -> Any:
        self.asked.append(list(queries))
        return super().encode_queries(queries, **options)


class Longest:
    """A reranker for which the longest text is the best."""

    name = "longest"

    def __init__(self) -> None:
        self.read: list[list[str | None]] = []

    def score(
        self, query: Query, items: Sequence[Item], *, reasoning: str = "", similarities: Sequence[float] | None = None
    ) -> list[float]:
        self.read.append([item.id for item in items])
        self.similarities = similarities
        return [float(len(item.text)) for item in items]


@pytest.fixture
def searcher(tmp_path: Path) -> Iterator[Searcher]:
    encoder = Recorder()
    with open_index(tmp_path / "index", encoder, create=True) as index:
        yield Searcher(encoder, index)


def vector(text: str) -> Vector:
    """What the encoder makes of a text."""
    return vector_of(Item.of(text=text).content_hash(), 16)


def beside(query: str, cosine: float, seed: int = 0) -> Vector:
    """A vector of this cosine to that of a query."""
    axis, other = vector(query), np.random.default_rng(seed).normal(size=16)
    other -= (other @ axis) * axis
    made: Vector = (cosine * axis + np.sqrt(1 - cosine**2) * other / np.linalg.norm(other)).astype(np.float32)
    return made


def keep(index: Index, *kept: tuple[Item, Vector]) -> None:
    index.upsert([item for item, _ in kept], np.stack([vector for _, vector in kept]))


def shelf(index: Index, cosines: dict[str, float], query: str = "cup", **texts: str) -> None:
    """Items of these cosines to a query; their text is their id, where none is given."""
    items = (
        (Item.of(text=texts.get(id, id), id=id, fields={"rank": n}), cosine) for n, (id, cosine) in enumerate(cosines.items())
    )
    keep(index, *((item, beside(query, cosine, n)) for n, (item, cosine) in enumerate(items)))


def ids(result: Any) -> list[str]:
    return [hit.id for hit in result.hits]


# Modes


def test_words_alone_need_no_encoder(searcher: Searcher, tmp_path: Path) -> None:
    shelf(searcher.index, {"a": 0.9, "b": 0.1, "c": 0.5}, a="a dog", b="a red cup", c="a red hat")
    with open_index(tmp_path / "index") as index:
        alone = Searcher(None, index)
        result = alone.search("cup", mode="keyword", where="rank<=1")
        assert ids(result) == ["b"] and result.encoding is None and result.hits[0].rank == 1
        assert result.hits[0].scores == {"keyword": result.hits[0].score} and result.next is None
        assert ids(alone.search("red -hat", mode="keyword")) == ["b"]
        for asked, options, message in (
            (Query.of(text="cup", image=image_of(1)), {"mode": "keyword"}, "has an image"),
            (Query((), instruction="find it"), {"mode": "keyword"}, "has no words"),
            (Query.of(text="cup"), {}, "no encoder"),
            (Query.of(text="cup"), {"mode": "keyword", "terms": [(1.0, "x")]}, "write -WORD"),
            (Query.of(text="cup"), {"mode": "keyword", "cutoff": 0.01}, "a cut-off judges vectors"),
        ):
            with pytest.raises(InputError, match=message):
                alone.search(asked, **options)


def test_both_are_fused_by_reciprocal_rank(searcher: Searcher) -> None:
    shelf(searcher.index, {"a": 0.9, "b": 0.5, "c": 0.1}, a="dog", b="cup", c="cup and cup")
    result = searcher.search("cup", mode="hybrid")
    by_words = ids(searcher.search("cup", mode="keyword"))
    assert sorted(by_words) == ["b", "c"]
    wanted = {
        id: 0.5 * 61 / (61 + "abc".index(id)) + (0.5 * 61 / (61 + by_words.index(id)) if id in by_words else 0) for id in "abc"
    }
    assert {hit.id: hit.score for hit in result.hits} == pytest.approx(wanted)
    assert ids(result) == sorted("abc", key=lambda id: -wanted[id]) and [hit.rank for hit in result.hits] == [1, 2, 3]
    assert [set(hit.scores) for hit in sorted(result.hits, key=lambda hit: hit.id)] == [
        {"vector"}, {"vector", "keyword"}, {"vector", "keyword"},
    ]  # fmt: skip
    assert ids(searcher.search("cup", mode="hybrid", keyword_weight=0)) == ["a", "b", "c"]
    assert ids(searcher.search("cup", mode="hybrid", keyword_weight=1)) == by_words
    image = Query.of(image=image_of(1))
    for wordless in (image, Query.of(text="!!!")):
        assert ids(searcher.search(wordless, mode="hybrid")) == ids(searcher.search(wordless)), "the vector decides"
    shelf(searcher.index, {"d": 0, "e": 0}, d="red hat", e="a red hat beside a blue cup of tea on a wooden table")
    for asked in ("red hat cup", "red hat cu*"):
        assert ids(searcher.search(asked, mode="keyword"))[0] == "e", "it holds all the words"
    assert ids(searcher.search('red "hat" -tea', mode="keyword")) == ["d"]


def test_with_a_cutoff_hits_by_all_words_stay(searcher: Searcher) -> None:
    shelf(searcher.index, {"a": 0.99, "b": 0.0, "c": 0.0}, "a blue cup", a="dog", b="some blue hat", c="a blue tea cup")
    searcher.calibrate([Query.of(text=f"background {n}") for n in range(100)])
    assert ids(searcher.search("a blue cup", cutoff=0.05)) == ["a"]
    result = searcher.search("a blue cup", mode="hybrid", cutoff=0.05)
    assert set(ids(result)) == {"a", "c"} and result.cut is not None and result.cut.below == 2 and result.next is None
    shelf(searcher.index, {f"more {n}": 0 for n in range(200)}, "a blue cup", **{f"more {n}": f"a cup {n}" for n in range(200)})
    for words in ("a blue cup", "a blue cu*"):
        pages = [searcher.search(words, k=1, mode="hybrid", cutoff=0.05)]
        while pages[-1].next and len(pages) < 9:
            pages.append(searcher.search(words, k=1, mode="hybrid", cutoff=0.05, after=pages[-1].next))
        assert pages[-1].next is None
        assert {hit.id for page in pages for hit in page.hits if "vector" not in hit.scores} == {"c"}, "others are near"


def test_a_word_with_digits_is_there_in_one_of_its_forms(searcher: Searcher) -> None:
    texts = {
        "IMG-2034.JPG": "a red sea",
        "b": "the red img2034",
        "c": "img2034",
        "d": "red img 2035",
        "e": "img2034 is not red now",
    }
    shelf(searcher.index, dict.fromkeys(texts, 0.0), "img2034 red", **texts)
    searcher.calibrate([Query.of(text=f"background {n}") for n in range(100)])
    for asked in ("img2034 red -now", "img20* red -now"):
        pages = [searcher.search(asked, mode=mode, cutoff=rate) for mode, rate in (("keyword", None), ("hybrid", 0.05))]
        by_words = [{hit.id for hit in page.hits if "keyword" in hit.scores} for page in pages]
        both, either = {"IMG-2034.JPG", "b"}, {"IMG-2034.JPG", "b", "c", "d"}
        assert set(ids(pages[0])[:2]) == both if "*" not in asked else {"b", "IMG-2034.JPG"} >= by_words[1] >= {"b"}
        assert by_words[0] <= either and by_words[1] >= {"b"} and "e" not in by_words[0] | by_words[1]


def test_words_that_must_not_be_there_are_heard_behind_a_long_query(searcher: Searcher) -> None:
    words = " ".join(f"{'w' * 61}{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(62))
    shelf(searcher.index, {"a": 0.5, "b": 0.5}, a=words, b=f"{words} secret")
    assert ids(searcher.search(f"{words} -secret", mode="keyword")) == ["a"]


# Terms


def test_terms_move_the_query(searcher: Searcher) -> None:
    shelf(searcher.index, {"a": 0.9})
    encoder = searcher.encoder
    assert isinstance(encoder, Recorder)
    query = Query.of(text="cup", instruction="find it", target="text")
    moved = searcher.search(query, terms=[(-0.5, "hat"), (2, Query.of(text="dog"))])
    [asked] = encoder.asked
    assert asked == [query, Query.of(text="hat", instruction="find it", target="text"), Query.of(text="dog")]
    total = vector("cup") - 0.5 * vector("hat") + 2 * vector("dog")
    kept = searcher.index.get(["a"], with_vectors=True)["a"].vector
    assert kept is not None and moved.hits[0].score == pytest.approx(total @ kept / np.linalg.norm(total), abs=1e-5)
    for terms, message in (
        ([(-1, "cup")], "cancel the query out"), ([(11, "hat")], "from -10 to 10"), ([(float("nan"), "hat")], "weight of a term"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            searcher.search("cup", terms=terms)


# Folding


def test_what_is_alike_is_put_under_the_best(searcher: Searcher) -> None:
    near = [beside("cup", 0.9, 7), beside("hat", 0.9, 7)]

    def like(base: Vector, cosine: float, seed: int) -> Vector:
        other = np.random.default_rng(seed).normal(size=16)
        other -= (other @ base) * base
        made: Vector = (cosine * base + np.sqrt(1 - cosine**2) * other / np.linalg.norm(other)).astype(np.float32)
        return made

    def photo(id: str, seed: int, **fields: Any) -> Item:
        return Item.of(image=image_of(seed), id=id, fields=fields)

    first = {"date": "2024-05-01T10:00:00", **CAMERA}
    keep(
        searcher.index,
        (photo("best", 1, **first), near[0]),
        (photo("same", 2), like(near[0], 0.995, 1)),
        (photo("burst", 3, date="2024-05-01T10:00:09", **CAMERA), like(near[0], 0.95, 2)),
        (photo("later", 4, date="2024-05-01T10:00:11", **CAMERA), like(near[0], 0.95, 3)),
        (photo("other camera", 5, date="2024-05-01T10:00:01", camera="X100"), like(near[0], 0.95, 4)),
        (photo("day", 6, date="2024-05-01", **CAMERA), like(near[0], 0.95, 5)),
        (Item.of(text="a text", id="text"), like(near[0], 0.995, 6)),
        (Item.of(image=image_of(1), id="copy"), near[1]),
    )
    everything = searcher.search("cup", k=20)
    assert len(everything.hits) == 8 and not any(hit.similar for hit in everything.hits)
    folded = {hit.id: set(hit.similar) for hit in searcher.search("cup", k=20, fold=True).hits}
    [best] = [id for id, similar in folded.items() if similar]
    assert {best, *folded[best]} == {"best", "same", "burst", "copy"}
    assert set(folded) == {best, "later", "other camera", "day", "text"}
    loose = searcher.search("cup", k=20, fold=0.5)
    assert sum(1 + len(hit.similar) for hit in loose.hits) == 8 and len(loose.hits) < len(folded)
    assert [hit.rank for hit in loose.hits] == list(range(1, len(loose.hits) + 1))


def test_a_page_is_filled_behind_many_copies(searcher: Searcher) -> None:
    copies = [(Item.of(text="copy", id=f"c{n:03}"), beside("cup", 0.9)) for n in range(300)]
    others = [(Item.of(text=f"other {n}", id=f"o{n}"), beside("cup", 0.1, n)) for n in range(5)]
    keep(searcher.index, *copies, *others)
    result = searcher.search("cup", k=4, fold=True)
    assert len(result.hits) == 4 and result.hits[0].id == "c000" and len(result.hits[0].similar) == 299
    rest = searcher.search("cup", k=4, fold=True, after=result.next)
    assert len(rest.hits) == 2 and rest.next is None and [hit.rank for hit in rest.hits] == [5, 6]


# Order


def test_what_is_relevant_is_sorted_by_a_field(searcher: Searcher) -> None:
    values: list[Any] = ["2024-02", "2024-01", None, 7, "2024-01"]
    keep(
        searcher.index,
        *((Item.of(text=f"t{n}", id=f"t{n}", fields={"date": value}), beside("cup", 0.9, n)) for n, value in enumerate(values)),
        *((Item.of(text=f"far {n}", id=f"far{n}", fields={"date": "2020"}), beside("cup", 0.1, n)) for n in range(120)),
    )
    where = "id~t*"
    for sort in ("date", "-date", "id", "-id"):
        wanted = [stored.id for stored in searcher.index.browse(where, sort=sort, limit=10)]
        assert ids(searcher.search("cup", where=where, sort=sort)) == wanted
    pages = [searcher.search("cup", k=30, sort="-date")]
    while pages[-1].next:
        pages.append(searcher.search("cup", k=30, sort="-date", after=pages[-1].next))
    seen = [id for page in pages for id in ids(page)]
    assert len(seen) == len(set(seen)) == 100 and {f"t{n}" for n in range(5)} <= set(seen), "the 100 best, and no others"
    assert seen[:1] == ["t0"] and seen[-1] == "t2"
    searcher.calibrate([Query.of(text=f"background {n}") for n in range(100)])
    assert ids(searcher.search("cup", sort="-date", cutoff=0.05, k=3, where=where)) == ["t0", "t1", "t4"]


# Pages


def test_pages_follow_each_other_and_say_where_they_end(searcher: Searcher) -> None:
    shelf(searcher.index, {f"t{n}": 0.9 - n / 10 for n in range(7)})
    first = searcher.search("cup", k=3)
    second = searcher.search("cup", k=3, after=first.next)
    third = searcher.search("cup", k=3, after=second.next)
    assert [ids(page) for page in (first, second, third)] == [["t0", "t1", "t2"], ["t3", "t4", "t5"], ["t6"]]
    assert [hit.rank for hit in (*second.hits, *third.hits)] == [4, 5, 6, 7] and third.next is None
    assert searcher.search("cup", k=7).next is None
    with pytest.raises(InputError, match="more than 10000"):
        searcher.search("cup", after=Cursor().past(map(str, range(MAX_SHOWN + 1)), 5).write())


@pytest.mark.parametrize("cursor", ["x", "", "dGlyMQ==", "é", Cursor(frozenset({b"12345678"}), 1).write()[:-4], "A" * 400])
def test_what_is_no_cursor_is_refused(searcher: Searcher, cursor: str) -> None:
    with pytest.raises(InputError, match=r"cursor \(after\)"):
        searcher.search("cup", after=cursor)


CHANGES = st.lists(st.tuples(st.integers(0, 39), st.booleans()), max_size=6)


PAGED: list[dict[str, Any]] = [{}, {"mode": "hybrid"}, {"fold": True}, {"sort": "-date"}, {"mode": "keyword", "fold": 0.9}]


def page_through(
    folder: Path, options: dict[str, Any], there: set[int], sizes: Iterator[int], changes: Iterator[list[tuple[int, bool]]]
) -> None:
    """Pages of these sizes over items that come (True) and go between them: what stayed is shown once, nothing twice."""

    def made(number: int) -> tuple[Item, Vector]:
        words = ["cup", "red cup", "red", "hat"][number % 4]
        item = Item.of(text=f"{words} {number}", id=f"i{number}", fields={"date": number % 5} if number % 3 else {})
        return item, beside("red cup", 0.1 + (number * 7 % 40) / 50, number // 3)

    encoder = FakeEncoder()
    with open_index(folder / "index", encoder, create=True) as index:
        searcher = Searcher(encoder, index)
        keep(index, *map(made, sorted(there)))
        stayed, seen, after = set(there), list[str](), None
        for _ in range(60):
            page = searcher.search("red cup", k=next(sizes), after=after, **options)
            seen += itertools.chain.from_iterable((hit.id, *hit.similar) for hit in page.hits)
            if not (after := page.next):
                break
            for number, comes in next(changes):
                if comes and number not in there:
                    keep(index, made(number))
                    there.add(number)
                elif not comes and number in there:
                    index.delete([f"i{number}"])
                    there.discard(number)
                    stayed.discard(number)
        assert after is None and len(seen) == len(set(seen))
        found = {number for number in stayed if options.get("mode") != "keyword" or number % 4 != 3}
        assert {f"i{number}" for number in found} <= set(seen)


@pytest.mark.parametrize("options", PAGED, ids=str)
def test_whatever_changes_between_pages_nothing_is_doubled_or_left_out(tmp_path: Path, options: dict[str, Any]) -> None:
    draw = random.Random(0)
    changes = ([(draw.randrange(40), draw.random() < 0.5) for _ in range(4)] for _ in itertools.count())
    page_through(tmp_path, options, set(draw.sample(range(40), 30)), itertools.cycle([5, 9, 3]), changes)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(st.sampled_from(PAGED), st.data())
def test_pages_hold_together_through_any_changes(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any], data: st.DataObject
) -> None:
    there = data.draw(st.sets(st.integers(0, 39), min_size=1, max_size=40))
    sizes, changes = (data.draw(st.integers(1, 9)) for _ in itertools.count()), (data.draw(CHANGES) for _ in itertools.count())
    page_through(tmp_path_factory.mktemp("pages"), options, set(there), sizes, changes)


# Reranking


def test_a_reranker_orders_the_best_hits_over_all_pages(searcher: Searcher) -> None:
    shelf(searcher.index, {f"t{n}": 0.9 - n / 10 for n in range(8)}, **{f"t{n}": "x" * (n + 1) for n in range(8)})
    reranker = Longest()
    options: dict[str, Any] = {"k": 3, "rerank": reranker, "rerank_top": 5}
    first = searcher.search("cup", **options)
    second = searcher.search("cup", **options, after=first.next)
    third = searcher.search("cup", **options, after=second.next)
    assert [ids(page) for page in (first, second, third)] == [["t4", "t3", "t2"], ["t1", "t0", "t5"], ["t6", "t7"]]
    assert [len(read) for read in reranker.read if read] == [5, 2], "no hit is read again"
    assert first.hits[0].scores == {"vector": first.hits[0].score, "rerank": 5.0} and first.seconds.rerank > 0
    assert "rerank" not in second.hits[2].scores
    both = searcher.search("cup xx", mode="hybrid", rerank=reranker, rerank_top=8)
    cosines = {hit.id: hit.score for hit in searcher.search("cup xx").hits}
    assert reranker.similarities == pytest.approx([cosines[str(id)] for id in reranker.read[-1]]) and len(both.hits) == 8
    assert searcher.search("xx", mode="keyword", rerank=reranker).hits and reranker.similarities is None


def test_an_encoder_without_a_model_here_has_no_reranker_of_its_own() -> None:
    with pytest.raises(ModelError, match="FakeEncoder has none here"):
        load_reranker("trace", FakeEncoder())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "keywords"}, "did you mean 'keyword'"), ({"keyword_weight": 1.5}, "keyword_weight is 1.5"),
        ({"fold": 0}, "fold is 0"), ({"fold": 1.5}, "fold is 1.5"), ({"fold": "x"}, "fold is 'x'"),
        ({"cutoff": 2}, "between 0 and 1"), ({"sort": ""}, "sort ''"), ({"where": "date>="}, "a value is missing"),
        ({"where": 7}, "7 is not a filter"), ({"rerank": Longest(), "rerank_top": 0}, "rerank_top is 0"),
        ({"rerank": Longest(), "sort": "date"}, "leave out one of them"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(searcher: Searcher, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        searcher.search("cup", **options)
