"""The interface every index keeps, what it returns, what it says of itself, and the checks made before anything is written."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self, TypedDict, get_args

import numpy as np
import numpy.typing as npt

from traceir.errors import InputError, StoreError
from traceir.index.facets import Facet, facets_of
from traceir.index.filter_text import as_filter
from traceir.index.filters import OWN_NAMES, Filter, Where, check_field, is_value, shown
from traceir.index.pages import Page, Position, check_page
from traceir.index.words import KeywordQuery, parse_words
from traceir.items import MODALITIES, Hit, Item, Modality, Value, Vector

FORMAT: Final = 1
"""Of the SQLite file and of the Milvus collection."""
MAX_ID_BYTES: Final = 1024
MAX_DIM: Final = 65_536
MAX_NOTE_BYTES: Final = 60_000
StoredType = Literal["float32", "float16", "int8"]
Vectors = npt.NDArray[np.float32]
UNIT: Final = 0.01
"""By how much the squared length of a vector that was kept may differ from 1: float16 rounds by a tenth of it at most."""
_NAMED: Final = 20
_TEXT: Final = (str, type(None))


class DamageError(Exception):
    """What was read is not what an index holds; an adapter makes a StoreError of it that says which index."""


class ModelIdentity(Protocol):
    """Which model makes the vectors of an index: an encoder, or what is known of one."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def prompt_version(self) -> str: ...

    @property
    def width(self) -> int:
        """The length D of its vectors."""


class OpenOptions(TypedDict, total=False):
    """The options of `open_index`, which describes them."""

    fingerprint: str | None
    prompt_version: str | None
    dim: int | None
    create: bool
    dtype: StoredType
    timeout: float


@dataclass(frozen=True, slots=True)
class Opening:
    """`OpenOptions` with the defaults filled in."""

    fingerprint: str | None = None
    prompt_version: str | None = None
    dim: int | None = None
    create: bool = False
    dtype: StoredType = "float32"
    timeout: float = 10.0


@dataclass(frozen=True, slots=True)
class Stored:
    """What an index keeps of one item. `vector` ([D], unit length) only where it was asked for."""

    id: str
    modality: Modality
    text: str | None
    image: str | None
    fields: Mapping[str, Value]
    content_hash: str
    vector: Vector | None = None

    def hit(self, score: float, rank: int) -> Hit:
        return Hit(self.id, score, rank, self.modality, self.text, self.image, self.fields)


@dataclass(frozen=True, slots=True)
class IndexMeta:
    """What an index says of itself, written when it is made."""

    format: int
    dim: int
    dtype: StoredType
    fingerprint: str
    prompt_version: str
    created: str

    @classmethod
    def new(cls, uri: str, opening: Opening, dtypes: Sequence[StoredType]) -> IndexMeta:
        """Of an index about to be made; InputError where something is missing or not among `dtypes`."""
        dim, dtype = opening.dim, opening.dtype
        if not opening.fingerprint or not opening.prompt_version or dim is None:
            raise InputError(f"a new index at {uri} needs the encoder's fingerprint, prompt version and width")
        if not 1 <= dim <= MAX_DIM or dtype not in dtypes:
            raise InputError(f"this index cannot hold {dtype} of width {dim}; choose {' or '.join(dtypes)} and 1 to {MAX_DIM}")
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return cls(FORMAT, dim, dtype, opening.fingerprint, opening.prompt_version, created)

    @classmethod
    def read(cls, uri: str, kept: Mapping[str, Any], remedy: str) -> IndexMeta:
        """What was written; StoreError for another format, or, with the `remedy`, for what is damaged."""
        if (number := str(kept.get("format", "none"))) != str(FORMAT):
            what = f"{uri} has index format {number} but this version reads format {FORMAT}"
            raise StoreError(f"{what}; use the version of TraceIR that made it, or fill a new index")
        texts, dim = ("fingerprint", "prompt_version", "created"), str(kept.get("dim"))
        valid = {name: isinstance(kept.get(name), str) for name in texts}
        valid["dim"] = bool(re.fullmatch("[0-9]{1,5}", dim, re.ASCII)) and 1 <= int(dim) <= MAX_DIM
        valid["dtype"] = kept.get("dtype") in get_args(StoredType)
        if wrong := [name for name, is_valid in valid.items() if not is_valid]:
            raise StoreError(f"{uri} is damaged: {', '.join(wrong)} cannot be read; {remedy}")
        return cls(FORMAT, int(dim), kept["dtype"], *(kept[name] for name in texts))

    def check(self, uri: str, opening: Opening) -> None:
        """Raise StoreError where the index was made by another model than the one it is opened for."""
        check_identity(uri, "model", self.fingerprint, opening.fingerprint)
        if opening.dim not in (None, self.dim):
            what = f"index {uri} holds vectors of width {self.dim}, not {opening.dim}"
            raise StoreError(f"{what}; use the same encoder, at this width (--dim {self.dim})")
        check_identity(uri, "prompt version", self.prompt_version, opening.prompt_version)


