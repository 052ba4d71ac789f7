"""Searcher: an encoder and an index together, from Query to hits."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, Unpack

import numpy as np

from traceir.errors import InputError, ModelError
from traceir.index.store import Background, Index, ModelIdentity, Opening
from traceir.items import MODALITIES, Encoding, Hit, Item, Modality, Query, Route, Vector
from traceir.retrieval.cutoff import Calibration, Cut
from traceir.retrieval.pipeline import EncodedQuery, SearchKeywords, SearchOptions, check_weight, combine, retrieve

log = logging.getLogger(__name__)
AT_ONCE: Final = 64


class EncoderLike(ModelIdentity, Protocol):
    """What indexing and searching ask of an encoder: in this process, behind a network, or a stand-in for tests."""

    def encode_queries(self, queries: Sequence[Query], *, route: Route = "auto") -> list[Encoding]: ...

    def encode_items(self, items: Sequence[Item]) -> list[Encoding]: ...


class EvaluatedEncoder(EncoderLike, Protocol):
    """What an evaluation asks of an encoder beside vectors."""

    @property
    def run_settings(self) -> Mapping[str, str | int | float | None]:
        """What results.json says of the run: `token_budget`, `threshold` and `max_reasoning_tokens`, None where it has none."""

    def as_written(self, text: str) -> str:
        """A text as the model would write it: what its tokenizer makes of case, and of blanks before punctuation."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Wall time by stage; of a batch, each result carries its share (the batch's time divided by its queries)."""

    encode: float
    search: float
    rerank: float = 0.0


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Hits, best first, with the query's encoding (route, reasoning; None where words alone were looked for), the time spent,
    what a cut-off did, where it was on, and the cursor of the page behind them (None: there is none)."""

    hits: tuple[Hit, ...]
    encoding: Encoding | None
    seconds: Seconds
    cut: Cut | None = None
    next: str | None = None


class Searcher:
    """Searches one index with the encoder that filled it; raises StoreError where another model filled it.

    Without an encoder (None) it looks for words alone. As thread-safe as its encoder; every index is thread-safe.
    """

    def __init__(self, encoder: EncoderLike | None, index: Index) -> None:
        if encoder is not None:
            info = index.info()
            info.check(info.uri, Opening(encoder.fingerprint, encoder.prompt_version, encoder.width))
        self._encoder, self.index, self.calibration = encoder, index, Calibration(index)

    @property
    def encoder(self) -> EncoderLike:
        if self._encoder is None:
            raise InputError("there is no encoder, so words alone can be looked for (mode keyword)")
        return self._encoder

    def add(self, items: Sequence[Item]) -> None:
        """Encodes items and keeps them, durably; those whose ids are there are replaced. Files: `collection/ingest.py`."""
        if items:
            self.index.check(items)
            self.index.upsert(items, np.stack([encoding.vector for encoding in self.encoder.encode_items(items)]))

    def calibrate(self, queries: Sequence[Query], source: str = "queries of the caller", *, progress: bool = False) -> Background:
        """Keeps in the index, durably, what a cut-off is judged by: queries that nothing in it answers (`background.py`)."""
        made = encode_background(self.encoder, queries, source, progress=progress)
        self.index.keep_background(made)
        return made

    def search(
        self,
        query: Query | str,
        *,
        route: Route = "auto",
        terms: Sequence[tuple[float, Query | str]] = (),
        **options: Unpack[SearchKeywords],
    ) -> SearchResult:
        """The k best items for a query, or for words, only of its target modality where it names one.

        `terms` move the query towards others, or, by a negative weight, away from them; one of words takes instruction and target
        of the query. `options` are those of `SearchOptions`. Raises InputError where `cutoff` is given and `calibrate` has not
        been called for queries of this modality."""
        asked = Query.of(text=query) if isinstance(query, str) else query
        return self._search([asked], [[(check_weight(weight), _term(term, asked)) for weight, term in terms]], route, options)[0]

    def search_many(
        self, queries: Sequence[Query], *, route: Route = "auto", **options: Unpack[SearchKeywords]
    ) -> list[SearchResult]:
        """As `search` for each query, in order; encoded in one call and searched in one call a target modality.

        The encoder checks the route.
        """
        return self._search(queries, [[]] * len(queries), route, options)

    def _search(
        self, queries: Sequence[Query], terms: Sequence[Sequence[tuple[float, Query]]], route: Route, keywords: SearchKeywords
    ) -> list[SearchResult]:
        options = SearchOptions(**keywords)
        if not queries:
            return []
        if options.mode == "keyword" and any(terms):
            raise InputError("terms move a vector, and mode keyword looks for words alone; write -WORD among the words instead")
        start = time.perf_counter()
        encodings: list[Encoding | None] = [None] * len(queries)
        asked = [EncodedQuery(query) for query in queries]
        if options.mode != "keyword":
            rate = options.cutoff
            above = {} if rate is None else {pair: self.calibration.thresholds(*pair, rate) for pair in set(map(_pair, queries))}
            flat = self._encode([*queries, *(query for own in terms for _, query in own)], route)
            encodings[:], others = flat[: len(queries)], iter(flat[len(queries) :])
            for row, (own, added) in enumerate(zip(flat, terms, strict=False)):
                vector = combine(own.vector, [(weight, next(others).vector) for weight, _ in added])
                asked[row] = EncodedQuery(queries[row], vector, above.get(_pair(queries[row]), {}), own.reasoning)
        encoded = time.perf_counter()
        pages = retrieve(self.index, asked, options)
        reranked = sum(page.rerank_s for page in pages)
        share = (time.perf_counter() - encoded - reranked) / len(queries)
        return [
            SearchResult(page.hits, of, Seconds((encoded - start) / len(queries), share, page.rerank_s), page.cut, page.next)
            for of, page in zip(encodings, pages, strict=True)
        ]

    def _encode(self, queries: Sequence[Query], route: Route) -> list[Encoding]:
        encodings = self.encoder.encode_queries(queries, route=route)
        if len(encodings) != len(queries):
            raise ModelError(f"the encoder returned {len(encodings)} encodings for {len(queries)} queries; report it")
        if cut_texts := [number for number, encoding in enumerate(encodings) if encoding.cut]:
            query, why = queries[cut_texts[0]], text_cut(encodings[cut_texts[0]])
            log.warning("query %r: %s (%d of %d)", query.id or query.text[:40], why, len(cut_texts), len(queries))
        return encodings


def _term(term: Query | str, query: Query) -> Query:
    return Query.of(text=term, instruction=query.instruction, target=query.target) if isinstance(term, str) else term


def text_cut(encoding: Encoding) -> str:
    """The note on an input whose text was cut."""
    limit = "" if encoding.text_limit is None else f"the {encoding.text_limit} tokens that "
    return f"its text is longer than {limit}the model reads; what is beyond was cut off"


def _pair(query: Query) -> tuple[Modality, Modality | None]:
    """The modalities that choose the thresholds of a query."""
    return query.modality, query.target


def encode_background(encoder: EncoderLike, queries: Sequence[Query], source: str, *, progress: bool = False) -> Background:
    """The background that these queries make, each encoded by the route that the model chooses."""
    from tqdm import tqdm

    vectors: dict[str, list[Vector]] = {}
    with tqdm(total=len(queries), unit="query", desc="calibrating", disable=not progress) as bar:
        for start in range(0, len(queries), AT_ONCE):
            part = queries[start : start + AT_ONCE]
            for query, encoding in zip(part, encoder.encode_queries(part), strict=True):
                vectors.setdefault(query.modality, []).append(encoding.vector)
            bar.update(len(part))
    by_modality = {modality: np.stack(vectors[modality]) for modality in MODALITIES if modality in vectors}
    return Background(by_modality, source, datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
