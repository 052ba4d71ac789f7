"""From a query's vector and words to a page of hits, the one way for Searcher and server.

Candidates come from the vectors, the words, or both; those below the cut-off go, those that were shown go, near-duplicates go
under the best of them, the first few may be reranked, and what is relevant may be sorted by a field. Both together are fused by
reciprocal rank (Cormack, Clarke and Buettcher 2009): a hit scores (1 - w) 61 / (60 + its rank by vectors) + w 61 / (60 + its rank
by words), so that 1 is the first of both.

BM25 would put a short text with two of three words before a long one with all three: by words, those that hold all of them come
first. With a cut-off these stay whatever their cosine, and no others are there by their words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal, TypedDict, get_args

import numpy as np

from traceir.errors import InputError
from traceir.index.filter_text import as_filter
from traceir.index.filters import Filter, Where, shown
from traceir.index.pages import check_page, order_page, position_of
from traceir.index.store import Index, Vectors, check_search
from traceir.index.words import KeywordQuery, SearchTerm, columns_of, parse_words
from traceir.items import MODALITIES, Hit, Modality, Query, Vector
from traceir.retrieval.cursor import Cursor
from traceir.retrieval.cutoff import Cut, check_rate
from traceir.retrieval.folding import SAME, fold
from traceir.suggest import did_you_mean

if TYPE_CHECKING:
    from traceir.retrieval.rerank import Reranker

Mode = Literal["vector", "keyword", "hybrid"]
MODES: Final[tuple[Mode, ...]] = get_args(Mode)
MAX_WEIGHT: Final = 10.0
RELEVANT: Final = 100
"""What is sorted by a field where no cut-off says what is relevant, and the least that each side brings to a fusion."""
_RRF: Final = 60
_FOLDED: Final = 2_000
_SORTED: Final = 10_000
_LEAST: Final = 1e-3
"""Length of a sum of unit vectors below which its direction is rounding."""
Thresholds = Mapping[Modality, float]


class SearchKeywords(TypedDict, total=False):
    """The fields of `SearchOptions`, which describes them, as keywords."""

    k: int
    where: Where
    exact: bool
    cutoff: float | None
    mode: Mode
    keyword_weight: float
    sort: str | None
    fold: bool | float
    after: str | None
    rerank: Reranker | None
    rerank_top: int


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How hits are found and shown, checked when it is made (InputError).

    `k` hits at most, behind the first `offset` or behind a cursor (`after`: the `next` of the page before). `where`: a filter, or
    a text in its language (`index/filter_text.py`). `cutoff`: leave out hits that this share of queries without an answer would
    get. `mode`: what ranks: vectors, words, or both, the words with a share of `keyword_weight`. `sort`: a field, `-` in front
    for the other direction, that orders what is relevant: all above the cut-off, else the RELEVANT best. `fold`: put
    near-duplicates under their best hit; a number is the cosine from which on two are alike. `rerank`: reads the best
    `rerank_top` hits together with the query, for `rerank_s` seconds at most, and orders them anew, before all others."""

    k: int = 10
    where: Where = None
    exact: bool = True
    cutoff: float | None = None
    mode: Mode = "vector"
    keyword_weight: float = 0.5
    sort: str | None = None
    fold: bool | float = False
    after: str | None = None
    rerank: Reranker | None = None
    rerank_top: int = 10
    rerank_s: float | None = None
    offset: int = 0
    filter: Filter | None = field(init=False, default=None)
    cursor: Cursor = field(init=False, default=Cursor())

    def __post_init__(self) -> None:
        check_search(self.k, None)
        if self.mode not in MODES:
            raise InputError(
                f"mode {shown(self.mode)} is unknown{did_you_mean(str(self.mode), MODES)}; choose one of {', '.join(MODES)}"
            )
        if self.cutoff is not None:
            check_rate(self.cutoff)
            if self.mode == "keyword":
                raise InputError("a cut-off judges vectors, and mode keyword looks at words alone; leave out one of them")
        if not _within(self.keyword_weight, 0, 1):
            raise InputError(
                f"keyword_weight is {shown(self.keyword_weight)}; give a share from 0 (vectors alone) to 1 (words alone)"
            )
        if not isinstance(self.fold, bool) and not (_within(self.fold, 0, 1) and self.fold):
            raise InputError(f"fold is {shown(self.fold)}; give true, or the cosine above 0 from which on two hits are alike")
        if self.after is not None and self.offset:
            raise InputError("offset and after both say where the page begins; give one of them")
        if self.rerank is not None and self.rerank_top < 1:
            raise InputError(f"rerank_top is {self.rerank_top}; give at least 1")
        if self.sort is not None:
            check_page(self.sort, None, 1)
        if self.rerank is not None and self.sort is not None:
            raise InputError("hits are either reranked or sorted by a field; leave out one of them")
        object.__setattr__(self, "filter", as_filter(self.where))
        if self.after is not None:
            object.__setattr__(self, "cursor", Cursor.read(self.after))