@dataclass(frozen=True, slots=True)
class IndexInfo(IndexMeta):
    """A description of an index: items by modality, IVF lists of its approximate search (`cells`; 0: not built) and how many a
    search visits (`probes`), queries of its background by modality (none: not calibrated), and what those are."""

    uri: str
    counts: Mapping[Modality, int]
    cells: int
    probes: int
    bytes: int
    background: Mapping[Modality, int] = field(default_factory=dict)
    background_source: str = ""

    @property
    def count(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True, slots=True)
class Background:
    """Vectors of queries that nothing in an index answers, by the modality of the queries: [n, D] each, of unit length.

    `source` says in a few words what these queries are, `created` when they were encoded (ISO 8601).
    """

    vectors: Mapping[Modality, Vectors]
    source: str
    created: str

    @property
    def counts(self) -> dict[Modality, int]:
        """How many queries of each modality there are."""
        return {modality: len(own) for modality, own in self.vectors.items()}

    def described(self) -> str:
        """All but the vectors, as JSON."""
        return json.dumps({"source": self.source, "created": self.created, "counts": self.counts})


class Index(Protocol):
    """Vectors of unit length and what belongs to them, keyed by id; other lengths are normalised on the way in.

    Every argument is checked before anything is written (InputError); damage, locks and foreign files raise StoreError.
    """

    def check(self, items: Sequence[Item]) -> None:
        """Raises InputError for an item that `upsert` would refuse, whatever its vector."""
        check_items(items)

    def upsert(self, items: Sequence[Item], vectors: Vectors) -> set[str]:
        """Add or replace items by id, all or none; `vectors` is [N, D]. Durable on disk when it returns.

        Returns the ids that were not there before, as the write itself found it: of two calls at a time that bring one new id,
        one is told that it was new.
        """

    def delete(self, which: Sequence[str] | Filter) -> int:
        """Remove items by id or by filter (not by a text, which may be meant as an id), durably; returns how many were there."""

    def build_ann(self) -> None:
        """Makes what `search(exact=False)` needs; replaces what was made before."""

    def search(
        self, vectors: Vectors, k: int, *, where: Where = None, modality: Modality | None = None, exact: bool = True
    ) -> list[list[Hit]]:
        """The k items of highest cosine for each row of `vectors` [Q, D], best first; equal scores in order of id."""

    def get(self, ids: Sequence[str], *, with_vectors: bool = False) -> dict[str, Stored]:
        """What is kept under these ids; ids that are not there are left out."""

    def search_keywords(self, text: str, k: int, *, where: Where = None, modality: Modality | None = None) -> list[Hit]:
        """The k items of highest BM25 for the words of `text`, in their text, name and text fields; best first, equal ones by id.

        What `words.parse_words` says of "phrases", -without and prefix* holds; InputError where there is nothing to look for.
        """

    def browse(self, where: Where = None, *, sort: str = "id", after: Position | None = None, limit: int) -> list[Stored]:
        """The first `limit` items behind `after`, in order of a field or of `id`; `-NAME` is the reverse order.

        Booleans come before numbers before texts; equal values in order of id; what has no value, or a list, last, either way.
        `position_of` the last item is the next page's `after`, from which nothing is left out or doubled, whatever was added or
        removed meanwhile.
        """

    def count(self, where: Where = None) -> int: ...

    def scan(self, where: Where = None, *, with_vectors: bool = False) -> Iterator[Stored]:
        """Every item in order of id (code points); writes made meanwhile may or may not be seen."""

    def facets(self, where: Where = None, *, limit: int) -> list[Facet]:
        """The fields of the items that pass, those that most have first, each with its `limit` commonest values. Counts may be
        estimates from some thousand items."""
        return facets_of(((item.id, item.fields) for item in self.scan(where)), limit, self.count(where))

    def info(self) -> IndexInfo: ...

    def keep_background(self, background: Background) -> None:
        """Keeps these vectors beside the items, durably, in place of those that were kept before."""

    def background(self) -> Background | None:
        """What was kept last; None where nothing was."""

    def keep_note(self, name: str, value: str) -> None:
        """Keeps a text under a name of the index's own, durably, in place of the one before; `version` stays."""

    def note(self, name: str) -> str | None:
        """What was kept under this name; None where nothing was."""

    def version(self) -> str:
        """A text that is another one once items or background have changed."""

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class CheckedIndex(Index, Protocol):
    """What every adapter does before it comes to its own storage."""

    _shown: str
    """How messages name the index."""
    _opening: Opening
    _meta: IndexMeta

    def upsert(self, items: Sequence[Item], vectors: Vectors) -> set[str]:
        self._need_model("add to")
        check_items(items)
        unit = check_vectors(vectors, len(items), self._meta.dim, [item.id for item in items])
        return self._write(items, unit) if items else set()

    def search(
        self, vectors: Vectors, k: int, *, where: Where = None, modality: Modality | None = None, exact: bool = True
    ) -> list[list[Hit]]:
        self._need_model("search")
        check_search(k, modality)
        return self._find(check_vectors(vectors, None, self._meta.dim), k, as_filter(where), modality, exact)

    def search_keywords(self, text: str, k: int, *, where: Where = None, modality: Modality | None = None) -> list[Hit]:
        check_search(k, modality)
        return self._find_words(parse_words(text), k, as_filter(where), modality)

    def browse(self, where: Where = None, *, sort: str = "id", after: Position | None = None, limit: int) -> list[Stored]:
        return self._page_of(as_filter(where), check_page(sort, after, limit))

    def keep_note(self, name: str, value: str) -> None:
        if not isinstance(value, str) or len(value.encode()) > MAX_NOTE_BYTES or not is_value(value):
            raise InputError(f"note {shown(name)} is {shown(value)}; give a text of at most {MAX_NOTE_BYTES} bytes")
        self._keep_note(check_note(name), value)

    def _need_model(self, action: str) -> None:
        if self._opening.fingerprint is None:
            what = f"index {self._shown} was opened without a model, only to look at it"
            raise StoreError(f"{what}; to {action} it, open it with the fingerprint of the model in use")

    def _write(self, items: Sequence[Item], unit: Vectors) -> set[str]:
        """`upsert` of at least one item."""

    def _find(self, queries: Vectors, k: int, where: Filter | None, modality: Modality | None, exact: bool) -> list[list[Hit]]:
        """`search` by vectors of unit length."""

    def _find_words(self, words: KeywordQuery, k: int, where: Filter | None, modality: Modality | None) -> list[Hit]:
        """`search_keywords` by a query that was read."""

    def _page_of(self, where: Filter | None, page: Page) -> list[Stored]:
        """`browse` of a page that was checked."""

    def _keep_note(self, name: str, value: str) -> None:
        """`keep_note` of one that was checked."""


