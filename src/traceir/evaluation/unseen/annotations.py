"""Annotation files, checked: JSON with the place of what is wrong, fields by type, file names that stay in their folder."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from traceir.errors import DataError


class Entry:
    """One JSON object and where it stands, such as `val.json, entry 3`. Each reader of a field names the place in its error."""

    __slots__ = ("fields", "where")

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise DataError(f"{where}: is {_short(value)}; it must be an object")
        self.fields: dict[str, Any] = value
        self.where = where

    def fail(self, name: str, wanted: str) -> DataError:
        shown = _short(self.fields[name]) if name in self.fields else "missing"
        return DataError(f"{self.where}: {name} is {shown}; it must be {wanted}; download the file again")

    def text(self, name: str) -> str:
        """A text that is not blank, as published."""
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.fail(name, "a text that is not blank")
        return value

    def name(self, name: str) -> str:
        """An id as a string; published as a string or as an integer, without blanks and slashes, so that it can name a file."""
        found = as_name(self.fields.get(name))
        if found is None:
            raise self.fail(name, "an id: a word or an integer")
        return found

    def number(self, name: str, below: int | None = None) -> int:
        """An integer of at least 0, less than `below`."""
        value = self.fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0 or (below is not None and value >= below):
            raise self.fail(name, "an integer of at least 0" + (f" and less than {below}" if below is not None else ""))
        return value

    def entry(self, name: str) -> Entry:
        if not isinstance(self.fields.get(name), dict):
            raise self.fail(name, "an object")
        return Entry(self.fields[name], f"{self.where}, {name}")

    def values(self, name: str) -> list[Any]:
        value = self.fields.get(name)
        if not isinstance(value, list):
            raise self.fail(name, "a list")
        return value

    def entries(self, name: str) -> list[Entry]:
        return [Entry(value, f"{self.where}, {name} {number}") for number, value in enumerate(self.values(name))]

    def names(self, name: str) -> tuple[str, ...]:
        """A list of ids."""
        found = [as_name(value) for value in self.values(name)]
        ids = tuple(id for id in found if id is not None)
        if len(ids) != len(found):
            raise self.fail(name, "a list of ids")
        return ids


def as_name(value: object) -> str | None:
    """An id, published as a string or as an integer, as a string; None for what is not one or could not name a file."""
    found = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(found, str) or found.split() != [found] or set(found) & set("/\\\0") or set(found) == {"."}:
        return None
    return found


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises DataError with `file:line` where it is broken."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; docs/unseen.md lists the files of each set") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; download the file again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; check the path and rights") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: column {error.colno}: {error.msg}; download the file again") from error
    except RecursionError as error:
        raise DataError(f"{path}: is nested too deeply to be an annotation file; download the file again") from error


def read_object(path: Path) -> Entry:
    """The one object that a file holds."""
    return Entry(read_json(path), str(path))


def read_list(path: Path) -> list[Any]:
    value = read_json(path)
    if not isinstance(value, list):
        raise DataError(f"{path}: holds {_short(value)}; it must hold a list; download the file again")
    return value


def read_entries(path: Path) -> list[Entry]:
    """The objects of a file that holds a list of them; entries count from 0, as in the published ids."""
    return [Entry(value, f"{path}, entry {number}") for number, value in enumerate(read_list(path))]


def below(folder: Path, name: str, where: str) -> Path:
    """The file `name` below a folder. Raises DataError where the name would leave it."""
    parts = PurePosixPath(name)
    if not name or parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name:
        raise DataError(f"{where}: {name!r} is not a file below {folder}; download the file again")
    return folder / parts


def _short(value: object) -> str:
    return repr(value)[:120]
