"""The journal: every answer that was paid for, in append-only JSON lines, one file a writer."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from traceir.cot.ask import Question
from traceir.cot.teachers.completion import Reply, tokens_in
from traceir.cot.teachers.places import LineFiles, Places, whole_bytes
from traceir.errors import DataError, TeacherError
from traceir.outside import read_json

log = logging.getLogger(__name__)

SYNC_S: Final = 1.0
TAKEN_BACK: Final = "taken_back"
"""The `finish` of a line that takes the answers to its key back."""
_KEY: Final = re.compile(r"[0-9a-f]{64}")
_WRITER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Journal:
    """Answers by key (64 hex digits), read from all `*.jsonl` of a folder, written to `WRITER.jsonl` of it.

    `put` returns once the line is in the file: kill -9 takes nothing that it has acknowledged. The disk is told to keep it
    (fsync) about once a second, by a thread, and at `close`. One process a writer; `writer` None reads only. In memory are 16
    bytes an answer; the first answer to a key counts. The totals are over all lines of the folder, as they were on opening, and
    those of this writer since. `pending_...` are the tokens that requests in flight take at most, kept by their askers so that
    all of them see one sum. For one thread.
    """

    def __init__(self, folder: Path, writer: str | None = "0000-of-0001", *, clock: Callable[[], float] = time.time) -> None:
        if writer is not None and not _WRITER.fullmatch(writer):
            raise TeacherError(f"writer {writer!r} is not a file name; use letters, digits, '.', '_' and '-'")
        self.folder, self.writer = folder, writer
        self.answers = self.prompt_tokens = self.completion_tokens = 0
        self.pending_prompt_tokens = self.pending_completion_tokens = 0
        self._clock = clock
        self._places, self._files = Places(), LineFiles()
        self._failed, self._fd, self._end, self._own = "", -1, 0, -1
        self._pool = ThreadPoolExecutor(1, "journal") if writer is not None else None
        self._synced, self._sync_at = Future[None](), 0.0
        self._synced.set_result(None)
        try:
            if writer is not None:
                self._fd = self._open(folder / f"{writer}.jsonl")
            for path in sorted(folder.glob("*.jsonl")):
                try:
                    self._read(path)
                except OSError as error:
                    raise DataError(f"{path}: {error.strerror or error}; check the file and its rights") from error
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        """The file of this writer."""
        return self.folder / f"{self.writer}.jsonl"

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def get(self, key: str) -> Reply | None:
        """The first answer to a key that was not taken back; None where there is none."""
        first: Reply | None = None
        for file, offset in self._places.find(int(key[:16], 16)):
            found = read_json(self._files.line(file, offset))
            if found["key"] == key and found["finish"] == TAKEN_BACK:
                first = None
            elif found["key"] == key and first is None:
                numbers = found["prompt_tokens"], found["completion_tokens"]
                first = Reply(found["text"], found["finish"], found["model"], *numbers, found["error"], key)
        return first

    def take_back(self, key: str) -> None:
        """From now on the answers to a key that were read before are none, and it is asked anew; they stay paid."""
        self.add(key, "", "", Reply("", TAKEN_BACK, "", 0, 0))

    def put(self, key: str, question: Question, reply: Reply) -> None:
        """Writes an answer. Raises TeacherError where it cannot be kept; from then on nothing is taken any more."""
        self.add(key, question.stage, question.qid, reply)

    def add(self, key: str, stage: str, qid: str, reply: Reply) -> None:
        """`put` for an answer of which only stage and qid of the question are known."""
        if not _KEY.fullmatch(key):
            raise DataError(f"journal key {key!r} is not 64 hex digits")
        if self._failed or self._fd < 0:
            raise TeacherError(self._failed or f"the journal in {self.folder} is closed or open for reading only")
        line = {
            "key": key,
            "stage": stage,
            "qid": qid,
            "text": reply.text,
            "finish": reply.finish,
            "model": reply.model,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "error": reply.error,
            "time": round(self._clock(), 3),
        }
        self._write(key, json.dumps(line, separators=(",", ":")).encode("ascii") + b"\n")
        self._count(line)

    def close(self) -> None:
        """Brings all to the disk and frees the writer; once is enough, more does no harm."""
        fd, self._fd = self._fd, -1
        if self._pool is not None:
            self._pool.shutdown()
        if fd >= 0:
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        self._files.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, path: Path) -> int:
        """Opens and locks the own file, and cuts off a last line that was not written to its end."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise TeacherError(f"{path}: {error.strerror or error}; check the folder, its rights and the disk") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size, self._end = os.fstat(fd).st_size, whole_bytes(fd)
            if self._end < size:
                log.warning("%s: the last line was not written to its end; its %d bytes are removed", path, size - self._end)
                os.ftruncate(fd, self._end)
        except BlockingIOError as error:
            os.close(fd)
            shown = "another process writes to it; end that one, or give this one another shard or folder"
            raise TeacherError(f"{path}: {shown}") from error
        except OSError as error:
            os.close(fd)
            raise TeacherError(f"{path}: {error.strerror or error}; the folder must allow locks and writing") from error
        return fd

    def _read(self, path: Path) -> None:
        """Indexes one file. A last line without its end is being written, or was not: it does not count."""
        file, start = self._files.add(path), 0
        if self.writer is not None and path == self.path:
            self._own = file
        bar = tqdm(desc=f"reading {path.name}", unit="answer", mininterval=2.0, delay=2.0)
        with path.open("rb") as stream, bar:
            for number, raw in enumerate(stream, 1):
                if not raw.endswith(b"\n"):
                    break
                line = _line(raw, f"{path}:{number}")
                self._places.add(int(line["key"][:16], 16), file, start)
                self._count(line)
                start += len(raw)
                bar.update()

    def _count(self, line: dict[str, Any]) -> None:
        self.answers += line["finish"] != TAKEN_BACK
        self.prompt_tokens += tokens_in(line["prompt_tokens"])
        self.completion_tokens += tokens_in(line["completion_tokens"])

    def _write(self, key: str, line: bytes) -> None:
        written = 0
        try:
            if self._synced.done():
                self._synced.result()
            while written < len(line):
                written += os.write(self._fd, line[written:])
        except OSError as error:
            remedy = "free the disk and start again, all answers before are kept"
            self._failed = f"{self.path} cannot be written: {error.strerror or error}; {remedy}"
            self._cut()
            raise TeacherError(self._failed) from error
        self._places.add(int(key[:16], 16), self._own, self._end)
        self._end += len(line)
        self._sync()

    def _cut(self) -> None:
        """Takes back a line that was written in part."""
        try:
            os.ftruncate(self._fd, self._end)
        except OSError as error:
            log.warning("%s: the half-written last line stays (%s); the next start removes it", self.path, error)

    def _sync(self) -> None:
        now = time.monotonic()
        if self._pool is not None and self._synced.done() and now - self._sync_at >= SYNC_S:
            self._sync_at = now
            self._synced = self._pool.submit(os.fsync, self._fd)


def _line(raw: bytes, where: str) -> dict[str, Any]:
    try:
        line: dict[str, Any] = read_json(raw)
        texts = [line[name] for name in ("key", "stage", "qid", "text", "finish", "model", "error")]
        numbers = [line[name] for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, TypeError) as error:
        raise _broken(where, f"{error!r}") from error
    if not all(type(one) is str for one in texts) or not all(type(one) is int for one in numbers):
        raise _broken(where, "a field has the wrong type")
    if not _KEY.fullmatch(texts[0]):
        raise _broken(where, f"key {texts[0]!r}")
    return line


def _broken(where: str, reason: str) -> DataError:
    return DataError(f"{where}: not an answer ({reason}); remove this line, and its question is asked anew")
