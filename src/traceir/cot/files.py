"""The files of a build: JSON lines read with the location of what is wrong in them, text written whole, locks."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from io import BufferedWriter
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from traceir.errors import DataError, InputError, TeacherError
from traceir.files import write_whole
from traceir.outside import read_json, valid

Row = TypeVar("Row")


def json_lines(path: Path, read: Callable[[Any], Row], remedy: str, *, ended: bool = False) -> Iterator[Row]:
    """What `read` makes of the JSON of each line that is not blank; with `ended` a last line without its end is left out.

    Raises DataError with `file:line` and the remedy for the first line that is no JSON, or that `read` refuses by ValueError,
    KeyError, TypeError or AttributeError.
    """
    number = 0
    try:
        with path.open("rb") as stream:
            for raw in tqdm(stream, desc=f"reading {path.name}", unit="line", mininterval=2.0, delay=2.0):
                number += 1
                if raw.strip() and (raw.endswith(b"\n") or not ended):
                    yield read(read_json(raw))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; {remedy}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{path}:{number}: {what}; {remedy}") from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; {} where the file is not there. Raises DataError where it cannot be read, or holds another value."""
    try:
        content = read_json(path.read_bytes()) if path.is_file() else {}
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); make it again, or remove it") from error
    return content


def read_document(path: Path, name: str, format: int, missing: str, remedy: str) -> dict[str, Any]:
    """The JSON object of this `name` and `format` in a file, as `write_json` wrote it.

    Raises InputError, which says what to do where it is `missing`, and DataError with the remedy where it is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or (content.get("name"), content.get("format")) != (name, format):
            raise ValueError(f"not a {name} of format {format}")
    except FileNotFoundError as error:
        raise InputError(f"{path} is not there; {missing}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}; {remedy}") from error
    return content


def write_json(path: Path, content: Any) -> None:
    """`write_text` of JSON; a path that is no UTF-8 keeps its bytes, escaped."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    write_text(path, (text if text == valid(text) else json.dumps(content, indent=2)) + "\n")


def write_text(path: Path, text: str) -> None:
    """Written beside the target and renamed, so that a reader never sees half of it; missing folders are made."""
    try:
        write_whole(path, text)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; free some space or choose another folder, then run again") from error


def lock_file(path: Path, remedy: str) -> BufferedWriter:
    """The file, locked until it is closed. TeacherError where another process has locked it, or where it cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("ab")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TeacherError(f"{path}: another process writes here; {remedy}") from error
    except OSError as error:
        raise TeacherError(f"{path}: {error.strerror or error}; check the folder, its rights, locks and the disk") from error
    return lock
