"""The files of a build: JSON lines read with the place of what is wrong in them, text written whole, locks."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from io import BufferedWriter
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from traceir.errors import DataError, TeacherError
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
        raise DataError(f"{path}:{number}: {error!r}; {remedy}") from error


def write_json(path: Path, content: Any) -> None:
    """Written beside its place and renamed; a path that is no UTF-8 keeps its bytes, escaped."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    write_text(path, (text if text == valid(text) else json.dumps(content, indent=2)) + "\n")


def write_text(path: Path, text: str) -> None:
    """Written beside its place and renamed, so that a reader never sees half of it."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
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
