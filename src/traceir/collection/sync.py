# ruff: noqa: PTH112, PTH113, PTH118, PTH122, PTH123 - paths are texts here: to make a Path of each would take most of a run that finds nothing to do
"""An index kept in step with folders: new, changed, renamed and deleted files.

What is known of a file stands in its items alone: its path (`_file`) and its stat when it was read (`_stat`), so a run that was
cut off at any moment is simply repeated and goes on. A file whose stat is the one kept is not opened; one whose content is known,
here or under another name, is not encoded. New items are durable before old ones go.

Of a file that makes several items one is the mark: its stat is "" until all are there, and ends in `!` where some could not be
made, which `failures.py` remembers.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from tqdm import tqdm

from traceir.collection.failures import keep_failures, read_failures
from traceir.collection.ingest import AddReport, Processed, keep, process
from traceir.collection.listing import is_there, list_files, outermost, read_ahead
from traceir.collection.records import Failure, Note
from traceir.collection.roots import Root, Roots, is_below, settled_stat
from traceir.collection.sources import FILE_FIELD, STAT_FIELD, Source, SourceBatch, readable_suffixes, sources_of_file
from traceir.errors import InputError
from traceir.index.copy import Copied
from traceir.index.filters import Eq, Range, is_value
from traceir.index.store import Index, Stored
from traceir.items import Item, Vector
from traceir.retrieval.search import EncoderLike

MOST_LOST: Final = 100
"""So many files of a root may go without a question, and of a larger one half."""
_SPARE_BYTES: Final = 256 * 2**20
_AT_ONCE: Final = 2000


@dataclass(slots=True)
class SyncReport(AddReport):
    """What `sync` did: `skipped` are items as they were, `renamed` those found again under another name, `removed` the rest
    of those whose file is gone. `failed` also tells of files that failed before and have not changed since."""

    renamed: int = 0
    removed: int = 0


class KnownItem(NamedTuple):
    """What an index keeps of an item that was made from a file."""

    id: str
    stat: str
    content_hash: str


@dataclass(slots=True)
class FileState:
    """A file to be read: its stat, what is known of it, the ids of its items so far, which is its mark, what failed."""

    path: str
    id: str
    stat: str
    known: Sequence[KnownItem]
    ids: set[str] = field(default_factory=set)
    mark: str = ""
    failed: list[Failure] = field(default_factory=list)


def sync(
    folders: Sequence[str | os.PathLike[str]],
    index: Index,
    encoder: EncoderLike,
    *,
    batch: int = 64,
    progress: bool = True,
    prefix: str | None = None,
    allow_empty: bool = False,
) -> SyncReport:
    """Make the index equal to the folders, which it remembers as its roots; to all of its roots where none is named.

    A folder within a root is part of it; roots within a folder become part of it, unless they have a prefix, and their items
    get its ids. Items that were not made from a file below the folders are left alone. InputError, before anything is written,
    for a folder that is not there, and for ids that a new root and another one both claim. A root that is not there, or would
    lose more than half of its files, is a Failure and loses nothing, unless `allow_empty`: its disk may not be mounted.
    """
    if batch < 1:
        raise InputError(f"batch is {batch}; give at least 1")
    before = roots = Roots.read(index)
    scopes = [os.path.realpath(folder) for folder in folders] or [root.folder for root in roots.all]
    if not scopes:
        raise InputError(f"index {index.info().uri} has no folder to be kept in step with; name one")
    check_folders(folder for folder, scope in zip(folders, scopes, strict=False) if not (allow_empty and roots.of(scope)))
    for scope in scopes if folders else ():
        roots = roots.with_folder(scope, prefix)
    run = SyncRun(index, encoder, roots, batch, allow_empty)
    run.look(scopes, whole=True)
    run.check_new([root for root in roots.all if root not in before.all])
    if roots.all != before.all:
        roots.keep(index)
    run.carry_out(progress)
    run.forget_roots()
    return run.report


def check_folders(folders: Iterable[str | os.PathLike[str]]) -> None:
    """Raise InputError for what is no folder, or is not there."""
    for folder in folders:
        if not os.path.isdir(folder):
            raise InputError(f"{folder} is not a folder that is there; check its name, or mount its disk")


def sync_paths(
    paths: Iterable[str], index: Index, encoder: EncoderLike, *, batch: int = 64, whole: bool = False, progress: bool = False
) -> SyncReport:
    """As `sync`, of files and folders (absolute, links resolved) below the roots of the index, whether they are there or gone.

    Unless `whole`, only items of these paths are looked at: a copy of another file is encoded.
    """
    roots = Roots.read(index)
    run = SyncRun(index, encoder, roots, batch, False)
    if scopes := [path for path in paths if roots.of(path) and not roots.is_hidden(path)]:
        run.look(scopes, whole)
        run.carry_out(progress)
    return run.report


class SyncRun:
    """One run of `sync`: `look` finds out what is to be done, `carry_out` does it."""

    def __init__(self, index: Index, encoder: EncoderLike, roots: Roots, batch: int, allow_empty: bool) -> None:
        self.index, self.encoder, self.roots, self.batch, self.allow_empty = index, encoder, roots, batch, allow_empty
        self.report = SyncReport()
        self.todo: list[FileState] = []
        self.gone: dict[str, list[KnownItem]] = {}
        self.clashes: list[tuple[FileState, str]] = []
        self.holders: dict[str, tuple[str, str]] = {}
        """By id: path and stat of the file that an item was made from."""
        self.by_hash: dict[str, str] = {}
        self.spare: dict[str, Vector] = {}
        """Vectors of contents that this run has overwritten."""
        self.found: Counter[str] = Counter()
        """Contents that got a new id without being encoded, by their hashes."""
        self.failures = read_failures(index)

    # Looking: the index is scanned once, the folders are walked once, and nothing is opened or written

    def look(self, scopes: Sequence[str], whole: bool) -> None:
        """`whole`: all items are scanned, so that a copy of any file is known; otherwise those below the scopes."""
        scopes = list(self._present(outermost(scopes)))
        listings = [list_files(scope) for scope in scopes if not self.roots.is_hidden(scope)]
        stats = {path: stat for listing in listings for path, stat in listing.stats.items()}
        unknown = {path: failure for listing in listings for path, failure in listing.unknown.items()}
        known = self._scan(scopes, whole)
        for path in sorted(stats):
            self._classify(path, stats[path], known.pop(path, []))
        self._part_clashes()
        self.gone = {path: items for path, items in known.items() if not any(is_below(path, other) for other in unknown)}
        self._keep_where_lost(scopes, stats)
        self.report.notes += [note for listing in listings for note in listing.notes()]
        self.report.failed += unknown.values()
        for path in [path for path in self.failures if path not in stats and any(is_below(path, scope) for scope in scopes)]:
            del self.failures[path]

    def _present(self, scopes: Iterable[str]) -> Iterator[str]:
        """The scopes without those whose root is not there, which is told."""
        missing: set[str] = set()
        for scope in scopes:
            root = self.roots.of(scope)
            if root is None or self.allow_empty or os.path.isdir(root.folder):
                yield scope
            elif root.folder not in missing:
                missing.add(root.folder)
                remedy = f"mount its disk, or remove them by `traceir index rm --folder {root.folder}`"
                self.report.failed.append(Failure(root.folder, f"the folder is not there, and its items stay: {remedy}"))

    def _scan(self, scopes: Sequence[str], whole: bool) -> dict[str, list[KnownItem]]:
        """What is known of the files below the scopes that a folder would be read for, by path."""
        suffixes, known = readable_suffixes(), dict[str, list[KnownItem]]()
        for stored in self.index.scan() if whole else self._scan_below(scopes):
            path, stat = _state_of(stored)
            self.by_hash[stored.content_hash] = stored.id
            self.holders[stored.id] = path, stat
            if path and os.path.splitext(path)[1].lower() in suffixes and any(is_below(path, scope) for scope in scopes):
                known.setdefault(path, []).append(KnownItem(stored.id, stat, stored.content_hash))
        return known

    def _scan_below(self, scopes: Sequence[str]) -> Iterator[Stored]:
        for scope in filter(is_value, scopes):  # where a name is not Unicode, no item has it
            yield from self.index.scan(Eq(FILE_FIELD, scope))
            yield from self.index.scan(below(scope))

    def _classify(self, path: str, stat: str, known: Sequence[KnownItem]) -> None:
        """Whether a file is as it was, has failed as it is, or has to be read."""
        root = self.roots.of(path)
        assert root is not None
        id = root.id_of(path)
        is_named = all(item.id == id or item.id.startswith(f"{id}#") for item in known)
        kept = {item.stat for item in known}
        failed_stat, failed = self.failures.get(path, ("", []))
        if is_named and "" not in kept and (kept == {stat} or failed_stat == stat != ""):
            self.report.skipped += len(known)
            self.report.failed += failed if failed_stat == stat else []
        else:
            self.todo.append(FileState(path, id, stat, known))

    def _part_clashes(self) -> None:
        """Of several files to be read with one id, the one that has it already or comes first counts."""
        claimed: dict[str, str] = {}
        for file in sorted(self.todo, key=lambda file: not file.known):
            if (holder := claimed.setdefault(file.id, file.path)) != file.path:
                self.clashes.append((file, holder))
        clashing = {file.path for file, _ in self.clashes}
        self.todo = [file for file in self.todo if file.path not in clashing]

    def _keep_where_lost(self, scopes: Sequence[str], stats: Mapping[str, str]) -> None:
        """Nothing of a root is gone where all would be, or too much."""
        lost = Counter(map(self.roots.of, self.gone))
        lost.subtract(self.roots.of(file.path) for file in self.todo if not file.known)
        for root in {self.roots.of(path) for path in self.gone} if not self.allow_empty else ():
            assert root is not None
            is_empty = any(is_below(root.folder, scope) for scope in scopes) and not any(
                self.roots.of(path) == root for path in stats
            )
            if is_empty or (lost[root] > MOST_LOST and 2 * lost[root] > self.index.count(below(root.folder))):
                own = [path for path in self.gone if self.roots.of(path) == root]
                self.gone = {path: items for path, items in self.gone.items() if path not in own}
                remedy = "mount its disk, or repeat it with --allow-empty"
                why = f"{len(own)} of its files are gone, as where a disk is not mounted; their items stay: {remedy}"
                self.report.failed.append(Failure(root.folder, why))

    def check_new(self, new: Sequence[Root]) -> None:
        """Raise InputError where files of a new root have the ids of other files, or of items made otherwise."""
        own = [file for file in self.todo if self.roots.of(file.path) in new]
        taken = [(file, self._holder(file, *self.holders[file.id])) for file in own if file.id in self.holders]
        clashes = [(file, holder) for file, holder in taken if holder]
        if 2 * len(clashes) <= len(taken) and not any(os.path.lexists(holder) for _, holder in clashes):
            clashes = []  # a root that has moved here, and some of its files have changed
        clashes += [(file, holder) for file, holder in self.clashes if {self.roots.of(file.path), self.roots.of(holder)} & {*new}]
        if clashes:
            raise InputError(f"{_clash(*clashes[0])} ({len(clashes)} such ids, nothing was written)")

    def _holder(self, file: FileState, path: str, stat: str) -> str:
        """Who else has the id of a file, where that is no file that is gone, has moved here or gets another id; else ""."""
        if not path:
            return "an item that was not made from a file"
        root = self.roots.of(path)
        if path == file.path or path in self.gone or (root is not None and root.id_of(path) != file.id):
            return ""
        if os.path.lexists(path):
            return path
        is_missing = root is not None and not os.path.isdir(root.folder)
        return path if is_missing and stat.partition(":")[0] != file.stat.partition(":")[0] else ""

    # Carrying out: batches of new and changed items, each durable, then what is gone

    def carry_out(self, progress: bool) -> SyncReport:
        self.report.failed += [Failure(file.path, _clash(file, holder)) for file, holder in self.clashes]
        try:
            with tqdm(total=len(self.todo), unit="file", desc="reading", disable=not progress or not self.todo) as bar:
                for sources, finished in self._batches():
                    if sources:
                        self._write(sources, {file.path for file in finished})
                    for file in finished:
                        self._finish(file)
                    bar.update(len(finished))
            gone = [(path, item) for path, items in self.gone.items() if not is_there(path) for item in items]
            for start in range(0, len(gone), _AT_ONCE):
                self._remove(gone[start : start + _AT_ONCE])
        finally:
            keep_failures(self.index, self.failures)
        return self.report

    def _batches(self) -> Iterator[tuple[list[tuple[FileState, Source]], list[FileState]]]:
        """Sources with their files, `batch` at a time, and the files that are complete with them."""
        sources: list[tuple[FileState, Source]] = []
        finished: list[FileState] = []
        for number, file in enumerate(self.todo):
            if number % self.batch == 0:
                read_ahead(file.path for file in self.todo[number + self.batch : number + 2 * self.batch])
            for outcome in sources_of_file(Path(file.path), file.id):
                if len(sources) == self.batch:
                    yield sources, finished
                    sources, finished = [], []
                if isinstance(outcome, Source):
                    sources.append((file, outcome))
                    file.ids.add(outcome.id)
                elif isinstance(outcome, Failure):
                    self.report.failed.append(outcome)
                    file.failed.append(outcome)
                else:
                    self.report.notes.append(outcome)
            finished.append(file)
        yield sources, finished

    def _write(self, sources: list[tuple[FileState, Source]], finished: set[str]) -> None:
        """Read, encode where the content is unknown, and keep."""
        files = {source.id: file for file, source in sources}
        stored = self.index.get(list(files))
        refused = self._refuse(files, stored)
        allowed = [source for _, source in sources if source.id not in refused]
        known = {id: kept for id, kept in stored.items() if _state_of(kept)[0] == files[id].path}
        done = process(allowed, known, lambda: self.encoder, self._reuse)
        by_location = {source.location: file for file, source in sources}
        for failure in done.rest.failed:
            by_location[failure.location].failed.append(failure)
        self._mark(done, files, finished)
        self._note_contents(done, stored)
        self.report.include(keep(self.index, SourceBatch(), done))

    def _refuse(self, files: Mapping[str, FileState], stored: Mapping[str, Stored]) -> set[str]:
        """The ids that belong to others, each a Failure."""
        holders = {id: self._holder(files[id], *_state_of(kept)) for id, kept in stored.items()}
        for id in (refused := {id for id, holder in holders.items() if holder}):
            failure = Failure(files[id].path, _clash(files[id], holders[id]))
            self.report.failed.append(failure)
        return refused

    def _reuse(self, hashes: Sequence[str]) -> dict[str, Vector]:
        """The vectors of known contents."""
        vectors = {hash: self.spare[hash] for hash in hashes if hash in self.spare}
        ids = {self.by_hash[hash]: hash for hash in hashes if hash in self.by_hash and hash not in vectors}
        for id, kept in self.index.get(list(ids), with_vectors=True).items() if ids else ():
            if kept.content_hash == ids[id] and kept.vector is not None:
                vectors[ids[id]] = kept.vector
        return vectors

    def _mark(self, done: Processed, files: Mapping[str, FileState], finished: set[str]) -> None:
        """Give the first item of a file that is not all there yet, or of which something failed, the stat of a mark."""
        marks: set[str] = set()
        for item in (*(item for item, _ in done.encoded), *done.moved):
            file = files[str(item.id)]
            if not file.mark and (file.path not in finished or file.failed):
                file.mark = str(item.id)
                marks.add(file.mark)

        def marked(item: Item) -> Item:
            return replace(item, fields={**item.fields, STAT_FIELD: ""}) if item.id in marks else item

        if marks:
            done.encoded = [(marked(item), vector) for item, vector in done.encoded]
            done.moved = [marked(item) for item in done.moved]

    def _note_contents(self, done: Processed, stored: Mapping[str, Stored]) -> None:
        """Remember which contents this batch brings, and the vectors of those that it overwrites."""
        new = {str(item.id): item.content_hash() for item, _ in done.encoded}
        over = [id for id, hash in new.items() if id in stored and stored[id].content_hash != hash]
        if over and len(self.spare) * self.encoder.width * 4 < _SPARE_BYTES:
            for kept in self.index.get(over, with_vectors=True).values():
                if kept.vector is not None:
                    self.spare[kept.content_hash] = kept.vector
        self.found.update(hash for id, hash in new.items() if id not in stored and hash in self.by_hash)
        self.by_hash |= {hash: id for id, hash in new.items()}

    def _finish(self, file: FileState) -> None:
        """A file is all there: its mark gets its stat, items that it does not make any more go, failures are remembered."""
        if file.mark:
            for kept in self.index.get([file.mark], with_vectors=True).values():
                stat = file.stat + "!" * bool(file.failed)
                made = Copied(replace(kept, fields={**kept.fields, STAT_FIELD: stat}))
                self.index.upsert([made], np.stack([kept.vector] if kept.vector is not None else []))
        if file.ids:
            self._remove([(file.path, item) for item in file.known if item.id not in file.ids])
        self.failures.pop(file.path, None)
        if file.failed and _is_settled(file):
            self.failures[file.path] = file.stat, file.failed

    def _remove(self, items: Sequence[tuple[str, KnownItem]]) -> None:
        """Delete items that still are of these files."""
        stored = self.index.get([item.id for _, item in items]) if items else {}
        own = [item for path, item in items if item.id in stored and _state_of(stored[item.id])[0] == path]
        removed = self.index.delete([item.id for item in own]) if own else 0
        renamed = 0
        for item in own:
            if self.found[item.content_hash] > 0:
                self.found[item.content_hash] -= 1
                renamed += 1
        self.report.renamed += renamed
        self.report.added -= renamed
        self.report.removed += removed - renamed

    def forget_roots(self) -> None:
        """Forget roots that are not there and of which no item is left."""
        left = self.roots
        for root in left.all:
            if not os.path.isdir(root.folder) and not self.index.count(below(root.folder)):
                left = left.without(root.folder)
                self.report.notes.append(
                    Note(root.folder, "the folder is not there, none of its items is left, and it is forgotten")
                )
        if left is not self.roots:
            left.keep(self.index)


def below(folder: str) -> Range:
    """Items made from files below a folder; the end of the range is the sign that follows the separator."""
    return Range(FILE_FIELD, os.path.join(folder, ""), folder.rstrip(os.sep) + chr(ord(os.sep) + 1))


def _state_of(stored: Stored) -> tuple[str, str]:
    """Path and stat of the file that an item was made from, "" where there is none."""
    path, stat = stored.fields.get(FILE_FIELD), stored.fields.get(STAT_FIELD)
    return path if isinstance(path, str) else "", stat if isinstance(stat, str) else ""


def _clash(file: FileState, holder: str) -> str:
    remedy = "give one folder a prefix of its own, by `traceir index sync FOLDER --prefix NAME`"
    return f"{file.path} has the id {file.id!r}, which already belongs to {holder}; {remedy}"


def _is_settled(file: FileState) -> bool:
    """Whether a file that failed can be read and has not changed: it will fail again as it is."""
    try:
        if not os.path.isfile(file.path):  # to open a pipe would wait for its writer
            return False
        with open(file.path, "rb") as stream:
            stream.read(1)
        return settled_stat(file.path) == file.stat
    except OSError:
        return False
