"""What is found below paths: folders, images, videos, documents, texts, lines, tables, and the candidate pools of M-BEIR.

Ids are stable from run to run: a file's is its path below the folder given (its name, where the file itself was given), that of
a part of it `id#page=3`, `id#t=12.5` or `id#part=2`, a line's is its `id` or `did`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from traceir.collection.passages import passages
from traceir.collection.records import (
    LINES_SUFFIXES,
    TABLE_SUFFIXES,
    TEXT_NAMES,
    FileRecord,
    other_encoding,
    read_records,
    text_or_none,
)
from traceir.collection.records import Failure as Failure
from traceir.collection.records import Note as Note
from traceir.collection.roots import file_path, settled_stat
from traceir.errors import ImageError, InputError
from traceir.images import SUFFIXES as IMAGE_SUFFIXES
from traceir.images import ImageInput
from traceir.index.filters import OWN_NAMES, check_field
from traceir.index.store import check_id, check_text
from traceir.items import Item, Value
from traceir.media.part import PDF_SUFFIXES, FilePart, part_of
from traceir.media.pdf import page_text, read_document
from traceir.media.video import SUFFIXES as VIDEO_SUFFIXES
from traceir.media.video import read_video

TEXT_SUFFIXES: Final = frozenset({".txt", ".md"})
RECORD_SUFFIXES: Final = LINES_SUFFIXES | TABLE_SUFFIXES
MAX_FILE_BYTES: Final = 64 * 1024 * 1024
"""Bytes of a text file."""
FILE_FIELD: Final = "_file"
"""The field that holds the path of an item's file: no line may set it, no server shows or filters by it."""
STAT_FIELD: Final = "_stat"
"""As FILE_FIELD: size and times of the file before it was read (`roots.py`)."""
_READ: Final = (
    "read are images (.jpg, .png, .heic and their like), raw photographs (.dng, .cr3), videos (.mp4, .mov), .pdf, .txt and .md, "
    "and .jsonl and .csv where the file is named"
)
_REMEDIES: Final = (
    ("convert images to JPEG or PNG", ".jxl .jp2 .j2k .svg .psd .xcf .eps .ai .ico .icns .tga .dds .exr .hdr"),
    (
        "save documents as .pdf",
        ".doc .docx .odt .rtf .epub .mobi .ppt .pptx .odp .key .pages .htm .html .mht .rst .tex .eml .msg",
    ),
    ("save tables as .csv with a column id", ".json .xls .xlsx .xlsm .ods .numbers .parquet .xml .yaml .yml"),
    ("sound is not read", ".m4a .mp3 .wav .aac .ogg .oga .opus .flac .amr .wma .aiff .caf .mid"),
    ("unpack archives", ".zip .rar .7z .tar .gz .tgz .bz2 .xz .zst .iso .dmg"),
)

Kind = Literal["image", "text", "line"]


@dataclass(frozen=True, slots=True)
class Source:
    """What an item is made from: most of it is read only when `make_item` is called.

    `record`: of a line. `part`: the name of what is within the file. `text`: of a text file, or of a passage of it. `fields`:
    what is known of the file.
    """

    id: str
    location: str
    kind: Kind
    path: Path
    record: Mapping[str, Any] | None = None
    part: str = ""
    text: str | None = None
    fields: Mapping[str, Value] = field(default_factory=dict)

    def make_item(self) -> tuple[Item, tuple[Note, ...]]:
        """The item and notes on it. Raises InputError (ImageError, for an image's path) naming what is wrong."""
        if self.record is not None:
            name = text_or_none(self.id, "image", self.record.get("image"))
            image = ImageInput.open(name if "://" in name else self.path.parent.resolve() / name) if name else None
            return _item_of_record(self, self.record, image)
        if self.kind == "text":
            return self._item_of(self.text, None), ()
        path = os.path.realpath(self.path)
        return self._item_of(self._page_text(), ImageInput.open(f"{path}#{self.part}" if self.part else path)), ()

    def without_image(self, error: ImageError) -> tuple[Item, tuple[Note, ...]]:
        """The item by its text alone, because of this error; raises it where there is no text, or the line states a modality."""
        record = self.record or {}
        text = self._page_text() if self.record is None else record.get("text")
        if not isinstance(text, str) or not text.strip() or record.get("modality") is not None:
            raise error
        item, notes = (self._item_of(text, None), ()) if self.record is None else _item_of_record(self, record, None)
        return item, (*notes, Note(self.location, f"kept with its text alone: {error}"))

    def _item_of(self, text: str | None, image: ImageInput | None) -> Item:
        fields = {**(image.metadata() if image else {}), **self.fields}
        return Item.of(text=text, image=image, id=self.id, fields=fields)

    def _page_text(self) -> str | None:
        part = part_of(Path(f"{self.path}#{self.part}")) if self.part else None
        return page_text(part.file, part.page) if part and part.page else None


