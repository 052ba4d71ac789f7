"""What is found below paths: folders, images, text files, JSON lines, and the candidate pools of M-BEIR.

Ids are stable from run to run: a file's is its path below the folder given (its name, where the file itself was given),
a line's is its `id` or `did`.
"""

from __future__ import annotations

import codecs
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

from traceir.errors import ImageError, InputError
from traceir.images import SUFFIXES as IMAGE_SUFFIXES
from traceir.images import ImageInput
from traceir.index.filters import OWN_NAMES, check_field
from traceir.index.store import check_id, check_text
from traceir.items import Item

TEXT_SUFFIXES: Final = frozenset({".txt", ".md"})
LINES_SUFFIXES: Final = frozenset({".jsonl", ".ndjson"})
MAX_TEXT_BYTES: Final = 4 * 1024 * 1024
"""Bytes of a text file, and of a line."""
TEXT_NAMES: Final = ("caption", "title", "description", "name", "content")
"""Where the text of a line is sought, in this order, that has neither `text` nor `image`."""
FILE_FIELD: Final = "_file"
"""The field that holds the path of an item's file: no line may set it, no server shows or filters by it."""
STAT_FIELD: Final = "_stat"
"""As FILE_FIELD: size and times of that file when it was read (`roots.py`)."""
_REMEDIES: Final = (
    ("convert images to JPEG or PNG", ".heic .heif .avif .jxl .jp2 .svg .psd .eps .ico .dng .cr2 .cr3 .nef .arw .raw"),
    ("save single frames of videos as images", ".mp4 .mov .avi .mkv .webm .m4v .wmv .3gp"),
    ("save documents as .txt, or their pages as images", ".pdf .doc .docx .odt .rtf .epub .ppt .pptx .htm .html .rst .tex"),
    ("write tables as .jsonl, one {id, text, image} a line", ".json .csv .tsv .xls .xlsx .ods .parquet .xml .yaml .yml"),
)
_OTHER_ENCODINGS: Final = {
    **dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-32"),
    **dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-16"),
}

Kind = Literal["image", "text", "line"]


@dataclass(frozen=True, slots=True)
class Failure:
    """What could not be added: where (path or file:line) and why."""

    location: str
    reason: str


@dataclass(frozen=True, slots=True)
class Note:
    """What was not taken as it stands: where, and what was done instead."""

    location: str
    what: str


@dataclass(frozen=True, slots=True)
class Source:
    """What an item is made from, which is read only when `make_item` is called."""

    id: str
    location: str
    kind: Kind
    path: Path
    record: Mapping[str, Any] | None = None

    def make_item(self) -> tuple[Item, tuple[Note, ...]]:
        """The item and notes on it. Raises InputError (ImageError, for an image's path) naming what is wrong."""
        if self.record is not None:
            name = _text_or_none(self.id, "image", self.record.get("image"))
            image = ImageInput.open(name if "://" in name else self.path.parent.resolve() / name) if name else None
            return _item_of_record(self, self.record, image)
        path = self.path.resolve()
        content = {"image": path} if self.kind == "image" else {"text": _read_text(self.path)}
        return Item.of(**content, id=self.id, fields={FILE_FIELD: str(path)}), ()

    def without_image(self, error: ImageError) -> tuple[Item, tuple[Note, ...]]:
        """The item by its text alone, because of this error; raises it where there is no text, or the line states a modality."""
        text = None if self.record is None else self.record.get("text")
        if self.record is None or not isinstance(text, str) or not text.strip() or self.record.get("modality") is not None:
            raise error
        item, notes = _item_of_record(self, self.record, None)
        return item, (*notes, Note(self.location, f"kept with its text alone: {error}"))


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
    return IMAGE_SUFFIXES | TEXT_SUFFIXES


def sources_of_file(path: Path, id: str) -> Iterator[Source | Failure | Note]:
    """Everything in one file, in its order: under `id`, or `id#...` for what is a part of it; lines have ids of their own.

    A file of no known suffix may be an image. What cannot be read is a Failure.
    """
    if path.suffix.lower() in LINES_SUFFIXES:
        yield from _read_lines(path)
    else:
        yield _whole_file(path, id)


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
    """Images and texts below a folder in order of name, hidden ones left out; links to folders are not followed."""
    read = hidden = links = 0
    other: Counter[str] = Counter()
    unreadable: list[OSError] = []
    for folder, folders, names in os.walk(root, onerror=unreadable.append):
        hidden += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links += sum((Path(folder) / name).is_symlink() for name in folders)
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(folder) / name
            if path.suffix.lower() in readable_suffixes():
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
    read = ", ".join(sorted(IMAGE_SUFFIXES | TEXT_SUFFIXES)) + ", and .jsonl where the file is named"
    return "; ".join([f"read are {read}", *(remedy for remedy, own in _REMEDIES if not set(own.split()).isdisjoint(suffixes))])


