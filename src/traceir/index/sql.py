"""The SQLite file behind the embedded index: tables, opening and creating, rows, filters as SQL, errors in words."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from traceir.errors import StoreError
from traceir.files import sync_folder
from traceir.index import store
from traceir.index.facets import LONGEST, MOST_FIELDS, Facet, commonest, is_date
from traceir.index.filters import (
    OWN_NAMES,
    And,
    Filter,
    Glob,
    Kind,
    Leaf,
    Not,
    Range,
    Scalar,
    after_all,
    is_list,
    kind_of,
    merge_ranges,
    parts_of,
    shown,
    values_of,
    wanted_by_kind,
)
from traceir.index.store import Background, DamageError, IndexMeta, Opening, Vectors
from traceir.items import Item, Modality

Rows = npt.NDArray[np.int64]
APPLICATION_ID: Final = 0x54524958  # "TRIX", at byte 68 of the file
SCHEMA: Final = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    # n is never used twice: a replaced item gets a new one, so a row once read never changes.
    "CREATE TABLE items (n INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, modality TEXT NOT NULL, "
    "text TEXT, image TEXT, fields TEXT NOT NULL, content_hash TEXT NOT NULL)",
    "CREATE INDEX items_modality ON items (modality)",
    "CREATE TABLE vectors (n INTEGER PRIMARY KEY, vector BLOB NOT NULL)",
    "CREATE TABLE fields (name TEXT NOT NULL, kind TEXT NOT NULL, value NOT NULL, n INTEGER NOT NULL, "
    "PRIMARY KEY (name, kind, value, n)) WITHOUT ROWID",
    "CREATE INDEX fields_n ON fields (n)",
    # The IVF lists: the list of each row, and their centroids.
    "CREATE TABLE cells (n INTEGER PRIMARY KEY, cell INTEGER NOT NULL)",
    "CREATE TABLE centroids (modality TEXT NOT NULL, cell INTEGER NOT NULL, vector BLOB NOT NULL, "
    "PRIMARY KEY (modality, cell)) WITHOUT ROWID",
)
BACKGROUND: Final = (
    "CREATE TABLE IF NOT EXISTS background (modality TEXT NOT NULL, number INTEGER NOT NULL, vector BLOB NOT NULL, "
    "PRIMARY KEY (modality, number)) WITHOUT ROWID"
)
"""Made by the first `keep_background`; an index never calibrated has none, and versions that do not know it pass over it."""
COLUMNS: Final = "i.n, i.id, i.modality, i.text, i.image, i.fields, i.content_hash"
FAULTS: Final = (sqlite3.Error, DamageError, OverflowError, UnicodeDecodeError)
"""What reading and writing raise: also OverflowError for a number too large, UnicodeDecodeError for a message that is none."""
AMONG: Final = "IN (SELECT value FROM json_each(?))"
"""One of a JSON array's values, of which there may be any number."""
CHUNK: Final = 2000
"""Rows at a time."""
_TABLES: Final = "SELECT count(*) FROM sqlite_master"
_STATEMENTS: Final = 8
"""Prepared statements that are kept; each holds the values of its last run, which may be a whole filter."""
_ERRORS: Final = (
    (
        (),
        re.compile("no such module"),
        "keyword search needs FTS5, which this Python's SQLite lacks ({text}); use another Python",
    ),
    (
        (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL),
        None,
        "index {path} is locked: another process has been writing for {timeout:g} seconds; "
        "wait for it to end, or open the index with a longer timeout",
    ),
    (
        (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH),
        re.compile(r"no such|has no column|malformed|decode|too large to convert"),
        "index {path} is damaged ({text}); restore it from a copy, or remove it and fill it again",
    ),
    ((sqlite3.SQLITE_FULL,), None, "the disk of index {path} is full; nothing of this call was written: make room and repeat it"),
    (
        (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH),
        None,
        "index {path} cannot be opened for writing ({text}); check its folder and rights",
    ),
    ((sqlite3.SQLITE_IOERR,), None, "index {path} failed: {text}; check the disk, or restore the index from a copy"),
    (
        (sqlite3.SQLITE_TOOBIG,),
        re.compile(r"too many|too large|too big|too long|longer than|stack overflow|too complex"),
        "index {path} takes less in one call ({text}); nothing of this one was written: give it in smaller parts",
    ),
    ((), re.compile(""), "index {path} failed: {text}; repeat the call, and report it if it fails again"),
)
"""SQLite's codes, or words in its message, and what they mean to the user; the first that fits is used."""


