"""From paths to items in an index: what sources.py finds is read, encoded and kept.

`add` commits batch by batch, so a run that was cut off is simply repeated and goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from traceir.collection.records import Failure, Note
from traceir.collection.roots import Roots
from traceir.collection.sources import (
    FILE_FIELD,
    STAT_FIELD,
    Source,
    SourceBatch,
    check_path,
    find_batches,
    find_sources,
)
from traceir.errors import ImageError, InputError, ModelError
from traceir.index.filters import same_fields
from traceir.index.store import Index, Stored, check_items, image_of
from traceir.items import Item, Vector
from traceir.retrieval.search import EncoderLike, text_cut


@dataclass(slots=True)
class AddReport:
    """What `add` did with every file and line.

    `updated` counts items whose content or fields had changed, `skipped` those already there. `failed` are those that are not in
    the index, or not as they are now. `notes` tell what was left out, shortened or replaced.
    """

    added: int = 0
    updated: int = 0
    skipped: int = 0
    failed: list[Failure] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def include(self, other: AddReport) -> None:
        """Counts what another one reports, too."""
        self.added += other.added
        self.updated += other.updated
        self.skipped += other.skipped
        self.failed += other.failed
        self.notes += other.notes


def add(
    paths: Sequence[str | os.PathLike[str]], index: Index, encoder: EncoderLike, *, batch: int = 64, progress: bool = True
) -> AddReport:
    """Encode what is below the paths and keep it in the index; items already there with equal content are skipped.

    Each batch is durable before the next one starts. What cannot be read is reported in `failed`; the rest goes on. So is a
    source whose id an earlier one has, and a folder in which nothing is read. InputError, before anything is written, for a path
    that does not exist. A file below a root of the index (`roots.py`) has the id that `sync` gives it.
    """
    check_paths(paths, batch)
    report = AddReport()
    with progress_bar(paths, progress) as bar:
        for part in find_batches(find_in_roots(paths, index), batch):
            known = index.get([source.id for source in part.sources])
            report.include(keep(index, part, process(part.sources, known, lambda: encoder)))
            bar.update(part.size)
    return report


def check_paths(paths: Sequence[str | os.PathLike[str]], batch: int = 1) -> None:
    """Raise InputError for a path that does not exist, or a batch of none."""
    if batch < 1:
        raise InputError(f"batch is {batch}; give at least 1")
    for path in paths:
        check_path(Path(path))


def find_in_roots(paths: Sequence[str | os.PathLike[str]], index: Index) -> Iterator[Source | Failure | Note]:
    """What `find_sources` finds, under the ids that the roots of the index give.

    The parts of a file carry no stat: where not all of them are added, `sync` has to look at the file again.
    """
    roots = Roots.read(index)
    for path in map(Path, paths):
        folder = path if path.is_dir() else path.parent
        for outcome in find_sources([path]):
            if not isinstance(outcome, Source) or outcome.record is not None:
                yield outcome
                continue
            fields = {**outcome.fields, STAT_FIELD: ""} if outcome.part else outcome.fields
            file, id = str(outcome.fields[FILE_FIELD]), outcome.id
            if root := roots.of(file):
                id = root.id_of(file) + id.removeprefix(outcome.path.relative_to(folder).as_posix())
            yield replace(outcome, id=id, fields=fields)


def progress_bar(paths: Sequence[str | os.PathLike[str]], shown: bool) -> tqdm[object]:
    """A bar over the files and lines below the paths, which are counted first where it is shown."""
    total = sum(not isinstance(outcome, Note) for outcome in find_sources(paths)) if shown else None
    return tqdm(total=total, unit="item", desc="adding", disable=not shown)


def first_items(paths: Sequence[str | os.PathLike[str]], count: int = 16) -> list[Item]:
    """The first of what is below the paths, without what cannot be read."""
    items: list[Item] = []
    for source in islice((source for source in find_sources(paths) if isinstance(source, Source)), count):
        with suppress(InputError):
            items.append(_make_item(source)[0])
    return items


def nothing_below(paths: Sequence[str | os.PathLike[str]]) -> list[Failure]:
    """Why nothing below the paths can be added; [] where something may be, which ends the search.

    Raises InputError for a path that does not exist.
    """
    check_paths(paths)
    failed: list[Failure] = []
    for outcome in find_sources(paths):
        if isinstance(outcome, Source):
            return []
        if isinstance(outcome, Failure):
            failed.append(outcome)
    return failed


# The two steps of `add`, which are also those of ingest_cluster.py: `process` on the workers, `keep` in the driver


@dataclass(slots=True)
class Processed:
    """What became of a batch: items with new vectors, items of known content but other fields or path (`moved`), the rest.

    `touched` counts those of `moved` that differ in their file's stat alone.
    """

    encoded: list[tuple[Item, Vector]] = field(default_factory=list)
    moved: list[Item] = field(default_factory=list)
    touched: int = 0
    rest: AddReport = field(default_factory=AddReport)


def process(
    sources: Sequence[Source],
    known: Mapping[str, Stored],
    make_encoder: Callable[[], EncoderLike],
    reuse: Callable[[Sequence[str]], Mapping[str, Vector]] | None = None,
) -> Processed:
    """Read and hash the sources' files, compare them with what an index keeps under their ids, and encode what is new.

    `reuse` has the vectors of some contents, by their hashes.
    """
    done = Processed()
    fresh: list[tuple[Source, Item]] = []
    for source in sources:
        before = known.get(source.id)
        try:
            item, notes = _make_item(source)
            check_items([item])
            is_new = before is None or before.content_hash != item.content_hash()
            if before is not None and is_new:
                _check_same_origin(item, before)
        except InputError as error:
            done.rest.failed.append(Failure(source.location, str(error)))
            continue
        done.rest.notes += notes
        if is_new:
            fresh.append((source, item))
        else:
            _compare(item, before, done)
    vectors = reuse([item.content_hash() for _, item in fresh]) if reuse and fresh else {}
    done.encoded += [(item, vectors[item.content_hash()]) for _, item in fresh if item.content_hash() in vectors]
    fresh = [(source, item) for source, item in fresh if item.content_hash() not in vectors]
    if fresh:
        _encode(make_encoder(), fresh, known, done)
    return done


def keep(index: Index, batch: SourceBatch, done: Processed) -> AddReport:
    """Keep encoded items, and moved ones with the vectors they have, durably; the report on the batch they came from."""
    old = index.get([str(item.id) for item in done.moved], with_vectors=True)
    moved = [(item, old[str(item.id)].vector) for item in done.moved if str(item.id) in old]
    pairs = [*done.encoded, *((item, vector) for item, vector in moved if vector is not None)]
    new = index.upsert([item for item, _ in pairs], np.stack([vector for _, vector in pairs])) if pairs else ()
    updated = len(pairs) - len(new) - done.touched
    report = AddReport(len(new), updated, batch.again + done.touched, batch.failed, batch.notes)
    report.include(done.rest)
    return report


def _make_item(source: Source) -> tuple[Item, tuple[Note, ...]]:
    """The item of a source, its image read and hashed; by its text alone where that image cannot be used."""
    try:
        item, notes = source.make_item()
        item.content_hash()
    except ImageError as error:
        return source.without_image(error)
    return item, notes


def _compare(item: Item, before: Stored | None, done: Processed) -> None:
    """Of known content: skipped, or moved where fields or the image's path differ."""
    if before is not None and before.image == image_of(item):
        if same_fields(before.fields, item.fields):
            done.rest.skipped += 1
            return
        done.touched += same_fields({**before.fields, STAT_FIELD: None}, {**item.fields, STAT_FIELD: None})
    done.moved.append(item)