def _whole_file(path: Path, id: str) -> Source | Failure:
    """The file as one item; it may be an image whatever its suffix says."""
    kind = _kind_of(path)
    try:
        if kind is None:
            ImageInput.open(path).encoded()
    except ImageError:
        return Failure(str(path), f"it is neither an image nor a text; {_remedy([path.suffix.lower()])}")
    return _source_of_file(path, id, kind or "image")


def _source_of_file(path: Path, id: str, kind: Kind) -> Source | Failure:
    try:
        return Source(check_id(id), str(path), kind, path)
    except InputError as error:
        return Failure(repr(str(path)), str(error))


def _kind_of(path: Path) -> Kind | None:
    suffix = path.suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES else "text" if suffix in TEXT_SUFFIXES else None


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():
            raise InputError(f"{path} is not a regular file; give a text file")
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            raise InputError(f"{path} is longer than {MAX_TEXT_BYTES} bytes; split it")
        if why := _other_encoding(data):
            raise InputError(f"{path} is {why}")
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check its rights") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from error
    if not text.strip():
        raise InputError(f"{path} holds no text; fill or remove it")
    return text


def _other_encoding(data: bytes) -> str:
    """What is told of a file that starts as one of another encoding does, else ""."""
    name = next((name for mark, name in _OTHER_ENCODINGS.items() if data.startswith(mark)), "")
    return name and f"{name}, not UTF-8; convert it, for instance by `iconv -f {name} -t UTF-8`"


def _read_lines(path: Path) -> Iterator[Source | Failure]:
    start = path.parent.resolve()
    folders = [start, start, *start.parents]
    try:
        with path.open("rb") as file:
            lines = ((number, line) for number, line in enumerate(_lines_of(file), start=1) if line.strip())
            first = next(lines, None)
            if why := "it holds no lines; write one {id, text, image} a line" if first is None else _not_lines(first[1]):
                yield Failure(str(path), why)
                return
            for number, line in chain([first] if first else [], lines):
                yield _source_of_line(path, number, line, folders)
    except OSError as error:
        yield Failure(str(path), f"it cannot be read: {error.strerror}; check its rights")


def _lines_of(file: BinaryIO) -> Iterator[bytes]:
    """Lines, each read up to a little more than MAX_TEXT_BYTES; what is beyond is passed over."""
    while line := file.readline(MAX_TEXT_BYTES + 1):
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_TEXT_BYTES)):
            pass
        yield line


def _not_lines(first: bytes) -> str | None:
    """Why a file with this first line holds no JSON lines at all."""
    if why := _other_encoding(first):
        return f"it is {why}"
    if first.strip().removeprefix(codecs.BOM_UTF8) in (b"[", b"{"):
        return "it is one JSON text over many lines; write one object a line, for instance by `jq -c '.[]'`"
    return None


def _source_of_line(path: Path, number: int, line: bytes, folders: list[Path]) -> Source | Failure:
    location = f"{path}:{number}"
    try:
        if len(line) > MAX_TEXT_BYTES:
            raise InputError(f"the line is longer than {MAX_TEXT_BYTES} bytes; split its text")
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        if not isinstance(record, dict):
            raise InputError(f"the line is not a JSON object but a {type(record).__name__}; write one object {{...}} a line")
        if "did" in record:
            record = _plain_record(record, folders)
        id = record.get("id")
        id = str(id) if isinstance(id, int) and not isinstance(id, bool) else id
        return Source(check_id(id), location, "line", path, record)
    except UnicodeDecodeError as error:
        return Failure(location, f"the line is not UTF-8 (byte {error.start}); convert the file")
    except json.JSONDecodeError as error:
        return Failure(location, f"the line is not JSON: {error.msg} at column {error.colno}; repair it")
    except RecursionError:
        return Failure(location, "the line is nested too deeply; write a flat JSON object")
    except InputError as error:
        return Failure(location, str(error))
    except ValueError as error:  # an integer of thousands of digits
        return Failure(location, f"the line holds a value that cannot be read: {error}; correct it")


def _plain_record(record: Mapping[str, Any], folders: list[Path]) -> dict[str, Any]:
    """A line of an M-BEIR pool ({did, txt, img_path, modality}) as {id, text, image, modality}.

    Paths of images start at an ancestor of the pool: `folders` are the one that held the last image, then all, nearest first.
    """
    image = _text_or_none(record["did"], "img_path", record.get("img_path"))
    if image:
        root = next((root for root in folders if os.path.exists(root / image)), None)  # noqa: PTH110 - never an error for odd names
        if root is None:
            raise InputError(f"image {image!r} is in no folder above {folders[1]}; unpack the images beside the pool")
        folders[0], image = root, str(root / image)
    modality = "image,text" if record.get("modality") == "text,image" else record.get("modality")
    return {"id": record["did"], "text": record.get("txt"), "image": image or None, "modality": modality}


def _item_of_record(source: Source, record: Mapping[str, Any], image: ImageInput | None) -> tuple[Item, tuple[Note, ...]]:
    text = _text_or_none(source.id, "text", record.get("text"))
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


def _text_or_none(id: object, name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InputError(f"{name} of {id!r} is {repr(value)[:80]}; write a text or null")
    return value