def connect(path: Path, opening: Opening) -> sqlite3.Connection:
    """A connection in autocommit mode whose commits reach the disk before they return; `create` makes the folder and the file."""
    store.prepare_file(path, str(path.parent), opening.create, Path.is_file)
    address = f"{path.absolute().as_uri()}?mode={'rwc' if opening.create else 'rw'}"
    connection = sqlite3.connect(
        address, uri=True, timeout=opening.timeout, isolation_level=None, check_same_thread=False, cached_statements=_STATEMENTS
    )
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA cell_size_check = ON")
    return connection


def create_tables(connection: sqlite3.Connection, path: Path, opening: Opening) -> None:
    """Make the tables in an empty file; where another process was quicker, or the file is in use, leave it alone."""
    if read_number(connection, _TABLES):
        return
    meta = IndexMeta.new(str(path.parent), opening, ("float32", "float16", "int8"))
    _enter_wal(connection, path, opening.timeout)
    connection.execute("BEGIN IMMEDIATE")
    if not read_number(connection, _TABLES):
        for statement in (*SCHEMA, f"PRAGMA application_id = {APPLICATION_ID}"):
            connection.execute(statement)
        rows = [(name, str(getattr(meta, name))) for name in IndexMeta.__dataclass_fields__]
        connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
    connection.execute("COMMIT")
    for folder in (path.parent, path.parent.parent) if os.name == "posix" else ():
        sync_folder(folder)


def read_meta(connection: sqlite3.Connection, path: Path) -> IndexMeta:
    """What the index says of itself; StoreError for a file of another program, another format, or a damaged one."""
    if read_number(connection, "PRAGMA application_id") != APPLICATION_ID:
        what = f"{path} is not an index of TraceIR, or its creation was cut off"
        raise StoreError(f"{what}; choose another folder, or remove the file and fill the index again")
    page, size = read_number(connection, "PRAGMA page_size"), path.stat().st_size
    if size % page and not store.size_of([path.with_name(path.name + "-wal")]):  # SQLite would read zeros where the rest was
        raise DamageError(f"it was cut off at byte {size}; restore it from a copy, or remove it and fill it again")
    kept = dict(connection.execute("SELECT name, value FROM meta").fetchall())
    return IndexMeta.read(str(path), kept, "restore it from a copy, or fill a new index")


def read_numbers(connection: sqlite3.Connection, statement: str, values: Sequence[Scalar] = ()) -> Rows:
    """The first column of what is selected."""
    return np.fromiter((row[0] for row in connection.execute(statement, values)), dtype=np.int64)


def read_number(connection: sqlite3.Connection, statement: str, values: Sequence[Scalar] = ()) -> int:
    """The one number selected; 0 where there is none."""
    row = connection.execute(statement, values).fetchone()
    try:
        return int(row[0] or 0) if row else 0
    except (TypeError, ValueError, OverflowError) as error:
        raise DamageError(f"{shown(row[0])} is no number; restore it from a copy, or remove it and fill it again") from error


def read_counter(connection: sqlite3.Connection, name: str) -> int:
    return read_number(connection, "SELECT value FROM meta WHERE name = ?", [name])


