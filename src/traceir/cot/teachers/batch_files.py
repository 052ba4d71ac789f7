"""Batch API files: questions written instead of sent, and their results read back into the journal.

A build whose teacher is a `BatchTeacher` writes every question that the journal cannot answer into request files. These are run
by whoever offers the Batch API (OpenAI, vLLM's `run-batch`), `read_batch_results` imports the results, and the build, run again,
goes on to the questions that follow from them.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from traceir.cot.ask import Question
from traceir.cot.teachers.asker import UnansweredError
from traceir.cot.teachers.completion import Reply, TransientError, error_of, read_completion
from traceir.cot.teachers.journal import Journal
from traceir.cot.teachers.places import LineFiles, Places, whole_bytes
from traceir.cot.teachers.teacher import PIXELS, REFUSED, Request, request_of
from traceir.errors import DataError, TeacherError
from traceir.outside import read_json

REQUESTS: Final = 50_000
BYTES: Final = 190_000_000
"""The Batch API takes 50,000 requests and 200 MB a file."""
URL: Final = "/v1/chat/completions"
INDEX: Final = "requests-index.jsonl"
_FILE: Final = re.compile(r"requests-(\d{5})\.jsonl")
_START: Final = re.compile(rb'\{"custom_id":"([0-9a-f]{64})"')
_KEY: Final = re.compile(r"[0-9a-f]{64}")


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
        self.name, self.folder, self.pixels, self.extra = model, folder, pixels, dict(extra or {})
        self.requests_per_file, self.bytes_per_file = requests_per_file, bytes_per_file
        self.written = 0
        self._keys: dict[int, None] = {}
        self._stream: BufferedWriter | None = None
        self._lines, self._lock = 0, -1
        self._open()

    async def request(self, question: Question) -> Request:
        return await request_of(question, self.name, self.pixels, self.extra)

    async def send(self, request: Request) -> Reply:
        """Writes the request, if no file has it yet, and raises UnansweredError."""
        try:
            if self._lock < 0:
                self._open()
            if _hash(request.key) not in self._keys:
                self._write(request)
        except OSError as error:
            self._discard()
            raise TeacherError(f"{self._writing}: {error.strerror or error}; free the disk and start again") from error
        raise UnansweredError(f"the question waits in a request file of {self.folder}; run the batch and import its results")

    async def reply(self, question: Question) -> Reply:
        return await self.send(await self.request(question))

    async def close(self) -> None:
        """Finishes the file begun and frees the folder; a later `send` takes it again."""
        lock, self._lock = self._lock, -1
        if lock < 0:
            return
        try:
            self._finish()
            self._index.close()
        except OSError as error:
            raise TeacherError(f"{self._writing}: {error.strerror or error}; free the disk and start again") from error
        finally:
            os.close(lock)

    def _open(self) -> None:
        """Locks the folder, and reads which requests its files have."""
        folder = self.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / "requests.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(lock)
                shown = "another process writes requests here; end that one, or give this one another folder"
                raise TeacherError(f"{folder}: {shown}") from error
            self._lock = lock
            self._writing.unlink(missing_ok=True)
            finished = sorted(path for path in folder.iterdir() if _FILE.fullmatch(path.name))
            for path in finished:
                self._read(path)
            self._number = int(finished[-1].name[9:14]) + 1 if finished else 0
            self._index = (folder / INDEX).open("ab+")
            self._index.truncate(whole_bytes(self._index.fileno()))
        except OSError as error:
            raise TeacherError(f"{folder}: {error.strerror or error}; check the folder, its rights and the disk") from error

    @property
    def _writing(self) -> Path:
        return self.folder / "requests.writing"

    def _write(self, request: Request) -> None:
        start = f'{{"custom_id":"{request.key}","method":"POST","url":"{URL}","body":'
        line = start.encode() + request.payload + b"}\n"
        if self._stream is not None and (
            self._lines >= self.requests_per_file or self._stream.tell() + len(line) > self.bytes_per_file
        ):
            self._finish()
        if self._stream is None:
            self._stream, self._lines = self._writing.open("wb"), 0
        self._stream.write(line)
        told = {"key": request.key, "stage": request.stage, "qid": request.qid}
        self._index.write(json.dumps(told, separators=(",", ":")).encode("ascii") + b"\n")
        self._keys[_hash(request.key)] = None
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
        os.replace(self._writing, self.folder / f"requests-{self._number:05d}.jsonl")
        self._number += 1

    def _discard(self) -> None:
        """Drops the file begun, which has no whole last line."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with suppress(OSError):
                stream.close()
            self._writing.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        """Remembers the keys of a finished file."""
        with path.open("rb") as stream:
            for number, raw in enumerate(tqdm(stream, desc=f"reading {path.name}", unit="request", mininterval=2.0), 1):
                match = _START.match(raw)
                if match is None:
                    raise DataError(f"{path}:{number}: not a request as written here; move the file elsewhere")
                self._keys[_hash(match[1].decode())] = None


