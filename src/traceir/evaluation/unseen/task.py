"""One shape for every zero-shot set: queries, a pool, what is right, and what each query may choose from.

Queries and items hold names and paths; nothing is decoded before an encoder asks for a Query or an Item. What a data folder lacks
is found before anything is encoded: `settle` stops with all of it, or leaves out the queries it touches and says which.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from traceir.data.folder import Listing
from traceir.errors import DataError
from traceir.images import ImageInput
from traceir.items import Item, Modality, Query

log = logging.getLogger(__name__)

Missing = Literal["stop", "skip", "keep"]
"""What to do about missing images and unknown ids: refuse the set; leave out and count the queries they touch; or only count
(`keep`, for dry runs: such a task cannot be scored)."""

Source = str | Path
"""A text, or the file of an image."""

SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class UnseenQuery:
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

    @property
    def named(self) -> tuple[str, ...]:
        """The candidates without which it cannot be scored: the right ones, and its gallery, because a smaller one asks less."""
        return tuple(dict.fromkeys((*self.relevant, *(self.gallery or ()))))

    def query(self) -> Query:
        """As a Query. Reads no image yet."""
        return Query(tuple(map(_open, self.parts)), instruction=self.instruction, target=self.target, id=self.id)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What is not scored, and why: absent files and images, ids that name nothing, and the ids lost with them."""

    files: tuple[Path, ...] = ()
    images: tuple[Path, ...] = ()
    unknown: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.files or self.images or self.unknown or self.cases)


@dataclass(frozen=True)
class UnseenTask:
    """One zero-shot task. `pool` maps ids, in order, to a text or the file of an image.

    `metrics` are `hit@k`, `map@k` or `accuracy`; `main` is the one that the papers report, taken over all queries, or where
    `by_group` is set as the plain mean over groups. `source` is the file that the queries come from.
    """

    name: str
    column: str
    source: Path
    cases: tuple[UnseenQuery, ...] = field(repr=False)
    pool: Mapping[str, Source] = field(repr=False)
    metrics: tuple[str, ...]
    main: str
    by_group: bool = False
    left_out: LeftOut = LeftOut()

    def item(self, id: str) -> Item:
        """The candidate as an Item. Reads no image yet."""
        return Item((_open(self.pool[id]),), id=id)


def settle(task: UnseenTask, missing: Missing) -> UnseenTask:
    """The task with nothing in it that cannot be scored; a candidate of a whole pool is left out by itself.

    Raises DataError where the pool or the queries are empty, before or after that, where a query id occurs twice, and, with
    `missing="stop"`, where anything is gone. With `keep` everything stays, and what is gone is only noted.
    """
    if missing == "stop":
        _refuse(task.source, task.left_out)
    if not task.cases:
        raise DataError(f"{task.source}: {task.name} has no queries; download the file again")
    if not task.pool:
        raise DataError(f"{task.source}: the pool of {task.name} is empty; download the set again")
    id, count = Counter(case.id for case in task.cases).most_common(1)[0]
    if count > 1:
        raise DataError(f"{task.source}: query id {id!r} occurs a second time; remove one of the entries")
    listing = Listing(Path())
    sources = (*(part for case in task.cases for part in case.parts), *task.pool.values())
    gone = dict.fromkeys(path for path in sources if isinstance(path, Path) and not listing.has(path))
    unknown = tuple(f"{case.id}: {id}" for case in task.cases for id in case.named if id not in task.pool)
    absent = replace(task.left_out, images=tuple(gone), unknown=unknown)
    if missing == "stop":
        _refuse(task.source, absent)
    return replace(task, left_out=absent) if missing == "keep" or not absent else _without(task, gone, absent)


def _without(task: UnseenTask, gone: Mapping[Path, None], absent: LeftOut) -> UnseenTask:
    """The task without what needs an image that is gone; says so."""
    pool = {id: source for id, source in task.pool.items() if source not in gone}
    cases = tuple(case for case in task.cases if gone.keys().isdisjoint(case.parts) and pool.keys() >= set(case.named))
    if not cases:
        raise DataError(
            f"{task.source}: no query of {task.name} is left: {len(gone)} images are missing, first {_show(absent.images)}; "
            "put the images in place"
        )
    kept = {case.id for case in cases}
    lost = tuple(case.id for case in task.cases if case.id not in kept)
    absent = replace(absent, candidates=tuple(id for id in task.pool if id not in pool), cases=lost)
    log.warning(
        "%s: left out %d of %d queries (first: %s) and %d of %d candidates; missing %d images (first: %s), %d ids, %d files",
        task.name, len(lost), len(task.cases), _show(lost), len(absent.candidates), len(task.pool), len(gone),
        _show(absent.images), len(absent.unknown), len(absent.files),
    )  # fmt: skip
    return replace(task, cases=cases, pool=pool, left_out=absent)


def _open(source: Source) -> str | ImageInput:
    return ImageInput.open(source) if isinstance(source, Path) else source


def _refuse(source: Path, absent: LeftOut) -> None:
    """DataError where anything is not there."""
    kinds: tuple[tuple[Sequence[object], str, str], ...] = (
        (absent.files, "annotation files are missing", ""),
        (absent.images, "images are missing", ""),
        (absent.unknown, "ids are not in the pool", " (query: id)"),
    )
    if problems := [f"{len(names)} {what}, first {_show(names)}{form}" for names, what, form in kinds if names]:
        raise DataError(
            f"{source}: {'; '.join(problems)}; complete the folder, or choose missing='skip' to leave out the queries"
        )


def _show(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:SHOWN])) or "none"
