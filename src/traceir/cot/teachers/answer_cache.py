"""Every answer that was paid for, by the key of what was asked, in one SQLite file of a folder that builds may share."""

from __future__ import annotations

import logging
import re
import sqlite3
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Final

from traceir.cot.files import json_lines, lock_file
from traceir.cot.teachers.teacher import Reply
from traceir.errors import DataError, TeacherError

log = logging.getLogger(__name__)

FILE: Final = "answers.sqlite"
KEY: Final = re.compile(r"[0-9a-f]{64}")
BUSY_S: Final = 120.0
"""How long one process waits for the answers of others to be written."""
_FIELDS: Final = "text, finish, model, prompt_tokens, completion_tokens, error, key"
"""Those of a Reply."""
_SCHEMA: Final = f"""
    PRAGMA journal_mode = PERSIST;
    CREATE TABLE IF NOT EXISTS answers ({_FIELDS}, stage, qid, time, counts);
    CREATE INDEX IF NOT EXISTS answers_by_key ON answers (key);
    CREATE TABLE IF NOT EXISTS journals (name PRIMARY KEY, bytes, lines);
"""
_FIND: Final = f"SELECT {_FIELDS} FROM answers WHERE key = ? AND counts LIMIT 1"
_ADD: Final = """INSERT INTO answers SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10,
    NOT EXISTS (SELECT 1 FROM answers WHERE key = ?7 AND counts)"""
_TAKE_BACK: Final = "UPDATE answers SET counts = 0 WHERE key = ?"


class AnswerCache:
    """Answers by key (64 hex digits). Of the answers to a key the first counts; one that does not count stays paid.

    What `put` has acknowledged is on the disk: neither a kill nor a power cut takes it. Answers that come while others are being
    written are written together. Processes, also of several machines, may share a folder whose file system has locks (hence no
    WAL); one process a `writer`, where it is named, so that a command started twice does not pay twice. The totals are over all
    that was there on opening, and what came from here since. Journals (`*.jsonl`) of older releases are read in once and stay.
    """

    def __init__(self, folder: Path, writer: str = "") -> None:
        self.folder, self.path, self._failed, self._waiting = folder, folder / FILE, "", list[tuple[Any, ...]]()
        folder.mkdir(parents=True, exist_ok=True)
        remedy = "end that one, or give this one another shard or folder"
        self._lock = lock_file(folder / f"{writer}.lock", remedy) if writer else None
        self._thread = ThreadPoolExecutor(1, "answers")
        self._database = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            self._database.executescript(_SCHEMA)
            for path in sorted(folder.glob("*.jsonl")):
                self._read_journal(path)
            totals = "SELECT count(*), total(prompt_tokens), total(completion_tokens) FROM answers"
            self.answers, self.prompt_tokens, self.completion_tokens = map(int, self._database.execute(totals).fetchone())
        except BaseException as error:
            self.close()
            if isinstance(error, sqlite3.Error):
                raise TeacherError(f"{self.path}: {error}; check the file, its rights and the disk") from error
            raise

    def get(self, key: str) -> Future[Reply | None]:
        """The answer to a key; None where there is none. Calls are served in order, also those of `put` and `take_back`."""
        return self._thread.submit(self._find, key)

    def put(self, stage: str, qid: str, reply: Reply) -> Future[None]:
        """Keeps the answer to `reply.key`. TeacherError where it cannot be kept; then nothing is taken any more."""
        if not KEY.fullmatch(reply.key):
            raise DataError(f"key {reply.key!r} of an answer is not 64 hex digits")
        self._waiting.append(_row(reply, stage, qid, round(time.time(), 3)))
        self.answers += 1
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        return self._thread.submit(self._write_waiting)

    def take_back(self, keys: Sequence[str]) -> Future[None]:
        """From now on the answers to these keys that are there count no more, and they are asked anew; they stay paid."""
        return self._thread.submit(self._write, _TAKE_BACK, [(key,) for key in keys])

    def close(self) -> None:
        """Frees the file and the writer; once is enough, more does no harm."""
        self._thread.shutdown()
        self._database.close()
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find(self, key: str) -> Reply | None:
        found = self._database.execute(_FIND, (key,)).fetchone()
        return Reply(*found) if found else None

    def _write_waiting(self) -> None:
        """The first of several callers does the work of those behind it."""
        rows, self._waiting = self._waiting, []
        self._write(_ADD, rows)

    def _write(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if self._failed:
            raise TeacherError(self._failed)
        try:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                self._database.executemany(statement, rows)
        except sqlite3.Error as error:
            remedy = "free the disk and start again, all answers before are kept"
            self._failed = f"{self.path} cannot be written: {error}; {remedy}"
            raise TeacherError(self._failed) from error

    def _read_journal(self, path: Path) -> None:
        """Reads in what an older release's journal holds beyond what was read before; a last line without its end is none."""
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            known = self._database.execute("SELECT bytes, lines FROM journals WHERE name = ?", (path.name,)).fetchone()
            size, (read, lines) = path.stat().st_size, known or (0, 0)
            if size == read:
                return
            rows = json_lines(path, _journal_row, "remove this line, and its question is asked anew", ended=True)
            for row in islice(rows, lines, None):
                self._database.execute(*((_TAKE_BACK, (row[6],)) if row[1] == "taken_back" else (_ADD, row)))
                lines += 1
            self._database.execute("INSERT OR REPLACE INTO journals VALUES (?, ?, ?)", (path.name, size, lines))
        log.warning("%s: its %d answers are now in %s too; the file is not written any more", path, lines, FILE)


def _journal_row(line: dict[str, Any]) -> tuple[Any, ...]:
    reply = Reply(**{name: line[name] for name in _FIELDS.split(", ")})
    if not KEY.fullmatch(reply.key) or not all(isinstance(line[name], str) for name in ("stage", "qid", "finish")):
        raise ValueError(f"key {reply.key!r} is not that of an answer")
    return _row(reply, line["stage"], line["qid"], line.get("time", 0))


def _row(reply: Reply, stage: str, qid: str, when: float) -> tuple[Any, ...]:
    numbers = reply.prompt_tokens, reply.completion_tokens
    return reply.text, reply.finish, reply.model, *numbers, reply.error, reply.key, stage, qid, when
