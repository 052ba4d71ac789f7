"""Batch API files: questions written instead of sent, and their results read back into the cache of answers.

A build whose teacher is a `BatchTeacher` writes every question that the cache cannot answer into request files. These are run by
whoever offers the Batch API (OpenAI, vLLM's `run-batch`), `read_batch_results` imports the results, and the build, run again,
goes on to the questions that follow from them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from io import BufferedWriter
from itertools import islice
from pathlib import Path
from typing import Any, Final

from traceir.cot.ask import TeacherQuestion
from traceir.cot.files import json_lines, lock_file
from traceir.cot.teachers.answer_cache import KEY, AnswerCache
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
            found = [cache.get(key) for key, _ in chunk]
            fresh = [reply for (_, reply), known in zip(chunk, found, strict=True) if reply is not None and not known.result()]
            written = [cache.put(*asked.get(reply.key[:16], ("", "")), reply) for reply in fresh]
            for future in written:
                future.result()
            failed = sum(reply is None for _, reply in chunk)
            counts["failed"] += failed
            counts["known"] += len(chunk) - failed - len(fresh)
            counts["imported"] += len(fresh)
            counts["refused"] += sum(reply.finish == "error" for reply in fresh)
    return counts


def _result(found: dict[str, Any]) -> tuple[str, Reply | None]:
    """Key and reply of a result line; None for a reply that has to be asked for again."""
    key, response = found["custom_id"], found.get("response")
    if not KEY.fullmatch(key) or (response is None and not found.get("error")):
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