def write_background(connection: sqlite3.Connection, background: Background) -> None:
    """Replaces what was kept; within a transaction. Vectors are float32, whatever those of the items are."""
    connection.execute(BACKGROUND)
    connection.execute("DELETE FROM background")
    for modality, vectors in background.vectors.items():
        rows = ((modality, number, vector.astype("<f4").tobytes()) for number, vector in enumerate(vectors))
        connection.executemany("INSERT INTO background VALUES (?, ?, ?)", rows)
    connection.execute("INSERT OR REPLACE INTO meta VALUES ('background', ?)", (background.described(),))


def describe_background(connection: sqlite3.Connection) -> tuple[str, str, dict[Modality, int]]:
    """Source, creation and number of queries of what `write_background` kept; texts of none where nothing was."""
    row = connection.execute("SELECT value FROM meta WHERE name = 'background'").fetchone()
    return ("", "", {}) if row is None else store.read_described(row[0])


def read_background(connection: sqlite3.Connection, dim: int) -> Background | None:
    """What `write_background` kept; DamageError where it is not all there."""
    source, created, counts = describe_background(connection)
    if not counts:
        return None
    rows = connection.execute("SELECT modality, vector FROM background ORDER BY modality, number").fetchall()
    vectors: dict[Modality, Vectors] = {}
    for modality, count in counts.items():
        blobs = [blob for name, blob in rows if name == modality and isinstance(blob, bytes) and len(blob) == 4 * dim]
        vectors[modality] = np.frombuffer(b"".join(blobs), dtype="<f4").reshape(-1, dim)
        if len(blobs) != count or store.rows_not_unit(vectors[modality]):
            raise store.background_damage()
    return Background(vectors, source, created)


def compile_filter(where: Filter | None, *, row_by_row: bool = False) -> tuple[str, list[Scalar]]:
    """A filter as a condition on the table `items i`, with `?` for every value.

    By default all that pass are gathered by the index of fields; `row_by_row` looks at the fields of each row, for a few rows.
    """
    if where is None:
        return "1", []
    where = merge_ranges(where)
    if isinstance(where, Leaf):
        return _compile_leaf(where, row_by_row)
    compiled = [compile_filter(part, row_by_row=row_by_row) for part in parts_of(where)]
    conditions, bound = [f"({condition})" for condition, _ in compiled], [value for _, values in compiled for value in values]
    if isinstance(where, Not):
        return f"NOT {conditions[0]}", bound
    return (" AND ".join(conditions) or "1", bound) if isinstance(where, And) else (" OR ".join(conditions) or "0", bound)


def _compile_leaf(leaf: Leaf, row_by_row: bool) -> tuple[str, list[Scalar]]:
    compiled = [_compile_test(leaf, kind, test, values, row_by_row) for kind, test, values in leaf_tests(leaf)]
    return " OR ".join(f"({test})" for test, _ in compiled) or "0", [value for _, values in compiled for value in values]


def leaf_tests(leaf: Leaf) -> list[tuple[Kind, str, list[Scalar]]]:
    """What a condition asks of the `value` of a field, for each kind of values that may fulfil it."""
    if isinstance(leaf, Range):
        values: list[Scalar] = [value for value, _ in leaf.bounds()]
        return [(kind_of(values[0]), " AND ".join(f"value {sign} ?" for _, sign in leaf.bounds()), values)]
    if isinstance(leaf, Glob):
        # SQLite's own pattern also knows [sets]. The bounds, which say no more than it does, let the index of values be used.
        begins = Range(leaf.name, low=leaf.prefix, below=after_all(leaf.prefix))
        return [
            (kind, f"{test} AND value GLOB ?", [*own, leaf.pattern.replace("[", "[[]")]) for kind, test, own in leaf_tests(begins)
        ]
    return [(kind, f"value IN ({', '.join('?' * len(wanted))})", wanted) for kind, wanted in wanted_by_kind(leaf).items()]


