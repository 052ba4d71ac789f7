"""The audit log, where it is switched on: who asked what, one JSON line a request, which never delays it.

A line holds hashes of what was asked, keyed (HMAC-SHA-256) by the file FILE.secret, since a plain hash of a short text can be
guessed; with `contents` instructions and texts too, which are personal data. Addresses, ids of items and paths are as they are.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import queue
import re
import secrets
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Final

from traceir.errors import StoreError
from traceir.items import Content, Item, Query

log = logging.getLogger(__name__)
MAX_TEXT: Final = 10_000  # characters of one text in a line, with `contents`
MAX_WHAT: Final = 1000  # contents that one line names; of more it gives their number
Line = Mapping[str, Any]


class AuditLog:
    """Append-only JSON lines in a file, rotated by size: FILE, FILE.1 (newer) to FILE.N (oldest). Thread-safe; one process each.

    Where `waiting` lines are queued, or the disk fails, lines are dropped and counted, and the next line that is written says how
    many. A line that a full disk cut stays as it is. The files have mode 0600; their format is in docs/formats.md.
    """

    def __init__(
        self, path: Path, *, contents: bool = False, most_bytes: int = 64 * 1024 * 1024, keep: int = 5, waiting: int = 10_000
    ) -> None:
        self.contents, self._path, self._secret = contents, path, read_secret(path)
        self._queue: queue.Queue[logging.LogRecord | None] = queue.Queue(waiting)
        try:
            self._lines = _Lines(path, most_bytes, keep)
        except OSError as error:
            raise StoreError(f"audit log {path} cannot be opened: {error.strerror}; check its folder and rights") from error
        self._thread = threading.Thread(target=self._run, name="traceir-audit", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Lines lost since the start; for /metrics."""
        return self._lines.dropped

    def describe(self, content: Content) -> dict[str, Any]:
        """What a line says of a query or an item."""
        shown: dict[str, Any] = {"hmac": self._keyed(content.content_hash())} if isinstance(content, Item | Query) else {}
        if isinstance(content, Item):
            shown["id"] = content.id
        if self.contents:
            shown["text"] = content.text[:MAX_TEXT]
            shown["pictures"] = [self._keyed(image.sha256) for image in content.images]
            if isinstance(content, Query) and content.instruction:
                shown["instruction"] = content.instruction[:MAX_TEXT]
        return shown

    def _keyed(self, sha256: str) -> str:
        return hmac.new(self._secret, sha256.encode(), "sha256").hexdigest()

    def write(self, line: Line) -> None:
        """Queues a line; the time is added here. Returns at once."""
        try:
            self._queue.put_nowait(logging.makeLogRecord({"line": line}))
        except queue.Full:
            self._lines.drop()

    def close(self, seconds: float = 10.0) -> None:
        """Writes what is queued, within so many seconds, and closes the file."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=seconds)
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.error("audit log %s does not get its lines written; %d are lost", self._path, self._queue.qsize())

    def _run(self) -> None:
        while (record := self._queue.get()) is not None:
            self._lines.handle(record)
        self._lines.close()


class _Lines(RotatingFileHandler):
    """Writes each record's `line` as JSON. After an error the file is opened anew, and what was cut is ended there."""

    _told = 0
    _failed = False

    def __init__(self, path: Path, most_bytes: int, keep: int) -> None:
        self.dropped = 0
        self._count = threading.Lock()
        super().__init__(path, maxBytes=most_bytes, backupCount=keep)

    def drop(self) -> None:
        with self._count:
            self.dropped += 1

    def format(self, record: logging.LogRecord) -> str:
        """ASCII only: no line ends, no control characters and no direction marks reach a terminal."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": time, **vars(record)["line"]}, separators=(",", ":"))

    def emit(self, record: logging.LogRecord) -> None:
        dropped, self._failed = self.dropped, False
        if dropped > self._told:
            lost = {"dropped": dropped - self._told}
            super().emit(logging.makeLogRecord({"line": lost, "created": record.created}))
            self._told = self._told if self._failed else dropped
        if not self._failed:
            super().emit(record)
        if self._failed:
            self.drop()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the name is logging's
        log.error("audit log %s cannot be written: %s", self.baseFilename, sys.exc_info()[1])
        self._failed = True
        stream, self.stream = self.stream, None
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()

    def _open(self) -> TextIOWrapper:
        file = os.open(self.baseFilename, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        size = os.fstat(file).st_size
        stream = os.fdopen(file, "a", encoding="ascii")
        if size and os.pread(file, 1, size - 1) != b"\n":
            stream.write("\n")
        return stream


def read_secret(path: Path) -> bytes:
    """The secret of the log at `path`, 32 random bytes in hex in FILE.secret, mode 0600, made where there is none.

    Raises StoreError where it cannot be read or made, others may read it, or it holds something else.
    """
    secret = path.with_name(f"{path.name}.secret")
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        with (
            contextlib.suppress(FileExistsError),
            os.fdopen(os.open(secret, flags | os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new,
        ):
            new.write(secrets.token_hex(32) + "\n")
        with os.fdopen(os.open(secret, flags | os.O_RDONLY), "rb") as file:
            mode, stored = os.fstat(file.fileno()).st_mode & 0o777, file.read(100)
    except OSError as error:
        raise StoreError(
            f"secret {secret} of the audit log cannot be read or made: {error.strerror}; check its rights"
        ) from error
    if mode & 0o077:
        raise StoreError(f"secret {secret} of the audit log has mode {mode:04o}, so that others may read it; chmod 600 it")
    if not re.fullmatch(rb"[0-9a-f]{64}\s*", stored):
        raise StoreError(f"secret {secret} of the audit log is not 64 hex digits; put it back, or remove it to get a new one")
    return bytes.fromhex(stored.decode())