def _encode(encoder: EncoderLike, fresh: Sequence[tuple[Source, Item]], known: Mapping[str, Stored], done: Processed) -> None:
    """Encode all at once; where an item is refused, in halves, so that only the bad ones are left out."""
    try:
        encodings = encoder.encode_items([item for _, item in fresh])
    except InputError as error:
        if len(fresh) == 1:
            _encode_without_image(encoder, *fresh[0], known, done, error)
        else:
            middle = len(fresh) // 2
            _encode(encoder, fresh[:middle], known, done)
            _encode(encoder, fresh[middle:], known, done)
        return
    if len(encodings) != len(fresh):
        raise ModelError(f"the encoder returned {len(encodings)} encodings for {len(fresh)} items; report it")
    for (source, item), encoding in zip(fresh, encodings, strict=True):
        done.encoded.append((item, encoding.vector))
        if encoding.cut:
            done.rest.notes.append(Note(source.location, text_cut(encoding)))


def _encode_without_image(
    encoder: EncoderLike, source: Source, item: Item, known: Mapping[str, Stored], done: Processed, error: InputError
) -> None:
    """A single item that the encoder refused: by its text alone where only its image is to blame."""
    try:
        if not isinstance(error, ImageError) or not item.images:
            raise error
        alone, notes = source.without_image(error)
    except InputError:
        done.rest.failed.append(Failure(source.location, str(error)))
        return
    done.rest.notes += notes
    before = known.get(source.id)
    if before is not None and before.content_hash == alone.content_hash():
        _compare(alone, before, done)
    else:
        _encode(encoder, [(source, alone)], known, done)


def _check_same_origin(item: Item, before: Stored) -> None:
    """Refuse to overwrite the item of another file that still exists and merely has the same name below its folder."""
    mine, other = item.fields.get(FILE_FIELD), before.fields.get(FILE_FIELD)
    if isinstance(mine, str) and isinstance(other, str) and mine != other and Path(other).exists():
        remedy = "add a common parent folder instead, or remove that item first"
        raise InputError(f"id {item.id!r} already belongs to {other}, which still exists; {remedy}")