def read_batch_results(files: Iterable[Path], journal: Journal, *, index: Path | None = None) -> dict[str, int]:
    """Imports output and error files of a batch into the journal, and says how many lines were of which kind.

    `imported`: answers, `refused` of them by the teacher for good (400, 413, 422); `known`: answers that the journal had;
    `failed`: expired or failed for a time, to be asked again. Stage and qid are looked up in `index`, by default the
    `requests-index.jsonl` beside each file, and are "" where there is none. Raises DataError with file:line for a line that is
    not a result; what was imported before stays, and the same files can be imported again.
    """
    counts = {"imported": 0, "refused": 0, "known": 0, "failed": 0}
    for path in files:
        asked = _Asked(index or path.parent / INDEX)
        try:
            with path.open("rb") as stream:
                for number, raw in enumerate(tqdm(stream, desc=f"importing {path.name}", unit="result", mininterval=2.0), 1):
                    if raw.strip():
                        _import(*_result(raw, f"{path}:{number}"), journal, asked, counts)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}; give the output and error files of a batch") from error
        finally:
            asked.close()
    return counts


class _Asked:
    """Stage and qid by key, from the index that a BatchTeacher wrote; in memory are 16 bytes a key."""

    def __init__(self, path: Path) -> None:
        self._places, self._files = Places(), LineFiles()
        file, start = self._files.add(path), 0
        if path.is_file():
            with path.open("rb") as stream:
                for number, raw in enumerate(stream, 1):
                    if raw.endswith(b"\n"):
                        key, _, _ = _told(raw, f"{path}:{number}")
                        self._places.add(_hash(key), file, start)
                    start += len(raw)

    def find(self, key: str) -> tuple[str, str]:
        for file, offset in self._places.find(_hash(key)):
            found, stage, qid = _told(self._files.line(file, offset), f"{self._files.paths[file]}, at byte {offset}")
            if found == key:
                return stage, qid
        return "", ""

    def close(self) -> None:
        self._files.close()


def _import(key: str, reply: Reply | None, journal: Journal, asked: _Asked, counts: dict[str, int]) -> None:
    if reply is None:
        counts["failed"] += 1
    elif journal.get(key) is not None:
        counts["known"] += 1
    else:
        journal.add(key, *asked.find(key), reply)
        counts["imported"] += 1
        counts["refused"] += reply.finish == "error"


def _result(raw: bytes, where: str) -> tuple[str, Reply | None]:
    """Key and reply of a result line; None for a reply that has to be asked for again."""
    try:
        found = read_json(raw)
        key, response, error = found["custom_id"], found.get("response"), found.get("error")
        if not _KEY.fullmatch(key):
            raise ValueError(f"custom_id {key!r}")
        if response is None:
            if not error:
                raise ValueError("neither response nor error")
            return key, None
        status, body = response["status_code"], response.get("body")
        if type(status) is not int:
            raise ValueError(f"status_code {status!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        shown = f"not a result of a batch ({problem!r})"
        raise DataError(f"{where}: {shown}; give output and error files of batches written here, as downloaded") from problem
    if status in REFUSED:
        return key, Reply("", "error", "", 0, 0, f"{status}: {error_of(json.dumps(body))[1]}")
    if status != 200:
        return key, None
    try:
        return key, read_completion(body, "")
    except TransientError as problem:
        raise DataError(f"{where}: {problem}; give the output of a batch for {URL}") from problem


def _told(raw: bytes, where: str) -> tuple[str, str, str]:
    try:
        found = read_json(raw)
        key, stage, qid = found["key"], found["stage"], found["qid"]
        if not (_KEY.fullmatch(key) and isinstance(stage, str) and isinstance(qid, str)):
            raise ValueError("wrong types")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: not a line of the index ({error!r}); remove it, it only names stage and qid") from error
    return key, stage, qid


def _hash(key: str) -> int:
    return int(key[:16], 16)
