"""From paths to items to an index: folders, pictures, text files, JSON lines, and the candidate pools of M-BEIR.

Ids are stable from run to run: a file's is its path below the folder given (its name, where the file itself was given),
a line's is its `id` or `did`. `add` commits batch by batch, so a run that was cut off is simply repeated and goes on.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from tqdm import tqdm

from traceir.errors import InputError, ModelError
from traceir.index.filters import OWN_NAMES, check_name, check_value
from traceir.index.store import Index, Stored, check_id, check_items, check_text, image_of
from traceir.items import Item, Vector
from traceir.pictures import SUFFIXES as PICTURE_SUFFIXES
from traceir.pictures import Picture
from traceir.search import EncoderLike

log = logging.getLogger(__name__)
TEXT_SUFFIXES: Final = frozenset({".txt", ".md"})
LINES_SUFFIXES: Final = frozenset({".jsonl"})
MAX_TEXT_BYTES: Final = 4 * 1024 * 1024
FILE_FIELD: Final = "_file"
"""The field that holds the path of an item's file, for `add` alone: no line may set it, no server shows or filters by it."""

Kind = Literal["picture", "text", "line"]
Fields = dict[str, str | int | float | bool | None]


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that could not be added: where (path or file:line) and why."""

    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class AddReport:
    """What `add` did. `updated` counts items whose content or fields had changed; `skipped` those already there."""

    added: int
    updated: int
    skipped: int
    failed: tuple[Failure, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """One item to be: what it is made from is read only when `make_item` is called."""

    id: str
    place: str
    kind: Kind
    path: Path
    record: Mapping[str, Any] | None = None

    def make_item(self) -> Item:
        """Raises InputError (also PictureError, for a picture that is missing or empty) naming what is wrong."""
        if self.record is not None:
            return _item_of_record(self.id, self.record, self.path)
        path = self.path.resolve()
        fields: Fields = {FILE_FIELD: str(path)}
        if self.kind == "picture":
            return Item.of(image=Picture.open(path), id=self.id, fields=fields)
        return Item.of(text=_read_text(self.path), id=self.id, fields=fields)


def find_sources(paths: Sequence[str | os.PathLike[str]]) -> Iterator[Source | Failure]:
    """Everything below the paths in a fixed order; bad lines and names are Failures, a missing path an InputError."""
    for path in map(Path, paths):
        if path.is_dir():
            yield from _walk_folder(path)
        elif not path.exists():
            raise InputError(f"{path} does not exist; give folders, pictures, text files or .jsonl files")
        elif path.suffix.lower() in LINES_SUFFIXES:
            yield from _read_lines(path)
        elif (kind := _kind_of(path)) is not None:
            yield _source_of_file(path, path.name, kind)
        else:
            known = ", ".join(sorted(PICTURE_SUFFIXES | TEXT_SUFFIXES | LINES_SUFFIXES))
            raise InputError(f"{path} has a suffix that is not read; give a folder or one of {known}")


def find_batches(paths: Sequence[str | os.PathLike[str]], size: int) -> Iterator[tuple[list[Source], list[Failure]]]:
    """What `find_sources` finds, `size` sources at a time, with the failures met on the way to them."""
    sources: list[Source] = []
    failures: list[Failure] = []
    for found in find_sources(paths):
        if isinstance(found, Failure):
            failures.append(found)
            continue
        sources.append(found)
        if len(sources) == size:
            yield sources, failures
            sources, failures = [], []
    yield sources, failures


def add(
    paths: Sequence[str | os.PathLike[str]],
    index: Index,
    encoder: EncoderLike,
    *,
    batch: int = 64,
    progress: bool = True,
) -> AddReport:
    """Encode what is below the paths and keep it in the index; items already there with equal content are skipped.

    Each batch is durable before the next one starts. What cannot be read is reported in `failed`; the rest goes on.
    Two sources of one id in a call are an InputError before anything is written.
    """
    total = check_sources(paths, batch)
    counts = Counts()
    failed: list[Failure] = []
    with tqdm(total=total, unit="item", desc="adding", disable=not progress) as bar:
        for sources, failures in find_batches(paths, batch):
            known = index.get([source.id for source in sources])
            sorted_out = sort_out(sources, known)
            encoded, refused = encode_fresh(encoder, sorted_out.fresh)
            counts += write(index, encoded, sorted_out.moved) + Counts(skipped=sorted_out.skipped)
            failed += [*failures, *sorted_out.failed, *refused]
            bar.update(len(sources) + len(failures))
    return AddReport(counts.added, counts.updated, counts.skipped, tuple(failed))


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


def check_sources(paths: Sequence[str | os.PathLike[str]], batch: int) -> int:
    """The number of sources and failures below the paths; InputError where two have one id, or for a batch of none."""
    if batch < 1:
        raise InputError(f"batch is {batch}; give at least 1")
    places: dict[str, str] = {}
    total = 0
    for source in find_sources(paths):
        total += 1
        if isinstance(source, Failure):
            continue
        if source.id in places:
            raise InputError(
                f"id {source.id!r} is given twice, by {places[source.id]} and {source.place}; "
                "rename one, or add their common parent folder"
            )
        places[source.id] = source.place
    return total


def sort_out(sources: Sequence[Source], known: Mapping[str, Stored]) -> SortedOut:
    """Make the items, which reads and hashes their files, and compare them with what an index keeps under their ids."""
    fresh: list[tuple[Source, Item]] = []
    moved: list[Item] = []
    failed: list[Failure] = []
    for source in sources:
        before = known.get(source.id)
        try:
            item = source.make_item()
            check_items([item])
            content = item.content_hash()
            if before is not None and before.content_hash != content:
                _check_same_origin(item, before)
        except InputError as error:
            failed.append(Failure(source.place, str(error)))
            continue
        if before is None or before.content_hash != content:
            fresh.append((source, item))
        elif dict(before.fields) != dict(item.fields) or before.image != image_of(item):
            moved.append(item)
    return SortedOut(tuple(fresh), tuple(moved), len(sources) - len(fresh) - len(moved) - len(failed), tuple(failed))


def encode_fresh(encoder: EncoderLike, fresh: Sequence[tuple[Source, Item]]) -> tuple[list[tuple[Item, Vector]], list[Failure]]:
    """Encode all at once; where an item is refused, one by one, so that only the bad ones are left out."""
    if not fresh:
        return [], []
    try:
        encodings = encoder.encode_items([item for _, item in fresh])
    except InputError as error:
        if len(fresh) == 1:
            return [], [Failure(fresh[0][0].place, str(error))]
        alone = [encode_fresh(encoder, [one]) for one in fresh]
        return [pair for pairs, _ in alone for pair in pairs], [failure for _, refused in alone for failure in refused]
    if len(encodings) != len(fresh):
        raise ModelError(f"the encoder returned {len(encodings)} encodings for {len(fresh)} items; report it")
    return [(item, one.vector) for (_, item), one in zip(fresh, encodings, strict=True)], []


def write(index: Index, encoded: Sequence[tuple[Item, Vector]], moved: Sequence[Item]) -> Counts:
    """Keep encoded items, and moved ones with the vectors they have, durably."""
    old = index.get([str(item.id) for item in moved], with_vectors=True)
    kept = [(item, old[str(item.id)].vector) for item in moved if str(item.id) in old]
    pairs = [*encoded, *((item, vector) for item, vector in kept if vector is not None)]
    new = index.upsert([item for item, _ in pairs], np.stack([vector for _, vector in pairs])) if pairs else ()
    return Counts(added=len(new), updated=len(pairs) - len(new))


def _check_same_origin(item: Item, before: Stored) -> None:
    """Refuse to overwrite the item of another file that still exists and merely has the same name below its folder."""
    mine, other = item.fields.get(FILE_FIELD), before.fields.get(FILE_FIELD)
    if isinstance(mine, str) and isinstance(other, str) and mine != other and Path(other).exists():
        raise InputError(
            f"id {item.id!r} already belongs to {other}, which still exists; "
            "add a common parent folder instead, or remove that item first"
        )


def _walk_folder(root: Path) -> Iterator[Source | Failure]:
    """Pictures and texts below a folder in order of name, hidden ones left out; links to folders are not followed."""
    left_out = 0
    unreadable: list[OSError] = []
    for folder, folders, names in os.walk(root, onerror=unreadable.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(folder) / name
            kind = _kind_of(path)
            if kind is None:
                left_out += 1
            else:
                yield _source_of_file(path, path.relative_to(root).as_posix(), kind)
    for error in unreadable:
        yield Failure(str(error.filename), f"the folder cannot be read: {error.strerror}; check its rights")
    if left_out:
        log.warning("%s: %d files are neither pictures nor texts and were left out", root, left_out)


def _source_of_file(path: Path, id: str, kind: Kind) -> Source | Failure:
    try:
        return Source(check_id(id), str(path), kind, path)
    except InputError as error:
        return Failure(repr(str(path)), str(error))


def _kind_of(path: Path) -> Kind | None:
    suffix = path.suffix.lower()
    return "picture" if suffix in PICTURE_SUFFIXES else "text" if suffix in TEXT_SUFFIXES else None


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():
            raise InputError(f"{path} is not a regular file; give a text file")
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            raise InputError(f"{path} is longer than {MAX_TEXT_BYTES} bytes; split it")
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check its rights") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from error
    if not text.strip():
        raise InputError(f"{path} holds no text; fill or remove it")
    return text


def _read_lines(path: Path) -> Iterator[Source | Failure]:
    roots = _Roots(path.parent)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _source_of_line(path, number, line, roots)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check its rights") from error


def _source_of_line(path: Path, number: int, line: bytes, roots: _Roots) -> Source | Failure:
    place = f"{path}:{number}"
    try:
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        if not isinstance(record, dict):
            raise InputError("the line is not a JSON object; write {...}")
        if "did" in record:
            record = _plain_record(record, roots)
        id = record.get("id")
        id = str(id) if isinstance(id, int) and not isinstance(id, bool) else id
        return Source(check_id(id), place, "line", path, record)
    except UnicodeDecodeError as error:
        return Failure(place, f"the line is not UTF-8 (byte {error.start}); convert the file")
    except json.JSONDecodeError as error:
        return Failure(place, f"the line is not JSON: {error.msg} at column {error.colno}; repair it")
    except RecursionError:
        return Failure(place, "the line is nested too deeply; write a flat JSON object")
    except InputError as error:
        return Failure(place, str(error))
    except ValueError as error:  # an integer of thousands of digits
        return Failure(place, f"the line holds a value that cannot be read: {error}; correct it")


class _Roots:
    """Finds the folder that M-BEIR's image paths start from: the nearest ancestor of the pool that holds the path."""

    def __init__(self, start: Path) -> None:
        self._ancestors = [start.resolve(), *start.resolve().parents]
        self._last: Path | None = None

    def find(self, image: str) -> str:
        folders = self._ancestors if self._last is None else [self._last, *self._ancestors]
        for folder in folders:
            if os.path.exists(folder / image):  # noqa: PTH110 - unlike Path.exists never an error for odd names
                self._last = folder
                return str(folder / image)
        raise InputError(f"picture {image!r} is in no folder above {self._ancestors[0]}; unpack the images beside the pool")


