"""Every answer that was paid for, by the key of what was asked, in one SQLite file of a folder that builds may share; and files
of the Batch API, that is questions written instead of sent, whose results are read back into it.

A build whose teacher is a `BatchTeacher` writes every question that the cache cannot answer into request files. These are run by
whoever offers the Batch API (OpenAI, vLLM's `run-batch`), `read_batch_results` imports the results, and the build, run again,
goes on to the questions that follow from them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from io import BufferedWriter
from itertools import islice
from pathlib import Path
from typing import Any, Final

from traceir.cot.ask import TeacherQuestion
from traceir.cot.files import json_lines, lock_file
from traceir.cot.teachers.teacher import (
    PIXELS,
    REFUSED,
    Reply,
    RetryableError,
    TeacherRequest,
    UnansweredError,
    check_extra,
    error_of,
    prepare,
    read_completion,
)
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
REQUESTS: Final = 50_000
BYTES: Final = 190_000_000
"""The Batch API takes 50,000 requests and 200 MB a file."""
URL: Final = "/v1/chat/completions"
CHUNK: Final = 1000
"""Results that are looked up and written together."""
INDEX: Final = "requests-index.jsonl"
"""Stage and qid of each key that was written."""
_FILE: Final = re.compile(r"requests-(\d{5})\.jsonl")
_START: Final = re.compile(rb'\{"custom_id":"([0-9a-f]{64})"')


class AnswerCache(AbstractContextManager["AnswerCache"]):
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

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find(self, key: str) -> Reply | None:
        row = self._database.execute(_FIND, (key,)).fetchone()
        return Reply(*row) if row else None

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


class BatchTeacher:
    """A teacher that writes its requests into `folder` and leaves every question unanswered.

    Model, pixels and extra fields make the keys, so that results answer the same questions put to an `OpenAITeacher`. A request
    that a finished file of the folder holds is not written again: remove files whose results are imported. A file is finished
    (renamed) when it is full, or at `close`; kill -9 loses the one begun, and the next run writes it anew. One process a folder.
    """

    def __init__(
        self,
        folder: Path,
        model: str,
        *,
        pixels: int = PIXELS,
        extra: Mapping[str, Any] | None = None,
        requests_per_file: int = REQUESTS,
        bytes_per_file: int = BYTES,
    ) -> None:
        self.name, self.folder, self.pixels, self.extra = model, folder, pixels, check_extra(extra or {})
        self.requests_per_file, self.bytes_per_file = requests_per_file, bytes_per_file
        self._begun, self.written, self._lines = folder / "requests.writing", 0, 0
        self._stream: BufferedWriter | None = None
        self._lock = lock_file(folder / "requests.lock", "end that one, or give this one another folder")
        try:
            finished = sorted(path for path in folder.iterdir() if _FILE.fullmatch(path.name))
            self._keys = {key for path in finished for key in _keys_of(path)}
            self._number = int(finished[-1].name[9:14]) + 1 if finished else 0
            self._index = (folder / INDEX).open("ab")
            self._index.write(b"\n")  # ends a line that a kill has cut
        except OSError as error:
            raise self._full(error) from error

    async def request(self, question: TeacherQuestion) -> TeacherRequest:
        return await prepare(question, self.name, self.pixels, self.extra)

    async def send(self, request: TeacherRequest) -> Reply:
        """Writes the request, if no file has it yet, and raises UnansweredError."""
        try:
            if request.key[:16] not in self._keys:
                self._write(request)
        except OSError as error:
            self._stream = None  # the file begun has no whole last line
            raise self._full(error) from error
        raise UnansweredError(f"the question waits in a request file of {self.folder}; run the batch and import its results")

    async def close(self) -> None:
        """Finishes the file begun and frees the folder."""
        try:
            self._finish()
            self._index.close()
        except OSError as error:
            raise self._full(error) from error
        finally:
            self._lock.close()

    def _full(self, error: OSError) -> TeacherError:
        shown = f"{self.folder}: {error.strerror or error}"
        return TeacherError(f"{shown}; check the folder and its rights, free the disk, and start again")

    def _write(self, request: TeacherRequest) -> None:
        start = f'{{"custom_id":"{request.key}","method":"POST","url":"{URL}","body":'
        line = start.encode() + request.payload + b"}\n"
        stream = self._stream
        if stream and (self._lines >= self.requests_per_file or stream.tell() + len(line) > self.bytes_per_file):
            self._finish()
        if self._stream is None:
            self._stream, self._lines = self._begun.open("wb"), 0
        self._stream.write(line)
        row = {"key": request.key, "stage": request.question.stage, "qid": request.question.qid}
        self._index.write(json.dumps(row).encode() + b"\n")
        self._keys.add(request.key[:16])
        self._lines += 1
        self.written += 1

    def _finish(self) -> None:
        """Gives the file begun its name, after the index has all its keys."""
        if self._stream is None:
            return
        for stream in (self._index, self._stream):
            stream.flush()
            os.fsync(stream.fileno())
        self._stream.close()
        self._stream = None
        os.replace(self._begun, self.folder / f"requests-{self._number:05d}.jsonl")
        self._number += 1


def read_batch_results(files: Iterable[Path], cache: AnswerCache) -> dict[str, int]:
    """Imports output and error files of a batch, and counts their lines: `imported`, of these `refused` by the teacher for good,
    `known` (answered before), `failed` (to be asked again).

    Stage and qid are those in the index beside each file, "" where it has none. Raises DataError with file:line for a line that
    is not a result; what was imported before stays, and the same files can be imported again.
    """
    counts = {"imported": 0, "refused": 0, "known": 0, "failed": 0}
    for path in files:
        index, remedy = path.parent / INDEX, "give output and error files of batches written here, as downloaded"
        rows = json_lines(index, dict, "remove this line") if index.is_file() else ()
        asked = {row["key"][:16]: (row["stage"], row["qid"]) for row in rows}
        results = json_lines(path, _result, remedy)
        while chunk := list(islice(results, CHUNK)):
            kept = [cache.get(key) for key, _ in chunk]
            fresh = [reply for (_, reply), known in zip(chunk, kept, strict=True) if reply is not None and not known.result()]
            for written in [cache.put(*asked.get(reply.key[:16], ("", "")), reply) for reply in fresh]:
                written.result()
            failed = sum(reply is None for _, reply in chunk)
            counts["failed"] += failed
            counts["known"] += len(chunk) - failed - len(fresh)
            counts["imported"] += len(fresh)
            counts["refused"] += sum(reply.finish == "error" for reply in fresh)
    return counts


def _result(line: dict[str, Any]) -> tuple[str, Reply | None]:
    """Key and reply of a result line; None for a reply that has to be asked for again."""
    key, response = line["custom_id"], line.get("response")
    if not KEY.fullmatch(key) or (response is None and not line.get("error")):
        raise ValueError(f"custom_id {key!r}, neither response nor error")
    status, body = (response["status_code"], response.get("body")) if response is not None else (0, None)
    if type(status) is not int:
        raise ValueError(f"status_code {status!r}")
    if status in REFUSED:
        return key, Reply("", "error", "", error=f"{status}: {error_of(json.dumps(body))[1]}", key=key)
    try:
        return key, replace(read_completion(body, ""), key=key) if status == 200 else None
    except RetryableError as error:
        raise ValueError(str(error)) from error


def _keys_of(path: Path) -> Iterator[str]:
    """The first 16 digits of each key in a finished file."""
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            match = _START.match(raw)
            if match is None:
                raise DataError(f"{path}:{number}: not a request as written here; move the file elsewhere")
            yield match[1][:16].decode()
