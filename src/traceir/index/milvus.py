"""The distributed index: Milvus, as a server or a cluster (http://HOST:19530/NAME) or as a local file (milvus-lite:./FILE.db).

One collection holds the items and is searched exactly (a FLAT index). `build_ann` adds one collection a modality with an
HNSW graph: queries and candidates of different modalities lie apart, and a shared graph loses neighbours across that gap. A graph
proposes keys and scores; what is returned comes from the first collection, so a graph that lags behind costs recall alone.
Scores are Milvus's own. Of equal scores the lower id comes first; which ones are among the best k, where more than a few rows
beyond k score alike, is Milvus's choice.

Durability: Milvus Lite is flushed to disk before a call returns; a server answers once the call is in its log.
Processes: a file belongs to one process until it ends; a server takes any number of readers, Milvus Lite's one writer.
Threads: safe; writes of one handle are serialised.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from threading import RLock
from typing import Any, Final, TypeVar, Unpack, cast

import numpy as np

from traceir.errors import InputError, StoreError
from traceir.index import milvus_rows, store
from traceir.index.filter_text import as_filter
from traceir.index.filters import Filter, Where, matches, values_of
from traceir.index.milvus_address import BACKGROUND, GRAPHS, connect, first_line, parse_address
from traceir.index.milvus_rows import (
    BM25,
    KEPT,
    KEY,
    VECTOR,
    WORDS,
    as_milvus_words,
    column_of,
    compile_filter,
    filter_columns,
    key_of,
    keys_in,
    list_column_of,
    resolve_globs,
    stored_of,
    vector_of,
)
from traceir.index.pages import Page, order_page, position_of
from traceir.index.store import Background, CheckedIndex, IndexInfo, IndexMeta, Opening, OpenOptions, Stored, Vectors
from traceir.index.words import KeywordQuery, columns_of
from traceir.items import MODALITIES, Hit, Item, Modality, Vector

T = TypeVar("T")
MAX_REQUEST_BYTES: Final = 60 * 2**20  # Milvus takes 64 MB
MOST_HITS: Final = 16_384  # the most that Milvus returns for a query
EFFORT: Final = 128  # candidates that a search in a graph keeps, at least
MOST_SORTED: Final = 100_000
_NOTE: Final = "traceir_note_"
_PAGE: Final = 1000
_GRAPH: Final = {"M": 16, "efConstruction": 200}
_PROPERTY: Final = "traceir"
_ROW_BYTES: Final = 1000  # of an item without its vector, about
_ANSWER_BYTES: Final = 16 * 2**20
_CALL_SECONDS: Final = 60.0
_BUILD_SECONDS: Final = 24 * 3600.0
_NOT_LOADED: Final = 101  # Milvus's code


class MilvusIndex(CheckedIndex):
    """An `Index` in a Milvus collection; made by `open_index`."""

    def __init__(self, uri: str, **options: Unpack[OpenOptions]) -> None:
        self._address, self._opening = parse_address(uri), Opening(**options)
        self._name, self._shown = self._address.name, self._address.shown
        self._writing = RLock()
        self._writes = 0
        self._closed = False
        self._client = connect(self._address, self._opening)
        try:
            with self._explained("open it"):
                version = str(self._call("get_server_version"))
                self._is_small, self._merges = "lite" in version, version.startswith("milvus_lite")
                if not self._has(self._name):
                    self._create_items()
                self._meta = self._read_meta()
                self._has_words = WORDS in {own["name"] for own in self._call("describe_collection", self._name)["fields"]}
                self._meta.check(self._shown, self._opening)
                self._numpy_type = np.float16 if self._meta.dtype == "float16" else np.float32
                # Rows with vectors in a request or an answer.
                self._page = min(_PAGE, max(1, _ANSWER_BYTES // (4 * self._meta.dim)))
                self._load()
        except BaseException:
            self.close()
            raise

    def check(self, items: Sequence[Item]) -> None:
        store.check_items(items)
        for item in items:
            milvus_rows.row_of(item, np.zeros(self._meta.dim, dtype=np.float32))

    def _write(self, items: Sequence[Item], unit: Vectors) -> set[str]:
        """One request holds all items, so a call of more than MAX_REQUEST_BYTES is refused (InputError).

        Which ids were new is exact among the writes of this handle; another process may write between the look and the write.
        """
        rows = [milvus_rows.row_of(item, vector) for item, vector in zip(items, unit, strict=True)]
        # About what the rows take in a request.
        total = sum(len(name) + 16 + len(str(value).encode()) for row in rows for name, value in row.items() if name != VECTOR)
        total += unit.nbytes
        if total > MAX_REQUEST_BYTES:
            most = max(1, int(0.9 * len(rows) * MAX_REQUEST_BYTES / total))
            what = f"{len(rows)} items make a request of {total / 2**20:.0f} MB, more than {MAX_REQUEST_BYTES / 2**20:.0f}"
            raise InputError(f"{what}; nothing was written: give at most {most} such items a call")
        keys = [row[KEY] for row in rows]
        with self._writing, self._explained("add to it"):
            known = set(self._keys(_keys_by_page(keys)))
            if known and self._merges:
                # Milvus Lite would keep the dynamic fields of the row that is replaced: they are set to null.
                blank = {key: dict.fromkeys(filter_columns(old.fields)) for key, old in self._fetch(known).items()}
                rows = [{**blank.get(row[KEY], {}), **row} for row in rows]
            for modality, name in self._graphs().items():
                # A graph holds what rows are found and filtered by, not what is shown of them.
                own = [row for row in rows if row["modality"] == modality]
                if own:
                    self._upsert(name, [{key: value for key, value in row.items() if key not in (*KEPT, WORDS)} for row in own])
            if not self._has_words:
                rows = [{key: value for key, value in row.items() if key != WORDS} for row in rows]
            self._upsert(self._name, rows)
            self._wrote()
        return {milvus_rows.id_of(key) for key in keys if key not in known}

    def delete(self, which: Sequence[str] | Filter) -> int:
        """As `Index.delete`; more than 1000 items go in several requests."""
        which = store.check_ids(which) if isinstance(which, Sequence) else which
        with self._writing, self._explained("delete from it"):
            passing = _keys_by_page(map(key_of, which)) if isinstance(which, list) else [self._compile(as_filter(which))]
            keys = self._keys(passing)
            for part in _pages(keys, _PAGE):
                for name in (self._name, *self._graphs().values()):
                    self._call("delete", name, filter=keys_in(part))
            if keys:
                self._wrote()
        return len(keys)

    def build_ann(self) -> None:
        """Make a graph of each modality, so that `search(exact=False)` works; returns when they are built.

        Earlier graphs are dropped first. Later items are placed as they come.
        No other process should write meanwhile: its items may be missing from the graphs.
        """
        with self._writing, self._explained("build its graphs"):
            for modality, ending in GRAPHS.items():
                name = self._name + ending
                self._drop(name)
                if self._count(_of_modality(modality)):
                    self._create(name, (), None)
                    for page in _pages(map(stored_of, self._rows(_of_modality(modality), _columns(True))), self._page):
                        rows = [{KEY: key_of(own.id), **filter_columns(own.fields), VECTOR: own.vector} for own in page]
                        self._upsert(name, rows)
                    self._call("flush", name, timeout=_BUILD_SECONDS)
                    self._call("create_index", name, self._index("HNSW", _GRAPH), timeout=_BUILD_SECONDS)
                    while int((self._call("describe_index", name, VECTOR) or {}).get("pending_index_rows") or 0):
                        time.sleep(0.5)
                    # Milvus Lite builds while it loads, so that from here on no search is a silent comparison of all rows.
                    self._call("release_collection", name)
                    self._call("load_collection", name, timeout=_BUILD_SECONDS)

    def _find(self, queries: Vectors, k: int, where: Filter | None, modality: Modality | None, exact: bool) -> list[list[Hit]]:
        """Where the graphs find few rows, as under a filter that few pass, a query is searched exactly."""

        def passes(row: Stored) -> bool:
            """Also now: a row may have been replaced since it was found."""
            return modality in (None, row.modality) and (where is None or matches(where, row.id, row.modality, row.fields))

        with self._explained("search it"):
            passing = self._compile(where)
            expression = _joined(passing, _of_modality(modality) if modality else "")
            if exact:
                return self._search([self._name], queries, k, expression, passes)[0]
            if not (graphs := self._graphs()):
                what = f"index {self._shown} has no graph for approximate search"
                raise StoreError(f"{what}; call build_ann() once, or search with exact=True")
            names = [name for own, name in graphs.items() if modality in (None, own)]
            hits, few = self._search(names, queries, k, passing, passes)
            for row, exact_hits in zip(few, self._search([self._name], queries[few], k, expression, passes)[0], strict=True):
                hits[row] = exact_hits
            return hits

    def get(self, ids: Sequence[str], *, with_vectors: bool = False) -> dict[str, Stored]:
        keys = [key_of(id) for id in store.check_ids(ids)]
        with self._explained("read it"):
            rows = self._fetch(keys, with_vectors)
            return {rows[key].id: rows[key] for key in keys if key in rows}

    def count(self, where: Where = None) -> int:
        with self._explained("count in it"):
            return self._count(self._compile(as_filter(where)))

    def scan(self, where: Where = None, *, with_vectors: bool = False) -> Iterator[Stored]:
        with self._explained("read it"):
            yield from map(stored_of, self._rows(self._compile(as_filter(where)), _columns(with_vectors)))

    def info(self) -> IndexInfo:
        """As `Index.info`; `cells` is the number of graphs, `probes` their effort; `bytes` is 0 on a server."""
        with self._explained("describe it"):
            counts = {modality: self._count(_of_modality(modality)) for modality in MODALITIES}
            graphs = len(self._graphs())
            source, _, background = self._describe_background()
        file = self._address.file
        return IndexInfo(
            **asdict(self._meta),
            uri=self._shown,
            counts={modality: count for modality, count in counts.items() if count},
            cells=graphs,
            probes=EFFORT if graphs else 0,
            bytes=0 if file is None else store.size_of(path for path in file.rglob("*") if path.is_file()),
            background=background,
            background_source=source,
        )

    def keep_background(self, background: Background) -> None:
        """As `Index.keep_background`, in a collection of its own, made anew; one that was cut off counts as none."""
        checked, name = store.check_background(background, self._meta.dim), self._name + BACKGROUND
        with self._writing, self._explained("keep a background in it"):
            self._drop(name)
            self._create(name, (), checked.described())
            for modality, vectors in checked.vectors.items():
                rows = [{KEY: f"{modality} {number:09}", VECTOR: vector} for number, vector in enumerate(vectors)]
                for part in _pages(rows, self._page):
                    self._upsert(name, part)
            self._wrote(name)

    def background(self) -> Background | None:
        with self._explained("read its background"):
            source, created, counts = self._describe_background()
            if not counts:
                return None
            rows = self._rows("", [KEY, VECTOR], self._name + BACKGROUND)
            kept = sorted((row[KEY].rpartition(" ")[0], row[KEY], vector_of(row[VECTOR]).tolist()) for row in rows)
        vectors = {name: np.array([own for kind, _, own in kept if kind == name], dtype=np.float32) for name in counts}
        whole = all(len(vectors[name]) == count for name, count in counts.items())
        return Background(vectors, source, created) if whole else None

    def _find_words(self, words: KeywordQuery, k: int, where: Filter | None, modality: Modality | None) -> list[Hit]:
        """BM25 is Milvus's, over text, name and fields alike; phrases and -words are looked up in what it finds."""
        if not self._has_words:
            what = f"index {self._shown} was made before there was keyword search on Milvus"
            raise StoreError(f"{what}; copy it into a new one with `traceir index copy`, and use that")
        if any(term.is_prefix for term in (*words.wanted, *words.required, *words.without)):
            raise InputError(
                "Milvus finds whole words, not the beginnings of words; leave out the *, or use an index in a folder"
            )
        terms = (*words.required, *words.wanted)
        query = as_milvus_words(dict.fromkeys(word for term in terms for word in term.words))
        options: dict[str, Any] = {"anns_field": BM25, "search_params": {"metric_type": "BM25"}, "output_fields": [KEY]}
        with self._explained("search words in it"):
            options["filter"] = _joined(self._compile(where), _of_modality(modality) if modality else "")
            limit = min(MOST_HITS, k + 16)
            while True:
                (answer,) = self._call("search", self._name, data=[query], limit=limit, **options)
                scores = {hit[KEY]: abs(float(hit["distance"])) for hit in answer}  # Milvus Lite says how far away
                rows = self._fetch(scores)
                kept = [key for key, row in rows.items() if words.allows(columns_of(row.id, row.text, row.fields))]
                if len(kept) >= k or len(answer) < limit or limit == MOST_HITS:
                    break
                limit = min(MOST_HITS, 4 * limit)
        best = sorted(kept, key=lambda key: (-scores[key], key))[:k]
        return [rows[key].hit(scores[key], rank) for rank, key in enumerate(best, start=1)]

    def _page_of(self, where: Filter | None, page: Page) -> list[Stored]:
        """In order of id Milvus goes on behind the last item; for any other order the places of up to MOST_SORTED are read."""
        with self._explained("browse it"):
            expression = self._compile(where)
            if page.name == "id" and not page.descending:
                behind = "" if page.after is None else f'({KEY} > "{key_of(page.after[1])}")'
                rows = self._rows(_joined(expression, behind), _columns(False), size=min(_PAGE, page.limit))
                return [stored_of(row) for row in itertools.islice(rows, page.limit)]
            if (count := self._count(expression)) > MOST_SORTED:
                what = f"{count} items are to be sorted by {page.name!r}, more than the {MOST_SORTED} that are sorted on Milvus"
                raise InputError(f"{what}; narrow the filter, sort by id, or use an index in a folder")
            places = (position_of(stored_of(row), page.name) for row in self._rows(expression, _columns(False)))
            keys = [key_of(id) for _, id in order_page(places, page)]
            found = self._fetch(keys)
            return [found[key] for key in keys if key in found]

    def _keep_note(self, name: str, value: str) -> None:
        with self._writing, self._explained("keep a note in it"):
            self._call("alter_collection_properties", self._name, properties={f"{_NOTE}{name}": value})

    def note(self, name: str) -> str | None:
        with self._explained("read a note in it"):
            kept = self._call("describe_collection", self._name).get("properties") or {}
        value = kept.get(_NOTE + store.check_note(name))
        return None if value is None else str(value)

    def version(self) -> str:
        """As `Index.version`; what other processes replace is noticed once the number of items changes."""
        with self._explained("count in it"):
            return f"{self._count('')}.{self._writes}.{self._describe_background()[1]}"

    def close(self) -> None:
        """Close the connection. Milvus Lite keeps its file to this process until the process ends."""
        with self._writing:
            if not self._closed:
                self._closed = True
                self._client.close()

    # Reading

    def _search(
        self, names: Sequence[str], queries: Vectors, k: int, expression: str, passes: Callable[[Stored], bool]
    ) -> tuple[list[list[Hit]], list[int]]:
        """The best of each query in these collections together, and the queries for which they ran out of rows."""
        if k > MOST_HITS:
            return [self._compare_all(query, k, expression) for query in queries], []
        limit = min(MOST_HITS, k + max(16, k // 4))
        effort = {} if names == [self._name] else {"ef": max(EFFORT, 2 * limit)}
        whole = names == [self._name] and len(queries) * limit * _ROW_BYTES <= _ANSWER_BYTES
        columns, raw = _columns(False) if whole else [KEY], dict[str, Any]()
        options: dict[str, Any] = {"anns_field": VECTOR, "limit": limit, "filter": expression, "output_fields": columns}
        scores: list[dict[str, float]] = [{} for _ in queries]
        for name, start in itertools.product(names, range(0, len(queries), max(1, 1_000_000 // limit))):
            part = list(queries[start : start + max(1, 1_000_000 // limit)].astype(self._numpy_type))
            answers = self._call("search", name, data=part, search_params={"metric_type": "IP", "params": effort}, **options)
            for own, answer in zip(scores[start:], answers, strict=False):
                own |= {hit[KEY]: float(hit["distance"]) for hit in answer}
                raw |= {hit[KEY]: {**hit["entity"], KEY: hit[KEY]} for hit in answer} if whole else {}
        best = [sorted(own, key=lambda key: (-own[key], key))[:k] for own in scores]
        wanted = sorted({key for keys in best for key in keys})
        fetched = {key: stored_of(raw[key]) for key in wanted} if whole else self._fetch(wanted)
        rows = {key: row for key, row in fetched.items() if passes(row)}
        hits: list[list[Hit]] = []
        for keys, own in zip(best, scores, strict=True):
            there = [key for key in keys if key in rows]  # others have gone meanwhile
            if broken := [rows[key].id for key in there if not abs(own[key]) <= 1 + store.UNIT]:
                raise store.unusable(broken)
            hits.append([rows[key].hit(max(-1.0, min(1.0, own[key])), rank) for rank, key in enumerate(there, start=1)])
        return hits, [row for row, own in enumerate(scores) if len(own) < limit]

    def _compare_all(self, query: Vector, k: int, expression: str) -> list[Hit]:
        """The best of a query by reading every vector: for a larger k than Milvus returns."""
        best: list[tuple[float, Stored]] = []
        for page in _pages(map(stored_of, self._rows(expression, _columns(True))), _PAGE):
            scores = np.clip(np.stack([cast(Vector, stored.vector) for stored in page]) @ query, -1, 1).tolist()
            best = sorted([*best, *zip(scores, page, strict=True)], key=lambda pair: (-pair[0], pair[1].id))[:k]
        return [stored.hit(score, rank) for rank, (score, stored) in enumerate(best, start=1)]

    def _graphs(self) -> dict[Modality, str]:
        """The collections of finished graphs by modality; one without an index is a build that was cut off."""
        there = set(self._call("list_collections"))
        named = {modality: self._name + ending for modality, ending in GRAPHS.items()}
        return {modality: name for modality, name in named.items() if name in there and self._client.list_indexes(name)}

    def _compile(self, where: Filter | None) -> str:
        """A filter as an expression; for a Glob the values that are there are read."""

        def texts_of(name: str, in_lists: bool) -> Iterator[str]:
            if name == "id":
                yield from map(milvus_rows.id_of, self._keys([""]))
            elif name == "modality":
                yield from MODALITIES
            else:
                columns = (list_column_of(name, ""), *(() if in_lists else (column_of(name, ""),)))
                for row in self._rows(" or ".join(f"(exists {column})" for column in columns), _columns(False)):
                    yield from (part for part in values_of(stored_of(row).fields.get(name)) if isinstance(part, str))

        return compile_filter(resolve_globs(where, texts_of))

    def _count(self, expression: str) -> int:
        return int(self._query(expression, ["count(*)"])[0]["count(*)"])

    def _query(self, expression: str, columns: Sequence[str]) -> Any:
        return self._call("query", self._name, filter=expression, output_fields=list(columns))

    def _fetch(self, keys: Iterable[str], with_vectors: bool = False) -> dict[str, Stored]:
        """What is kept under these keys."""
        columns, pages = _columns(with_vectors), _keys_by_page(keys, self._page if with_vectors else _PAGE)
        return {row[KEY]: stored_of(row) for page in pages for row in self._query(page, columns)}

    def _keys(self, expressions: Iterable[str]) -> list[str]:
        """The keys of the rows that pass any of these; also of damaged ones."""
        return [row[KEY] for expression in expressions for row in self._rows(expression, [KEY])]

    def _rows(self, expression: str, columns: Sequence[str], name: str = "", size: int = _PAGE) -> Iterator[Any]:
        """Rows in order of their keys, which is that of their ids."""
        size = self._page if VECTOR in columns else size
        options: dict[str, Any] = {"batch_size": size, "filter": expression, "output_fields": list(columns)}
        pages = self._call("query_iterator", name or self._name, **options)
        try:
            while page := pages.next():
                yield from page
        finally:
            pages.close()

    def _describe_background(self) -> tuple[str, str, dict[Modality, int]]:
        """Source, creation and number of queries, as it was written; texts of none where there is none."""
        if not self._has(self._name + BACKGROUND):
            return "", "", {}
        described = self._call("describe_collection", self._name + BACKGROUND)
        return store.read_described((described.get("properties") or {}).get(_PROPERTY, ""))

    def _read_meta(self) -> IndexMeta:
        described = self._call("describe_collection", self._name).get("properties") or {}
        if _PROPERTY not in described:
            raise StoreError(f"{self._shown} is a collection of another program, not an index of TraceIR; choose another name")
        try:
            kept = dict(json.loads(described[_PROPERTY]))
        except (ValueError, TypeError) as error:
            raise store.DamageError(f"{error}; drop the collection and fill it again") from error
        return IndexMeta.read(self._shown, kept, "drop the collection and fill it again")

    # Writing

    def _upsert(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows of one collection by key, in one request."""
        written = [{**row, VECTOR: row[VECTOR].astype(self._numpy_type)} for row in rows]
        self._call("upsert", name, written)

    def _wrote(self, name: str = "") -> None:
        """Milvus Lite forces nothing to disk by itself; a server has its log, and refuses frequent flushes."""
        if self._is_small:
            self._call("flush", name or self._name)
        self._writes += 1

    def _has(self, name: str) -> bool:
        return bool(self._call("has_collection", name))

    def _drop(self, name: str) -> None:
        if self._has(name):
            self._call("drop_collection", name)

    def _create_items(self) -> None:
        if not self._opening.create:
            raise store.missing(self._shown)
        self._meta = IndexMeta.new(self._shown, self._opening, ("float32", "float16"))
        from pymilvus.exceptions import MilvusException

        try:
            self._create(self._name, KEPT, json.dumps(asdict(self._meta)))
        except MilvusException as error:
            if not self._has(self._name):  # otherwise another process was quicker
                what = f"the server of {self._shown} makes no index of {self._meta.dtype} and width {self._meta.dim}"
                raise StoreError(f"{what} ({first_line(error)}); choose float32, or another server") from error

    def _create(self, name: str, columns: Sequence[str], described: str | None) -> None:
        """A collection with a FLAT index that describes itself, or without both, to become a graph."""
        from pymilvus import DataType, Function, FunctionType

        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=True)
        schema.add_field(KEY, DataType.VARCHAR, is_primary=True, max_length=milvus_rows.MAX_KEY_CHARS)
        for column in columns:
            schema.add_field(column, DataType.VARCHAR, max_length=milvus_rows.MAX_VARCHAR_BYTES)
        index = self._index("FLAT", {})
        if columns:  # a version without keyword search adds no words, which is why there is a default
            words = {"enable_analyzer": True, "analyzer_params": {"tokenizer": "standard"}, "default_value": ""}
            schema.add_field(WORDS, DataType.VARCHAR, max_length=milvus_rows.MAX_VARCHAR_BYTES, **words)
            schema.add_field(BM25, DataType.SPARSE_FLOAT_VECTOR)
            schema.add_function(Function(BM25, FunctionType.BM25, input_field_names=[WORDS], output_field_names=[BM25]))
            index.add_index(BM25, index_type="SPARSE_INVERTED_INDEX", metric_type="BM25", params={})
        kind = DataType.FLOAT16_VECTOR if self._meta.dtype == "float16" else DataType.FLOAT_VECTOR
        schema.add_field(VECTOR, kind, dim=self._meta.dim)
        flat = {"index_params": index, "properties": {_PROPERTY: described}} if described else {}
        # One shard, so that one call is one entry of the log, all or none.
        options: dict[str, Any] = {"consistency_level": "Strong", "num_shards": 1, "timeout": _CALL_SECONDS, **flat}
        self._call("create_collection", name, schema=schema, **options)

    def _index(self, kind: str, parameters: Mapping[str, int]) -> Any:
        index = self._client.prepare_index_params()
        index.add_index(VECTOR, index_type=kind, metric_type="IP", params=dict(parameters))
        return index

    # The connection

    @contextlib.contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        """Errors of the client, and what it should not have returned, as StoreErrors that say what could not be done."""
        from pymilvus.exceptions import MilvusException

        if self._closed:
            raise StoreError(f"index {self._shown} is closed; open it again")
        try:
            yield
        except store.DamageError as error:
            raise StoreError(f"index {self._shown} is damaged: {error}") from error
        except MilvusException as error:
            remedy = "check that the server runs and read its log, then repeat the call"
            if self._address.file is not None:
                remedy = "repeat the call; if it fails again, restore the file from a copy, or remove it and fill it again"
            raise StoreError(f"index {self._shown} failed: Milvus could not {action} ({first_line(error)}); {remedy}") from error

    def _call(self, action: str, *arguments: Any, timeout: float = _CALL_SECONDS, **options: Any) -> Any:
        """What the client returns; a server that was started again must first be told to load its collections."""
        from pymilvus.exceptions import MilvusException

        call = partial(getattr(self._client, action), *arguments, timeout=timeout, **options)
        try:
            return call()
        except MilvusException as error:
            if error.code != _NOT_LOADED:
                raise
            self._load()
            return call()

    def _load(self) -> None:
        background = self._name + BACKGROUND
        for name in (self._name, *self._graphs().values(), *([background] if self._has(background) else [])):
            self._call("load_collection", name, timeout=_BUILD_SECONDS)


def _joined(*parts: str) -> str:
    return " and ".join(f"({part})" for part in parts if part)


def _columns(with_vectors: bool) -> list[str]:
    return [KEY, *KEPT, *([VECTOR] if with_vectors else [])]


def _of_modality(modality: Modality) -> str:
    return f'(modality in ["{modality}"])'


def _keys_by_page(keys: Iterable[str], size: int = _PAGE) -> list[str]:
    """Expressions that together are true of these keys."""
    return [keys_in(part) for part in _pages(dict.fromkeys(keys), size)]


def _pages(values: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(values)
    while page := list(itertools.islice(rest, size)):
        yield page
