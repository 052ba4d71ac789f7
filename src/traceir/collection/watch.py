"""`sync` as things happen: watchdog tells which paths are touched, and once they are quiet they are synced.

Where events may have been missed, or folders have gone, come back or been mounted over, whole folders are synced.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, Final, cast

from traceir.collection.sources import readable_suffixes
from traceir.collection.sync import SyncReport, sync_paths
from traceir.errors import InputError, TraceError
from traceir.index.store import Index
from traceir.retrieval.search import EncoderLike

if TYPE_CHECKING:
    from watchdog.observers.api import BaseObserver

QUIET_S: Final = 1.0
"""For how long nothing has happened to a path that is synced."""
TICK_S: Final = 0.2
RETRY_S: Final = 10.0
MOST_PATHS: Final = 200
"""Touched paths beyond which the whole folders are synced."""


def watch(
    folders: Sequence[str],
    index: Index,
    encoder: EncoderLike,
    *,
    tell: Callable[[SyncReport | TraceError], None],
    stop: Event,
    batch: int = 64,
    every: float | None = None,
) -> None:
    """Keep the index in step with folders (absolute, links resolved) below its roots until `stop` is set.

    `tell` gets every report, and every error, after which it is tried again. `every`: the whole folders are synced that often
    instead, in seconds, for drives of other machines, whose changes are not announced here. Raises InputError where watchdog is
    missing, or the system allows no more watches.
    """

    def attempt(paths: Sequence[str], whole: bool) -> bool:
        try:
            tell(sync_paths(paths, index, encoder, batch=batch, whole=whole))
            return True
        except TraceError as error:
            tell(error)
            stop.wait(RETRY_S)
            return False

    if every is not None:
        while not stop.wait(every):
            attempt(folders, True)
        return
    while not stop.is_set():
        with _observed(folders) as (touched, is_intact):
            while is_intact() and not stop.wait(TICK_S):
                paths, whole = touched.take(folders)
                if paths and not attempt(paths, whole):
                    touched.has_missed = True


class TouchedPaths(logging.Handler):
    """What has happened: paths with the time of the last event, and whether any may have been missed.

    It is watchdog's event handler, and the handler of its warnings, by which it says that the system dropped events.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.has_missed = True
        """At first: what has happened before the folders were observed is not known."""
        self._times: dict[str, float] = {}
        self._times_lock = Lock()

    def dispatch(self, event: Any) -> None:
        with self._times_lock:
            for path in filter(None, map(os.fsdecode, (event.src_path, event.dest_path))):
                if event.is_directory or Path(path).suffix.lower() in readable_suffixes():
                    self._times[path] = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        self.has_missed = True

    def take(self, folders: Sequence[str]) -> tuple[list[str], bool]:
        """The paths to be synced now, which are forgotten here; whether they are the whole folders."""
        with self._times_lock:
            if self.has_missed or len(self._times) > MOST_PATHS:
                self.has_missed = False
                self._times.clear()
                return list(folders), True
            quiet = [path for path, then in self._times.items() if time.monotonic() - then >= QUIET_S]
            for path in quiet:
                del self._times[path]
            return quiet, False


@contextmanager
def _observed(folders: Sequence[str]) -> Iterator[tuple[TouchedPaths, Callable[[], bool]]]:
    """What happens below the folders, and whether they are still those that are observed."""
    observer, touched = _observer(), TouchedPaths()
    logger = logging.getLogger("watchdog")
    logger.addHandler(touched)
    identities = [_identity(folder) for folder in folders]
    try:
        _start(observer, [folder for folder, there in zip(folders, identities, strict=True) if there], touched)

        def is_intact() -> bool:
            is_alive = all(emitter.is_alive() for emitter in observer.emitters)
            return is_alive and identities == [_identity(folder) for folder in folders]

        yield touched, is_intact
    finally:
        logger.removeHandler(touched)
        if observer.is_alive():
            observer.stop()
            observer.join()


def _observer() -> BaseObserver:
    try:
        from watchdog.observers import Observer
    except ImportError as error:
        raise InputError("--watch needs watchdog: pip install 'traceir[files]', or use --watch-every SECONDS") from error
    return Observer()


def _start(observer: BaseObserver, folders: Sequence[str], touched: TouchedPaths) -> None:
    from watchdog import events

    handler = cast(events.FileSystemEventHandler, touched)  # of which watchdog calls `dispatch` alone
    names = ("FileCreated", "FileModified", "FileMoved", "FileDeleted", "DirCreated", "DirMoved", "DirDeleted")
    kinds = [getattr(events, f"{name}Event") for name in names]
    try:
        for folder in folders:
            observer.schedule(handler, folder, recursive=True, event_filter=kinds)
        observer.start()
    except OSError as error:
        remedy = "raise fs.inotify.max_user_watches, or use --watch-every SECONDS"
        raise InputError(f"{', '.join(folders)} cannot be watched: {error.strerror or error}; {remedy}") from error


def _identity(folder: str) -> tuple[int, int] | None:
    """Which folder it is: another one, made or mounted at the same place, differs. None: there is none."""
    try:
        stat = Path(folder).stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino
