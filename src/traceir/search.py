"""Searcher: an encoder and an index together, from Query to hits."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from traceir.cutoff import Calibration, Cut, search_above
from traceir.errors import ModelError
from traceir.index.filters import Filter
from traceir.index.store import Background, Index, ModelIdentity, Opening
from traceir.items import MODALITIES, Encoding, Hit, Item, Modality, Query, Route, Vector

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


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Hits, best first, with the query's encoding (route, reasoning), the time spent, and what a cut-off did, where it was on."""

    hits: tuple[Hit, ...]
    encoding: Encoding
    seconds: Seconds
    cut: Cut | None = None


class Searcher:
    """Searches one index with the encoder that filled it; raises StoreError where another model filled it.

    As thread-safe as its encoder; every index is thread-safe.
    """

    def __init__(self, encoder: EncoderLike, index: Index) -> None:
        info = index.info()
        info.check(info.uri, Opening(encoder.fingerprint, encoder.prompt_version, encoder.width))
        self.encoder, self.index, self.calibration = encoder, index, Calibration(index)

    def add(self, items: Sequence[Item]) -> None:
        """Encodes items and keeps them, durably; those whose ids are there already are replaced. Files: `traceir.ingest.add`."""
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
        k: int = 10,
        route: Route = "auto",
        where: Filter | None = None,
        exact: bool = True,
        cutoff: float | None = None,
    ) -> SearchResult:
        """The k best items for a query, or for words, only of its target modality where it names one.

        `cutoff`: leaves out hits that this share of queries without an answer would get as well (`cutoff.py`); raises
        InputError where `calibrate` has not been called for queries of this modality.
        """
        asked = Query.of(text=query) if isinstance(query, str) else query
        return self.search_many([asked], k=k, route=route, where=where, exact=exact, cutoff=cutoff)[0]

    def search_many(
        self,
        queries: Sequence[Query],
        *,
        k: int = 10,
        route: Route = "auto",
        where: Filter | None = None,
        exact: bool = True,
        cutoff: float | None = None,
    ) -> list[SearchResult]:
        """As `search` for each query, in order; encoded in one call and searched in one call a target modality.

        The encoder checks the route, the index checks k.
        """
        if not queries:
            return []
        above = {} if cutoff is None else {pair: self.calibration.thresholds(*pair, cutoff) for pair in set(map(_pair, queries))}
        start = time.perf_counter()
        encodings = self.encoder.encode_queries(queries, route=route)
        if len(encodings) != len(queries):
            raise ModelError(f"the encoder returned {len(encodings)} encodings for {len(queries)} queries; report it")
        if cut_texts := [number for number, encoding in enumerate(encodings) if encoding.cut]:
            query, why = queries[cut_texts[0]], text_cut(encodings[cut_texts[0]])
            log.warning("query %r: %s (%d of %d)", query.id or query.text[:40], why, len(cut_texts), len(queries))
        encoded = time.perf_counter()
        answers: dict[int, tuple[list[Hit], Cut | None]] = {}
        for target in dict.fromkeys(query.target for query in queries):
            rows = [row for row, query in enumerate(queries) if query.target == target]
            vectors = np.stack([encodings[row].vector for row in rows])
            own = [above.get(_pair(queries[row]), {}) for row in rows]
            ranked = search_above(self.index, vectors, k, cutoff, own, where=where, modality=target, exact=exact)
            answers.update(zip(rows, ranked, strict=True))
        seconds = Seconds((encoded - start) / len(queries), (time.perf_counter() - encoded) / len(queries))
        ordered = (answers[row] for row in range(len(queries)))
        return [SearchResult(tuple(hits), of, seconds, cut) for of, (hits, cut) in zip(encodings, ordered, strict=True)]


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