@dataclass(slots=True)
class SourceBatch:
    """Sources whose ids differ from all before them, what was met on the way to them, and how many were merely named again."""

    sources: list[Source] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    again: int = 0

    @property
    def size(self) -> int:
        return len(self.sources) + len(self.failed) + self.again


def find_sources(paths: Sequence[str | os.PathLike[str]]) -> Iterator[Source | Failure | Note]:
    """Everything below the paths in a fixed order; bad lines, names and files are Failures, a missing path an InputError."""
    for path in map(Path, paths):
        check_path(path)
        if path.is_dir():
            yield from _walk_folder(path)
        else:
            yield from sources_of_file(path, path.name)


def readable_suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of the files that are read in a folder."""
    return IMAGE_SUFFIXES | VIDEO_SUFFIXES | PDF_SUFFIXES | TEXT_SUFFIXES


def sources_of_file(path: Path, id: str) -> Iterator[Source | Failure | Note]:
    """Everything in one file, in its order: under `id`, or `id#...` for what is a part of it; lines have ids of their own.

    A file of no known suffix may be an image. What cannot be read is a Failure. All but lines carry the file's path and stat.
    """
    state = {FILE_FIELD: file_path(path), STAT_FIELD: settled_stat(path)}
    for outcome in _sources_in(path, id):
        if isinstance(outcome, Source) and outcome.record is None:
            outcome = replace(outcome, fields={**outcome.fields, **state})
        yield outcome


def _sources_in(path: Path, id: str) -> Iterator[Source | Failure | Note]:
    suffix = path.suffix.lower()
    try:
        if suffix in RECORD_SUFFIXES:
            yield from _records(path)
            return
        check_id(id)
    except InputError as error:
        yield Failure(repr(str(path)), str(error))
        return
    try:
        if suffix in PDF_SUFFIXES:
            yield from _pages(path, id)
        elif suffix in VIDEO_SUFFIXES:
            yield from _frames(path, id)
        elif suffix in TEXT_SUFFIXES:
            yield from _passages(path, id)
        else:
            if suffix not in IMAGE_SUFFIXES:
                _check_image(path)
            yield Source(id, str(path), "image", path)
    except InputError as error:
        own = f"{path} "
        yield Failure(str(path), f"it {str(error).removeprefix(own)}" if str(error).startswith(own) else str(error))


def find_batches(outcomes: Iterable[Source | Failure | Note], size: int) -> Iterator[SourceBatch]:
    """What `find_sources` finds, `size` sources at a time. Of one id the first source counts, others are Failures."""
    locations: dict[str, str] = {}
    batch = SourceBatch()
    for outcome in outcomes:
        if isinstance(outcome, Failure):
            batch.failed.append(outcome)
        elif isinstance(outcome, Note):
            batch.notes.append(outcome)
        elif outcome.id not in locations:
            locations[outcome.id] = outcome.location
            batch.sources.append(outcome)
        elif os.path.realpath(outcome.location) == os.path.realpath(locations[outcome.id]):
            batch.again += 1
        else:
            remedy = "give it another id" if outcome.kind == "line" else "rename it, or add the parent folder of both"
            both = f"{locations[outcome.id]} and {outcome.location}"
            why = f"id {outcome.id!r} is given twice, by {both}; the first one counts: {remedy}"
            batch.failed.append(Failure(outcome.location, why))
        if len(batch.sources) == size:
            yield batch
            batch = SourceBatch()
    yield batch


def check_path(path: Path) -> None:
    """Raise InputError for a path that is not there."""
    if not os.path.exists(path):  # noqa: PTH110 - unlike Path.exists never an error where rights are missing
        raise InputError(f"{path} does not exist; give folders, images, text files or .jsonl files")


def _walk_folder(root: Path) -> Iterator[Source | Failure | Note]:
    """What is read below a folder in order of name, hidden ones left out; links to folders are not followed."""
    read = hidden = links = 0
    other: Counter[str] = Counter()
    unreadable: list[OSError] = []
    suffixes = readable_suffixes()
    for folder, folders, names in os.walk(root, onerror=unreadable.append):
        hidden += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links += sum((Path(folder) / name).is_symlink() for name in folders)
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(folder) / name
            if path.suffix.lower() in suffixes:
                read += 1
                yield from sources_of_file(path, path.relative_to(root).as_posix())
            else:
                other[path.suffix.lower()] += 1
    for error in unreadable:
        yield Failure(str(error.filename), f"the folder cannot be read: {error.strerror}; check its rights")
    counts = [
        f"{count} {suffix or 'without a suffix'}" for suffix, count in sorted(other.items(), key=lambda pair: (-pair[1], pair))
    ]
    counts += [f"{links} linked folder{'s' if links > 1 else ''}"] if links else []
    if not read and not unreadable:
        counts += [f"{hidden} hidden"] if hidden else []
        yield Failure(str(root), f"nothing in it is read ({', '.join(counts) or 'it is empty'}); {_remedy(other)}")
    elif counts:
        yield Note(str(root), f"left out: {', '.join(counts)}; {_remedy(other)}")


def _remedy(suffixes: Iterable[str]) -> str:
    """What is read, and what to do with files of these suffixes."""
    return "; ".join([_READ, *(remedy for remedy, own in _REMEDIES if not set(own.split()).isdisjoint(suffixes))])


def _check_image(path: Path) -> None:
    """InputError for a file that is no image, whatever its suffix says."""
    try:
        ImageInput.open(path).encoded()
    except ImageError as error:
        raise InputError(f"it is neither an image nor a text; {_remedy([path.suffix.lower()])}") from error


def _pages(path: Path, id: str) -> Iterator[Source]:
    document = read_document(path)
    stated: dict[str, Value] = {"title": document.title} if document.title else {}
    stated |= {"date": document.date} if document.date else {}
    for page in range(1, document.pages + 1):
        part = FilePart(path, page=page)
        fields = {**stated, "page": page, "pages": document.pages}
        yield Source(check_id(f"{id}#{part.name}"), str(part.path), "image", path, part=part.name, fields=fields)


def _frames(path: Path, id: str) -> Iterator[Source]:
    video = read_video(path)
    for second in video.seconds:
        part = FilePart(path, second=second)
        fields = {**video.fields, "second": round(second, 3)}
        yield Source(check_id(f"{id}#{part.name}"), str(part.path), "image", path, part=part.name, fields=fields)


def _passages(path: Path, id: str) -> Iterator[Source]:
    cut = passages(_read_text(path))
    if len(cut) == 1:
        yield Source(id, str(path), "text", path, text=cut[0])
        return
    for number, text in enumerate(cut, start=1):
        name = f"part={number}"
        location = f"{path}#{name}"
        yield Source(check_id(f"{id}#{name}"), location, "text", path, part=name, text=text, fields={"part": number})


def _records(path: Path) -> Iterator[Source | Failure | Note]:
    for record in read_records(path):
        if not isinstance(record, FileRecord):
            yield record
            continue
        try:
            yield Source(check_id(record.values.get("id")), record.location, "line", path, record.values)
        except InputError as error:
            yield Failure(record.location, str(error))


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():
            raise InputError("it is not a regular file; give a text file")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise InputError(f"it is longer than {MAX_FILE_BYTES} bytes; split it")
        if why := other_encoding(data):
            raise InputError(f"it is {why}")
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"it cannot be read: {error.strerror}; check its rights") from error
    except UnicodeDecodeError as error:
        raise InputError(f"it is not UTF-8 text (byte {error.start}); convert it") from error
    if not text.strip():
        raise InputError("it holds no text; fill or remove it")
    return text


def _item_of_record(source: Source, record: Mapping[str, Any], image: ImageInput | None) -> tuple[Item, tuple[Note, ...]]:
    text = text_or_none(source.id, "text", record.get("text"))
    notes: tuple[Note, ...] = ()
    named = (name for name in TEXT_NAMES if isinstance(record.get(name), str) and record[name].strip())
    if not record.get("image") and not (text or "").strip() and (name := next(named, "")):
        text, notes = record[name], (Note(source.location, f"it has no `text`: its `{name}` was taken"),)
    if text is not None:
        check_text(source.id, text)
    fields = {name: value for name, value in record.items() if name not in ("text", "image", *OWN_NAMES)}
    for name in (FILE_FIELD, STAT_FIELD):
        if name in fields:
            raise InputError(f"{source.id!r} has a field called {name!r}, which is kept for files; rename it")
    for name, value in fields.items():
        check_field(name, value)
    item = Item.of(text=text, image=image, id=source.id, fields=fields)
    stated = record.get("modality")
    if stated is not None and stated != item.modality:
        raise InputError(f"{source.id!r} says it is {stated!r} but holds {item.modality!r}; add what is missing or correct it")
    return item, notes
