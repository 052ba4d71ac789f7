"""The collections of one index in Milvus: where they are, what they say of themselves, requests, and errors in words.

This is the only module that talks to pymilvus, which is imported when the first index is opened.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from traceir.errors import InputError, StoreError
from traceir.index.milvus_rows import (
    KEPT,
    KEY,
    MAX_KEY_CHARS,
    MAX_VARCHAR_BYTES,
    VECTOR,
    filter_columns,
    keys_in,
    stored_of,
    vector_of,
)
from traceir.index.store import MAX_DIM, Background, DamageError, StoredType, Vectors
from traceir.items import MODALITIES, Modality, Vector

FORMAT: Final = 1
DEFAULT_NAME: Final = "traceir"
MOST_HITS: Final = 16_384  # the most that Milvus returns for a query
PAGE: Final = 1000
EFFORT: Final = 128  # how many rows a search keeps in sight in a graph, at least
GRAPHS: Final[dict[Modality, str]] = {"text": "_near_text", "image": "_near_image", "image,text": "_near_both"}
BACKGROUND: Final = "_background"
_GRAPH: Final = {"M": 16, "efConstruction": 200}
_PROPERTY: Final = "traceir"
_ANSWER_BYTES: Final = 16 * 2**20
_CALL_SECONDS: Final = 60.0
_BUILD_SECONDS: Final = 24 * 3600.0
_NOT_LOADED: Final = 101  # Milvus's code


@dataclass(frozen=True, slots=True)
class Place:
    """Where an index is: the address a client connects to, the collection, and how messages name it (without the token)."""

    address: str
    name: str
    shown: str
    token: str = ""
    file: Path | None = None


@dataclass(frozen=True, slots=True)
class Maker:
    """What a collection says of itself, as JSON in its property `traceir`."""

    format: int
    dim: int
    dtype: StoredType
    fingerprint: str
    prompt_version: str
    created: str


@dataclass(frozen=True, slots=True)
class Row:
    """The columns of an item, and its vector where it was asked for."""

    columns: Mapping[str, Any]
    vector: Vector | None


def parse_place(uri: str) -> Place:
    """`milvus-lite:PATH.db[/NAME]` or `http[s]://[USER:PASSWORD@]HOST[:PORT][/NAME]`; StoreError for what is neither.

    The environment variable TRACEIR_MILVUS_TOKEN keeps a token off the command line.
    """
    if uri.startswith("milvus-lite:"):
        match = re.fullmatch(r"milvus-lite:(.+?\.db)(?:/([^/]+))?", uri)
        if match is None:
            raise StoreError(f"index {uri!r} names no file that ends in .db; give milvus-lite:./FILE.db")
        return Place(match[1], _check_name(uri, match[2] or DEFAULT_NAME), uri, file=Path(match[1]))
    if match := re.fullmatch(r"(https?://)(?:([^/@]+)@)?([^/@]+)(?:/([^/]*))?", uri):
        scheme, token, host, name = match.groups()
        name = name or DEFAULT_NAME
        shown = f"{scheme}{host}/{name}"
        return Place(scheme + host, _check_name(shown, name), shown, token or os.environ.get("TRACEIR_MILVUS_TOKEN", ""))
    raise StoreError("the index's address is not one of Milvus; give milvus-lite:./FILE.db or http://HOST:19530/NAME")


class Collections:
    """One index on a server: the collection of its items, and those of its graphs."""

    def __init__(self, place: Place, *, create: Callable[[], Maker] | None, timeout: float) -> None:
        """Connects, and makes the collection of the items where it is missing and `create` says of what kind."""
        self.place = place
        self._client = _connect(place, create is not None, timeout)
        self._closed = False
        try:
            with self.explained("open it"):
                version = str(self._client.get_server_version(timeout=_CALL_SECONDS))
                self._is_small, self._merges = "lite" in version, version.startswith("milvus_lite")
                if not self._client.has_collection(place.name, timeout=_CALL_SECONDS):
                    if create is None:
                        raise _missing(place)
                    self._create_items(create())
                self.maker = self._read_maker()
                self._load()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._client.close()

    @contextlib.contextmanager
    def explained(self, action: str) -> Iterator[None]:
        """Errors of the client, and what it should not have returned, as StoreErrors that say what could not be done."""
        from pymilvus.exceptions import MilvusException

        if self._closed:
            raise StoreError(f"index {self.place.shown} is closed; open it again")
        try:
            yield
        except DamageError as error:
            raise StoreError(f"index {self.place.shown} is damaged: {error}") from error
        except MilvusException as error:
            remedy = (
                "check that the server runs and read its log, then repeat the call"
                if self.place.file is None
                else "repeat the call; if it fails again, restore the file from a copy, or remove it and fill it again"
            )
            raise StoreError(
                f"index {self.place.shown} failed: Milvus could not {action} ({_first_line(error)}); {remedy}"
            ) from error

    # Reading

    def graphs(self) -> dict[Modality, str]:
        """The collections of finished graphs by modality; one without an index is a build that was cut off."""
        there = set(self._client.list_collections(timeout=_CALL_SECONDS))
        named = {modality: self.place.name + ending for modality, ending in GRAPHS.items()}
        return {modality: name for modality, name in named.items() if name in there and self._client.list_indexes(name)}

    def count(self, expression: str) -> int:
        return int(self._query(expression, ["count(*)"])[0]["count(*)"])

    def fetch(self, keys: Sequence[str], with_vectors: bool) -> dict[str, Row]:
        found: dict[str, Row] = {}
        page = self._page(with_vectors)
        for start in range(0, len(keys), page):
            wanted = keys_in(keys[start : start + page])
            for row in self._query(wanted, _columns(with_vectors)):
                found[row[KEY]] = _row(row)
        return found

    def iterate(self, expression: str, with_vectors: bool) -> Iterator[Row]:
        """Rows in order of their keys, which is that of their ids."""
        for page in self._pages(expression, _columns(with_vectors), self._page(with_vectors)):
            yield from (_row(row) for row in page)

    def keys(self, expression: str) -> list[str]:
        return [row[KEY] for page in self._pages(expression, [KEY], PAGE) for row in page]

    def keys_of(self, keys: Sequence[str]) -> list[str]:
        """Those of the keys that are there."""
        return [key for start in range(0, len(keys), PAGE) for key in self.keys(keys_in(keys[start : start + PAGE]))]

    def ask(
        self, name: str, queries: Vectors, limit: int, expression: str
    ) -> tuple[list[list[tuple[str, float]]], dict[str, Row]]:
        """For each query keys and the server's scores, best first; and rows, where the answer stays small with them."""
        is_graph = name != self.place.name
        whole = not is_graph and len(queries) * limit * (4 * self.maker.dim + 1000) <= _ANSWER_BYTES
        effort = {"ef": max(EFFORT, min(2 * limit, 2 * MOST_HITS))} if is_graph else {}
        step = max(1, 1_000_000 // limit)
        answers: list[list[tuple[str, float]]] = []
        rows: dict[str, Row] = {}
        for start in range(0, len(queries), step):
            part = queries[start : start + step]
            hits = self._loaded(
                self._client.search,
                name,
                data=list(part.astype(self._numpy_type())),
                anns_field=VECTOR,
                limit=limit,
                filter=expression,
                output_fields=_columns(True) if whole else [KEY],
                search_params={"metric_type": "IP", "params": effort},
            )
            for own in hits:
                answers.append([(hit[KEY], float(hit["distance"])) for hit in own])
                if whole:
                    rows |= {hit[KEY]: _row({**hit["entity"], KEY: hit[KEY]}) for hit in own if hit[KEY] not in rows}
            answers += [[] for _ in range(len(part) - len(hits))]
        return answers, rows

    # Writing

    def upsert(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows of one collection by key, in one request; with `blank_columns`, where they may replace others."""
        dtype = self._numpy_type()
        self._client.upsert(name, [{**row, VECTOR: row[VECTOR].astype(dtype)} for row in rows], timeout=_CALL_SECONDS)

    def blank_columns(self, keys: Sequence[str]) -> dict[str, dict[str, None]]:
        """By key, what a row that replaces another must set to null: Milvus Lite would keep the old one's dynamic fields."""
        if not self._merges:
            return {}
        old = self.fetch(keys, False)
        return {key: dict.fromkeys(filter_columns(stored_of(row.columns, None).fields)) for key, row in old.items()}

    def delete(self, keys: Sequence[str]) -> None:
        names = (self.place.name, *self.graphs().values())
        for start in range(0, len(keys), PAGE):
            for name in names:
                self._client.delete(name, filter=keys_in(keys[start : start + PAGE]), timeout=_CALL_SECONDS)

    def flush(self) -> None:
        """Milvus Lite forces nothing to disk by itself; a server has its log, and refuses frequent flushes."""
        if self._is_small:
            self._client.flush(self.place.name, timeout=_CALL_SECONDS)

    def drop_graphs(self) -> None:
        for name in (self.place.name + ending for ending in GRAPHS.values()):
            if self._client.has_collection(name, timeout=_CALL_SECONDS):
                self._client.drop_collection(name, timeout=_CALL_SECONDS)

    def build_graph(self, modality: Modality, pages: Iterator[list[dict[str, Any]]]) -> None:
        """Fill and index the graph of a modality; returns when the server says that all rows are in the index."""
        name = self.place.name + GRAPHS[modality]
        self._client.create_collection(
            name, schema=self._schema(self.maker, is_graph=True), consistency_level="Strong", num_shards=1, timeout=_CALL_SECONDS
        )
        for rows in pages:
            self.upsert(name, rows)
        self._client.flush(name, timeout=_BUILD_SECONDS)
        self._client.create_index(name, self._index("HNSW", _GRAPH), timeout=_BUILD_SECONDS)
        while (state := self._client.describe_index(name, VECTOR)) and int(state.get("pending_index_rows") or 0):
            time.sleep(0.5)
        # Milvus Lite builds while it loads, so that from here on no search is a silent comparison of all rows.
        self._client.release_collection(name, timeout=_CALL_SECONDS)
        self._client.load_collection(name, timeout=_BUILD_SECONDS)

    # The background

    def write_background(self, background: Background) -> None:
        """In a collection of its own, made anew; one that was cut off holds fewer than it says and counts as none."""
        name = self.place.name + BACKGROUND
        told = {"source": background.source, "created": background.created, "counts": background.counts}
        if self._client.has_collection(name, timeout=_CALL_SECONDS):
            self._client.drop_collection(name, timeout=_CALL_SECONDS)
        self._client.create_collection(
            name,
            schema=self._schema(self.maker, is_graph=True),
            index_params=self._index("FLAT", {}),
            consistency_level="Strong",
            num_shards=1,
            properties={_PROPERTY: json.dumps(told)},
            timeout=_CALL_SECONDS,
        )
        for modality, vectors in background.vectors.items():
            rows = [{KEY: f"{modality} {number:09}", VECTOR: vector} for number, vector in enumerate(vectors)]
            for start in range(0, len(rows), self._page(True)):
                self.upsert(name, rows[start : start + self._page(True)])
        if self._is_small:
            self._client.flush(name, timeout=_CALL_SECONDS)

    def describe_background(self) -> tuple[str, str, dict[Modality, int]]:
        """Source, creation and number of queries, as it was written; texts of none where there is none."""
        name = self.place.name + BACKGROUND
        if not self._client.has_collection(name, timeout=_CALL_SECONDS):
            return "", "", {}
        try:
            told = json.loads(self._client.describe_collection(name, timeout=_CALL_SECONDS)["properties"][_PROPERTY])
            counts = {modality: int(told["counts"][modality]) for modality in MODALITIES if modality in told["counts"]}
            return str(told["source"]), str(told["created"]), counts
        except (KeyError, TypeError, ValueError) as error:
            raise DamageError("its background cannot be read; make it anew with `traceir index calibrate`") from error

    def read_background(self) -> Background | None:
        """What `write_background` wrote; None where it is not all there."""
        source, created, counts = self.describe_background()
        if not counts:
            return None
        name = self.place.name + BACKGROUND
        pages = self._pages("", [KEY, VECTOR], self._page(True), name)
        found = dict(sorted((row[KEY], vector_of(row[VECTOR])) for page in pages for row in page))
        vectors = {
            modality: np.array([one for key, one in found.items() if key.rpartition(" ")[0] == modality]) for modality in counts
        }
        whole = all(len(vectors[modality]) == count for modality, count in counts.items())
        return Background(vectors, source, created) if whole else None

    # Steps

    def _query(self, expression: str, columns: Sequence[str]) -> Any:
        return self._loaded(self._client.query, self.place.name, filter=expression, output_fields=list(columns))

    def _pages(self, expression: str, columns: Sequence[str], size: int, name: str = "") -> Iterator[Any]:
        iterate = self._client.query_iterator
        pages = self._loaded(iterate, name or self.place.name, batch_size=size, filter=expression, output_fields=list(columns))
        try:
            while page := pages.next():
                yield page
        finally:
            pages.close()

    def _loaded(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What a call returns; a server that was started again must first be told to load its collections."""
        from pymilvus.exceptions import MilvusException

        try:
            return call(*arguments, timeout=_CALL_SECONDS, **options)
        except MilvusException as error:
            if error.code != _NOT_LOADED:
                raise
            self._load()
            return call(*arguments, timeout=_CALL_SECONDS, **options)

    def _load(self) -> None:
        background = self.place.name + BACKGROUND
        own = [background] if self._client.has_collection(background, timeout=_CALL_SECONDS) else []
        for name in (self.place.name, *self.graphs().values(), *own):
            self._client.load_collection(name, timeout=_BUILD_SECONDS)

    def _create_items(self, maker: Maker) -> None:
        from pymilvus.exceptions import MilvusException

        described = json.dumps(asdict(maker))
        try:
            self._client.create_collection(
                self.place.name,
                schema=self._schema(maker, is_graph=False),
                index_params=self._index("FLAT", {}),
                consistency_level="Strong",
                num_shards=1,  # so that one call is one entry of the log, all or none
                properties={_PROPERTY: described},
                timeout=_CALL_SECONDS,
            )
        except MilvusException as error:
            if not self._client.has_collection(self.place.name, timeout=_CALL_SECONDS):
                raise StoreError(
                    f"the server of {self.place.shown} makes no index of {maker.dtype} and width {maker.dim} "
                    f"({_first_line(error)}); choose float32, or another server"
                ) from error  # otherwise another process was quicker

    def _read_maker(self) -> Maker:
        properties = self._client.describe_collection(self.place.name, timeout=_CALL_SECONDS).get("properties") or {}
        if _PROPERTY not in properties:
            raise StoreError(
                f"{self.place.shown} is a collection of another program, not an index of TraceIR; choose another name"
            )
        try:
            said = json.loads(properties[_PROPERTY])
            found = said.get("format")
            if found == FORMAT:
                return _checked(Maker(**said))
        except (ValueError, TypeError, AttributeError) as error:
            raise StoreError(f"index {self.place.shown} is damaged: {error}; drop the collection and fill it again") from error
        raise StoreError(
            f"{self.place.shown} has index format {found} but this version reads format {FORMAT}; "
            "use the version of TraceIR that made it, or fill a new index"
        )

    def _schema(self, maker: Maker, *, is_graph: bool) -> Any:
        from pymilvus import DataType

        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=True)
        schema.add_field(KEY, DataType.VARCHAR, is_primary=True, max_length=MAX_KEY_CHARS)
        for column in () if is_graph else KEPT:
            schema.add_field(column, DataType.VARCHAR, max_length=MAX_VARCHAR_BYTES)
        kind = DataType.FLOAT16_VECTOR if maker.dtype == "float16" else DataType.FLOAT_VECTOR
        schema.add_field(VECTOR, kind, dim=maker.dim)
        return schema

    def _index(self, kind: str, parameters: Mapping[str, int]) -> Any:
        index = self._client.prepare_index_params()
        index.add_index(VECTOR, index_type=kind, metric_type="IP", params=dict(parameters))
        return index

    def _numpy_type(self) -> type[np.floating[Any]]:
        return np.float16 if self.maker.dtype == "float16" else np.float32

    def _page(self, with_vectors: bool) -> int:
        return min(PAGE, max(1, _ANSWER_BYTES // (4 * self.maker.dim))) if with_vectors else PAGE


def describe_new(place: Place, fingerprint: str | None, prompt_version: str | None, dim: int | None, dtype: StoredType) -> Maker:
    """What a new index will say of itself; InputError where something is missing or impossible."""
    if not fingerprint or not prompt_version or dim is None:
        raise InputError(f"a new index at {place.shown} needs the encoder's fingerprint, prompt version and width")
    if not 1 <= dim <= MAX_DIM or dtype not in ("float32", "float16"):
        raise InputError(f"an index cannot hold {dtype} of width {dim}; choose float32 or float16 and 1 to {MAX_DIM}")
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Maker(FORMAT, dim, dtype, fingerprint, prompt_version, created)


def _connect(place: Place, create: bool, timeout: float) -> Any:
    try:
        from pymilvus import MilvusClient
        from pymilvus.exceptions import MilvusException
    except ImportError as error:
        raise StoreError(f"index {place.shown} needs pymilvus; install it with `pip install 'traceir[milvus]'`") from error
    # They log each refusal with a traceback before they raise it; Milvus Lite in this process also logs what it does not do.
    for name in ("pymilvus", "milvus_lite", *(["grpc._server"] if place.file else [])):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if place.file is not None:
        try:
            if not create and not place.file.exists():
                raise _missing(place)
            place.file.parent.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise StoreError(f"the file of index {place.shown} cannot be looked for or made: {why}; choose another") from error
    try:
        return MilvusClient(place.address, token=place.token, timeout=timeout, dedicated=True)
    except MilvusException as error:
        remedy = (
            "check that the server runs and that address and token are right"
            if place.file is None
            else "another process may hold it (one at a time can), it is no file of Milvus Lite, or milvus-lite is not installed"
        )
        raise StoreError(f"index {place.shown} cannot be opened ({_first_line(error)}); {remedy}") from error


def _check_name(shown: str, name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,199}", name, re.ASCII) or name.endswith((*GRAPHS.values(), BACKGROUND)):
        raise StoreError(f"index {shown} has the name {name!r}; use up to 200 letters, digits and _, and no ending of our own")
    return name


def _missing(place: Place) -> StoreError:
    return StoreError(f"there is no index at {place.shown}; check the address, or fill one with `traceir index add`")


def _first_line(error: Exception) -> str:
    text = str(getattr(error, "message", "") or error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def _columns(with_vectors: bool) -> list[str]:
    return [KEY, *KEPT, *([VECTOR] if with_vectors else [])]


def _row(row: Mapping[str, Any]) -> Row:
    try:
        vector = vector_of(row[VECTOR]) if VECTOR in row else None
        return Row({name: row[name] for name in (KEY, *KEPT)}, vector)
    except (KeyError, TypeError, ValueError) as error:
        raise DamageError(f"a row came without its {error}; drop the collection and fill it again") from error


def _checked(maker: Maker) -> Maker:
    texts = (maker.fingerprint, maker.prompt_version, maker.created)
    if not all(isinstance(text, str) for text in texts) or maker.dtype not in ("float32", "float16"):
        raise ValueError(f"its maker is {maker}")
    if isinstance(maker.dim, bool) or not isinstance(maker.dim, int) or not 1 <= maker.dim <= MAX_DIM:
        raise ValueError(f"its width is {maker.dim!r}")
    return maker