def _compile_test(leaf: Leaf, kind: Kind, test: str, values: list[Scalar], row_by_row: bool) -> tuple[str, list[Scalar]]:
    if leaf.name in OWN_NAMES:
        return (re.sub(r"\bvalue\b", f"i.{leaf.name}", test), values) if kind == "text" else ("0", [])
    if kind == "none":
        return f"NOT {_has_field('name = ?', row_by_row)}", [leaf.name]
    condition, bound = _has_field(f"name = ? AND kind = ? AND {test}", row_by_row), [leaf.name, kind, *values]
    if isinstance(leaf, Range):
        return f"{condition} AND NOT {_has_field('name = ? AND kind = ?', row_by_row)}", [*bound, leaf.name, "list"]
    return condition, bound


def _has_field(test: str, row_by_row: bool) -> str:
    if row_by_row:
        return f"EXISTS (SELECT 1 FROM fields f INDEXED BY fields_n WHERE f.n = i.n AND {test})"
    return f"(i.n IN (SELECT n FROM fields WHERE {test}))"


def count_facets(connection: sqlite3.Connection, where: Filter | None, limit: int) -> Iterator[Facet]:
    """The facets of the items that pass, unordered; each step is a statement of its own, between which others may come."""
    clause, values = compile_filter(where)
    passing = "1" if where is None else f"n IN (SELECT i.n FROM items i WHERE {clause})"
    folders = connection.execute(
        f"SELECT substr(i.id, 1, instr(i.id, '/')) AS folder, count(*) FROM items i WHERE folder != '' AND ({clause}) GROUP BY 1",
        values,
    ).fetchall()
    if folders:
        names = sorted(folder for folder, _ in folders)
        yield Facet("id", "folder", sum(count for _, count in folders), names[0], names[-1], commonest(folders, limit))
    found = connection.execute(
        "SELECT name, kind, count(*), min(value), max(value) FROM fields "
        f"WHERE kind IN ('text', 'number', 'boolean') AND {passing} GROUP BY name, kind ORDER BY 3 DESC LIMIT ?",
        [*(() if where is None else values), MOST_FIELDS],
    ).fetchall()
    for name, kind, count, low, high in found:
        dated = kind == "text" and is_date(low, high)
        counted = connection.execute(
            f"SELECT {'substr(value, 1, 4)' if dated else 'value'}, count(*) FROM fields WHERE name = ? AND kind = ? "
            f"AND length(value) <= ? AND {passing} GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT ?",
            [name, kind, LONGEST, *(() if where is None else values), limit],
        ).fetchall()
        if kind == "boolean":
            low, high, counted = bool(low), bool(high), [(bool(value), number) for value, number in counted]
        yield Facet(name, "date" if dated else kind, count, low, high, tuple(counted))


def row_of(item: Item) -> tuple[str, str, str | None, str | None, str, str]:
    fields = json.dumps(dict(item.fields), ensure_ascii=False)
    return str(item.id), item.modality, item.text or None, store.image_of(item), fields, item.content_hash()


def field_rows(items: Sequence[Item], first: int) -> Iterator[tuple[int, str, str, Scalar]]:
    """One row for a value, one for each value of a list; of a list one more, of the kind `list`, says how many there are."""
    for n, item in enumerate(items, start=first):
        for name, value in item.fields.items():
            values = values_of(value)
            for part in values:
                yield n, name, kind_of(part), part
            if values and is_list(value):
                yield n, name, "list", len(values)


def explain_error(error: Exception, path: Path, timeout: float) -> StoreError:
    """What went wrong, and what to do, for one of FAULTS. The disk is blamed for what is the disk's fault only."""
    code, text = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF, str(error)[:200]
    if isinstance(error, DamageError):
        return StoreError(f"index {path} is damaged: {error}")
    words = next(words for codes, pattern, words in _ERRORS if code in codes or (pattern and pattern.search(text)))
    return StoreError(words.format(path=path, text=text, timeout=timeout))


def _enter_wal(connection: sqlite3.Connection, path: Path, timeout: float) -> None:
    """Switch the file to a write-ahead log; where two processes do so at once, SQLite says `busy` without waiting."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode == "wal":
                return
            raise StoreError(f"the file system of {path} keeps no write-ahead log; put the index on a local disk")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
