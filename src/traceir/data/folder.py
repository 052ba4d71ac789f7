"""What of a folder in M-BEIR's layout can be scored: rows, pools, what is right, and everything that is wrong with the files.

Nothing is encoded before the whole folder has been looked at. With the policy `stop` the first broken line, or all missing images
together, end it with an error. With `skip` each is logged, counted, kept in the results, and what it touches is left out: the
line; the candidate or the query of the image. A query that loses all its right candidates stays: it was asked, and it misses.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from traceir.data import mbeir
from traceir.data.report import markdown_table
from traceir.errors import DataError
from traceir.items import Item

log = logging.getLogger(__name__)

Policy = Literal["stop", "skip"]
Content = TypeVar("Content", mbeir.Record, mbeir.Candidate)
SHOWN: Final = 5


@dataclass
class Problems:
    """What is wrong with a folder, in words that name file and line, and what is done about it."""

    policy: Policy
    lines: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)

    def take_line(self, error: DataError) -> None:
        """A broken line: raised, or logged and counted."""
        if self.policy == "stop":
            raise DataError(f"{error} (or leave such lines out with --on-error skip)") from error
        self.lines.append(str(error))
        log.warning("left out: %s", error)

    def settle(self) -> None:
        """Raises DataError where images are missing and that is not to be skipped."""
        if self.policy == "stop" and self.images:
            shown = "; ".join(self.images[:SHOWN]) + ("; ..." if len(self.images) > SHOWN else "")
            raise DataError(
                f"{len(self.images)} images are missing: {shown}; complete the folder, or leave out what they touch with "
                "--on-error skip"
            )

    def summary(self) -> dict[str, Any]:
        """For results.json: how many of each, and the first of them."""
        return {
            "policy": self.policy,
            "broken_lines": len(self.lines),
            "missing_pictures": len(self.images),
            "first": [*self.lines[:SHOWN], *self.images[:SHOWN]],
        }


@dataclass(frozen=True)
class Row:
    """One row, ready to be scored.

    `records` are its queries; `dids` its local pool in file order; `relevant` maps a qid to its right dids, in any pool.
    """

    task: mbeir.Task
    records: tuple[mbeir.Record, ...] = field(repr=False)
    dids: tuple[str, ...] = field(repr=False)
    relevant: dict[str, frozenset[str]] = field(repr=False)
    labels: dict[str, mbeir.Label] = field(repr=False)

    def items(self) -> Iterator[Item]:
        """The candidates of `dids`, in that order, read again from the file; no image is opened yet."""
        kept, ignored = set(self.dids), list[DataError]()
        for candidate in mbeir.read_pool(self.task.pool_path, ignored.append):  # broken lines were reported before
            if candidate.did in kept:
                kept.discard(candidate.did)
                yield mbeir.to_item(candidate, self.task.root)


def data_fingerprint(about: Path) -> Any:
    """What a data folder's description says of its content; None where it has no description."""
    return json.loads(about.read_text(encoding="utf-8")).get("fingerprint") if about.is_file() else None


def file_names(folder: Path) -> frozenset[str]:
    """The files of a folder; none where there is no folder."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()


class Listing:
    """Which image files are there; each folder is listed once, which is much faster than a look at every file."""

    def __init__(self, root: Path) -> None:
        self.root, self._names = root, lru_cache(maxsize=None)(file_names)

    def has(self, image_path: str | Path) -> bool:
        path = self.root / image_path
        return path.name in self._names(path.parent)


def read_row(task: mbeir.Task, problems: Problems, listing: Listing, limit: int | None = None) -> Row:
    """One row of a folder. Raises DataError for an empty pool or a row without queries, and by the policy of `problems`.

    `limit` takes the first so many queries that can be scored.
    """
    pool = mbeir.read_pool(task.pool_path, problems.take_line)
    dids = tuple(candidate.did for candidate, there in _with_image(pool, task.pool_path, problems, listing) if there)
    if not dids:
        problems.settle()
        raise DataError(f"{task.pool_path} holds no candidate that can be found; rebuild or download it again")
    queries = mbeir.read_queries(task.query_path, problems.take_line)
    records = dict(_with_image(queries, task.query_path, problems, listing))
    relevant = _read_relevant(task, {record.qid for record in records}, problems)
    for record in records:
        relevant[record.qid] = relevant.get(record.qid, frozenset()) | frozenset(record.positives)
    kept = tuple(record for record, there in records.items() if there)
    if not kept:
        raise DataError(f"{task.query_path} holds no queries that can be scored; rebuild or download it again")
    return Row(task, kept[:limit], dids, relevant, mbeir.read_labels(task.labels_path, problems.take_line))


def survey(rows: Sequence[Row], problems: Problems) -> str:
    """A dry run's table: what would be scored, and what is wrong."""
    cells: list[tuple[object, ...]] = []
    for row in rows:
        pool = set(row.dids)
        outside = {did for record in row.records for did in row.relevant[record.qid]} - pool
        without = sum(not row.relevant[record.qid] & pool for record in row.records)
        cells.append((row.task.name, len(row.records), len(pool), len(outside), without))
    cells.append(("**all**", sum(len(row.records) for row in rows), sum(len(row.dids) for row in rows), "", ""))
    header = ("row", "queries", "pool", "right ones outside the pool", "queries without a right one in it")
    counts = f"{len(problems.lines)} broken lines, {len(problems.images)} missing images."
    details = [f"- {what}\n" for what in (*problems.lines, *problems.images)]
    return f"{markdown_table(header, 'lrrrr', cells)}\n\n{counts}\n{''.join(details)}"


def _with_image(contents: Iterable[Content], file: Path, problems: Problems, listing: Listing) -> Iterator[tuple[Content, bool]]:
    """Each query or candidate, and whether the image that it names is there."""
    for content in contents:
        there = content.image_path is None or listing.has(content.image_path)
        if not there:
            name = content.qid if isinstance(content, mbeir.Record) else content.did
            location = f"{file}: {name}: {content.image_path}"
            problems.images.append(location)
            if problems.policy == "skip":
                log.warning("left out, its image is missing: %s", location)
        yield content, there


def _read_relevant(task: mbeir.Task, qids: set[str], problems: Problems) -> dict[str, frozenset[str]]:
    """The qrels of the row's queries; {} where there is no such file. A line for a query that is not there is broken."""
    if not task.qrels_path.is_file():
        return {}
    judged = mbeir.read_qrels(task.qrels_path, problems.take_line)
    for qid in [qid for qid in judged if qid not in qids]:
        location = f"{task.qrels_path}:{min(judged.pop(qid).values())}"
        problems.take_line(
            DataError(f"{location}: query {qid!r} is not in {task.query_path}; remove the line, or complete that file")
        )
    return {qid: frozenset(dids) for qid, dids in judged.items()}