@dataclass(frozen=True, slots=True)
class EncodedQuery:
    """A query to be answered. `vector` ([D], unit length): None in mode keyword. `above`: what its hits must score more than, by
    modality, where there is a cut-off. `reasoning`: what its encoder wrote, for a reranker."""

    query: Query
    vector: Vector | None = None
    above: Mapping[Modality, float] = field(default_factory=dict)
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class HitPage:
    """Hits, best first; `next`: the cursor of the page behind them, None where there is none."""

    hits: tuple[Hit, ...]
    next: str | None = None
    cut: Cut | None = None
    rerank_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Pool:
    """Candidates, best first; `whole`: there are no others."""

    hits: list[Hit]
    whole: bool
    cut: Cut | None = None


def retrieve(index: Index, asked: Sequence[EncodedQuery], options: SearchOptions) -> list[HitPage]:
    """A page for each query, in order, of its target modality alone where it names one; vectors of one target in one search.

    Raises InputError for a query that has no words in mode keyword, and what the index raises.
    """
    for query in (each.query for each in asked if options.mode == "keyword"):
        if query.images or not query.text:
            what = "has an image" if query.images else "has no words"
            raise InputError(f"the query {what}, and mode keyword looks for words alone; ask by mode vector or hybrid")
    depth, most = _depths(options)
    pools = _candidates(index, asked, options, depth)
    return [_page(index, each, pool, options, depth, most) for each, pool in zip(asked, pools, strict=True)]


def check_weight(weight: float) -> float:
    """The weight of a term, or InputError where it is none."""
    if not _within(weight, -MAX_WEIGHT, MAX_WEIGHT):
        raise InputError(f"the weight of a term is {shown(weight)}; give a number from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
    return float(weight)


def combine(vector: Vector, terms: Sequence[tuple[float, Vector]]) -> Vector:
    """The query's vector plus the weighted vectors of its terms, of unit length again; InputError where that is nothing."""
    if not terms:
        return vector
    total = vector.astype(np.float64) + np.sum([weight * term.astype(np.float64) for weight, term in terms], axis=0)
    if (length := float(np.linalg.norm(total))) < _LEAST:
        raise InputError("the terms cancel the query out, so that nothing is left to search with; change a weight or a term")
    unit: Vector = (total / length).astype(np.float32)
    return unit


def _within(value: object, low: float, high: float) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value) and low <= value <= high


# Candidates


def _candidates(index: Index, asked: Sequence[EncodedQuery], options: SearchOptions, depth: int) -> list[_Pool]:
    """For each query the `depth` best above the cut-off; of each side, where both are fused."""
    if options.mode == "vector":
        return _by_vector(index, asked, options, depth)
    if options.mode == "keyword":
        return [_by_words(index, each.query, options, depth) for each in asked]
    depth = max(RELEVANT, depth)
    pairs = zip(_by_vector(index, asked, options, depth), asked, strict=True)
    return [_fused(pool, _by_words(index, each.query, options, depth), options.keyword_weight) for pool, each in pairs]


def _by_vector(index: Index, asked: Sequence[EncodedQuery], options: SearchOptions, depth: int) -> list[_Pool]:
    """With a cut-off each modality is searched by itself, so that what is cut hides nothing of another."""
    pools: dict[int, _Pool] = {}
    for target in dict.fromkeys(each.query.target for each in asked):
        rows = [row for row, each in enumerate(asked) if each.query.target == target]
        vectors: Vectors = np.stack([vector for row in rows if (vector := asked[row].vector) is not None])
        looked = [target] if options.cutoff is None else [name for name in MODALITIES if target in (None, name)]
        parts = [index.search(vectors, depth, where=options.filter, modality=name, exact=options.exact) for name in looked]
        for row, *found in zip(rows, *parts, strict=True):
            pools[row] = _above(found, asked[row].above, options, depth)
    return [pools[row] for row in range(len(asked))]


