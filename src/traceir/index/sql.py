"""The SQLite file behind the embedded index: tables, opening and creating, rows, filters as SQL, errors in words."""

from __future__ import annotations

import datetime
import json
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from traceir.errors import InputError, StoreError
from traceir.index.filters import (
    OWN_NAMES,
    And,
    Eq,
    Filter,
    In,
    Kind,
    Range,
    Scalar,
    is_list,
    kind_of,
    not_a_filter,
    shown,
    values_of,
)
from traceir.index.matrix import Rows
from traceir.index.store import MAX_DIM, Background, DamageError, Vectors, image_of, rows_not_unit, size_of
from traceir.items import MODALITIES, Item, Modality

FORMAT: Final = 1
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
CHUNK: Final = 2000
"""Rows, or values of a statement, at a time."""
_META: Final = ("dim", "dtype", "fingerprint", "prompt_version", "created")
_STATEMENTS: Final = 8
"""Prepared ones that are kept, each with the values it was last run with, a whole filter for instance."""
_TOO_LARGE: Final = re.compile(r"too many|too large|too big|too long|longer than|stack overflow|too complex")
_BROKEN: Final = re.compile(r"no such|has no column|malformed|decode|too large to convert")


def connect(path: Path, timeout: float, create: bool) -> sqlite3.Connection:
    """A connection in autocommit mode whose commits reach the disk before they return."""
    address = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
    try:
        connection = sqlite3.connect(
            address, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False, cached_statements=_STATEMENTS
        )
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA cell_size_check = ON")
        return connection
    except FAULTS as error:
        raise explain_error(error, path, timeout) from error


def create_tables(
    connection: sqlite3.Connection,
    path: Path,
    *,
    fingerprint: str | None,
    prompt_version: str | None,
    dim: int | None,
    dtype: str,
    timeout: float,
) -> None:
    """Make the tables in an empty file; where another process was quicker, or the file is in use, leave it alone."""
    if _has_tables(connection):
        return
    if not fingerprint or not prompt_version or dim is None:
        raise InputError(f"a new index at {path.parent} needs the encoder's fingerprint, prompt version and width")
    if not 1 <= dim <= MAX_DIM or dtype not in ("float32", "float16"):
        raise InputError(f"an index cannot hold {dtype} of width {dim}; choose float32 or float16 and 1 to {MAX_DIM}")
    _enter_wal(connection, path, timeout)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    described = {
        "format": FORMAT,
        "dim": dim,
        "dtype": dtype,
        "fingerprint": fingerprint,
        "prompt_version": prompt_version,
        "created": created,
    }
    connection.execute("BEGIN IMMEDIATE")
    if not _has_tables(connection):
        for statement in SCHEMA:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        rows = [(name, str(value)) for name, value in described.items()]
        connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
    connection.execute("COMMIT")
    _sync_folder(path.parent)
    _sync_folder(path.parent.parent)


def read_meta(connection: sqlite3.Connection, path: Path) -> dict[str, str]:
    """What the index says of itself; StoreError for a file of another program, another format, or a damaged one."""
    if read_number(connection, "PRAGMA application_id") != APPLICATION_ID:
        raise StoreError(
            f"{path} is not an index of TraceIR, or its creation was cut off; "
            "choose another folder, or remove the file and fill the index again"
        )
    page, size = read_number(connection, "PRAGMA page_size"), path.stat().st_size
    if size % page and not size_of([path.with_name(path.name + "-wal")]):  # SQLite would read zeros where the rest was
        raise StoreError(
            f"{path} is damaged: it was cut off at byte {size}; restore it from a copy, or remove it and fill it again"
        )
    meta: dict[str, str] = dict(connection.execute("SELECT name, value FROM meta").fetchall())
    found = meta.get("format", "none")
    if found != str(FORMAT):
        raise StoreError(
            f"{path} has index format {found} but this version reads format {FORMAT}; "
            "use the version of TraceIR that made it, or fill a new index"
        )
    wrong = [name for name in _META if not isinstance(meta.get(name), str)]
    if not wrong and not (re.fullmatch("[0-9]{1,5}", meta["dim"], re.ASCII) and 1 <= int(meta["dim"]) <= MAX_DIM):
        wrong.append("dim")
    if not wrong and meta["dtype"] not in ("float32", "float16"):
        wrong.append("dtype")
    if wrong:
        raise StoreError(f"{path} is damaged: {', '.join(wrong)} cannot be read; restore it from a copy, or fill a new index")
    return meta


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
    connection.executemany(
        "INSERT INTO background VALUES (?, ?, ?)",
        (
            (modality, number, vector.astype("<f4").tobytes())
            for modality, vectors in background.vectors.items()
            for number, vector in enumerate(vectors)
        ),
    )
    told = json.dumps({"source": background.source, "created": background.created, "counts": background.counts})
    connection.execute("INSERT OR REPLACE INTO meta VALUES ('background', ?)", (told,))


def describe_background(connection: sqlite3.Connection) -> tuple[str, str, dict[Modality, int]]:
    """Source, creation and number of queries of what `write_background` kept; texts of none where nothing was."""
    row = connection.execute("SELECT value FROM meta WHERE name = 'background'").fetchone()
    if row is None:
        return "", "", {}
    try:
        told: dict[str, Any] = json.loads(row[0])
        counts = {modality: int(told["counts"][modality]) for modality in MODALITIES if modality in told["counts"]}
        return str(told["source"]), str(told["created"]), counts
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_background() from error


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
        if len(blobs) != count or rows_not_unit(vectors[modality]):
            raise _no_background()
    return Background(vectors, source, created)