def prepare_file(file: Path, shown: str, create: bool, is_there: Callable[[Path], bool]) -> None:
    """Make the folder of an index's file; StoreError where that cannot be, or where the file is missing and not to be made."""
    try:
        if create:
            file.parent.mkdir(parents=True, exist_ok=True)
        elif not is_there(file):
            raise missing(shown)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise StoreError(f"the folder of index {shown} cannot be made or looked into: {why}; choose another") from error


def missing(shown: str) -> StoreError:
    return StoreError(f"there is no index at {shown}; check the address, or fill one with `traceir index add`")


def image_of(item: Item) -> str | None:
    """What an index keeps of the first image: its path, or its name, or None."""
    image = item.images[0] if item.images else None
    return None if image is None else str(image.path) if image.path else image.name or None


def check_id(id: str | None) -> str:
    """The id, or InputError where it is missing, longer than MAX_ID_BYTES in UTF-8, or not plain text."""
    if not isinstance(id, str) or not id:
        raise InputError(f"id {shown(id)} is missing or not a text; give every item an id of 1 to {MAX_ID_BYTES} bytes")
    if not is_value(id):
        raise InputError(f"id {id[:80]!r} is not valid Unicode text or contains a zero character; rename it")
    if (size := len(id) if id.isascii() else len(id.encode())) > MAX_ID_BYTES:
        raise InputError(f"id {id[:80]!r}... has {size} bytes, more than {MAX_ID_BYTES}; give a shorter one")
    return id


