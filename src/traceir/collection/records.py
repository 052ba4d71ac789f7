"""Lines of JSON and rows of tables as records; the bad ones are named by file and line, and the rest goes on."""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Final

from traceir.errors import InputError

LINES_SUFFIXES: Final = frozenset({".jsonl", ".ndjson"})
TABLE_SUFFIXES: Final = frozenset({".csv", ".tsv"})
MAX_TEXT_BYTES: Final = 4 * 1024 * 1024
"""Bytes of a line."""
TEXT_NAMES: Final = ("caption", "title", "description", "name", "content")
"""Where the text of a record is sought, in this order, that has neither `text` nor `image`."""
_OTHER_ENCODINGS: Final = {
    **dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-32"),
    **dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-16"),
}
_OWN_COLUMNS: Final = ("id", "text", "image", "modality")
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d{1,15})?([eE][+-]?\d{1,2})?")
"""Not `007` or a card's number: those are names."""


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
class FileRecord:
    """One line of JSON, or one row."""

    location: str
    values: Mapping[str, Any]


def read_records(path: Path) -> Iterator[FileRecord | Failure | Note]:
    """The records of a file of LINES_SUFFIXES or TABLE_SUFFIXES."""
    try:
        if not path.is_file():
            yield Failure(str(path), "it is not a regular file; give a file")
            return
        yield from _read_table(path) if path.suffix.lower() in TABLE_SUFFIXES else _read_lines(path)
    except OSError as error:
        yield Failure(str(path), f"it cannot be read: {error.strerror}; check its rights")


def other_encoding(data: bytes) -> str:
    """What is told of a file that starts as one of another encoding does, else ""."""
    name = next((name for mark, name in _OTHER_ENCODINGS.items() if data.startswith(mark)), "")
    return name and f"{name}, not UTF-8; convert it, for instance by `iconv -f {name} -t UTF-8`"


def text_or_none(id: object, name: str, value: Any) -> str | None:
    """A value of a record that must be a text; InputError for any other."""
    if value is not None and not isinstance(value, str):
        raise InputError(f"{name} of {id!r} is {repr(value)[:80]}; write a text or null")
    return value


# Lines of JSON


def _read_lines(path: Path) -> Iterator[FileRecord | Failure]:
    start = path.parent.resolve()
    folders = [start, start, *start.parents]
    with path.open("rb") as file:
        lines = ((number, line) for number, line in enumerate(_lines_of(file), start=1) if line.strip())
        first = next(lines, None)
        if why := "it holds no lines; write one {id, text, image} a line" if first is None else _not_lines(first[1]):
            yield Failure(str(path), why)
            return
        for number, line in chain([first] if first else [], lines):
            yield _record_of_line(path, number, line, folders)


def _lines_of(file: BinaryIO) -> Iterator[bytes]:
    """Lines, each read up to a little more than MAX_TEXT_BYTES; what is beyond is passed over."""
    while line := file.readline(MAX_TEXT_BYTES + 1):
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_TEXT_BYTES)):
            pass
        yield line


def _not_lines(first: bytes) -> str | None:
    """Why a file with this first line holds no JSON lines at all."""
    if why := other_encoding(first):
        return f"it is {why}"
    if first.strip().removeprefix(codecs.BOM_UTF8) in (b"[", b"{"):
        return "it is one JSON text over many lines; write one object a line, for instance by `jq -c '.[]'`"
    return None


def _record_of_line(path: Path, number: int, line: bytes, folders: list[Path]) -> FileRecord | Failure:
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
        return FileRecord(location, {**record, "id": id})
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
    image = text_or_none(record["did"], "img_path", record.get("img_path"))
    if image:
        root = next((root for root in folders if os.path.exists(root / image)), None)  # noqa: PTH110 - never an error for odd names
        if root is None:
            raise InputError(f"image {image!r} is in no folder above {folders[1]}; unpack the images beside the pool")
        folders[0], image = root, str(root / image)
    modality = "image,text" if record.get("modality") == "text,image" else record.get("modality")
    return {"id": record["did"], "text": record.get("txt"), "image": image or None, "modality": modality}


# Rows of tables


def _read_table(path: Path) -> Iterator[FileRecord | Failure | Note]:
    """Rows below a row of names, separated by comma, semicolon, tab or bar: whichever makes most of the names."""
    encoding, note = _encoding_of(path)
    with path.open(encoding=encoding, errors="replace", newline="") as file:
        first, above = file.readline(MAX_TEXT_BYTES), 1
        if first.lower().startswith("sep="):  # as Excel writes it
            first, above = file.readline(MAX_TEXT_BYTES), 2
        while first.count('"') % 2 and len(first) < MAX_TEXT_BYTES and (more := file.readline(MAX_TEXT_BYTES)):
            first, above = first + more, above + 1  # a name over two lines
        delimiter = max(",;\t|", key=lambda delimiter: len(_cells(first, delimiter)))
        names = [_column(name) for name in _cells(first, delimiter)]
        if why := _not_table(names):
            yield Failure(str(path), why)
            return
        if note:
            yield Note(str(path), note)
        lines = iter(lambda: file.readline(MAX_TEXT_BYTES), "")  # so that a file of one endless line is not read whole
        rows, before = csv.reader(lines, delimiter=delimiter, strict=True), above
        csv.field_size_limit(MAX_TEXT_BYTES)
        while True:
            location = f"{path}:{before + 1}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                yield Failure(location, f"the row cannot be read: {error}; repair its quotes")
            else:
                if row is None:
                    return
                if any(cell.strip() for cell in row):
                    yield _record_of_row(location, names, row)
            before = rows.line_num + above


def _encoding_of(path: Path) -> tuple[str, str]:
    """How the file is written, and what is told of that."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        if (start := file.peek(4)[:4]) and other_encoding(start):
            name = other_encoding(start).partition(",")[0]
            return name, f"it was read as {name}"
        try:
            while data := file.read(1 << 20):
                decoder.decode(data)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "cp1252", "it is not UTF-8: it was read as Windows-1252; save it as UTF-8 where letters come out wrong"
    return "utf-8-sig", ""


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return []


def _column(name: str) -> str:
    name = name.strip()
    return name.lower() if name.lower() in _OWN_COLUMNS else name


def _not_table(names: Sequence[str]) -> str:
    """Why rows below these names are no items; "" where they are."""
    repeated = next((name for name in names if name and names.count(name) > 1), "")
    shown = ", ".join(filter(None, names))[:200] or "none"
    if "id" not in names:
        return f"it has no column `id` (its columns: {shown}); name columns in its first row: id, text, image, and fields"
    return repeated and f"its column {repeated!r} occurs twice; rename one"


def _record_of_row(location: str, names: Sequence[str], row: Sequence[str]) -> FileRecord | Failure:
    if any(cell.strip() for cell in row[len(names) :]):
        return Failure(
            location, f"the row has {len(row)} cells, but {len(names)} columns have names; quote cells with separators"
        )
    cells = {name: cell for name, cell in zip(names, row, strict=False) if name and cell.strip()}
    texts = (*_OWN_COLUMNS, *TEXT_NAMES)
    return FileRecord(location, {name: cell if name in texts else _value(cell.strip()) for name, cell in cells.items()})


def _value(cell: str) -> str | int | float:
    """A number where it is written as one."""
    form = _NUMBER.fullmatch(cell)
    if form is None:
        return cell
    return float(cell) if form[2] or form[3] else int(cell)