def _no_background() -> DamageError:
    return DamageError("its background cannot be read; make it anew with `traceir index calibrate`")


def compile_filter(where: Filter | None, *, row_by_row: bool = False) -> tuple[str, list[Scalar]]:
    """A filter as a condition on the table `items i`, with `?` for every value.

    By default all that pass are gathered by the index of fields; `row_by_row` looks at the fields of each row, for a few rows.
    """
    if where is None:
        return "1", []
    if isinstance(where, And):
        parts = [compile_filter(part, row_by_row=row_by_row) for part in where.parts]
        condition = " AND ".join(f"({text})" for text, _ in parts) or "1"
        return condition, [value for _, values in parts for value in values]
    if isinstance(where, Eq):
        return _compile_in(where.name, (where.value,), row_by_row)
    if isinstance(where, In):
        return _compile_in(where.name, where.values, row_by_row)
    if isinstance(where, Range):
        bounds = [(sign, bound) for sign, bound in ((">=", where.low), ("<=", where.high)) if bound is not None]
        test = " AND ".join(f"value {sign} ?" for sign, _ in bounds)
        condition, given = _compile_test(where.name, kind_of(bounds[0][1]), test, [bound for _, bound in bounds], row_by_row)
        if where.name in OWN_NAMES:
            return condition, given
        return f"{condition} AND NOT {_has_field('name = ? AND kind = ?', row_by_row)}", [*given, where.name, "list"]
    raise not_a_filter(where)


def row_of(item: Item) -> tuple[str | None, str, str | None, str | None, str, str]:
    fields = json.dumps(dict(item.fields), ensure_ascii=False)
    return item.id, item.modality, item.text or None, image_of(item), fields, item.content_hash()


def field_rows(items: Sequence[Item], first: int) -> Iterator[tuple[int, str, str, Scalar]]:
    """One row for a value, one for each value of a list; of a list one more, of the kind `list`, says how many there are."""
    for n, item in enumerate(items, start=first):
        for name, value in item.fields.items():
            found = values_of(value)
            for one in found:
                yield n, name, kind_of(one), one
            if found and is_list(value):
                yield n, name, "list", len(found)


def explain_error(error: Exception, path: Path, timeout: float) -> StoreError:
    """What went wrong, and what to do, for one of FAULTS. The disk is blamed for what is the disk's fault only."""
    code, text = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF, str(error)[:200]
    if isinstance(error, DamageError):
        return StoreError(f"index {path} is damaged: {error}")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL):
        return StoreError(
            f"index {path} is locked: another process has been writing for {timeout:g} seconds; "
            "wait for it to end, or open the index with a longer timeout"
        )
    broken = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH)
    if code in broken or _BROKEN.search(text):
        return StoreError(f"index {path} is damaged ({text}); restore it from a copy, or remove it and fill it again")
    if code == sqlite3.SQLITE_FULL:
        return StoreError(f"the disk of index {path} is full; nothing of this call was written: make room and repeat it")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
        return StoreError(f"index {path} cannot be opened for writing ({text}); check its folder and rights")
    if code == sqlite3.SQLITE_IOERR:
        return StoreError(f"index {path} failed: {text}; check the disk, or restore the index from a copy")
    if code == sqlite3.SQLITE_TOOBIG or _TOO_LARGE.search(text):
        return StoreError(
            f"index {path} takes less in one call ({text}); nothing of this one was written: give it in smaller parts"
        )
    return StoreError(f"index {path} failed: {text}; repeat the call, and report it if it fails again")


def marks(values: Sequence[object]) -> str:
    return ", ".join("?" * len(values))


def _compile_in(name: str, values: Sequence[Scalar], row_by_row: bool) -> tuple[str, list[Scalar]]:
    conditions: list[str] = []
    given: list[Scalar] = []
    for kind in ("text", "number", "boolean"):
        own = [value for value in values if kind_of(value) == kind]
        if own:
            condition, bound = _compile_test(name, kind, f"value IN ({marks(own)})", own, row_by_row)
            conditions.append(condition)
            given += bound
    if any(value is None for value in values) and name not in ("id", "modality"):
        conditions.append(f"NOT {_has_field('name = ?', row_by_row)}")
        given.append(name)
    return " OR ".join(f"({condition})" for condition in conditions) or "0", given


def _compile_test(name: str, kind: Kind, test: str, values: Sequence[Scalar], row_by_row: bool) -> tuple[str, list[Scalar]]:
    if name in ("id", "modality"):
        return (test.replace("value", f"i.{name}"), list(values)) if kind == "text" else ("0", [])
    return _has_field(f"name = ? AND kind = ? AND {test}", row_by_row), [name, kind, *values]


def _has_field(test: str, row_by_row: bool) -> str:
    if row_by_row:
        return f"EXISTS (SELECT 1 FROM fields f INDEXED BY fields_n WHERE f.n = i.n AND {test})"
    return f"(i.n IN (SELECT n FROM fields WHERE {test}))"


def _has_tables(connection: sqlite3.Connection) -> bool:
    return bool(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])


def _enter_wal(connection: sqlite3.Connection, path: Path, timeout: float) -> None:
    """Switch the file to a write-ahead log; where two processes do so at once, SQLite says `busy` without waiting."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            break
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    if mode != "wal":
        raise StoreError(f"the file system of {path} keeps no write-ahead log; put the index on a local disk")


def _sync_folder(folder: Path) -> None:
    """Make the new file's name durable, where the system can sync folders."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