def _plain_record(record: Mapping[str, Any], roots: _Roots) -> dict[str, Any]:
    """A line of an M-BEIR pool ({did, txt, img_path, modality}) as {id, text, image, modality}."""
    image = record.get("img_path")
    if image is not None and not isinstance(image, str):
        raise InputError(f"img_path is {image!r}; write a path or null")
    modality = record.get("modality")
    return {
        "id": record["did"],
        "text": record.get("txt"),
        "image": roots.find(image) if image else None,
        "modality": "image,text" if modality == "text,image" else modality,
    }


def _item_of_record(id: str, record: Mapping[str, Any], path: Path) -> Item:
    text, image = record.get("text"), record.get("image")
    for name, value in (("text", text), ("image", image)):
        if value is not None and not isinstance(value, str):
            raise InputError(f"{name} of {id!r} is {repr(value)[:80]}; write a text or null")
    if text is not None:
        check_text(id, text)
    picture = Picture.open(image if "://" in image else path.parent.resolve() / image) if image else None
    fields = {name: value for name, value in record.items() if name not in ("text", "image", *OWN_NAMES)}
    if FILE_FIELD in fields:
        raise InputError(f"{id!r} has a field called {FILE_FIELD!r}, which holds the paths of files; rename it")
    for name, value in fields.items():
        check_name(name)
        check_value(name, value)
    item = Item.of(text=text, image=picture, id=id, fields=fields)
    stated = record.get("modality")
    if stated is not None and stated != item.modality:
        raise InputError(f"{id!r} says it is {stated!r} but holds {item.modality!r}; add what is missing or correct it")
    return item
