"""The audit log, where it is switched on: who asked what, one JSON line a request, never in the way of a request.

By default a line holds hashes of what was asked, not the words or pictures. The hashes are keyed (HMAC-SHA-256), since a plain
hash of a short text can be guessed from a list of words: who has the log alone can tell which contents are equal, and read none;
who has its secret too, the file FILE.secret, can find the lines of a content, or guess. With `contents` a line holds instructions
and texts too, which are personal data; pictures stay hashes. Addresses, ids of items and paths are always as they are.
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
import stat
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from traceir.errors import StoreError
from traceir.items import Content, Item, Query

log = logging.getLogger(__name__)
MAX_TEXT: Final = 10_000
"""Characters of one text in a line, with `contents`."""
MAX_WHAT: Final = 1000
"""Contents that one line names; of more it gives their number."""
Line = Mapping[str, Any]


class AuditLog:
    """Append-only JSON lines in a file, rotated by size: FILE, FILE.1 (newer) to FILE.N (oldest). Thread-safe; one process each.

    `write` never waits: where `waiting` lines are queued already, or the disk fails, lines are dropped and counted, and the next
    line that is written says how many. A line that a full disk cut stays as it is, the next begins on a line of its own. The
    files have mode 0600; their format, and that of the secret beside them, is in docs/formats.md.
    """

    def __init__(
        self,
        path: Path,
        *,
        contents: bool = False,
        most_bytes: int = 64 * 1024 * 1024,
        keep: int = 5,
        waiting: int = 10_000,
    ) -> None:
        self.contents = contents
        self._path, self._most_bytes, self._keep = path, most_bytes, keep
        self._queue: queue.Queue[Line | None] = queue.Queue(waiting)
        self._lock = threading.Lock()
        self._dropped = self._untold = 0
        self._secret = read_secret(path)
        self._file = self._open(path)
        size = os.fstat(self._file).st_size
        self._torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
        self._thread = threading.Thread(target=self._run, name="traceir-audit", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Lines lost since the start; for /metrics."""
        return self._dropped

    def describe(self, content: Content) -> dict[str, Any]:
        """What a line says of a query or an item."""
        told: dict[str, Any] = {"hmac": self._keyed(content.content_hash())} if isinstance(content, Item | Query) else {}
        if isinstance(content, Item):
            told["id"] = content.id
        if self.contents:
            told["text"] = content.text[:MAX_TEXT]
            told["pictures"] = [self._keyed(image.sha256) for image in content.images]
            if isinstance(content, Query) and content.instruction:
                told["instruction"] = content.instruction[:MAX_TEXT]
        return told

    def _keyed(self, sha256: str) -> str:
        return hmac.new(self._secret, sha256.encode(), "sha256").hexdigest()

    def write(self, line: Line) -> None:
        """Queues a line; the time is added here. Returns at once."""
        stamped = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **line}
        try:
            self._queue.put_nowait(stamped)
        except queue.Full:
            self._lose(1)

    def close(self, seconds: float = 10.0) -> None:
        """Writes what is queued, within so many seconds, and closes the file."""
        try:
            self._queue.put(None, timeout=seconds)
            self._thread.join(seconds)
        except queue.Full:
            log.error("audit log %s does not get its lines written; %d are lost", self._path, self._queue.qsize())

    def _run(self) -> None:
        while (line := self._queue.get()) is not None:
            try:
                self._tell_lost(line["time"])
                self._append(line)
            except Exception as error:  # whatever a line or the disk does: without this thread every later line is lost
                log.error("audit log %s cannot be written: %s", self._path, error)
                self._lose(1)
        os.close(self._file)

    def _tell_lost(self, time: str) -> None:
        with self._lock:
            untold = self._untold
        if untold:
            self._append({"time": time, "dropped": untold})
            with self._lock:
                self._untold -= untold

    def _append(self, line: Line) -> None:
        # ASCII only: no line ends, no control characters and no direction marks reach a terminal.
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        if os.fstat(self._file).st_size + self._torn + len(data) > self._most_bytes:
            self._rotate()
        if self._torn:
            data = b"\n" + data
        written = os.write(self._file, data)
        self._torn = written < len(data) and (written > 0 or self._torn)
        if written < len(data):
            raise OSError("the line was written in part; the disk may be full")

    def _rotate(self) -> None:
        """Opens the new file before anything is renamed: where that fails, all files stay as they are."""
        fresh = self._path.with_name(f"{self._path.name}.new")
        file = self._open(fresh)
        try:
            if self._path.exists():  # else an earlier rotation failed in its last step, or somebody took the file away
                self._shift()
            os.replace(fresh, self._path)
        except OSError:
            os.close(file)
            raise
        os.close(self._file)
        self._file, self._torn = file, False

    def _shift(self) -> None:
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{number}") for number in range(1, self._keep + 1))]
        for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
            if newer.exists():
                os.replace(newer, older)

    def _open(self, path: Path) -> int:
        try:
            return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StoreError(f"audit log {path} cannot be opened: {error.strerror}; check its folder and rights") from error

    def _lose(self, lines: int) -> None:
        with self._lock:
            self._dropped += lines
            self._untold += lines


def read_secret(path: Path) -> bytes:
    """The secret of the log at `path`, 32 random bytes in hex in FILE.secret, mode 0600, made where there is none.

    Raises StoreError where it cannot be read or made, others may read it, or it holds something else.
    """
    place = path.with_name(f"{path.name}.secret")
    try:
        if not place.exists():
            with contextlib.suppress(FileExistsError):
                _write_secret(place)
        file = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with os.fdopen(file, "rb") as opened:
            mode, told = stat.S_IMODE(os.fstat(file).st_mode), opened.read(100)
    except OSError as error:
        raise StoreError(f"secret {place} of the audit log cannot be read or made: {error.strerror}; check its rights") from error
    if mode & 0o077:
        raise StoreError(f"secret {place} of the audit log has mode {mode:04o}, so that others may read it; chmod 600 it")
    if not re.fullmatch(rb"[0-9a-f]{64}\s*", told):
        raise StoreError(
            f"secret {place} of the audit log is not 64 hex digits; put it back, or remove it to begin with a new one"
        )
    return bytes.fromhex(told.decode())


def _write_secret(place: Path) -> None:
    file = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(file, "wb") as opened:
        opened.write(secrets.token_hex(32).encode() + b"\n")
