"""The audit log, where it is switched on: who asked what, one JSON line a request, never in the way of a request.

By default a line holds hashes of what was asked, not the words or pictures: who knows a content can find its line, nobody can
read contents out of the log. With `contents` it holds instructions and texts too, which are personal data; pictures stay hashes.
"""

from __future__ import annotations

import json
import logging
import os
import queue
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
    line that is written says how many. The files have mode 0600; their format is in docs/formats.md.
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
        self._file = self._open()
        self._thread = threading.Thread(target=self._run, name="traceir-audit", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Lines lost since the start; for /metrics."""
        return self._dropped

    def describe(self, content: Content) -> dict[str, Any]:
        """What a line says of a query or an item."""
        told: dict[str, Any] = {"sha256": content.content_hash()} if isinstance(content, Item | Query) else {}
        if isinstance(content, Item):
            told["id"] = content.id
        if self.contents:
            told["text"] = content.text[:MAX_TEXT]
            told["pictures"] = [picture.sha256 for picture in content.pictures]
            if isinstance(content, Query) and content.instruction:
                told["instruction"] = content.instruction[:MAX_TEXT]
        return told

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
            with self._lock:
                untold, self._untold = self._untold, 0
            lines = [{"time": line["time"], "dropped": untold}, line] if untold else [line]
            try:
                # ASCII only: no line ends, no control characters and no direction marks reach a terminal.
                self._append(b"".join(json.dumps(one, separators=(",", ":")).encode() + b"\n" for one in lines))
            except (OSError, ValueError) as error:
                log.error("audit log %s cannot be written: %s", self._path, error)
                self._lose(1, untold)
        os.close(self._file)

    def _append(self, data: bytes) -> None:
        if os.fstat(self._file).st_size + len(data) > self._most_bytes:
            self._rotate()
        written = os.write(self._file, data)
        if written != len(data):
            raise OSError("the line was written in part; the disk may be full")

    def _rotate(self) -> None:
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{number}") for number in range(1, self._keep + 1))]
        for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
            if newer.exists():
                os.replace(newer, older)
        if self._keep == 0:
            self._path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = self._open()

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StoreError(f"audit log {self._path} cannot be opened: {error.strerror}; check its folder and rights") from error

    def _lose(self, lines: int, untold: int = 0) -> None:
        with self._lock:
            self._dropped += lines
            self._untold += lines + untold