def _above(parts: Sequence[Sequence[Hit]], above: Mapping[Modality, float], options: SearchOptions, depth: int) -> _Pool:
    """The hits of one query, of one part for each modality that was searched by itself, less those that are cut.

    A modality without a threshold has no hits.
    """
    hits = [hit for part in parts for hit in part]
    if options.cutoff is None:
        return _Pool(hits, len(hits) < depth)

    def stays(hit: Hit) -> bool:
        return hit.score > above.get(hit.modality, math.inf)

    first = options.offset + options.k
    below = sum(not stays(hit) for part in parts for hit in part[:first])
    hits.sort(key=lambda hit: (-hit.score, hit.id))
    cut = Cut(options.cutoff, above, below, hits[0].score if hits else None)
    whole = all(len(part) < depth or not stays(part[-1]) for part in parts)
    return _Pool([hit for hit in hits if stays(hit)], whole, cut)


def _by_words(index: Index, query: Query, options: SearchOptions, depth: int) -> _Pool:
    """Those that hold all the words, and behind them, where there is no cut-off, those that hold any of them."""
    try:
        words = parse_words(query.text)
    except InputError:
        if options.mode == "keyword":
            raise
        return _Pool([], whole=True)  # an image, or "!!!": the vector alone decides
    hits = index.search_keywords(_all_of(words), depth, where=options.filter, modality=query.target)
    whole = len(hits) < depth
    hits = [hit for hit in hits if _holds(hit, _unsure(words))]
    if options.cutoff is None and len(hits) < depth and len(words.wanted) > 1:
        there = {hit.id for hit in hits}
        others = index.search_keywords(query.text, depth, where=options.filter, modality=query.target)
        hits += [hit for hit in others if hit.id not in there]
        whole = len(others) < depth
    return _Pool(hits, whole)


def _all_of(words: KeywordQuery) -> str:
    """The query that each of the words must be there, but for those of `_unsure`.

    What must not be there comes first: a query that is too long loses its end.
    """
    unsure = _unsure(words)
    sure = [term for term in words.wanted if not any(term in forms for forms in unsure)]
    without = [f'-"{" ".join(term.words)}"' for term in words.without]
    phrases = [f'"{" ".join(term.words)}"' for term in (*words.required, *sure)]
    return " ".join([*without, *phrases, *(" ".join(forms[0].words) + "*" * forms[0].is_prefix for forms in unsure)])


def _unsure(words: KeywordQuery) -> list[list[SearchTerm]]:
    """The words that no query can insist on: prefixes, and what is there in one of several forms (`img2034`, `img 2034`)."""
    forms: dict[str, list[SearchTerm]] = {}
    for term in words.wanted:
        forms.setdefault("".join(term.words), []).append(term)
    return [own for own in forms.values() if len(own) > 1 or own[0].is_prefix]


def _holds(hit: Hit, unsure: Sequence[Sequence[SearchTerm]]) -> bool:
    columns = columns_of(hit.id, hit.text, hit.fields) if unsure else ()
    return all(any(term.is_in(words) for term in forms for words in columns) for forms in unsure)


def _fused(vectors: _Pool, words: _Pool, weight: float) -> _Pool:
    hits: dict[str, Hit] = {}
    fused: dict[str, float] = {}
    scores: dict[str, dict[str, float]] = {}
    for name, pool, share in (("vector", vectors, 1 - weight), ("keyword", words, weight)):
        for rank, hit in enumerate(pool.hits if share else (), start=1):
            hits.setdefault(hit.id, hit)
            fused[hit.id] = fused.get(hit.id, 0.0) + share * (_RRF + 1) / (_RRF + rank)
            scores.setdefault(hit.id, {})[name] = hit.score
    ordered = sorted(hits, key=lambda id: (-fused[id], id))
    whole = vectors.whole and words.whole
    return _Pool([replace(hits[id], score=fused[id], scores=scores[id]) for id in ordered], whole, vectors.cut)


# Pages


