"""One shape for every zero-shot set: queries, a pool, what is right, and what each query may choose from.

Queries and items hold names and paths; nothing is decoded before an encoder asks for a Query or an Item. What a data folder lacks
is found before anything is encoded: `settle` stops with all of it, or leaves out the queries it touches and says which.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from traceir.errors import DataError
from traceir.images import ImageInput
from traceir.items import Item, Modality, Query

log = logging.getLogger(__name__)

Missing = Literal["stop", "skip", "keep"]
"""What to do about missing pictures and unknown ids: refuse the set; leave out and count the queries they touch; or only count
(`keep`, for dry runs: such a task cannot be scored)."""

Source = str | Path
"""A text, or the file of a picture."""

SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Case:
    """One query of a task.

    `parts` come in reading order. `relevant` are the right ids (none where the truth is not published). `gallery` are the only
    ids it ranks, with repetitions as published (None: the whole pool). `masked` are ids it may not find. `group` names the file
    it belongs to, where results are given for each.
    """

    id: str
    parts: tuple[Source, ...]
    relevant: tuple[str, ...]
    instruction: str | None = None
    target: Modality = "image"
    gallery: tuple[str, ...] | None = None
    masked: tuple[str, ...] = ()
    group: str = ""

    def query(self) -> Query:
        """The case as a Query. Reads no picture yet."""
        parts = tuple(_open(part) for part in self.parts)
        return Query(parts, instruction=self.instruction, target=self.target, id=self.id)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What is not scored, and why: absent files and pictures, ids that name nothing, and the ids lost with them."""

    files: tuple[Path, ...] = ()
    images: tuple[Path, ...] = ()
    unknown: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.files or self.images or self.unknown or self.cases)


@dataclass(frozen=True)
class Task:
    """One zero-shot task. `pool` maps ids, in order, to a text or the file of a picture.

    `metrics` are `hit@k`, `map@k` or `accuracy`; `main` is the one that the papers report, taken over all queries, or where
    `by_group` is set as the plain mean over groups. `source` is the file that the queries come from.
    """

    name: str
    column: str
    source: Path
    cases: tuple[Case, ...] = field(repr=False)
    pool: Mapping[str, Source] = field(repr=False)
    metrics: tuple[str, ...]
    main: str
    by_group: bool = False
    left_out: LeftOut = LeftOut()

    def item(self, id: str) -> Item:
        """The candidate as an Item. Reads no picture yet."""
        return Item((_open(self.pool[id]),), id=id)


def settle(task: Task, missing: Missing) -> Task:
    """The task with nothing in it that cannot be scored.

    A query is left out where one of its pictures or one of its right candidates is gone, or one of its gallery, because a smaller
    gallery is another question. A candidate of a whole pool is left out by itself. Raises DataError where the pool or the queries
    are empty, before or after that, where a query id occurs twice, and, with `missing="stop"`, where anything is gone. With
    `keep` everything stays, and what is gone is only noted.
    """
    if missing == "stop":
        _refuse(task, task.left_out)
    _check_whole(task)
    gone = _gone(task)
    lost = {id for id, source in task.pool.items() if source in gone}
    unknown = tuple(
        f"{case.id}: {id}"
        for case in task.cases
        for id in dict.fromkeys((*case.relevant, *(case.gallery or ())))
        if id not in task.pool
    )
    absent = replace(task.left_out, images=tuple(gone), unknown=unknown)
    if missing == "stop":
        _refuse(task, absent)
    if not absent or missing == "keep":
        return replace(task, left_out=absent)
    left_out = tuple(case.id for case in task.cases if not _whole(case, task.pool, gone, lost))
    dropped = set(left_out)
    cases = tuple(case for case in task.cases if case.id not in dropped)
    pool = {id: source for id, source in task.pool.items() if id not in lost}
    if not cases:
        raise DataError(
            f"{task.source}: no query of {task.name} is left: {len(gone)} pictures are missing, first "
            f"{_show(gone)}; put the pictures in place"
        )
    absent = replace(absent, candidates=tuple(id for id in task.pool if id in lost), cases=left_out)
    log.warning(
        "%s: left out %d of %d queries (first: %s) and %d of %d candidates; missing %d pictures (first: %s), %d ids, %d files",
        task.name, len(left_out), len(task.cases), _show(left_out), len(lost), len(task.pool), len(gone), _show(gone),
        len(unknown), len(absent.files),
    )  # fmt: skip
    return replace(task, cases=cases, pool=pool, left_out=absent)


def _open(source: Source) -> str | ImageInput:
    return ImageInput.open(source) if isinstance(source, Path) else source


def _whole(case: Case, pool: Mapping[str, Source], gone: Mapping[Path, None], lost: set[str]) -> bool:
    """Whether the query's own pictures, its right candidates and its gallery are all there."""
    named = {*case.relevant, *(case.gallery or ())}
    return not any(isinstance(part, Path) and part in gone for part in case.parts) and not any(
        id in lost or id not in pool for id in named
    )


def _gone(task: Task) -> dict[Path, None]:
    """The files of pictures that are not there, in the order in which queries and pool name them."""
    folders: dict[Path, set[str]] = {}
    named: Iterable[Source] = (*(part for case in task.cases for part in case.parts), *task.pool.values())
    found: dict[Path, None] = {}
    for path in named:
        if isinstance(path, Path):
            if path.parent not in folders:
                folders[path.parent] = files_in(path.parent)
            if path.name not in folders[path.parent]:
                found[path] = None
    return found


def files_in(folder: Path) -> set[str]:
    """One listing is much faster than a look at each of 123,000 pictures."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _check_whole(task: Task) -> None:
    if not task.cases:
        raise DataError(f"{task.source}: {task.name} has no queries; download the file again")
    if not task.pool:
        raise DataError(f"{task.source}: the pool of {task.name} is empty; download the set again")
    seen: set[str] = set()
    for case in task.cases:
        if case.id in seen:
            raise DataError(f"{task.source}: query id {case.id!r} occurs a second time; remove one of the entries")
        seen.add(case.id)


def _refuse(task: Task, absent: LeftOut) -> None:
    found = []
    if absent.files:
        found.append(f"{len(absent.files)} annotation files are missing, first {_show(absent.files)}")
    if absent.images:
        found.append(f"{len(absent.images)} pictures are missing, first {_show(absent.images)}")
    if absent.unknown:
        found.append(f"{len(absent.unknown)} ids are not in the pool, first {_show(absent.unknown)} (query: id)")
    if found:
        raise DataError(
            f"{task.source}: {'; '.join(found)}; complete the folder, or choose missing='skip' to leave out the queries touched"
        )


def _show(names: Iterable[object]) -> str:
    return ", ".join(str(name) for name in list(names)[:SHOWN]) or "none"
