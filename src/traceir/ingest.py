"""From paths to items in an index: what sources.py finds is read, encoded and kept.

`add` commits batch by batch, so a run that was cut off is simply repeated and goes on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from traceir.errors import ImageError, InputError, ModelError
from traceir.index.filters import same_fields
from traceir.index.store import Index, Stored, check_items, image_of
from traceir.items import Item, Vector
from traceir.search import EncoderLike, text_cut
from traceir.sources import FILE_FIELD, Failure, Note, Source, check_path, find_batches, find_sources


@dataclass(frozen=True, slots=True)
class AddReport:
    """What `add` did with every file and line.

    `updated` counts items whose content or fields had changed, `skipped` those already there. `failed` are those that are not in
    the index, or not as they are now. `notes` tell what was left out, shortened or replaced.
    """

    added: int
    updated: int
    skipped: int
    failed: tuple[Failure, ...]
    notes: tuple[Note, ...] = ()


def add(
    paths: Sequence[str | os.PathLike[str]],
    index: Index,
    encoder: EncoderLike,
    *,
    batch: int = 64,
    progress: bool = True,
) -> AddReport:
    """Encode what is below the paths and keep it in the index; items already there with equal content are skipped.

    Each batch is durable before the next one starts. What cannot be read is reported in `failed`; the rest goes on. So is a
    source whose id an earlier one has, and a folder in which nothing is read. InputError, before anything is written, for a path
    that does not exist.
    """
    check_paths(paths, batch)
    counts = Counts()
    failed: list[Failure] = []
    notes: list[Note] = []
    with tqdm(total=count_sources(paths) if progress else None, unit="item", desc="adding", disable=not progress) as bar:
        for found in find_batches(paths, batch):
            known = index.get([source.id for source in found.sources])
            sorted_out = sort_out(found.sources, known)
            done = encode_fresh(encoder, sorted_out.fresh, known)
            counts += write(index, done.pairs, sorted_out.moved)
            counts += Counts(skipped=found.again + sorted_out.skipped + done.skipped)
            failed += [*found.failed, *sorted_out.failed, *done.failed]
            notes += [*found.notes, *sorted_out.notes, *done.notes]
            bar.update(found.size)
    return AddReport(counts.added, counts.updated, counts.skipped, tuple(failed), tuple(notes))


# The steps of `add`, which are also those of ingest_cluster.py: `sort_out` and `encode_fresh` on workers, `write` in the driver


@dataclass(frozen=True, slots=True)
class Counts:
    """Items added, updated and skipped so far."""

    added: int = 0
    updated: int = 0
    skipped: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.added + other.added, self.updated + other.updated, self.skipped + other.skipped)


@dataclass(frozen=True, slots=True)
class SortedOut:
    """A batch of sources: to be encoded, of known content but other fields or place (`moved`), unchanged, unusable."""

    fresh: tuple[tuple[Source, Item], ...]
    moved: tuple[Item, ...]
    skipped: int
    failed: tuple[Failure, ...]
    notes: tuple[Note, ...]


@dataclass(slots=True)
class Encoded:
    """Items with their vectors, those that were refused, and how many turned out to be there already."""

    pairs: list[tuple[Item, Vector]] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    skipped: int = 0


def check_paths(paths: Sequence[str | os.PathLike[str]], batch: int) -> None:
    """Raise InputError for a path that does not exist, or a batch of none."""
    if batch < 1:
        raise InputError(f"batch is {batch}; give at least 1")
    for path in paths:
        check_path(Path(path))


def count_sources(paths: Sequence[str | os.PathLike[str]]) -> int:
    """The number of files and lines below the paths that will be added, or told to have failed."""
    return sum(not isinstance(found, Note) for found in find_sources(paths))


def first_items(paths: Sequence[str | os.PathLike[str]], count: int = 16) -> list[Item]:
    """The first of what is below the paths, without what cannot be read."""
    found: list[Item] = []
    for source in islice((one for one in find_sources(paths) if isinstance(one, Source)), count):
        with suppress(InputError):
            found.append(_make(source)[0])
    return found


def nothing_below(paths: Sequence[str | os.PathLike[str]]) -> list[Failure]:
    """Why nothing below the paths can be added; [] where something may be, which is known as soon as it is met.

    Raises InputError for a path that does not exist.
    """
    check_paths(paths, 1)
    failed: list[Failure] = []
    for found in find_sources(paths):
        if isinstance(found, Source):
            return []
        if isinstance(found, Failure):
            failed.append(found)
    return failed


def sort_out(sources: Sequence[Source], known: Mapping[str, Stored]) -> SortedOut:
    """Make the items, which reads and hashes their files, and compare them with what an index keeps under their ids."""
    fresh: list[tuple[Source, Item]] = []
    moved: list[Item] = []
    failed: list[Failure] = []
    notes: list[Note] = []
    for source in sources:
        before = known.get(source.id)
        try:
            item, told = _make(source)
            check_items([item])
            content = item.content_hash()
            if before is not None and before.content_hash != content:
                _check_same_origin(item, before)
        except InputError as error:
            failed.append(Failure(source.place, str(error)))
            continue
        notes += told
        if before is None or before.content_hash != content:
            fresh.append((source, item))
        elif not same_fields(before.fields, item.fields) or before.image != image_of(item):
            moved.append(item)
    skipped = len(sources) - len(fresh) - len(moved) - len(failed)
    return SortedOut(tuple(fresh), tuple(moved), skipped, tuple(failed), tuple(notes))


def encode_fresh(encoder: EncoderLike, fresh: Sequence[tuple[Source, Item]], known: Mapping[str, Stored]) -> Encoded:
    """Encode all at once; where an item is refused, in halves, so that only the bad ones are left out."""
    if not fresh:
        return Encoded()
    try:
        encodings = encoder.encode_items([item for _, item in fresh])
    except InputError as error:
        if len(fresh) == 1:
            return _encode_refused(encoder, *fresh[0], known, error)
        middle = len(fresh) // 2
        return _joined([encode_fresh(encoder, part, known) for part in (fresh[:middle], fresh[middle:])])
    if len(encodings) != len(fresh):
        raise ModelError(f"the encoder returned {len(encodings)} encodings for {len(fresh)} items; report it")
    done = Encoded([(item, one.vector) for (_, item), one in zip(fresh, encodings, strict=True)])
    done.notes += [Note(source.place, text_cut(one)) for (source, _), one in zip(fresh, encodings, strict=True) if one.cut]
    return done


def write(index: Index, encoded: Sequence[tuple[Item, Vector]], moved: Sequence[Item]) -> Counts:
    """Keep encoded items, and moved ones with the vectors they have, durably."""
    old = index.get([str(item.id) for item in moved], with_vectors=True)
    kept = [(item, old[str(item.id)].vector) for item in moved if str(item.id) in old]
    pairs = [*encoded, *((item, vector) for item, vector in kept if vector is not None)]
    new = index.upsert([item for item, _ in pairs], np.stack([vector for _, vector in pairs])) if pairs else ()
    return Counts(added=len(new), updated=len(pairs) - len(new))


def _make(source: Source) -> tuple[Item, tuple[Note, ...]]:
    """The item of a source, its picture read and hashed; by its text alone where that picture cannot be used."""
    try:
        item, notes = source.make_item()
        item.content_hash()
    except ImageError as error:
        return source.without_image(error)
    return item, notes


def _encode_refused(encoder: EncoderLike, source: Source, item: Item, known: Mapping[str, Stored], error: InputError) -> Encoded:
    """A single item that the encoder refused: by its text alone where only its picture is to blame."""
    if not isinstance(error, ImageError) or not item.images:
        return Encoded(failed=[Failure(source.place, str(error))])
    try:
        alone, notes = source.without_image(error)
    except ImageError:
        return Encoded(failed=[Failure(source.place, str(error))])
    before = known.get(source.id)
    if before is not None and before.content_hash == alone.content_hash() and same_fields(before.fields, alone.fields):
        return Encoded(notes=list(notes), skipped=1)
    done = encode_fresh(encoder, [(source, alone)], known)
    done.notes += notes
    return done


def _joined(parts: Sequence[Encoded]) -> Encoded:
    whole = Encoded()
    for part in parts:
        whole.pairs += part.pairs
        whole.failed += part.failed
        whole.notes += part.notes
        whole.skipped += part.skipped
    return whole


def _check_same_origin(item: Item, before: Stored) -> None:
    """Refuse to overwrite the item of another file that still exists and merely has the same name below its folder."""
    mine, other = item.fields.get(FILE_FIELD), before.fields.get(FILE_FIELD)
    if isinstance(mine, str) and isinstance(other, str) and mine != other and Path(other).exists():
        raise InputError(
            f"id {item.id!r} already belongs to {other}, which still exists; "
            "add a common parent folder instead, or remove that item first"
        )