def _page(index: Index, each: EncodedQuery, pool: _Pool, options: SearchOptions, depth: int, most: int) -> HitPage:
    """Looks deeper, up to `most` candidates, until there are as many as the page wants."""
    cursor, end = options.cursor, options.offset + options.k
    best_alone = options.sort is not None and options.cutoff is None
    while True:
        hits = [hit for hit in pool.hits if not cursor.has(hit.id)] if cursor.shown else pool.hits
        if best_alone:
            hits = hits[: max(0, max(RELEVANT, options.k) - len(cursor.shown))]
        if options.fold is not False:
            kept = index.get([hit.id for hit in hits], with_vectors=True)
            hits = fold(hits, kept, SAME if options.fold is True else options.fold)
        if pool.whole or depth >= most or (options.sort is None and len(hits) >= _wanted(options)):
            break
        depth = min(4 * depth, most)
        [pool] = _candidates(index, [each], options, depth)
    seconds = 0.0
    if options.rerank is not None:
        hits, seconds = _reranked(index, each, hits, options.rerank, options)
    if options.sort is not None:
        hits = _sorted(hits, options.sort)
    more = len(hits) > end or bool(hits and not (pool.whole or best_alone))
    covered = [id for hit in hits[:end] for id in (hit.id, *hit.similar)]
    ranked = [_ranked(hit, rank, options) for rank, hit in enumerate(hits[:end], start=cursor.rank + 1)]
    return HitPage(
        tuple(ranked[options.offset :]), cursor.past(covered, len(ranked)).write() if more else None, pool.cut, seconds
    )


def _ranked(hit: Hit, rank: int, options: SearchOptions) -> Hit:
    """The hit as it is shown; several times faster than `replace`."""
    scores = hit.scores if options.mode == "hybrid" else {options.mode: hit.score, **hit.scores}
    return Hit(hit.id, hit.score, rank, hit.modality, hit.text, hit.image, hit.fields, scores, hit.similar)


def _sorted(hits: Sequence[Hit], sort: str) -> list[Hit]:
    """In the order of `Index.browse`."""
    by_id = {hit.id: hit for hit in hits}
    placed = order_page([position_of(hit, sort) for hit in hits], check_page(sort, None, max(1, len(hits))))
    return [by_id[id] for _, id in placed]


def _cosines(index: Index, each: EncodedQuery, hits: Sequence[Hit], options: SearchOptions) -> list[float] | None:
    """Of the hits to the query, also of those that words alone have found; None where it has no vector."""
    if each.vector is None:
        return None
    known = {hit.id: hit.score if options.mode == "vector" else hit.scores.get("vector") for hit in hits}
    kept = index.get([id for id, cosine in known.items() if cosine is None], with_vectors=True)
    known |= {id: float(each.vector @ stored.vector) for id, stored in kept.items() if stored.vector is not None}
    return [known[hit.id] or 0.0 for hit in hits]


def _reranked(
    index: Index, each: EncodedQuery, hits: list[Hit], reranker: Reranker, options: SearchOptions
) -> tuple[list[Hit], float]:
    """The first of these hits in the reranker's order, less those that earlier pages had of `rerank_top`; and its seconds."""
    from traceir.retrieval.rerank import item_of, rerank

    top = max(0, options.rerank_top - options.cursor.rank)
    read = rerank(
        reranker, each.query, [item_of(hit) for hit in hits[:top]], seconds=options.rerank_s, reasoning=each.reasoning,
        similarities=_cosines(index, each, hits[:top], options),
    )  # fmt: skip
    scored = [
        hit if score is None else replace(hit, scores={**hit.scores, "rerank": score})
        for hit, score in zip(hits, read.scores, strict=False)
    ]
    return [*(scored[number] for number in read.order), *hits[top:]], read.seconds


def _wanted(options: SearchOptions) -> int:
    """Hits that a page takes: one more shows that there is another page."""
    first = options.offset + options.k + 1
    return first if options.rerank is None else max(first, options.rerank_top - options.cursor.rank)


def _depths(options: SearchOptions) -> tuple[int, int]:
    """How many candidates are looked at first, and at most."""
    before, first = len(options.cursor.shown), _wanted(options)
    most = first
    if options.sort is not None:
        first = max(RELEVANT, options.k)
        most = max(first, _SORTED) if options.cutoff is not None else first
    elif options.fold is not False:
        first = max(RELEVANT, 2 * first)
        most = max(first, _FOLDED)
    return before + first, before + most