def check_ids(ids: Sequence[str]) -> list[str]:
    if isinstance(ids, str):
        raise InputError(f"ids is the single text {ids[:80]!r}; give a list of ids")
    return [check_id(id) for id in ids]


def check_items(items: Sequence[Item]) -> None:
    """Raise InputError for missing, unusable or repeated ids and for fields that cannot be kept."""
    seen: set[str] = set()
    for item in items:
        id = check_id(item.id)
        if id in seen:
            raise InputError(f"id {id!r} occurs twice in one call; ids must differ, nothing was written")
        seen.add(id)
        check_text(id, item.text + (image_of(item) or ""))
        for name, value in item.fields.items():
            if name in OWN_NAMES:
                raise InputError(f"item {id!r} has a field called {name!r}, which an index keeps itself; rename it")
            check_field(name, value)


def check_note(name: str) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", name):
        raise InputError(f"note {shown(name)} has an unusable name; give 1 to 63 small letters, digits, dashes or underscores")
    return name


def check_text(id: str, text: str) -> None:
    """Raise InputError where a text holds half a surrogate pair and so has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the text of item {id!r} is not valid Unicode at character {error.start}; repair it") from error


def check_vectors(vectors: Vectors, rows: int | None, dim: int, ids: Sequence[str | None] = ()) -> Vectors:
    """Unit-length float32 [N, D], contiguous; InputError for a wrong shape, NaN, infinity or a zero vector."""
    array = np.asarray(vectors)
    if array.ndim != 2 or array.dtype.kind not in "fiu" or (rows is not None and array.shape[0] != rows):
        expected = f"[{'N' if rows is None else rows}, {dim}]"
        raise InputError(f"vectors are {array.dtype} of shape {list(array.shape)}; give float32 of shape {expected}")
    if array.shape[1] != dim:
        raise InputError(f"vectors are {array.shape[1]} wide but the index holds {dim}; use the encoder that filled it")
    wide = array.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1)
    bad = np.flatnonzero(~np.isfinite(norms) | (norms < 1e-12))
    if len(bad):
        row = int(bad[0])
        name = f" of item {ids[row]!r}" if ids else ""
        what = "has length zero" if math.isfinite(norms[row]) else "contains NaN or infinity"
        raise InputError(f"vector {row}{name} {what}; nothing was written, check the encoder")
    off = np.abs(norms - 1.0) > 1e-6
    unit = np.ascontiguousarray(array, dtype=np.float32)
    if off.any():
        unit = unit.copy() if unit is array else unit
        unit[off] = (wide[off] / norms[off, None]).astype(np.float32)
    return unit


def check_background(background: Background, dim: int) -> Background:
    """The same with its vectors checked and of unit length; InputError where it is empty or they are no vectors of this width."""
    if not any(map(len, background.vectors.values())):
        raise InputError("the background holds no query; give at least one")
    for modality in background.vectors:
        check_search(1, modality)
    checked = {modality: check_vectors(own, None, dim) for modality, own in background.vectors.items() if len(own)}
    return replace(background, vectors=checked)


def check_search(k: int, modality: str | None) -> None:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise InputError(f"k is {shown(k)}; ask for at least 1 hit")
    if modality is not None and modality not in MODALITIES:
        raise InputError(f"modality {modality!r} is unknown; choose one of {', '.join(MODALITIES)}")


def check_identity(uri: str, what: str, stored: str, current: str | None) -> None:
    """Raise StoreError where the index was made by another model or prompt than the one in use."""
    if current is not None and stored != current:
        clash = f"index {uri} was made with {what} {stored!r} but {current!r} is in use"
        raise StoreError(f"{clash}; search it with the model that filled it, or fill a new index")


def read_described(described: str) -> tuple[str, str, dict[Modality, int]]:
    """Source, creation and counts of what `Background.described` wrote; DamageError for anything else."""
    try:
        read = json.loads(described)
        counts = {modality: int(read["counts"][modality]) for modality in MODALITIES if modality in read["counts"]}
        return str(read["source"]), str(read["created"]), counts
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise background_damage() from error


def background_damage() -> DamageError:
    return DamageError("its background cannot be read; make it anew with `traceir index calibrate`")


def stored_of(
    id: object, modality: object, text: object, image: object, fields: str, content_hash: object, *, vector: Vector | None
) -> Stored:
    """What was read of an item; DamageError where it is not what is ever written."""
    try:
        name = check_id(id if isinstance(id, str) else None)
        read = json.loads(fields)
        for field_name, value in read.items():
            if value.__class__ is not str or not value.isascii():  # most texts need no second look
                check_field(field_name, value)
        if modality not in MODALITIES:
            raise ValueError(f"modality {shown(modality)}")
        if not (isinstance(text, _TEXT) and isinstance(image, _TEXT) and isinstance(content_hash, str)):
            raise ValueError("a text, image or hash that is none")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        what = f"item {shown(id)} is damaged ({str(error)[:200]})"
        raise DamageError(f"{what}; remove it with `traceir index rm` and add it again") from error
    return Stored(name, modality, text, image, read, content_hash, vector)


def rows_not_unit(vectors_ND: Vectors) -> list[int]:
    """The rows of vectors that were kept whose length is not 1, among them those with NaN, which would hide all others."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.vecdot(vectors_ND, vectors_ND)
        return np.flatnonzero(~(np.abs(squares - 1.0) <= UNIT)).tolist()


def unusable(ids: Sequence[object]) -> DamageError:
    """The error for items that cannot be searched; if they were skipped, every answer would lack them."""
    named = ", ".join(shown(id) for id in ids[:_NAMED]) + (f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else "")
    some, listed = (f"item {named} has", "") if len(ids) == 1 else (f"{len(ids)} items have", f": {named}")
    what = f"{some} no whole vector of finite numbers and length 1{listed}"
    return DamageError(f"{what}; remove and add again (`traceir index rm ID`), or restore the index from a copy")


def size_of(files: Iterable[Path]) -> int:
    """Bytes of these files together; one that another process has removed meanwhile counts nothing."""
    total = 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total
